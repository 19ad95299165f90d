"""Where chains start: keys of their random numbers, and draws of the prior, of the guide, and wider than the prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.inference.references.random_numbers import fold, label_key, mix
from calibrant.inference.references.target import Target
from calibrant.program.contract import Program, Values
from calibrant.program.environment import seeded
from calibrant.program.supports import is_improper
from calibrant.program.tracing import guide_trace, sampled, trace

Starts = Callable[[Target, Tensor], Tensor]


def keys_of(target: Target, data: Data, seed: int) -> Tensor:
    """A random key for every datum, from its label; a single key if lanes are joint."""
    labels = [0] if target.joint else [label_key(label) for label in data.coords["data"].tolist()]
    device = next(iter(target.observed.values())).device
    return fold(mix(torch.tensor([seed], device=device)), torch.tensor(labels, device=device))


def prior_and_guide(target: Target, keys: Tensor, chains: int, guide: Program | None) -> Tensor:
    """Starts `(unit, chain, width)`: draws of the prior or, for chains with odd numbers, of the guide if there is one.

    The program runs once per datum (if lanes are joint, once per chain), seeded by the key of the datum, so that the
    starts of a datum do not depend on other data.
    """
    parts = []
    for unit, key in enumerate(keys.tolist()):
        own = _own(target, unit, chains)
        covariates, observed = target.rows(own)
        with torch.no_grad(), seeded(key & 0x7FFFFFFF):
            draw = [prior_start(target, covariates, len(own)) for _ in range(chains if target.joint else 1)]
            start = torch.cat(draw)
            if guide is not None:
                run = [_guide_start(target, guide, observed, covariates, len(own)) for _ in draw]
                start[1::2] = torch.cat(run)[1::2]
        parts.append(start)
    return torch.stack(parts)


def wide(target: Target, keys: Tensor, chains: int, guide: Program | None) -> Tensor:
    """Starts `(unit, chain, width)` that are to find all modes.

    A quarter are draws of the prior, and a quarter lie farther out: a draw of the prior plus the difference of two
    others, so that their sd on the line is √3 times that of the prior. An improper prior tells no scale: there the
    distances grow from chain to chain, up to ten times as far. The other half are draws of the guide, or of these two
    kinds again without a guide.
    """
    starts = prior_and_guide(target, keys, chains, guide)
    others = (prior_and_guide(target, fold(keys, number), chains, None) for number in range(2))
    farther = starts + next(others) - next(others)
    growing = torch.logspace(0, 1, chains, dtype=starts.dtype, device=starts.device)[:, None]
    farther = torch.where(_without_scale(target), farther * growing, farther)
    starts[:, ::4] = farther[:, ::4]
    if guide is None:
        starts[:, 1::4] = farther[:, 1::4]
    return starts


def _without_scale(target: Target) -> Tensor:
    """Which entries of a vector have an improper prior, `(width,)`."""
    size = target.total if target.joint else 1
    with torch.no_grad(), seeded(0), pyro.validation_enabled(False):
        run = trace(target.program, size, target.rows(torch.arange(size))[0])
    parts = [
        torch.full((block.stop - block.start,), is_improper(run.nodes[name]["fn"]))
        for name, block in target.blocks.items()
    ]
    return torch.cat(parts)


def _own(target: Target, unit: int, chains: int) -> Tensor:
    """The data of one run of the program for the chains of a unit."""
    return torch.arange(target.total) if target.joint else torch.full((chains,), unit)


def _guide_start(target: Target, guide: Program, observed: Values, covariates: Values, size: int) -> Tensor:
    values = {n: s["value"] for n, s in sampled(guide_trace(guide, observed, size, covariates)).items()}
    return target.unconstrain(values, size, covariates)


def prior_start(target: Target, covariates: Values, size: int) -> Tensor:
    """Prior draws as vectors in the program's own coordinates (κ = 0); improper priors start at U(−2, 2)."""
    with pyro.validation_enabled(False):
        run = trace(target.program, size, covariates)
        values: dict[str, Any] = {name: run.nodes[name]["value"] for name in target.blocks}
        return target.unconstrain(values, size, covariates)
