"""Bridge sampling: the log evidence of every datum from draws of its posterior and its guide.

Importance sampling needs a guide with tails at least as heavy as those of the posterior. Bridge sampling only needs
overlap between the two, since the weights of all draws are bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.inference.bridging import Array, Bridge, bridge
from calibrant.inference.references.gate import convergence_of, knows_evidence
from calibrant.inference.references.target import Target
from calibrant.inference.trees import SAMPLE, latent_names
from calibrant.memory import FEW, in_blocks, measured_rows
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, in_double
from calibrant.program.latents import sites
from calibrant.program.supports import is_direction
from calibrant.program.tracing import guide_trace, trace

Rows = npt.NDArray[np.intp]
Words = npt.NDArray[np.object_]
_ROWS = 65_536  # rows in one run of model and guide
_DRAWS_AN_ENTRY = 4  # draws per entry that the estimate of a covariance needs


@dataclass(frozen=True)
class Evidence:
    """The log evidence of every datum, with the components of its error.

    Attributes:
        log_evidence: `(data,)`, nats; NaN where there is none, for the reason in `reason`.
        influence: `(data, draw)`, first-order effect of each guide draw on the log evidence, as in `Bridge`; zero where
            guide draws are not used.
        variance: `(data,)`, squared error due to everything else.
        method: `(data,)`, "exact", "bridge" (from the guide), "normal bridge" (from a Normal) or "".
        reason: `(data,)`, why there is no log evidence, or "".
    """

    log_evidence: Array
    influence: Array
    variance: Array
    method: Words
    reason: Words


def evidence(
    program: Program, guide: Program, data: Data, reference: xr.DataTree, weights: Array, max_se: float, seed: int
) -> Evidence:
    """The log evidence of every datum: that of the reference if it is exact, otherwise by `bridge`.

    The bridge leads from the guide to the reference draws. Where the guide is too far from the posterior, it leads from
    a Normal, which is fitted to the first half of the reference draws, to the second half.

    Args:
        program: the program, without shared latents.
        guide: its guide.
        data: some or all data of the reference.
        reference: a tree from `reference`.
        weights: log p − log q at independent draws of the guide, `(data, draw)`.
        max_se: largest standard error of a log evidence that is returned, nats.
        seed: random seed for the draws of the Normal.
    """
    gate = convergence_of(reference).sel(data=data.labels())
    passed = gate["is_reference"].values.astype(bool)
    reason = np.array(
        [f"no reference posterior: {why or 'it failed the gate'}" for why in gate["reason"].values], object
    )
    values, influence, variance = np.full(len(data), np.nan), np.zeros_like(weights), np.zeros(len(data))
    result = Evidence(values, influence, variance, np.full(len(data), "", object), np.where(passed, "", reason))
    rows = np.flatnonzero(passed)
    if knows_evidence(gate):
        values[rows], result.method[rows] = gate["log_evidence"].values[rows], "exact"
    elif len(rows):
        posterior = reference["posterior"].dataset.sel(data=data.labels())
        independent = bool(posterior.attrs.get("independent_draws", 0))
        at_reference = log_ratios(program, guide, data[rows], posterior.isel(data=rows))
        _fill(result, rows, at_reference, weights[rows], independent, max_se, "bridge")
        rows = rows[result.method[rows] == ""]
        if len(rows):
            fitted = normal_log_ratios(program, data[rows], posterior.isel(data=rows), weights.shape[1], seed)
            if fitted is not None:
                _fill(result, rows, *fitted, independent, max_se, "normal bridge")
    return result


def _fill(
    result: Evidence,
    rows: Rows,
    at_reference: Array,
    at_proposal: Array,
    independent: bool,
    max_se: float,
    method: Literal["bridge", "normal bridge"],
) -> None:
    """Set the log evidence of the data at `rows`, or the reason why there is none; an earlier reason is kept."""
    found = bridge(at_reference, at_proposal, independent)
    for one, row in enumerate(rows):
        reason = _defect(found, one, at_reference[one], at_proposal[one], max_se)
        if reason:
            result.reason[row] = result.reason[row] or reason
            continue
        result.reason[row], result.method[row], result.log_evidence[row] = "", method, found.log_evidence[one]
        if method == "bridge":
            result.influence[row], result.variance[row] = found.influence[one], found.variance[one]
        else:
            result.variance[row] = found.se[one] ** 2


def _defect(found: Bridge, one: int, at_reference: Array, at_proposal: Array, max_se: float) -> str:
    """Why the estimate of a datum is unreliable; empty if it is reliable."""
    lost = int((np.isnan(at_reference) | np.isneginf(at_reference)).sum())
    undefined = int((np.isnan(at_proposal) | np.isposinf(at_proposal)).sum())
    if lost or undefined:
        return f"log p − log q is undefined at {lost} draws of the reference and {undefined} of the guide"
    if found.se[one] <= max_se:
        return ""
    overlap, error = np.nan_to_num(found.overlap[one]), found.se[one]
    words = f"log p(x) ± {error:.2g} nats (limit {max_se:g})" if np.isfinite(error) else "no estimate"
    return f"guide and posterior overlap by {overlap:.2g}, too little for the bridge: {words}"


@torch.no_grad()
def log_ratios(program: Program, guide: Program, data: Data, posterior: xr.Dataset) -> Array:
    """log p(x, z) − log q(z | x) at posterior draws of the given data, `(data, chain, draw)`, in float64."""
    pair = in_double(program), in_double(guide)
    with pyro.validation_enabled(False), defaults(program, data.batch([0])[0], torch.float64) as place:

        def ratios(rows: Values, cols: Values, values: Values, size: int) -> Tensor:
            log_q = density_of(guide_trace(pair[1], rows, size, cols, values), size, values).local
            held = {**rows, **values}
            return density_of(trace(pair[0], size, cols, held), size, held, rows).local - log_q

        return _at_draws(ratios, data, posterior, place).cpu().numpy()


def _at_draws(
    function: Callable[[Values, Values, Values, int], Tensor],
    data: Data,
    posterior: xr.Dataset,
    place: tuple[torch.device, torch.dtype],
) -> Tensor:
    """A function of rows at all posterior draws, `(data, chain, draw, …)`.

    Args:
        function: a function of observations, covariates, latents, each with rows `(rows, *event)`, and their number,
            that returns `(rows, …)`.
        data: the data.
        posterior: their draws.
        place: device and dtype.
    """
    names, (chains, length) = latent_names(posterior), (posterior.sizes[name] for name in SAMPLE)

    def run(index: Tensor, draws: Tensor) -> list[Tensor]:
        repeats = len(draws)
        given = data.batch(index, *place)
        rows, cols = ({n: v.repeat_interleave(repeats, 0) for n, v in part.items()} for part in given)
        block = posterior.isel(data=index.numpy())
        arrays = [block[name].transpose("data", *SAMPLE, ...).values for name in names]
        flat = [torch.as_tensor(array.reshape(len(index), -1, *array.shape[3:])[:, draws.numpy()]) for array in arrays]
        values = cast({name: value.flatten(0, 1) for name, value in zip(names, flat, strict=True)}, *place)
        found = function(rows, cols, values, len(index) * repeats)
        return [found.reshape(len(index), repeats, *found.shape[1:]).transpose(0, 1)]

    few = torch.arange(min(len(data), FEW), device="cpu")
    largest = measured_rows(_ROWS, len(few), lambda times: run(few, torch.arange(times) % (chains * length)))
    found = in_blocks(run, len(data), chains * length, largest)[0].transpose(0, 1)
    return found.reshape(len(data), chains, length, *found.shape[2:])


@torch.no_grad()
def normal_log_ratios(
    program: Program, data: Data, posterior: xr.Dataset, draws: int, seed: int
) -> tuple[Array, Array] | None:
    """log p(x, z) − log q(z), where q is a dense Normal, fitted for every datum to the first half of its draws.

    z is the vector of `references.target.Target`: supports are mapped to the line, Laplace priors to Normal ones, and
    discrete latents are summed out.

    Returns:
        Values at the second half of the draws, `(data, chain, draw)`, and at `draws` draws of q, `(data, draw)`; None
        if the latents have no such vector (circles, spheres), or too many entries for the number of draws.
    """
    double = in_double(program)
    with pyro.validation_enabled(False), defaults(program, data.batch([0])[0], torch.float64) as place:
        observed, covariates = data.tensors(*place)
        found = sites(program, observed, covariates)
        if any(is_direction(site.prior) for site in found.values()):
            return None
        target = Target(double, found, observed, covariates, {})
        vectors = _at_draws(
            lambda _, cols, values, size: target.unconstrain(values, size, cols), data, posterior, place
        )
        first, second = vectors.tensor_split([posterior.sizes["draw"] // 2], 2)
        if not target.width or first[0, ..., 0].numel() < _DRAWS_AN_ENTRY * target.width:
            return None
        generator = torch.Generator(first.device).manual_seed(seed)
        noise = torch.randn(len(data), draws, target.width, generator=generator)
        normal = _normal(first.flatten(1, 2))
        of_normal = normal.loc[:, None] + noise @ normal.scale_tril.mT
        sides = (second, of_normal[:, None])
        result = [
            torch.stack([_log_ratio(target, normal, row, side[row]) for row in range(len(data))]).cpu().numpy()
            for side in sides
        ]
    return result[0], result[1][:, 0]


def _normal(draws: Tensor) -> dist.MultivariateNormal:
    """The Normal with mean and covariance of draws `(data, draw, width)`; NaN where these are degenerate."""
    centre = draws.mean(1)
    centred = draws - centre[:, None]
    factor, failed = torch.linalg.cholesky_ex(centred.mT @ centred / (draws.shape[1] - 1))
    factor = torch.where((failed != 0)[:, None, None], torch.nan, factor)
    return dist.MultivariateNormal(centre, scale_tril=factor, validate_args=False)


def _log_ratio(target: Target, normal: dist.MultivariateNormal, row: int, vectors: Tensor) -> Tensor:
    """log p(x, z) − log q(z) of one datum, at vectors z `(chain, draw, width)`."""
    flat = vectors.flatten(0, 1)
    covariates, observed = target.rows(torch.full((len(flat),), row))
    log_p = target.log_density(flat, flat.new_zeros(len(flat), 0), covariates, observed)
    one = dist.MultivariateNormal(normal.loc[row], scale_tril=normal.scale_tril[row], validate_args=False)
    return (log_p - one.log_prob(flat)).reshape(vectors.shape[:2])
