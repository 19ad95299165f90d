"""Runs of a program or a guide with some of its sites fixed at given values, and access to the sites of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from calibrant.calls import parameters_in_modules
from calibrant.errors import DataError, ProgramError
from calibrant.program.contract import PLATE, Program, Values
from calibrant.program.normal_density import log_prob
from calibrant.program.supports import anywhere, innermost, is_improper, layers, single_entry


def latent_values(run: Trace) -> dict[str, Tensor]:
    """Values of the latents in a run of a guide, by site."""
    return {name: site["value"] for name, site in sampled(run).items()}


TERM = "calibrant.log_prob"  # key of a Pyro message under which its log density is stored


class Hold(Messenger):
    """Fixes sites at given values, and starts sites with improper priors at U(−2, 2) in unconstrained space.

    Draws are converted to the default dtype, since a prior that was built in `__init__` draws in the dtype that was the
    default then. If `size` is given, log densities are computed while the program runs: a distribution may contain
    modules (a flow, for example), whose weights change back when a functional call ends.
    """

    def __init__(
        self, values: Values, size: int | None = None, score_draws: bool = False, latent: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.values, self.size, self.score_draws, self.latent = values, size, score_draws, latent

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_deterministic(msg) or is_factor(msg):
            return
        fn = msg["fn"]
        if msg["name"] in self.values:
            msg["value"] = _as_drawn(fn, self.values[msg["name"]])
            msg["is_observed"] = msg["name"] not in self.latent
        elif msg["value"] is None and is_improper(fn):
            msg["value"] = anywhere(fn)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["value"].is_floating_point():
            msg["value"] = msg["value"].to(torch.get_default_dtype())
        wanted = self.score_draws or is_factor(msg) or msg["name"] in self.values
        if self.size is not None and wanted and not is_deterministic(msg) and not site_is_subsample(msg):
            msg[TERM] = site_log_prob(msg["name"], msg, self.size)


def _as_drawn(fn: Any, value: Tensor) -> Tensor:
    """A given value in the dtype that the site draws: integers for classes, floating point for all other sites."""
    if isinstance(single_entry(fn), dist.Categorical):
        return value.long()
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    mapped = any(isinstance(layer, dist.TransformedDistribution) for layer in layers(fn))
    return value.view_as(value) if mapped else value  # a flow of Pyro remembers the tensor, under whatever weights


def trace(program: Program, size: int, covariates: Values | None = None, values: Values | None = None) -> Trace:
    """Run the program once with the sites in `values` fixed; all other sites are drawn."""
    return traced(Hold(values or {}, size), program, size, **(covariates or {}))


def guide_trace(guide: Program, observed: Values, size: int, covariates: Values, values: Values | None = None) -> Trace:
    """Run a guide once with the sites in `values` fixed, and store the log densities that `density_of` reads."""
    return traced(Hold(values or {}, size, score_draws=True), guide, observed, size, **covariates)


def traced(held: Messenger, program: Program, *args: Any, **kwargs: Any) -> Trace:
    """Run a program or guide with some sites held: all runs are made here, so that no parameter leaves its module."""
    with parameters_in_modules(), held, poutine.trace() as tracer:
        program(*args, **kwargs)
    return tracer.get_trace()


def sampled(run: Trace) -> dict[str, Any]:
    """The sample sites of a trace; plates, deterministic sites and factors are not among them."""
    return {n: s for n, s in messages(run).items() if not is_deterministic(s) and not is_factor(s)}


def deterministic(run: Trace) -> dict[str, Any]:
    """The `pyro.deterministic` sites of a trace."""
    return {n: s for n, s in messages(run).items() if is_deterministic(s)}


def factors(run: Trace) -> dict[str, Any]:
    """The `pyro.factor` sites of a trace."""
    return {n: s for n, s in messages(run).items() if is_factor(s)}


def messages(run: Trace) -> dict[str, Any]:
    """All sites of a trace: sample sites, deterministic sites and factors, without plates."""
    return {n: s for n, s in run.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}


def is_local(site: Mapping[str, Any]) -> bool:
    """Whether a site lies in the data plate."""
    return any(frame.name == PLATE for frame in site["cond_indep_stack"])


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a site is a `pyro.factor`."""
    return isinstance(innermost(site["fn"]), dist.Unit)


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site is a `pyro.deterministic`, or one that `poutine.reparam` computes from others."""
    fn = site["fn"]
    return site["is_observed"] and isinstance(fn, dist.MaskedDistribution) and isinstance(innermost(fn), dist.Delta)


def site_log_prob(name: str, site: Mapping[str, Any], size: int) -> Tensor:
    fn, value = site["fn"], site["value"]
    if is_local(site) and fn.batch_shape != (size,):
        raise batch_error(name, site, size)
    if not is_factor(site) and value.shape != fn.shape():
        raise DataError(f"site {name!r} has a value of shape {tuple(value.shape)}, wanted {tuple(fn.shape())}")
    try:
        term = log_prob(fn, value)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"site {name!r}: {type(innermost(fn)).__name__} can't take this value ({reason})") from error
    term = dist.util.scale_and_mask(term, site["scale"], site["mask"])
    if not is_local(site):
        return term.sum()
    if term.shape != (size,):
        raise ProgramError(
            f"the mask or scale around site {name!r} makes its density {tuple(term.shape)}, wanted ({size},): mask "
            "single entries of a datum with .mask(...) before .to_event(...)"
        )
    return term


def batch_error(name: str, site: Mapping[str, Any], size: int) -> ProgramError:
    """The error for a local site whose batch shape is not `(size,)`."""
    found = tuple(site["fn"].batch_shape)
    if len(found) < 2:
        return ProgramError(
            f'site {name!r} has batch shape {found} for {size} data: write pyro.plate("{PLATE}", size); minibatches '
            "are taken by the library, never by subsample_size"
        )
    event = f"end its distribution with .to_event({len(found) - 1})"
    remedy = "sum its log factor over them" if is_factor(site) else event
    return ProgramError(
        f"site {name!r} has batch shape {found}, wanted ({size},): the dimensions beyond the data belong to the event, "
        f"so {remedy}"
    )
