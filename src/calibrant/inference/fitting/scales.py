"""A warning before training if the data lie far outside what the program simulates: pixels from 0 to 255, say."""

from __future__ import annotations

from math import floor, log10

import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import CalibrantError, warn
from calibrant.inference.fitting.state import Modules
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.simulation import refuse_weights, sample_prior
from calibrant.program.tracing import sampled, trace
from calibrant.program.weighting import is_masked_at_all
from calibrant.streams import stream

_FAR = 20.0  # data are far if they are so many times as far from the program's centre as what it simulates
_QUANTILE = 0.99  # of the distances from the centre
_ROWS = 512  # number of data that are looked at
_SIZE = 32  # number of data in a simulation
_FIRST, _MORE = 4, 28  # simulations, each with its own shared latents; the later ones only if the data seem far
_LARGEST_PIXEL = 255


def warn_of_far_data(modules: Modules, data: Data, seed: int) -> None:
    """Warn once, naming site, scale and remedy, if the data of a continuous site are beyond the program's reach.

    A network starts from small weights: it takes thousands of steps, and often fails, to learn a scale that is many
    times as large. Programs that can't be simulated, also because of a scale, and sites with masks are left out.
    """
    try:
        with torch.no_grad(), seeded(stream(seed, "fit", "scales")):
            far = _farthest(modules.model, data, modules.device)
    except CalibrantError:  # a program that can't be simulated
        return
    if far is not None:
        warn(_sentence(*far), UserWarning)


def _farthest(model: PyroModule, data: Data, device: torch.device) -> tuple[str, Tensor, float, float] | None:
    """The site whose data are farthest away: its name and data, the typical distance of both from the centre."""
    index = torch.linspace(0, len(data) - 1, min(len(data), _ROWS), device="cpu").round().long()
    observed, covariates = data.batch(index, device)
    few = torch.arange(_SIZE, device="cpu") % len(index)
    some, rows = ({name: value[few] for name, value in part.items()} for part in (covariates, observed))
    with defaults(model, {**some, **rows}) as place:
        run = trace(model, _SIZE, cast(some, *place), cast(rows, *place))
    refuse_weights(run)
    sites = sampled(run)
    names = [n for n in observed if not (sites[n]["fn"].support.is_discrete or is_masked_at_all(sites[n]))]
    runs: list[dict[str, Tensor]] = []
    for count in (_FIRST, _MORE):
        runs += [sample_prior(model, _SIZE, some) for _ in range(count)]
        found = [(name, observed[name].double(), *_distances(observed[name], runs, name)) for name in names]
        far = [one for one in found if one[2] > _FAR * one[3] > 0]
        if not far:
            return None
    return max(far, key=lambda one: one[2] / one[3])


def _distances(values: Tensor, runs: list[dict[str, Tensor]], name: str) -> tuple[float, float]:
    """Distances from the simulations' median that 1% of the entries exceed, of the data and of the simulations."""
    simulated = torch.stack([run[name] for run in runs]).double()
    centre = simulated.median()
    return _quantile(values.double() - centre), _quantile(simulated - centre)


def _quantile(differences: Tensor) -> float:
    ordered = differences.abs().flatten().sort().values
    return float(ordered[floor(_QUANTILE * (len(ordered) - 1))])


def _sentence(name: str, values: Tensor, ours: float, theirs: float) -> str:
    factor = ours / theirs
    digits = 10 ** floor(log10(factor))
    divisor = f"{digits * round(factor / digits):g}"
    if _LARGEST_PIXEL / factor < _FAR and _is_pixel(values):
        divisor = f"{_LARGEST_PIXEL} (they are whole numbers from 0 to {_LARGEST_PIXEL})"
    low, high = float(values.min()), float(values.max())
    return (
        f"the data of site {name!r} (from {low:.3g} to {high:.3g}) are {factor:.2g} times as far from the centre as "
        f"what the program simulates before training (up to {theirs:.2g}), which training seldom bridges: divide them "
        f"by {divisor}, or give the program a prior or a noise of their scale"
    )


def _is_pixel(values: Tensor) -> bool:
    return bool((values == values.round()).all() and values.min() >= 0 and values.max() <= _LARGEST_PIXEL)
