"""The draws and statistics of Markov chains, in the same form for every sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
_NOTE = (
    "every chain consists of `subchains` chains with a common start, one after another (not of data with several "
    "modes); count the draws by autocorrelation as usual"
)


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
        vectors: vectors of the lanes, `(chain, draw, data, width)`, with one entry along `data` for chains over all
            data; None unless the chains are kept in a mode.
        subchains: number of sub-chains, one after another, of which every chain consists.
    """

    draws: dict[str, Tensor]
    stats: dict[str, Tensor]
    latents: list[str]
    local: list[str]
    data: Tensor
    lost: Tensor
    moved: Tensor
    edges: dict[str, Tensor]
    vectors: Tensor | None = None
    subchains: int = 1

    @property
    def notes(self) -> dict[str, Any]:
        """What the attributes of a group `posterior` say of sub-chains; nothing of ordinary chains."""
        return {"subchains": self.subchains, "draws_note": _NOTE} if self.subchains > 1 else {}

    def thinned(self, keep: int) -> McmcDraws:
        """Keep every n-th draw, so that `keep` draws per chain remain."""
        every = next(iter(self.stats.values())).shape[1] // keep
        draws, stats = ({n: v[:, every - 1 :: every] for n, v in part.items()} for part in (self.draws, self.stats))
        vectors = None if self.vectors is None else self.vectors[:, every - 1 :: every]
        return replace(self, draws=draws, stats=stats, vectors=vectors)

    def replaced(self, rows: Tensor, other: McmcDraws) -> McmcDraws:
        """Replace the draws of the data at positions `rows` along `data` by those of another run of these data."""
        draws = {n: _put(v, rows, other.draws[n]) if n in self.local else other.draws[n] for n, v in self.draws.items()}
        stats = {n: _put(v, rows, other.stats[n]) for n, v in self.stats.items()}
        vectors = self.vectors
        if vectors is not None and other.vectors is not None:
            joint = vectors.shape[2] < len(self.data)
            vectors = other.vectors if joint else _put(vectors, rows, other.vectors)
        edges = {n: v.index_copy(0, rows, other.edges[n]) for n, v in self.edges.items()}
        return replace(self, draws=draws, stats=stats, vectors=vectors, edges=edges)

    def part(self, rows: Tensor) -> McmcDraws:
        """The draws of some data, given by their positions along `data`."""
        draws = {n: v[:, :, rows] if n in self.local else v for n, v in self.draws.items()}
        stats = {n: v[:, :, rows] for n, v in self.stats.items()}
        vectors = None if self.vectors is None else self.vectors[:, :, rows]
        edges = {n: v[rows] for n, v in self.edges.items()}
        own = {name: getattr(self, name)[rows] for name in ("data", "lost", "moved")}
        return replace(self, draws=draws, stats=stats, vectors=vectors, edges=edges, **own)


def joined(parts: list[McmcDraws]) -> McmcDraws:
    """The draws of several sets of data, in the order of their positions in the data set."""
    first = parts[0]
    draws = {n: torch.cat([p.draws[n] for p in parts], 2) if n in first.local else v for n, v in first.draws.items()}
    stats = {n: torch.cat([p.stats[n] for p in parts], 2) for n in first.stats}
    data, lost, moved = (torch.cat([getattr(p, n) for p in parts]) for n in ("data", "lost", "moved"))
    edges = {n: torch.cat([p.edges[n] for p in parts]) for n in first.edges}
    together = replace(first, draws=draws, stats=stats, data=data, lost=lost, moved=moved, edges=edges, vectors=None)
    return together.part(data.argsort())


def _put(values: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    values = values.clone()
    values[:, :, rows] = new
    return values
