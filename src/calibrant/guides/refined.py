"""Guides with separate variational parameters for each datum, optimised on the ELBO of a fixed set of data.

The ELBO that an amortized guide loses against such a guide is its amortization gap (Cremer, Li & Duvenaud 2018, arXiv
1801.03558).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from calibrant.guides.describing import shape_text
from calibrant.guides.known_data import KnownData
from calibrant.program.contract import Program, Values
from calibrant.program.supports import from_line, innermost, is_masked, is_on_a_line
from calibrant.program.tracing import guide_trace, is_local, sampled
from calibrant.shown import Shown, counted

_DRAWS = 64  # guide draws per datum, from which the location and scale of its map are computed
_ROWS = 16_384  # rows in one run of the guide


class RefinedGuide(Shown, PyroModule):
    """A guide whose continuous local sites pass through an elementwise affine map in unconstrained space.

    Each datum has its own map, which is the identity at first. Unconstrained space is that of
    `program.supports.from_line`; angles, directions, point masses and discrete sites are not mapped. A datum is
    recognised by its values (observations and covariates, in float32), so that rows may come in any order, in
    minibatches and repeatedly; equal data share their maps.

    Args:
        guide: the guide to start from.
        known: the data for which the guide is refined.
        centres: site with a map → mean of the guide's draws in unconstrained space, a row for each of the known data.
        spreads: the same for their standard deviation.
    """

    def __init__(self, guide: PyroModule, known: KnownData, centres: Values, spreads: Values) -> None:
        super().__init__()
        self.start = nn.ModuleList(
            [guide]
        )  # Pyro would rename the parts of a module of its own, and refuses it after a run
        self.known = known
        self.sites = list(centres)
        self.shifts = nn.ParameterList(torch.zeros_like(centre) for centre in centres.values())
        self.log_scales = nn.ParameterList(torch.zeros_like(centre) for centre in centres.values())
        for number, name in enumerate(self.sites):
            self.register_buffer(f"centre_{number}", centres[name])
            self.register_buffer(f"spread_{number}", spreads[name])

    def facts(self) -> dict[str, str]:
        maps = {f"`{name}`{shape_text(shape)}": "moved and scaled" for name, shape in self.shapes["sites"].items()}
        return {"": f"of {counted(len(self.known), 'datum', 'data')}", **maps, "refines": repr(self.refines)}

    @property
    def refines(self) -> PyroModule:
        """The guide that this one started from."""
        start: Any = self.start[0]
        return start

    @property
    def shapes(self) -> dict[str, Any]:
        """What `of_shapes` rebuilds the maps from, JSON values: the shape of the known data, and those of the sites."""
        sites = {name: list(shift.shape[1:]) for name, shift in zip(self.sites, self.shifts, strict=True)}
        return {"known": [len(self.known), self.known.salt.shape[1]], "sites": sites}

    def forward(self, observed: Mapping[str, Tensor], size: int, **covariates: Tensor) -> None:
        rows = self.known({**observed, **covariates})
        with _Moved({name: self._map(number, rows) for number, name in enumerate(self.sites)}):
            self.start[0](observed, size, **covariates)

    @contextmanager
    def always(self, observed: Mapping[str, Tensor], covariates: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the guide is run on these data alone, whose rows are found once (`KnownData.always`)."""
        with self.known.always({**observed, **covariates}):
            yield

    def _map(self, number: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of the map of a site for the given rows, `(rows, *unconstrained event)`.

        The shift is in standard deviations of the original guide, and the scaling is about its mean, so that one
        learning rate suits every datum and entry.
        """
        centre, spread = (getattr(self, f"{name}_{number}")[rows] for name in ("centre", "spread"))
        scale = self.log_scales[number][rows].exp()
        return centre * (1 - scale) + spread * self.shifts[number][rows], scale


def with_maps(guide: PyroModule, observed: Values, covariates: Values) -> RefinedGuide:
    """The guide with a map for each of some data, all of them the identity.

    Args:
        guide: the guide to start from.
        observed: site → tensor, the data for which the guide is refined.
        covariates: keyword → tensor, leading dimension data.
    """
    values = {**observed, **covariates}
    known = KnownData(values)
    return RefinedGuide(guide, known, *_moments(guide, observed, covariates, known(values)))


def of_shapes(guide: PyroModule, shapes: Mapping[str, Any]) -> RefinedGuide:
    """A refined guide without its numbers, into which those of another one with these `shapes` can be loaded."""
    count, entries = shapes["known"]
    centres, spreads = ({n: torch.zeros(count, *shape) for n, shape in shapes["sites"].items()} for _ in range(2))
    return RefinedGuide(guide, KnownData.of_shape(count, entries), centres, spreads)


class _Moved(Messenger):
    """Appends an affine map in unconstrained space to the distribution of each named site."""

    def __init__(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.maps = maps

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.maps:
            loc, scale = self.maps[msg["name"]]
            to_support = from_line(msg["fn"].support)
            affine = AffineTransform(loc, scale, event_dim=loc.dim() - 1)
            msg["fn"] = dist.TransformedDistribution(msg["fn"], [to_support.inv, affine, to_support])


def is_movable(site: Mapping[str, Any]) -> bool:
    """Whether a site of the guide can have an affine map for each datum."""
    fn = site["fn"]
    if not is_local(site) or is_masked(fn) or isinstance(innermost(fn), dist.Delta):
        return False
    return is_on_a_line(fn.support, fn)


@torch.no_grad()
def _moments(
    guide: Program, observed: Values, covariates: Values, place: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and sd of unconstrained guide draws, by site with a map; datum i is in row `place[i]`."""
    centres: dict[str, Tensor] = {}
    spreads: dict[str, Tensor] = {}
    for rows in torch.arange(len(place), device=place.device).split(max(1, _ROWS // _DRAWS)):
        repeated = rows.repeat_interleave(_DRAWS)
        given, cols = ({name: value[repeated] for name, value in part.items()} for part in (observed, covariates))
        for name, site in sampled(guide_trace(guide, given, len(repeated), cols)).items():
            if not is_movable(site):
                continue
            raw = from_line(site["fn"].support).inv(site["value"])
            raw = raw.reshape(len(rows), _DRAWS, *raw.shape[1:])
            for found, part in ((centres, raw.mean(1)), (spreads, raw.std(1).clamp_min(1e-6))):
                if name not in found:
                    found[name] = part.new_zeros(int(place.max()) + 1, *part.shape[1:])
                found[name][place[rows]] = part
    return centres, spreads
