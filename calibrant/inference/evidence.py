"""The log evidence of every datum from draws of its posterior and of its guide: bridge sampling.

Importance sampling needs a guide with tails as heavy as the posterior's. Bridge sampling needs no more than that the
two overlap, since a draw of either counts by no more than a bounded weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from scipy.special import expit, log_expit
from torch import Tensor

from calibrant.data import Data
from calibrant.inference.diagnostics import ess
from calibrant.inference.gate import convergence_of, latent_names
from calibrant.inference.target import Target, is_direction
from calibrant.inference.trees import SAMPLE
from calibrant.program import Program, Values, cast, defaults, density_of, guide_trace, in_double, sites, trace

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
Words = npt.NDArray[np.object_]

_ROWS = 65_536  # of a run
_STEPS = 60  # of Newton's; five to ten are enough where the densities overlap
_TOLERANCE = 1e-9  # nats
_DRAWS_AN_ENTRY = 4  # for a covariance


@dataclass(frozen=True)
class Bridge:
    """An estimate of log evidences, with what its errors are made of.

    Attributes:
        log_evidence: `(data,)`, nats; NaN where the two densities share no draw.
        influence: `(data, draw)`, what each of the proposal's draws adds to the estimate, to first order, with mean
            zero: the spread is their part of the error, also of differences from what else is made of these draws.
        variance: `(data,)`, the reference draws' part of the squared error.
        overlap: `(data,)`, ∫ p q / (s₁ p + s₂ q), from 0 to 1 where the densities are equal.
    """

    log_evidence: Array
    influence: Array
    variance: Array
    overlap: Array

    @property
    def se(self) -> Array:
        """Standard errors, `(data,)`."""
        return np.sqrt(self.variance + self.influence.var(1, ddof=1) / self.influence.shape[1])


def bridge(at_reference: Array, at_proposal: Array, independent: bool = False) -> Bridge:
    """Log evidences by the optimal bridge between reference draws and a proposal.

    With l = log p(x, z) − log q(z), the estimate log r solves s₂ E_q[σ(l − c)] = s₁ E_p[σ(c − l)] with
    c = log r − log(s₁ / s₂): the fixed point of the iteration of Meng & Wong 1996 (Statistica Sinica 6, 831–860).
    One side falls in r and the other rises, so that there is one root, which Newton's steps find. s₁ and s₂ are the
    shares of effective draws of the posterior and of q. The error is that of Frühwirth-Schnatter 2004 (Econometrics
    Journal 7, 143–167; also in Gronau et al. 2017, arXiv 1703.05984), with the effective number of reference draws for
    the mean of their own weights σ(c − l).

    Args:
        at_reference: l at draws of the posterior, `(data, chain, draw)`; +∞ where the proposal has no density.
        at_proposal: l at independent draws of the proposal, `(data, draw)`; −∞ where the model has no density.
        independent: whether the reference draws are independent too.
    """
    _, chains, length = at_reference.shape
    effective = np.full(len(at_reference), float(chains * length))
    log_evidence = _root(at_reference, at_proposal, effective)
    if not independent:  # shares of effective draws need weights, which need shares
        effective = _effective(_weights(at_reference, log_evidence, effective, at_proposal.shape[1])[0])
        log_evidence = _root(at_reference, at_proposal, effective)
    of_reference, share = _weights(at_reference, log_evidence, effective, at_proposal.shape[1])
    of_proposal = 1.0 - _weights(at_proposal[:, None], log_evidence, effective, at_proposal.shape[1])[0][:, 0]
    if not independent:
        effective = _effective(of_reference)
    of_reference = of_reference.reshape(len(of_reference), -1)
    with np.errstate(invalid="ignore", divide="ignore"):  # without overlap
        means = of_proposal.mean(1)
        relative = of_reference.var(1, ddof=1) / of_reference.mean(1) ** 2
        return Bridge(log_evidence, of_proposal / means[:, None] - 1.0, relative / effective, means / share)


def _weights(log_ratios: Array, log_evidence: Array, effective: Array, draws: int) -> tuple[Array, Array]:
    """s₂ q / (s₁ p + s₂ q) at draws `(data, chain, draw)`, and s₁ `(data,)`."""
    offset = log_evidence - np.log(effective / draws)
    return expit(offset[:, None, None] - log_ratios), effective / (effective + draws)


def _effective(weights: Array) -> Array:
    """Effective number of draws for the mean of weights `(data, chain, draw)`; all of them where nothing is known."""
    known: Any = np.isfinite(weights).all((1, 2))
    return ess(np.moveaxis(np.where(known[:, None, None], weights, 0.0), 0, 2))


def _root(at_reference: Array, at_proposal: Array, effective: Array) -> Array:
    """log r `(data,)`, by Newton's steps inside a bracket that every look narrows."""
    flat = at_reference.reshape(len(at_reference), -1)
    both = np.concatenate([flat, at_proposal], 1)
    finite = np.isfinite(both)
    pad = math.log(both.shape[1]) + 1.0  # infinite ones may put the root outside the range of the others
    low = np.where(finite, both, np.inf).min(1) - pad
    high = np.where(finite, both, -np.inf).max(1) + pad
    sound = np.isfinite(flat).any(1) & np.isfinite(at_proposal).any(1) & ~np.isnan(both).any(1)
    found = np.full(len(flat), np.nan)
    rows = np.flatnonzero(sound)
    low, high = low[rows], high[rows]
    at = np.clip(np.median(at_proposal[rows], 1), low, high)
    log_odds = np.log(effective / at_proposal.shape[1])
    for _ in range(_STEPS):
        offset = (at - log_odds[rows])[:, None]
        (above, up), (below, down) = _log_mean_expit(at_proposal[rows] - offset), _log_mean_expit(offset - flat[rows])
        excess = above - below - log_odds[rows]
        low, high = np.where(excess > 0, at, low), np.where(excess > 0, high, at)
        step = excess / (up + down)
        found[rows] = at + step
        going = np.abs(step) > _TOLERANCE
        at = np.where((at + step > low) & (at + step < high), at + step, (low + high) / 2)[going]
        rows, low, high = rows[going], low[going], high[going]
        if not len(rows):
            return found
    found[rows] = np.nan
    return found


def _log_mean_expit(values: Array) -> tuple[Array, Array]:
    """The log of the mean of σ over the last dimension, also where σ underflows, and its slope."""
    logs = log_expit(values)
    top = logs.max(1, keepdims=True)
    shares = np.exp(logs - top)
    total = shares.sum(1)
    slope = (shares * expit(-values)).sum(1) / total
    return np.log(total / values.shape[1]) + top[:, 0], slope


# -- of a program ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """The log evidence of every datum, with what its errors are made of.

    Attributes:
        log_evidence: `(data,)`, nats; NaN where `reason` says why.
        influence: `(data, draw)`, as that of `Bridge`, of the guide's draws; zero where these have no part in it.
        variance: `(data,)`, the rest of the squared error.
        method: a datum, "exact", "bridge" (from the guide), "normal bridge" (from a Normal) or "".
        reason: a datum, why there is no log evidence, or "".
    """

    log_evidence: Array
    influence: Array
    variance: Array
    method: Words
    reason: Words


def evidence(
    program: Program, guide: Program, data: Data, reference: xr.DataTree, weights: Array, max_se: float, seed: int
) -> Evidence:
    """The log evidence of data: as the reference knows it, else by `bridge` to the reference draws.

    The bridge leads from the guide; where that is too far from the posterior, from a Normal fitted to the first half of
    the reference draws, to the second half.

    Args:
        program: the program, without shared latents.
        guide: its guide.
        data: some data of the reference.
        reference: a tree of `reference`.
        weights: log p − log q at independent draws of the guide, `(data, draw)`.
        max_se: the largest standard error with which a log evidence is given, nats.
        seed: of the Normal's draws.
    """
    gate = convergence_of(reference).sel(data=data.labels())
    passed = gate["is_reference"].values.astype(bool)
    reason = np.array(
        [f"no reference posterior: {why or 'it failed the gate'}" for why in gate["reason"].values], object
    )
    values, influence, variance = np.full(len(data), np.nan), np.zeros_like(weights), np.zeros(len(data))
    result = Evidence(values, influence, variance, np.full(len(data), "", object), np.where(passed, "", reason))
    rows = np.flatnonzero(passed)
    if "log_evidence" in gate:
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
    """Enter the log evidence of the data at `rows`, or why there is none; an earlier reason stays."""
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
    """Why the estimate of a datum can't be relied on; empty where it can."""
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
    """log p(x, z) − log q(z | x) at draws of the same data, `(data, chain, draw)`, in float64."""
    pair, found = (in_double(program), in_double(guide)), []
    with pyro.validation_enabled(False), defaults(program, data.batch([0])[0], torch.float64) as place:
        for rows, cols, values, size, shape in _repeated(data, posterior, place):
            log_q = density_of(guide_trace(pair[1], rows, size, cols, values), size, values).local
            held = {**rows, **values}
            log_p = density_of(trace(pair[0], size, cols, held), size, held, rows).local
            found.append((log_p - log_q).reshape(shape).cpu().numpy())
    return np.concatenate(found)


def _repeated(
    data: Data, posterior: xr.Dataset, place: tuple[torch.device, torch.dtype]
) -> Iterator[tuple[Values, Values, Values, int, tuple[int, int, int]]]:
    """Observations, covariates and latents as rows `(data · chain · draw, *event)`, some data at a time."""
    names, (chains, length) = latent_names(posterior), (posterior.sizes[name] for name in SAMPLE)
    for index in torch.arange(len(data), device="cpu").split(max(1, _ROWS // (chains * length))):
        given = data.batch(index, *place)
        rows, cols = ({n: v.repeat_interleave(chains * length, 0) for n, v in part.items()} for part in given)
        block = posterior.isel(data=index.numpy())
        arrays = {name: block[name].transpose("data", *SAMPLE, ...).values for name in names}
        values = {n: torch.as_tensor(v.reshape(-1, *v.shape[3:])) for n, v in arrays.items()}
        yield rows, cols, cast(values, *place), len(index) * chains * length, (len(index), chains, length)


@torch.no_grad()
def normal_log_ratios(
    program: Program, data: Data, posterior: xr.Dataset, draws: int, seed: int
) -> tuple[Array, Array] | None:
    """log p(x, z) − log q(z) of a dense Normal q for every datum, fitted to the first half of its draws.

    z is the vector of `target.Target`: supports are mapped to the line, Laplace priors to Normal ones, and discrete
    latents are summed out.

    Returns:
        At the second half of the draws `(data, chain, draw)`, and at `draws` draws of q `(data, draw)`; None where the
        latents have no such vector (circles, spheres), or too many entries for so many draws.
    """
    double = in_double(program)
    with pyro.validation_enabled(False), defaults(program, data.batch([0])[0], torch.float64) as place:
        observed, covariates = data.tensors(*place)
        found = sites(program, observed, covariates)
        if any(is_direction(site.prior) for site in found.values()):
            return None
        target = Target(double, found, observed, covariates, {})
        vectors = [
            target.unconstrain(values, size, cols).reshape(*shape, -1)
            for _, cols, values, size, shape in _repeated(data, posterior, place)
        ]
        first, second = torch.cat(vectors).tensor_split([posterior.sizes["draw"] // 2], 2)
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
    """Of mean and covariance of draws `(data, draw, width)`; NaN where it is degenerate."""
    centre = draws.mean(1)
    centred = draws - centre[:, None]
    factor, failed = torch.linalg.cholesky_ex(centred.mT @ centred / (draws.shape[1] - 1))
    factor = torch.where((failed != 0)[:, None, None], torch.nan, factor)
    return dist.MultivariateNormal(centre, scale_tril=factor, validate_args=False)


def _log_ratio(target: Target, normal: dist.MultivariateNormal, row: int, vectors: Tensor) -> Tensor:
    """Of one datum, at vectors `(chain, draw, width)`."""
    flat = vectors.flatten(0, 1)
    covariates, observed = target.rows(torch.full((len(flat),), row))
    log_p = target.log_density(flat, flat.new_zeros(len(flat), 0), covariates, observed)
    one = dist.MultivariateNormal(normal.loc[row], scale_tril=normal.scale_tril[row], validate_args=False)
    return (log_p - one.log_prob(flat)).reshape(vectors.shape[:2])
