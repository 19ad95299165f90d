"""Training a model and its guide by stochastic variational inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.binding import bind
from calibrant.data import Data
from calibrant.errors import DataError, InferenceError, NonFiniteLoss, RunError
from calibrant.inference.objectives import (
    MULTI_SAMPLE,
    OBJECTIVES,
    ElboTerms,
    check_guide,
    check_objective,
    check_trainable,
    elbo_terms,
)
from calibrant.inference.recorded import Gradient, Recorded
from calibrant.program import Program, Values, as_program, check_program, defaults, seeded, sites
from calibrant.progress import Progress, silent
from calibrant.refusals import check_support
from calibrant.store import CHECKPOINTS, has_checkpoint, load_checkpoint, save_checkpoint

_RISE = 0.03  # of all steps
_SHARED_DRAWS = 8  # for each draw that local latents alone would take
_RECORDED_FROM = 500  # steps, or passes over the held-out data
_VERIFIED = 40  # steps after which a graph is compared with the program, or an epoch of more
_SAVED = 10  # steps between checkpoints, or an epoch of more
_EVALUATED = 4096  # held-out data at once


@dataclass
class Fit:
    """What training did.

    Attributes:
        history: a row an epoch: `epoch`, `train` and `validation` ELBO (nats per datum), `lr`; under "iwae" and "dreg"
            also `bound`, the held-out value of what they maximise.
        elbo: the held-out ELBO of the weights that were kept, nats per datum, from fresh draws. The same data chose
            these weights among the epochs; for a figure to publish, evaluate data that took no part.
        elbo_se: its standard error over the held-out data and the draws.
        epochs: the epochs that were run.
        stopped: why training ended: "finished", "early" or "interrupted".
        held_out: labels of the held-out data.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    elbo: float = -math.inf
    elbo_se: float = math.nan
    epochs: int = 0
    stopped: str = "finished"
    held_out: list[Any] = field(default_factory=list)


def fit(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    validation: float | Data = 0.1,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 2e-3,
    objective: str = "stl",
    particles: int = 8,
    clip: float = 10.0,
    patience: int = 20,
    device: str | torch.device | None = None,
    compile: bool | Literal["auto"] = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Fit:
    """Train model and guide in place on the ELBO; the weights that are best on the held-out part are restored.

    Adam with cosine decay to zero over `epochs`; the held-out ELBO uses one fixed random stream, so that epochs
    compare. What is reported is the ELBO, in nats per datum, whatever the objective; "iwae" and "dreg" choose the
    weights by their own, tighter bound. Both modules are left in `eval()`.

    Args:
        model: the program.
        guide: `guide(observed, size, **covariates)`, for example from `calibrant.guides.amortize`.
        observed: site → tensor, or a `Data`.
        covariates: keyword → tensor.
        validation: the share that is held out (seeded), or the held-out data themselves.
        epochs: passes over the data.
        batch_size: data a step; the last, smaller part of an epoch is left out.
        lr: first learning rate.
        objective: "stl" (path-derivative gradient), "kl" (closed-form KL of each site), "iwae" (the bound of several
            draws) or "dreg" (the same bound, the guide's gradient doubly reparameterized); the last two for local
            latents.
        particles: draws a datum of "iwae" and "dreg"; a step takes so many times `batch_size` rows.
        clip: largest norm of the gradient, as a multiple of its running mean.
        patience: epochs without a better held-out ELBO after which training stops.
        device: where to train; the modules move there. None leaves them where they are.
        compile: "auto" records the first step as a graph that the others repeat without Python, in trainings of 500
            steps or more, and gives the graph up where the program turns out to change; True also compiles it, which
            takes some ten seconds; False runs the program in every step, as one needs that counts its calls in Python.
        run_dir: a folder for checkpoints (every epoch, of fewer than ten steps every few); an interrupted training goes
            on with `resume=True`.
        resume: go on from the checkpoint in `run_dir`; the result is the one of a training without a break.
        seed: of the split, the minibatches and the draws.
        progress: called with (stage, done, total, text).

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for an unknown objective, or where there is nothing to train.
        NonFiniteLoss: with the minibatch's labels; the best weights are restored (and saved in `run_dir`, those of the
            last checkpoint).
        RunError: for a checkpoint that is in the way, missing, damaged, or of another training.
    """
    if particles < 1:
        raise InferenceError(f"particles={particles}: give the number of draws a datum, 1 or more")
    data = bind(model, observed, covariates)
    modules = _Modules(as_program(model), as_program(guide))
    if device is not None:
        modules.to(device)
    validation = bind(model, validation) if isinstance(validation, Data) else validation
    train, held = (data, bind(model, validation)) if isinstance(validation, Data) else _split(data, validation, seed)
    modules.eval()
    rows = train.batch(torch.arange(min(len(train), 16)), modules.device)
    check_program(modules.model, *rows)
    check_guide(modules.model, modules.guide, *rows)
    check_trainable(modules.guide, *rows)
    check_objective(objective, modules.model, modules.guide, *rows)
    _check_supports(modules, train, held)
    plan = _Plan(objective, particles, epochs, min(batch_size, len(train)), lr, clip, patience, compile, seed)
    state = _init(modules, plan, train, held)
    folder = _start(state, run_dir, resume)
    with defaults(modules, rows[0]), pyro.validation_enabled(False):
        try:
            if plan.records(plan.steps(len(train))):
                _record(state, plan, train, held)
            while state.fit.epochs < epochs and state.fit.stopped == "finished":
                _epoch(state, plan, train, held)
                if folder is not None and plan.saves(state.fit.epochs, len(train)):
                    save_checkpoint(folder, state)
                progress("fit", state.fit.epochs, epochs, f"held-out ELBO {state.fit.elbo:.2f}")
        except KeyboardInterrupt:
            state.fit.stopped = "interrupted"
        finally:
            modules.load_state_dict(state.best)
            modules.eval()
        _verify_evaluation(state, held)
        state.fit.elbo, state.fit.elbo_se, _ = _held_out_elbo(state, held, plan, len(train), draws=16, stream=1)
    state.fit.held_out = [] if isinstance(validation, Data) else held.labels().tolist()
    return state.fit


class _Modules(nn.Module):
    """Model and guide together: one set of weights."""

    def __init__(self, model: PyroModule, guide: PyroModule) -> None:
        super().__init__()
        self.model, self.guide = model, guide

    @property
    def device(self) -> torch.device:
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))


def _check_supports(modules: _Modules, *parts: Data) -> None:
    """All data are looked at once, since Pyro's own validation is off in training."""
    with torch.no_grad(), seeded(0), defaults(modules, {}):
        for data in parts:
            for index in torch.arange(len(data)).split(4096):
                check_support(modules.model, *data.batch(index, modules.device), labels=data.labels()[index])


@dataclass(frozen=True)
class _Plan:
    """The settings of a training."""

    objective: str
    particles: int
    epochs: int
    batch_size: int
    lr: float
    clip: float
    patience: int
    compile: bool | Literal["auto"]
    seed: int

    def steps(self, total: int) -> int:
        """In all epochs together."""
        return self.epochs * (total // self.batch_size)

    def is_due(self, steps: int, epoch: int, total: int) -> bool:
        """Whether this epoch is one of those with so many steps, or more, from one to the next."""
        return epoch % max(1, steps // (total // self.batch_size)) == 0

    def saves(self, epochs: int, total: int) -> bool:
        """Whether there is a checkpoint after so many epochs."""
        return epochs == self.epochs or self.is_due(_SAVED, epochs, total)

    def records(self, runs: int) -> bool:
        """Whether so many runs are worth a graph."""
        return runs >= _RECORDED_FROM if self.compile == "auto" else self.compile

    @property
    def terms(self) -> Callable[..., ElboTerms]:
        """The objective, as a function of (model, guide, observed, size, covariates)."""
        function = OBJECTIVES[self.objective]
        return partial(function, particles=self.particles) if self.objective in MULTI_SAMPLE else function

    @property
    def evaluation(self) -> Callable[..., ElboTerms]:
        """The terms of the held-out data."""
        return torch.no_grad()(self.terms) if self.objective in MULTI_SAMPLE else elbo_terms

    def learning_rate(self, progress: float) -> float:
        """Cosine decay to zero, after a linear rise over the first part of training."""
        return self.lr * min(1.0, progress / _RISE) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class TrainingState:
    """All that changes during training, and the settings that it must not change under."""

    modules: _Modules
    gradient: Gradient
    evaluation: Recorded
    optimizer: torch.optim.Adam
    best: dict[str, Tensor]
    settings: dict[str, Any]
    score: float = -math.inf
    waited: int = 0
    gradient_norm: float = 0.0
    fit: Fit = field(default_factory=Fit)


def _init(modules: _Modules, plan: _Plan, train: Data, held: Data) -> TrainingState:
    gradient = Gradient(modules, partial(_objective, modules, plan, len(train)))
    if not gradient.weights:
        raise InferenceError("neither the model nor the guide has a weight that takes a gradient: nothing to train")
    settings = {**asdict(plan), "training data": len(train), "held-out data": len(held)}
    evaluation = Recorded(modules, partial(_evaluation, modules, plan))
    return TrainingState(modules, gradient, evaluation, gradient.adam(plan.lr), _copy(modules), settings)


def _objective(
    modules: _Modules, plan: _Plan, total: int, observed: Values, covariates: Values
) -> tuple[Tensor, Tensor]:
    """What is maximised, and the ELBO in nats per datum."""
    terms = plan.terms(modules.model, modules.guide, observed, plan.batch_size, covariates)
    return terms.maximised(total), terms.per_datum(total)


def _evaluation(modules: _Modules, plan: _Plan, observed: Values, covariates: Values) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of held-out data: local, shared, and what is maximised in place of the local ones."""
    size = len(next(iter(observed.values())))
    terms = plan.evaluation(modules.model, modules.guide, observed, size, covariates)
    return terms.local, terms.shared, terms.local if terms.bound is None else terms.bound


def _record(state: TrainingState, plan: _Plan, train: Data, held: Data) -> None:
    """The first minibatch's step as a graph, compared on another one; the held-out ELBO too, where it is run often."""
    order = torch.arange(len(train), device="cpu")
    first, other = (train.batch(index[: plan.batch_size], state.modules.device) for index in (order, order.flip(0)))
    state.modules.train()
    state.gradient.record(first, other, plan.compile is True)
    state.modules.eval()
    is_shared = any(not site.local for site in sites(state.modules.model, *first).values())
    runs = plan.epochs * (_SHARED_DRAWS if is_shared else 1)
    if state.gradient.is_graph and runs >= _RECORDED_FROM and len(held) <= _EVALUATED:
        rows = _all_of(held, state.modules)
        state.evaluation.record(rows, rows)


def _verify_evaluation(state: TrainingState, held: Data) -> None:
    if state.evaluation.is_graph:
        state.evaluation.verify(*_all_of(held, state.modules))


def _all_of(data: Data, modules: _Modules) -> tuple[Values, Values]:
    return data.batch(torch.arange(len(data), device="cpu"), modules.device)


def _start(state: TrainingState, run_dir: str | Path | None, resume: bool) -> Path | None:
    """The folder of the checkpoints, with one in it from which this training starts."""
    if run_dir is None:
        if resume:
            raise RunError("resume=True needs the folder of the training: run_dir=")
        return None
    folder = Path(run_dir) / CHECKPOINTS
    if resume:
        load_checkpoint(folder, state)
    elif has_checkpoint(folder):
        raise RunError(f"there is a checkpoint in {folder}: go on with resume=True, or give another folder")
    else:
        save_checkpoint(folder, state)
    return folder


def _copy(modules: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in modules.state_dict().items()}


def _epoch(state: TrainingState, plan: _Plan, train: Data, held: Data) -> None:
    """One pass over the data, with a random stream of its own, then the held-out ELBO."""
    epoch = state.fit.epochs
    with seeded(plan.seed * 1_000_003 + epoch + 1):
        order = torch.randperm(len(train), device="cpu", generator=torch.Generator().manual_seed(plan.seed + epoch))
        batches = order.split(plan.batch_size)[: len(train) // plan.batch_size]
        state.modules.train()
        is_verified = plan.is_due(_VERIFIED, epoch, len(train))
        if is_verified:
            state.gradient.verify(*train.batch(batches[0], state.modules.device))
        elbos = []
        for step, index in enumerate(batches):
            lr = plan.learning_rate((epoch + (step + 1) / len(batches)) / plan.epochs)
            elbos.append(_step(state, plan, train, index, lr))
    state.modules.eval()
    if is_verified:
        _verify_evaluation(state, held)
    elbo, elbo_se, score = _held_out_elbo(state, held, plan, len(train))
    row = {"epoch": epoch + 1, "train": sum(elbos) / len(elbos), "validation": elbo, "lr": lr}
    state.fit.history.append({**row, "bound": score} if plan.objective in MULTI_SAMPLE else row)
    state.fit.epochs += 1
    _keep_best(state, plan, elbo, elbo_se, score)


def _step(state: TrainingState, plan: _Plan, train: Data, index: Tensor, lr: float) -> float:
    bound, elbo, *slopes = state.gradient(*train.batch(index, state.modules.device))
    for weight, slope in zip(state.gradient.weights.values(), slopes, strict=True):
        weight.grad = -slope
    norm = nn.utils.get_total_norm(slopes)
    if not (bound.isfinite() and norm.isfinite()):
        batch = list(train.coords["data"][index])
        some = ", ".join(str(label) for label in batch[:8]) + (f", … ({len(batch)} in all)" if len(batch) > 8 else "")
        raise NonFiniteLoss(
            f"the ELBO or its gradient isn't finite in epoch {state.fit.epochs + 1}, minibatch of the data {some}; the "
            f"last good weights are restored. Look at these data, or lower lr ({plan.lr:g}) or clip ({plan.clip:g})",
            batch,
        )
    _clip(state, plan, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    return float(elbo)


def _clip(state: TrainingState, plan: _Plan, norm: Tensor) -> None:
    """Shorten a gradient that is much longer than usual; a fixed length would bind in one model and not in another."""
    usual = state.gradient_norm or float(norm)
    longest = plan.clip * usual
    nn.utils.clip_grads_with_norm_(state.modules.parameters(), longest, norm)
    state.gradient_norm = 0.98 * usual + 0.02 * min(float(norm), longest)


def _keep_best(state: TrainingState, plan: _Plan, elbo: float, elbo_se: float, score: float) -> None:
    if score > state.score:
        state.fit.elbo, state.fit.elbo_se, state.score, state.waited = elbo, elbo_se, score, 0
        state.best = _copy(state.modules)
        return
    state.waited += 1
    if state.waited >= plan.patience:
        state.fit.stopped = "early"


def _held_out_elbo(
    state: TrainingState, held: Data, plan: _Plan, total: int, draws: int = 1, stream: int = 0
) -> tuple[float, float, float]:
    """ELBO per datum, its standard error, and what weights are chosen by, with the same random stream at every call.

    The shared terms are divided by `total`, the number of training data, as in training: what is held out says how well
    the guide does on new data, not what it would be if it had seen only these. One draw of shared latents moves the
    terms of all data together, so more are averaged where there are such latents.
    """
    with seeded(plan.seed + stream):
        passes = [_one_pass(state, held)]
        is_shared = bool(passes[0].shared != 0)
        draws = _SHARED_DRAWS * draws if is_shared else draws
        passes += [_one_pass(state, held) for _ in range(draws - 1)]
    local, shared = torch.stack([p.local for p in passes]), torch.stack([p.shared for p in passes])
    estimates = local.mean(1) + shared / total
    variance = local.mean(0).var() / len(held) if len(held) > 1 else torch.tensor(math.nan)
    if is_shared:
        variance = variance + estimates.var() / draws
    score = torch.stack([p.maximised(total) for p in passes]).mean()
    return float(estimates.mean()), float(variance.sqrt()), float(score)


def _one_pass(state: TrainingState, held: Data) -> ElboTerms:
    """One draw of the terms for all held-out data (of "iwae" and "dreg" one for each particle), in float64."""
    parts = torch.arange(len(held), device="cpu").split(_EVALUATED)
    terms = [state.evaluation(*held.batch(index, state.modules.device)) for index in parts]
    local, shared, bound = zip(*terms, strict=True)
    return ElboTerms(torch.cat(local).double(), torch.stack(shared).double().mean(), torch.cat(bound).double())


def _split(data: Data, validation: float, seed: int) -> tuple[Data, Data]:
    count = round(validation * len(data))
    if not 1 <= count < len(data):
        raise DataError(f"validation={validation} of {len(data)} data leaves a part empty: give 0 < validation < 1")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[count:].sort().values), data.subset(order[:count].sort().values)
