"""The whole check in one call: from a model and its guide to verdicts and a conclusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xarray as xr
from pyro.nn import PyroModule

from calibrant.data.dataset import Data
from calibrant.errors import CalibrantError
from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.judgements.conclusion import Conclusion
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_contrast import contrast_verdicts
from calibrant.evaluation.judgements.on_misreading import MISREAD
from calibrant.evaluation.judgements.on_probabilities import probability_verdicts
from calibrant.evaluation.remedying.next_steps import concluded
from calibrant.evaluation.remedying.sentences import remedy_sentences
from calibrant.evaluation.remedying.trying import RemedyPlan, remedies_of
from calibrant.evaluation.reporting.page import report
from calibrant.evaluation.reporting.pictures import drawn
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.classifier import c2st
from calibrant.evaluation.statistics.comparison import compare
from calibrant.evaluation.statistics.gaps import gap_of
from calibrant.evaluation.statistics.informed import informed_of
from calibrant.evaluation.statistics.label_probabilities import predicted_of
from calibrant.evaluation.statistics.noise import noise_sd
from calibrant.evaluation.statistics.powers import powers_of
from calibrant.evaluation.statistics.predictive_tests import predictive_check_of
from calibrant.evaluation.statistics.simulation_ranks import calibration_of
from calibrant.evaluation.uncertainty.contrast import LEVELS, ContrastPlan, contrast_of
from calibrant.guides.from_prior import PriorGuide
from calibrant.inference.drawing import posterior_of
from calibrant.inference.fitting.run_folder import guide_spec
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan, has_latents, reference_of, structure_of
from calibrant.inference.reweighting import weights
from calibrant.memory import limited, peak_memory
from calibrant.models.registry import name_of
from calibrant.program.contract import Program
from calibrant.progress import Progress, reporting, silent
from calibrant.settings import Effort
from calibrant.shown import answers, badge, card, counted, details, following, paragraph, prose
from calibrant.streams import stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = TypeVar("Found")
Keep = Callable[[str, Any], None]
Parts = dict[str, tuple[str, Callable[[], Any]]]

_PRIOR_DRAWS = 10  # draws of a prior guide that a result holds, which are not judged
_C2ST_DRAWS = 250  # draws of each side in the classifier test: half of its default, in an eighth of the time


@dataclass(repr=False)
class Check:
    """The result of a check. `print` shows its conclusion and a line for every verdict.

    Every picture of the report is a method, `plot_agreement()` for example, which returns a figure of matplotlib and
    raises an `InferenceError` if the check has nothing to show there.

    Attributes:
        result: trees and statistics.
        verdicts: verdicts on the guide, then on the contrast experiment; of a prior guide, those on its predictions.
        conclusion: the answer that follows from the verdicts.
    """

    result: RunResult
    verdicts: list[Verdict]
    conclusion: Conclusion

    def save(self, path: str | Path, command: str = "") -> Path:
        """Write the report, one HTML file, which shows the command line `command`."""
        return report([self.result], path, command)

    def summary(self) -> str:
        """The conclusion, a line for every verdict and every remedy that was tried, and the next line to paste."""
        rows = [
            ("" if verdict.answer == "describes" else verdict.answer, verdict.sentence) for verdict in self.verdicts
        ]
        width = max((len(status) for status, _ in rows), default=0)
        tried = remedy_sentences(self.result.remedies) if self.result.remedies is not None else []
        lines = [f"  {status:<{width}}  {sentence}" for status, sentence in rows]
        following = f"Next: {self.conclusion.remedy}\n  {self.conclusion.next_line}"
        said = [f"{self.result.name}: {self.conclusion}", *lines, *(f"  {sentence}" for sentence in tried), following]
        return "\n".join(said)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return (
            f"Check({self.result.name}: {self.conclusion.status}; {counted(len(self.verdicts), 'verdict', 'verdicts')})"
        )

    def _repr_html_(self) -> str:
        asked = [(verdict.answer, verdict.sentence) for verdict in self.verdicts if verdict.primary]
        described = [verdict.sentence for verdict in self.verdicts if not verdict.primary]
        tried = remedy_sentences(self.result.remedies) if self.result.remedies is not None else []
        more = [details(f"{len(described)} more, which describe", "".join(map(paragraph, described)))]
        return card(
            f"{badge(self.conclusion.status)} <b>{prose(self.result.name)}</b>",
            *map(paragraph, self.conclusion.sentences),
            answers(asked),
            *(more if described else ()),
            *map(paragraph, tried),
            following(self.conclusion.remedy, self.conclusion.next_line),
        )

    def plot_training(self) -> Figure:
        """ELBO of training and held-out data over epochs."""
        return drawn(self.result, "training")

    def plot_contrast(self) -> Figure:
        """Posterior widths and means of images over their contrast: the model and its guide."""
        return drawn(self.result, "contrast")

    def plot_samples(self) -> Figure:
        """Data next to samples of the model's prior predictive."""
        return drawn(self.result, "samples")

    def plot_dictionary(self) -> Figure:
        """Columns of a linear decoder as images."""
        return drawn(self.result, "dictionary")

    def plot_reliability(self) -> Figure:
        """Observed shares over predicted probabilities."""
        return drawn(self.result, "reliability")

    def plot_prior_statistics(self) -> Figure:
        """Statistics of the data, and of data that the model simulates."""
        return drawn(self.result, "prior_statistics")

    def plot_aggregate_posterior(self) -> Figure:
        """Guide draws for all data together, and the prior."""
        return drawn(self.result, "aggregate_posterior")

    def plot_entry_coverage(self) -> Figure:
        """Coverage and PIT of the entries of the data under the posterior predictive."""
        return drawn(self.result, "entry_coverage")

    def plot_classifier(self) -> Figure:
        """How well a classifier tells guide from reference, for every datum."""
        return drawn(self.result, "classifier")

    def plot_agreement(self) -> Figure:
        """Posterior means of guide and reference, and ratios of their sds."""
        return drawn(self.result, "agreement")

    def plot_pairs(self) -> Figure:
        """Pairs of latents of the worst datum and of a typical one, guide over reference."""
        return drawn(self.result, "pairs")

    def plot_bands(self) -> Figure:
        """Ranks of simulated latents among guide draws: differences from uniform, with bands."""
        return drawn(self.result, "bands")

    def plot_coverage(self) -> Figure:
        """Coverage of the guide's regions and intervals over their level, on simulated data."""
        return drawn(self.result, "coverage")

    def plot_recovery(self) -> Figure:
        """Sizes of z-scores of simulated latents over the contraction of their posterior."""
        return drawn(self.result, "recovery")

    def plot_importance(self) -> Figure:
        """k-hat of every datum, and the gap that the guide's own draws show."""
        return drawn(self.result, "importance")

    def plot_gaps(self) -> Figure:
        """Approximation and amortization gap of every datum."""
        return drawn(self.result, "gaps")

    def plot_worst(self) -> Figure:
        """The data with the largest errors, and their worst marginals."""
        return drawn(self.result, "worst")

    def plot_dist(self) -> Figure:
        """Posterior densities of a typical datum, guide and reference, by ArviZ."""
        return drawn(self.result, "dist")

    def plot_forest(self) -> Figure:
        """Posterior intervals of a typical datum, guide and reference, by ArviZ."""
        return drawn(self.result, "forest")

    def plot_trace(self) -> Figure:
        """Reference draws of a typical datum in order, by ArviZ."""
        return drawn(self.result, "trace")

    def plot_ecdf_pit(self) -> Figure:
        """Where the reference falls among the guide's draws, over all data, by ArviZ."""
        return drawn(self.result, "ecdf_pit")


def check(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    reference: xr.DataTree | None = None,
    *,
    covariates: Mapping[str, Any] | None = None,
    draws: int = Effort.draws,
    chains: int = Effort.chains,
    warmup: int = Effort.warmup,
    simulations: int = Effort.simulations,
    remedies: bool = Effort.remedies,
    memory: float | None = Effort.memory,
    train: Data | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> Check:
    """Check whether a guide's uncertainty can be believed, and if not, what is wrong and what helps.

    - Against the reference posterior of every datum: `informed_directions`, `compare`, `c2st`, `gap`.
    - Without it: the guide's importance weights (`weights`) on these data, and on data that the model simulates the
      ranks of the latents among the guide's draws (`calibration`).
    - Model and guide on these data: `predictive_check`, and the contrast experiment where the posterior is known
      exactly, the data are images, and the model has a noise to measure contrast in (`likelihood.noise_sd`).

    If the guide is the model's own prior (`guides.prior`), it is not meant to be the posterior. Then, and for programs
    without latents, the predicted
    probabilities of the observed sites are judged (`predicted_probabilities`, `probability_verdicts`), and the
    arguments about references, simulations and remedies have no effect; 4,000 data or more are needed to pass.

    Parts that a program does not allow are skipped, with a note (a program without local latents has no ranks; one with
    a factor, a scaled likelihood or a covariate that holds the observed data can't be simulated). Local latents are
    ranked given the guide's draws of shared ones; `posterior_calibration` calibrates shared latents.

    Together, the verdicts raise a false alarm in at most 5% of checks, and pass a guide with an error at one of their
    margins in at most 1 of 1,000, if the reference is right and has an ESS of several hundred. benchmarks/power.py
    measures both rates, and the power, for 128 data and the default arguments.

    Args:
        model: the program, in `eval()`.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`: about a hundred data on which the guide was not trained.
        reference: a reference tree of the same data; None to sample it.
        covariates: keyword → tensor, leading dimension data.
        draws: number of guide draws per datum, and of draws per reference chain.
        chains: number of reference chains.
        warmup: number of adaptation steps per reference chain (MCMC only).
        simulations: number of simulated data.
        remedies: whether remedies are tried (see `remedies`): refining, reweighting, richer guides. It takes a few
            trainings.
        memory: GiB that one run of model and guide may take, as in `inference.posterior`.
        train: data on which richer guides are trained; None for data simulated from the model.
        seed: random seed for all draws, simulations and trainings.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for settings that can't pass the gate, or a reference of other data or weights.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed, covariates)
    effort = Effort(draws, chains, warmup, simulations, remedies=remedies, memory=memory)
    name = name_of(problem.program)
    given = {"draws": draws, "chains": chains, "warmup": warmup, "simulations": simulations, "seed": seed}
    told = {"guide": guide_spec(problem.guide), "settings": given | ({"remedies": True} if remedies else {})}
    if judges_predictions(problem):
        return _checked(predict(name, problem, effort, seed, progress), told)
    if reference is None:
        plan = ReferencePlan(chains=chains, warmup=warmup, draws=draws, init=problem.guide)
        reference = reference_of(problem.program, problem.data, plan, seed=stream(seed, "reference"), progress=progress)
    return _checked(examine(name, problem, reference, effort, train=train, seed=seed, progress=progress), told)


def _checked(result: RunResult, config: Mapping[str, Any]) -> Check:
    """The check that a result is, with what its report tells about guide and settings."""
    result.config |= config
    found = judged(result)
    return Check(result, found, concluded(result, found))


def judges_predictions(problem: Problem) -> bool:
    """Whether a check judges p(y | x): the guide is the model's own prior, or there are no latents."""
    return isinstance(problem.guide, PriorGuide) or not has_latents(problem.program, problem.data)


def predict(
    name: str,
    problem: Problem,
    effort: Effort,
    seed: int = 0,
    progress: Progress = silent,
    keep: Keep = lambda name, found: None,
) -> RunResult:
    """The check of a guide that is the model's own prior: its predictions in place of a posterior.

    `keep(field, value)` is called as by `examine`.
    """
    with limited(effort.memory):
        few = posterior_of(problem, _PRIOR_DRAWS, seed=stream(seed, "posterior"))
        keep("amortized", few)
        found = predicted_of(problem, effort.draws, stream(seed, "predictions"), progress)
        keep("probabilities", found)
    config = {"notes": list(problem.data.notes), "peak_memory": peak_memory()}
    return RunResult(name, problem.program, config, few, probabilities=found)


def judged(result: RunResult) -> list[Verdict]:
    """The verdicts on a result: first on the guide, then on the contrast experiment; or those on its predictions."""
    if result.probabilities is not None:
        return probability_verdicts(result.probabilities)
    contrast = contrast_verdicts(result.contrast) if result.contrast is not None else []
    found = verdicts(result.comparison, result.weights, result.calibration)
    if (result.config.get("guide") or {}).get("sites"):  # of `amortize`, whose encoders nobody can misread
        found = [verdict for verdict in found if verdict.quantity != MISREAD]
    return [*found, *contrast]


def examine(
    name: str,
    problem: Problem,
    reference: xr.DataTree,
    effort: Effort,
    *,
    train: Data | None = None,
    seed: int = 0,
    progress: Progress = silent,
    keep: Keep = lambda name, found: None,
) -> RunResult:
    """Run all parts of a check; `keep(field, value)` is called with each part of the result once it is computed."""
    with limited(effort.memory):
        result = _examined(name, problem, reference, effort, train, seed, progress, keep)
    result.config["peak_memory"] = peak_memory()
    return result


def _examined(
    name: str,
    problem: Problem,
    reference: xr.DataTree,
    effort: Effort,
    train: Data | None,
    seed: int,
    progress: Progress,
    keep: Keep,
) -> RunResult:
    wanted = ["log_likelihood"]  # for leave-one-out with ArviZ
    amortized = posterior_of(problem, effort.draws, wanted, seed=stream(seed, "posterior"), progress=progress)
    keep("amortized", amortized)
    notes = list(problem.data.notes)
    comparison = _compared(problem, amortized, reference, stream(seed, "c2st"), notes, progress)
    keep("comparison", comparison)
    result = RunResult(name, problem.program, {"notes": notes}, amortized, reference, comparison)
    parts: Parts = {
        "weights": (
            "no diagnosis of importance weights",
            partial(_weighed, problem, amortized, stream(seed, "powers"), progress),
        )
    }
    parts |= _parts(problem, reference, effort, train, seed, progress)
    for field, (without, function) in parts.items():
        found = _or_note(without, function, result.config["notes"])
        if found is not None:
            setattr(result, field, found)
            keep(field, found)
    return result


def _weighed(problem: Problem, amortized: xr.DataTree, seed: int, progress: Progress) -> xr.Dataset:
    """The diagnosis of the importance weights, with the powers of prior and likelihood that the guide follows."""
    progress("importance weights", 0, 1)
    found = weights(amortized)
    progress("importance weights", 1, 1)
    powers = powers_of(problem, seed, progress)
    return found.merge(powers, join="left").assign_attrs({**found.attrs, **powers.attrs})


def _parts(
    problem: Problem, reference: xr.DataTree, effort: Effort, train: Data | None, seed: int, progress: Progress
) -> Parts:
    """Field of the result → the note that is made if it cannot be computed, and the function that computes it."""
    of, data = partial(stream, seed), problem.data
    telling: dict[str, Any] = {"progress": progress}
    some = problem.of_some(data[: effort.gap_data]) if effort.gap_data is not None else problem
    simulated = partial(calibration_of, problem, effort.simulations, effort.draws, seed=of("calibration"), **telling)
    predicted = partial(predictive_check_of, problem, effort.predictive_draws, seed=of("predictive"), **telling)
    parts: Parts = {
        "calibration": ("no calibration by simulation", simulated),
        "predictive": ("no predictive check", predicted),
        "contrast": ("no contrast experiment", partial(_contrast, problem, effort, of("contrast"), progress)),
        "gap": (
            "no approximation and amortization gap",
            partial(gap_of, some, reference, effort.draws, seed=of("gap"), **telling),
        ),
    }
    if effort.remedies:
        plan = RemedyPlan(effort.draws, effort.remedy_steps)
        tried = partial(remedies_of, problem, reference, plan, train, seed=of("remedies"), **telling)
        parts["remedies"] = ("no remedy could be tried", tried)
    return parts


def _or_note(without: str, function: Callable[[], Found], notes: list[str]) -> Found | None:
    """Call a function; if it refuses the model, the guide or the data, note the reason and return None."""
    try:
        return function()
    except CalibrantError as error:
        notes.append(f"{without}: {error}")
        return None


def _compared(
    problem: Problem, amortized: xr.DataTree, reference: xr.DataTree, seed: int, notes: list[str], progress: Progress
) -> xr.Dataset:
    """The comparison with the reference, with the classifier test for the data that have a reference."""
    informed = _informed(problem, reference, notes, progress)
    comparison = compare(amortized, reference, informed=informed, progress=progress)
    try:
        tested = c2st(amortized, reference, draws=_C2ST_DRAWS, seed=seed, progress=progress)
    except CalibrantError:  # without local continuous latents
        return comparison
    return comparison.merge(tested, join="left").assign_attrs({**comparison.attrs, **tested.attrs})


def _informed(problem: Problem, reference: xr.DataTree, notes: list[str], progress: Progress) -> xr.Dataset | None:
    """The directions that the likelihood informs; None, with a note, where there are none."""
    without = "no directions that the likelihood informs"
    return _or_note(without, partial(informed_of, problem.program, problem.data, reference, progress), notes)


def _contrast(problem: Problem, effort: Effort, seed: int, progress: Progress) -> xr.Dataset:
    if not has_contrast(problem.program, problem.data):
        raise CalibrantError(
            "it takes images, a known noise (`model.likelihood.noise_sd`), one vector latent and an exact posterior"
        )
    levels = np.geomspace(LEVELS[0], LEVELS[-1], effort.contrast_levels).tolist()
    images = min(effort.contrast_images, len(problem.data))
    return contrast_of(problem, ContrastPlan(levels, images, chains=effort.chains), seed, progress)


def has_contrast(program: PyroModule, data: Data) -> bool:
    """Whether a model suits the contrast experiment: images, a known noise, one vector latent, an exact posterior."""
    structure = structure_of(program, data)
    if structure is None or noise_sd(program, data.batch([0])[1]) is None:
        return False
    if sum(prod(event) > 1 for event in structure.latents.values()) != 1:
        return False
    shape = np.shape(data.batch([0])[0][data.observed_names[0]])[1:]
    return len(data.observed_names) == 1 and len(data) >= 2 and len(shape) >= 2
