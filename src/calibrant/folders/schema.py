"""The kinds of the values in `config.json`, which are checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_NONE = type(None)
_NUMBER = (int, float, _NONE)
_TEXTS, _NAMES = "a list of strings", "an object of strings"
# Kinds of the values, by their place. What belongs to a part must be in it if the part is there, unless earlier
# versions did not write it.
_PARTS: Mapping[str, Any] = {
    "name": str,
    "model": (dict, _NONE),
    "guide": (dict, _NONE),
    "data": dict,
    "settings": dict,
    "fit": (dict, _NONE),
    "sha256": _NAMES,
    "data_sha256": _NAMES,
    "request": (dict, _NONE),
    "checked": dict,
    "versions": (dict, _NONE),
    "notes": _TEXTS,
    "reproduction": dict,
    "runs": _TEXTS,
}
_INSIDE: Mapping[str, Mapping[str, Any]] = {
    "model": {"name": str, "arguments": dict, "sha256": str},
    "fit": {"elbo": _NUMBER, "elbo_se": _NUMBER, "epochs": int, "stopped": str},
    "request": {
        "models": _TEXTS,
        "data": (str, _NONE),
        "data_root": (str, _NONE),
        "site": _NAMES,
        "arguments": dict,
        "settings": dict,
    },
}


_LATER: Mapping[str, Mapping[str, Any]] = {
    "request": {"asked": dict, "quick": bool, "data_options": dict},
    "fit": {"is_elbo": bool},
}


def first_fault(config: Mapping[str, Any]) -> str | None:
    """The first value of a configuration that has another kind than it should have, in words; None if there is none."""
    return next(_faults(config), None)


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    for part, kind in _PARTS.items():
        if part in config and not _is(config[part], kind):
            yield f"{part} is {_shown(config[part])}, not {_words(kind)}"
    for part, inside in _INSIDE.items():
        if config.get(part) is not None:
            found = config[part]
            yield from (f"{part} lacks {name}" for name in inside if name not in found)
            for name, kind in {**inside, **_LATER.get(part, {})}.items():
                if name in found and not _is(found[name], kind):
                    yield f"{part}.{name} is {_shown(found[name])}, not {_words(kind)}"


def _is(value: Any, kind: Any) -> bool:
    if kind is _TEXTS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is _NAMES:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return isinstance(value, kind) and (not isinstance(value, bool) or kind is bool)


def _words(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    names = {dict: "an object", str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    names[_NONE] = "null"
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(names[one] for one in kinds)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
