"""The experiment on other sets of images: whether posteriors are wider at images that the model was not made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.evaluation.uncertainty.aurocs import SHOWN, aurocs
from calibrant.evaluation.uncertainty.matching import MATCHED, amount_of, rescaled
from calibrant.evaluation.uncertainty.measuring import Instrument, Measured, some_images
from calibrant.evaluation.uncertainty.sets import INSIDE, Sets, checked_sets, named, set_coords
from calibrant.evaluation.uncertainty.sources import SourcePlan
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Variables = dict[str, tuple[tuple[str, ...], Any]]


def ood_experiment(
    model: Program,
    guide: Program,
    inside: Mapping[str, Any] | Data,
    outside: Sets,
    images: int = 64,
    draws: int = 500,
    chains: int = 4,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    warmup: int = 1000,
    reference: bool = True,
    strata: int = 5,
) -> xr.Dataset:
    """Whether posteriors are wider at images of other sets than at the model's own, and what of it is due to contrast.

    The score of an image is its posterior sd over the prior sd, averaged over the informative latents (chosen on the
    inside set, as in `contrast_experiment`). Images of other sets are the positive class: an AUROC above ½ says that
    their posteriors are wider (arXiv 2404.15390 shows the scores; the AUROC and the matched sets are ours).

    A posterior is wide where an image has little contrast, whatever it shows. Therefore all sets are compared three
    times: "as shown", at matched "contrast" (root mean square deviation from the image's mean), and at matched "power"
    (mean square about zero; for whitened patches of mean zero nearly the same). Images with real values are rescaled to
    the distribution of the inside set, by quantiles. Images with bounds, grey values and binary images would leave
    their support: they are compared within strata of contrast or power, whose AUROCs are averaged.

    Args:
        model: the program, with one observed site of images.
        guide: its guide; both should be in `eval()`.
        inside: site → tensor of held-out images, or a `Data`.
        outside: name of a set → its images, `(image, *event)` in the shape and the units of the site, or a dict or a
            `Data` like `inside` (with covariates, where the program takes any).
        images: number of images of each set, drawn at random.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the choice of images and the draws; two models with one seed see the same images.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        warmup: number of adaptation steps per reference chain (MCMC only).
        reference: whether the exact posterior, or its reference, is drawn beside the guide.
        strata: number of strata of contrast or power, with as many images in each.

    Returns:
        Dimensions `source` ("exact", "amortized"), `matching` ("as shown", "contrast", "power"), `set` (of outside),
        `image` (all sets, one after the other, with the coordinates `of_set`, "inside" or the name of a set, and
        `label` in its set). Per image: `score` with its Monte Carlo error `score_se`, NaN where the reference is
        refused by the gate, and for blank images that can't be rescaled; `refused` (matching, image), whether it was;
        `contrast` and `power` (root mean square) of the images as shown. Per set: `auroc` with `auroc_se` and the ends
        of its 95% interval over images, `auroc_low` and `auroc_high`, for both sources on the images whose reference
        passed; `auroc_least` and `auroc_most`, what it would be on all images with refused ones at either extreme (for
        the guide, at their own scores); `share_refused` (matching, set), of the images of both sets, and `decided`,
        whether it is at most 10%. Attributes: `matched_by` ("rescaling" or "strata"), `strata`, and `latent`, `scale`,
        `n_informative`, `n_latents`, `prior_sd`, `prior_entropy`, `reference_method`.

    Raises:
        InferenceError: for sites or images that the experiment can't use, and where the gate leaves fewer than two
            images of the inside set.
        ProgramError, DataError: for a model, guide or data that break the contract, naming the set.
    """
    progress = reporting(progress)
    plan = OutsidePlan(images, latent, scale, strata, SourcePlan(draws, chains, warmup, method, reference))
    return ood_of(Problem.of_kind(model, guide, inside), outside, plan, seed, progress)


@dataclass(frozen=True)
class OutsidePlan:
    """The settings of the experiment on other sets: arguments of `ood_experiment`."""

    images: int = 64
    latent: str | None = None
    scale: str | None = None
    strata: int = 5
    sources: SourcePlan = field(default_factory=SourcePlan)


def ood_of(
    problem: Problem, outside: Sets, plan: OutsidePlan, seed: int = 0, progress: Progress = silent
) -> xr.Dataset:
    """Run the experiment on other sets, like `ood_experiment`, for a problem that is already checked."""
    of = partial(stream, seed, "outside")
    checked = checked_sets(problem, named(outside))
    sets = {name: some_images(data, plan.images, of("set", name)) for name, data in checked.items()}
    chosen = problem.of_some(some_images(problem.data, plan.images, of("images")))
    instrument, natural = Instrument.of(chosen, plan.sources, plan.latent, plan.scale, of("instrument"))
    shown = _Shown(instrument, sets)
    scores = shown.scores(natural, of("draws"), progress).assign_attrs(
        matched_by="rescaling" if shown.rescales else "strata", strata=plan.strata, **instrument.attributes
    )
    return scores.assign(aurocs(scores))


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """The instrument, with the inside set, and the other sets."""

    instrument: Instrument
    sets: Mapping[str, Data]

    @property
    def rescales(self) -> bool:
        """Whether images are rescaled to be matched, which only real values allow."""
        return self.instrument.support.kind == "real"

    def scores(self, natural: Mapping[str, Measured], seed: int, progress: Progress) -> xr.Dataset:
        """Scores of all images in all ways of matching."""
        changed = [self._rescaled(data, way) for way in self._ways for data in self.sets.values()]
        measured = self.instrument([data for data, _ in changed], seed, progress=progress)
        count, of_inside = len(self.sets), np.zeros(len(self.instrument.problem.data), dtype=bool)
        rows, blank = [], []
        for first in range(0, len(changed), count):
            some = slice(first, first + count)
            rows.append([_scores(s, [natural, *measured[some]]) for s in natural])
            blank.append(np.concatenate([of_inside, *(part for _, part in changed[some])]))
        again = [min(way, len(rows) - 1) for way in range(len(SHOWN))]  # sets are shown once, where they are stratified
        found, unused = np.array(rows)[again], np.array(blank)[again]
        score, error = np.where(unused, np.nan, found.transpose(2, 1, 0, 3))
        every = ("source", "matching", "image")
        variables: Variables = {
            "score": (every, score),
            "score_se": (every, error),
            "refused": (every[1:], np.isnan(score[0]) & ~unused),
        }
        for name in MATCHED:
            variables[name] = (("image",), np.concatenate([amount_of(x, name).numpy() for x in self._images()]))
        coords = {"source": list(natural), "matching": list(SHOWN), "set": list(self.sets)}
        return xr.Dataset(variables, coords={**coords, **set_coords(self._all())})

    @property
    def _ways(self) -> Sequence[str]:
        """The ways of matching that show other images."""
        return SHOWN if self.rescales else SHOWN[:1]

    def _all(self) -> dict[str, Data]:
        return {INSIDE: self.instrument.problem.data, **self.sets}

    def _images(self) -> list[Tensor]:
        return [data.tensors()[0][self.instrument.names.observed].cpu() for data in self._all().values()]

    def _rescaled(self, data: Data, matching: str) -> tuple[Data, Mask]:
        """Images of a set as they are shown, and which of them are blank and could not be rescaled."""
        if matching == SHOWN[0]:
            return data, np.zeros(len(data), dtype=bool)
        name = self.instrument.names.observed
        inside, images = (part.tensors()[0][name] for part in (self.instrument.problem.data, data))
        values, blank = rescaled(images, inside, matching)
        return Data({name: values}, data.tensors()[1], coords={"data": data.labels()}), blank.cpu().numpy()


def _scores(source: str, parts: Sequence[Mapping[str, Measured]]) -> Array:
    """Scores of the images of all sets and their Monte Carlo errors, `(2, image)`."""
    found = [part[source].moments for part in parts]
    return np.stack([np.concatenate([getattr(m, name) for m in found]) for name in ("posterior_sd", "posterior_sd_se")])
