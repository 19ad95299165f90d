"""Batched NUTS on a density that is a plain function of tensors, for one posterior or thousands at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from calibrant.errors import InferenceError, names_to_offer
from calibrant.inference.references.chains import McmcDraws
from calibrant.inference.references.density_checks import check_density, require_finite_start
from calibrant.inference.references.gate import MIN_CHAINS, MIN_DRAWS, shortfall
from calibrant.inference.references.given_starts import GivenStarts
from calibrant.inference.references.lanes import NutsSettings, sample_target
from calibrant.inference.references.partition import Places
from calibrant.inference.references.random_numbers import fold, label_key, mix
from calibrant.inference.references.repair import run_and_repair
from calibrant.inference.references.sampling import ReferencePlan
from calibrant.inference.trees import SAMPLE, attributes_of, named_dims, require_memory, with_coords
from calibrant.program.environment import defaults
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

Values = Tensor | np.ndarray | Mapping[str, Any]


def sample(
    log_density: Callable[..., Tensor],
    start: Values,
    *,
    data: Values | None = None,
    supports: Mapping[str, Any] | None = None,
    batched: bool = True,
    warmup: int = 1000,
    draws: int = 1000,
    target_accept: float = 0.8,
    dense: bool | Literal["auto"] = "auto",
    compile: bool | Literal["auto"] = "auto",
    subchains: int | Literal["auto"] = "auto",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.DataTree:
    """Draw from a density that is a function of tensors, by batched NUTS, and judge the draws by the convergence gate.

    All chains of all posteriors move together, each with its own tree, step size and metric, so that thousands of
    posteriors cost little more per step than a few.

    Memory: the draws take 8 bytes × chains × draws × posteriors × d, and the call three times that at its peak;
    posteriors that fail the gate are run again with up to four times as many draws. However many posteriors there are,
    at most 4,096 chains (65,536 on a GPU) run at a time, in at most 256 MiB (16 GiB) with their data, but no fewer
    than the chains of one posterior. The memory that `log_density` needs for so many rows is added to that.

    Args:
        log_density: the logarithm of a density, in nats, up to a constant. It takes many points at once and returns one
            value for each: `log_density(q)` takes `(rows, d)` and returns `(rows,)`; with `data` it is
            `log_density(q, x)`, where row i of `x` are the data of row i of `q`. The number of rows varies from call to
            call, and each row must be computed from itself alone. With a mapping as `start`, `q` is a dict of tensors
            `(rows, …)`. It computes in float64 with torch, and is differentiated by autograd; -inf or NaN where no
            trajectory comes is allowed. (One that crosses an edge to it diverges, and the gate refuses divergences:
            bounds are given as `supports`.)
        start: where the chains start, a start for each chain: `(chains, d)`, at least 4; or name → `(chains, …)`, which
            names the parameters in the result. With `data`, the posteriors come first: `(posteriors, chains, d)`, or
            name → `(posteriors, chains, …)`. A chain whose start has no finite density starts at a draw of U(−2, 2)
            for every unconstrained number instead.
            Modes are found only where starts lead: spread them wider than the posterior, so that R-hat shows it if
            chains from different starts do not meet.
        data: one row for each posterior, a tensor `(posteriors, …)` or name → `(posteriors, …)`; then every row is a
            posterior of its own. None for a single posterior.
        supports: name of a parameter → constraint of `torch.distributions.constraints`, such as `positive` or
            `simplex`, for parameters that cannot take every real value; `start` is then a mapping. The chains run on
            unconstrained numbers. The log determinant of the map is added for you: leave it out of `log_density`.
        batched: False if `log_density` takes one point (`(d,)`, and one datum) and returns one number `()`; it is then
            run for many points by `torch.func.vmap`.
        warmup: number of adaptation steps per chain.
        draws: number of draws per chain that are kept, at least 500.
        target_accept: mean acceptance rate to which step sizes adapt.
        dense: whether the metric is dense, for few, strongly correlated parameters; "auto" takes a dense metric for a
            single posterior of at most 50 dimensions.
        compile: whether the step is compiled; "auto" compiles it where that takes less time than it saves.
        subchains: number of sub-chains with one start into which every chain is divided, as in `reference`; 1 gives
            ordinary chains.
        dims: name of a parameter, or of data → names of its dimensions (without posteriors and chains). Parameters
            that are given as one tensor are called "q", and such data "x".
        coords: name of a dimension → labels along it; "data" for the posteriors, whose random numbers follow from
            their labels.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        A tree like that of `reference`: `posterior` with variables `(chain, draw, data, …)` in float64, `sample_stats`,
        `convergence` (dimension `data`: `is_reference`, `reason`, R-hat, ESS, …), and `observed_data` where there are
        data. For a single posterior, the first two have no dimension `data`. Posteriors that fail the gate have been
        run again up to twice, with settings that depend on the cause.

    Raises:
        InferenceError: for a function that is no such density (another shape, not differentiable, rows that depend on
            each other, no finite value at any start), starts or data of other shapes, starts outside their support,
            fewer than 4 chains or 500 draws, other settings that no chain can run with, `dims` or `coords` that do not
            fit the parameters, and draws that exceed 4 GiB.
    """
    progress = reporting(progress)
    plan = ReferencePlan(
        "nuts",
        warmup=warmup,
        draws=draws,
        target_accept=target_accept,
        dense=dense,
        compile=compile,
        subchains=subchains,
    )
    given = GivenStarts.of(start, data, supports or {})
    if reason := shortfall(given.chains, draws):
        remedies = f"give draws={MIN_DRAWS} or more", "give more starts, one for each chain"
        raise InferenceError(f"chains cannot be judged with {reason}: {remedies[given.chains < MIN_CHAINS]}")
    results = _Results.of(given, dims or {}, coords or {}, {"warmup": warmup, "draws": draws, "seed": seed})
    _require_memory(given, draws)
    with _in_float64(log_density, given) as device:
        target, starts = given.target(log_density, batched, device), given.vectors(device)
        check_density(target, starts, batched)
        require_finite_start(target, starts)
        keys = fold(mix(torch.tensor([stream(seed, "sample")])), torch.tensor(results.keys))
        settings = replace(plan.nuts, chains=given.chains)

        def chains(rows: Tensor, plan: NutsSettings) -> tuple[McmcDraws, Tensor]:
            drawn, powers = sample_target(
                target.part(rows), keys[rows], Places(starts[rows]), plan, reporting(progress)
            )
            return replace(drawn, data=rows[drawn.data]), powers

        with torch.no_grad():  # a function of the user may compute with weights that have gradients
            drawn, convergence = run_and_repair(chains, results.groups, len(starts), settings, joint=False)
    return results.tree(drawn, convergence)


@contextmanager
def _in_float64(log_density: Callable[..., Tensor], given: GivenStarts) -> Iterator[torch.device]:
    """Make tensors in float64, on the device of the density's weights or else of the starts, which it returns."""
    with defaults(log_density, given.values, torch.float64) as place, pyro.validation_enabled(False):
        yield place[0]


def _require_memory(given: GivenStarts, draws: int) -> None:
    width = sum(shape.numel() for shape in given.parameters.shapes.values())
    what = f"{given.chains} × {draws} draws of {width} numbers in {given.posteriors} posteriors"
    require_memory(given.chains * draws * given.posteriors * width, what, width=8)


def _require_labels(given: GivenStarts, dims: Mapping[str, Sequence[str]], coords: Mapping[str, Any]) -> None:
    """Refuse names and labels of dimensions that do not fit the shapes of parameters and data."""
    shapes = {**given.parameters.shapes, **{name: value.shape[1:] for name, value in given.data.items()}}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        own = dims.get(name, ())
        if isinstance(own, str) or len(own) > len(shape):
            raise InferenceError(
                f"dims[{name!r}] = {own!r}: give a list of at most {len(shape)} names, since one value of {name!r} has "
                f"the shape {tuple(shape)} without posteriors and chains"
            )
        sizes |= dict(zip(named_dims(name, len(shape), own), shape, strict=True))
    for name, labels in coords.items():
        if name in sizes and np.size(labels) != sizes[name]:
            raise InferenceError(
                f"coords[{name!r}] holds {np.size(labels)} labels: give {sizes[name]}, one for each entry"
            )


@dataclass(frozen=True)
class _Results:
    """How draws become the groups of a tree."""

    given: GivenStarts
    dims: Mapping[str, Sequence[str]]
    coords: Mapping[str, Any]
    attributes: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        given: GivenStarts,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> _Results:
        known = [*given.values, *given.data]
        for name in dims:
            if name not in known:
                raise InferenceError(f"dims names {name!r}, which is no parameter: {names_to_offer(name, known)}")
        _require_labels(given, dims, coords)
        labels = list(coords.get("data", range(given.posteriors)))
        if len(labels) != given.posteriors or len(set(labels)) != len(labels):
            raise InferenceError(f"coords['data'] has to hold {given.posteriors} different labels, one per posterior")
        attributes = attributes_of("nuts", False, list(given.values), {"chains": given.chains, **settings})
        return cls(given, dims, {**coords, "data": np.asarray(labels)}, attributes)

    @property
    def keys(self) -> list[int]:
        """An integer for every posterior, from its label."""
        return [label_key(label) for label in self.coords["data"].tolist()]

    def groups(self, drawn: McmcDraws) -> tuple[xr.Dataset, xr.Dataset]:
        """The groups `posterior` and `sample_stats`, with a dimension `data`."""
        posterior = {n: self._array(n, v.numpy(), (*SAMPLE, "data")) for n, v in drawn.draws.items()}
        stats = {n: xr.DataArray(v.numpy(), dims=(*SAMPLE, "data")) for n, v in drawn.stats.items()}
        coords = {**self.coords, "data": self.coords["data"][drawn.data.numpy()]}
        return (
            with_coords(xr.Dataset(posterior, attrs={**self.attributes, **drawn.notes}), coords),
            with_coords(xr.Dataset(stats, attrs=self.attributes), coords),
        )

    def tree(self, drawn: McmcDraws, convergence: xr.Dataset) -> xr.DataTree:
        """All groups; those of a single posterior without data have no dimension `data`."""
        posterior, stats = self.groups(drawn)
        found = {"posterior": posterior, "sample_stats": stats, "convergence": convergence}
        if self.given.data:
            rows = {n: self._array(n, v[drawn.data].cpu().numpy(), ("data",)) for n, v in self.given.data.items()}
            found["observed_data"] = with_coords(xr.Dataset(rows), {**self.coords, "data": posterior["data"].values})
        else:
            found |= {name: found[name].isel(data=0, drop=True) for name in ("posterior", "sample_stats")}
        return xr.DataTree.from_dict({f"/{name}": group for name, group in found.items()})

    def _array(self, name: str, values: np.ndarray, leading: tuple[str, ...]) -> xr.DataArray:
        own = named_dims(name, values.ndim - len(leading), self.dims.get(name, ()))
        return xr.DataArray(values, dims=(*leading, *own))
