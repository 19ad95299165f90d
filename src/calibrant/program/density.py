"""The log density of a program, site by site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.program.contract import Program, Values
from calibrant.program.environment import defaults
from calibrant.program.tracing import TERM, factors, is_deterministic, messages, sampled, site_log_prob, trace


@dataclass(frozen=True)
class LogDensity(Mapping[str, Tensor]):
    """Log densities of the sites of a program: `(size,)` for a local site, `()` for a shared one, in nats.

    `joint`, `latent` and `observed` are sums over sites. They have shape `(size,)` if every term is local, and are
    summed over the data, with shape `()`, otherwise. `local` always has shape `(size,)`, and `shared` `()`. Factors
    count as observed.
    """

    terms: Mapping[str, Tensor]
    observed_sites: frozenset[str]
    size: int

    def __getitem__(self, name: str) -> Tensor:
        return self.terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def joint(self) -> Tensor:
        """Sum of all terms."""
        return self._sum(self.terms.values())

    @property
    def latent(self) -> Tensor:
        """Sum of the terms of the latents: the log prior."""
        return self._sum(t for n, t in self.terms.items() if n not in self.observed_sites)

    @property
    def observed(self) -> Tensor:
        """Sum of the terms of the observations and factors: the log likelihood."""
        return self._sum(t for n, t in self.terms.items() if n in self.observed_sites)

    @property
    def local(self) -> Tensor:
        """Sum of the local terms, `(size,)`."""
        return _total((t for t in self.terms.values() if t.dim()), (self.size,))

    @property
    def shared(self) -> Tensor:
        """Sum of the shared terms, `()`."""
        return _total((t for t in self.terms.values() if not t.dim()), ())

    def without(self, names: Iterable[str]) -> LogDensity:
        """The same density without the named sites."""
        left = set(self.terms) - set(names)
        return LogDensity({n: t for n, t in self.terms.items() if n in left}, self.observed_sites, self.size)

    def _sum(self, terms: Iterable[Tensor]) -> Tensor:
        terms = list(terms)
        if any(not term.dim() for term in terms):
            return _total((term.sum() for term in terms), ())
        return _total(terms, (self.size,))


def _total(terms: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    terms = list(terms)
    return sum(terms[1:], terms[0]) if terms else torch.zeros(shape)


def log_density(
    model: Program,
    values: Values,
    size: int | None = None,
    covariates: Values | None = None,
    *,
    observed: Iterable[str] = (),
) -> LogDensity:
    """The log density of every site of a program at given values.

    Args:
        model: the program.
        values: a tensor for every sample site, with leading dimension `size` for local sites; values of deterministic
            sites are ignored.
        size: number of data; inferred from the local values if None.
        covariates: keyword → tensor, leading dimension `size`.
        observed: names of the sites that count as observed.

    Raises:
        ProgramError: for a sample site without a value, a value without a site, or a site without `to_event`.
        DataError: for a value of the wrong shape, or outside its support.
    """
    size = _size_of(values, observed) if size is None else size
    with defaults(model, values):
        return density_of(trace(model, size, covariates, values), size, values, observed)


def _size_of(values: Values, observed: Iterable[str]) -> int:
    names = [name for name in observed if name in values] or list(values)
    sizes = {len(values[name]) for name in names if values[name].dim()}
    if len(sizes) != 1:
        raise ProgramError("the number of data cannot be inferred from the values: give size=")
    return sizes.pop()


def likelihood_of(run: Trace, size: int) -> LogDensity:
    """The log density of the observed sites and factors of a run in which no other site was held at a value.

    The densities of the latents at their own draws are not computed.
    """
    terms = {name: site[TERM] for name, site in messages(run).items() if TERM in site}
    return LogDensity(terms, frozenset(terms), size)


def density_of(run: Trace, size: int, values: Values, observed: Iterable[str] = ()) -> LogDensity:
    """The log density of a trace whose sample sites were fixed at `values`."""
    if absent := set(sampled(run)) - set(values):
        raise ProgramError(f"sites {sorted(absent)} are sampled by the program but have no value")
    if unknown := set(values) - set(messages(run)):
        raise ProgramError(f"the program never samples {sorted(unknown)}; its sites are {sorted(sampled(run))}")
    scored = {n: s for n, s in messages(run).items() if not is_deterministic(s)}
    terms = {n: s[TERM] if TERM in s else site_log_prob(n, s, size) for n, s in scored.items()}
    return LogDensity(terms, frozenset(observed) | set(factors(run)), size)
