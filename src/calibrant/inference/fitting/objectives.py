"""The evidence lower bound and other objectives, computed from traces of the model and the guide.

Local discrete latents with finitely many values are not drawn: the row of a datum is repeated for every combination of
their values, and the terms are averaged with weights q(values), so that terms and gradients are exact in these latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from calibrant.errors import InferenceError, ProgramError
from calibrant.guides.from_prior import PriorGuide
from calibrant.guides.many_draws import encoded_once
from calibrant.program.contract import Program, Values
from calibrant.program.density import LogDensity, density_of, likelihood_of
from calibrant.program.enumeration import ROWS, combinations
from calibrant.program.environment import cast, defaults, on_tensors, seeded
from calibrant.program.latents import Site
from calibrant.program.modules import settled_parts
from calibrant.program.tracing import TERM, guide_trace, is_local, latent_values, sampled, trace

KLWeights = Mapping[str, Tensor | float]  # local latent → weight of its divergence from the prior, 1 by default


@dataclass(frozen=True)
class ElboTerms:
    """Terms of the ELBO in nats: `local` has shape `(size,)`, and `shared` has shape `()`.

    `bound`, `(size,)`, is maximised in place of `local` by objectives other than the ELBO, and None for the ELBO.
    """

    local: Tensor
    shared: Tensor
    bound: Tensor | None = None

    def per_datum(self, total: int) -> Tensor:
        """The ELBO in nats per datum, if the data are a minibatch of `total`: mean of `local`, plus shared / total."""
        return self.local.mean() + self.shared / total

    def maximised(self, total: int) -> Tensor:
        """The objective in nats per datum, if the data are a minibatch of `total`."""
        return (self.local if self.bound is None else self.bound).mean() + self.shared / total


@dataclass(frozen=True)
class _Drawn:
    """Rows of data with a run of the guide, and their weights `(data, rows per datum)`; None for one row per datum."""

    observed: Values
    covariates: Values
    size: int
    run: Trace
    weights: Tensor | None = None

    @property
    def values(self) -> dict[str, Tensor]:
        return latent_values(self.run)

    def mean(self, terms: Tensor) -> Tensor:
        """Average terms `(rows,)` with the weights of each datum; returns `(data,)`."""
        if self.weights is None:
            return terms
        possible = self.weights > 0  # elsewhere the model's density may be zero too
        return (self.weights * torch.where(possible, terms.reshape(self.weights.shape), 0.0)).sum(1)


def _draw(guide: Program, observed: Values, size: int, covariates: Values) -> _Drawn:
    """Draw once per datum, or once for every combination of the values of its discrete latents.

    Raises:
        InferenceError: for discrete latents that cannot be summed out.
    """
    run = guide_trace(guide, observed, size, covariates)
    if discrete := _discrete(run):
        return _for_each_combination(guide, observed, size, covariates, run, combinations(discrete))
    return _Drawn(observed, covariates, size, run)


def _discrete(run: Trace) -> dict[str, Site]:
    """The discrete local latents of a guide."""
    found = {n: s for n, s in sampled(run).items() if is_local(s) and not s["fn"].has_rsample}
    found = {n: s for n, s in found.items() if s["fn"].support.is_discrete}
    return {n: Site(n, s["fn"].support, s["value"].shape[1:], s["fn"], True, (), ()) for n, s in found.items()}


def _for_each_combination(
    guide: Program, observed: Values, size: int, covariates: Values, first: Trace, table: Values
) -> _Drawn:
    """Repeat every row for all combinations of discrete values, and run the guide on these rows.

    Shared latents, and local ones that the guide draws before any discrete latent, keep the values of the first run, so
    that the weights of a datum sum to one. Later latents are drawn given the discrete values.
    """
    count = len(next(iter(table.values())))
    held: dict[str, Tensor] = {}
    for name, site in sampled(first).items():
        if name in table:
            held[name] = table[name].repeat(size, *[1] * (table[name].dim() - 1))
        elif not is_local(site):
            held[name] = site["value"]
        elif not set(table) & set(held):
            held[name] = site["value"].repeat_interleave(count, 0)
    observed, covariates = (_repeated(part, count) for part in (observed, covariates))
    run = guide_trace(guide, observed, size * count, covariates, held)
    log_weights = sum((sampled(run)[name][TERM] for name in table), torch.zeros(()))
    return _Drawn(observed, covariates, size * count, run, log_weights.reshape(size, count).exp())


def _repeated(values: Values, count: int) -> dict[str, Tensor]:
    return {name: value.repeat_interleave(count, 0) for name, value in values.items()}


def _reparameterized(run: Trace, summed_out: bool = False) -> Trace:
    """Refuse latents whose draws carry no gradient, except discrete latents that are summed out."""
    discrete = _discrete(run) if summed_out else {}
    _refuse_rough([n for n, site in sampled(run).items() if not site["fn"].has_rsample and n not in discrete])
    return run


def _refuse_rough(names: list[str]) -> None:
    if names:
        raise ProgramError(
            f"the guide's draws of {names} carry no gradient, so that q would not be trained: choose a family with "
            "reparameterized draws; discrete latents of a datum are summed out by objective='stl' alone"
        )


def _frozen(guide: PyroModule) -> Program:
    """The guide with detached weights, which get no gradient."""
    return on_tensors(guide, {name: tensor.detach() for name, tensor in guide.named_parameters()})


def _from_prior(
    model: Program, guide: PriorGuide, observed: Values, size: int, covariates: Values, particles: int = 1
) -> ElboTerms:
    """The terms where the guide is the model's own prior: log p(y | z), at draws z of one run of the model.

    log p(z) − log q(z) is zero, and so is its gradient, since both are one distribution with the same weights: the
    latents are left out, in place of two densities whose gradients differ where those of q are detached. With several
    draws, `bound` is log 1/K Σ p(y | z_k).

    Raises:
        ProgramError: for a latent whose draws carry no gradient while gradients are on, and for shared latents with
            several draws.
    """
    rows, cols = (_repeated(part, particles) for part in (observed, covariates))
    with encoded_once(guide, particles):
        run = trace(model, size * particles, cols, rows)
    latents = {name: site for name, site in sampled(run).items() if name not in observed}
    if torch.is_grad_enabled():
        _refuse_rough([name for name, site in latents.items() if not site["fn"].has_rsample])
    if particles > 1:
        _refuse_shared(latents)
    likelihood = likelihood_of(run, size * particles)
    local = likelihood.local.reshape(size, particles)
    bound = local.logsumexp(1) - log(particles) if particles > 1 else None
    return ElboTerms(local.mean(1), likelihood.shared, bound)


def _density_at(guide: Program, drawn: _Drawn, values: Values) -> LogDensity:
    run = guide_trace(guide, drawn.observed, drawn.size, drawn.covariates, values)
    return density_of(run, drawn.size, values)


_UNWEIGHTED: KLWeights = {}


def path_derivative(
    model: Program,
    guide: PyroModule,
    observed: Values,
    size: int,
    covariates: Values,
    kl_weights: KLWeights = _UNWEIGHTED,
) -> ElboTerms:
    """The ELBO with a gradient that omits the score of q, so that its noise vanishes where q is the posterior.

    "Sticking the landing": Roeder, Wu & Duvenaud 2017, arXiv 1703.09194. Local discrete latents are summed out. With
    `kl_weights`, `bound` has the weighted objective, and `local` the ELBO.

    Raises:
        ProgramError: for a latent whose draws carry no gradient.
        InferenceError: for discrete latents with too many values to be summed out.
    """
    if isinstance(guide, PriorGuide):
        return _from_prior(model, guide, observed, size, covariates)
    drawn = _draw(guide, observed, size, covariates)
    _reparameterized(drawn.run, summed_out=True)
    return _elbo(model, drawn, _density_at(_frozen(guide), drawn, drawn.values), kl_weights)


def _elbo(model: Program, drawn: _Drawn, log_q: LogDensity, kl_weights: KLWeights) -> ElboTerms:
    log_p = _model_density(model, drawn.values, drawn.observed, drawn.size, drawn.covariates)
    terms = ElboTerms(drawn.mean(log_p.local - log_q.local), log_p.shared - log_q.shared)
    return _weighted_kl(terms, {name: drawn.mean(log_q[name] - log_p[name]) for name in kl_weights}, kl_weights)


def _weighted_kl(terms: ElboTerms, divergences: Values, kl_weights: KLWeights) -> ElboTerms:
    """The terms, with the objective of weighted divergences `(size,)`, if there are any, as their `bound`."""
    if not kl_weights:
        return terms
    more = sum(((weight - 1) * divergences[name] for name, weight in kl_weights.items()), torch.zeros(()))
    return replace(terms, bound=terms.local - more)


def analytic_kl(
    model: Program,
    guide: PyroModule,
    observed: Values,
    size: int,
    covariates: Values,
    kl_weights: KLWeights = _UNWEIGHTED,
) -> ElboTerms:
    """The ELBO with the closed-form Kullback–Leibler divergence of each site.

    The guide has to sample its sites in the order of the model, so that a prior depends only on earlier draws. With
    `kl_weights`, `bound` has the weighted objective, and `local` the ELBO.

    Raises:
        ProgramError: for distributions without a closed form, another order of the sites, or a latent whose draws carry
            no gradient.
    """
    if isinstance(guide, PriorGuide):
        return _from_prior(model, guide, observed, size, covariates)
    guided = sampled(_reparameterized(guide_trace(guide, observed, size, covariates)))
    values = {name: site["value"] for name, site in guided.items()}
    run = trace(model, size, covariates, {**observed, **values})
    priors = {name: site for name, site in sampled(run).items() if name in guided}
    if list(priors) != list(guided):
        raise ProgramError(f"objective='kl' needs the guide in the model's order {list(priors)}, found {list(guided)}")
    likelihood = density_of(run, size, {**observed, **values}, observed).without(guided)
    local, shared, divergences = likelihood.local, likelihood.shared, {}
    for name, site in guided.items():
        try:
            divergences[name] = divergence = kl_divergence(site["fn"], priors[name]["fn"])
        except NotImplementedError as error:
            raise ProgramError(f"site {name!r}: no closed form of its KL divergence, use objective='stl'") from error
        if is_local(site):
            local = local - divergence
        else:
            shared = shared - divergence.sum()
    return _weighted_kl(ElboTerms(local, shared), divergences, kl_weights)


def importance_weighted(
    model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values, particles: int = 8
) -> ElboTerms:
    """The bound log 1/K Σ p/q of K draws per datum, with its plain reparameterized gradient.

    IWAE: Burda, Grosse & Salakhutdinov 2016, arXiv 1509.00519, equation 8. `local` is the ELBO from the same draws.

    Raises:
        ProgramError: for shared latents, or a latent whose draws carry no gradient.
    """
    if isinstance(guide, PriorGuide):
        return _from_prior(model, guide, observed, size, covariates, particles)
    drawn = _particles(guide, observed, size, covariates, particles)
    log_weights = _log_weights(model, drawn, drawn.values, density_of(drawn.run, drawn.size, drawn.values), size)
    return ElboTerms(log_weights.mean(1), log_weights.new_zeros(()), log_weights.logsumexp(1) - log(particles))


def doubly_reparameterized(
    model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values, particles: int = 8
) -> ElboTerms:
    """The bound of `importance_weighted` with a gradient of the guide whose relative noise does not grow with K.

    DReG: Tucker, Lawson, Gu & Maddison 2019, arXiv 1810.04152, equation 8. The gradient of the guide follows only the
    paths through the draws, with the squares of the normalised weights; the gradient of the model is that of the bound.

    Raises:
        ProgramError: for shared latents, or a latent whose draws carry no gradient.
    """
    drawn = _particles(guide, observed, size, covariates, particles)
    # The hooks are on copies, so that a draw on which later draws of the guide depend is weighted once.
    values = {name: value.clone() for name, value in drawn.values.items()}
    log_weights = _log_weights(model, drawn, values, _density_at(_frozen(guide), drawn, values), size)
    shares = log_weights.detach().softmax(1)
    for value in values.values():
        if value.requires_grad:
            value.register_hook(partial(_weighted, shares.flatten()))
    bound = log_weights.detach().logsumexp(1) - log(particles)
    surrogate = (shares * log_weights).sum(1)
    return ElboTerms(log_weights.mean(1), log_weights.new_zeros(()), bound + surrogate - surrogate.detach())


def _weighted(shares: Tensor, gradient: Tensor) -> Tensor:
    """Multiply the gradient of every row `(rows, *event)` by its normalised weight `(rows,)`."""
    return shares.to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1)) * gradient


def _particles(guide: PyroModule, observed: Values, size: int, covariates: Values, particles: int) -> _Drawn:
    """Repeat every row `particles` times, and draw once per row."""
    observed, covariates = (_repeated(part, particles) for part in (observed, covariates))
    run = _reparameterized(guide_trace(guide, observed, size * particles, covariates))
    _refuse_shared(sampled(run))
    return _Drawn(observed, covariates, size * particles, run)


def _refuse_shared(latents: Mapping[str, Any]) -> None:
    if shared := [name for name, site in latents.items() if not is_local(site)]:
        raise ProgramError(
            f"latents {shared} are shared: a draw of them has one weight for all data together, not one per datum, so "
            "that 'iwae' and 'dreg' would weight minibatches by chance: use objective='stl'"
        )


def _log_weights(model: Program, drawn: _Drawn, values: Values, log_q: LogDensity, size: int) -> Tensor:
    log_p = _model_density(model, values, drawn.observed, drawn.size, drawn.covariates)
    return (log_p.local - log_q.local).reshape(size, -1)


OBJECTIVES: dict[str, Callable[..., ElboTerms]] = {
    "stl": path_derivative,
    "kl": analytic_kl,
    "iwae": importance_weighted,
    "dreg": doubly_reparameterized,
}
MULTI_SAMPLE = ("iwae", "dreg")


@torch.no_grad()
def elbo_terms(
    model: Program,
    guide: Program,
    observed: Values,
    size: int,
    covariates: Values,
    kl_weights: KLWeights = _UNWEIGHTED,
) -> ElboTerms:
    """The Monte Carlo ELBO from one draw per datum; discrete latents are summed out where possible.

    With `kl_weights`, `bound` has the weighted objective.
    """
    if isinstance(guide, PriorGuide):
        return _from_prior(model, guide, observed, size, covariates)
    run = guide_trace(guide, observed, size, covariates)
    drawn = _Drawn(observed, covariates, size, run)
    if discrete := _discrete(run):
        try:
            table = combinations(discrete)
        except InferenceError:  # too many values to sum over: they are drawn instead
            return _elbo(model, drawn, density_of(run, size, drawn.values), kl_weights)
        count = len(next(iter(table.values())))
        if size > 1 and size * count > ROWS:
            return _in_halves(model, guide, observed, size, covariates, kl_weights)
        drawn = _for_each_combination(guide, observed, size, covariates, run, table)
    return _elbo(model, drawn, density_of(drawn.run, drawn.size, drawn.values), kl_weights)


def _in_halves(
    model: Program, guide: Program, observed: Values, size: int, covariates: Values, kl_weights: KLWeights
) -> ElboTerms:
    """`elbo_terms` in halves of the data, to bound the memory; each half has its own draw of shared latents."""
    halves = []
    for part in (slice(0, size // 2), slice(size // 2, size)):
        rows, cols = ({name: value[part] for name, value in values.items()} for values in (observed, covariates))
        halves.append(elbo_terms(model, guide, rows, part.stop - part.start, cols, kl_weights))
    bounds = [h.bound for h in halves if h.bound is not None]
    return ElboTerms(
        torch.cat([h.local for h in halves]),
        torch.stack([h.shared for h in halves]).mean(),
        torch.cat(bounds) if bounds else None,
    )


def _model_density(model: Program, values: Values, observed: Values, size: int, covariates: Values) -> LogDensity:
    held = {**observed, **values}
    return density_of(trace(model, size, covariates, held), size, held, observed)


def check_objective(objective: str, model: PyroModule, guide: PyroModule, observed: Values, covariates: Values) -> None:
    """Refuse an objective that is unknown, or that cannot be evaluated for this model and guide.

    Raises:
        InferenceError: for an unknown name.
        ProgramError: if the objective raises it, or for several rows per datum where a likelihood takes its noise from
            the errors of a minibatch.
    """
    if objective not in OBJECTIVES:
        raise InferenceError(f"unknown objective {objective!r}; known: {sorted(OBJECTIVES)}")
    if isinstance(guide, PriorGuide) and objective == "dreg":
        raise InferenceError(
            "objective='dreg' is for a guide with weights of its own: a guide that is the model's prior takes "
            "objective='iwae', whose gradient has no score"
        )
    size = len(next(iter(observed.values())))
    with torch.no_grad(), seeded(0), defaults(model, observed) as place:
        rows, cols = cast(observed, *place), cast(covariates, *place)
        if settled := list(settled_parts(model)):
            _check_one_row(settled[0], objective, guide_trace(guide, rows, size, cols))
        OBJECTIVES[objective](model, guide, rows, size, cols)


def _check_one_row(likelihood: str, objective: str, guided: Trace) -> None:
    start = f"the noise scale of {likelihood!r} is the error of a minibatch with one draw per datum"
    remedy = "the likelihood 'gaussian', whose scale is learned"
    if objective in MULTI_SAMPLE:
        raise ProgramError(
            f"{start}, and objective={objective!r} weights several: use objective='stl' or 'kl', or {remedy}"
        )
    if discrete := list(_discrete(guided)):
        raise ProgramError(f"{start}, and the values of {discrete} are summed out in several: use {remedy}")
