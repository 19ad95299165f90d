"""All statistics of local latents, from two passes over the draws of the data: one to choose, one to judge."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.correlations import (
    CORRELATION_ROWS,
    PER_DATUM,
    correlation_blocks,
    correlation_error,
    cross_blocks,
    pair_error,
    rows_of,
    squared_errors,
)
from calibrant.evaluation.statistics.directions import (
    COMMON,
    DIRECTIONS,
    INFORMED,
    Choice,
    HalfOfData,
    along,
    choose,
    common,
    covariance,
    halves_of_draws,
    influence_blocks,
    own,
)
from calibrant.evaluation.statistics.draws import Draws
from calibrant.evaluation.statistics.heavy_tails import (
    WIDTHS,
    Tails,
    positive_in,
    quantile_blocks,
    quantile_statistics,
    robust_scale,
    tails_of,
)
from calibrant.evaluation.statistics.joining import Side, varying
from calibrant.evaluation.statistics.marginals import centre_and_spread, coverage_blocks, marginal_statistics, moments
from calibrant.evaluation.statistics.scatter import Scatter
from calibrant.evaluation.statistics.shapes import PROBABILITIES, Shapes
from calibrant.inference.trees import Latent, draw_blocks, scalars, shared_draws
from calibrant.progress import Progress

Array = npt.NDArray[np.float64]
Rows = list[dict[str, Array]]

_TAILS_FROM = 8, 32  # least and largest number of data from which the rule for heavy tails is chosen
_FIRST_PASS = 0.8  # share of the first pass over the data in the time of both
_TAIL_FITS = 2000  # number of latents times data above which it is chosen from fewer data

MARGINAL = (
    *(f"{name}{suffix}" for name in ("mean_error", "sd_ratio", "wasserstein", "coverage") for suffix in ("", "_se")),
    "wasserstein_null",
    "wasserstein_null_se",
    "coverage_null_se",
)
QUANTILES = tuple(f"{name}{s}" for name in ("median_error", *(f"width_{w}_ratio" for w in WIDTHS)) for s in ("", "_se"))
_REFERENCE_SD = "reference_log_sd"
_ALONG = ("mean_error", "mean_error_se", "sd_ratio", "sd_ratio_se")
_HALVES = ("half_mean_error", "half_sd_ratio")
_OF_HALVES = tuple(f"{name}_se" for name in _HALVES)
_DIMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*MARGINAL, _REFERENCE_SD, *QUANTILES, *CORRELATION_ROWS, *_OF_HALVES), ("latent",)),
    **dict.fromkeys(_HALVES, ("half", "latent")),
    **dict.fromkeys(PER_DATUM, ()),
    **{f"direction_{name}": ("direction",) for name in _ALONG},
    **dict.fromkeys(("pair_error", "pair_noise", "half_of_data"), ()),
}


@dataclass(frozen=True)
class Sides:
    """The latents of the two trees, local ones in `names`."""

    amortized: Side
    reference: Side
    names: list[str]
    shared: list[str]

    @property
    def together(self) -> bool:
        """Whether some latents are shared, so that a draw moves all data."""
        return bool(self.shared)

    @cached_property
    def shared_latents(self) -> list[Latent]:
        """All scalars of the shared sites that vary."""
        every = scalars(self.reference.posterior, self.shared)
        return [every[i] for i in self._varying_shared]

    @cached_property
    def shared_draws(self) -> tuple[Draws, Draws]:
        """Draws of the shared latents of guide and reference."""
        some = self._varying_shared
        sides = (self.amortized, self.reference)
        draws = [Draws(shared_draws(side.posterior, self.shared)[..., some], side.independent) for side in sides]
        return draws[0], draws[1]

    @cached_property
    def _varying_shared(self) -> npt.NDArray[np.intp]:
        return varying(self.amortized, self.reference, self.shared)

    @cached_property
    def latents(self) -> list[Latent]:
        """All scalars of the local sites that vary."""
        every = scalars(self.reference.posterior, self.names)
        return [every[i] for i in self._varying]

    @cached_property
    def _varying(self) -> npt.NDArray[np.intp]:
        return varying(self.amortized, self.reference, self.names)

    def draws(self, labels: np.ndarray) -> Iterator[tuple[Draws, Draws]]:
        """Draws of guide and reference, datum by datum."""
        return zip(self._of(self.amortized, labels), self._of(self.reference, labels), strict=True)

    def _of(self, side: Side, labels: np.ndarray) -> Iterator[Draws]:
        for block in draw_blocks(side.posterior, self.names, side.rows(labels)):
            for values in block:
                yield Draws(values[..., self._varying], side.independent)


def local_statistics(
    sides: Sides, labels: np.ndarray, level: float, informed: xr.Dataset | None, progress: Progress
) -> tuple[xr.Dataset, dict[Hashable, str]]:
    """Statistics of the data with usable reference draws, and the reasons why all other data have none.

    Args:
        sides: the two trees.
        labels: the data whose reference passes the gate.
        level: mass of the central interval whose coverage is measured.
        informed: result of `informed_directions`, or None.
        progress: called with (stage, done, total, text).
    """
    if not sides.names:
        return _dataset([{} for _ in labels], labels, sides, None, {}), {}
    usable, defects, positive = _usable(sides, labels)
    count = int(np.clip(_TAIL_FITS // len(sides.latents), *_TAILS_FROM))
    some = usable[np.unique(np.linspace(0, len(usable) - 1, count).astype(int))] if len(usable) else usable
    tails = tails_of((r for _, r in sides.draws(some)), positive)
    run = _Passes(sides, tails, level, _informed(informed, sides.latents))
    rows = run.all(usable, progress)
    return _dataset(rows, usable, sides, tails, run.over_data()), defects


def _usable(sides: Sides, labels: np.ndarray) -> tuple[np.ndarray, dict[Hashable, str], npt.NDArray[np.bool_]]:
    """The data with usable references, why all others have none, and which latents are positive in all draws."""
    defects: dict[Hashable, str] = {}
    positive = np.ones(len(sides.latents), dtype=bool)
    for label, (a, r) in zip(labels.tolist(), sides.draws(labels), strict=True):
        check_finite(a, sides.latents, f"datum {label!r}")
        if reason := defect(r, sides.latents):
            defects[label] = reason
        else:
            positive &= positive_in(a, r)
    return labels[[label not in defects for label in labels.tolist()]], defects, positive


def check_finite(draws: Draws, latents: list[Latent], what: str) -> None:
    """Refuse draws of the guide that are not finite: to leave the datum out would hide the guide's error."""
    finite = np.isfinite(draws.values).all((0, 1))
    if not finite.all():
        raise InferenceError(f"amortized draws of `{latents[int(finite.argmin())].label}` are not finite for {what}")


def defect(reference: Draws, latents: list[Latent]) -> str:
    """The reason why statistics in units of the reference sd do not exist; empty if they do."""
    finite = np.isfinite(reference.values).all((0, 1))
    if not finite.all():
        return f"draws that are not finite in `{latents[int(finite.argmin())].label}`"
    constant = reference.values.max((0, 1)) == reference.values.min((0, 1))
    return f"constant draws of `{latents[int(constant.argmax())].label}`" if constant.any() else ""


def _informed(informed: xr.Dataset | None, latents: list[Latent]) -> dict[Hashable, Array]:
    """The informed direction `(latent, 1)` of each datum, in the order of the latents."""
    if informed is None:
        return {}
    known = informed["latent"].values.tolist()
    order = [known.index(latent.label) for latent in latents if latent.label in known]
    if len(order) < len(latents):  # a latent that the likelihood does not see as a number, such as a discrete one
        return {}
    weights = informed["direction"].transpose("data", "latent").values[:, order]
    rows = zip(informed["data"].values.tolist(), weights, strict=True)
    return {label: row[:, None] for label, row in rows if np.isfinite(row).all()}


def units(a: Draws, r: Draws, tails: Tails) -> tuple[Draws, Draws, Draws, Draws]:
    """Draws in units of the reference: for marginals, and for all that takes several latents together."""
    centre, scale = centre_and_spread(r)
    marginal = a.mapped(centre, scale), r.mapped(centre, scale)
    if not tails.stretched.any():
        return *marginal, *marginal
    middle, width = _bounding_units(r, tails)
    bounded = tails.bounded(a, middle, width), tails.bounded(r, middle, width)
    centre, scale = centre_and_spread(bounded[1])
    return *marginal, bounded[0].mapped(centre, scale), bounded[1].mapped(centre, scale)


def _bounding_units(r: Draws, tails: Tails) -> tuple[Array, Array]:
    """Centre and scale of the bounded transform: robust ones where it is not the identity."""
    centre, scale = centre_and_spread(r)
    middle, width = robust_scale(tails.on_scale(r))
    return np.where(tails.stretched, middle, centre), np.where(tails.stretched, width, scale)


def in_bounded_units(direction: Array, r: Draws, tails: Tails) -> Array:
    """A direction `(latent, 1)` in units of the reference's sds, in those of the bounded transform at its centre."""
    if not tails.stretched.any():
        return direction
    middle, width = _bounding_units(r, tails)
    _, scale = centre_and_spread(tails.bounded(r, middle, width))
    at_centre = np.where(tails.log_scale, np.exp(np.minimum(middle, 700.0)), 1.0)
    slope = at_centre * width * scale
    ratio = np.where(tails.stretched, slope / centre_and_spread(r)[1], 1.0)
    return direction * ratio[:, None]


def quantiles_of_heavy(a: Draws, r: Draws, tails: Tails) -> dict[str, Array]:
    """Statistics of quantiles, NaN for latents that means and sds can judge."""
    found = {name: np.full(len(tails.index), np.nan) for name in QUANTILES}
    heavy = np.flatnonzero(tails.heavy)
    if len(heavy):
        some = quantile_statistics(tails.on_scale(a).latents(heavy), tails.on_scale(r).latents(heavy))
        for name, values in some.items():
            found[name][heavy] = values
    return found


@dataclass
class _Passes:
    sides: Sides
    tails: Tails
    level: float
    informed: dict[Hashable, Array]
    halves: tuple[HalfOfData, HalfOfData] = field(default_factory=lambda: (HalfOfData(), HalfOfData()))
    chosen: list[Choice] = field(default_factory=list)
    scatters: dict[tuple[str, tuple[str, ...]], Scatter] = field(default_factory=dict)
    crossed: list[Array] = field(default_factory=list)
    shapes: Shapes = field(init=False)
    labels: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = Shapes(self.sides.together)
        self.labels = [latent.label for latent in self.sides.latents]

    def all(self, labels: np.ndarray, progress: Progress) -> Rows:
        """The statistics of every datum."""
        rows, size = list[dict[str, Array]](), len(labels)
        progress("compare", 0, size)
        for number, (label, (a, r)) in enumerate(zip(labels.tolist(), self.sides.draws(labels), strict=True)):
            rows.append({"half_of_data": np.array(float(number % 2)), **self._first(a, r, label, number % 2)})
            progress("compare", int(_FIRST_PASS * (number + 1)), size)
        if len(rows) >= 2 and len(self.sides.latents) >= 2:
            self.chosen = [choose(half) for half in self.halves]
            for number, (row, (a, r)) in enumerate(zip(rows, self.sides.draws(labels), strict=True)):
                progress("compare", int(_FIRST_PASS * size + (1 - _FIRST_PASS) * number), size)
                self._second(row, a, r, number % 2)
        progress("compare", size, size)
        return rows

    def _first(self, a: Draws, r: Draws, label: Hashable, half: int) -> dict[str, Array]:
        self.shapes.add(a, r)
        *marginal, ours, theirs = units(a, r, self.tails)
        row = marginal_statistics(marginal[0], marginal[1], self.level) | quantiles_of_heavy(a, r, self.tails)
        row[_REFERENCE_SD] = np.log(centre_and_spread(r)[1])
        found = moments(ours, theirs) if self.tails.stretched.any() else row
        halves = halves_of_draws(ours, theirs)
        row |= half_statistics(halves, found)
        if self.sides.together:
            self._scatter_marginals(marginal[0], marginal[1], self.tails.on_scale(a), self.tails.on_scale(r))
            self._with_shared(ours, theirs)
        if len(self.labels) >= 2:
            direction = self.informed.get(label)
            informed = None if direction is None else in_bounded_units(direction, r, self.tails)
            row |= self._joint(ours, theirs, halves, (found["mean_error"], found["mean_error_se"]), informed, half)
        return row

    def _joint(
        self,
        a: Draws,
        r: Draws,
        halves: list[tuple[Draws, Draws]],
        errors: tuple[Array, Array],
        informed: Array | None,
        half: int,
    ) -> dict[str, Array]:
        """Statistics of several latents together; adds the datum to its half of the data."""
        blocks = correlation_blocks(a, r)
        both = [(covariance(x), covariance(y)) for x, y in halves]
        whole = (both[0][0] + both[1][0]) / 2.0, (both[0][1] + both[1][1]) / 2.0
        self.halves[half].add(whole, errors, squared_errors(blocks)[0])
        row = correlation_error(blocks, a.values.shape[-1])
        projected = own(halves, both)
        if informed is not None:
            projected[INFORMED] = along(a, r, informed)
        row |= self._along(projected, "")
        if self.sides.together:
            self._scatter("correlation", [""], blocks.T[None])
            self._scatter("correlation", self.labels, rows_of(blocks, a.values.shape[-1]))
        return row

    def _along(self, projected: dict[str, tuple[Draws, Draws]], half: str) -> dict[str, Array]:
        """Statistics along some directions, `(direction,)`, NaN for all others."""
        row = {f"direction_{name}": np.full(len(DIRECTIONS), np.nan) for name in _ALONG}
        for direction, sides in projected.items():
            for name, values in moments(*sides).items():
                row[f"direction_{name}"][DIRECTIONS.index(direction)] = values[0]
            if self.sides.together:
                of_mean, of_log_sd = influence_blocks(*sides)
                self._scatter("direction mean", [f"{direction}{half}"], of_mean)
                self._scatter("direction sd", [f"{direction}{half}"], of_log_sd)
        return row

    def _second(self, row: dict[str, Array], a: Draws, r: Draws, half: int) -> None:
        """Judge the common directions and the pair that the other half of the data has chosen."""
        *_, ours, theirs = units(a, r, self.tails)
        choice = self.chosen[1 - half]
        for name, values in self._along(common(ours, theirs, choice), f", half {half}").items():
            row[name] = np.where(np.isnan(values), row[name], values)
        pair, blocks = pair_error(ours.latents(choice.pair), theirs.latents(choice.pair))
        row |= {"pair_error": pair[0], "pair_noise": pair[1]}
        if self.sides.together:
            self._scatter("pair", [f"half {half}"], blocks)

    # -- errors that data share --

    def _scatter(self, quantity: str, entries: list[str], blocks: Array) -> None:
        """Add a datum's influence blocks, `(entry, block)`, or `(entry, pair, block)` for correlations."""
        key = quantity, tuple(entries)
        self.scatters.setdefault(key, Scatter()).add(blocks)

    def _scatter_marginals(self, a: Draws, r: Draws, a_on_scale: Draws, r_on_scale: Draws) -> None:
        of_mean, of_log_sd = influence_blocks(a, r)
        heavy = np.flatnonzero(self.tails.heavy)
        if len(heavy):
            blocks = quantile_blocks(a_on_scale.latents(heavy), r_on_scale.latents(heavy))
            of_mean[heavy], of_log_sd[heavy], wide = blocks
            self._scatter("width", [self.labels[i] for i in heavy], wide)
        self._scatter("mean", self.labels, of_mean)
        self._scatter("sd", self.labels, of_log_sd)
        self._scatter("coverage", self.labels, coverage_blocks(a, r, self.level))

    def _with_shared(self, a: Draws, r: Draws) -> None:
        """Add a datum's errors of the correlations of local latents with shared ones."""
        blocks = cross_blocks(a, r, *self.sides.shared_draws)
        self.crossed.append(blocks.mean(1))
        self._scatter("cross", self._crosses, blocks)

    @property
    def _crosses(self) -> list[str]:
        shared = [latent.label for latent in self.sides.shared_latents]
        return [f"`{one}` and `{other}`" for one in self.labels for other in shared]

    def over_data(self) -> dict[str, xr.Variable]:
        """What is known of all data together: shapes, choices, and the errors that data share."""
        found: dict[str, xr.Variable] = {}
        if self.shapes.count:
            found |= {n: xr.Variable(("probability", "latent"), v) for n, v in self.shapes.statistics().items()}
        if self.chosen:  # half h is judged by the choice of the other half
            weights = np.stack([self.chosen[1 - half].directions for half in (0, 1)])
            pairs = np.array([[self.labels[i] for i in self.chosen[1 - half].pair] for half in (0, 1)])
            found["direction_weight"] = xr.Variable(("half", "latent", "common_direction"), weights)
            found["pair"] = xr.Variable(("half", "end"), pairs)
        if self.crossed:
            found["cross"] = xr.Variable("cross", np.array(self._crosses, dtype=str))
            found["cross_error"] = xr.Variable("cross", np.mean(self.crossed, axis=0))
        return found | self._shared_errors()

    def _shared_errors(self) -> dict[str, xr.Variable]:
        labels: list[str] = []
        parts: dict[str, list[Array]] = {}
        for (quantity, entries), scatter in self.scatters.items():
            labels += [f"{quantity} of {entry}" if entry else quantity for entry in entries]
            for name, values in scatter.statistics().items():
                parts.setdefault(name, []).append(values)
        if not labels:
            return {}
        found = {f"together_{name}": xr.Variable("together", np.concatenate(v)) for name, v in parts.items()}
        return {"together": xr.Variable("together", np.array(labels, dtype=str)), **found}


def half_statistics(halves: list[tuple[Draws, Draws]], whole: dict[str, Array]) -> dict[str, Array]:
    """Errors of mean and sd from either half of the draws, `(half, latent)`, with standard errors `(latent,)`.

    Args:
        halves: both sides' draws of each half.
        whole: the statistics of all draws; a half has half of the effective draws.
    """
    found: dict[str, list[Array]] = {name: [] for name in _HALVES}
    for a, r in halves:
        (ours, wide), (theirs, narrow) = centre_and_spread(a), centre_and_spread(r)
        found["half_mean_error"].append(ours - theirs)
        found["half_sd_ratio"].append(wide / narrow)
    errors = {f"half_{name}": np.sqrt(2.0) * whole[name] for name in ("mean_error_se", "sd_ratio_se")}
    return {name: np.stack(values) for name, values in found.items()} | errors


# -- the dataset -------------------------------------------------------------------------------------------------------


def _dataset(
    rows: Rows, labels: np.ndarray, sides: Sides, tails: Tails | None, over_data: dict[str, xr.Variable]
) -> xr.Dataset:
    latents = sides.latents
    sizes = {"latent": len(latents), "half": 2, "direction": len(DIRECTIONS)}
    variables: dict[str, xr.Variable] = {}
    for name, dims in _DIMS.items():
        shape = tuple(sizes[dim] for dim in dims)
        values = [row.get(name, np.full(shape, np.nan)) for row in rows]
        array = np.array(values, dtype=np.float64).reshape(len(rows), *shape)
        variables[name] = xr.Variable(("data", *dims), array)
    tails = tails or tails_of([], np.zeros(len(latents), dtype=bool))
    of_tails = {"tail_index": tails.index, "heavy": tails.heavy, "log_scale": tails.log_scale}
    variables |= {name: xr.Variable("latent", values) for name, values in of_tails.items()}
    coords = {"data": labels, "direction": list(DIRECTIONS), "common_direction": list(COMMON), "half": [0, 1]}
    return xr.Dataset(variables | over_data, coords | {"probability": PROBABILITIES} | latent_coords(latents, ""))


def latent_coords(latents: list[Latent], prefix: str) -> dict[str, tuple[str, np.ndarray]]:
    """Labels, sites and positions of latents, along the dimension `latent` after a prefix."""
    dim = f"{prefix}latent"
    return {
        dim: (dim, np.array([x.label for x in latents], dtype=str)),
        f"{prefix}site": (dim, np.array([x.site for x in latents], dtype=str)),
        f"{prefix}index": (dim, np.array([x.position for x in latents], dtype=str)),
    }
