"""The coordinates of a lane, and vectors, gradients and densities in other coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from calibrant.inference.references.coordinates import from_normal, to_normal


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of a lane: (z − m)·s^κ; or, at κ = 0, z itself, and the Normal quantile for a Laplace latent.

    Attributes:
        table: candidates for κ, `(pair, k)`.
        pair_of: pair of every entry of a vector, −1 for none.
        kinked: whether an entry belongs to a Laplace latent.
        loc: location of the Laplace prior of every entry.
        scale: scale of the Laplace prior of every entry.
        offset: constant part of m for every entry.
        centre_of: index of the entry that is added to `offset` in m, −1 for none.
        scale_of: index of the entry log s of every pair.
    """

    table: Tensor
    pair_of: Tensor
    kinked: Tensor
    loc: Tensor
    scale: Tensor
    offset: Tensor
    centre_of: Tensor
    scale_of: Tensor

    def first(self) -> Tensor:
        """Initial κ, `(pair,)`: the middle candidate, or 0 (Normal quantiles) for Laplace latents."""
        normal = torch.zeros(len(self.table) + 1, dtype=torch.bool, device=self.table.device)
        normal[self.pair_of[self.kinked]] = True
        return self.table[:, 1].masked_fill(normal[:-1], 0.0)

    def other(self, powers: Tensor) -> Tensor:
        """The candidates for κ to try next if chains with these powers `(n, pair)` diverge."""
        index = (powers[..., None] == self.table).int().argmax(-1)
        following = torch.tensor([1, 2, 1], device=index.device)[index]
        return self.table.expand(*index.shape, -1).gather(-1, following[..., None])[..., 0]

    def in_all(self, q: Tensor, grad: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
        """Convert vectors of lanes, and gradients of the log density there, to all candidate coordinates.

        Args:
            q: vectors `(n, d)` in coordinates with these powers.
            grad: gradients there, `(n, d)`.
            powers: κ, `(n, pair)`.

        Returns:
            Vectors and gradients, `(n, 2, k, d)`, and log|dv/dz|, summed over the entries of a pair, `(n, pair, k)`.
        """
        every = self.table.T
        plain, log_scale = self.plain(q, powers)[:, None], q[:, None, self.scale_of]
        held, by_entry = self._held(plain, log_scale, every), self._spread(every * log_scale)
        if self._has_kinks:
            by_entry = torch.where(self._is_normal(every), -from_normal(held, self.loc, self.scale)[1], by_entry)
        gradients = self._changed(held, self._changed(q, grad, powers, -1)[:, None], every, 1)
        return torch.stack([held, gradients], 1), (by_entry @ self._members.to(q)).mT

    def _changed(self, held: Tensor, grad: Tensor, powers: Tensor, sign: int) -> Tensor:
        """Gradients after a change from plain to held coordinates (`sign` 1), or back (−1).

        log p(v) = log p(z) − κ n log s with z = m + v s^−κ; n entries share the scale, and some the centre. Under a
        Laplace prior, where v is the Normal quantile, log p(v) = log p(z) + log|dz/dv|.
        """
        powered = self._spread(powers)
        changed = grad * self._spread(-sign * powers * held[..., self.scale_of]).exp()
        if self._has_kinks:
            slope, side = from_normal(held, self.loc, self.scale)[1].exp(), held.sign() / self.scale
            there = slope * (grad + side) - held if sign > 0 else (grad + held) / slope - side
            changed = torch.where(self._is_normal(powers), there, changed)
        at_held, at_plain = (changed, grad) if sign > 0 else (grad, changed)
        share = -sign * powered * (at_held * held + 1.0)
        centred = sign * at_plain * ((powered != 0) & (self.centre_of >= 0))
        moved = pad(changed, (0, 1)).index_add(-1, self.centre_of % (held.shape[-1] + 1), centred)
        return moved[..., :-1].index_add(-1, self.scale_of, share @ self._members.to(share))

    @cached_property
    def decides(self) -> Tensor:
        """The pair whose κ changes the distribution of an entry or of its gradient, `(d,)`; 0 where none does."""
        found = self.pair_of.clamp_min(0)
        paired = (self.pair_of >= 0) & (self.centre_of >= 0)
        found[self.centre_of[paired]] = self.pair_of[paired]
        found[self.scale_of] = torch.arange(len(self.table), device=found.device)
        return found

    @cached_property
    def _members(self) -> Tensor:
        """Which entries belong to which pair, `(d, pair)`."""
        return self.pair_of[:, None] == torch.arange(len(self.table), device=self.pair_of.device)

    def move(self, q: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Convert vectors `(n, d)` from coordinates with the powers `before` to the powers `after`."""
        return self._held(self.plain(q, before), q[:, self.scale_of], after) if len(self.table) else q

    def plain(self, q: Tensor, powers: Tensor) -> Tensor:
        """Convert vectors of lanes with these powers to z itself (Laplace latents without a pair stay quantiles)."""
        if not len(self.table):
            return q
        powered = q * self._spread(-powers * q[:, self.scale_of]).exp() + self._centre(q, powers)
        if not self._has_kinks:
            return powered
        return torch.where(self._is_normal(powers), from_normal(q, self.loc, self.scale)[0], powered)

    @cached_property
    def _has_kinks(self) -> bool:
        """Whether there are Laplace latents; known before a step is recorded."""
        return bool(self.kinked.any())

    def _held(self, plain: Tensor, log_scale: Tensor, powers: Tensor) -> Tensor:
        powered = (plain - self._centre(plain, powers)) * self._spread(powers * log_scale).exp()
        if not self._has_kinks:
            return powered
        return torch.where(self._is_normal(powers), to_normal(plain, self.loc, self.scale), powered)

    def _centre(self, q: Tensor, powers: Tensor) -> Tensor:
        """m, or zero at κ = 0; the entries from which it is computed are in no pair."""
        return (self.offset + pad(q, (0, 1))[..., self.centre_of]) * (self._spread(powers) != 0)

    def _is_normal(self, powers: Tensor) -> Tensor:
        return self.kinked & (self.pair_of >= 0) & (self._spread(powers) == 0)

    def _spread(self, by_pair: Tensor) -> Tensor:
        """Expand values of pairs `(…, pair)` to entries `(…, d)`; entries without a pair get zero."""
        return pad(by_pair, (0, 1))[..., self.pair_of]
