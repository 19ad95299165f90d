"""The draws and statistics of Markov chains, in the same form for every sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

STATISTICS = {
    "lp": torch.float64,
    "energy": torch.float64,
    "acceptance_rate": torch.float32,
    "step_size": torch.float32,
    "tree_depth": torch.uint8,
    "n_steps": torch.int16,
    "diverging": torch.bool,
}


@dataclass(frozen=True)
class McmcDraws:
    """Draws and statistics of the data whose chains are complete.

    Attributes:
        draws: latent and deterministic sites → `(chain, draw, data, *event)`, shared ones without `data`.
        stats: the names of `STATISTICS` → `(chain, draw, data)`.
        latents: names of the latent sites in `draws`.
        local: names of the sites with a data dimension.
        data: positions of the complete data in the data set, which after Ctrl-C are not all data.
        lost: `(data,)`, whether no start with a finite density was found for a datum; its draws are NaN.
        moved: `(data,)`, number of chains of a datum that were moved to the place of another chain in warm-up.
        edges: continuous latents → `(data,)`, share of the draws of a datum that are `at_an_edge` of the support.
    """

    draws: dict[str, Tensor]
    stats: dict[str, Tensor]
    latents: list[str]
    local: list[str]
    data: Tensor
    lost: Tensor
    moved: Tensor
    edges: dict[str, Tensor]

    def thinned(self, keep: int) -> McmcDraws:
        """Keep every n-th draw, so that `keep` draws per chain remain."""
        every = next(iter(self.stats.values())).shape[1] // keep
        draws, stats = ({n: v[:, every - 1 :: every] for n, v in part.items()} for part in (self.draws, self.stats))
        return replace(self, draws=draws, stats=stats)

    def replaced(self, rows: Tensor, other: McmcDraws) -> McmcDraws:
        """Replace the draws of the data at positions `rows` along `data` by those of another run of these data."""
        draws = {n: _put(v, rows, other.draws[n]) if n in self.local else other.draws[n] for n, v in self.draws.items()}
        stats = {n: _put(v, rows, other.stats[n]) for n, v in self.stats.items()}
        return replace(self, draws=draws, stats=stats)


def _put(values: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    values = values.clone()
    values[:, :, rows] = new
    return values
