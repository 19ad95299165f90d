"""The ELBO of held-out data during training."""

from __future__ import annotations

import math

import torch

from calibrant.data.dataset import Data
from calibrant.guides.many_draws import Encodings
from calibrant.inference.fitting.objectives import ElboTerms
from calibrant.inference.fitting.state import Modules, Plan, TrainingState
from calibrant.program.contract import Values
from calibrant.program.environment import seeded
from calibrant.streams import stream

SHARED_DRAWS = 8  # with shared latents, number of draws for each draw that local latents alone would need
_LAST_DRAWS = 16  # number of draws of each datum after training, of few data
_LAST_ROWS = 2**18  # draws of all data together from which on there are fewer for each: their noise is averaged out
EVALUATED = 4096  # number of held-out data that are evaluated at a time


def verify_evaluation(state: TrainingState, held: Data) -> None:
    if state.evaluation.is_graph:
        state.evaluation.verify(*all_rows(held, state.modules))


def all_rows(data: Data, modules: Modules) -> tuple[Values, Values]:
    return data.batch(torch.arange(len(data), device="cpu"), modules.device)


def last_draws(rows: int, held: int) -> tuple[int, int]:
    """Number of draws for the ELBO after training, without and with shared latents.

    Args:
        rows: number of rows that the training has seen in all steps: with shared latents, the passes over the held-out
            data see no more, so that they take less time than the training, unless this is very short.
        held: number of held-out data.
    """
    local = min(_LAST_DRAWS, -(-_LAST_ROWS // held))
    return local, min(SHARED_DRAWS * _LAST_DRAWS, max(_LAST_DRAWS, rows // held))


def held_out_elbo(
    state: TrainingState,
    held: Data,
    plan: Plan,
    total: int,
    draws: tuple[int, int] = (1, SHARED_DRAWS),
    purpose: str = "epoch",
) -> tuple[float, float, float]:
    """The ELBO per datum, its standard error, and the score by which weights are chosen.

    All calls for one purpose use the same random stream. `draws` is the number of draws of each datum without and with
    shared latents.

    The shared terms are divided by `total`, the number of training data, as in training: held-out data measure the
    guide on new data, not a guide that was trained on the held-out data alone. If there are shared latents, more draws
    are averaged, since one draw of them changes the terms of all data together.
    """
    encodings = Encodings(state.modules.guide)
    with seeded(stream(plan.seed, "fit", "held-out", purpose)):
        passes = [_one_pass(state, held, encodings)]
        is_shared = bool(passes[0].shared != 0)
        count = draws[is_shared]
        passes += [_one_pass(state, held, encodings) for _ in range(count - 1)]
    local, shared = torch.stack([p.local for p in passes]), torch.stack([p.shared for p in passes])
    estimates = local.mean(1) + shared / total
    variance = local.mean(0).var() / len(held) if len(held) > 1 else torch.tensor(math.nan)
    if is_shared:
        variance = variance + estimates.var() / count
    score = torch.stack([p.maximised(total) for p in passes]).mean()
    return float(estimates.mean()), float(variance.sqrt()), float(score)


def _one_pass(state: TrainingState, held: Data, encodings: Encodings) -> ElboTerms:
    """The terms for all held-out data from one draw per datum (per particle under "iwae" and "dreg"), in float64."""
    terms = []
    for part, index in enumerate(torch.arange(len(held), device="cpu").split(EVALUATED)):
        with encodings.of(part):
            terms.append(state.evaluation(*held.batch(index, state.modules.device)))
    local, shared, bound = zip(*terms, strict=True)
    return ElboTerms(torch.cat(local).double(), torch.stack(shared).double().mean(), torch.cat(bound).double())
