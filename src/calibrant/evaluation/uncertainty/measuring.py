"""One instrument for experiments that show images: what the posteriors of both sources are at images as they are, and
at any other images of the same site, in units of the prior sd and averaged over the latents that respond to images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.images import ImageSupport, support_of, uniforms_of
from calibrant.evaluation.uncertainty.latents import Names, find_sites, informative_of, prior_sd_of
from calibrant.evaluation.uncertainty.moments import Moments, Which, draws_of, gaussian_entropy, moments_of
from calibrant.evaluation.uncertainty.sources import SourcePlan, drawn_in_blocks, sources_of
from calibrant.inference.problem import Problem
from calibrant.program.latents import sites
from calibrant.progress import Progress, silent
from calibrant.streams import stream

_DRAWN_AT_ONCE = 2**25  # numbers drawn for the images of one block, 256 MiB in float64
_LEAST_IMAGES = 32  # of a block: fewer make Markov chains slow
_TAIL = 0.05  # below and above a central 90% interval

Array = npt.NDArray[np.float64]
T = TypeVar("T")


class Measured(NamedTuple):
    """What one source says of images: moments in prior sds, entropy in nats, and where a truth is known, coverage.

    `entropy` is `(image,)`, of the informative latents in their own units; `covered`, `(image,)`, is the share of the
    informative latents whose true value lies in its central 90% interval.
    """

    moments: Moments
    entropy: Array
    covered: Array

    def some(self, which: npt.NDArray[np.intp]) -> Measured:
        """The same of some of the images."""
        return Measured(self.moments.of_images(which), self.entropy[which], self.covered[which])


@dataclass(frozen=True)
class Instrument:
    """Measures images with a program and its guide.

    Attributes:
        problem: program and guide, with the images as they are.
        names: the sites.
        prior_sd: prior sd of every latent, `(latent,)`.
        used: the latents that are averaged over: the informative ones, or all if there is none.
        n_informative: number of informative latents.
        support: the values that a pixel can have.
        plan: how posteriors are drawn.
        method: method of the reference, "" without one.
    """

    problem: Problem
    names: Names
    prior_sd: Array
    used: Which
    n_informative: int
    support: ImageSupport
    plan: SourcePlan
    method: str

    @classmethod
    def of(
        cls, problem: Problem, plan: SourcePlan, latent: str | None, scale: str | None, seed: int
    ) -> tuple[Instrument, dict[str, Measured]]:
        """An instrument whose latents are chosen on the images as they are, and what it says of these images.

        The reference posterior chooses, or the guide where the plan has no reference.

        Raises:
            InferenceError: for sites that the experiment can't use, or if fewer than two images pass the gate.
        """
        few = problem.data.batch(torch.arange(min(len(problem.data), 16)))
        names, site = find_sites(sites(problem.program, *few), problem.data, latent, scale)
        prior_sd = prior_sd_of(problem.program, site, problem.data, stream(seed, "prior"))
        trees = sources_of(problem, plan, stream(seed, "natural"))
        first = trees["exact" if plan.reference else "amortized"]
        informative = informative_of(first, names, prior_sd)
        method = str(first["posterior"].attrs["method"]) if plan.reference else ""
        used = informative if informative.any() else ~informative
        support = support_of(problem.program, problem.data, names.observed)
        made = cls(problem, names, prior_sd, used, int(informative.sum()), support, plan, method)
        return made, {source: made._read(tree) for source, tree in trees.items()}

    def changed(self, data: Data, values: Tensor, seed: int) -> Data:
        """Data with other images, moved to values that their pixels can have; a seed gives the same random numbers."""
        inside = self.support.nearest(values, uniforms_of(values, seed))
        return Data({self.names.observed: inside}, data.tensors()[1], coords={"data": data.labels()})

    @property
    def attributes(self) -> dict[str, str | float | int]:
        """What results say of the sites and the latents."""
        units = self.prior_sd[self.used]
        return {
            "latent": self.names.latent,
            "scale": self.names.scale,
            "n_informative": self.n_informative,
            "n_latents": len(self.prior_sd),
            "prior_sd": float(units.mean()),
            "prior_entropy": float(0.5 * np.log(2 * np.pi * np.e * units**2).sum()),
            "reference_method": self.method,
        }

    def __call__(
        self, parts: Sequence[Data], seed: int, truth: Tensor | None = None, progress: Progress = silent
    ) -> list[dict[str, Measured]]:
        """Measure sets of images together, in blocks of as many images as memory takes.

        Args:
            parts: sets of images of the observed site, with the covariates that the program takes.
            seed: random seed for the draws.
            truth: true values of the vector latent, `(image, *event)`, of the images of each part; None if unknown.
            progress: called with (stage, done, total, text).

        Returns:
            Source → what is measured, for each part.

        Raises:
            DataError: for images outside the support of their site.
        """
        for part in parts:
            self.problem.of_others(part)
        joined = self.problem.of_some(joined_data(parts))
        known = None if truth is None else truth.flatten(1).double().numpy()[np.arange(len(joined.data)) % len(truth)]
        found = read_in_blocks(
            joined,
            self.plan,
            len(self.prior_sd),
            lambda tree, index: self._read(tree, None if known is None else known[index]),
            seed,
            progress,
        )
        together = {source: _joined(blocks) for source, blocks in found.items()}
        ends = np.cumsum([0, *(len(part) for part in parts)])
        return [
            {source: whole.some(np.arange(first, last)) for source, whole in together.items()}
            for first, last in pairwise(ends.tolist())
        ]

    def _read(self, tree: xr.DataTree, truth: Array | None = None) -> Measured:
        moments = moments_of(tree, self.names, self.used, self.prior_sd)
        draws = draws_of(tree["posterior"].dataset[self.names.latent])[..., self.used]
        entropy = gaussian_entropy(draws, bool(tree["posterior"].attrs["independent_draws"]))
        covered = np.full(len(draws), np.nan)
        if truth is not None:
            below = (draws < truth[:, None, None, self.used]).mean((1, 2))
            covered = ((below >= _TAIL) & (below <= 1 - _TAIL)).mean(1)
        return Measured(moments, *(np.where(moments.passed, values, np.nan) for values in (entropy, covered)))


def joined_data(parts: Sequence[Data]) -> Data:
    """Sets of data, one after the other, with labels 0, 1, …"""
    rows = [part.tensors() for part in parts]
    observed, covariates = (
        {name: torch.cat([row[kind][name] for row in rows]) for name in rows[0][kind]} for kind in (0, 1)
    )
    return Data(observed, covariates)


def read_in_blocks(
    problem: Problem,
    plan: SourcePlan,
    latents: int,
    read: Callable[[xr.DataTree, npt.NDArray[np.int64]], T],
    seed: int,
    progress: Progress = silent,
) -> dict[str, list[T]]:
    """Draws of every source for all images, read block by block, so that memory takes them.

    Args:
        problem: program and guide, with the images.
        plan: how posteriors are drawn.
        latents: number of latents of an image.
        read: function of the draws of a block, and of the positions of its images.
        seed: random seed for the draws.
        progress: called with (stage, done, total, text).

    Returns:
        Source → what was read of every block.
    """
    draws = plan.draws * (plan.chains if plan.reference else 1)
    size = max(_DRAWN_AT_ONCE // (draws * latents), _LEAST_IMAGES)
    found: dict[str, list[T]] = {}
    for index, trees in drawn_in_blocks(problem, plan, size, partial(stream, seed, "block"), progress):
        for source, tree in trees.items():
            found.setdefault(source, []).append(read(tree, index))
    return found


def _joined(blocks: Sequence[Measured]) -> Measured:
    moments, entropy, covered = zip(*blocks, strict=True)
    return Measured(Moments.joined(moments), np.concatenate(entropy), np.concatenate(covered))


def some_images(data: Data, count: int, seed: int) -> Data:
    """Some of the data, chosen at random and in their order; all of them if there are fewer.

    Raises:
        InferenceError: if two are not left.
    """
    if count < 2 or len(data) < 2:
        raise InferenceError(f"images={count}, of {len(data)} data: two are needed")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[:count].sort().values)
