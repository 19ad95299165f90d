"""Whether images match: the log odds of a pair, and likelihoods of a tuple of candidates."""

from __future__ import annotations

from math import log
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from calibrant.errors import ProgramError

FORMS = ("published", "categorical", "url", "url-with-ones")


def positive(concentration: float) -> float:
    """A concentration k that is positive.

    Raises:
        ProgramError: for any other.
    """
    if not concentration > 0:
        raise ProgramError(f"concentration={concentration!r}: give a number above 0")
    return float(concentration)


class MatchLoss(dist.Bernoulli):
    """A training loss for tuples whose first candidate matches: its value does not depend on y."""

    is_density = False
    instead = "choose form='published' or form='categorical'"

    def log_prob(self, value: Tensor) -> Tensor:
        return self.logits.expand(torch.broadcast_shapes(self.batch_shape, value.shape))


def of_tuple(form: str, similarities: Tensor, average: bool) -> Any:
    """The likelihood of y, given similarities k zᵀz_j to the candidates, `(size, K)`, of which the first one matches.

    Args:
        form: "published": y = 1 (the first candidate matches) with log odds of its similarity to the log mean (or log
            sum) over the rest. "categorical": y is a one-hot vector `(K,)`, the place of the candidate that matches.
            "url": the loss of URL, whose denominator lacks the first candidate; "url-with-ones" adds 1 to numerator and
            denominator, as its code does.
        similarities: k zᵀz_j.
        average: whether "published" takes the mean over the rest, in place of the sum.
    """
    if form == "categorical":
        return dist.OneHotCategorical(logits=similarities)
    first, rest = similarities[:, 0], similarities[:, 1:].logsumexp(-1)
    if form == "url-with-ones":
        first, rest = (torch.logaddexp(part, torch.zeros_like(part)) for part in (first, rest))
    odds = first - rest
    if form != "published":
        return MatchLoss(logits=odds)
    return dist.Bernoulli(logits=odds + (log(similarities.shape[1] - 1) if average else 0.0))


def known_form(form: str) -> str:
    """A name of `FORMS`.

    Raises:
        ProgramError: for any other.
    """
    if form not in FORMS:
        raise ProgramError(f"form={form!r} is unknown; known: {list(FORMS)}")
    return form
