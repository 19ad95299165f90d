"""The story of a run of several members: what their verdicts say, in one plain sentence for each."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from calibrant.evaluation.checking import judged
from calibrant.evaluation.judgements.conclusion import Conclusion
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_probabilities import PREDICTED
from calibrant.evaluation.remedying.next_steps import concluded
from calibrant.evaluation.results import RunResult
from calibrant.settings import model_of, structure_of

_NOTHING = 1e-3  # change of a posterior sd, in prior sds, that is none


def told(results: Sequence[RunResult]) -> list[str]:
    """A sentence for every member of a run of several, which follows from its verdicts; none for one member alone."""
    names = [result.name for result in results]
    if len(names) < 2:
        return []
    members = [(result.name, found, concluded(result, found)) for result in results for found in [judged(result)]]
    return [sentence(name, found, conclusion, names) for name, found, conclusion in members]


def sentence(name: str, found: Sequence[Verdict], conclusion: Conclusion, names: Sequence[str]) -> str:
    """What the verdicts on a member say.

    Args:
        name: name of the member, a model or MODEL+STRUCTURE.
        found: its verdicts.
        conclusion: the conclusion from them.
        names: names of all members of the run.
    """
    structure, guide = structure_of(name), _guide(found, conclusion)
    if structure is not None and model_of(name) in names:
        return f'`{name}`: for the same model, a guide with `structure="{structure}"` {guide}.'
    model = _model(found)
    if model is None:
        return f"`{name}`: the guide {guide}."
    is_right, words = model
    link = "and" if (conclusion.status == "pass") == is_right else "but"
    return f"`{name}`: {words}, {link} its guide {guide}."


def _model(found: Sequence[Verdict]) -> tuple[bool, str] | None:
    """Whether a model behaves as it should when the contrast of images rises, and the words; None if unknown."""
    verdict = next((v for v in found if v.site == "model" and v.quantity == "contrast"), None)
    if verdict is None:
        return None
    if verdict.status == "pass":
        by = f"{-verdict.effect:.0%} of the prior sd"
        return True, f"the model does what it should (its exact posterior sd falls by {by} as contrast rises)"
    if verdict.status == "fail" and abs(verdict.effect) < verdict.margin:
        little = "does not depend" if abs(verdict.effect) < _NOTHING else "hardly depends"
        return False, f"the model is flat (its exact posterior sd {little} on contrast)"
    if verdict.status == "fail":
        return False, "the model is wrong (its exact posterior sd does not fall steadily as contrast rises)"
    return False, "what the model does as contrast rises cannot be told"


def _guide(found: Sequence[Verdict], conclusion: Conclusion) -> str:
    """What the check says about a guide, as a predicate."""
    deciding = [verdict for verdict in found if verdict.primary]
    failed = [verdict.sentence for verdict in deciding if verdict.status == "fail"]
    off = [v.sentence.removeprefix("guide: ") for v in found if v.site == "guide" and v.status == "fail"]
    if conclusion.status == "fail":
        said = f"fails {len(failed)} of {len(deciding)} questions ({failed[0]})" if failed else "fails"
        return "".join([said, *(f", and {words}" for words in off[:1]), f"; {_advice(conclusion)}"])
    if conclusion.status == "cannot tell":
        lacks = "no question fails, but more data or draws are needed"
        if all(verdict.status == "pass" for verdict in deciding):
            lacks = f"{conclusion.sentences[0][:1].lower()}{conclusion.sentences[0][1:].rstrip('.')}"
        return f"could not be judged: {lacks}; {_advice(conclusion)}"
    if off:
        return f"passes the check, but not at every contrast ({off[0]})"
    return f"passes the check: {_agreement({verdict.quantity for verdict in deciding})}"


def _agreement(asked: set[str]) -> str:
    """What a pass says, by the quantities that were asked about."""
    if asked & set(PREDICTED):
        return "its predicted probabilities agree with the observations"
    return "its uncertainty agrees with the exact posterior within the margins of the check"


def _advice(conclusion: Conclusion) -> str:
    """The remedy of a conclusion inside a sentence: the structure that its line names, else its sentence."""
    words = shlex.split(conclusion.next_line, comments=True) if conclusion.next_line.startswith("calibrant ") else []
    if "--structure" in words:
        return f'the remedy to try is `structure="{words[words.index("--structure") + 1]}"`'
    told = conclusion.remedy.rstrip(":.")
    return f"what to do next: {told[:1].lower()}{told[1:]}"
