"""The numbers and tables of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.wording import counted, number
from calibrant.evaluation.remedying.sentences import remedy_sentences
from calibrant.evaluation.reporting import run_plots
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.simulation_ranks import uniformity
from calibrant.inference.references.gate import convergence_of, knows_evidence

_LISTED = 10  # largest number of data that failed the gate in a list
_QUANTITIES = 8  # largest number of quantities in the table of a calibration


def checked_elbo(result: RunResult) -> tuple[float, float] | None:
    """ELBO of the checked data and its standard error, in nats per datum; None if the draws have no densities."""
    stats = result.amortized["sample_stats"].dataset if "sample_stats" in result.amortized.children else xr.Dataset()
    if "log_p" not in stats or "data" not in stats["log_p"].dims:
        return None
    return _mean_bound(stats["log_p"] - stats["log_q"])


def _mean_bound(bound: xr.DataArray) -> tuple[float, float]:
    """The mean of log p − log q over draws and data, and its standard error."""
    draws = bound.sizes["chain"] * bound.sizes["draw"]
    error = float(np.sqrt((bound.var(("chain", "draw"), ddof=1) / draws).sum())) / bound.sizes["data"]
    return float(bound.mean()), error


def evidence_gap(result: RunResult) -> tuple[float, float, float] | None:
    """Exact log evidence, ELBO of the same data, and its standard error: means over data, in nats per datum.

    None if the exact evidence is not known.
    """
    if result.reference is None or "convergence" not in result.reference.children:
        return None
    convergence = result.reference["convergence"].to_dataset()
    if not knows_evidence(convergence):
        return None
    evidence = convergence["log_evidence"]
    stats = result.amortized["sample_stats"].dataset
    return float(evidence.mean()), *_mean_bound((stats["log_p"] - stats["log_q"]).sel(data=evidence["data"]))


def number_rows(result: RunResult) -> list[tuple[str, str]]:
    """Numbers of the checked data: log evidence and ELBO of the same data, noise, responding latents, memory."""
    rows, gap = [], evidence_gap(result)
    if gap is not None:
        evidence, bound, error = gap
        rows.append(("log evidence (exact)", f"{number(evidence, 0.0)} nats per datum"))
        rows.append(("ELBO of the same data", f"{number(bound, error)} nats per datum"))
        rows.append(("gap that the guide leaves", f"{number(evidence - bound, error)} nats per datum"))
    elif (elbo := checked_elbo(result)) is not None and np.isfinite(elbo[0]):
        rows.append(("ELBO of the checked data", f"{number(*elbo)} nats per datum"))
    if result.contrast is not None:
        noise, informative, all_ = (result.contrast.attrs[name] for name in ("noise", "n_informative", "n_latents"))
        rows.append(("standard deviation of the noise", f"{noise:.3g} data units"))
        rows.append(("latents that respond to the images", f"{informative} of {all_}"))
    if peak := result.config.get("peak_memory"):
        rows.append(("memory that the check took at most", f"{peak / 2**30:.1f} GiB"))
    return rows


def training_rows(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """For every model that was trained: for how long, and the ELBO of the validation data."""
    rows = []
    for result in results:
        if not (trained := result.config.get("fit")):
            continue
        how = {"finished": "", "early": ", stopped early"}.get(trained["stopped"], f", {trained['stopped']}")
        epochs = f"{counted(trained['epochs'], 'epoch', 'epochs')}{how}"
        what = "ELBO" if trained.get("is_elbo", True) else "value"
        elbo = f"{what} of the validation data {number(trained['elbo'], trained['elbo_se'])} nats per datum"
        rows.append((result.name, f"{epochs}; {elbo}"))
    return rows


def setting_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Data, model, guide and settings of a run, one line each."""
    other = (config.get("checked") or {}).get("data")
    parts = {
        "data": config.get("data"),
        "model": (config.get("model") or {}).get("arguments"),
        "guide": config.get("guide"),
        "check": {"data": other} if other is not None and other != (config.get("data") or {}).get("path") else None,
    }
    rows = []
    for part, values in {**parts, "settings": config.get("settings")}.items():
        for name, value in (values or {}).items():
            rows.append((f"{part}: {name}", _plain(value)))
    return rows


def _plain(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(one, Mapping) for one in value)
        return ("; " if nested else " × " if len(value) > 1 else "").join(_plain(one) for one in value) or "none"
    return {None: "not given", True: "yes", False: "no"}.get(value, str(value)) if _is_word(value) else str(value)


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def site_names(comparison: xr.Dataset) -> list[str]:
    shared = comparison["shared_site"].values.tolist() if "shared_site" in comparison.coords else []
    return list(dict.fromkeys([*comparison["site"].values.tolist(), *shared]))


def site_row(comparison: xr.Dataset, site: str, found: Sequence[Verdict]) -> dict[str, str]:
    """Statistics of one site over data and latents, with the sentences of the verdicts on it."""
    prefix = "" if site in comparison["site"].values else "shared_"
    part = comparison.isel({f"{prefix}latent": np.flatnonzero(comparison[f"{prefix}site"].values == site)})
    ratio, error, se, coverage = (
        part[f"{prefix}{name}"].values.ravel() for name in ("sd_ratio", "mean_error", "mean_error_se", "coverage")
    )
    row = {
        "site": site,
        "size": str(part.sizes[f"{prefix}latent"]),
        "level": f"{comparison.attrs['coverage_level']:.0%}",
    }
    if len(ratio) and np.isfinite(ratio).all():
        low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
        row["sd"] = f"{middle:.2f} ({low:.2f} – {high:.2f})"
        row["mean"] = f"{np.sqrt(max(float((error**2 - se**2).mean()), 0.0)):.2f}"
        row["coverage"] = f"{coverage.mean():.0%}"
    else:
        row |= {"sd": "–", "mean": "–", "coverage": "–"}
    return {**row, "verdict": _site_verdict([verdict for verdict in found if verdict.site == site])}


def _site_verdict(found: Sequence[Verdict]) -> str:
    """Which questions about a site fail, and which cannot be decided; their sentences stand among the verdicts."""
    parts = []
    for status, words in (("fail", "fails"), ("cannot tell", "cannot tell")):
        names = [verdict.quantity for verdict in found if verdict.status == status]
        parts += [f"{words}: {', '.join(names)}"] if names else []
    return "; ".join(parts) or "agrees with the reference"


def gap_table(result: RunResult) -> dict[str, Any] | None:
    """Both parts of the gap over the data with a known gap, and why it is not known for all other data."""
    if result.gap is None:
        return None
    known = run_plots.known_gaps(result)
    names = ("gap", "approximation", "amortization")
    reasons = result.gap["reason"].values[result.gap["reason"].values != ""].tolist()
    return {
        "sentence": _known(known.sizes["data"] if known is not None else 0, result.gap.sizes["data"]),
        "rows": [_gap_row(known, name) for name in names] if known is not None else [],
        "evidence": ", ".join(sorted(set(known["method"].values.tolist()))) if known is not None else "",
        "reason": reasons[0] if reasons else "",
    }


def _known(known: int, count: int) -> str:
    if count == 1:
        return "The gap of the datum is known" if known else "The gap of the datum is not known"
    return f"Known for {known} of {counted(count)}"


def _gap_row(known: xr.Dataset, name: str) -> dict[str, str]:
    values, errors = known[name].values, known[f"{name}_se"].values
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {
        "name": {"gap": "together"}.get(name, name),
        "mean": number(float(values.mean()), float(np.sqrt((errors**2).sum()) / len(errors))),
        "median": f"{middle:.2f} ({low:.2f} – {high:.2f})",
    }


def calibration_table(result: RunResult) -> dict[str, Any] | None:
    """The quantities of simulated data whose ranks are furthest from uniform, the log joint first."""
    if result.calibration is None:
        return None
    found = uniformity(result.calibration)
    worst = found.sortby("ecdf_difference", ascending=False)["quantity"].values.tolist()
    shown = ["log_joint", *(name for name in worst if name != "log_joint")][:_QUANTITIES]
    return {
        "simulations": f"{found.attrs['simulations']:,}",
        "draws": f"{found.attrs['guide_draws']:,}",
        "shared": json.loads(result.calibration["prior_sbc"].attrs.get("shared_held", "[]")),
        "quantities": found.sizes["quantity"],
        "rows": [_quantity_row(found.sel(quantity=name), name) for name in shown],
    }


def _quantity_row(row: xr.Dataset, name: str) -> dict[str, str]:
    bias, spread = (number(float(row[part]), float(row[f"{part}_se"])) for part in ("bias", "spread"))
    p_value = float(row["p_value"])
    return {
        "name": name,
        "bias": bias,
        "spread": spread,
        "difference": f"{float(row['ecdf_difference']):.3f}",
        "p": f"{p_value:.2g}" if p_value >= 1e-4 else "< 0.0001",
    }


def remedy_table(result: RunResult) -> dict[str, Any] | None:
    """The results of the remedies that were tried, one row each, with their sentences."""
    if result.remedies is None:
        return None
    rows = [_remedy_row(result.remedies.sel(remedy=name), str(name)) for name in result.remedies["remedy"].values]
    return {"sentences": remedy_sentences(result.remedies), "rows": rows}


def _remedy_row(row: xr.Dataset, name: str) -> dict[str, str]:
    def cell(part: str, form: str = "") -> str:
        value = float(row[part])
        if not np.isfinite(value):
            return "–"
        if form or np.isnan(row[f"{part}_se"]):  # one datum has no standard error
            return format(value, form or ".2f")
        return number(value, float(row[f"{part}_se"]))

    fails, unclear = cell("fails", ".0f"), cell("unclear", ".0f")
    return {
        "name": name,
        "reason": str(row["reason"].values),
        "gap": cell("gap"),
        "gain": cell("gain"),
        "sd": cell("sd_error"),
        "mean": cell("mean_error"),
        "khat": cell("khat_good", ".0%"),
        "verdicts": fails if fails == "–" else f"{fails} / {unclear}",
        "seconds": cell("seconds", ".0f"),
    }


def gate_table(result: RunResult) -> dict[str, Any] | None:
    """The number of data with a reference posterior, and how and why all other data have none."""
    if result.reference is None:
        return None
    gate = convergence_of(result.reference)
    failed = gate.isel(data=~gate["is_reference"].values)
    reasons = list(zip(failed["data"].values.tolist(), failed["reason"].values.tolist(), strict=True))
    differences = []
    if result.comparison is not None and len(reasons):
        kept, left = (result.comparison[f"observed_rms_{part}"].values for part in ("kept", "left_out"))
        for name, a, b in zip(result.comparison["observed_site"].values.tolist(), kept, left, strict=True):
            differences.append((name, f"{a:.3g}", f"{b:.3g}"))
    posterior = result.reference["posterior"]
    passed, count = int(gate["is_reference"].sum()), gate.sizes["data"]
    method = posterior.attrs.get("method", "unknown")
    draws = f"{posterior.sizes['chain']} × {posterior.sizes['draw']:,} draws"
    return {
        "sentence": _gate_sentence(passed, count, str(method), draws),
        "reasons": reasons[:_LISTED],
        "more": max(0, len(reasons) - _LISTED),
        "differences": differences,
        "worst": _worst_diagnostics(gate),
    }


def _gate_sentence(passed: int, count: int, method: str, draws: str) -> str:
    if count == 1:
        has = "has a" if passed else "has no"
        return f"The datum {has} reference posterior (method: {method}, {draws})."
    only = "" if passed == count else " Only these are compared."
    return f"{passed} of {counted(count)} have a reference posterior (method: {method}, {draws} each).{only}"


def _worst_diagnostics(gate: xr.Dataset) -> list[tuple[str, str]]:
    """The worst value over data of each diagnostic that was computed."""
    known = {
        "rhat": ("largest R-hat", "max", ".3f"),
        "ess_bulk": ("smallest bulk ESS", "min", ".0f"),
        "ess_tail": ("smallest tail ESS", "min", ".0f"),
        "divergences": ("most divergences for one datum", "max", ".0f"),
        "bfmi": ("smallest E-BFMI", "min", ".2f"),
        "grid_error": ("largest numerical error (posterior sd)", "max", ".1g"),
    }
    rows = []
    for name, (words, which, form) in known.items():
        values = gate[name].values if name in gate else np.array([])
        if np.isfinite(values).any():
            rows.append((words, f"{getattr(np, f'nan{which}')(values):{form}}"))
    return rows
