"""The convergence gate: which data have draws that are good enough for a reference posterior.

A datum passes only if all its latents pass. MCMC is judged by rank-normalised split R-hat, bulk and tail
effective sample size (Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, Bayesian Analysis 16(2)), divergent
transitions and E-BFMI (Betancourt 2016, arXiv 1604.00695), and by how many draws lie at the edge of their support;
exact methods are judged by their numerical error.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.inference.diagnostics import bfmi, diagnose
from calibrant.inference.reweighting import NEARLY_EQUAL
from calibrant.inference.trees import (
    Array,
    Latent,
    data_labels,
    draw_blocks,
    labels_of,
    latent_names,
    scalars,
    shared_draws,
)

MIN_CHAINS = 4
MIN_DRAWS = 500
RHAT_LIMIT = 1.01
ESS_LIMIT = 400
BFMI_LIMIT = 0.3
GRID_LIMIT = 0.01
EDGE_LIMIT = 0.005
KHAT_LIMIT = 0.5


def shortfall(chains: int, draws: int) -> str:
    """Why this number of chains and draws cannot pass the gate; empty if it can."""
    if chains < MIN_CHAINS:
        return f"{chains} {'chain' if chains == 1 else 'chains'} (at least {MIN_CHAINS} are needed)"
    if draws < MIN_DRAWS:
        return f"{draws} draws per chain (at least {MIN_DRAWS} are needed)"
    return ""


def require_passable(chains: int, draws: int) -> None:
    """Refuse settings with which no datum could pass the gate.

    Args:
        chains: number of chains.
        draws: number of draws per chain after warm-up.

    Raises:
        InferenceError: for fewer than 4 chains or fewer than 500 draws.
    """
    if reason := shortfall(chains, draws):
        raise InferenceError(
            f"a reference posterior cannot pass the convergence gate with {reason}; "
            f"ask for chains >= {MIN_CHAINS} and draws >= {MIN_DRAWS}"
        )


def mcmc_convergence(posterior: xr.Dataset, sample_stats: xr.Dataset) -> xr.Dataset:
    """Judge MCMC draws datum by datum.

    R-hat and effective sample sizes are the worst values of any latent of a datum. Shared latents (without dimension
    `data`), and statistics of chains over all data at once, count for every datum. If every chain consists of several
    sub-chains, R-hat is nested, and effective sample sizes are those of the sub-chains.

    Args:
        posterior: variables `(chain, draw, data, …)`, or `(chain, draw, …)` for shared latents; only the variables
            named in the attribute `latents` are judged. The attribute `subchains` is the number of sub-chains of a
            chain; it does not count if it does not divide the number of draws.
        sample_stats: `diverging` and `energy`, `(chain, draw, data)` or `(chain, draw)`. If one is missing, its result
            is NaN, and the attribute `not_recorded` names it.

    Returns:
        The group `convergence` with dimension `data`: `is_reference`, `reason` (empty for a datum that passes), `rhat`,
        `ess_bulk`, `ess_tail` (draws), `divergences` (transitions), `bfmi`. With fewer than 4 chains or 500 draws,
        nothing is computed: no datum passes, and all numbers are NaN.

    Raises:
        InferenceError: if a latent that the attribute names is not in the group.
    """
    labels = labels_of(posterior, sample_stats)
    missing = [name for name in ("diverging", "energy") if name not in sample_stats]
    if reason := shortfall(posterior.sizes.get("chain", 0), posterior.sizes.get("draw", 0)):
        numbers = {name: np.full(len(labels), np.nan) for name in _NUMBERS}
        return _group(labels, [reason] * len(labels), numbers, missing)
    subchains = int(posterior.attrs.get("subchains", 1))
    subchains = 1 if posterior.sizes["draw"] % subchains else subchains
    latents, found = _diagnose(posterior, len(labels), subchains)
    found = _without_fixed(latents, found, posterior.sizes["chain"] * posterior.sizes["draw"])
    divergences = _divergences(sample_stats, len(labels))
    fraction = _bfmi(sample_stats, len(labels), subchains)
    reasons = [_chain_reason(latents, {k: v[i] for k, v in found.items()}) for i in range(len(labels))]
    transitions = _transition_reasons(divergences, fraction, "energy" in sample_stats)
    numbers = {
        "rhat": found["rhat"].max(1),
        "ess_bulk": found["ess_bulk"].min(1),
        "ess_tail": found["ess_tail"].min(1),
        "divergences": divergences,
        "bfmi": fraction,
    }
    joined = ["; ".join(filter(None, both)) for both in zip(reasons, transitions, strict=True)]
    return _group(labels, joined, numbers, missing)


def exact_convergence(
    grid_error: npt.ArrayLike, log_evidence: npt.ArrayLike, data: Sequence[Hashable] | np.ndarray
) -> xr.Dataset:
    """Judge an exact method by its own numerical error.

    Args:
        grid_error: `(data,)`, the change of the result when every second node is dropped, in posterior sds.
        log_evidence: `(data,)`, nats per datum.
        data: labels along `data`.

    Returns:
        The group `convergence` with the variables of `mcmc_convergence`, whose numbers are NaN, and `grid_error` and
        `log_evidence`. A datum passes if `grid_error` < 0.01.
    """
    labels, errors = np.asarray(data), np.asarray(grid_error, dtype=np.float64)
    reasons = ["" if e < GRID_LIMIT else f"numerical error {e:.2g} sd (limit {GRID_LIMIT})" for e in errors]
    numbers = {name: np.full(len(labels), np.nan) for name in _NUMBERS}
    numbers |= {"grid_error": errors, "log_evidence": np.asarray(log_evidence, dtype=np.float64)}
    return _group(labels, reasons, numbers, [])


def importance_convergence(
    posterior: xr.Dataset,
    summary: xr.Dataset,
    unusable: npt.NDArray[np.bool_],
    edges: Mapping[str, npt.ArrayLike],
    treatment: str = "importance",
) -> xr.Dataset:
    """Judge resampled draws of a guide by the weights from which they come, and by the number of different draws.

    Args:
        posterior: resampled draws `(chain, draw, data, …)`, copies of a draw side by side.
        summary: `pareto_k`, `ess`, `log_evidence` and `log_evidence_se` of the smoothed weights, `(data,)`, with the
            attribute `pool`.
        unusable: whether a datum has weights that are not finite, `(data,)`.
        edges: latent → share of its draws at an edge of its support, `(data,)`.
        treatment: how the draws were made, in words.

    Returns:
        The group `convergence` with the variables of `mcmc_convergence`, of which `ess_bulk` and `ess_tail` are known,
        and `at_edge`, `look` 0, `treatment`, `pareto_k`, `ess_weights`, `log_evidence` and
        `log_evidence_se`. A datum passes if k-hat is below 0.5 (or the weights are nearly equal), all effective numbers
        of draws are at least 400, and at most 0.5% of the draws lie at an edge; the evidence of all others is NaN.
    """
    size = len(unusable)
    _, found = _diagnose(posterior, size)
    khat = np.where(unusable, np.inf, summary["pareto_k"].values)
    weights = np.where(unusable, 0.0, summary["ess"].values)
    bulk, tail = found["ess_bulk"].min(1), found["ess_tail"].min(1)
    equal = weights > NEARLY_EQUAL * summary.attrs["pool"]
    shares, at_edge = edge_reasons(edges, size)
    reasons = []
    for i in range(size):
        said = ["weights of the guide's draws that are not finite"] if unusable[i] else []
        if not (unusable[i] or equal[i] or khat[i] < KHAT_LIMIT):
            said.append(f"k-hat {khat[i]:.2f} of the weights of the guide's draws (limit {KHAT_LIMIT})")
        for name, ess in (("ESS of the weights", weights[i]), ("bulk ESS", bulk[i]), ("tail ESS", tail[i])):
            if not (unusable[i] or ess >= ESS_LIMIT):
                said.append(f"{name} {ess:.0f} (limit {ESS_LIMIT})")
        reasons.append("; ".join(filter(None, [*said, at_edge[i]])))
    passed = np.array([not reason for reason in reasons])
    numbers: dict[str, Array] = {name: np.full(size, np.nan) for name in _NUMBERS}
    numbers |= {"ess_bulk": bulk, "ess_tail": tail, "pareto_k": khat, "ess_weights": weights}
    for name in ("log_evidence", "log_evidence_se"):
        numbers[name] = np.where(passed, summary[name].values, np.nan)
    group = _group(summary["data"].values, reasons, numbers, [])
    texts = np.full(size, treatment)
    looks = np.zeros(size, dtype=np.int64)
    return group.assign(at_edge=("data", shares), look=("data", looks), treatment=("data", texts))


def edge_reasons(edges: Mapping[str, npt.ArrayLike], size: int) -> tuple[Array, list[str]]:
    """Judge how many draws lie so close to the edge of their support that float64 can't tell them from it.

    There the density is not right, nor are the draws. A Beta(0.1, 0.1) variable has 1.4% of its mass between 1 and the
    number before it.

    Args:
        edges: latent → share of its draws at an edge, `(data,)`.
        size: number of data.

    Returns:
        The largest share of each datum, and the reason why it fails, which is empty up to a share of 0.005.
    """
    if not edges:
        return np.zeros(size), [""] * size
    names, shares = list(edges), np.stack([np.asarray(share, dtype=np.float64) for share in edges.values()])
    worst = shares.argmax(0)
    return shares.max(0), [
        f"{100 * share:.1f}% of the draws of `{names[which]}` closer to the edge of its support than float64 resolves "
        f"(limit {100 * EDGE_LIMIT}%)"
        if share > EDGE_LIMIT
        else ""
        for share, which in zip(shares.max(0), worst, strict=True)
    ]


def convergence_of(tree: xr.DataTree) -> xr.Dataset:
    """The group `convergence` of a tree; for a tree without it, the verdict of the gate is computed from the draws.

    Args:
        tree: a tree with the group `posterior`; `sample_stats` is optional.

    Returns:
        A dataset with the variables that `mcmc_convergence` or `exact_convergence` returns.

    Raises:
        InferenceError: if the tree has no group `posterior`.
    """
    if "convergence" in tree.children:
        return tree["convergence"].to_dataset()
    if "posterior" not in tree.children:
        raise InferenceError(f"the tree has no group `posterior`, only {sorted(tree.children)}")
    posterior = tree["posterior"].to_dataset()
    stats = tree["sample_stats"].to_dataset() if "sample_stats" in tree.children else xr.Dataset()
    result = mcmc_convergence(posterior, stats)
    labels = data_labels(tree)
    if result.sizes["data"] == 1 < len(labels):  # only shared latents: the one verdict counts for every datum
        result = result.isel(data=[0] * len(labels)).assign_coords(data=labels)
    return result


def knows_evidence(convergence: xr.Dataset) -> bool:
    """Whether the log evidence of every datum is known exactly, and not estimated for some of them."""
    return "log_evidence" in convergence and "log_evidence_se" not in convergence


def passed_labels(tree: xr.DataTree) -> set[Hashable]:
    """Labels of the data that pass the gate of a tree."""
    found = convergence_of(tree)
    return set(found["data"].values[found["is_reference"].values].tolist())


_NUMBERS = ("rhat", "ess_bulk", "ess_tail", "divergences", "bfmi")


def _diagnose(posterior: xr.Dataset, n_data: int, subchains: int = 1) -> tuple[list[Latent], dict[str, Array]]:
    """Diagnostics `(data, latent)` of all scalar latents; those of shared latents are repeated for every datum."""
    names = latent_names(posterior)
    if absent := [name for name in names if name not in posterior]:
        raise InferenceError(f"attribute `latents` names {absent}, which the group `posterior` does not hold")
    local = [name for name in names if "data" in posterior[name].dims]
    shared = [name for name in names if "data" not in posterior[name].dims]
    parts: list[dict[str, Array]] = []
    if local:
        blocks = [_scalar_diagnostics(x, subchains) for x in draw_blocks(posterior, local, range(n_data))]
        parts.append({k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]})
    if shared:
        once = _scalar_diagnostics(shared_draws(posterior, shared)[None], subchains)
        parts.append({k: np.repeat(v, n_data, axis=0) for k, v in once.items()})
    return scalars(posterior, local + shared), {k: np.concatenate([p[k] for p in parts], axis=1) for k in parts[0]}


def _scalar_diagnostics(x: Array, subchains: int) -> dict[str, Array]:
    """Diagnostics `(data, latent)` of draws `(data, chain, draw, latent)`, NaN where a draw is not finite."""
    x = np.moveaxis(x, 0, 2)
    finite = np.isfinite(x).all((0, 1))
    x = np.where(finite, x, 0.0)
    found = {k: np.where(finite, v, np.nan) for k, v in diagnose(x, subchains).items()}
    x = x.reshape(len(x) * subchains, -1, *x.shape[2:])
    lowest, highest = x.min(1), x.max(1)
    flags = {
        "constant": (lowest == highest).any(0) & finite,
        "fixed": (lowest.min(0) == highest.max(0)) & finite,
        "finite": finite,
    }
    return found | {name: flag.astype(np.float64) for name, flag in flags.items()}


def _without_fixed(latents: list[Latent], found: dict[str, Array], draws: int) -> dict[str, Array]:
    """Diagnostics in which entries that are fixed by the support pass, such as the zeros of a Cholesky factor.

    An entry is fixed if all chains have one value for it, while other entries of its site vary.
    """
    site = np.array([latent.site for latent in latents])
    fixed = found["fixed"] > 0
    for name in np.unique(site[fixed.any(0)]):
        own = site == name
        fixed[:, own] &= ~fixed[:, own].all(1, keepdims=True)
    passing = {"rhat": 1.0, "ess_bulk": draws, "ess_tail": draws, "constant": 0.0}
    return {name: np.where(fixed, passing.get(name, values), values) for name, values in found.items()}


def _chain_reason(latents: list[Latent], found: dict[str, Array]) -> str:
    """Why the chains of a datum fail, with the worst latent for each criterion; empty if they pass."""

    def name(mask: Array) -> str:
        first = f"`{latents[int(mask.argmax())].label}`"
        return first if mask.sum() == 1 else f"{first} and {int(mask.sum()) - 1} more"

    if (infinite := 1.0 - found["finite"]).any():
        return f"draws that are not finite in {name(infinite)}"
    if found["constant"].any():
        return f"a constant chain in {name(found['constant'])}"
    reasons = []
    if not (found["rhat"] < RHAT_LIMIT).all():
        worst = int(found["rhat"].argmax())
        reasons.append(f"R-hat {found['rhat'][worst]:.3f} of `{latents[worst].label}` (limit {RHAT_LIMIT})")
    for kind in ("bulk", "tail"):
        ess = found[f"ess_{kind}"]
        if not (ess >= ESS_LIMIT).all():
            worst = int(ess.argmin())
            reasons.append(f"{kind} ESS {ess[worst]:.0f} of `{latents[worst].label}` (limit {ESS_LIMIT})")
    return "; ".join(reasons)


def _divergences(stats: xr.Dataset, n_data: int) -> Array:
    if "diverging" not in stats:
        return np.full(n_data, np.nan)
    return np.broadcast_to(stats["diverging"].sum(("chain", "draw")).values, n_data).astype(np.float64)


def _bfmi(stats: xr.Dataset, n_data: int, subchains: int) -> Array:
    """The lowest E-BFMI of any chain."""
    if "energy" not in stats:
        return np.full(n_data, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = bfmi(stats["energy"].transpose("chain", "draw", ...).values, subchains)
        return np.broadcast_to(found.min(0), n_data).copy()


def _transition_reasons(divergences: Array, fractions: Array, has_energy: bool) -> list[str]:
    reasons = []
    for count, fraction in zip(divergences, fractions, strict=True):
        transitions = "transition" if count == 1 else "transitions"
        found = [f"{count:.0f} divergent {transitions}"] if count > 0 else []
        if has_energy and not fraction >= BFMI_LIMIT:
            found.append(f"E-BFMI {fraction:.2f} (limit {BFMI_LIMIT})")
        reasons.append("; ".join(found))
    return reasons


def _group(labels: np.ndarray, reasons: list[str], numbers: dict[str, Array], missing: list[str]) -> xr.Dataset:
    variables: dict[str, tuple[str, np.ndarray]] = {
        "is_reference": ("data", np.array([not reason for reason in reasons], dtype=bool)),
        "reason": ("data", np.array(reasons, dtype=str)),
    }
    variables |= {name: ("data", values) for name, values in numbers.items()}
    attrs = {"not_recorded": ", ".join(missing)} if missing else {}
    return xr.Dataset(variables, coords={"data": labels}, attrs=attrs)
