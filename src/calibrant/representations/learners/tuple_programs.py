"""Programs that say which images match: InfoNCE, MCInfoNCE and HIB."""

from __future__ import annotations

from typing import Any

from calibrant.data.dataset import Data
from calibrant.representations.learners.learner import Plan
from calibrant.representations.learners.programs import HEAD, TupleProgram
from calibrant.representations.learners.registry import register_method
from calibrant.representations.learners.trunks import Inputs
from calibrant.representations.tuples import candidates, pairs


class _Candidates(TupleProgram):
    """A reference with candidates, the first of which matches.

    Args:
        inputs: what the network is built for.
        model: name of the model.
        particles: number of draws per datum.
        count: number of candidates.
        arguments: those of the model.
    """

    def __init__(self, inputs: Inputs, model: str, particles: int, count: int, **arguments: Any) -> None:
        super().__init__(inputs, model, "iwae", particles, latents=inputs.latents, **arguments)
        self.count = count
        self.place = "random" if arguments.get("form") == "categorical" else "first"

    def drawn(self, data: Data, count: int, seed: int) -> Data:
        return candidates(data, count, self.count, seed, place=self.place)


@register_method(
    "infonce",
    paper="van den Oord et al. 2018, arXiv 1807.03748; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="directions that tell the matching candidate from others, by its softmax",
    unit="1/‖e‖, of the embedding before it is normalised",
    plan=Plan(steps=600, batch_size=64, lr=5e-4),
)
class InfoNCE(_Candidates):
    """The model `infonce`; uncertainty: 1/‖e‖, which the loss does not train.

    Args:
        inputs: what the network is built for.
        candidates: number of candidates.
        arguments: those of the model.
    """

    def __init__(self, inputs: Inputs, candidates: int = 16, **arguments: Any) -> None:
        super().__init__(inputs, "infonce", 1, candidates, **arguments)


@register_method(
    "mcinfonce",
    paper="Kirchhof et al. 2023, arXiv 2302.02865; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="von Mises–Fisher distributions that tell the matching candidate from others, by log mean probability",
    unit="1/κ",
    plan=Plan(steps=200, batch_size=64, lr=5e-4),
)
class MCInfoNCE(_Candidates):
    """The model `mcinfonce`; uncertainty: 1/κ.

    Args:
        inputs: what the network is built for.
        candidates: number of candidates.
        particles: number of draws per datum.
        arguments: those of the model.
    """

    def __init__(self, inputs: Inputs, candidates: int = 8, particles: int = 4, **arguments: Any) -> None:
        super().__init__(inputs, "mcinfonce", particles, candidates, **{**HEAD, **arguments})


@register_method(
    "hib",
    paper="Oh et al. 2019, arXiv 1810.00319; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="von Mises–Fisher distributions of pairs, by the log mean probability that they match or do not",
    unit="1/κ",
    plan=Plan(steps=300, batch_size=64, lr=5e-4),
)
class HIB(TupleProgram):
    """The model `hib`; uncertainty: 1/κ.

    Args:
        inputs: what the network is built for.
        particles: number of draws per datum.
        arguments: those of the model.
    """

    def __init__(self, inputs: Inputs, particles: int = 8, **arguments: Any) -> None:
        super().__init__(inputs, "hib", "iwae", particles, latents=inputs.latents, **{**HEAD, **arguments})

    def drawn(self, data: Data, count: int, seed: int) -> Data:
        return pairs(data, count, seed)
