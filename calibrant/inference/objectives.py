"""The evidence lower bound, from traces of the model and the guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import functional_call

from calibrant.errors import ProgramError
from calibrant.program import LogDensity, Program, Values, defaults, density_of, is_local, sampled, seeded, trace


@dataclass(frozen=True)
class ElboTerms:
    """One draw's terms of the ELBO in nats: `local` has shape `(size,)`, `shared` `()`."""

    local: Tensor
    shared: Tensor

    def per_datum(self, total: int) -> Tensor:
        """The ELBO in nats per datum when these data are a minibatch of `total`: the local mean, and shared / total."""
        return self.local.mean() + self.shared / total


def guide_trace(guide: Program, observed: Values, size: int, covariates: Values) -> poutine.Trace:
    """One run of a guide."""
    return poutine.trace(guide).get_trace(observed, size, **covariates)


def latent_values(run: poutine.Trace) -> dict[str, Tensor]:
    """The values of a guide's latents."""
    return {name: site["value"] for name, site in sampled(run).items()}


def path_derivative(
    model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values
) -> ElboTerms:
    """ELBO whose gradient leaves out the score of q, so that its noise vanishes where q is the posterior.

    "Sticking the landing": Roeder, Wu & Duvenaud 2017, arXiv 1703.09194.
    """
    values = latent_values(guide_trace(guide, observed, size, covariates))
    weights = {name: tensor.detach() for name, tensor in guide.named_parameters()}

    def frozen(count: int) -> None:
        functional_call(guide, weights, (observed, count), dict(covariates))

    log_q = density_of(trace(frozen, size, {}, values), size, values)
    log_p = _model_density(model, values, observed, size, covariates)
    return ElboTerms(log_p.local - log_q.local, log_p.shared - log_q.shared)


def analytic_kl(model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values) -> ElboTerms:
    """ELBO with the closed-form Kullback–Leibler divergence of each site.

    Exact when the guide samples its sites in the model's order (then a site's prior depends on earlier draws alone).

    Raises:
        ProgramError: for a pair of families without a closed form, or another order.
    """
    guided = sampled(guide_trace(guide, observed, size, covariates))
    values = {name: site["value"] for name, site in guided.items()}
    run = trace(model, size, covariates, {**observed, **values})
    priors = {name: site for name, site in sampled(run).items() if name in guided}
    if list(priors) != list(guided):
        raise ProgramError(f"objective='kl' needs the guide in the model's order {list(priors)}, found {list(guided)}")
    likelihood = density_of(run, size, {**observed, **values}, observed).without(guided)
    local, shared = likelihood.local, likelihood.shared
    for name, site in guided.items():
        try:
            divergence = kl_divergence(site["fn"], priors[name]["fn"])
        except NotImplementedError as error:
            raise ProgramError(f"site {name!r}: no closed form of its KL divergence, use objective='stl'") from error
        if is_local(site):
            local = local - divergence
        else:
            shared = shared - divergence.sum()
    return ElboTerms(local, shared)


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
    """Refuse a guide that does not fit the model: other latents or shapes, a missing plate, dropout.

    Raises:
        ProgramError: naming the site, the shape found and the shape wanted.
    """
    size = len(next(iter(observed.values())))
    if dropout := [n for n, m in guide.named_modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0]:
        raise ProgramError(f"the guide has dropout {dropout}, which makes q a random density: leave it out")
    with torch.no_grad(), seeded(0), defaults(guide, observed):
        guided = sampled(guide_trace(guide, observed, size, covariates))
        latent = {n: s for n, s in sampled(trace(model, size, covariates, observed)).items() if n not in observed}
    if set(guided) != set(latent):
        raise ProgramError(f"the guide samples {sorted(guided)}, the model's latents are {sorted(latent)}")
    for name, site in guided.items():
        if is_local(site) != is_local(latent[name]):
            raise ProgramError(f"latent {name!r} is in the data plate of the model or of the guide, but not of both")
        if site["value"].shape != latent[name]["value"].shape:
            found, wanted = tuple(site["value"].shape), tuple(latent[name]["value"].shape)
            raise ProgramError(f"latent {name!r} has shape {found} in the guide, {wanted} in the model")
