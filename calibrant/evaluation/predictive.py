"""Does the model generate data like these? Predictive checks of a model and its guide on real data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

from calibrant.binding import bind_fixed
from calibrant.data import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.predictive_statistics import (
    Function,
    Statistic,
    choose_statistics,
    differences,
    moments,
    transport,
)
from calibrant.inference.gate import Latent
from calibrant.inference.objectives import check_guide, latent_values
from calibrant.inference.trees import model_sha256
from calibrant.program import (
    Program,
    Values,
    as_program,
    check_program,
    defaults,
    guide_trace,
    in_double,
    is_improper,
    is_local,
    refuse_factors,
    sampled,
    seeded,
    trace,
)
from calibrant.progress import Progress, silent

Array = npt.NDArray[np.float64]

LEVELS = (0.5, 0.8, 0.9, 0.95)
GRID = np.linspace(0.0, 1.0, 101)
MIN_DRAWS = 20
_ELEMENTS = 2**21  # entries that one run of the program draws
_KEPT = 2**22  # entries of replicated statistics or prior draws that are kept
_SHOWN = 1000  # of them given back, for pictures


def predictive_check(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    draws: int = 200,
    statistics: Mapping[str, Function] | None = None,
    level: float = 0.9,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.Dataset:
    """Compare real data with what the model generates, before and after it has seen them.

    Four comparisons. Two of them test the model and the guide: under a true model with exact posteriors, the observed
    and the simulated are draws of one distribution.

    - *Prior predictive*: a statistic T over the data set against T over data that the model simulates.
    - *Aggregate posterior*: a guide draw for every datum, pooled, against draws of the prior. A difference is an error
      of the model or of the guide; simulated data, on which the guide can be judged alone, tell which.

    The other two use each datum twice: to find its posterior, and to be compared with it.

    - *Posterior predictive tails*: T of a datum among T of new data from its own posterior (Gelman, Meng & Stern 1996,
      Statistica Sinica 6). Even for the true model these probabilities are not uniform: they gather around 1/2. An
      extreme one is a misfit; one that is not is no proof of a fit.
    - *Entries*: where each entry (pixel) lies in its posterior predictive distribution. Intervals hold *more* than
      their level even for the true model; where they hold less, the spread of the prediction is too small.

    What these two would be for a true model is therefore found by doing the same with data that the model simulates,
    one for every datum (`…_null`; the idea of Hjort, Dahl & Steinbakk 2006, JASA 101). It is the guide's posterior of
    data like the model's own, which may not be those that it was trained on: where the prior predictive is far from
    the data, so may this null be.

    Default statistics, over the entries of an event: `mean`; of continuous ones `contrast` (sd), `minimum`, `maximum`,
    `kurtosis` (from 8 entries); of counts and classes `dispersion` (variance over mean), `zeros` (share), `maximum`; of
    images from 8 × 8 pixels `power low`, `power middle`, `power high`, the log power (nats) in bands of radial
    frequency, equally wide on a log scale up to the Nyquist frequency. Of a scalar, its `value`.

    Masked entries are left out: simulated data hold there what the observed ones hold. Simulation repeats the
    covariates of the data.

    Args:
        model: the program, in `eval()`, without shared latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`; some hundreds of data, which the guide was not trained on.
        covariates: keyword → tensor.
        draws: posterior draws a datum, and replicates of the data set (fewer where they would take much memory).
        statistics: name → function of a tensor `(rows, *event)` → `(rows,)`, float64, beside the default ones; applied
            to every observed site.
        level: of the central interval outside which a tail probability counts as extreme, and of entries.
        seed: of the draws.
        progress: called with (stage, done, total, text).

    Returns:
        Dimensions `data`, `statistic` (label; coordinate `observation`, its site), `latent` (as `z[3]`; coordinates
        `site`, `index`), `observed` (site), `level`, `u` (0 … 1), `draw`. Standard errors count data, not entries, as
        independent.

        `(statistic, data)`: `observed_statistic`; `tail_probability`, the randomised rank of it among posterior
        predictive draws, (rank + U)/(draws + 1); `predictive_mean`, `predictive_sd` of these.
        `(statistic)`: `extreme` ± `extreme_se`, the share of data outside `level`.

        `(observed, u)`: `pit_ecdf` ± `pit_ecdf_se`, the share of entries with a PIT (randomised as above) of at most u.
        `(observed, level)`: `coverage` ± `coverage_se`, the share of entries inside the central interval;
        `(observed, data, level)`: `coverage_data`. `extreme_null`, `pit_ecdf_null`, `coverage_null`, each with `…_se`:
        the same of data that the model simulates.

        `(statistic)`: `prior_mean`, `prior_sd` of simulated T; `prior_mean_difference` (simulated − observed, in sd of
        the observed), `prior_sd_ratio` (simulated/observed), `prior_wasserstein` (1-Wasserstein distance, in sd of the
        observed), each ± `…_se`; `prior_wasserstein_null` and `prior_wasserstein_null_sd`, mean and sd of the distance
        of data sets of this size from the model itself; `prior_p`, the share of these as far off (at least
        1/(replicates + 1)): exact, where the standard errors are those of many data and too small for heavy tails.
        `(statistic, draw)`: `prior_statistic`, some of the simulated T.

        `(latent)`: the same with `aggregate_` (guide − prior, in sd of the prior; guide/prior). An infinite prior
        variance makes them meaningless, but for `aggregate_p`. `(latent, data)`: `aggregate_draw`, one guide draw a
        datum. `(latent, draw)`: `prior_draw`.

        A program with an improper prior has no `…_null`, `prior_…` and `aggregate_…`. A statistic or latent that is
        constant over the data has no sd to be measured in: NaN.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract, or a program with a factor.
        InferenceError: for a program with shared latents, a statistic of another shape or that is not finite, a level
            outside (0, 1), or too few draws or data.
    """
    if not 0.0 < level < 1.0:
        raise InferenceError(f"level={level}: the share that a central interval holds is between 0 and 1")
    data, program, guided = bind_fixed(model, observed, covariates), as_program(model), as_program(guide)
    if draws < MIN_DRAWS or len(data) < 2:
        raise InferenceError(f"{draws} draws of {len(data)} data: give draws >= {MIN_DRAWS} and two data or more")
    check_program(program, *data.tensors())
    some = data.batch(torch.arange(min(len(data), 4)))
    check_guide(program, guided, *some)
    with torch.no_grad(), seeded(seed), defaults(program, some[0], torch.float64) as (device, _):
        check = _Check.read(in_double(program), in_double(guided), data, device, statistics, level)
        found = _after(check, draws, progress)
        variables = {**_tails(found, level), **_entries(found)}
        if check.proper:
            own = _after(check, draws, progress, own=True)
            variables |= _null({**_tails(own, level), **_entries(own)})
            variables |= _before(check, draws, found, progress)
        replicates = {dim: check.replicates(draws, len(getattr(check, f"{dim}s"))) for dim in ("statistic", "latent")}
    attrs = {"draws": draws, "level": level, "seed": seed, "model_sha256": model_sha256(program)}
    attrs |= {f"{dim}_replicates": count for dim, count in replicates.items()}
    return xr.Dataset(variables, check.coords(), attrs)


Variables = dict[str, tuple[tuple[str, ...], Array]]


@dataclass(frozen=True)
class _Check:
    """What is run, and on what."""

    model: Program
    guide: Program
    data: Data
    device: torch.device
    statistics: list[Statistic]
    latents: list[Latent]
    entries: int  # of one run, a datum
    levels: tuple[float, ...]
    level: float
    proper: bool

    @classmethod
    def read(
        cls,
        model: Program,
        guide: Program,
        data: Data,
        device: torch.device,
        own: Mapping[str, Function] | None,
        level: float,
    ) -> _Check:
        rows, cols = data.batch(torch.arange(min(len(data), 1000), device="cpu"), device, torch.float64)
        size = len(next(iter(rows.values())))
        values = latent_values(guide_trace(guide, rows, size, cols))
        run = trace(model, size, cols, values)
        refuse_factors(run)
        nodes = sampled(run)
        if shared := [name for name in values if not is_local(nodes[name])]:
            raise InferenceError(
                f"latents {shared} are shared: their draw moves all data at once, so that no replicate of a datum is "
                "independent of the others; hold them fixed in the program (a buffer with their posterior mean, say) "
                "to check the rest"
            )
        statistics = choose_statistics({name: nodes[name]["fn"] for name in rows}, rows, own)
        latents = [Latent(name, index) for name, value in values.items() for index in np.ndindex(*value.shape[1:])]
        entries = len(latents) + sum(prod(value.shape[1:]) for value in rows.values())
        proper = not any(is_improper(site["fn"]) for site in nodes.values())
        levels = tuple(sorted({*LEVELS, level}))
        return cls(model, guide, data, device, statistics, latents, entries, levels, level, proper)

    def coords(self) -> dict[str, Any]:
        return {
            "data": self.data.labels(),
            "statistic": np.array([s.label for s in self.statistics], dtype=str),
            "observation": ("statistic", np.array([s.site for s in self.statistics], dtype=str)),
            "latent": np.array([x.label for x in self.latents], dtype=str),
            "site": ("latent", np.array([x.site for x in self.latents], dtype=str)),
            "index": ("latent", np.array([x.position for x in self.latents], dtype=str)),
            "observed": np.array(self.data.observed_names, dtype=str),
            "level": np.array(self.levels),
            "u": GRID,
        }

    def replicates(self, draws: int, columns: int) -> int:
        """How many replicates of `columns` numbers a datum are kept."""
        return min(draws, max(MIN_DRAWS, _KEPT // (len(self.data) * max(1, columns))))

    def blocks(self, draws: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Positions of data, and how many draws of each datum are made at once."""
        rows = max(1, _ELEMENTS // max(1, self.entries))
        parts = [min(rows, draws - done) for done in range(0, draws, rows)]
        for index in torch.arange(len(self.data), device="cpu").split(max(1, rows // draws)):
            yield index, parts

    def simulate(self, observed: Values, covariates: Values, repeats: int, from_guide: bool) -> _Simulated:
        """Latents of guide or prior, and what the program makes of them, each datum `repeats` times in a row."""
        rows, cols = (
            {name: value.repeat_interleave(repeats, 0) for name, value in part.items()}
            for part in (observed, covariates)
        )
        size = len(next(iter(rows.values())))
        held = latent_values(guide_trace(self.guide, rows, size, cols)) if from_guide else {}
        nodes = sampled(trace(self.model, size, cols, held))
        names = list(dict.fromkeys(latent.site for latent in self.latents))
        flat = [nodes[name]["value"].double().reshape(size, -1) for name in names]
        kept = {name: _kept(nodes[name]) for name in rows}
        values = {name: torch.where(kept[name], nodes[name]["value"].double(), rows[name]) for name in rows}
        return _Simulated(torch.cat(flat, 1) if flat else torch.zeros(size, 0), values, kept, repeats)

    def of(self, values: Values) -> Tensor:
        """The statistics of rows, `(rows, statistic)`."""
        return torch.stack([statistic(values) for statistic in self.statistics], 1)


@dataclass(frozen=True)
class _Simulated:
    """Draws of some data, those of a datum in a row."""

    latents: Tensor  # (data · draws, latent)
    values: Values  # site → (data · draws, *event)
    kept: Values  # the same, whether an entry is not masked
    repeats: int

    def by_datum(self, values: Tensor) -> Tensor:
        """`(data, draws, …)`."""
        return values.reshape(-1, self.repeats, *values.shape[1:])


def _kept(site: Mapping[str, Any]) -> Tensor:
    """Which entries of a site count: those that no mask, in its distribution or around it, takes out."""
    value, fn = site["value"], site["fn"]
    kept = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    masks = [] if site["mask"] is None else [(site["mask"], site["fn"].batch_shape)]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, fn.batch_shape))
        fn = fn.base_dist
    for mask, batch in masks:
        mask = torch.as_tensor(mask, dtype=torch.bool, device=value.device).expand(batch)
        kept = kept & mask.reshape(*batch, *[1] * (value.dim() - len(batch)))
    return kept


# -- after the data ----------------------------------------------------------------------------------------------------


def _after(check: _Check, draws: int, progress: Progress, own: bool = False) -> dict[str, Array]:
    """What `_Tally` finds, a block of data after the other; leading dimension data.

    With `own`, of data that the model simulates in place of the observed.
    """
    stage = "posterior predictive" + " of simulated data" * own
    parts: list[dict[str, Array]] = []
    for index, repeats in check.blocks(draws):
        observed, covariates = check.data.batch(index, check.device, torch.float64)
        if own:
            observed = dict(check.simulate(observed, covariates, 1, from_guide=False).values)
        tally = _Tally(check, observed)
        for count in repeats:
            tally.add(check.simulate(observed, covariates, count, from_guide=True))
        parts.append(tally.found())
        progress(stage, int(index[-1]) + 1, len(check.data))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _tails(found: Mapping[str, Array], level: float) -> Variables:
    names = ("observed_statistic", "tail_probability", "predictive_mean", "predictive_sd")
    outside = np.abs(found["tail_probability"] - 0.5) > 0.5 * level
    variables: Variables = {name: (("statistic", "data"), found[name].T) for name in names}
    variables["extreme"] = (("statistic",), outside.mean(0))
    variables["extreme_se"] = (("statistic",), outside.std(0, ddof=1) / np.sqrt(len(outside)))
    return variables


def _entries(found: Mapping[str, Array]) -> Variables:
    """Averages over data of the shares of each, `(data, observed, …)`, which are NaN for a datum without entries."""
    variables: Variables = {"coverage_data": (("observed", "data", "level"), found["coverage"].transpose(1, 0, 2))}
    for name, dim in (("pit_ecdf", "u"), ("coverage", "level")):
        known = np.isfinite(found[name]).sum(0)
        variables[name] = (("observed", dim), np.nansum(found[name], 0) / known)
        variables[f"{name}_se"] = (("observed", dim), np.nanstd(found[name], 0, ddof=1) / np.sqrt(known))
    return variables


def _null(variables: Variables) -> Variables:
    """The summaries of simulated data, under the names of what they are the null of."""
    names = ("extreme", "coverage", "pit_ecdf")
    return {f"{name}_null{end}": variables[f"{name}{end}"] for name in names for end in ("", "_se")}


class _Tally:
    """What is known of some data after so many posterior draws: of entries, only how many draws lie below."""

    def __init__(self, check: _Check, observed: Values) -> None:
        self.check, self.observed = check, observed
        self.below = {name: torch.zeros_like(value) for name, value in observed.items()}
        self.ties = {name: torch.zeros_like(value) for name, value in observed.items()}
        self.kept: Values = {}
        self.draws = 0
        self.statistics: list[Tensor] = []
        self.latents: list[Tensor] = []

    def add(self, run: _Simulated) -> None:
        self.draws += run.repeats
        self.kept = {name: run.by_datum(kept)[:, 0] for name, kept in run.kept.items()}
        for name, value in self.observed.items():
            drawn = run.by_datum(run.values[name])
            self.below[name] += (drawn < value[:, None]).sum(1)
            self.ties[name] += (drawn == value[:, None]).sum(1)
        self.statistics.append(run.by_datum(self.check.of(run.values)))
        self.latents.append(run.by_datum(run.latents))

    def found(self) -> dict[str, Array]:
        drawn, latents = torch.cat(self.statistics, 1), torch.cat(self.latents, 1)
        observed = self.check.of(self.observed)
        below, ties = ((drawn < observed[:, None]).sum(1), (drawn == observed[:, None]).sum(1))
        shares = [self._shares(name) for name in self.observed]
        tensors = {
            "observed_statistic": observed,
            "tail_probability": self._pit(below.double(), ties.double()),
            "predictive_mean": drawn.mean(1),
            "predictive_sd": drawn.std(1),
            "pit_ecdf": torch.stack([ecdf for ecdf, _ in shares], 1),
            "coverage": torch.stack([coverage for _, coverage in shares], 1),
            "latent": latents[:, 0],
            "latent_mean": latents.mean(1),
            "latent_square": latents.square().mean(1),
        }
        return {name: value.cpu().numpy() for name, value in tensors.items()}

    def _pit(self, below: Tensor, ties: Tensor) -> Tensor:
        return (below + torch.rand_like(below) * (ties + 1.0)) / (self.draws + 1)

    def _shares(self, name: str) -> tuple[Tensor, Tensor]:
        """Of every datum: shares of entries with a PIT of at most each u, and inside each central interval."""
        pit = self._pit(self.below[name], self.ties[name]).reshape(len(self.below[name]), -1)
        kept = self.kept[name].reshape(pit.shape)
        known = kept.sum(1).double()
        grid = torch.as_tensor(GRID, dtype=pit.dtype)
        cells = torch.where(kept, torch.searchsorted(grid, pit.contiguous()), len(grid))
        counts = torch.zeros(len(pit), len(grid) + 1).scatter_add_(1, cells, torch.ones_like(pit))
        inside = [((pit - 0.5).abs() <= 0.5 * level) & kept for level in self.check.levels]
        coverage = torch.stack([held.sum(1) / known for held in inside], 1)
        return counts[:, :-1].cumsum(1) / known[:, None], coverage


# -- before the data ---------------------------------------------------------------------------------------------------


def _before(check: _Check, draws: int, found: Mapping[str, Array], progress: Progress) -> Variables:
    """Replicates of the data set against the observed statistics, and of their latents against the guide's."""
    simulated, latents = _replicates(check, draws, progress)
    rows = []
    for ours, theirs in zip(found["observed_statistic"].T, simulated, strict=True):
        data, model = moments(ours), moments(theirs.ravel())
        compared = {**differences(model, data), **_in_units(transport(ours, theirs), data.sd)}
        rows.append({"mean": model.mean, "sd": model.sd, **compared})
    variables = _columns("prior", "statistic", rows)
    rows = []
    for i, theirs in enumerate(latents):
        guide, prior = moments(found["latent_mean"][:, i], found["latent_square"][:, i]), moments(theirs.ravel())
        moved = transport(found["latent"][:, i], theirs)
        rows.append({**differences(guide, prior), **_in_units(moved, prior.sd)})
    variables |= _columns("aggregate", "latent", rows)
    variables["prior_statistic"] = (("statistic", "draw"), _thinned(simulated))
    variables["prior_draw"] = (("latent", "draw"), _thinned(latents))
    variables["aggregate_draw"] = (("latent", "data"), found["latent"].T)
    return variables


def _replicates(check: _Check, draws: int, progress: Progress) -> tuple[Array, Array]:
    """Statistics and latents of replicates of the data set, `(statistic or latent, replicate, data)`."""
    kept = [check.replicates(draws, len(columns)) for columns in (check.statistics, check.latents)]
    blocks = []
    for index, repeats in check.blocks(max(kept)):
        observed, covariates = check.data.batch(index, check.device, torch.float64)
        runs = [check.simulate(observed, covariates, count, from_guide=False) for count in repeats]
        pairs = zip(*((run.by_datum(check.of(run.values)), run.by_datum(run.latents)) for run in runs), strict=True)
        drawn = (torch.cat(parts, 1)[:, :count] for parts, count in zip(pairs, kept, strict=True))
        blocks.append([values.permute(2, 1, 0).cpu().numpy() for values in drawn])
        progress("prior predictive", int(index[-1]) + 1, len(check.data))
    statistics, latents = (np.concatenate(parts, 2) for parts in zip(*blocks, strict=True))
    return statistics, latents


def _in_units(found: dict[str, float], unit: float) -> dict[str, float]:
    return {name: value if name == "p" else value / unit if unit else np.nan for name, value in found.items()}


def _columns(prefix: str, dim: str, rows: list[dict[str, float]]) -> Variables:
    names = rows[0] if rows else ()
    return {f"{prefix}_{name}": ((dim,), np.array([row[name] for row in rows])) for name in names}


def _thinned(values: Array) -> Array:
    """Some of the replicated values, `(…, draw)`, of all replicates and data alike; as many whatever is replicated."""
    flat = values.reshape(len(values), -1)
    count = min(_SHOWN, MIN_DRAWS * values.shape[2])
    return flat[:, np.linspace(0, flat.shape[1] - 1, count).astype(int)]
