"""The distribution of every entry of an observed site, on its own, in a run of a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.program.supports import base_support, undressed


class EntryDistributions:
    """The distributions of entries that a program's likelihoods told in the last run inside `kept`."""

    def __init__(self, program: PyroModule) -> None:
        self._told: list[tuple[Any, Any]] = []
        self._parts = [module for module in program.modules() if callable(getattr(module, "marginals", None))]

    @contextmanager
    def kept(self) -> Iterator[EntryDistributions]:
        """Keep what every likelihood that runs inside says of single entries."""

        def keep(module: Any, inputs: tuple[Any, ...], result: Any) -> None:
            if undressed(result).event_shape:
                self._told.append((result, module.marginals(*inputs)))

        self._told.clear()
        with ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.register_forward_hook(keep).remove)
            yield self

    def of(self, name: str, fn: Any, value: Tensor) -> Any:
        """The distribution of every entry of an observed site, whose own distribution is `fn`.

        Likelihoods tell that of a distribution of whole observations. Pyro copies the distribution that a program
        gives to a site, so that the one that was told is known by its density of the value.

        Raises:
            InferenceError: for a distribution of whole observations whose likelihood does not tell it.
        """
        plain = undressed(fn)
        if not plain.event_shape:
            return plain
        found = next((entries for result, entries in self._told if _are_one(result, fn, value)), None)
        if found is None:
            raise InferenceError(
                f"observed site {name!r}: the entries of a {type(plain).__name__} have no distribution of their own "
                "that the program tells. Give the program a likelihood module with a method `marginals`, or use "
                "cal.evaluation.predictive_check, which compares entries with draws"
            )
        return undressed(found)


def _are_one(first: Any, second: Any, value: Tensor) -> bool:
    return first.shape() == second.shape() and torch.equal(first.log_prob(value), second.log_prob(value))


def probabilities(name: str, entries: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """P(X < x) and P(X ≤ x) of every entry, in the shape of the value; they are equal for continuous entries.

    Raises:
        InferenceError: for entries without a distribution function.
    """
    try:
        upto = entries.cdf(value)
    except NotImplementedError as error:
        raise InferenceError(
            f"observed site {name!r}: {type(entries).__name__} has no distribution function `cdf` here. Use a "
            "likelihood of cal.models.list_likelihoods() that has one, or cal.evaluation.predictive_check, which "
            "compares entries with draws"
        ) from error
    if not base_support(entries.support).is_discrete:
        return upto, upto
    return (upto - entries.log_prob(value).exp()).clamp_min(0.0), upto
