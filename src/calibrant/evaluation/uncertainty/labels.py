"""Label entropy: what a classifier of latents makes of posteriors, at images of its classes and at others.

A posterior that is wide may still lie within one class, and a narrow one between two. Catoni et al. (arXiv 2404.15390)
therefore train a classifier on draws of the guide, and take the entropy of its probabilities, averaged over the draws
of an image. Here, the same classifier reads draws of the exact posterior too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy.special import entr

from calibrant.data.dataset import Data
from calibrant.evaluation.uncertainty.latents import find_sites, prior_sd_of
from calibrant.evaluation.uncertainty.measuring import joined_data, read_in_blocks, some_images
from calibrant.evaluation.uncertainty.moments import draws_of, mean_and_error, passed_of
from calibrant.evaluation.uncertainty.reading import label_read_out_of
from calibrant.evaluation.uncertainty.refused import with_refused
from calibrant.evaluation.uncertainty.sets import INSIDE, Sets, checked_sets, named, set_coords
from calibrant.evaluation.uncertainty.sources import SourcePlan
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.program.latents import sites
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
Variables = dict[str, tuple[tuple[str, ...], Any]]


def label_entropy(
    model: Program,
    guide: Program,
    labelled: Mapping[str, Any] | Data,
    labels: npt.ArrayLike | torch.Tensor,
    inside: Mapping[str, Any] | Data,
    outside: Sets,
    images: int = 64,
    passes: int = 100,
    draws: int = 500,
    chains: int = 4,
    latent: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    warmup: int = 1000,
    reference: bool = True,
) -> xr.Dataset:
    """Entropy of the labels that a classifier reads from posterior draws, of the guide and of the exact posterior.

    The classifier (scikit-learn's `MLPClassifier`, two layers of 50 units) reads the vector latent in units of its
    prior sd. Every pass of its training sees one fresh draw of the guide for every labelled image. One fifth of the
    labelled images chooses the pass whose state is kept, by the log loss; another fifth reports its accuracy. (The
    authors' code keeps the last state, since it holds no copy of the best one.)

    Args:
        model: the program, with one observed site of images.
        guide: its guide; both should be in `eval()`.
        labelled: site → tensor of labelled images, best those of the training set, or a `Data`.
        labels: their classes, whole numbers `(n,)`.
        inside: site → tensor of held-out images, or a `Data`.
        outside: name of a set → its images, as those of `ood_experiment`.
        images: number of images of each set, drawn at random.
        passes: number of passes over the labelled images.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        latent: name of the vector latent, if there is more than one.
        seed: random seed for the choice of images, the training of the classifier and the draws.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        warmup: number of adaptation steps per reference chain (MCMC only).
        reference: whether the exact posterior, or its reference, is drawn beside the guide.

    Returns:
        Dimensions `source` ("exact", "amortized"), `set` ("inside", then those of outside), `image` (all sets, one
        after the other, with the coordinates `of_set` and `label` in its set), `pass`. Per image, NaN where the
        reference is refused by the gate: `entropy` of the probabilities that are averaged over draws, in nats (at most
        the log of the number of classes), and `largest`, the largest of them. Per set, over the images whose reference
        passed: `entropy_mean`, `largest_mean` with standard errors `…_se` over images; with references also those of
        `with_refused`: `entropy_guide_passed`, `entropy_guide_refused`, and `entropy_low`, `entropy_high`, the
        reference's mean with refused images at either extreme. `accuracy` of single draws and `accuracy_of_mean`, of
        the probabilities averaged over draws, for held-out labelled images that took no part in the training,
        with `accuracy_se` over images. `held_out_loss` (pass), in nats. Attributes: `best_pass`, `classes` (their
        number), `latent`.

    Raises:
        InferenceError: for sites or settings that the experiment can't use.
        ProgramError, DataError: for a model, guide, data or labels that can't be used.
    """
    progress = reporting(progress)
    plan = ReadOutPlan(images, passes, latent, SourcePlan(draws, chains, warmup, method, reference))
    return label_entropy_of(Problem.of_kind(model, guide, labelled), labels, inside, outside, plan, seed, progress)


@dataclass(frozen=True)
class ReadOutPlan:
    """The settings of the experiment on label entropy: arguments of `label_entropy`."""

    images: int = 64
    passes: int = 100
    latent: str | None = None
    sources: SourcePlan = field(default_factory=SourcePlan)


def label_entropy_of(
    labelled: Problem,
    labels: npt.ArrayLike | torch.Tensor,
    inside: Mapping[str, Any] | Data,
    outside: Sets,
    plan: ReadOutPlan,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.Dataset:
    """Run the experiment on label entropy, like `label_entropy`, for a problem that is already checked."""
    of = partial(stream, seed, "label entropy")
    given = {INSIDE: inside, **named(outside)}
    sets = {
        name: some_images(data, plan.images, of("set", name)) for name, data in checked_sets(labelled, given).items()
    }
    few = labelled.data[: min(len(labelled.data), 16)]
    names, site = find_sites(sites(labelled.program, *few.tensors()), few, plan.latent)
    prior_sd = prior_sd_of(labelled.program, site, few, of("prior"))
    best = label_read_out_of(labelled, labels, plan.passes, plan.latent, of("training"), progress)
    joined = labelled.of_some(joined_data(list(sets.values())))

    def probabilities(tree: xr.DataTree, _: npt.NDArray[np.int64]) -> Array:
        draws = draws_of(tree["posterior"].dataset[names.latent]) / prior_sd
        found = best.probabilities(draws.reshape(len(draws), -1, draws.shape[-1])).mean(1)
        return np.where(passed_of(tree)[:, None], found, np.nan)

    found = read_in_blocks(joined, plan.sources, len(prior_sd), probabilities, of("draws"), progress)
    result = _assemble({source: np.concatenate(blocks) for source, blocks in found.items()}, sets)
    return result.assign(best.results()).assign_attrs(
        best_pass=int(np.argmin(best.losses)) + 1, classes=len(best.classes), latent=names.latent
    )


def _assemble(probabilities: Mapping[str, Array], sets: Mapping[str, Data]) -> xr.Dataset:
    """Entropies per image and their means per set."""
    values = np.array(list(probabilities.values()))
    entropy = entr(values).sum(-1)
    passed = np.isfinite(entropy).all(0)
    every: dict[str, Array] = {"entropy": entropy, "largest": values.max(-1)}
    variables: Variables = {name: (("source", "image"), array) for name, array in every.items()}
    coords = set_coords(sets)
    which = [np.array(coords["of_set"][1]) == name for name in sets]
    for name, array in every.items():
        found = [mean_and_error(np.where(passed & of_set, array, np.nan)) for of_set in which]
        for end, part in (("mean", 0), ("mean_se", 1)):
            variables[f"{name}_{end}"] = (("source", "set"), np.stack([pair[part] for pair in found], -1))
    if len(values) == 2:
        most = math.log(values.shape[-1])
        bounds = [with_refused("entropy", (), entropy[0, s], entropy[1, s], passed[s], (0.0, most)) for s in which]
        variables |= {name: (("set",), np.array([b[name][1] for b in bounds])) for name in bounds[0]}
    return xr.Dataset(variables, coords={"source": list(probabilities), "set": list(sets), **coords})
