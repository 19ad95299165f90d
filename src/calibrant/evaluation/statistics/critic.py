"""A lower bound on the Kullback–Leibler divergence of two samples, from a classifier that tells them apart."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from calibrant.inference.scoring import Array
from calibrant.program.environment import seeded

_WIDTH, _STEPS, _BATCH, _LR, _DECAY = 32, 300, 256, 5e-3, 1e-1
_LOOK = 10  # steps from one look at the draws that are kept for the choice of the critic to the next
_FARTHEST = 8.0  # standardised entries are cut off here, so that squares stay moderate
_SEEN = 100.0  # draws of the prior that must lie where the critic is largest, for the error to be known


@dataclass(frozen=True)
class Bound:
    """A lower bound on a divergence with its standard error, and the largest value that it can have, in nats."""

    value: float
    se: float
    ceiling: float


def marginal_bound(ours: Array, prior: Array, seed: int) -> Bound:
    """Bound KL(m ‖ p) from below by draws of m and of p.

    For any function T, KL(m ‖ p) ≥ E_m T + 1 − E_p exp T, and the sample means of the right side have no bias (Nguyen,
    Wainwright & Jordan 2010, IEEE Trans. Information Theory 56(11)). T is the log odds of a classifier that is trained
    on one half of the draws, and the bound is evaluated on the other half. The training stops where the bound on a
    third of its half is best; T = 0, where it starts, has the bound zero.

    T is cut off above at log(n / 100), with n draws of p, so that no rare draw of p decides; the bound cannot exceed
    that by more than one.

    Args:
        ours: draws of m, `(data, draws, latent)`; the draws of a datum are in the same half.
        prior: draws of p, `(draws, latent)`.
        seed: random seed for the halves and the training.
    """
    order = np.random.default_rng(seed).permutation(len(ours))
    first, second = (torch.as_tensor(ours[half], dtype=torch.float32) for half in np.array_split(order, 2))
    known, new = (torch.as_tensor(part, dtype=torch.float32) for part in np.array_split(prior, 2))
    most = math.log(len(new) / _SEEN)
    with seeded(seed), torch.device("cpu"):
        critic = _trained(first, known, most)
    with torch.no_grad():
        at_ours, at_prior = critic.of(second, most).mean(1), critic.of(new, most).exp()
    errors = [float(values.std() / len(values) ** 0.5) for values in (at_ours, at_prior)]
    return Bound(float(at_ours.mean() + 1.0 - at_prior.mean()), math.hypot(*errors), most + 1.0)


class _Critic(nn.Module):
    """Log odds from entries and their squares, which suffice for two Normals, and from a hidden layer."""

    shift: Tensor

    def __init__(self, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.centre, self.spread = centre, spread
        self.register_buffer("shift", torch.zeros(()))
        width = 2 * len(centre)
        self.direct, inner = nn.Linear(width, 1), nn.Linear(_WIDTH, 1)
        self.hidden = nn.Sequential(nn.Linear(width, _WIDTH), nn.SiLU(), inner)
        for last in (inner, self.direct):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Log odds `(…,)` of draws `(…, latent)`."""
        u = ((z - self.centre) / self.spread).clamp(-_FARTHEST, _FARTHEST)
        both = torch.cat([u, u.square() - 1.0], -1)
        return (self.direct(both) + self.hidden(both)).squeeze(-1)

    def level(self, prior: Tensor, most: float) -> None:
        """Choose the constant with which E_p exp T is about one."""
        self.shift = self(prior).clamp_max(most).logsumexp(0) - math.log(len(prior))

    def of(self, z: Tensor, most: float) -> Tensor:
        """T, in float64."""
        return (self(z) - self.shift).clamp_max(most).double()


def _trained(ours: Tensor, prior: Tensor, most: float) -> _Critic:
    """A classifier of draws `(data, draws, latent)` and `(draws, latent)`, trained on as many of each in a step."""
    sides, kept = zip(*(_two_thirds(side) for side in (ours, prior)), strict=True)
    spread = prior.std(0)
    critic = _Critic(prior.mean(0), torch.where(spread > 0, spread, 1.0))
    best, least = copy.deepcopy(critic), 0.0
    optimizer = torch.optim.AdamW(critic.parameters(), lr=_LR, weight_decay=_DECAY)
    flat = [side.reshape(-1, side.shape[-1]) for side in sides]
    for step in range(1, _STEPS + 1):
        positive, negative = (side[torch.randint(len(side), (_BATCH,))] for side in flat)
        loss = softplus(-critic(positive)).mean() + softplus(critic(negative)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % _LOOK == 0:
            with torch.no_grad():
                critic.level(flat[1], most)
                bound = float(critic.of(kept[0], most).mean() + 1.0 - critic.of(kept[1], most).exp().mean())
            if bound > least:
                best, least = copy.deepcopy(critic), bound
    return best


def _two_thirds(side: Tensor) -> tuple[Tensor, Tensor]:
    cut = max(1, 2 * len(side) // 3)
    return side[:cut], side[cut:]
