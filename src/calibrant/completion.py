"""What a shell completes: names of registered parts are read in the files that register them, since importing takes
seconds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from calibrant.settings import ENCODERS, FAMILIES, OBJECTIVES, STRUCTURES

_FOLDERS = {
    "model": "models",
    "likelihood": "models/parts/likelihoods",
    "data": "data/sets",
    "paper": "reproductions/papers",
}
LISTS = ("models", "presets", "likelihoods", "methods", "data")  # what `calibrant list` lists


def registered(kind: str) -> list[str]:
    """The names that files of the package register as a "model", "likelihood", "data" or "paper", sorted.

    They stand first in the call, as a string in quotes.
    """
    call = re.compile(rf'\bregister_{kind}\(\s*"([^"]+)"')
    files = (Path(__file__).parent / _FOLDERS[kind]).glob("*.py")
    return sorted(name for file in files for name in call.findall(file.read_text(encoding="utf-8")))


def _completer(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A function that completes one of these names, also after SITE=."""

    def complete(incomplete: str) -> list[str]:
        site, equals, name = incomplete.rpartition("=")
        return [f"{site}{equals}{one}" for one in names() if one.startswith(name)]

    return complete


def _arguments(incomplete: str) -> list[str]:
    """`--set likelihood=NAME`: the arguments that have names as values."""
    argument, equals, _ = incomplete.partition("=")
    if not equals:
        return ["likelihood="] if "likelihood".startswith(argument) else []
    return COMPLETIONS["likelihood"](incomplete) if argument == "likelihood" else []


# Where nothing that was registered goes on from what was typed, the shell completes names of files.
COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "structure": _completer(lambda: STRUCTURES),
    "family": _completer(lambda: FAMILIES),
    "encoder": _completer(lambda: ENCODERS),
    "objective": _completer(lambda: OBJECTIVES),
    "kind": _completer(lambda: LISTS),
    "models": _completer(lambda: registered("model")),
    "data": _completer(lambda: registered("data")),
    "likelihood": _completer(lambda: registered("likelihood")),
    "paper": _completer(lambda: registered("paper")),
    "arguments": _arguments,
}
