"""The first screen of a report: what was checked, against what, and the words that a reader needs for the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from calibrant.evaluation.judgements.wording import counted
from calibrant.evaluation.remedying.commands import training_line
from calibrant.evaluation.reporting.formulas import guide_formula, model_formula, shape_words
from calibrant.evaluation.results import RunResult
from calibrant.inference.references.gate import convergence_of

# Each is explained once on a page, where the word first stands.
TERMS = {
    r"\bk-hat\b": "k-hat measures how unequal the importance weights p(x, z) / q(z | x) of a datum are. Where it is "
    "large, a few draws carry all the weight, and reweighting cannot correct the guide.",
    r"\blog joint\b": "The log joint is log p(x, z): how probable a datum and its latents are together.",
    r"\bELBO\b": "The ELBO is the lower bound of the log evidence log p(x) that training maximises; they are equal if "
    "the guide is the posterior.",
}


def facts(result: RunResult) -> list[tuple[str, str]]:
    """What was checked, the model, the guide, and what it was compared with."""
    observed, covariates = (result.rows(group, 8) for group in ("observed_data", "constant_data"))
    rows = [
        ("Checked", _data(result)),
        ("Model", model_formula(result.model, observed, covariates)),
        ("Guide", _guide(result.config.get("guide") or {})),
        ("Compared with", _reference(result)),
    ]
    return [(name, words) for name, words in rows if words]


def _data(result: RunResult) -> str:
    config = result.config
    other = (config.get("checked") or {}).get("data")
    given = config.get("data") or {}
    name = other if other is not None and other != given.get("path") else given.get("name") or given.get("path")
    observed = result.rows("observed_data", 1)
    shapes = ", ".join(
        f"`{key}`: {shape_words(value.shape[1:])}" if value.ndim > 1 else f"`{key}`" for key, value in observed.items()
    )
    count = counted(result.amortized["observed_data"].sizes["data"]) if observed else "the data"
    has_shared = result.comparison is not None and "shared_site" in result.comparison.coords
    held_out = ", held out from training" if config.get("checked") and not has_shared else ""
    return f"{count}{f' of `{name}`' if name else ''}{held_out}{f' ({shapes})' if shapes else ''}"


def _guide(spec: Mapping[str, Any]) -> str:
    formula = guide_formula(spec)
    return f"{formula} (structure `{spec['structure']}`)" if formula else ""


def _reference(result: RunResult) -> str:
    """The reference posterior, and how it is known; for predictions the observations."""
    if result.probabilities is not None:
        return "the observations of these data, which the predictions did not see"
    parts = [_posterior(result)] if result.reference is not None else []
    if result.calibration is not None:
        simulated = counted(result.calibration["prior_sbc"].sizes["draw"])
        parts.append(f"the true latents of {simulated} simulated from the model")
    return ", and with ".join(parts) or "nothing: there is no reference posterior"


def _posterior(result: RunResult) -> str:
    assert result.reference is not None
    attrs, gate = result.reference["posterior"].attrs, convergence_of(result.reference)
    errors = gate["grid_error"].values if "grid_error" in gate else np.array([np.nan])
    if attrs.get("method") == "exact":
        is_quadrature = np.isfinite(errors).any() and errors[np.isfinite(errors)].max() > 0
        known = "by quadrature, up to rounding" if is_quadrature else "in closed form"
        found = f"the exact posterior of every datum, known {known}"
    else:
        sizes, name = result.reference["posterior"].sizes, str(attrs.get("method", "unknown method"))
        how = {"nuts": "NUTS", "pyro-nuts": "Pyro's NUTS", "importance": "importance sampling"}.get(name, name)
        chains = counted(sizes["chain"], "chain", "chains")
        found = f"the exact posterior of every datum, sampled by {how} ({chains} of {sizes['draw']:,} draws)"
    passed, count = int(gate["is_reference"].sum()), gate.sizes["data"]
    return found if passed == count else f"{found}; {passed} of {count} passed the convergence gate"


def terms_in(text: str, explained: set[str]) -> list[str]:
    """The explanations of the words of a text that were not explained before; they are added to `explained`."""
    new = [pattern for pattern in TERMS if pattern not in explained and re.search(pattern, text)]
    explained.update(new)
    return [TERMS[pattern] for pattern in new]


def again(result: RunResult, command: str) -> str:
    """The lines that make the report again: the command, else one like it, else Python."""
    request = result.config.get("request")
    if command:
        return command
    if request:
        return training_line(request)
    settings = result.config.get("settings") or {}
    given = "".join(f", {name}={value!r}" for name, value in settings.items())
    if not settings:
        return 'import calibrant as cal\n\ncal.evaluation.report([result], "report.html")'
    return (
        f'import calibrant as cal\n\nfound = cal.evaluation.check(model, guide, data{given})\nfound.save("report.html")'
    )
