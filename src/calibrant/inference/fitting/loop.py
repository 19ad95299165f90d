"""Training a model and its guide by stochastic variational inference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from calibrant.binding import bind
from calibrant.data.dataset import Data
from calibrant.errors import DataError, NonFiniteLoss, RunError
from calibrant.folders.configuration import CONFIG
from calibrant.guides.contract import check_guide, check_trainable
from calibrant.inference.fitting.checkpoints import CHECKPOINTS, has_checkpoint, load_checkpoint, save_checkpoint
from calibrant.inference.fitting.given import check_alike, check_device, check_numbers
from calibrant.inference.fitting.held_out import (
    EVALUATED,
    SHARED_DRAWS,
    all_rows,
    held_out_elbo,
    last_draws,
    verify_evaluation,
)
from calibrant.inference.fitting.kinds import warn_of_other_loss
from calibrant.inference.fitting.kl_weights import KLWeight, check_weights, schedules_of, still_change, weights_at
from calibrant.inference.fitting.lengths import (
    EARLY,
    FINISHED,
    INTERRUPTED,
    STILL_RISING,
    epochs_for,
    patient_epochs,
    still_rises,
)
from calibrant.inference.fitting.noise import noise_of, settle_noise, start_noise, warn_of_late_noise
from calibrant.inference.fitting.objectives import MULTI_SAMPLE, check_objective
from calibrant.inference.fitting.run_folder import finish_run, require_free, save_run, writing
from calibrant.inference.fitting.scales import warn_of_far_data
from calibrant.inference.fitting.state import (
    RECORDED_FROM,
    Fit,
    Modules,
    Plan,
    TrainingState,
    copy_of_weights,
    initial_state,
)
from calibrant.inference.problem import check_supports
from calibrant.program.contract import Program, as_program
from calibrant.program.environment import defaults, seeded
from calibrant.program.latents import sites
from calibrant.program.losses import has_training_loss
from calibrant.program.refusals import check_program
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

_HELD_OUT, _SPLIT_FROM = 0.1, 20  # share of the data that is held out, and the least number of data to split
_NEVER_ZERO = 1e-6  # added to the norm by which a gradient is divided
_VERIFIED = 40  # steps between comparisons of a graph with the program; in longer epochs, once per epoch


def fit(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    validation: float | Mapping[str, Any] | Data | None = None,
    epochs: int | None = None,
    batch_size: int = 256,
    lr: float = 2e-3,
    objective: str = "stl",
    particles: int = 8,
    kl_weights: Mapping[str, KLWeight] | None = None,
    clip: float = 10.0,
    patience: int | None = None,
    device: str | torch.device | None = None,
    compile: bool | Literal["auto"] = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Progress | bool = True,
) -> Fit:
    """Train model and guide in place on the ELBO, and restore the weights with the best held-out value.

    A likelihood that is a training loss and no density takes the place of the log likelihood; `Fit.is_elbo` is False.

    The optimiser is Adam with cosine decay to zero over `epochs`. The held-out ELBO always uses the same random stream,
    so that epochs can be compared. The ELBO in nats per datum is reported for every objective; "iwae" and "dreg" choose
    the weights by their own, tighter bound, and a training with `kl_weights` by its own objective, with the last of its
    weights. Both modules are left in `eval()`.

    Args:
        model: the program.
        guide: a guide `guide(observed, size, **covariates)`, for example from `calibrant.guides.amortize`.
        observed: site → tensor, or a `Data`.
        covariates: keyword → tensor, leading dimension data.
        validation: the share that is held out (seeded), or the held-out data themselves, in any form of `observed`,
            with all covariates; None for a tenth. Of fewer
            than 20 data, None holds out none, since shared latents would be inferred without them: the held-out ELBO is
            then that of the training data.
        epochs: number of passes over the data; None for 100, or more where few data make short epochs, so that there
            are at least 2,000 steps, or 5,000 of fewer than 128 data each.
        batch_size: number of data per step; the last, smaller part of an epoch is skipped.
        lr: peak learning rate.
        objective: "stl" (ELBO with path-derivative gradient), "kl" (ELBO with the closed-form KL of each site), "iwae"
            (the bound of several draws) or "dreg" (the same bound with a doubly reparameterized gradient of the guide);
            the last two need local latents only. With a guide of `guides.prior`, "iwae" trains −log mean p(y | z_k) of
            `particles` draws, "stl" and "kl" −log p(y | z) of one draw, and "dreg" is refused; a program whose
            attribute `loss_kind` says that it is made for another one of these losses gets a warning.
        particles: number of draws per datum of "iwae" and "dreg"; a step takes `particles` × `batch_size` rows.
        kl_weights: latent of a datum → weight of its divergence from the prior, to repeat a training such as that of a
            β-VAE: a number, or points (epoch, weight) between which it is interpolated, such as `[[0, 0.1], [20, 1]]`.
            What is maximised is then no ELBO; all values that are reported are those of the ELBO.
        clip: largest norm of the gradient, as a multiple of its running mean.
        patience: number of epochs without a better held-out ELBO after which training stops; None for a fifth of the
            epochs. It waits for at least 500 steps, so that short epochs are no reason to stop.
        device: device on which to train, to which the modules are moved; None trains on their current device.
        compile: "auto" records the first step as a graph, which later steps run without Python, if there are 500 steps
            or more, and discards the graph if the program turns out to change; True also compiles it, which takes some
            ten seconds; False runs the program in every step, which a program needs that counts its calls in Python.
        run_dir: a folder that keeps the result: `calibrant.load(run_dir)` loads model and guide with the best weights.
            Checkpoints are written every epoch, or every few epochs if an epoch has fewer than ten steps; an
            interrupted training can be resumed with `resume=True`.
        resume: continue from the checkpoint in `run_dir`; the result is that of a training without interruption.
        seed: random seed for the split, the minibatches and the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for numbers of the wrong kind, a device that cannot be used here, an unknown objective,
            `kl_weights` that cannot be used, or if there is nothing to train.
        NonFiniteLoss: for a loss or gradient that is not finite; the error has the labels of the minibatch. The best
            weights are restored (`run_dir` holds those of the last checkpoint).
        RunError: for a run or checkpoint that would be overwritten, a folder that cannot be written, and for a
            checkpoint that is missing, damaged, or of another training.
    """
    progress = reporting(progress)
    numbers = {"epochs": epochs, "batch_size": batch_size, "particles": particles, "patience": patience}
    check_numbers({**numbers, "lr": lr, "clip": clip, "seed": seed, "compile": compile})
    if device is not None:
        check_device(device)
    folder = _folder(run_dir, resume)
    modules = Modules(as_program(model), as_program(guide))
    train, held = _split(model, bind(model, observed, covariates), validation, seed)
    if device is not None:
        modules.to(device)
    batch_size = min(batch_size, len(train))
    epochs = epochs_for(len(train) // batch_size, batch_size) if epochs is None else epochs
    patience = patient_epochs(epochs, patience, len(train) // batch_size)
    schedules = schedules_of(kl_weights)
    plan = Plan(objective, particles, epochs, batch_size, lr, clip, patience, compile, seed, schedules)
    _check(modules, plan, train, held)
    start_noise(modules, train, seed)
    state = initial_state(modules, plan, train, held)
    state.fit.kl_weights = schedules
    state.fit.is_elbo = not has_training_loss(modules.model, *train.batch([0], modules.device))
    if folder is not None:
        _start(state, plan, train, held, folder, resume)
    _train(state, plan, train, held, folder, progress)
    is_share = validation is None or isinstance(validation, int | float)
    state.fit.held_out = held.labels().tolist() if is_share and held is not train else []
    if folder is not None:
        finish_run(folder, modules.model, modules.guide, state.fit)
    return state.fit


def _check(modules: Modules, plan: Plan, train: Data, held: Data) -> None:
    """Refuse what breaks the contract. All data are looked at, since Pyro's own validation is off in training."""
    model, guide = modules.eval().model, modules.guide
    rows = train.batch(torch.arange(min(len(train), 16)), modules.device)
    check_program(model, *rows)
    check_guide(model, guide, *rows)
    check_trainable(guide, *rows)
    check_objective(plan.objective, model, guide, *rows)
    warn_of_other_loss(model, guide, plan.objective, plan.particles, *rows)
    check_weights(plan.kl_weights, plan.objective, model, guide, *rows)
    check_supports(model, train, held)
    warn_of_far_data(modules, train, plan.seed)


def _train(state: TrainingState, plan: Plan, train: Data, held: Data, folder: Path | None, progress: Progress) -> None:
    """Train for all remaining epochs, restore the best weights, and evaluate their held-out ELBO."""
    modules, given = state.modules, train.batch([0], state.modules.device)[0]
    progress("fit", state.fit.epochs, plan.epochs)
    with defaults(modules, given), pyro.validation_enabled(False):
        try:
            if plan.records(plan.steps(len(train))):
                _record(state, plan, train, held)
            while state.fit.epochs < plan.epochs and state.fit.stopped == FINISHED:
                _epoch(state, plan, train, held)
                if folder is not None and plan.saves(state.fit.epochs, len(train)):
                    save_checkpoint(folder / CHECKPOINTS, state)
                progress("fit", state.fit.epochs, plan.epochs, str(state.fit))
        except KeyboardInterrupt:
            state.fit.stopped = INTERRUPTED
        finally:
            modules.load_state_dict(state.best)
            modules.eval()
        verify_evaluation(state, held)
        if state.fit.epochs and plan.objective not in MULTI_SAMPLE and state.fit.stopped != INTERRUPTED:
            warn_of_late_noise(modules, train, stream(plan.seed, "fit", "late noise"))
        limit = last_draws(plan.steps(len(train), state.fit.epochs) * plan.batch_size, len(held))
        state.fit.elbo, state.fit.elbo_se, _ = held_out_elbo(state, held, plan, len(train), limit, "last")
    if state.fit.stopped == FINISHED and still_rises(state.fit.history, plan):
        state.fit.stopped = STILL_RISING
    if state.fit.stopped != INTERRUPTED:
        rising = ", still rising" if state.fit.stopped == STILL_RISING else ""
        progress("fit", state.fit.epochs, state.fit.epochs, f"{state.fit}{rising}")


def _record(state: TrainingState, plan: Plan, train: Data, held: Data) -> None:
    """Record the step on a minibatch as a graph, and compare it on another one; likewise a frequent held-out ELBO."""
    order = torch.arange(len(train), device="cpu")
    first, other = (train.batch(index[: plan.batch_size], state.modules.device) for index in (order, order.flip(0)))
    state.modules.train()
    weights = plan.kl_weights_at(0), plan.kl_weights_at(plan.epochs)
    state.gradient.record((*first, weights[0]), (*other, weights[1]), plan.compile is True)
    state.modules.eval()
    is_shared = any(not site.local for site in sites(state.modules.model, *first).values())
    runs = plan.epochs * (SHARED_DRAWS if is_shared else 1)
    if state.gradient.is_graph and runs >= RECORDED_FROM and len(held) <= EVALUATED and not state.settled:
        rows = all_rows(held, state.modules)
        state.evaluation.record(rows, rows)


def _folder(run_dir: str | Path | None, resume: bool) -> Path | None:
    """The folder of a training, which must be free for a new one, and must have a checkpoint to resume from."""
    if run_dir is None:
        if resume:
            raise RunError("resume=True needs the folder of the training: give run_dir=")
        return None
    folder = Path(run_dir)
    if not resume:
        if has_checkpoint(folder / CHECKPOINTS):
            raise RunError(
                f"there is a checkpoint in {folder / CHECKPOINTS}: continue it with resume=True (or take its result, "
                "if it has ended), or give another folder"
            )
        require_free(folder)
    return folder


def _start(state: TrainingState, plan: Plan, train: Data, held: Data, folder: Path, resume: bool) -> None:
    """Load or write the first checkpoint, and write a configuration, unless a command has written it."""
    values = {"training": train, "held-out": held}  # a checkpoint belongs to these data
    state.settings |= {f"sha256 of the {part} data": data.fingerprint()[:16] for part, data in values.items()}
    if resume:
        load_checkpoint(folder / CHECKPOINTS, state)
    with writing(folder):
        if not resume:
            save_checkpoint(folder / CHECKPOINTS, state)
        if not (folder / CONFIG).is_file():
            data = {"name": train.name, "observed": list(train.observed_names), "covariates": [*train.covariate_names]}
            save_run(folder, state.modules.model, state.modules.guide, data=data, settings=asdict(plan))


def _epoch(state: TrainingState, plan: Plan, train: Data, held: Data) -> None:
    """One pass over the data, with a random stream of its own, then the held-out ELBO if it is due."""
    epoch = state.fit.epochs
    shuffled = torch.Generator().manual_seed(stream(plan.seed, "fit", "minibatches", epoch))
    with seeded(stream(plan.seed, "fit", "draws", epoch)):
        order = torch.randperm(len(train), device="cpu", generator=shuffled)
        batches = order.split(plan.batch_size)[: len(train) // plan.batch_size]
        state.modules.train()
        is_verified = plan.is_due(_VERIFIED, epoch, len(train))
        if is_verified:
            state.gradient.verify(*train.batch(batches[0], state.modules.device), plan.kl_weights_at(epoch))
        elbos = []
        for step, index in enumerate(batches):
            progress = epoch + (step + 1) / len(batches)
            elbos.append(_step(state, plan, train, index, progress))
    state.modules.eval()
    if is_verified:
        verify_evaluation(state, held)
    row = {"epoch": epoch + 1, "train": sum(elbos) / len(elbos)}
    if plan.evaluates(epoch, len(train)):
        settle_noise(state.modules, state.settled, train, stream(plan.seed, "fit", "noise", epoch))
        elbo, elbo_se, score = held_out_elbo(state, held, plan, len(train))
        _keep_best(state, elbo, elbo_se, score)
        row |= {"validation": elbo, **({plan.score: score} if plan.score else {})}
    else:
        state.waited += 1
        row |= {name: value for name, value in state.fit.history[-1].items() if name in ("validation", plan.score)}
    weights = {f"weight of {name}": w for name, w in weights_at(plan.kl_weights, epoch + 1).items()}
    lr = plan.learning_rate((epoch + 1) / plan.epochs)
    state.fit.history.append({**row, "lr": lr, **weights, **noise_of(state.modules.model)})
    state.fit.epochs += 1
    if still_change(plan.kl_weights, state.fit.epochs):
        state.waited = 0
    if state.waited >= plan.patience:
        state.fit.stopped = EARLY


def _step(state: TrainingState, plan: Plan, train: Data, index: Tensor, progress: float) -> float:
    """One step; `progress` is the number of epochs at its end."""
    batch = train.batch(index, state.modules.device)
    bound, elbo, norm, *slopes = state.gradient(*batch, plan.kl_weights_at(progress))
    found = torch.stack([bound, elbo, norm]).tolist()  # read together, since a GPU is waited for each time
    if not all(map(math.isfinite, (found[0], found[2]))):
        raise _non_finite(state, plan, list(train.coords["data"][index]))
    slopes = _clipped(state, plan, slopes, norm, found[2])
    for weight, slope in zip(state.gradient.weights.values(), slopes, strict=True):
        weight.grad = slope
    for group in state.optimizer.param_groups:
        group["lr"] = plan.learning_rate(progress / plan.epochs)
    state.optimizer.step()
    return found[1]


def _non_finite(state: TrainingState, plan: Plan, batch: list[Any]) -> NonFiniteLoss:
    some = ", ".join(str(label) for label in batch[:8]) + (f", … ({len(batch)} in all)" if len(batch) > 8 else "")
    return NonFiniteLoss(
        f"the ELBO or its gradient isn't finite in epoch {state.fit.epochs + 1}, minibatch of the data {some}; the "
        f"last good weights are restored. Look at these data, or lower lr ({plan.lr:g}) or clip ({plan.clip:g})",
        batch,
    )


def _clipped(state: TrainingState, plan: Plan, slopes: list[Tensor], norm: Tensor, length: float) -> list[Tensor]:
    """Shorten a gradient that is much longer than usual; no fixed limit would suit all models.

    Args:
        norm, length: the norm of the gradient, as a tensor and as a number.
    """
    usual = state.gradient_norm or length
    longest = plan.clip * usual
    state.gradient_norm = 0.98 * usual + 0.02 * min(length, longest)
    if length + _NEVER_ZERO <= longest:
        return slopes
    return [longest / (norm + _NEVER_ZERO) * slope for slope in slopes]


def _keep_best(state: TrainingState, elbo: float, elbo_se: float, score: float) -> None:
    if score > state.score:
        state.fit.elbo, state.fit.elbo_se, state.score, state.waited = elbo, elbo_se, score, 0
        state.best = copy_of_weights(state.modules)
    else:
        state.waited += 1


def _split(model: Program, data: Data, validation: Any, seed: int) -> tuple[Data, Data]:
    """The training data and the held-out data: the same ones where a few data are not to be split."""
    if validation is not None and not isinstance(validation, int | float):
        held = bind(model, validation)
        check_alike("validation", held, data)
        return data, held
    if validation is None and len(data) < _SPLIT_FROM:
        return data, data
    share = _HELD_OUT if validation is None else validation
    count = round(share * len(data))
    if not 1 <= count < len(data):
        raise DataError(
            f"validation={share} of {len(data)} data leaves a part empty: give validation=None, which holds out a "
            f"tenth of {_SPLIT_FROM} data or more and none of fewer, or the held-out data themselves"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream(seed, "fit", "validation")))
    is_held = torch.zeros(len(data), dtype=torch.bool)
    is_held[order[:count]] = True
    return data.subset(~is_held), data.subset(is_held)
