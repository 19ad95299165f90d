"""Noise scales that are computed from the training data: where a model has them, and what they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import ProgramError, warn
from calibrant.inference.fitting.state import Modules
from calibrant.program.contract import Values
from calibrant.program.environment import defaults, seeded
from calibrant.program.modules import is_frozen, settled_parts
from calibrant.program.supports import undressed
from calibrant.program.tracing import guide_trace, latent_values, sampled, trace
from calibrant.program.weighting import is_masked_at_all
from calibrant.streams import stream

_ROWS = 4096  # number of data that are run together
_LATE = 1.2  # a learned scale is late if it is so many times the best one, or so many times smaller
Parts = dict[str, Any]  # modules by their path in the model


def start_noise(modules: Modules, data: Data, seed: int) -> None:
    """Tell the modules that take their first noise scale from the data the variance of every entry.

    A model or module whose weights are frozen keeps its scale.

    Raises:
        ProgramError: for a module that is also told the errors, and whose distribution is not that of one observed site
            without a mask.
    """
    waiting = {name: part for name, part in modules.model.named_modules() if not getattr(part, "is_started", True)}
    parts = {name: part for name, part in waiting.items() if not is_frozen(part)}
    if not parts or is_frozen(modules.model):
        return
    with torch.no_grad(), seeded(stream(seed, "fit", "first noise")), defaults(modules, data.batch([0])[0]):
        observed, covariates = data.batch(torch.arange(min(len(data), 2), device="cpu"), modules.device)
        with _watched(parts) as outputs:
            run = trace(modules.model, len(next(iter(observed.values()))), covariates, observed)
        sites = _started_sites(outputs, run, observed, settled_parts(modules.model))
        centres = _mean(data, modules.device, lambda rows, _: {name: rows[name] for name in sites.values()})
        variances = _mean(
            data, modules.device, lambda rows, _: {n: (rows[n].double() - c).square() for n, c in centres.items()}
        )
        for name, site in sites.items():
            parts[name].start_noise(variances[site])


def _started_sites(outputs: dict[str, list[Any]], run: Trace, observed: Values, settled: Parts) -> dict[str, str]:
    """The sites from which modules take their first scale; a learned scale without such a site keeps its own."""
    sites = {}
    for name, found in outputs.items():
        try:
            sites[name] = _site_of(name, found, run, observed)
        except ProgramError:
            if name in settled:
                raise
    return sites


def settle_noise(modules: Modules, parts: Parts, data: Data, seed: int) -> None:
    """Tell modules the mean squared error of every entry of the data."""
    if parts:
        with seeded(seed):
            for name, squares in mean_squares(modules, parts, data).items():
                parts[name].settle_noise(squares)


def noise_of(model: PyroModule) -> dict[str, float]:
    """The root mean square of every noise scale that is learned or measured, in data units, by column of the history.

    The column is `noise`, or `noise of PATH` where there are several.
    """
    found = {name: part.scale.detach().square().mean().sqrt().item() for name, part in _noisy(model).items()}
    return {"noise" if len(found) == 1 else f"noise of {name}": scale for name, scale in found.items()}


def _noisy(model: PyroModule) -> Parts:
    """The likelihoods with a noise scale that a training changes."""
    parts = {name: part for name, part in model.named_modules() if hasattr(part, "noise_sd")}
    scales = {name: getattr(part, "scale", None) for name, part in parts.items()}
    settled = settled_parts(model)
    return {n: parts[n] for n, s in scales.items() if isinstance(s, Tensor) and (s.requires_grad or n in settled)}


def warn_of_late_noise(modules: Modules, data: Data, seed: int) -> None:
    """Warn if a learned noise scale has not reached the error of the training data, of which some are looked at."""
    parts = {name: part for name, part in _noisy(modules.model).items() if hasattr(part, "optimal_scale")}
    index = torch.linspace(0, len(data) - 1, min(len(data), _ROWS), device="cpu").round().long()
    try:
        with seeded(seed):
            errors = mean_squares(modules, parts, data.subset(index)) if parts else {}
    except ProgramError:  # its entries are masked, or it is the noise of several sites
        return
    for name, squares in errors.items():
        scales = parts[name].scale.detach(), parts[name].optimal_scale(squares)
        ours, best = (scale.double().square().mean().sqrt().item() for scale in scales)
        if best > 0 and abs(log(ours / best)) > log(_LATE):
            warn(
                f"the noise scale of {name!r} is {ours:.3g} after the training, where {best:.3g} fits the errors of "
                f"the training data: train for longer, give {best:.2g} as its first value, or use the likelihood "
                "'gaussian-optimal'",
                UserWarning,
            )


@torch.no_grad()
def mean_squares(modules: Modules, parts: Parts, data: Data) -> dict[str, Tensor]:
    """For each module, the mean squared error of the entries of its site, with one draw of the guide per datum."""

    def squares(observed: Values, covariates: Values) -> dict[str, Tensor]:
        size = len(next(iter(observed.values())))
        with _watched(parts) as outputs:
            values = latent_values(guide_trace(modules.guide, observed, size, covariates))
            run = trace(modules.model, size, covariates, {**observed, **values})
        sites = {name: sampled(run)[_site_of(name, found, run, observed)] for name, found in outputs.items()}
        return {name: (site["value"] - site["fn"].mean).double().square() for name, site in sites.items()}

    return _mean(data, modules.device, squares)


def _mean(
    data: Data, device: torch.device, function: Callable[[Values, Values], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The mean over the data of a function of (observed, covariates), in float64."""
    sums: dict[str, Tensor] = {}
    for index in torch.arange(len(data), device="cpu").split(_ROWS):
        for name, values in function(*data.batch(index, device)).items():
            sums[name] = values.double().sum(0) + sums.get(name, 0.0)
    return {name: total / len(data) for name, total in sums.items()}


@contextmanager
def _watched(parts: Parts) -> Iterator[dict[str, list[Any]]]:
    """Collect what modules return."""
    outputs: dict[str, list[Any]] = {name: [] for name in parts}

    def collector(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs[name].append(output)

    hooks = [module.register_forward_hook(collector(name)) for name, module in parts.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _site_of(part: str, outputs: list[Any], run: Trace, observed: Values) -> str:
    """The observed site whose distribution a module returned."""
    known = [_storage(output) for output in outputs]
    found = [name for name in observed if (kept := _storage(sampled(run)[name]["fn"]))[1] and kept in known]
    if len(found) != 1:
        raise ProgramError(
            f"{part!r} computes its noise scale from the errors of one observed site, but what it returns is the "
            f"distribution of {found or 'none of them'}: pass it to pyro.sample of one observed site, or use the "
            "likelihood 'gaussian', whose scale is learned"
        )
    if is_masked_at_all(sampled(run)[found[0]]):
        raise ProgramError(
            f"{part!r} computes its noise scale from all entries of {found[0]!r}, but some are masked: use the "
            "likelihood 'gaussian', whose scale is learned"
        )
    return found[0]


def _storage(fn: Any) -> tuple[type, list[int]]:
    """What stays the same of a distribution when a plate expands it: its class, and where its parameters lie.

    Parameters are those that the class names, or all its tensors if it names none.
    """
    plain = undressed(fn)
    tensors = {name: value for name, value in vars(plain).items() if isinstance(value, Tensor)}
    return type(plain), [
        tensors[name].data_ptr() for name in (plain.arg_constraints or sorted(tensors)) if name in tensors
    ]
