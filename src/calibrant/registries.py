"""Registries: cards that describe registered parts by name, with the example constructions that the tests run on."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from calibrant.errors import CalibrantError, names_to_offer

if TYPE_CHECKING:
    from torch import Tensor

Card = TypeVar("Card")


@dataclass(frozen=True)
class Case:
    """An example construction. The tests of models, likelihoods and data sets run on the cases of all cards.

    Attributes:
        arguments: arguments of the constructor (for a data set: its options).
        observed: event shapes of the observations, by site (for a data set: by key).
        covariates: for each keyword of `forward`, a function from the number of data to the tensor.
        is_exact: whether the posterior is known in closed form, or by quadrature over one scale.
        name: name of the case in the tests; if it is empty, the arguments name the case.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    observed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    covariates: Mapping[str, Callable[[int], Tensor]] = field(default_factory=dict)
    is_exact: bool = False
    name: str = ""


class Registry(Generic[Card]):
    """The registered cards of one kind of part, by name.

    Args:
        kind: kind of part, such as "model", as error messages name it.
        error: class of the error that is raised for a name that is unknown or already taken.
        otherwise: what may be given in place of a name, for the error message about unknown names.
    """

    def __init__(self, kind: str, error: type[CalibrantError], otherwise: str) -> None:
        self.kind, self.error, self.otherwise = kind, error, otherwise
        self._cards: dict[str, Card] = {}
        self._origins: dict[str, str] = {}

    def add(self, name: str, card: Card, registered: Any) -> None:
        """Register a card. The same class or function may be registered again, as after a reload in a notebook.

        Args:
            name: the name that users give.
            card: the description of the part.
            registered: the class or function that the card describes.

        Raises:
            CalibrantError: (the registry's error class) if another class or function has this name.
        """
        origin = f"{registered.__module__}.{registered.__qualname__}"
        if self._origins.setdefault(name, origin) != origin:
            raise self.error(
                f"the name {name!r} is given to two: {self._origins[name]} and {origin}; rename one {self.kind}"
            )
        self._cards[name] = card

    def names(self, pattern: str = "*") -> list[str]:
        """The registered names that match a shell pattern, sorted."""
        return sorted(name for name in self._cards if fnmatchcase(name, pattern))

    def cards(self) -> list[Card]:
        """The registered cards, in the order in which they were registered."""
        return list(self._cards.values())

    def __getitem__(self, name: str) -> Card:
        if name not in self:
            hint = names_to_offer(name, self._cards)
            raise self.error(f"unknown {self.kind} {name!r}; {hint} {self.otherwise}")
        return self._cards[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._cards

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers what it defines.

    Raises:
        CalibrantError: for a module that gives its card wrong or missing fields.
    """
    for module in pkgutil.iter_modules(path):
        try:
            importlib.import_module(f"{package}.{module.name}")
        except TypeError as error:
            if "register_" not in str(error):
                raise
            raise CalibrantError(f"{package}.{module.name}: {error}; correct the card in that file") from error
