"""The draws of a posterior with several modes, from chains in each mode and the modes' weights.

Chains of mode k have the target p·π_k, where the shares π_k of a partition sum to one (`partition`). The weight of a
mode is the evidence of its target, by bridge sampling from a Normal, divided by the sum of all. Draws of the modes in
proportion to their weights are draws of p.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.inference.bridging import bridge
from calibrant.inference.references.chains import McmcDraws
from calibrant.inference.references.grouping import Density
from calibrant.inference.references.partition import Partition
from calibrant.inference.references.searching import density_at, plain_vectors
from calibrant.inference.references.target import target_of
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
NO_MASS = 1e-3  # weight below which a mode is left out of a posterior
_FEW_AN_ENTRY = 4  # draws per entry that the estimate of a covariance needs; with fewer, it is diagonal


@dataclass(frozen=True)
class Mode:
    """What is known about the chains of one mode.

    Attributes:
        log_evidence: log of the mode's part of the evidence, nats; NaN where it is unknown.
        se: its standard error, nats.
        shares: mean shares of all groups at the draws of this mode, `(group,)`.
    """

    log_evidence: float
    se: float
    shares: Array


def modes_of(model: PyroModule, data: Data, draws: McmcDraws, partition: Partition, seed: int) -> list[Mode]:
    """The modes that units of chains are in.

    Args:
        model: the program.
        data: data of the units, one per unit (all data if they have one joint posterior, which is then the only unit).
        draws: draws of the units, with their vectors.
        partition: partition of the units.
        seed: random seed for the draws of the Normals.
    """
    assert draws.vectors is not None
    vectors = draws.vectors.permute(2, 0, 1, 3).double()
    with target_of(model, data) as target:
        found = []
        for unit, each in enumerate(vectors):
            own = partition[torch.tensor([unit])]

            def density(z: Array, unit: int = unit, own: Partition = own) -> Array:
                shares = own.log_shares(plain_vectors(target, torch.as_tensor(z))[None])[0]
                return density_at(target, unit, z) + shares[:, int(own.own)].numpy()

            shares = own.log_shares(plain_vectors(target, each).reshape(1, -1, each.shape[-1])).exp()[0].mean(0)
            generator = np.random.default_rng(stream(seed, str(data.labels()[unit])))
            found.append(Mode(*_evidence(each.numpy(), density, generator), shares.numpy()))
    return found


def _evidence(draws: Array, density: Density, generator: np.random.Generator) -> tuple[float, float]:
    """The log evidence of one target and its error, from draws `(chain, draw, width)`.

    A Normal is fitted to one half of the draws, and the bridge leads from it to the other half; the result is the mean
    over both ways, which share no draws on the same side.
    """
    half = draws.shape[1] // 2
    parts = draws[:, :half], draws[:, half:]
    both = [_bridged(fit, other, density, generator) for fit, other in (parts, parts[::-1])]
    (one, se_one), (two, se_two) = both
    return (one + two) / 2, float(np.hypot(se_one, se_two)) / 2


def _bridged(fit: Array, other: Array, density: Density, generator: np.random.Generator) -> tuple[float, float]:
    flat, rest = (part.reshape(-1, part.shape[-1]) for part in (fit, other))
    width = flat.shape[1]
    mean, sd = flat.mean(0), np.maximum(flat.std(0, ddof=1), 1e-150)
    factor = np.diag(sd)
    if len(flat) >= _FEW_AN_ENTRY * width:
        correlation = np.cov(((flat - mean) / sd).T).reshape(width, width)
        factor = sd[:, None] * np.linalg.cholesky(correlation + 1e-9 * np.eye(width))
    noise = generator.standard_normal(rest.shape)
    proposed = mean + noise @ factor.T
    whitened = np.linalg.solve(factor, (rest - mean).T).T
    constant = -np.log(np.diag(factor)).sum() - 0.5 * width * np.log(2 * np.pi)
    at_other = density(rest) + 0.5 * np.square(whitened).sum(1) - constant
    at_proposed = density(proposed) + 0.5 * np.square(noise).sum(1) - constant
    at_proposed = np.where(np.isnan(at_proposed), -np.inf, at_proposed)
    found = bridge(at_other.reshape(1, *other.shape[:2]), at_proposed[None])
    return float(found.log_evidence[0]), float(found.se[0])


def weights_of(modes: list[Mode]) -> tuple[Array, Array]:
    """The weights of modes and their standard errors, both `(mode,)`."""
    logs, errors = (np.array([getattr(mode, name) for mode in modes]) for name in ("log_evidence", "se"))
    weight = np.exp(logs - logs.max())
    weight /= weight.sum()
    total = (weight**2 * errors**2).sum()
    return weight, weight * np.sqrt(((1 - weight) ** 2 - weight**2) * errors**2 + total)


def imbalance(modes: list[Mode], weights: Array) -> float:
    """The largest difference between the two sides of a boundary, as a share of the whole mass.

    The mass at a boundary, ∫ p π_j π_k, is known from the chains of mode j and of mode k. They differ where the
    boundary cuts a piece off one mode that the chains of the other cannot reach.
    """
    flow = weights[:, None] * np.stack([mode.shares[: len(modes)] for mode in modes])  # no others have a share
    return float(np.abs(flow - flow.T).max())


def softness(modes: list[Mode]) -> float:
    """The largest mean share of all other groups at the draws of a mode."""
    return max(1.0 - float(mode.shares[at]) for at, mode in enumerate(modes))


def composed(parts: list[McmcDraws], weights: Array, seed: int) -> McmcDraws:
    """Draws of all modes in proportion to their weights.

    Every chain has all modes in proportion, in random order. The draws of a mode in a chain are those of one chain of
    the mode, evenly spaced and in their order, so that their dependence remains visible.

    Args:
        parts: draws of every mode, of one datum or of all data jointly.
        weights: `(mode,)`, with sum one.
        seed: random seed for the order.
    """
    generator = np.random.default_rng(seed)
    chains, length = next(iter(parts[0].stats.values())).shape[:2]
    mode, draw = np.zeros((chains, length), np.int64), np.zeros((chains, length), np.int64)
    bounds = np.floor(np.outer(np.arange(chains + 1), np.cumsum(weights) * length) + generator.random(len(weights)))
    bounds[0] = 0
    upto = np.diff(bounds, axis=0).astype(np.int64)  # draws of the first modes together, so that rounding evens out
    upto = np.minimum(np.maximum.accumulate(upto, 1), length)
    upto[:, -1] = length
    for chain in range(chains):
        counts = np.diff(upto[chain], prepend=0)
        mode[chain] = generator.permutation(np.repeat(np.arange(len(parts)), counts))
        for one, count in enumerate(counts):
            spaced = np.floor((np.arange(count) + generator.random()) * (length / max(count, 1)))
            draw[chain, mode[chain] == one] = np.minimum(spaced, length - 1)
    at = torch.as_tensor(mode), torch.arange(chains, device="cpu")[:, None], torch.as_tensor(draw)

    def picked(values: list[Tensor]) -> Tensor:
        return torch.stack(values)[at]

    first = parts[0]
    draws = {name: picked([part.draws[name] for part in parts]) for name in first.draws}
    stats = {name: picked([part.stats[name] for part in parts]) for name in first.stats}
    moved = torch.stack([part.moved for part in parts]).sum(0)
    near = {name: torch.stack([part.edges[name] for part in parts]).amax(0) for name in first.edges}
    return replace(first, draws=draws, stats=stats, moved=moved, edges=near, vectors=None, subchains=1)
