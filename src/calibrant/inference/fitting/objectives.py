"""The evidence lower bound and what is optimised in its place, from traces of the model and the guide.

Discrete latents of a datum whose values are finite are not drawn: the datum's row is repeated once per combination of
their values, and the terms are averaged with the weights q(values), so that they and their gradients are exact in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log

import torch
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import functional_call

from calibrant.errors import InferenceError, ProgramError
from calibrant.program.contract import Program, Values
from calibrant.program.density import LogDensity, density_of
from calibrant.program.enumeration import combinations
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import Site
from calibrant.program.supports import is_masked
from calibrant.program.tracing import TERM, guide_trace, is_local, is_weighted, latent_values, sampled, trace

_ROWS = 65_536  # of a run in which discrete latents are summed out


@dataclass(frozen=True)
class ElboTerms:
    """Terms of the ELBO in nats: `local` has shape `(size,)`, `shared` `()`.

    `bound`, `(size,)`, is what an objective maximises in place of `local`, where that is another bound.
    """

    local: Tensor
    shared: Tensor
    bound: Tensor | None = None

    def per_datum(self, total: int) -> Tensor:
        """The ELBO in nats per datum when these data are a minibatch of `total`: the local mean, and shared / total."""
        return self.local.mean() + self.shared / total

    def maximised(self, total: int) -> Tensor:
        """As `per_datum`, of what the objective maximises."""
        return (self.local if self.bound is None else self.bound).mean() + self.shared / total


@dataclass(frozen=True)
class _Drawn:
    """Rows of data with the guide's latents for each, and the rows' weights `(data, rows a datum)`; None for one."""

    observed: Values
    covariates: Values
    size: int
    run: Trace
    weights: Tensor | None = None

    @property
    def values(self) -> dict[str, Tensor]:
        return latent_values(self.run)

    def mean(self, terms: Tensor) -> Tensor:
        """Terms `(rows,)`, averaged with the weights of each datum, `(data,)`."""
        if self.weights is None:
            return terms
        possible = self.weights > 0  # elsewhere the model's density may be zero too
        return (self.weights * torch.where(possible, terms.reshape(self.weights.shape), 0.0)).sum(1)


def _draw(guide: Program, observed: Values, size: int, covariates: Values) -> _Drawn:
    """One draw a datum, or one for every combination of its discrete latents.

    Raises:
        InferenceError: for discrete latents that can't be summed out.
    """
    run = guide_trace(guide, observed, size, covariates)
    if discrete := _discrete(run):
        return _for_each_combination(guide, observed, size, covariates, run, combinations(discrete))
    return _Drawn(observed, covariates, size, run)


def _discrete(run: Trace) -> dict[str, Site]:
    """The discrete local latents of a guide.

    Raises:
        ProgramError: for one that is masked, so that its density is no longer the weight of its values.
    """
    found = {n: s for n, s in sampled(run).items() if is_local(s) and not s["fn"].has_rsample}
    found = {n: s for n, s in found.items() if s["fn"].support.is_discrete}
    if masked := [name for name, site in found.items() if is_weighted(site) or is_masked(site["fn"])]:
        raise ProgramError(f"the guide's discrete site {masked[0]!r} is masked or scaled: mask the model's term alone")
    return {n: Site(n, s["fn"].support, s["value"].shape[1:], s["fn"], True, (), ()) for n, s in found.items()}


def _for_each_combination(
    guide: Program, observed: Values, size: int, covariates: Values, first: Trace, table: Values
) -> _Drawn:
    """Every row repeated for all combinations of discrete values, with what was drawn before them kept.

    Shared latents, and local ones that the guide draws before any discrete one, have the values of the first run: then
    the weights of a datum sum to one. What comes after is drawn given the discrete values.
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
    """Refuse draws without gradient, other than those that are summed out."""
    discrete = _discrete(run) if summed_out else {}
    if rough := [n for n, site in sampled(run).items() if not site["fn"].has_rsample and n not in discrete]:
        raise ProgramError(
            f"the guide's draws of {rough} carry no gradient, so that q would not be trained: choose a family with "
            "reparameterized draws; discrete latents of a datum are summed out by objective='stl' alone"
        )
    return run


def _frozen(guide: PyroModule) -> Program:
    """The guide with weights that take no gradient."""
    weights = {name: tensor.detach() for name, tensor in guide.named_parameters()}
    return lambda observed, size, **covariates: functional_call(guide, weights, (observed, size), covariates)


def _density_at(guide: Program, drawn: _Drawn, values: Values) -> LogDensity:
    run = guide_trace(guide, drawn.observed, drawn.size, drawn.covariates, values)
    return density_of(run, drawn.size, values)


def path_derivative(model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values) -> ElboTerms:
    """ELBO whose gradient leaves out the score of q, so that its noise vanishes where q is the posterior.

    "Sticking the landing": Roeder, Wu & Duvenaud 2017, arXiv 1703.09194. Discrete latents of a datum are summed out.

    Raises:
        ProgramError: for a latent whose draws carry no gradient.
        InferenceError: for discrete latents with too many values to be summed out.
    """
    drawn = _draw(guide, observed, size, covariates)
    _reparameterized(drawn.run, summed_out=True)
    return _elbo(model, drawn, _density_at(_frozen(guide), drawn, drawn.values))


def _elbo(model: Program, drawn: _Drawn, log_q: LogDensity) -> ElboTerms:
    log_p = _model_density(model, drawn.values, drawn.observed, drawn.size, drawn.covariates)
    return ElboTerms(drawn.mean(log_p.local - log_q.local), log_p.shared - log_q.shared)


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
        if is_weighted(site) or is_weighted(priors[name]):
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


def importance_weighted(
    model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values, particles: int = 8
) -> ElboTerms:
    """The bound log 1/K Σ p/q of K draws a datum, with its plain reparameterized gradient.

    IWAE: Burda, Grosse & Salakhutdinov 2016, arXiv 1509.00519, equation 8. `local` stays the ELBO, of the same draws.

    Raises:
        ProgramError: for shared latents, or a latent whose draws carry no gradient.
    """
    drawn = _particles(guide, observed, size, covariates, particles)
    log_weights = _log_weights(model, drawn, drawn.values, density_of(drawn.run, drawn.size, drawn.values), size)
    return ElboTerms(log_weights.mean(1), log_weights.new_zeros(()), log_weights.logsumexp(1) - log(particles))


def doubly_reparameterized(
    model: Program, guide: PyroModule, observed: Values, size: int, covariates: Values, particles: int = 8
) -> ElboTerms:
    """As `importance_weighted`, with a gradient of the guide whose noise does not grow with K relative to its size.

    DReG: Tucker, Lawson, Gu & Maddison 2019, arXiv 1810.04152, equation 8: the guide's gradient takes the paths through
    the draws alone, weighted by the squares of the normalised weights; the model's is that of the bound.

    Raises:
        ProgramError: as `importance_weighted`.
    """
    drawn = _particles(guide, observed, size, covariates, particles)
    # The hooks are on copies: a draw that other draws of the guide are made from is weighted once.
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
    """The gradient of every row `(rows, *event)` times its share `(rows,)`."""
    return shares.to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1)) * gradient


def _particles(guide: PyroModule, observed: Values, size: int, covariates: Values, particles: int) -> _Drawn:
    """Every row repeated, one draw each."""
    observed, covariates = (_repeated(part, particles) for part in (observed, covariates))
    run = _reparameterized(guide_trace(guide, observed, size * particles, covariates))
    if shared := [name for name, site in sampled(run).items() if not is_local(site)]:
        raise ProgramError(
            f"latents {shared} are shared: a draw of them has one weight for all data together, not one a datum, so "
            "that 'iwae' and 'dreg' would weight minibatches by chance: use objective='stl'"
        )
    return _Drawn(observed, covariates, size * particles, run)


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
def elbo_terms(model: Program, guide: Program, observed: Values, size: int, covariates: Values) -> ElboTerms:
    """The plain Monte Carlo ELBO of one draw a datum; discrete latents are summed out where that can be done."""
    run = guide_trace(guide, observed, size, covariates)
    drawn = _Drawn(observed, covariates, size, run)
    if discrete := _discrete(run):
        try:
            table = combinations(discrete)
        except InferenceError:  # too many values: they are drawn
            return _elbo(model, drawn, density_of(run, size, drawn.values))
        count = len(next(iter(table.values())))
        if size > 1 and size * count > _ROWS:
            return _in_halves(model, guide, observed, size, covariates)
        drawn = _for_each_combination(guide, observed, size, covariates, run, table)
    return _elbo(model, drawn, density_of(drawn.run, drawn.size, drawn.values))


def _in_halves(model: Program, guide: Program, observed: Values, size: int, covariates: Values) -> ElboTerms:
    """Bounds the memory of `elbo_terms`; each half has its own draw of shared latents."""
    halves = []
    for part in (slice(0, size // 2), slice(size // 2, size)):
        rows, cols = ({name: value[part] for name, value in values.items()} for values in (observed, covariates))
        halves.append(elbo_terms(model, guide, rows, part.stop - part.start, cols))
    return ElboTerms(torch.cat([h.local for h in halves]), torch.stack([h.shared for h in halves]).mean())


def _model_density(model: Program, values: Values, observed: Values, size: int, covariates: Values) -> LogDensity:
    held = {**observed, **values}
    return density_of(trace(model, size, covariates, held), size, held, observed)


def check_objective(objective: str, model: PyroModule, guide: PyroModule, observed: Values, covariates: Values) -> None:
    """Refuse an objective that is unknown, or that this model and guide don't allow; it is evaluated once.

    Raises:
        InferenceError: for an unknown name.
        ProgramError: as the objective raises it.
    """
    if objective not in OBJECTIVES:
        raise InferenceError(f"unknown objective {objective!r}; known: {sorted(OBJECTIVES)}")
    size = len(next(iter(observed.values())))
    with torch.no_grad(), seeded(0), defaults(model, observed) as place:
        OBJECTIVES[objective](model, guide, cast(observed, *place), size, cast(covariates, *place))
