"""How long a training goes on: how many epochs, when it waits no longer, and whether it ended too soon."""

from __future__ import annotations

from math import ceil

from calibrant.inference.fitting.state import Plan

FINISHED, EARLY, INTERRUPTED, STILL_RISING = "finished", "early", "interrupted", "still rising"
ENDED = (FINISHED, EARLY, STILL_RISING)

# A training whose length is not given has this many epochs, and at least so many steps. Batches below a size have
# noisier gradients, and get more steps, which take less time each.
_EPOCHS, _STEPS = 100, 2000
_SMALL_BATCH, _SMALL_STEPS = 128, 5000
_PATIENCE = 0.2  # share of the epochs without a better held-out ELBO after which training stops
_PATIENT_STEPS = 500  # least number of steps without a better held-out ELBO after which training stops
_LAST_TRAVEL = 0.2  # the last part of a training, as a share of the sum of all learning rates
_SHARE = 0.05  # a held-out ELBO that gains more than this share of its whole rise in the last part still rises
_LEAST_GAIN = 0.01  # nats per datum; a smaller gain in the last part counts as none
_WINDOW = 0.05  # share of the epochs over which the held-out ELBO is averaged


def epochs_for(steps: int, batch_size: int) -> int:
    """Number of epochs of a training whose length is not given, for epochs of this many steps of this many data."""
    return max(_EPOCHS, ceil((_STEPS if batch_size >= _SMALL_BATCH else _SMALL_STEPS) / steps))


def patient_epochs(epochs: int, patience: int | None, steps: int) -> int:
    """Number of epochs without a better held-out ELBO after which training stops.

    Args:
        epochs: number of all epochs.
        patience: number of epochs that was asked for; None for a fifth of all.
        steps: number of steps of an epoch.
    """
    return max(ceil(_PATIENCE * epochs) if patience is None else patience, ceil(_PATIENT_STEPS / steps))


def still_rises(history: list[dict[str, float]], plan: Plan) -> bool:
    """Whether the held-out ELBO (or the bound that was maximised) was still rising when all epochs were over.

    The learning rate decays to zero, so that the last epochs always gain little. A training is judged by the part that
    has the last fifth of the sum of all learning rates, almost the second half of the epochs: a curve that has reached
    its final value has gained nothing there, one that rises at a constant speed has gained a fifth of its whole rise.
    """
    values = [row.get("bound", row.get("objective", row["validation"])) for row in history]
    if len(values) < 4:
        return False
    rates = [plan.learning_rate((epoch + 0.5) / plan.epochs) for epoch in range(len(values))]
    rest, start = sum(rates), 0
    limit = _LAST_TRAVEL * rest
    while rest > limit:
        rest -= rates[start]
        start += 1
    window = max(1, round(_WINDOW * len(values)))
    middle, end = (sum(part) / len(part) for part in (values[start - window : start], values[-window:]))
    gain = end - middle
    return gain > max(_LEAST_GAIN, _SHARE * (end - values[0]))
