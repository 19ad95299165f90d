"""Functions of data that run modules, replaced by a graph that is recorded once, where the program allows it.

A run of the program and its guide spends as much time in Python as in arithmetic. A graph repeats the operations of the
run that was recorded: anything that changes later (a weight annealed in Python, random numbers that are not torch's)
would be lost. So the graph is compared with the modules at the same random numbers, on other data than those it was
recorded on, and again during training. If the results differ, the modules run without the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calibrant.errors import warn
from calibrant.inference.graphs.recording import Outputs, TensorFunction, compiled, record
from calibrant.program.contract import Values
from calibrant.program.environment import on_tensors

_RECORDING = 7_040_021  # seed of no other use
_SAME = 1e-4  # allowed difference of an output, relative to its norm
_ROUNDING = 1e-6  # allowed difference of an output, relative to the largest norm of any output


class Recorded:
    """A function of data that runs modules; it uses a graph if one was recorded.

    Args:
        modules: the modules that the function runs.
        function: a function of mappings from names to tensors, such as (observed, covariates) → tensors.

    Attributes:
        weights: the weights of `modules` that require a gradient.
        is_graph: whether a graph is in use.
    """

    def __init__(self, modules: nn.Module, function: Callable[..., Outputs]) -> None:
        self._modules, self._inner = modules, _Inner(modules, function)
        self._graph: TensorFunction | None = None
        self.weights = {name: weight for name, weight in modules.named_parameters() if weight.requires_grad}

    @property
    def is_graph(self) -> bool:
        return self._graph is not None

    def __call__(self, *given: Values) -> Outputs:
        function = self._graph or self._of_tensors(*given)
        return function(*self._inputs(*given))

    def record(self, first: Sequence[Values], other: Sequence[Values], compile_it: bool = False) -> None:
        """Record a graph and use it from now on; all later data must have the shapes of `first` and `other`.

        Nothing changes if the function cannot be recorded, or if the graph gives different results on `other`.

        Args:
            first: arguments, such as observations and covariates, on which the graph is recorded.
            other: arguments on which the graph is compared with the function.
            compile_it: whether to compile the graph.
        """
        before = {name: buffer.clone() for name, buffer in self._modules.named_buffers()}
        function = self._of_tensors(*first)
        with torch.random.fork_rng():
            torch.manual_seed(_RECORDING)  # other draws than it is compared at: they may be constants in the graph
            graph = (compiled if compile_it else record)(function, *self._inputs(*first))
        self._graph = None if graph is function else graph
        self.verify(*other)
        for name, buffer in self._modules.named_buffers():
            if not buffer.equal(before[name]):  # statistics of minibatches would be constants in a graph
                self._graph = None
                buffer.copy_(before[name])

    def verify(self, *given: Values) -> None:
        """Discard the graph, with a warning, if the modules give different results for these arguments."""
        if self._graph is None:
            return
        outputs = []
        for function in (self._graph, self._of_tensors(*given)):
            with torch.random.fork_rng():
                outputs.append(function(*self._inputs(*given)))
        if not _agree(*outputs):
            self._graph = None
            warn(
                "the program or its guide does not do the same each time (something changes in Python, or draws "
                "numbers that are not torch's), so that it runs anew each time and takes about twice as long",
                RuntimeWarning,
            )

    def _inputs(self, *given: Values) -> list[Tensor]:
        weights = (weight.detach() for weight in self.weights.values())
        return [*weights, *(tensor for part in given for tensor in part.values())]

    def _of_tensors(self, *given: Values) -> TensorFunction:
        """The function of flat tensors, for arguments with these keys."""

        def function(*flat: Tensor) -> Outputs:
            tensors = iter(flat)
            weights = {name: next(tensors) for name in self.weights}
            return self._run(weights, *({name: next(tensors) for name in part} for part in given))

        return function

    def _run(self, weights: Values, *given: Values) -> Outputs:
        held = {f"inner.{name}": weight for name, weight in weights.items()}
        return on_tensors(self._inner, held)(*given)


class Gradient(Recorded):
    """An objective on a minibatch, with its gradient.

    A call returns the outputs of the objective, the norm of all gradients together, and the gradients of minus the
    first output with respect to the weights, as an optimiser takes them. Gradients may share memory with each other.

    Args:
        modules: the modules that the objective runs.
        function: the objective, a function of mappings from names to tensors; the first tensor that it returns, `()`,
            is maximised.
    """

    def __call__(self, *given: Values) -> Outputs:
        return tuple(output.contiguous() for output in super().__call__(*given))

    def adam(self, lr: float, **options: Any) -> torch.optim.Adam:
        """An Adam optimiser for the weights.

        It is fused into one kernel if all weights are contiguous, since that kernel ignores strides and gradients are
        contiguous.
        """
        weights = list(self.weights.values())
        is_plain = all(weight.is_contiguous() and weight.device.type in ("cpu", "cuda") for weight in weights)
        return torch.optim.Adam(weights, lr, fused=is_plain, **options)

    def _run(self, weights: Values, *given: Values) -> Outputs:
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        outputs = super()._run(weights, *given)
        downwards = -torch.ones_like(outputs[0])  # the sign costs nothing here, and a pass over all gradients later
        slopes = torch.autograd.grad(
            outputs[0], list(weights.values()), downwards, allow_unused=True, materialize_grads=True
        )
        norm = nn.utils.get_total_norm(slopes, foreach=False)
        return *(output.detach() for output in outputs), norm, *slopes


class _Inner(nn.Module):
    """A module whose `forward` is the function, so that a functional call can replace the weights."""

    def __init__(self, modules: nn.Module, function: Callable[..., Outputs]) -> None:
        super().__init__()
        self.inner, self.function = modules, function

    def forward(self, *given: Values) -> Outputs:
        return self.function(*given)


def _agree(ours: Outputs, theirs: Outputs) -> bool:
    """Whether outputs agree up to rounding.

    At an optimum, a gradient is a sum of terms that cancel, so that its error is compared with the largest output.
    """
    finite = [(a.isfinite(), b.isfinite()) for a, b in zip(ours, theirs, strict=True)]
    if not all(a.equal(b) for a, b in finite):
        return False
    pairs = [(a[kept], b[kept]) for a, b, (kept, _) in zip(ours, theirs, finite, strict=True)]
    largest = max(float(b.norm()) for _, b in pairs)
    return all(bool((a - b).norm() <= _SAME * b.norm() + _ROUNDING * largest) for a, b in pairs)
