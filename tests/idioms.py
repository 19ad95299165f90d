"""What the tables of habits of Pyro's users are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from calibrant.program import Program

Values = dict[str, Tensor]
SIZE = 8
DRAWN = torch.Generator().manual_seed(3)
INPUTS = torch.randn(SIZE, 3, generator=DRAWN)
X = torch.randn(SIZE, generator=DRAWN)
MATRIX = torch.randn(SIZE, 3, generator=DRAWN)
BINARY = (MATRIX > 0).float()
SEEN = torch.arange(SIZE) % 2 == 0


@dataclass
class Idiom:
    """A program that is refused, the words of the refusal, and the program that follows them.

    `truth` is the log joint of all sites of the program that follows, in nats, from values and covariates.
    """

    before: Callable[[], Program]
    words: tuple[str, ...]
    after: Callable[[], Program]
    truth: Callable[[Values, Values], Tensor]
    observed: Values
    covariates: Values | None = None
    wrong: Values | None = None  # covariates that the user gives the program before
    reference: bool = False


@cache
def of(program: Program) -> Callable[[], Program]:
    """A builder of a program that is a function."""
    return lambda: program
