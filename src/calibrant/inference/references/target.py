"""The posterior of a program as a density on flat unconstrained vectors, for many chains at once.

A *lane* is one chain of one datum; all lanes together are one run of the program with `size` = lanes. If a program has
shared latents, a lane is a chain over the whole data set, and lanes are batched by `torch.func.vmap`, or run in turn if
it cannot run the program (one that writes into the entries of a tensor, for example).

Positive, bounded, simplex and similar supports are mapped to ℝⁿ by `program.supports.from_line`. Points of a circle or
a sphere are the directions of an isotropic ambient vector. Finite discrete local latents are summed out, and drawn from
their conditional posterior afterwards.

Where a positive scalar latent s multiplies a real latent z, a lane holds v = z·s^κ in place of z, with κ chosen for
every datum (`Pair`): strong data determine s·z better than z; with weak data, z is independent of s, and s·z is not.
Where s is the scale of the prior of z and m its location, a lane holds (z − m)·s^κ with κ from 0 to −1. This is for
Neal's funnel, and for hierarchies with little information in each group.

A leapfrog step has a large energy error at the kink of a Laplace prior, so that 64 Laplace latents need steps a fifth
as long as 64 Normal ones. At κ = 0, a lane therefore holds the Normal quantile u at the level of z in place of z.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.references.coordinates import (
    at_an_edge,
    beside,
    from_normal,
    is_fixed_laplace,
    raw_shape,
    to_normal,
    to_raw,
    to_support,
)
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.enumeration import combinations, with_all_priors
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.program.latents import Site, sites
from calibrant.program.supports import innermost, is_positive, is_real
from calibrant.program.tracing import Hold, deterministic, is_local, sampled, trace, traced

_MULTIPLIES = (0.0, 0.5, 1.0)  # candidates for κ where s multiplies z
_DIVIDES = (0.0, -0.5, -1.0)  # candidates for κ where s is the scale of the prior of z
_SAME = 1e-9  # relative difference below which two locations are equal


@dataclass(frozen=True)
class Block:
    """The position of a continuous latent in the vector of a lane, and the shape of its unconstrained value."""

    name: str
    start: int
    shape: torch.Size
    local: bool

    @property
    def stop(self) -> int:
        """End of the block (exclusive)."""
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class Pair:
    """A positive scalar latent s, and a real latent z whose posterior scale is proportional to a power of s.

    Attributes:
        scale: block of s.
        vector: block of z.
        powers: candidates for κ in v = (z − m)·s^κ.
        offset: constant part of m, with the shape of z. If s is the scale of the prior of z, m is its location.
        centre: block of a latent that is added to `offset` in m, or None.
    """

    scale: Block
    vector: Block
    powers: tuple[float, ...]
    offset: Tensor
    centre: Block | None


_Found = tuple[str, str, tuple[float, ...]]  # scale, vector, powers


class Target:
    """The posterior density of some data under a program, up to a constant, on unconstrained vectors `(lanes, width)`.

    Args:
        program: the program, in the dtype and on the device of the caller.
        found: latent sites of the program.
        observed, covariates: all data; unless lanes are joint, every call gets the `rows` of its lanes again.
        coordinates: site → positive scalar site that multiplies it, declared by the model; None detects such pairs.

    Attributes:
        blocks: the continuous latents, in the order of the program.
        kinked: location and scale `(1, *event)` of local latents with a Laplace prior that is the same for all data.
        local_sites: names of latents, observations and deterministic sites in the data plate.
        joint: whether a lane is a chain over all data, because some latents are shared.
        latents: names of all latents, the discrete ones too.
        width: length of the vector of a lane.
        pairs: pairs of latents for which coordinates can be chosen.
        in_turn: why joint lanes run one after the other and not in one vmap; empty if they do not.

    Raises:
        InferenceError: for shared or infinite discrete latents, or supports that cannot be mapped to ℝⁿ.
    """

    def __init__(
        self,
        program: Program,
        found: Mapping[str, Site],
        observed: Values,
        covariates: Values,
        coordinates: Mapping[str, str] | None = None,
    ) -> None:
        self.program, self.observed, self.covariates = program, dict(observed), dict(covariates)
        self.total = len(next(iter(observed.values())))
        self.joint = any(not site.local for site in found.values())
        self.latents = list(found)
        discrete = {name: site for name, site in found.items() if site.support.is_discrete}
        self.combinations = combinations(with_all_priors(discrete, program, self.observed, self.covariates))
        size = self.total if self.joint else 1
        with torch.no_grad(), seeded(0):
            run = trace(program, size, *self.rows(torch.arange(size)))
        self.blocks: dict[str, Block] = {}
        self.kinked: dict[str, tuple[Tensor, Tensor]] = {}
        for name, site in sampled(run).items():
            if name in found and name not in discrete:
                shape = raw_shape(name, site)
                self._append(name, shape if self.joint or not is_local(site) else shape[1:], is_local(site))
                if is_fixed_laplace(found[name], site, covariates):
                    self.kinked[name] = site["fn"].mean[:1], (site["fn"].variance[:1] / 2).sqrt()
        recorded = {**sampled(run), **deterministic(run)}
        self.local_sites = [name for name, site in recorded.items() if is_local(site)]
        self.pairs = self._pairs(found, coordinates)
        self.in_turn = self._refusal_of_vmap() if self.joint else ""

    def _append(self, name: str, shape: torch.Size, local: bool) -> None:
        self.blocks[name] = Block(name, self.width, shape, local)

    @property
    def width(self) -> int:
        """Length of the vector of a lane."""
        return max((block.stop for block in self.blocks.values()), default=0)

    def rows(self, index: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Covariates and observations of the data at `index`, in the form that `trace` takes."""
        covariates, observed = (
            {name: value[index.to(value.device)] for name, value in part.items()}
            for part in (self.covariates, self.observed)
        )
        return covariates, observed

    def _pairs(self, found: Mapping[str, Site], declared: Mapping[str, str] | None) -> list[Pair]:
        if declared is not None:
            chosen: list[_Found] = [(scale, vector, _MULTIPLIES) for vector, scale in declared.items()]
            if unknown := [n for s, v, _ in chosen for n in (s, v) if n not in self.blocks]:
                raise InferenceError(f"coordinates name {unknown}, which are no continuous latents of the program")
        else:
            chosen = self._detected(found)
        divided = {vector for _, vector, powers in chosen if powers is _DIVIDES}
        real = [name for name in self.blocks if is_real(found[name].prior)]
        plain = [self.blocks[n] for n in real if n not in divided and n not in self.kinked]
        runs = self._few_runs() if divided else []
        where = {vector: _location(self.blocks[vector], plain, runs) for vector in divided}
        centres = {centre for _, centre in where.values()}
        return [
            Pair(self.blocks[s], self.blocks[v], powers, *where.get(v, (torch.zeros(self.blocks[v].shape), None)))
            for s, v, powers in chosen
            if self.blocks[v] not in centres
        ]

    def _few_runs(self) -> list[dict[str, Any]]:
        """The sites of three runs of the program."""
        size = self.total if self.joint else 1
        with torch.no_grad(), seeded(0):
            return [sampled(trace(self.program, size, *self.rows(torch.arange(size)))) for _ in range(3)]

    def _detected(self, found: Mapping[str, Site]) -> list[_Found]:
        """For every real latent, the first earlier positive scalar that is its parent or has a child in common."""
        pairs: list[_Found] = []
        scales = [n for n, b in self.blocks.items() if is_positive(found[n].support) and b.shape.numel() == 1]
        for name in self.blocks:
            earlier = scales[: sum(self.blocks[s].start < self.blocks[name].start for s in scales)]
            if not is_real(found[name].prior) or name in scales:
                continue
            for scale in earlier:
                if name in found[scale].children:
                    pairs.append((scale, name, _DIVIDES))
                    break
                if set(found[scale].children) & set(found[name].children):
                    pairs.append((scale, name, _MULTIPLIES))
                    break
        return pairs

    def log_density(self, q: Tensor, powers: Tensor, covariates: Values, observed: Values) -> Tensor:
        """The unnormalised log posterior in the lanes' coordinates.

        Args:
            q: `(lanes, width)`.
            powers: κ of every lane and pair, `(lanes, pairs)`.
            covariates, observed: data of the lanes, leading dimension lanes; all data if lanes are joint.

        Returns:
            `(lanes,)`, nats; −∞ or NaN where a lane has no density.
        """
        if self.joint:
            return self._each(lambda one, power: self._density(one, power, covariates, observed).sum(), q, powers)
        return self._density(q, powers, covariates, observed)

    def _each(self, function: Callable[..., Any], *lanes: Tensor) -> Any:
        """Results of a function of one joint lane for all lanes: by vmap, or in turn where vmap cannot run it."""
        if not self.in_turn:
            return torch.func.vmap(function)(*lanes)
        return _stacked([function(*one) for one in zip(*lanes, strict=True)])

    def _refusal_of_vmap(self) -> str:
        """Why vmap cannot run the program; empty if it can."""
        q, powers = torch.zeros(2, self.width), torch.zeros(2, len(self.pairs))
        rows = self.covariates, self.observed
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that vmap runs in turn by itself
                torch.func.vmap(lambda one, power: self._density(one, power, *rows))(q, powers)
        except Exception as error:  # a user's program may make vmap raise anything
            return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        return ""

    def _density(self, q: Tensor, powers: Tensor, covariates: Values, observed: Values) -> Tensor:
        """Local terms `(size,)` with discrete latents summed out; shared terms are added to that of the first datum."""
        terms, shared, _ = self._terms(q, powers, covariates, observed)
        local = torch.logsumexp(terms, 0) if len(terms) > 1 else terms[0]
        return torch.cat([local[:1] + shared, local[1:]]) if self.joint else local

    def _terms(
        self, q: Tensor, powers: Tensor, covariates: Values, observed: Values
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Local terms `(combinations, size)`, one row per combination of discrete latents; shared term; site values."""
        size, count = len(next(iter(observed.values()))), max(len(v) for v in self.combinations.values() or [[0]])
        every = {n: _tile(value, count) for n, value in covariates.items()}
        held = {n: _tile(value, count) for n, value in observed.items()}
        held |= {n: value.repeat_interleave(size, 0) for n, value in self.combinations.items()}
        raw, power = self.split(q), powers
        if not self.joint:
            raw, power = {n: _tile(value, count) for n, value in raw.items()}, _tile(powers, count)
        elif count > 1:
            raw = {n: _tile(value, count) if self.blocks[n].local else value for n, value in raw.items()}
        placed = _Unconstrained(self, raw, power, held, size * count)
        density = density_of(traced(placed, self.program, size * count, **every), size * count, placed.values)
        local = density.local + placed.log_det_local
        return local.reshape(count, size), density.shared + placed.log_det_shared, dict(placed.values)

    def split(self, q: Tensor) -> dict[str, Tensor]:
        """Split vectors into unconstrained values by site, `(lanes, *shape)`, or `shape` for the vector of one lane."""
        leading = q.shape[:-1]
        return {n: q[..., b.start : b.stop].reshape((*leading, *b.shape)) for n, b in self.blocks.items()}

    def record(
        self, q: Tensor, levels: Tensor, covariates: Values, observed: Values
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Latents and deterministic sites of the program at vectors in its own coordinates (κ = 0).

        Args:
            q: `(n, width)`.
            levels: uniform random numbers for discrete latents, `(n,)`, or `(n, data)` if lanes are joint.
            covariates, observed: data of the vectors, leading dimension n; all data if lanes are joint.

        Returns:
            site → `(n, *event)`; for local sites of joint lanes, `(n, data, *event)`; and continuous latent →
            whether its value is `at_an_edge`, `(n,)`.
        """
        powers = q.new_zeros(*q.shape[:-1], len(self.pairs))
        if not self.joint:
            return self._record(q, powers, levels, covariates, observed)
        return self._each(
            lambda at, power, level: self._record(at, power, level, covariates, observed), q, powers, levels
        )

    def _record(
        self, q: Tensor, powers: Tensor, levels: Tensor, covariates: Values, observed: Values
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        chosen = {}
        if self.combinations:
            terms, _, _ = self._terms(q, powers, covariates, observed)
            below = terms.softmax(0).cumsum(0) < levels
            index = below.sum(0).clamp_max(len(terms) - 1)
            chosen = {name: values[index] for name, values in self.combinations.items()}
        size = len(next(iter(observed.values())))
        held = {**observed, **chosen}
        raw = self.split(q)
        placed = _Unconstrained(self, raw, powers, held, size)
        run = traced(placed, self.program, size, **covariates)
        latents = {name: value for name, value in placed.values.items() if name not in observed}
        edges = {n: at_an_edge(run.nodes[n]["fn"], raw[n], latents[n]) for n in raw if n not in self.kinked}
        edges = {n: edge.any() if self.joint else edge.reshape(size, -1).any(1) for n, edge in edges.items()}
        return {**latents, **{n: site["value"] for n, site in deterministic(run).items()}}, edges

    def unconstrain(self, values: Values, size: int, covariates: Values) -> Tensor:
        """Vectors `(size, width)` in the program's own coordinates (κ = 0) for values of its continuous latents."""
        held = {name: value for name, value in values.items() if name in self.blocks}
        run = trace(self.program, size, covariates, held)
        raw = {name: to_raw(run.nodes[name]["fn"], held[name]) for name in self.blocks}
        raw |= {name: to_normal(raw[name], *prior) for name, prior in self.kinked.items()}
        if self.joint:
            return torch.cat([raw[name].reshape(-1) for name in self.blocks])[None]
        return torch.cat([raw[name].reshape(size, -1) for name in self.blocks], 1)


@contextmanager
def target_of(model: PyroModule, data: Data) -> Iterator[Target]:
    """The posterior of some data in float64; inside, tensors are made in float64 and on the model's device."""
    given, also = data.tensors()
    with defaults(model, given, torch.float64) as place, pyro.validation_enabled(False):
        observed, covariates = data.tensors(*place)
        found = sites(model, given, also)
        yield Target(in_double(model), found, observed, covariates, getattr(model, "coordinates", None))


def _location(vector: Block, plain: list[Block], runs: list[dict[str, Any]]) -> tuple[Tensor, Block | None]:
    """The location of the prior of a latent as a constant plus, possibly, another latent; zero if it has no such form.

    The location only affects the coordinates of the sampler, not the posterior.
    """
    fns = [run[vector.name]["fn"] for run in runs]
    if not hasattr(innermost(fns[0]), "loc"):
        return torch.zeros(vector.shape), None
    locations = torch.stack([innermost(fn).loc.expand(fn.shape()).reshape(vector.shape) for fn in fns])
    candidates: dict[Block | None, Tensor] = {None: locations}
    for block in plain:
        if not block.shape or (block.local == vector.local and block.shape == vector.shape[: len(block.shape)]):
            values = torch.stack([run[block.name]["value"].reshape(block.shape) for run in runs])
            candidates[block] = locations - beside(values, locations)
    for centre, offsets in candidates.items():
        if (offsets - offsets[0]).abs().max() <= _SAME * (1 + locations.abs().max()):
            return offsets[0], centre
    return torch.zeros(vector.shape), None


class _Unconstrained(Hold):
    """Fixes continuous latents at unconstrained values, mapped to the support of the site in this run."""

    def __init__(self, target: Target, raw: Values, powers: Tensor, held: Values, size: int) -> None:
        super().__init__(dict(held), size)
        self.target, self.raw, self.powers, self.data = target, raw, powers, size
        self.log_det_local, self.log_det_shared = torch.zeros(size), torch.zeros(())

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.raw and name not in self.values:
            raw, log_power = self._in_own_coordinates(name, msg)
            value, log_det = to_support(msg["fn"], raw)
            self.values = {**self.values, name: value}
            if is_local(msg):
                self.log_det_local = self.log_det_local + log_det.reshape(self.data, -1).sum(1) + log_power
            else:
                self.log_det_shared = self.log_det_shared + log_det.sum() + log_power
        super()._pyro_sample(msg)

    def _in_own_coordinates(self, name: str, msg: Mapping[str, Any]) -> tuple[Tensor, Tensor | float]:
        """z from v·s^−κ, or from the Normal quantile u, and the log of dz/dv per datum."""
        raw, plain, log_det = self.raw[name], None, torch.zeros(())
        if name in self.target.kinked:
            plain, slope = from_normal(raw, *self.target.kinked[name])
            log_det = slope.reshape(self.data, -1).sum(1)
        for index, pair in enumerate(self.target.pairs):
            if pair.vector.name == name:
                power = self.powers[..., index]
                shrink = -power * self.raw[pair.scale.name].reshape(power.shape)
                entries = raw[0].numel() if is_local(msg) else raw.numel()
                powered = raw * beside(shrink.exp(), raw) + beside(power != 0, raw) * self._centre(pair, raw)
                if plain is None:
                    return powered, shrink * entries
                return torch.where(beside(power, raw) == 0, plain, powered), torch.where(
                    power == 0, log_det, shrink * entries
                )
        return (raw if plain is None else plain), log_det

    def _centre(self, pair: Pair, raw: Tensor) -> Tensor:
        """The location m of a pair."""
        repeats = len(raw) // len(pair.offset) if self.target.joint and pair.vector.local else 1
        offset = _tile(pair.offset, repeats)
        return offset if pair.centre is None else offset + beside(self.values[pair.centre.name], raw)


def _stacked(results: list[Any]) -> Any:
    """Stack the results of lanes, tensors in tuples and dicts, along a new leading dimension, as vmap does."""
    first = results[0]
    if isinstance(first, tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*results, strict=True))
    if isinstance(first, dict):
        return {name: _stacked([one[name] for one in results]) for name in first}
    return torch.stack(results)


def _tile(value: Tensor, count: int) -> Tensor:
    return value if count == 1 else value.repeat(count, *[1] * (value.dim() - 1))
