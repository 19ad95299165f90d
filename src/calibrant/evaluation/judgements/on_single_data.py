"""The question about single data: is the guide right for the worst of them?

The worst datum, and for every latent the worst 5% of the data, are chosen on one half of the draws and judged on the
other half, both ways, in the direction that was seen: noise in the choice cannot raise the error that is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import ndtr

from calibrant.evaluation.judgements.decisions import WIDTH, Question, Statistic
from calibrant.evaluation.judgements.pooled import Limits

Array = npt.NDArray[np.float64]

WORST_MEAN_MARGIN = 0.5  # largest error of the worst latent of the worst datum, in reference sds
WORST_SD_MARGIN = 0.5  # the same for the sd: a factor of 1.5
FEW_MEAN_MARGIN = 0.2  # largest average error over the worst 5% of the data
FEW_SD_MARGIN = 0.2
FEW = 0.05  # share of the data


def questions(result: xr.Dataset, limits: Limits) -> list[Question]:
    """The question about single data, if the latents are local and there are several data."""
    if not result.sizes["latent"] or result.sizes["data"] < 2 or "half_mean_error" not in result:
        return []
    together = "together" in result.coords
    found = [s for errors in _errors(result) for s in (*_worst(errors), *_few(errors, limits, together))]
    return [Question("all latents", "single data", found)]


@dataclass(frozen=True)
class _Errors:
    """Errors from either half of the draws, in their order."""

    kind: str  # "mean" or "sd"
    halves: Array  # `(data, half, latent)`
    se: Array  # `(data, latent)`, of a half
    data: list[str]
    latents: list[str]
    margins: tuple[float, float]  # of the worst datum, of the worst few


def _errors(result: xr.Dataset) -> Iterator[_Errors]:
    data, latents = [str(label) for label in result["data"].values.tolist()], result["latent"].values.tolist()
    dims = ("data", "half", "latent")
    mean, sd = result["half_mean_error"].transpose(*dims).values, result["half_sd_ratio"].transpose(*dims).values
    margins = WORST_MEAN_MARGIN, FEW_MEAN_MARGIN
    yield _Errors("mean", mean, result["half_mean_error_se"].values, data, latents, margins)
    margins = float(np.log1p(WORST_SD_MARGIN)), float(np.log1p(FEW_SD_MARGIN))
    relative = result["half_sd_ratio_se"].values / sd.mean(1)
    yield _Errors("sd", np.log(sd), relative, data, latents, margins)


def _worst(errors: _Errors) -> Iterator[Statistic]:
    """The worst latent of the worst datum, chosen on either half of the draws."""
    for chosen, judged in ((0, 1), (1, 0)):
        seen = errors.halves[:, chosen]
        datum, latent = np.unravel_index(int(np.abs(seen).argmax()), seen.shape)
        sign = float(np.sign(seen[datum, latent]))
        effect = sign * float(errors.halves[datum, judged, latent])
        label = f"datum {errors.data[datum]}, `{errors.latents[latent]}`"
        found = _one_sided(label, errors.kind, effect, float(errors.se[datum, latent]), errors.margins[0])
        found = replace(found, effect=sign * effect, signed=True)
        yield replace(found, entry=errors.latents[latent], datum=errors.data[datum])


def _few(errors: _Errors, limits: Limits, together: bool) -> Iterator[Statistic]:
    """For every latent, the worst 5% of all data, of which those without a reference are not among the worst."""
    count = min(len(errors.data), int(np.ceil(FEW * len(errors.data) / limits.kept)))
    for latent, name in enumerate(errors.latents):
        for chosen, judged in ((0, 1), (1, 0)):
            seen = errors.halves[:, chosen, latent]
            rows = np.argsort(-np.abs(seen), kind="stable")[:count]
            effect = float((np.sign(seen[rows]) * errors.halves[rows, judged, latent]).mean())
            se = errors.se[rows, latent]
            spread = float(se.mean() if together else np.sqrt((se**2).sum()) / count)
            label = (
                f"the worst {count} of {len(errors.data)} data, `{name}`" if count > 1 else f"the worst datum, `{name}`"
            )
            found = _one_sided(label, errors.kind, effect, spread, errors.margins[1])
            yield replace(found, entry=name, datum=", ".join(errors.data[row] for row in rows[:3]))


def _one_sided(label: str, kind: str, effect: float, se: float, margin: float) -> Statistic:
    """A statistic in the direction in which the error was seen; an effect in the other direction is no error."""
    p_value = float(ndtr(-(effect - margin) / max(se, 1e-300)))
    high = max(effect, 0.0) + WIDTH * se
    return Statistic(label, "", effect, se, 0.0, high, p_value, margin, signed=False, kind=kind)
