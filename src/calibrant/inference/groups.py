"""Groups of a result tree that are computed from posterior draws: prior, predictive draws, log likelihood."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import torch
import xarray as xr
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.trees import SAMPLE, add_group, require_memory
from calibrant.program.contract import Values
from calibrant.program.density import density_of
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.program.simulation import refuse_weights, sample_prior
from calibrant.program.tracing import is_local, messages, sampled, trace
from calibrant.streams import stream

GROUPS = ("prior", "prior_predictive", "posterior_predictive", "log_likelihood")


def add_groups(tree: xr.DataTree, model: PyroModule, data: Data, groups: Iterable[str], seed: int) -> None:
    """Add the requested groups to a result tree, in place.

    `prior` and `prior_predictive` have as many draws as the posterior. `log_likelihood` (nats) is summed over the
    event.

    Raises:
        InferenceError: for an unknown group, or a group that would not fit into memory.
        ProgramError: for prior or predictive draws from a program with a factor or a scaled likelihood, or prior draws
            with an improper prior.
    """
    groups = list(groups)
    if unknown := set(groups) - set(GROUPS):
        raise InferenceError(f"unknown groups {sorted(unknown)}; known: {GROUPS}")
    if not groups:
        return
    observed, _ = data.tensors()
    pixels = sum(value.numel() for value in observed.values())
    draws = tree["posterior"].sizes["chain"] * tree["posterior"].sizes["draw"]
    if "prior_predictive" in groups or "posterior_predictive" in groups:
        require_memory(draws * pixels, "predictive draws")
    if {"prior", "prior_predictive"} & set(groups):
        _add_prior(tree, model, data, groups, draws, seed)
    if {"posterior_predictive", "log_likelihood"} & set(groups):
        _add_posterior(tree, model, data, groups, seed)


def _add_prior(tree: xr.DataTree, model: PyroModule, data: Data, groups: list[str], draws: int, seed: int) -> None:
    observed, covariates = data.tensors()
    first = _one_run(model, data)
    refuse_weights(first)
    simulated = [
        sample_prior(model, len(data), covariates, seed=stream(seed, "groups", "prior", draw)) for draw in range(draws)
    ]
    local = {name for name, site in messages(first).items() if is_local(site)}
    stacked = {name: torch.stack([values[name] for values in simulated])[None].cpu() for name in simulated[0]}
    latents = {name: value for name, value in stacked.items() if name not in observed}
    if "prior" in groups:
        add_group(tree, "prior", latents, model, SAMPLE, local)
    if "prior_predictive" in groups:
        add_group(tree, "prior_predictive", {name: stacked[name] for name in observed}, model, SAMPLE, local)


def _one_run(model: PyroModule, data: Data) -> Trace:
    first = data.subset(torch.arange(min(len(data), 2)))
    with torch.no_grad(), seeded(0), defaults(model, first.tensors()[0]) as (device, dtype):
        return trace(model, len(first), first.tensors(device, dtype)[1])


def _add_posterior(tree: xr.DataTree, model: PyroModule, data: Data, groups: list[str], seed: int) -> None:
    observed = list(data.tensors()[0])
    predicted, likelihood = [], []
    double = in_double(model)
    with (
        torch.no_grad(),
        seeded(stream(seed, "groups", "posterior predictive")),
        defaults(model, data.tensors()[0], torch.float64),
    ):
        for size, latents, rows, covariates in _each_draw(tree, model, data):
            if "posterior_predictive" in groups:
                run = trace(double, size, covariates, latents)
                refuse_weights(run)
                predicted.append({name: sampled(run)[name]["value"].float() for name in observed})
            if "log_likelihood" in groups:
                run = trace(double, size, covariates, {**latents, **rows})
                density = density_of(run, size, {**latents, **rows}, rows)
                likelihood.append({name: density[name] for name in observed})
    shape = (tree["posterior"].sizes["chain"], tree["posterior"].sizes["draw"])
    for name, parts in (("posterior_predictive", predicted), ("log_likelihood", likelihood)):
        if parts:
            stacked = {n: torch.stack([p[n] for p in parts]).cpu() for n in observed}
            shaped = {n: v.reshape(*shape, *v.shape[1:]) for n, v in stacked.items()}
            add_group(tree, name, shaped, model, SAMPLE, observed)


def _each_draw(tree: xr.DataTree, model: PyroModule, data: Data) -> Iterator[tuple[int, Values, Values, Values]]:
    """Yield (size, latents, observations, covariates) for each posterior draw, in float64."""
    posterior = tree["posterior"].dataset
    names = json.loads(posterior.attrs["latents"])
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    rows, covariates = data.batch(torch.arange(len(data), device="cpu"), device, torch.float64)
    for chain in range(posterior.sizes["chain"]):
        for draw in range(posterior.sizes["draw"]):
            values: dict[str, Tensor] = {
                name: torch.as_tensor(posterior[name].values[chain, draw], dtype=torch.float64, device=device)
                for name in names
            }
            yield len(data), values, rows, covariates
