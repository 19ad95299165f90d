"""Compare two posteriors of the same data, datum by datum and latent by latent.

Every standard error is the delta method in influence-function form: a statistic of two samples changes to first order
by the mean of one number per draw (its influence), so its Monte Carlo variance is the variance of that number divided
by the effective number of draws, summed over both sides. This holds for any posterior shape (skewness and kurtosis
enter by themselves) and for the joint error of numerator and reference sd. Independent draws count fully; for MCMC the
effective sample size of the influence series itself is taken (arviz_stats).
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.inference.diagnostics import ess
from calibrant.inference.gate import (
    Latent,
    convergence_of,
    data_labels,
    draw_blocks,
    latent_names,
    scalars,
    shared_draws,
)

Array = npt.NDArray[np.float64]

LEFT_OUT_LIMIT = 0.05
MIN_DRAWS = 80  # two in each block

_BLOCKS = 40  # contiguous parts of the draws; a chain that passes the gate has 10 or more effective draws in each
_GRID = 40
_TINY = 1e-12  # a guide with a constant latent has this sd (in reference sd), so that its log stays finite


def compare(post: xr.DataTree, ref: xr.DataTree, level: float = 0.9) -> xr.Dataset:
    """Compare amortized draws with reference draws of the same posteriors.

    The trees are joined on the coordinate `data`. Data whose reference fails the convergence gate are left out of all
    statistics and listed under `left_out`. Results are in units of the reference's posterior sd; each `…_se` is the
    Monte Carlo standard error from both sides.

    Args:
        post: tree to be judged, usually of `posterior`; group `posterior`, variables `(chain, draw, data, …)`.
        ref: tree to judge by, usually of `reference`; without group `convergence` the gate is computed from its draws.
        level: mass of the central interval whose coverage is measured.

    Returns:
        Dimensions `data` (the data kept) and `latent` (`scale`, `z[3]`, `z[1,2]`; coordinates `site`, `index`):
        `mean_error` (amortized − reference mean), `sd_ratio` (amortized / reference), `wasserstein` (1-Wasserstein
        distance), `coverage` (mass of the reference in the amortized central interval), each with `…_se`. What equal
        posteriors would give at these sample sizes is `wasserstein_null` ± `wasserstein_null_se` (noise alone makes the
        distance positive) and a coverage of `level` ± `coverage_null_se`.
        Per datum with two or more latents: `correlation_error`, the root-mean-square difference of the entries of the
        correlation matrices of all latents, with `correlation_error_se`. Both come from the unbiased mean square
        `correlation_mean_square` (± `…_se`), which is what may be averaged over data: it is negative by chance where
        the matrices agree, then with standard error `correlation_null_se`. `correlation_noise` is the mean sampling
        variance of an entry, which has been subtracted.
        Shared latents (no dimension `data`): `shared_mean_error` … along `shared_latent`.
        Along `left_out`: `reason`. Along `observed_site`: `observed_rms_kept`, `observed_rms_left_out`, the mean over
        data of the root-mean-square of each observed site.
        Attributes: `n_joined`, `n_left_out`, `share_left_out`, `cannot_tell` (1 beyond 5% left out), `coverage_level`,
        `discrete` (latents whose draws are whole numbers on both sides: they are not compared, since an sd means
        nothing where one value is nearly certain), `amortized_method`, `reference_method`,
        `amortized_draws`, `reference_draws` (per datum), `model_sha256`.

    Raises:
        InferenceError: labels that are not unique or do not meet, different observations, covariates, weights, latents
            or event shapes, draws that are too few or (amortized) not finite.
    """
    if not 0.0 < level < 1.0:
        raise InferenceError(f"`level` is {level}: give the mass of the central interval, between 0 and 1")
    amortized, reference = _Side.read(post, "amortized"), _Side.read(ref, "reference")
    joined = _join(amortized, reference)
    _check_same_problem(amortized, reference, joined)
    common = _common_latents(amortized, reference)
    names = [name for name in common if not all(_is_discrete(side.posterior[name]) for side in (amortized, reference))]
    if not names:
        raise InferenceError(
            f"the latents {common} are all discrete, and their means in posterior sds say nothing: compare the "
            'probabilities of their values, (tree["posterior"]["NAME"] == value).mean(("chain", "draw"))'
        )
    local = [name for name in names if "data" in reference.posterior[name].dims]
    shared = [name for name in names if name not in local]

    reasons = _gate_reasons(ref, joined)
    candidates = joined[[not reason for reason in reasons]]
    rows, defects = _local_statistics(amortized, reference, local, candidates, level)
    reasons = [defects.get(label, reason) for label, reason in zip(joined.tolist(), reasons, strict=True)]
    kept = np.array([not reason for reason in reasons], dtype=bool)

    latents = scalars(reference.posterior, local)
    result = _assemble(rows, latents, joined[kept])
    if shared:
        statistics = _shared_statistics(amortized, reference, shared, level) if kept.any() else {}
        result = result.merge(_assemble_shared(statistics, scalars(reference.posterior, shared)))
    result = result.assign_coords(left_out=joined[~kept])
    result = result.assign(reason=("left_out", np.array([reason for reason in reasons if reason], dtype=str)))
    result = result.merge(_observed_difference(amortized, reference, joined, kept))
    left = [name for name in common if name not in names]
    return result.assign_attrs(_attributes(amortized, reference, kept, level), discrete=", ".join(left))


def check_same_problem(post: xr.DataTree, ref: xr.DataTree) -> None:
    """Refuse trees of other weights, observations, covariates or latents than each other's.

    Raises:
        InferenceError: as `compare`.
    """
    amortized, reference = _Side.read(post, "amortized"), _Side.read(ref, "reference")
    _check_same_problem(amortized, reference, _join(amortized, reference))
    _common_latents(amortized, reference)


@dataclass(frozen=True)
class _Side:
    """One of the two trees, as far as a comparison needs it."""

    name: str
    tree: xr.DataTree
    posterior: xr.Dataset
    labels: np.ndarray

    @classmethod
    def read(cls, tree: xr.DataTree, name: str) -> "_Side":
        if "posterior" not in tree.children:
            raise InferenceError(f"the {name} tree has no group `posterior`, only {sorted(tree.children)}")
        posterior = tree["posterior"].to_dataset()
        if not {"chain", "draw"} <= set(posterior.dims):
            raise InferenceError(
                f"the group `posterior` of the {name} tree has dimensions {sorted(map(str, posterior.dims))}; "
                "it needs `chain` and `draw`"
            )
        labels = data_labels(tree)
        values, counts = np.unique(labels, return_counts=True)
        if (counts > 1).any():
            twice = values[counts > 1].tolist()[0]
            raise InferenceError(f"the {name} tree has datum {twice!r} more than once: give every datum its own label")
        side = cls(name, tree, posterior, labels)
        if side.draws < MIN_DRAWS:
            raise InferenceError(f"the {name} tree has {side.draws} draws per datum; at least {MIN_DRAWS} are needed")
        return side

    @property
    def draws(self) -> int:
        return self.posterior.sizes["chain"] * self.posterior.sizes["draw"]

    @property
    def independent(self) -> bool:
        """Draws of a tree that does not say otherwise may be correlated."""
        return bool(self.posterior.attrs.get("independent_draws", 0))

    @property
    def method(self) -> str:
        return str(self.posterior.attrs.get("method", "unknown"))

    @property
    def model_sha256(self) -> str:
        return str(self.posterior.attrs.get("model_sha256", self.tree.attrs.get("model_sha256", "")))

    def group(self, name: str) -> xr.Dataset:
        return self.tree[name].to_dataset() if name in self.tree.children else xr.Dataset()

    def rows(self, labels: np.ndarray) -> list[int]:
        """Positions of these labels along `data`."""
        position = {label: i for i, label in enumerate(self.labels.tolist())}
        return [position[label] for label in labels.tolist()]


def _join(amortized: _Side, reference: _Side) -> np.ndarray:
    theirs = set(reference.labels.tolist())
    joined = amortized.labels[[label in theirs for label in amortized.labels.tolist()]]
    if len(joined) == 0:
        raise InferenceError(
            f"the trees have no datum in common: `data` is {amortized.labels[:3].tolist()}… in the amortized tree and "
            f"{reference.labels[:3].tolist()}… in the reference; compute both for the same data (or give `index=`)"
        )
    return joined


def _check_same_problem(amortized: _Side, reference: _Side, joined: np.ndarray) -> None:
    """Refuse trees of other weights, observations or covariates than each other's, where both say."""
    a, r = amortized.model_sha256, reference.model_sha256
    if a and r and a != r:
        raise InferenceError(
            f"the trees are of different models: `model_sha256` is {a[:12]}… in the amortized tree and {r[:12]}… "
            "in the reference; compute both with the same weights"
        )
    for name in ("observed_data", "constant_data"):
        ours, theirs = amortized.group(name), reference.group(name)
        for site in set(ours.data_vars) & set(theirs.data_vars):
            _check_same_values(
                name,
                str(site),
                _select(ours[site], amortized, joined),
                _select(theirs[site], reference, joined),
                joined,
            )


def _select(values: xr.DataArray, side: _Side, labels: np.ndarray) -> np.ndarray:
    """Values of these data, data first; all of them if the variable has no dimension `data`."""
    return values.isel(data=side.rows(labels)).transpose("data", ...).values if "data" in values.dims else values.values


def _check_same_values(group: str, site: str, ours: np.ndarray, theirs: np.ndarray, joined: np.ndarray) -> None:
    where = f"variable `{site}` of the group `{group}`"
    if ours.shape != theirs.shape:
        raise InferenceError(
            f"the trees differ in {where}: shape {ours.shape} (amortized) and {theirs.shape} (reference)"
        )
    same = _equal(ours, theirs)
    bad = np.logical_not(same).reshape(same.shape[0], -1).any(1)
    if bad.any():
        example = f" (first: datum {joined.tolist()[int(bad.argmax())]!r})" if len(bad) == len(joined) else ""
        raise InferenceError(
            f"the trees differ in {where} for {int(bad.sum())} of {len(bad)} joined data{example}; "
            "compute both from the same observations"
        )


def _equal(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Which entries agree, numbers up to the rounding of a tree stored in float32; at least one dimension."""
    if not np.issubdtype(ours.dtype, np.number):
        return np.atleast_1d(ours == theirs)
    smallest = 1e-6 * float(np.nanmax(np.abs(theirs), initial=0.0))
    return np.atleast_1d(np.isclose(ours, theirs, rtol=1e-5, atol=smallest, equal_nan=True))


def _common_latents(amortized: _Side, reference: _Side) -> list[str]:
    """The latents to compare: those that the trees name, else the variables that both have."""
    named = {s.name: latent_names(s.posterior) for s in (amortized, reference) if "latents" in s.posterior.attrs}
    if len(named) == 2 and set(named["amortized"]) != set(named["reference"]):
        raise InferenceError(
            f"the trees name different latents: {sorted(named['amortized'])} (amortized) and "
            f"{sorted(named['reference'])} (reference)"
        )
    both = [name for name in latent_names(reference.posterior) if name in set(latent_names(amortized.posterior))]
    names = next(iter(named.values()), both)
    if not names:
        raise InferenceError("the groups `posterior` of the trees have no variable in common: nothing to compare")
    for name in names:
        for side in (amortized, reference):
            if name not in side.posterior:
                found = sorted(map(str, side.posterior.data_vars))
                raise InferenceError(f"latent `{name}` is missing from the {side.name} tree, which has {found}")
        _check_same_event(name, amortized, reference)
    return names


def _is_discrete(draws: xr.DataArray) -> bool:
    values = draws.values
    return all(bool((some == np.rint(some)).all()) for some in (values[:, :10], values))


def _check_same_event(name: str, amortized: _Side, reference: _Side) -> None:
    def shape(side: _Side) -> tuple[str, tuple[int, ...]]:
        sizes = side.posterior[name].sizes
        event = tuple(n for dim, n in sizes.items() if dim not in ("chain", "draw", "data"))
        return ("local" if "data" in sizes else "shared"), event

    ours, theirs = shape(amortized), shape(reference)
    if ours != theirs:
        raise InferenceError(
            f"latent `{name}` is {ours[0]} with event shape {ours[1]} in the amortized tree and {theirs[0]} with event "
            f"shape {theirs[1]} in the reference"
        )


def _gate_reasons(ref: xr.DataTree, joined: np.ndarray) -> list[str]:
    """Why each joined datum has no reference posterior, empty where it has one."""
    gate = convergence_of(ref)
    labels = gate["data"].values.tolist()
    passed = dict(zip(labels, gate["is_reference"].values.tolist(), strict=True))
    reason = dict(zip(labels, gate["reason"].values.tolist(), strict=True))
    return [
        "" if passed.get(label, False) else (reason.get(label, "no entry in `convergence`") or "failed the gate")
        for label in joined.tolist()
    ]


def _local_statistics(
    amortized: _Side, reference: _Side, names: list[str], labels: np.ndarray, level: float
) -> tuple[list[dict[str, Array]], dict[Hashable, str]]:
    """Statistics of every datum, and why data without usable reference draws have none."""
    if not names:
        return [_EMPTY for _ in labels], {}
    latents = scalars(reference.posterior, names)
    ours, theirs = _per_datum(amortized, names, labels), _per_datum(reference, names, labels)
    rows: list[dict[str, Array]] = []
    defects: dict[Hashable, str] = {}
    for label, a, r in zip(labels.tolist(), ours, theirs, strict=True):
        _check_finite(a, latents, f"datum {label!r}")
        if defect := _defect(r, latents):
            defects[label] = defect
        else:
            rows.append(_marginals(a, r, level) | _correlation_error(a, r))
    return rows, defects


def _shared_statistics(amortized: _Side, reference: _Side, names: list[str], level: float) -> dict[str, Array]:
    latents = scalars(reference.posterior, names)
    a = _Draws(shared_draws(amortized.posterior, names), amortized.independent)
    r = _Draws(shared_draws(reference.posterior, names), reference.independent)
    _check_finite(a, latents, "the shared latents")
    if defect := _defect(r, latents):
        raise InferenceError(f"the reference of the shared latents cannot be used: {defect}")
    return _marginals(a, r, level)


def _per_datum(side: _Side, names: list[str], labels: np.ndarray) -> Iterator["_Draws"]:
    for block in draw_blocks(side.posterior, names, side.rows(labels)):
        for values in block:
            yield _Draws(values, side.independent)


@dataclass(frozen=True)
class _Draws:
    """Draws of one posterior from one tree, `(chain, draw, latent)`."""

    values: Array
    independent: bool

    @property
    def flat(self) -> Array:
        """`(chain · draw, latent)`, chain by chain."""
        return self.values.reshape(-1, self.values.shape[-1])

    def size(self, series: Array) -> Array:
        """Effective number of draws for the mean of each column of a series `(chain · draw, latent)`."""
        if self.independent:
            return np.full(series.shape[1], float(len(series)))
        return ess(series.reshape(self.values.shape))

    def variance(self, influence: Array) -> Array:
        """Monte Carlo variance of the mean of each column of an influence series `(chain · draw, latent)`."""
        return influence.var(0, ddof=1) / self.size(influence)


def _check_finite(draws: _Draws, latents: list[Latent], what: str) -> None:
    """A guide that gives NaN is at fault itself; leaving the datum out would hide that."""
    finite = np.isfinite(draws.flat).all(0)
    if not finite.all():
        raise InferenceError(f"amortized draws of `{latents[int(finite.argmin())].label}` are not finite for {what}")


def _defect(reference: _Draws, latents: list[Latent]) -> str:
    """Why statistics in units of the reference sd do not exist, empty if they do."""
    finite = np.isfinite(reference.flat).all(0)
    if not finite.all():
        return f"draws that are not finite in `{latents[int(finite.argmin())].label}`"
    constant = reference.flat.max(0) == reference.flat.min(0)
    return f"constant draws of `{latents[int(constant.argmax())].label}`" if constant.any() else ""


def _marginals(a: _Draws, r: _Draws, level: float) -> dict[str, Array]:
    """Statistics of each latent's marginal, arrays `(latent,)`."""
    centre, scale = r.flat.mean(0), r.flat.std(0, ddof=1)
    a = _Draws((a.values - centre) / scale, a.independent)
    r = _Draws((r.values - centre) / scale, r.independent)
    found = _moments(a, r) | _coverage(a, r, level) | _wasserstein(a, r)
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}


def _moments(a: _Draws, r: _Draws) -> dict[str, Array]:
    """Errors of mean and sd; both sides in units where the reference has mean 0 and sd 1."""
    mean = a.flat.mean(0)
    sd = np.maximum(a.flat.std(0, ddof=1), _TINY)
    log_sd_a = ((a.flat - mean) ** 2 / sd**2 - 1.0) / 2.0  # influence of a draw on the log of its side's sd
    log_sd_r = (r.flat**2 - 1.0) / 2.0
    log_variance = a.variance(log_sd_a) + r.variance(log_sd_r)
    return {
        "mean_error": mean,
        "mean_error_se": np.sqrt(a.variance(a.flat) + r.variance(r.flat + mean * log_sd_r)),
        "sd_ratio": sd,
        "sd_ratio_se": sd * np.sqrt(log_variance),
    }


def _coverage(a: _Draws, r: _Draws, level: float) -> dict[str, Array]:
    """Mass of the reference between two quantiles of the guide.

    Weibull's plotting positions make its expectation exactly `level` when both sides are equal. The guide's part of the
    error is that of its quantiles times the ratio of the densities there, read off the reference mass in a narrow
    bracket of guide quantiles.
    """
    tail = (1.0 - level) / 2.0
    width = tail / 2.0
    probabilities = [tail - width, tail, tail + width, 1.0 - tail - width, 1.0 - tail, 1.0 - tail + width]
    cuts = np.quantile(a.flat, probabilities, axis=0, method="weibull")
    inside = ((r.flat >= cuts[1]) & (r.flat <= cuts[4])).astype(np.float64)
    below = np.stack([(r.flat <= cut).mean(0) for cut in cuts])
    ratio_low, ratio_high = (below[2] - below[0]) / (2.0 * width), (below[5] - below[3]) / (2.0 * width)
    influence = ratio_high * (1.0 - tail - (a.flat <= cuts[4])) - ratio_low * (tail - (a.flat <= cuts[1]))
    coverage = inside.mean(0)
    size = r.size(inside)
    rounded = (coverage * size + 1.0) / (size + 2.0)  # a coverage of 0 or 1 is not known without error
    own = np.quantile(r.flat, [tail, 1.0 - tail], axis=0)
    null_size = r.size(((r.flat >= own[0]) & (r.flat <= own[1])).astype(np.float64))
    return {
        "coverage": coverage,
        "coverage_se": np.sqrt(a.variance(influence) + rounded * (1.0 - rounded) / size),
        "coverage_null_se": np.sqrt(level * (1.0 - level) * (1.0 / a.size(a.flat) + 1.0 / null_size)),
    }


def _wasserstein(a: _Draws, r: _Draws) -> dict[str, Array]:
    """1-Wasserstein distance in reference sd and its expectation for equal posteriors.

    W = ∫ |F_a − F_r| dx. Far from equality its error is linear in the draws: ± the integral of the sign of F_a − F_r up
    to a draw. Near equality |·| folds the noise, whose variance is smaller; the two meet as they do for the absolute
    value of one normal variable, whose variance is close to 1 − (1 − v₀) (m₀ / m)² (m its mean, v₀ and m₀ at zero).
    """
    distance, potential_a, potential_r = _transport(a.flat, r.flat)
    linear = a.variance(potential_a) + r.variance(potential_r - distance * (r.flat**2 - 1.0) / 2.0)
    null, null_variance = _null_wasserstein(a, r)
    folded = np.minimum(1.0, null / np.maximum(distance, _TINY)) ** 2
    return {
        "wasserstein": distance,
        "wasserstein_se": np.sqrt(folded * null_variance + (1.0 - folded) * linear),
        "wasserstein_null": null,
        "wasserstein_null_se": np.sqrt(null_variance),
    }


def _transport(a: Array, r: Array) -> tuple[Array, Array, Array]:
    """∫ |F_a − F_r| dx per column, and for every draw of both sides the integral of the sign of F_a − F_r up to it."""
    pooled = np.concatenate((a, r))
    order = pooled.argsort(axis=0)
    width = np.diff(np.take_along_axis(pooled, order, axis=0), axis=0)
    gap = np.cumsum(np.where(order < len(a), 1.0 / len(a), -1.0 / len(r)), axis=0)[:-1]
    rising = np.zeros_like(pooled)
    np.cumsum(np.sign(gap) * width, axis=0, out=rising[1:])
    potential = np.empty_like(pooled)
    np.put_along_axis(potential, order, rising, axis=0)
    return (np.abs(gap) * width).sum(0), potential[: len(a)], potential[len(a) :]


def _null_wasserstein(a: _Draws, r: _Draws) -> tuple[Array, Array]:
    """Mean and variance of W for two samples of the reference posterior, as many and as correlated as these.

    F_a − F_r is then a normal process: E|·| = √(2/π) sd at every point, and the covariance of two absolute values is
    that of a bivariate normal. The grid is dense in the tails.
    """
    edges = np.sin(np.linspace(0.0, np.pi / 2.0, _GRID + 1)) ** 2
    p = np.sin(np.pi / 2.0 * (np.arange(_GRID) + 0.5) / _GRID) ** 2
    quantiles = np.quantile(r.flat, np.concatenate((edges, p)), axis=0)
    width = np.diff(quantiles[: _GRID + 1], axis=0).T
    covariance = _cdf_covariance(a, p, np.quantile(a.flat, p, axis=0)) + _cdf_covariance(r, p, quantiles[_GRID + 1 :])
    sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    rho = np.clip(covariance / np.maximum(sd[:, :, None] * sd[:, None, :], _TINY), -1.0, 1.0)
    folded = 2.0 / np.pi * (np.sqrt(1.0 - rho**2) + rho * np.arcsin(rho) - 1.0)
    noise = width * sd
    return np.sqrt(2.0 / np.pi) * noise.sum(1), np.einsum("lk,lkj,lj->l", noise, folded, noise)


def _cdf_covariance(draws: _Draws, p: Array, cuts: Array) -> Array:
    """Covariance `(latent, cut, cut)` of the empirical distribution function at its quantiles `cuts` `(cut, latent)`.

    A Brownian bridge for independent draws, the scatter of the blocks for MCMC.
    """
    if draws.independent:
        bridge = np.minimum.outer(p, p) - np.outer(p, p)
        return np.broadcast_to(bridge / len(draws.flat), (cuts.shape[1], len(p), len(p)))
    below = np.stack([_blocks(draws.flat <= cut).mean(1) for cut in cuts])
    scatter = (below - below.mean(1, keepdims=True)).transpose(2, 0, 1)
    return scatter @ scatter.transpose(0, 2, 1) / (_BLOCKS * (_BLOCKS - 1))


def _blocks(x: np.ndarray) -> np.ndarray:
    """Cut `(draw, latent)` into contiguous blocks `(block, draw, latent)`; the rest of the division is dropped."""
    size = len(x) // _BLOCKS
    return x[: size * _BLOCKS].reshape(_BLOCKS, size, -1)


def _correlation_error(a: _Draws, r: _Draws) -> dict[str, Array]:
    """Root-mean-square difference of the correlation matrices' entries, without the part that sampling noise adds.

    The scatter of blocks gives the covariance V of the mean difference d, also for MCMC. Then |d|² − tr V is unbiased
    for the squared difference |δ|², with variance 2 tr V² + 4 δᵀVδ (normal d). The traces are taken from the Gram
    matrix of the blocks: V itself, one row per pair of latents, is never formed.
    """
    if a.values.shape[-1] < 2:
        rows = {name: np.full(a.values.shape[-1], np.nan) for name in _CORRELATION_ROWS}
        return {name: np.array(np.nan) for name in _PER_DATUM} | rows
    blocks = _correlation_blocks(a.flat) - _correlation_blocks(r.flat)
    mean, n = blocks.mean(0), _BLOCKS - 1
    scatter = (blocks - mean) @ (blocks - mean).T / (n * _BLOCKS * len(mean))
    noise = np.trace(scatter)  # tr V, here and below per pair of latents
    # Unbiased tr V² of a normal sample with n degrees of freedom.
    trace_square = n**2 / ((n - 1) * (n + 2)) * ((scatter**2).sum() - noise**2 / n)
    square = mean @ mean / len(mean) - noise
    along = (blocks @ mean).var(ddof=1) / (_BLOCKS * len(mean) ** 2) - trace_square  # δᵀVδ
    square_se = np.sqrt(2.0 * trace_square + 4.0 * max(along, 0.0))
    error = np.sqrt(max(square, 0.0))
    return {
        "correlation_error": error,
        "correlation_error_se": np.sqrt(error**2 + square_se) - error,
        "correlation_mean_square": square,
        "correlation_mean_square_se": square_se,
        "correlation_null_se": np.sqrt(2.0 * trace_square),
        "correlation_noise": noise,
    } | _correlation_rows(mean, ((blocks - mean) ** 2).sum(0) / (n * _BLOCKS), a.values.shape[-1])


def _correlation_rows(mean: Array, variance: Array, latents: int) -> dict[str, Array]:
    """The same mean square for each latent's row of the matrix alone, and its noise: one wrong pair stays visible."""
    upper = np.triu_indices(latents, 1)

    def row(pairs: Array) -> Array:
        total = sum(np.bincount(side, weights=pairs, minlength=latents) for side in upper)
        return np.asarray(total) / (latents - 1)

    return {"correlation_row_mean_square": row(mean**2 - variance), "correlation_row_noise": row(variance)}


def _correlation_blocks(x: Array) -> Array:
    """Correlation of every pair of latents from each block, `(block, pair)`, linearised so that blocks are unbiased."""
    u = _blocks(x)
    u = (u - u.mean((0, 1))) / np.maximum(u.std((0, 1)), _TINY)
    products = u.transpose(0, 2, 1) @ u / u.shape[1]
    squares = np.diagonal(products, axis1=1, axis2=2)
    rho = products.mean(0)
    upper = np.triu_indices(x.shape[1], 1)
    half_sum = (squares[:, upper[0]] + squares[:, upper[1]]) / 2.0
    return products[:, upper[0], upper[1]] - rho[upper] * (half_sum - 1.0)


_CORRELATION_ROWS = ("correlation_row_mean_square", "correlation_row_noise")
_PER_LATENT = (
    *(f"{name}{suffix}" for name in ("mean_error", "sd_ratio", "wasserstein", "coverage") for suffix in ("", "_se")),
    "wasserstein_null",
    "wasserstein_null_se",
    "coverage_null_se",
    *_CORRELATION_ROWS,
)
_PER_DATUM = (
    "correlation_error",
    "correlation_error_se",
    "correlation_mean_square",
    "correlation_mean_square_se",
    "correlation_null_se",
    "correlation_noise",
)
_EMPTY: dict[str, Array] = {name: np.empty(0) for name in _PER_LATENT} | {name: np.array(np.nan) for name in _PER_DATUM}


def _assemble(rows: list[dict[str, Array]], latents: list[Latent], labels: np.ndarray) -> xr.Dataset:
    def stacked(name: str, *shape: int) -> Array:
        return np.array([row[name] for row in rows], dtype=np.float64).reshape(len(rows), *shape)

    variables: dict[str, tuple[tuple[str, ...], Array]] = {
        name: (("data", "latent"), stacked(name, len(latents))) for name in _PER_LATENT
    }
    variables |= {name: (("data",), stacked(name)) for name in _PER_DATUM}
    return xr.Dataset(variables, coords={"data": labels, **_latent_coords(latents, "")})


def _assemble_shared(statistics: dict[str, Array], latents: list[Latent]) -> xr.Dataset:
    missing = np.full(len(latents), np.nan)
    variables = {f"shared_{name}": ("shared_latent", statistics.get(name, missing)) for name in _PER_LATENT}
    return xr.Dataset(variables, coords=_latent_coords(latents, "shared_"))


def _latent_coords(latents: list[Latent], prefix: str) -> dict[str, tuple[str, np.ndarray]]:
    dim = f"{prefix}latent"
    return {
        dim: (dim, np.array([x.label for x in latents], dtype=str)),
        f"{prefix}site": (dim, np.array([x.site for x in latents], dtype=str)),
        f"{prefix}index": (dim, np.array([x.position for x in latents], dtype=str)),
    }


def _observed_difference(
    amortized: _Side, reference: _Side, joined: np.ndarray, kept: npt.NDArray[np.bool_]
) -> xr.Dataset:
    """How large the observations of kept and of left-out data are, so that a biased selection shows."""
    side = reference if "observed_data" in reference.tree.children else amortized
    observed = side.group("observed_data")
    sites = [str(s) for s, v in observed.data_vars.items() if "data" in v.dims and np.issubdtype(v.dtype, np.number)]
    means: dict[str, list[float]] = {"observed_rms_kept": [], "observed_rms_left_out": []}
    for site in sites:
        values = _select(observed[site], side, joined).astype(np.float64)
        rms = np.sqrt(np.nanmean(values.reshape(len(joined), -1) ** 2, axis=1))
        for name, part in (("observed_rms_kept", rms[kept]), ("observed_rms_left_out", rms[~kept])):
            means[name].append(float(part.mean()) if len(part) else np.nan)
    coords = {"observed_site": np.array(sites, dtype=str)}
    return xr.Dataset({name: ("observed_site", np.array(v)) for name, v in means.items()}, coords=coords)


def _attributes(
    amortized: _Side, reference: _Side, kept: npt.NDArray[np.bool_], level: float
) -> dict[str, str | int | float]:
    n_left_out = int((~kept).sum())
    share = n_left_out / len(kept)
    return {
        "n_joined": len(kept),
        "n_left_out": n_left_out,
        "share_left_out": share,
        "cannot_tell": int(share > LEFT_OUT_LIMIT),
        "coverage_level": level,
        "amortized_method": amortized.method,
        "reference_method": reference.method,
        "amortized_draws": amortized.draws,
        "reference_draws": reference.draws,
        "model_sha256": amortized.model_sha256 or reference.model_sha256,
    }
