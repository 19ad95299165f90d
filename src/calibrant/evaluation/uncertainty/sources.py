"""Draws of the two sources that experiments compare, the model's reference and its guide, for the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from calibrant.evaluation.uncertainty.moments import ALL, Moments, Names, Which, moments_of
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import POOL, ReferencePlan
from calibrant.inference.referencing import reference_for
from calibrant.program.latents import sites
from calibrant.progress import Progress, silent
from calibrant.streams import stream

SOURCES = ("exact", "amortized")
_ENTRIES = 2**25  # most numbers in the draws of a source of some images: 256 MiB of float64


@dataclass(frozen=True)
class SourcePlan:
    """How the posteriors of shown images are drawn.

    Attributes:
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        warmup: number of adaptation steps per reference chain (MCMC only).
        method: method of `inference.reference`; "importance" draws from the guide.
        reference: whether the reference is drawn; without it, there is the guide alone.
        pool: number of draws per image from which importance resamples.
    """

    draws: int = 500
    chains: int = 4
    warmup: int = 1000
    method: str = "auto"
    reference: bool = True
    pool: int = POOL


def sources_of(problem: Problem, plan: SourcePlan, seed: int, progress: Progress = silent) -> dict[str, xr.DataTree]:
    """Draws of every source, "exact" (the reference) and "amortized" (the guide), for all images of a problem.

    Raises:
        KeyboardInterrupt: if the reference was interrupted, so that some images have no draws.
    """
    found = {}
    if plan.reference:
        found["exact"] = reference_draws(problem, plan, stream(seed, "sources", "exact"), progress)
    found["amortized"] = posterior_of(problem, plan.draws, seed=stream(seed, "sources", "amortized"), progress=progress)
    return found


def source_moments(
    problem: Problem,
    plan: SourcePlan,
    names: Names,
    used: Which = ALL,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Moments]:
    """Posterior moments of every source for any number of images: draws of few images at a time, for memory.

    Args:
        problem: program, guide and images.
        plan: how the posteriors are drawn.
        names: the sites.
        used: which latents are used.
        seed: random seed for the draws.
        progress: called with (stage, done, total, text).
    """
    latents = sites(problem.program, *problem.data.batch(torch.arange(1)))
    entries = sum(site.event_shape.numel() for site in latents.values()) * plan.draws * plan.chains
    parts: list[dict[str, Moments]] = []
    for index, trees in drawn_in_blocks(problem, plan, max(1, _ENTRIES // entries), partial(stream, seed)):
        parts.append({source: moments_of(tree, names, used) for source, tree in trees.items()})
        progress("posteriors", int(index[-1]) + 1, len(problem.data))
    return {source: Moments.joined([part[source] for part in parts]) for source in parts[0]}


def drawn_in_blocks(
    problem: Problem, plan: SourcePlan, size: int, seed: Callable[[int], int], progress: Progress = silent
) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, xr.DataTree]]]:
    """Positions of some images at a time, and the draws of every source for them, so that memory takes them.

    Args:
        problem: program, guide and images.
        plan: how the posteriors are drawn.
        size: number of images of a block.
        seed: function that gives the random seed of a block, by its number.
        progress: called with (stage, done, total, text).
    """
    for block, index in enumerate(torch.arange(len(problem.data), device="cpu").split(size)):
        yield index.numpy(), sources_of(problem.of_some(problem.data[index]), plan, seed(block), progress)


def reference_draws(problem: Problem, plan: SourcePlan, seed: int, progress: Progress = silent) -> xr.DataTree:
    """Draws of the reference for all images of a problem.

    Raises:
        KeyboardInterrupt: if the reference was interrupted, so that some images have no draws.
    """
    how = ReferencePlan(plan.method, plan.chains, plan.warmup, plan.draws, pool=plan.pool)
    tree = reference_for(problem, how, seed=seed, progress=progress)
    if tree["posterior"].sizes["data"] < len(problem.data):  # after Ctrl-C, only some data were finished
        raise KeyboardInterrupt
    return tree
