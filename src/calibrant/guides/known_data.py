"""Data that are recognised by their values, for guides with parameters of their own for every datum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.program.contract import Values

_ROWS = 16_384  # rows that are hashed together


class KnownData(nn.Module):
    """Finds the row of a datum among known data by its values, so that rows may come in any order and repeatedly.

    Values are compared in float32, by a 64-bit hash; equal data share a row.

    Args:
        values: name → observations and covariates of the known data, leading dimension data.
    """

    keys: Tensor
    salt: Tensor

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._place: Tensor | None = None
        entries = _bits(values).shape[1]
        salt = torch.randint(-(2**62), 2**62, (2, entries), generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("salt", (2 * salt + 1).to(next(iter(values.values())).device))
        self.register_buffer("keys", torch.unique(self._keys(values)))

    @classmethod
    def of_shape(cls, count: int, entries: int) -> KnownData:
        """A number of data with this many entries each, whose values are to be loaded."""
        return cls({"values": torch.arange(count)[:, None].expand(count, entries)})

    def __len__(self) -> int:
        return len(self.keys)

    @contextmanager
    def always(self, values: Values) -> Iterator[None]:
        """Inside, `forward` is called with these data alone, each row once or repeated equally often on the spot.

        Their rows are found once: a hash in every step takes longer, and control flow that depends on values cannot be
        recorded.
        """
        self._place = self(values)
        try:
            yield
        finally:
            self._place = None

    def forward(self, values: Values) -> Tensor:
        """The row of every datum, `(data,)`.

        Raises:
            ProgramError: for a datum that is not known.
        """
        if self._place is not None:
            return self._place.repeat_interleave(len(next(iter(values.values()))) // len(self._place))
        keys = self._keys(values)
        place = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        unknown = self.keys[place] != keys
        if unknown.any():
            raise ProgramError(
                f"this guide was refined for {len(self.keys)} data, and the datum in row {int(unknown.nonzero()[0])} "
                "is none of them: refine the guide for these data, or use the one that it started from"
            )
        return place

    def _keys(self, values: Values) -> Tensor:
        """A 64-bit hash of every datum; it is the same on every device, since integer sums do not depend on order."""
        parts = []
        for bits in _bits(values).split(_ROWS):
            mixed = (bits + self.salt[0]) * self.salt[1]
            parts.append(((mixed ^ (mixed >> 32)) * self.salt[1]).sum(1))
        return torch.cat(parts)


def _bits(values: Values) -> Tensor:
    """Values of each datum as integers `(data, entries)`; for floating-point values, these are the float32 bits."""
    whole = {n: (v.float() + 0.0).view(torch.int32) if v.is_floating_point() else v for n, v in values.items()}
    return torch.cat([whole[name].reshape(len(whole[name]), -1).long() for name in sorted(whole)], 1)
