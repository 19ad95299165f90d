"""Questions about several latents together: correlations, and directions along which a guide errs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.evaluation.judgements.decisions import Question, Statistic, normal_statistic
from calibrant.evaluation.judgements.pooled import Limits, average, root, together_of
from calibrant.evaluation.statistics.directions import COMMON, INFORMED, OWN, OWN_WIDE

Array = npt.NDArray[np.float64]

CORRELATION_MARGIN = 0.1
DIRECTION_SD_MARGIN = 0.25  # with a margin of .1, sds that are 3% off at random in 200 latents would fail
DIRECTION_MEAN_MARGIN = 0.25
_NAMED = 3  # number of latents that a sentence names for a direction
_LOG_SD = float(np.log1p(DIRECTION_SD_MARGIN))


def questions(result: xr.Dataset, limits: Limits) -> list[Question]:
    """The questions about all local latents, and about all shared ones, if there are two or more."""
    asked = []
    if correlations := [*_correlations(result, limits), *_with_shared(result)]:
        asked.append(Question("all latents", "correlation", correlations))
    if along := [*_directions(result, limits), *_shared(result)]:
        asked.append(Question("all latents", "direction", along))
    return asked


def _correlations(result: xr.Dataset, limits: Limits) -> Iterator[Statistic]:
    """The whole matrix, the pair that was chosen on the other half of the data, and every latent's row."""
    labels = result["latent"].values.tolist()
    if len(labels) < 2:
        return
    pairs = len(labels) * (len(labels) - 1) // 2
    note = ", root mean square over data" if pairs == 1 else f", root mean square over {pairs} pairs"
    square, noise = (result[f"correlation_{name}"].values for name in ("mean_square", "noise"))
    shared = together_of(result, "correlation", [""])
    yield root("all latents", note, square, noise, CORRELATION_MARGIN, limits, shared)
    if "pair" in result:
        yield from (_pair(result, half, limits) for half in (0, 1))
    note = f", root mean square with all others, the worst of {len(labels)} latents"
    squares, noises = (result[f"correlation_row_{name}"].values for name in ("mean_square", "noise"))
    rows = []
    for i, entry in enumerate(labels):
        shared = together_of(result, "correlation", [entry])
        row = root(f"`{entry}`", note, squares[:, i], noises[:, i], CORRELATION_MARGIN, limits, shared)
        rows.append(replace(row, entry=entry))
    yield from sorted(rows, key=lambda row: -row.effect)


def _with_shared(result: xr.Dataset) -> Iterator[Statistic]:
    """The worst pair of shared latents, and every local latent with every shared one, averaged over data."""
    if "shared_pair" in result:
        for half in (0, 1):
            error, se = (float(result[f"shared_pair_error{end}"][half]) for end in ("", "_se"))
            yield normal_statistic(str(result["shared_pair"].values[half]), "", error, se, CORRELATION_MARGIN)
    if "cross_error" not in result:
        return
    for label, error in zip(result["cross"].values.tolist(), result["cross_error"].values.tolist(), strict=True):
        shared = together_of(result, "cross", [label])
        assert shared is not None
        yield normal_statistic(label, ", on average over data", error, shared.average_se, CORRELATION_MARGIN)


def _pair(result: xr.Dataset, half: int, limits: Limits) -> Statistic:
    part = result.isel(data=np.flatnonzero(result["half_of_data"].values == half))
    one, other = result["pair"].values[half].tolist()
    error, noise = part["pair_error"].values, part["pair_noise"].values
    shared = together_of(result, "pair", [f"half {half}"])
    note = ", root mean square over half of the data (the pair was chosen on the other half)"
    return root(f"`{one}` and `{other}`", note, error**2 - noise, noise, CORRELATION_MARGIN, limits, shared)


def _directions(result: xr.Dataset, limits: Limits) -> Iterator[Statistic]:
    known = "direction" in result.dims and result.sizes["latent"] > 1
    for name in result["direction"].values.tolist() if known else []:
        if name in COMMON:
            for half in (0, 1):
                part = result.isel(data=np.flatnonzero(result["half_of_data"].values == half))
                label = f"a sum of latents{_mainly(result, name, half)}"
                yield from _along(part, name, f"{name}, half {half}", label, limits)
        elif name == INFORMED:
            yield from _along(result, name, name, "the sum of latents that the data determine best", limits)
        elif name in OWN:
            which = "narrowest" if name in OWN_WIDE else "widest"
            label = f"the sum of latents in which the posterior of a datum is {which} compared with the guide"
            yield from _along(result, name, name, label, limits)


def _shared(result: xr.Dataset) -> Iterator[Statistic]:
    """The sd along the own direction of the shared latents, which are one datum."""
    if "shared_own_sd_ratio" not in result:
        return
    for i, which in enumerate(("narrowest", "widest") * 2):
        ratio, se = float(result["shared_own_sd_ratio"][i]), float(result["shared_own_sd_ratio_se"][i])
        label = f"the sum of shared latents in which their posterior is {which} compared with the guide"
        yield replace(normal_statistic(label, "", float(np.log(ratio)), se / ratio, _LOG_SD), kind="sd")


def _along(part: xr.Dataset, name: str, key: str, label: str, limits: Limits) -> Iterator[Statistic]:
    """Average and root mean square over data of the errors along one direction, as far as they are known."""
    one = part.sel(direction=name)
    known = np.isfinite(one["direction_sd_ratio"].values)
    if not known.any():
        return
    limits = Limits(limits.kept * float(known.mean()))  # data without a direction count as right
    one = one.isel(data=np.flatnonzero(known))
    ratio, ratio_se = one["direction_sd_ratio"].values, one["direction_sd_ratio_se"].values
    found = {"sd": (np.log(ratio), ratio_se / ratio, _LOG_SD)}
    if name not in OWN:
        found["mean"] = one["direction_mean_error"].values, one["direction_mean_error_se"].values, DIRECTION_MEAN_MARGIN
    for kind, (error, se, margin) in found.items():
        shared = together_of(part, f"direction {kind}", [key])
        yield replace(average(label, "", error[:, None], se[:, None], margin, limits, shared), kind=kind)
        yield replace(root(label, "", error**2 - se**2, se**2, margin, limits, shared), kind=kind)


def _mainly(result: xr.Dataset, name: str, half: int) -> str:
    """The latents with the largest weights in a common direction; nothing if it is spread over many."""
    if "direction_weight" not in result:
        return ""
    weights = np.abs(result["direction_weight"].sel(common_direction=name).values[half])
    order = np.argsort(-weights)[:_NAMED]
    if not np.isfinite(weights).all() or (weights[order] ** 2).sum() < 0.5 * (weights**2).sum():
        return ""
    told, labels = [i for i in order.tolist() if weights[i] > 0.3 * weights[order[0]]], result["latent"].values
    return f" (mainly {', '.join(f'`{labels[i]}`' for i in told)})"
