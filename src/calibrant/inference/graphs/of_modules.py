"""What is computed again and again on data, by a graph that is recorded once where the program allows it.

A run of the program and its guide spends as long in Python as in arithmetic. A graph repeats what they did once:
what they do otherwise later (a weight annealed in Python, random numbers that are not torch's) would be lost. So it is
compared with them at the same random numbers, on other data than it was recorded on and again as training goes on;
where they differ, they run as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calibrant.inference.graphs.recording import Outputs, TensorFunction, compiled, record
from calibrant.program.contract import Values

_RECORDING = 7_040_021  # seed of no other use
_SAME = 1e-4  # of an output's length
_ROUNDING = 1e-6  # of the longest output


class Recorded:
    """A function of data that runs modules, and of their weights, by a graph where one was recorded.

    Args:
        modules: what the function runs.
        function: (observed, covariates) → tensors.

    Attributes:
        weights: the weights of `modules` that take a gradient.
        is_graph: whether a graph is in use.
    """

    def __init__(self, modules: nn.Module, function: Callable[[Values, Values], Outputs]) -> None:
        self._modules, self._inner = modules, _Inner(modules, function)
        self._graph: TensorFunction | None = None
        self.weights = {name: weight for name, weight in modules.named_parameters() if weight.requires_grad}

    @property
    def is_graph(self) -> bool:
        return self._graph is not None

    def __call__(self, observed: Values, covariates: Values) -> Outputs:
        function = self._graph or self._of_tensors(observed, covariates)
        return function(*self._inputs(observed, covariates))

    def record(self, first: tuple[Values, Values], other: tuple[Values, Values], compile_it: bool = False) -> None:
        """From now on, run a graph; all data must have the shapes of these two.

        Nothing changes where the function can't be recorded, or where the graph gives something else on `other`.
        """
        before = {name: buffer.clone() for name, buffer in self._modules.named_buffers()}
        function = self._of_tensors(*first)
        with torch.random.fork_rng():
            torch.manual_seed(_RECORDING)  # other draws than it is compared at: they may be constants in the graph
            graph = (compiled if compile_it else record)(function, *self._inputs(*first))
        self._graph = None if graph is function else graph
        self.verify(*other)
        for name, buffer in self._modules.named_buffers():
            if not buffer.equal(before[name]):  # statistics of minibatches, constants in a graph
                self._graph = None
                buffer.copy_(before[name])

    def verify(self, observed: Values, covariates: Values) -> None:
        """Give the graph up where the modules do something else on these data."""
        if self._graph is None:
            return
        outputs = []
        for function in (self._graph, self._of_tensors(observed, covariates)):
            with torch.random.fork_rng():
                outputs.append(function(*self._inputs(observed, covariates)))
        if not _agree(*outputs):
            self._graph = None
            warnings.warn(
                "the program or its guide does not do the same each time (something changes in Python, or draws "
                "numbers that are not torch's), so that it runs anew each time and takes about twice as long",
                RuntimeWarning,
                stacklevel=4,
            )

    def _inputs(self, observed: Values, covariates: Values) -> list[Tensor]:
        return [*(weight.detach() for weight in self.weights.values()), *observed.values(), *covariates.values()]

    def _of_tensors(self, observed: Values, covariates: Values) -> TensorFunction:
        """As a function of flat tensors, for data with the keys of these."""

        def function(*flat: Tensor) -> Outputs:
            tensors = iter(flat)
            weights = {name: next(tensors) for name in self.weights}
            rows, cols = ({name: next(tensors) for name in part} for part in (observed, covariates))
            return self._run(weights, rows, cols)

        return function

    def _run(self, weights: Values, observed: Values, covariates: Values) -> Outputs:
        held = {f"inner.{name}": weight for name, weight in weights.items()}
        return functional_call(self._inner, held, (observed, covariates))


class Gradient(Recorded):
    """What is maximised on a minibatch, other outputs of the objective, and the gradients of the first in the weights.

    Args:
        modules: what the objective runs.
        function: the objective, (observed, covariates) → tensors; the first is maximised, `()`.
    """

    def __call__(self, observed: Values, covariates: Values) -> Outputs:
        return tuple(output.contiguous() for output in super().__call__(observed, covariates))

    def adam(self, lr: float, **options: Any) -> torch.optim.Adam:
        """Adam for the weights, in one kernel where these are contiguous, as gradients are: that one reads memory in
        order, whatever the strides."""
        weights = list(self.weights.values())
        is_plain = all(weight.is_contiguous() and weight.device.type in ("cpu", "cuda") for weight in weights)
        return torch.optim.Adam(weights, lr, fused=is_plain, **options)

    def _run(self, weights: Values, observed: Values, covariates: Values) -> Outputs:
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        outputs = super()._run(weights, observed, covariates)
        slopes = torch.autograd.grad(outputs[0], list(weights.values()), allow_unused=True, materialize_grads=True)
        return *(output.detach() for output in outputs), *slopes


class _Inner(nn.Module):
    """A function of modules as the forward of one, whose weights a functional call replaces."""

    def __init__(self, modules: nn.Module, function: Callable[[Values, Values], Outputs]) -> None:
        super().__init__()
        self.inner, self.function = modules, function

    def forward(self, observed: Values, covariates: Values) -> Outputs:
        return self.function(observed, covariates)


def _agree(ours: Outputs, theirs: Outputs) -> bool:
    """Up to rounding: at an optimum nothing is left of a gradient but that of the terms whose sum is maximised."""
    finite = [(a.isfinite(), b.isfinite()) for a, b in zip(ours, theirs, strict=True)]
    if not all(a.equal(b) for a, b in finite):
        return False
    pairs = [(a[kept], b[kept]) for a, b, (kept, _) in zip(ours, theirs, finite, strict=True)]
    largest = max(float(b.norm()) for _, b in pairs)
    return all(bool((a - b).norm() <= _SAME * b.norm() + _ROUNDING * largest) for a, b in pairs)
