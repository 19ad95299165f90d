"""The evidence lower bound, from traces of the model and the guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from calibrant.errors import ProgramError
from calibrant.guides import CollapsedGuide
from calibrant.program import (
    LogDensity,
    Program,
    Values,
    cast,
    defaults,
    density_of,
    few,
    guide_trace,
    in_double,
    is_local,
    sampled,
    seeded,
    trace,
)
from calibrant.refusals import DATA_COMPARED, check_independence, check_modules, check_site, inside, running


@dataclass(frozen=True)
class ElboTerms:
    """One draw's terms of the ELBO in nats: `local` has shape `(size,)`, `shared` `()`."""

    local: Tensor
    shared: Tensor

    def per_datum(self, total: int) -> Tensor:
        """The ELBO in nats per datum when these data are a minibatch of `total`: the local mean, and shared / total."""
        return self.local.mean() + self.shared / total


def latent_values(run: Trace) -> dict[str, Tensor]:
    """The values of a guide's latents."""
    return {name: site["value"] for name, site in sampled(run).items()}


def path_derivative(model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values) -> ElboTerms:
    """ELBO whose gradient leaves out the score of q, so that its noise vanishes where q is the posterior.

    "Sticking the landing": Roeder, Wu & Duvenaud 2017, arXiv 1703.09194.

    Raises:
        ProgramError: for a latent whose draws carry no gradient.
    """
    values = latent_values(_reparameterized(guide_trace(guide, observed, size, covariates)))
    weights = {name: tensor.detach() for name, tensor in guide.named_parameters()}

    def frozen(count: int) -> None:
        functional_call(guide, weights, (observed, count), dict(covariates))

    log_q = density_of(trace(frozen, size, {}, values), size, values)
    log_p = _model_density(model, values, observed, size, covariates)
    return ElboTerms(log_p.local - log_q.local, log_p.shared - log_q.shared)


def _reparameterized(run: Trace) -> Trace:
    if rough := [name for name, site in sampled(run).items() if not site["fn"].has_rsample]:
        raise ProgramError(
            f"the guide's draws of {rough} carry no gradient, so that q would not be trained: choose a family with "
            "reparameterized draws, or sum discrete latents out of the model"
        )
    return run


def analytic_kl(model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values) -> ElboTerms:
    """ELBO with the closed-form Kullback–Leibler divergence of each site.

    Exact when the guide samples its sites in the model's order (then a site's prior depends on earlier draws alone).

    Raises:
        ProgramError: for a pair of families without a closed form, a mask or scale around a latent, another order, or a
            latent whose draws carry no gradient.
    """
    guided = sampled(_reparameterized(guide_trace(guide, observed, size, covariates)))
    values = {name: site["value"] for name, site in guided.items()}
    run = trace(model, size, covariates, {**observed, **values})
    priors = {name: site for name, site in sampled(run).items() if name in guided}
    if list(priors) != list(guided):
        raise ProgramError(f"objective='kl' needs the guide in the model's order {list(priors)}, found {list(guided)}")
    likelihood = density_of(run, size, {**observed, **values}, observed).without(guided)
    local, shared = likelihood.local, likelihood.shared
    for name, site in guided.items():
        if _is_weighted(site) or _is_weighted(priors[name]):
            raise ProgramError(f"site {name!r} is masked or scaled, use objective='stl'")
        try:
            divergence = kl_divergence(site["fn"], priors[name]["fn"])
        except NotImplementedError as error:
            raise ProgramError(f"site {name!r}: no closed form of its KL divergence, use objective='stl'") from error
        if is_local(site):
            local = local - divergence
        else:
            shared = shared - divergence.sum()
    return ElboTerms(local, shared)


def _is_weighted(site: Mapping[str, Any]) -> bool:
    """Whether a mask or scale lies around a site."""
    return isinstance(site["scale"], Tensor) or site["scale"] != 1 or site["mask"] is not None


OBJECTIVES: dict[str, Callable[..., ElboTerms]] = {"stl": path_derivative, "kl": analytic_kl}


@torch.no_grad()
def elbo_terms(model: Program, guide: Program, observed: Values, size: int, covariates: Values) -> ElboTerms:
    """The plain Monte Carlo ELBO of one draw a datum."""
    run = guide_trace(guide, observed, size, covariates)
    values = latent_values(run)
    log_q = density_of(run, size, values)
    log_p = _model_density(model, values, observed, size, covariates)
    return ElboTerms(log_p.local - log_q.local, log_p.shared - log_q.shared)


def _model_density(model: Program, values: Values, observed: Values, size: int, covariates: Values) -> LogDensity:
    held = {**observed, **values}
    return density_of(trace(model, size, covariates, held), size, held, observed)


def check_guide(model: PyroModule, guide: PyroModule, observed: Values, covariates: Values) -> None:
    """Refuse a guide that does not fit the model: other latents, shapes or supports, a missing plate, dropout, and what
    mixes data.

    Raises:
        ProgramError: naming the site, the shape found and the shape wanted.
    """
    try:
        _check_guide(model, guide, observed, covariates)
    except ProgramError as error:
        raise ProgramError(f"the guide: {error}") from error


def _check_guide(model: PyroModule, guide: PyroModule, observed: Values, covariates: Values) -> None:
    if dropout := [n for n, m in guide.named_modules() if isinstance(m, _DropoutNd) and m.p > 0]:
        raise ProgramError(f"it has dropout {dropout}, which makes q a random density: leave it out")
    check_modules(guide)
    for module in guide.modules():
        if isinstance(module, CollapsedGuide):
            module.require_model(model)
    size = len(next(iter(observed.values())))
    with torch.no_grad(), seeded(0), defaults(guide, observed) as place:
        rows, cols = cast(observed, *place), cast(covariates, *place)
        with running(guide, f"it does not run for {size} data"):
            guided = guide_trace(guide, rows, size, cols)
        latent = {n: s for n, s in sampled(trace(model, size, cols, rows)).items() if n not in observed}
    found = sampled(guided)
    if set(found) != set(latent):
        raise ProgramError(f"it samples {sorted(found)}, the model's latents are {sorted(latent)}")
    for name, site in found.items():
        _check_latent(name, site, latent[name], size)
    if all(is_local(site) for site in found.values()):
        _check_mixing(guide, observed, covariates)


def _check_latent(name: str, site: Mapping[str, Any], wanted: Mapping[str, Any], size: int) -> None:
    if is_local(site) != is_local(wanted):
        raise ProgramError(f"latent {name!r} is in the data plate of the model or of the guide, but not of both")
    check_site(name, site, size)
    if _is_weighted(site) != _is_weighted(wanted):
        raise ProgramError(f"latent {name!r} is masked or scaled in the model or in the guide, but not in both")
    if site["value"].shape != wanted["value"].shape:
        shapes = tuple(site["value"].shape), tuple(wanted["value"].shape)
        raise ProgramError(f"latent {name!r} has shape {shapes[0]}, in the model {shapes[1]}")
    if not inside(wanted["fn"], site["value"]).all():
        raise ProgramError(
            f"latent {name!r} is drawn outside the model's support {wanted['fn'].support}: choose a family on that "
            "support"
        )


def _check_mixing(guide: PyroModule, observed: Values, covariates: Values) -> None:
    """A guide whose density of one datum depends on others would give other draws here than in training."""
    double = in_double(guide)

    def program(size: int, **given: Tensor) -> None:
        double({n: given[n] for n in observed}, size, **{n: given[n] for n in covariates})

    check_independence(guide, program, {}, few({**observed, **covariates}, DATA_COMPARED))
