"""The next thing to do after a check, as a sentence and a line that can be pasted into a shell or into Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from calibrant.binding import bind
from calibrant.errors import CalibrantError
from calibrant.evaluation.judgements.conclusion import (
    FULL_DATA,
    FULL_DRAWS,
    FULL_SIMULATIONS,
    SHARED_DRAWS,
    SINGLE_DRAWS,
    Conclusion,
    conclude,
)
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_averaging import AVERAGED
from calibrant.evaluation.judgements.on_misreading import MISREAD, output_of
from calibrant.evaluation.judgements.on_probabilities import FULL_DATA as PREDICTED_DATA
from calibrant.evaluation.judgements.on_probabilities import PREDICTED
from calibrant.evaluation.remedying.commands import checking_line, training_line
from calibrant.evaluation.remedying.failures import SUMS
from calibrant.evaluation.remedying.measuring import REFINED, RESAMPLED
from calibrant.evaluation.remedying.richer import flows
from calibrant.evaluation.remedying.sentences import helpful
from calibrant.evaluation.results import RunResult
from calibrant.guides.collapsed import gaussian_block
from calibrant.inference.fitting.lengths import STILL_RISING
from calibrant.settings import Effort
from calibrant.userfile import is_user_spec

_FEW_EPOCHS = 4  # fewer of them cannot show whether the ELBO still rises (`lengths.still_rises`)
_EFFORT = ("draws", "chains", "warmup", "simulations")
_DEPENDENCIES = ("correlation", "direction")  # what a guide without the structure cannot learn, however long it trains
Step = tuple[str, str]  # a sentence, and the line that does what it says


def concluded(result: RunResult, found: Sequence[Verdict]) -> Conclusion:
    """The conclusion of a check, with the next step.

    Args:
        result: the result of the check.
        found: its verdicts.
    """
    conclusion = conclude(found, result.comparison)
    remedy, line = _Next(result, found).step(conclusion.status)
    return replace(conclusion, remedy=remedy, next_line=line)


@dataclass(frozen=True)
class _Next:
    """The choice of the next step."""

    result: RunResult
    found: Sequence[Verdict]

    def step(self, status: str) -> Step:
        if status == "pass":
            return self._use()
        if self.request.get("quick"):
            return (
                "Train and check it in full, since the guide of a quick run is hardly trained:",
                training_line(self.request),
            )
        return self._remedy() if status == "fail" else self._decide()

    # -- what is known -------------------------------------------------------------------------------------------------

    @property
    def request(self) -> Mapping[str, Any]:
        """The request of the command that made the run; empty in Python."""
        return self.result.config.get("request") or {}

    @property
    def epochs(self) -> int:
        return int((self.result.config.get("fit") or {}).get("epochs") or 0)

    @property
    def failed(self) -> set[str]:
        return {verdict.quantity for verdict in self.found if verdict.primary and verdict.status == "fail"}

    @property
    def in_python(self) -> str:
        """The statements that load model and guide, where they are in a folder, with their semicolons."""
        if self.result.folder is None or not self.request:
            return ""
        own = [name for name in self.request["models"] if is_user_spec(name)]
        model = f", model={own[0]!r}" if own else ""
        return f"import calibrant as cal; model, guide = cal.load({str(self.result.folder)!r}{model}); "

    # -- pass ----------------------------------------------------------------------------------------------------------

    def _use(self) -> Step:
        if self.result.probabilities is not None:
            line = "predicted = cal.evaluation.predicted_probabilities(model, guide, new_data)"
            return "Use its predictions for data like these:", self.in_python + line
        line = "post = cal.inference.posterior(model, guide, new_data)"
        return "Use its posterior draws for data like these:", self.in_python + line

    # -- fail ----------------------------------------------------------------------------------------------------------

    def _remedy(self) -> Step:
        if misread := [verdict for verdict in self.found if verdict.quantity == MISREAD]:
            line = f'guide = cal.guides.from_encoder(encoder, "{output_of(misread[0])}")'
            return "Say what the encoder returns:", line
        if (best := helpful(self.result.remedies)) is not None:
            return "Take the remedy that helped most of those that were tried:", self._tried(best)
        if any(verdict.quantity == AVERAGED for verdict in self.found):
            return f"{SUMS[:-1]}:", f"{self.in_python}cal.inference.fit(model, guide, train)"
        if self.failed & set(PREDICTED):
            return self._predictions()
        richer = self._richer()
        if richer and self.failed & set(_DEPENDENCIES):
            return self._with_structure(richer)
        if (self.result.config.get("fit") or {}).get("stopped") == STILL_RISING:
            return "Train longer, since the ELBO was still rising when the training ended:", self._longer()
        if self.request and 0 < self.epochs < _FEW_EPOCHS:
            count = "one epoch" if self.epochs == 1 else f"{self.epochs} epochs"
            line = training_line(self.request, epochs=None)
            return f"Train for as long as the default, since the guide was trained for {count} only:", line
        if richer and self.failed - {"mean", "single data"}:
            return self._with_structure(richer)
        return self._try()

    def _tried(self, best: str) -> str:
        if best == REFINED:
            return f"{self.in_python}guide = cal.guides.refine(model, guide, data)"
        if best == RESAMPLED:
            pool = "cal.inference.posterior(model, guide, data, draws=10_000)"
            return f"{self.in_python}post = cal.inference.importance({pool}, draws=1000)"
        structure, _, flow = best.partition(", ")
        return self._structure(structure, self._flows() if flow else None)

    def _predictions(self) -> Step:
        confident = any(v.quantity == "confidence" and v.status == "fail" and v.effect < 0 for v in self.found)
        epochs = max(1, self.epochs // 2) if confident else 2 * (self.epochs or 10)
        sentence = "Train for fewer epochs, since the predictions are too confident:" if confident else "Train longer:"
        if self.request:
            return sentence, training_line(self.request, epochs=epochs)
        return sentence, f"cal.inference.fit(model, guide, train, epochs={epochs})"

    def _with_structure(self, structure: str) -> Step:
        return f"Train a guide with a richer structure ({structure}), and check it:", self._structure(structure)

    def _structure(self, structure: str, family: Mapping[str, str] | None = None) -> str:
        if self.request:
            changes = {"family": family} if family or structure == "full" else {"family": None, "encoder": None}
            return training_line(self.request, structure=structure, **changes)
        families = f", {json.dumps(dict(family))}" if family else ""
        fixed = "model.requires_grad_(False)" if any(True for _ in self.result.model.parameters()) else "model"
        made = f'guide = cal.guides.amortize(model, train, "{structure}"{families})'
        if structure == "collapsed" and set(self._names()) <= set(self._block()):
            return made  # it is the exact posterior, with nothing to train
        return f"{made}; cal.inference.fit({fixed}, guide, train)"

    def _longer(self) -> str:
        return (
            training_line(self.request, epochs=2 * self.epochs)
            if self.request
            else (f"cal.inference.fit(model, guide, train, epochs={2 * self.epochs})")
        )

    def _try(self) -> Step:
        if self.result.remedies is not None:
            sentence = "None of the remedies that were tried is known to help, so draw from the reference itself:"
            return sentence, f"{self.in_python}post = cal.inference.reference(model, data)"
        few = "" if self.epochs else "If the guide was trained for few epochs, train it longer first. Otherwise t"
        sentence = (
            f"{few or 'T'}ry what helps (refining, reweighting, richer guides), and measure it, which takes "
            "as long as several trainings, often some minutes:"
        )
        if self.request and self.result.folder is not None:
            return sentence, checking_line(self.result.folder, self.request, remedies=True)
        settings = f"{self._as_before()}, remedies=True"
        return sentence, f"{self.in_python}found = cal.evaluation.check(model, guide, data{settings}); print(found)"

    def _as_before(self) -> str:
        """The arguments of the check that are no defaults, so that checking again takes no longer than it did."""
        given = self.result.config.get("settings") or {}
        differ = {n: v for n, v in given.items() if n in _EFFORT and v != getattr(Effort, n)}
        return "".join(f", {name}={value}" for name, value in differ.items())

    def _richer(self) -> str:
        """The structure to try next; empty if the guide has the richest one that the program allows."""
        spec = self.result.config.get("guide") or {}
        has = str(spec.get("structure", "mean-field"))
        if has == "collapsed":
            return ""
        if self._block():
            return "collapsed"
        comparison = self.result.comparison
        latents = comparison.sizes.get("latent", 0) if comparison is not None else 2
        return "" if has == "full" or latents < 2 else "full"

    def _names(self) -> list[str]:
        """The latent sites."""
        return list(json.loads(self.result.amortized["posterior"].attrs.get("latents", "[]")))

    def _block(self) -> dict[str, list[int]]:
        """The sites that a collapsed guide need not learn; none if the program allows no such guide."""
        with suppress(CalibrantError):
            observed, covariates = (self.result.rows(group, 16) for group in ("observed_data", "constant_data"))
            return gaussian_block(self.result.model, observed, covariates)
        return {}

    def _flows(self) -> Mapping[str, str]:
        data = bind(self.result.model, self.result.rows("observed_data", 16), self.result.rows("constant_data", 16))
        return flows(self.result.model, data)

    # -- cannot tell ---------------------------------------------------------------------------------------------------

    def _decide(self) -> Step:
        settings, sentence = self._larger()
        if self.request and self.result.folder is not None:
            return sentence, checking_line(self.result.folder, self.request, **settings)
        told = "".join(f", {name}={value}" for name, value in settings.items() if name != "held_out")
        data = f"  # with {settings['held_out']:,} data or more" if "held_out" in settings else ""
        return sentence, f"{self.in_python}found = cal.evaluation.check(model, guide, data{told}); print(found){data}"

    def _larger(self) -> tuple[dict[str, int], str]:
        """The settings of a check that decides what is open, and the sentence for it."""
        comparison = self.result.comparison
        if self.result.probabilities is not None:
            return {"held_out": PREDICTED_DATA}, "Check it on more data:"
        draws = int(comparison.attrs["amortized_draws"]) if comparison is not None else 0
        open_ = [verdict for verdict in self.found if verdict.primary and verdict.status == "cannot tell"]
        if comparison is None:
            return {}, "Compare the guide with a reference:"
        if comparison.attrs["cannot_tell"]:
            warmup = 2 * int(self._used().get("warmup", 1000))
            return {"warmup": warmup, "draws": 2 * draws}, "Sample the reference for longer:"
        shared = set(comparison["shared_site"].values.tolist()) if "shared_site" in comparison.coords else set()
        if any(verdict.site in shared for verdict in open_):
            return {"draws": max(SHARED_DRAWS, 2 * draws)}, "Use more draws:"
        if [verdict.quantity for verdict in open_] == ["single data"]:
            return {"draws": max(SINGLE_DRAWS, 2 * draws)}, "Use more draws for each datum:"
        full = {"held_out": FULL_DATA, "draws": FULL_DRAWS, "simulations": FULL_SIMULATIONS}
        used = {"held_out": comparison.sizes["data"], "draws": draws, "simulations": self._simulations()}
        if all(used[name] >= value for name, value in full.items()):
            return {"draws": 2 * draws, "simulations": 2 * used["simulations"]}, "Use more draws and simulations:"
        return {
            n: max(v, used[n]) for n, v in full.items() if n == "held_out" or used[n] != v
        }, "Use more data and draws:"

    def _used(self) -> Mapping[str, Any]:
        """The settings of the reference."""
        attrs = self.result.reference["posterior"].attrs if self.result.reference is not None else {}
        return dict(json.loads(attrs.get("settings", "{}")))

    def _simulations(self) -> int:
        calibration = self.result.calibration
        return calibration["prior_sbc"].sizes["draw"] if calibration is not None else 0
