"""Compare two posteriors of the same data, datum by datum and latent by latent.

Every standard error is the delta method in influence-function form: a statistic of two samples changes to first order
by the mean of one number per draw (its influence), so its Monte Carlo variance is the variance of that number divided
by the effective number of draws, summed over both sides. This holds for any posterior shape (skewness and kurtosis are
accounted for) and for the joint error of numerator and reference sd. Independent draws count fully; for MCMC the
effective sample size of the influence series itself is used (arviz_stats).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.correlations import correlation_blocks, squared_errors
from calibrant.evaluation.statistics.directions import covariance, halves_of_draws, own
from calibrant.evaluation.statistics.draws import Draws
from calibrant.evaluation.statistics.heavy_tails import positive_in, tails_of
from calibrant.evaluation.statistics.joining import (
    Side,
    common_latents,
    is_discrete,
    joined_labels,
    require_same_problem,
    select_rows,
)
from calibrant.evaluation.statistics.local_statistics import (
    MARGINAL,
    Sides,
    check_finite,
    defect,
    latent_coords,
    local_statistics,
    quantiles_of_heavy,
    units,
)
from calibrant.evaluation.statistics.marginals import marginal_statistics, moments
from calibrant.evaluation.statistics.shapes import FEW_BLOCKS, Shapes
from calibrant.inference.references.gate import convergence_of, knows_evidence
from calibrant.inference.trees import Latent
from calibrant.progress import Progress, reporting

Array = npt.NDArray[np.float64]
LEFT_OUT_LIMIT = 0.05


def compare(
    post: xr.DataTree,
    ref: xr.DataTree,
    level: float = 0.9,
    informed: xr.Dataset | None = None,
    *,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Compare amortized draws with reference draws of the same posteriors.

    The trees are joined on the coordinate `data`. Data whose reference fails the convergence gate are excluded from all
    statistics and listed under `left_out`. Results are in units of the reference's posterior sd; each `…_se` is the
    Monte Carlo standard error from both sides.

    Args:
        post: tree to be judged, usually of `posterior`; group `posterior`, variables `(chain, draw, data, …)`.
        ref: tree to judge by, usually of `reference`; without group `convergence` the gate is computed from its draws.
        level: mass of the central interval whose coverage is measured.
        informed: result of `informed_directions` for the reference; without it, the direction about which the
            likelihood of a datum says most is not compared.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimensions `data` (the data kept) and `latent` (`scale`, `z[3]`, `z[1,2]`; coordinates `site`, `index`):
        `mean_error` (amortized − reference mean), `sd_ratio` (amortized / reference), `wasserstein` (1-Wasserstein
        distance), `coverage` (mass of the reference in the amortized central interval), each with `…_se`. Equal
        posteriors would give, at these sample sizes, `wasserstein_null` ± `wasserstein_null_se` (noise alone makes the
        distance positive) and a coverage of `level` ± `coverage_null_se`.
        `reference_log_sd`, the log of the reference's posterior sd, is the unit of these.
        Per datum with two or more latents: `correlation_error`, the root-mean-square difference of the entries of the
        correlation matrices of all latents, with `correlation_error_se`. Both come from the unbiased mean square
        `correlation_mean_square` (± `…_se`), which is what may be averaged over data: it is negative by chance where
        the matrices agree, then with standard error `correlation_null_se`. `correlation_noise` is the mean sampling
        variance of an entry, which has been subtracted.
        Per latent: `tail_index` (above 1/2, quantiles decide in place of mean and sd) and `log_scale` (whether they do
        so on the log scale); for these latents per datum `median_error` (in IQR / 1.349 of the reference) and
        `width_50_ratio`, `width_80_ratio` (widths of the middle 50% and 80%, amortized / reference), each with `…_se`.
        Along `probability` and `latent`: `shape_difference` ± `…_se`, the reference's distribution function at the
        guide's quantile minus its probability, averaged over data.
        Along `half`: `half_mean_error`, `half_sd_ratio`, from either half of the draws, with `…_se`.
        Along `data` and `direction`: `direction_mean_error`, `direction_sd_ratio` with `…_se`, along sums of latents:
        the widest and narrowest directions and that of the largest mean error, chosen on the other half of the data
        (`half_of_data`; `direction_weight` holds them), the informed one, and the datum's own. `pair`: the pair of
        latents that each half judges, with `pair_error` and `pair_noise` per datum.
        `evidence_gap` ± `…_se`, log p(x) − ELBO per datum (nats), where the reference knows log p(x).
        Along `together`, for programs with shared latents: errors of statistics over data that share draws.
        Shared latents (no dimension `data`): `shared_mean_error` … along `shared_latent`.
        Along `left_out`: `reason`. Along `observed_site`: `observed_rms_kept`, `observed_rms_left_out`, the mean over
        data of the root-mean-square of each observed site.
        Attributes: `n_joined`, `n_left_out`, `share_left_out`, `cannot_tell` (1 if more than 5% are left out),
        `coverage_level`, `discrete` (latents whose draws are whole numbers on both sides: they are not compared, since
        an sd has no meaning if one value is nearly certain; compare the probabilities of their values,
        `(tree["posterior"]["NAME"] == value).mean(("chain", "draw"))`), `amortized_method`, `reference_method`,
        `amortized_draws`, `reference_draws` (per datum), `model_sha256`.

    Raises:
        InferenceError: for labels that are not unique or have none in common; for trees of different observations,
            covariates, weights, latents or event shapes; for draws that are too few or (amortized) not finite.
    """
    progress = reporting(progress)
    if not 0.0 < level < 1.0:
        raise InferenceError(f"`level` is {level}: give the mass of the central interval, between 0 and 1")
    amortized, reference = Side.read(post, "amortized"), Side.read(ref, "reference")
    joined = joined_labels(amortized, reference)
    require_same_problem(amortized, reference, joined)
    common = common_latents(amortized, reference)
    names = [name for name in common if not all(is_discrete(side.posterior[name]) for side in (amortized, reference))]
    local = [name for name in names if "data" in reference.posterior[name].dims]
    shared = [name for name in names if name not in local]

    reasons = _gate_reasons(ref, joined)
    candidates = joined[[not reason for reason in reasons]]
    sides = Sides(amortized, reference, local, shared)
    result, defects = local_statistics(sides, candidates, level, informed, progress)
    reasons = [defects.get(label, reason) for label, reason in zip(joined.tolist(), reasons, strict=True)]
    kept = np.array([not reason for reason in reasons], dtype=bool)

    if shared:
        statistics = _shared_statistics(sides, level) if kept.any() else {}
        result = result.merge(_assemble_shared(statistics, sides.shared_latents))
    result = result.assign_coords(left_out=joined[~kept])
    result = result.assign(reason=("left_out", np.array([reason for reason in reasons if reason], dtype=str)))
    result = result.merge(_observed_difference(amortized, reference, joined, kept))
    left = [name for name in common if name not in names]
    if gap := _evidence_gap(amortized, reference, joined[kept]):
        result = result.assign({name: ("data", values) for name, values in gap.items()})
    attrs = _attributes(amortized, reference, kept, level) | _dimensions(informed, result.sizes["latent"])
    attrs |= _missed_modes(reference)
    return result.assign_attrs(attrs, discrete=", ".join(left))


def _gate_reasons(ref: xr.DataTree, joined: np.ndarray) -> list[str]:
    """The reason why each joined datum has no reference posterior; empty if it has one."""
    gate = convergence_of(ref)
    labels = gate["data"].values.tolist()
    passed = dict(zip(labels, gate["is_reference"].values.tolist(), strict=True))
    reason = dict(zip(labels, gate["reason"].values.tolist(), strict=True))
    return [
        "" if passed.get(label, False) else (reason.get(label, "no entry in `convergence`") or "failed the gate")
        for label in joined.tolist()
    ]


def _shared_statistics(sides: Sides, level: float) -> dict[str, Array]:
    """Statistics of the shared latents, which are one datum."""
    latents, (a, r) = sides.shared_latents, sides.shared_draws
    check_finite(a, latents, "the shared latents")
    if reason := defect(r, latents):
        raise InferenceError(f"the reference of the shared latents cannot be used: {reason}")
    tails, shapes = tails_of([r], positive_in(a, r)), Shapes(together=False)
    shapes.add(a, r)
    *marginal, ours, theirs = units(a, r, tails)
    found = marginal_statistics(marginal[0], marginal[1], level) | quantiles_of_heavy(a, r, tails)
    of_tails = {"tail_index": tails.index, "heavy": tails.heavy, "log_scale": tails.log_scale}
    found |= shapes.statistics() | {name: values.astype(np.float64) for name, values in of_tails.items()}
    if len(latents) > 1:
        halves = halves_of_draws(ours, theirs)
        projected = own(halves, [(covariance(x), covariance(y)) for x, y in halves])
        along = [moments(*sides) for sides in projected.values()]
        found |= {f"own_{name}": np.concatenate([one[name] for one in along]) for name in ("sd_ratio", "sd_ratio_se")}
        found |= _shared_pairs(halves, [latent.label for latent in latents])
    return found


def _shared_pairs(halves: list[tuple[Draws, Draws]], labels: list[str]) -> dict[str, Array]:
    """The shared pair whose correlation errs most, chosen on either half of the draws and judged on the other."""
    blocks = [correlation_blocks(*sides) for sides in halves]
    names, errors, ses = [], [], []
    for judged in (0, 1):
        pair = int(squared_errors(blocks[1 - judged])[0].argmax())
        one, other = (indices[pair] for indices in np.triu_indices(len(labels), 1))
        series = blocks[judged][:, pair]
        names.append(f"`{labels[one]}` and `{labels[other]}`")
        errors.append(series.mean())
        ses.append(FEW_BLOCKS * np.sqrt(series.var(ddof=1) / len(series)))
    return {"pair": np.array(names, dtype=str), "pair_error": np.array(errors), "pair_error_se": np.array(ses)}


def _assemble_shared(statistics: dict[str, Array], latents: list[Latent]) -> xr.Dataset:
    missing = np.full(len(latents), np.nan)
    names = statistics or dict.fromkeys(MARGINAL, missing)
    dims = {"own": ("own_direction",), "pair": ("half",), "shape": ("probability", "shared_latent")}
    variables = {f"shared_{n}": (dims.get(n.split("_")[0], ("shared_latent",)), v) for n, v in names.items()}
    return xr.Dataset(variables, coords=latent_coords(latents, "shared_"))


def _observed_difference(
    amortized: Side, reference: Side, joined: np.ndarray, kept: npt.NDArray[np.bool_]
) -> xr.Dataset:
    """The size of the observations of kept and of left-out data, which shows a biased selection."""
    side = reference if "observed_data" in reference.tree.children else amortized
    observed = side.group("observed_data")
    sites = [str(s) for s, v in observed.data_vars.items() if "data" in v.dims and np.issubdtype(v.dtype, np.number)]
    means: dict[str, list[float]] = {"observed_rms_kept": [], "observed_rms_left_out": []}
    for site in sites:
        values = select_rows(observed[site], side, joined).astype(np.float64)
        rms = np.sqrt(np.nanmean(values.reshape(len(joined), -1) ** 2, axis=1))
        for name, part in (("observed_rms_kept", rms[kept]), ("observed_rms_left_out", rms[~kept])):
            means[name].append(float(part.mean()) if len(part) else np.nan)
    coords = {"observed_site": np.array(sites, dtype=str)}
    return xr.Dataset({name: ("observed_site", np.array(v)) for name, v in means.items()}, coords=coords)


def _evidence_gap(amortized: Side, reference: Side, labels: np.ndarray) -> dict[str, Array]:
    """log p(x) − ELBO of every datum ± its error, where log p(x) is known exactly and the ELBO is that of a datum."""
    gate, stats = reference.group("convergence"), amortized.group("sample_stats")
    known = knows_evidence(gate) and {"log_p", "log_q"} <= set(stats.data_vars)
    # Resampled draws have no ELBO, and with shared latents that of a datum does not exist.
    if not known or not amortized.independent or "data" not in stats["log_q"].dims or not len(labels):
        return {}
    logs = stats["log_p"] - stats["log_q"]
    weights = logs.transpose("data", "chain", "draw").values[amortized.rows(labels)].astype(np.float64)
    weights = weights.reshape(len(labels), -1)
    evidence = gate["log_evidence"].values[reference.rows(labels)]
    with np.errstate(invalid="ignore"):  # the ELBO is −∞ where a guide leaves the support
        error = np.sqrt(weights.var(1, ddof=1) / weights.shape[1])
    return {"evidence_gap": evidence - weights.mean(1), "evidence_gap_se": error}


def _dimensions(informed: xr.Dataset | None, latents: int) -> dict[str, float]:
    """The number of dimensions that a likelihood informs: the median over data, at most the number of latents."""
    found = np.nan if informed is None else float(informed["dimensions"].median())
    return {"informed_dimensions": min(found, float(latents))} if np.isfinite(found) else {}


def _missed_modes(reference: Side) -> dict[str, float]:
    """The expected number of data whose reference misses a mode, where it is known."""
    attrs = reference.group("convergence").attrs
    return {"expected_wrong": float(attrs["expected_wrong"])} if "expected_wrong" in attrs else {}


def _attributes(
    amortized: Side, reference: Side, kept: npt.NDArray[np.bool_], level: float
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
