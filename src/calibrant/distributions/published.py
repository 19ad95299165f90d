"""The von Mises–Fisher sampler that published code on representation uncertainty uses, beside which ours can be put.

It is the rejection sampler of Ulrich (1984) and Wood (1994) as the hyperspherical VAE has it (Davidson, Falorsi, De
Cao, Kipf & Tomczak 2018, arXiv 1804.00891), with one approximation: for κ > 11, b is replaced by the first term of its
expansion for large κ, (p − 1)/(4κ), while the acceptance test keeps its constants. In high dimension κ is not large
compared with p, and the draws do not have the concentration κ: for p = 512 and κ = 128 their expected cosine is .001 in
place of .236, and for smaller κ they point away from the mean direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibrant.distributions.directional import Shape, VonMisesFisher

_PROPOSALS = 16  # in a round of proposals
_ROUNDS = 10_000
_NODES, _REACH = 4001, 40.0  # of the quadrature over the log odds of the proposals, in sds


def published_mean_cosine(dimension: int, concentration: Tensor) -> Tensor:
    """The expected cosine of the angle between the mean direction and a draw of the published sampler.

    It is computed by quadrature over the proposals, with the probability that each of them is accepted, in float64.
    `mean_cosine` is what it should be.

    Args:
        dimension: p, 3 or more.
        concentration: κ > 0, of any shape; the result has the same shape.
    """
    shape, kappa = concentration.shape, concentration.double().reshape(-1, 1)
    half = (dimension - 1) / 2
    line = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64) / half**0.5
    log_proposal = half * (torch.nn.functional.logsigmoid(line) + torch.nn.functional.logsigmoid(-line))
    cosine, log_accepted = _proposed(dimension, kappa, line.sigmoid())
    weights = (log_proposal + log_accepted).softmax(-1)
    return (weights * cosine).sum(-1).reshape(shape).to(concentration.dtype)


def _proposed(dimension: int, concentration: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of a proposal, and the log of the probability that it is accepted.

    Args:
        dimension: p.
        concentration: κ.
        uniform: draws of Beta((p − 1)/2, (p − 1)/2), of a shape that broadcasts with that of κ.
    """
    rest = dimension - 1
    root = torch.hypot(2 * concentration, torch.full_like(concentration, rest))
    exact, expanded = (root - 2 * concentration) / rest, rest / (4 * concentration)
    share = (concentration - 10).clamp(0, 1)  # the published code changes over between κ = 10 and 11
    b = share * expanded + (1 - share) * exact
    a = (rest + 2 * concentration + root) / 4
    below = 1 - (1 - b) * uniform
    t = 2 * a * b / below
    constant = 4 * a * b / (1 + b) - rest * torch.tensor(float(rest), dtype=a.dtype).log()
    return (1 - (1 + b) * uniform) / below, (rest * t.log() - t + constant).clamp_max(0)


class PublishedVonMisesFisher(VonMisesFisher):
    """A von Mises–Fisher distribution whose draws are those of the published sampler; its density is the right one.

    The derivative with respect to κ follows the path of the accepted proposal alone, as in the published code. It lacks
    the term of the acceptance, so that it is biased in every dimension.

    Args:
        direction: unit vectors `(…, p)`, p ≥ 3.
        concentration: κ > 0, `(…)`.
    """

    def expand(self, batch_shape: Shape, _instance: Any = None) -> PublishedVonMisesFisher:
        """The distribution with another batch shape."""
        direction = self.direction.expand(*batch_shape, *self.event_shape)
        return PublishedVonMisesFisher(direction, self.concentration.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, p)`."""
        shape = self._extended_shape(sample_shape)
        direction, kappa = self.direction.expand(shape), self.concentration.expand(shape[:-1])
        cosine, _ = _proposed(shape[-1], kappa, _accepted(shape[-1], kappa.detach()))
        cosine = cosine[..., None]
        noise = torch.randn_like(direction)
        across = torch.nn.functional.normalize(noise - (noise * direction).sum(-1, keepdim=True) * direction, dim=-1)
        return cosine * direction + (1 - cosine.square()).clamp_min(1e-12).sqrt() * across


@torch.no_grad()
def _accepted(dimension: int, concentration: Tensor) -> Tensor:
    """Accepted proposals, one for every concentration."""
    found = torch.full_like(concentration, torch.nan).flatten()
    left, flat = torch.arange(len(found), device=found.device), concentration.flatten()
    for _ in range(_ROUNDS):
        gammas = torch._standard_gamma(flat.new_full((2, _PROPOSALS, len(left)), (dimension - 1) / 2))
        uniform = gammas[0] / gammas.sum(0)
        taken = torch.rand_like(uniform).log() < _proposed(dimension, flat[left], uniform)[1]
        first = taken.to(torch.uint8).argmax(0, keepdim=True)
        done = taken.any(0)
        found[left[done]] = uniform.gather(0, first)[0][done]
        left = left[~done]
        if not len(left):
            break
    return found.reshape(concentration.shape)
