"""Command lines that can be pasted into a shell: a training like a given one, and a check of a run folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrant.settings import Request, Settings, model_of, structure_of
from calibrant.userfile import is_user_spec


def training_line(request: Mapping[str, Any], **changes: Any) -> str:
    """The command line that trains and checks a model as before, with changed settings, in a new folder.

    Args:
        request: the request of a run with one model, as `config.json` stores it.
        changes: settings by their names in `Settings`; None takes the default.
    """
    words = ["calibrant", "run", *_models(request["models"], "structure" in changes)]
    for name, flag in (("data", "--data"), ("data_root", "--data-root")):
        words += [flag, str(request[name])] if request.get(name) else []
    for name in ("data_options", "site", "arguments"):
        flag = Request.__dataclass_fields__[name].metadata.get("flag", f"--{name}")
        words += _pairs(flag, request.get(name) or {})
    settings = {**request.get("asked", {}), **changes}
    for name, value in settings.items():
        words += _setting(name, value)
    return shlex.join(words)


def _models(names: Sequence[str], is_alone: bool) -> list[str]:
    """The models of a line: one more guide for a model (MODEL+STRUCTURE) needs this model, unless it is to be alone."""
    found: list[str] = []
    for name in names:
        found += [model_of(name)] if is_alone or structure_of(name) is None else [model_of(name), name]
    return found


def checking_line(folder: Path, request: Mapping[str, Any], **settings: Any) -> str:
    """The command line that checks a run folder again; files of the user are named again, since they are imported."""
    words = ["calibrant", "check", str(folder)]
    for model in request["models"]:
        words += ["--model", model_of(model)] if is_user_spec(model) else []
    if is_user_spec(str(request.get("data"))):
        words += ["--data", str(request["data"])]
    for name, value in settings.items():
        words += _setting(name, value)
    return shlex.join(words)


def _setting(name: str, value: Any) -> Iterator[str]:
    """The words of one setting; none for a value of None, and for settings that are no options."""
    about = Settings.__dataclass_fields__[name].metadata if name in Settings.__dataclass_fields__ else {}
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False or (about and not about["group"]):
        return
    if value is True:
        yield flag
    elif isinstance(value, Mapping) and "name" not in value:
        yield from _pairs(flag, value)
    else:
        yield from (flag, _text(value))


def _pairs(flag: str, values: Mapping[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (flag, f"{name}={_text(value)}")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
