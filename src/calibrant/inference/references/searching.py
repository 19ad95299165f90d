"""A search for modes before the chains: where do many short chains end that start far apart?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.inference.references.grouping import RHAT_OF_STARTS, Grouped, groups_of, nested_rhat
from calibrant.inference.references.lanes import NutsSettings, coordinates_of, short_chains
from calibrant.inference.references.starts import wide
from calibrant.inference.references.target import Target, target_of
from calibrant.program.contract import Program
from calibrant.program.environment import in_double
from calibrant.progress import Progress
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
FEW_STARTS = 4  # fewer do not show groups
_WARMUP, _DRAWS, _DEPTH = 34, 30, 5  # of short chains; their trees have 31 leapfrogs at most
_LONGER_WARMUP, _LONGER_DRAWS, _LONGER_DEPTH = 100, 30, 8  # where chains stand apart, before that is believed
_ROWS = 16_384  # rows in one evaluation of the density


@dataclass(frozen=True)
class Groups:
    """Groups of chains of one posterior between which few chains move, or none.

    Attributes:
        apart: whether no chain moved.
        starts: vectors at which chains of every group start, `(chain, width)` at κ = 0, a tensor per group.
        draws: draws of every group, latents on the line, `(n, width)`.
    """

    apart: bool
    starts: list[Tensor]
    draws: list[Array]

    def __len__(self) -> int:
        return len(self.starts)

    def across(self, chains: int) -> Tensor:
        """Starts of chains in all groups in turn, `(chain, width)`."""
        return torch.stack([self.starts[chain % len(self)][chain // len(self)] for chain in range(chains)])


def search(
    model: PyroModule,
    data: Data,
    starts: int,
    settings: NutsSettings,
    guide: Program | None,
    seed: int,
    progress: Progress,
) -> dict[int, Groups]:
    """Look for data whose posterior has several modes.

    Short chains start at draws of the prior, farther out, and at draws of the guide. Where their nested R-hat is above
    1.1 and their ends lie in groups, they go on with another warm-up and longer trees, and only groups that are found
    again are modes.

    Returns:
        Position of a datum (0 if all data have one joint posterior) → its groups, two or more.
    """
    double = in_double(guide) if guide is not None else None
    plan = NutsSettings(starts, _WARMUP, _DRAWS, compile=settings.compile, depth=_DEPTH)
    begin = partial(wide, chains=starts, guide=double)
    first = short_chains(model, data, plan, stream(seed, "modes"), progress, begin)
    apart = {unit: first[unit] for unit in np.flatnonzero(nested_rhat(first.numpy()) > RHAT_OF_STARTS).tolist()}
    apart = {unit: draws for unit, (draws, groups) in _grouped(model, data, apart).items() if groups.count > 1}
    if not apart:
        return {}
    units = list(apart)
    ends = torch.stack([draws[:, -1] for draws in apart.values()])
    joint = len(first) < len(data)
    some = data if joint else data.subset(units)
    plan = replace(plan, warmup=_LONGER_WARMUP, draws=_LONGER_DRAWS, depth=_LONGER_DEPTH)
    again = short_chains(
        model, some, plan, stream(seed, "modes", "again"), progress, lambda target, keys: ends.to(keys.device)
    )
    found = _grouped(model, some, dict(enumerate(again)))
    return {
        units[unit]: _groups(model, some, draws, groups, settings.chains)
        for unit, (draws, groups) in found.items()
        if groups.count > 1
    }


def _grouped(model: PyroModule, data: Data, draws: dict[int, Tensor]) -> dict[int, tuple[Tensor, Grouped]]:
    """The draws of some units, and the groups of their starts."""
    if not draws:
        return {}
    with target_of(model, data) as target:
        return {
            unit: (each, groups_of(each.numpy(), partial(density_at, target, unit))) for unit, each in draws.items()
        }


@torch.no_grad()
def density_at(target: Target, unit: int, vectors: Array) -> Array:
    """The log density of a unit at vectors `(n, width)` at κ = 0."""
    found = []
    device = next(iter(target.observed.values())).device
    for some in torch.as_tensor(vectors, device=device).split(max(1, _ROWS // (target.total if target.joint else 1))):
        own = torch.arange(target.total) if target.joint else torch.full((len(some),), unit)
        powers = some.new_zeros(len(some), len(target.pairs))
        found.append(target.log_density(some, powers, *target.rows(own)).cpu())
    return torch.cat(found).numpy()


def plain_vectors(target: Target, vectors: Tensor) -> Tensor:
    """Latents on the line, from vectors `(…, width)` at κ = 0."""
    flat = vectors.reshape(-1, vectors.shape[-1]).double()
    where = coordinates_of(target, flat.device)
    return where.plain(flat, flat.new_zeros(len(flat), len(target.pairs))).reshape(vectors.shape)


def _groups(model: PyroModule, data: Data, draws: Tensor, grouped: Grouped, chains: int) -> Groups:
    with target_of(model, data) as target:
        plain = plain_vectors(target, draws).numpy()
    own = [torch.as_tensor(np.flatnonzero(grouped.labels == label)) for label in range(grouped.count)]
    turns = torch.arange(chains)
    starts = []
    for members in own:  # the last draws of several chains, then earlier ones
        lane, back = members[turns % len(members)], turns // len(members)
        starts.append(draws[lane, -1 - back * (draws.shape[1] // chains)])
    return Groups(grouped.apart, starts, [plain[members.numpy()].reshape(-1, draws.shape[2]) for members in own])
