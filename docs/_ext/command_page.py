"""The page of commands, from the command line itself: docs/reference/commands.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from calibrant.cli import app

if TYPE_CHECKING:  # tests use what is here without Sphinx
    from collections.abc import Iterator


def text() -> str:
    """What `calibrant COMMAND --help` says, for every command."""
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    head = "# Commands\n\n`calibrant COMMAND --help` prints the same in a terminal; defaults stand in brackets.\n"
    return "\n".join([head, *(line for name, command in commands.items() for line in _about(name, command))])


def _about(name: str, command: Any) -> Iterator[str]:
    """Heading, what a command does, and its arguments and options, each in a list item."""
    arguments = [part for part in command.params if part.param_type_name == "argument"]
    shown = " ".join(f"[{part.name.upper()}]" for part in arguments)
    yield from (f"## {name}", "", command.help, "", f"`{f'calibrant {name} {shown}'.strip()} [OPTIONS]`", "")
    for part in command.params:
        if not getattr(part, "hidden", False) and part.name != "help":
            names = part.name.upper() if part in arguments else ", ".join(part.opts)
            yield f"- `{names}`: {_in_markdown(part.help)}"
    yield ""


def _in_markdown(text: str | None) -> str:
    return (text or "").replace("_", "\\_").replace("*", "\\*").replace("{", "\\{")
