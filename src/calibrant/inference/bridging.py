"""Bridge sampling between two sets of draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit

from calibrant.inference.diagnostics import ess

Array = npt.NDArray[np.float64]
_STEPS = 60  # Newton steps at most; five to ten are enough where the densities overlap
_TOLERANCE = 1e-9  # nats; iteration ends when a Newton step is shorter


@dataclass(frozen=True)
class Bridge:
    """Estimates of log evidences, with the components of their errors.

    Attributes:
        log_evidence: `(data,)`, nats; NaN where the two densities do not overlap at any draw.
        influence: `(data, draw)`, first-order effect of each proposal draw on the estimate, with mean zero. Its
            variance gives the error due to the proposal draws, also of differences from other estimates with the same
            draws.
        variance: `(data,)`, squared error due to the reference draws.
        overlap: `(data,)`, ∫ p q / (s₁ p + s₂ q), between 0 and 1; it is 1 where the densities are equal.
    """

    log_evidence: Array
    influence: Array
    variance: Array
    overlap: Array

    @property
    def se(self) -> Array:
        """Standard errors, `(data,)`."""
        return np.sqrt(self.variance + self.influence.var(1, ddof=1) / self.influence.shape[1])


def bridge(at_reference: Array, at_proposal: Array, independent: bool = False) -> Bridge:
    """Log evidences by the optimal bridge between reference draws and a proposal.

    With l = log p(x, z) − log q(z), the estimate log r solves s₂ E_q[σ(l − c)] = s₁ E_p[σ(c − l)] with
    c = log r − log(s₁ / s₂): the fixed point of the iteration of Meng & Wong 1996 (Statistica Sinica 6, 831–860).
    One side decreases with r and the other increases, so that there is one root, which is found by Newton's method. s₁
    and s₂ are the shares of the posterior and of q in the effective draws. The error is that of Frühwirth-Schnatter
    2004 (Econometrics Journal 7, 143–167; also in Gronau et al. 2017, arXiv 1703.05984), with the effective number of
    reference draws for the mean of the weights σ(c − l).

    Args:
        at_reference: l at draws of the posterior, `(data, chain, draw)`; +∞ where the proposal has no density.
        at_proposal: l at independent draws of the proposal, `(data, draw)`; −∞ where the model has no density.
        independent: whether the reference draws are independent, too.
    """
    _, chains, length = at_reference.shape
    effective = np.full(len(at_reference), float(chains * length))
    log_evidence = _root(at_reference, at_proposal, effective)
    if not independent:  # the number of effective draws depends on the weights
        effective = _effective(_weights(at_reference, log_evidence, effective, at_proposal.shape[1])[0])
        log_evidence = _root(at_reference, at_proposal, effective)
    of_reference, share = _weights(at_reference, log_evidence, effective, at_proposal.shape[1])
    of_proposal = 1.0 - _weights(at_proposal[:, None], log_evidence, effective, at_proposal.shape[1])[0][:, 0]
    if not independent:
        effective = _effective(of_reference)
    of_reference = of_reference.reshape(len(of_reference), -1)
    with np.errstate(invalid="ignore", divide="ignore"):  # the densities may not overlap
        means = of_proposal.mean(1)
        relative = of_reference.var(1, ddof=1) / of_reference.mean(1) ** 2
        return Bridge(log_evidence, of_proposal / means[:, None] - 1.0, relative / effective, means / share)


def _weights(log_ratios: Array, log_evidence: Array, effective: Array, draws: int) -> tuple[Array, Array]:
    """Weights s₂ q / (s₁ p + s₂ q) at draws `(data, chain, draw)`, and s₁ `(data,)`."""
    offset = log_evidence - np.log(effective / draws)
    return expit(offset[:, None, None] - log_ratios), effective / (effective + draws)


def _effective(weights: Array) -> Array:
    """Effective number of draws for the mean of weights `(data, chain, draw)`; all draws if a weight is not finite."""
    known: Any = np.isfinite(weights).all((1, 2))
    return ess(np.moveaxis(np.where(known[:, None, None], weights, 0.0), 0, 2))


def _root(at_reference: Array, at_proposal: Array, effective: Array) -> Array:
    """log r `(data,)`, by Newton's method within a bracket that shrinks with every step."""
    flat = at_reference.reshape(len(at_reference), -1)
    both = np.concatenate([flat, at_proposal], 1)
    finite = np.isfinite(both)
    pad = math.log(both.shape[1]) + 1.0  # infinite values may move the root outside the range of the finite ones
    low = np.where(finite, both, np.inf).min(1) - pad
    high = np.where(finite, both, -np.inf).max(1) + pad
    sound = np.isfinite(flat).any(1) & np.isfinite(at_proposal).any(1) & ~np.isnan(both).any(1)
    found = np.full(len(flat), np.nan)
    rows = np.flatnonzero(sound)
    low, high = low[rows], high[rows]
    at = np.clip(np.median(at_proposal[rows], 1), low, high)
    log_odds = np.log(effective / at_proposal.shape[1])
    for _ in range(_STEPS):
        offset = (at - log_odds[rows])[:, None]
        (above, up), (below, down) = _log_mean_expit(at_proposal[rows] - offset), _log_mean_expit(offset - flat[rows])
        excess = above - below - log_odds[rows]
        low, high = np.where(excess > 0, at, low), np.where(excess > 0, high, at)
        step = excess / (up + down)
        found[rows] = at + step
        going = np.abs(step) > _TOLERANCE
        at = np.where((at + step > low) & (at + step < high), at + step, (low + high) / 2)[going]
        rows, low, high = rows[going], low[going], high[going]
        if not len(rows):
            return found
    found[rows] = np.nan
    return found


def _log_mean_expit(values: Array) -> tuple[Array, Array]:
    """Log of the mean of σ over the last dimension, also where σ underflows, and its derivative."""
    logs = log_expit(values)
    top = logs.max(1, keepdims=True)
    shares = np.exp(logs - top)
    total = shares.sum(1)
    slope = (shares * expit(-values)).sum(1) / total
    return np.log(total / values.shape[1]) + top[:, 0], slope
