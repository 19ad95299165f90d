"""Cards by name: what is known of everything that registers itself, and the example constructions that tests run on."""

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
    """An example construction. The tests of a kind of part run on every case of every card, and know nothing else.

    Attributes:
        arguments: arguments of the constructor (of a data set: its options).
        observed: event shapes of what is observed, by site (of a data set: by key).
        covariates: for each keyword of `forward`, a function that makes the tensor for a number of data.
        is_exact: whether the posterior is known in closed form, or by quadrature over one scale.
        name: name of the case in the tests; made from the arguments where it is empty.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    observed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    covariates: Mapping[str, Callable[[int], Tensor]] = field(default_factory=dict)
    is_exact: bool = False
    name: str = ""


class Registry(Generic[Card]):
    """The cards of one kind of part.

    Args:
        kind: what the cards are of, such as "model"; error messages name it.
        error: the error that is raised for a name that is unknown, or already taken.
        otherwise: what else may be given in place of a name, for the message on unknown names.
    """

    def __init__(self, kind: str, error: type[CalibrantError], otherwise: str) -> None:
        self.kind, self.error, self.otherwise = kind, error, otherwise
        self._cards: dict[str, Card] = {}
        self._origins: dict[str, str] = {}

    def add(self, name: str, card: Card, registered: Any) -> None:
        """Keep a card. The same class or function may come again, as after a reload or in a notebook cell.

        Args:
            name: the name that users give.
            card: what is known of it.
            registered: the class or function that the card describes.

        Raises:
            CalibrantError: the registry's own, for a name that another class or function has.
        """
        origin = f"{registered.__module__}.{registered.__qualname__}"
        if self._origins.setdefault(name, origin) != origin:
            raise self.error(f"a {self.kind} {name!r} is registered already, by {self._origins[name]}")
        self._cards[name] = card

    def names(self, pattern: str = "*") -> list[str]:
        """The registered names that match a shell pattern, sorted."""
        return sorted(name for name in self._cards if fnmatchcase(name, pattern))

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
    """Import every module of a package, so that each registers what it defines."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
