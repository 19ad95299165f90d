"""The code of a function and of all that it uses in its own file, from which a finished cell knows its code."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any


def code_of(function: Callable[..., Any]) -> str:
    """The code of a function, and of the functions, classes and constants of its file that it uses, in turn.

    Comments, layout, decorators and docstrings are left out, so that changes of these change nothing. It is empty
    where there is no source, as in an interpreter.
    """
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(function)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return ""
    defined = {name: node for node in tree.body for name in _names(node)}
    waiting, seen = [function.__name__], dict[str, ast.stmt]()
    while waiting:
        name = waiting.pop()
        if name in defined and name not in seen:
            seen[name] = _bare(defined[name])
            waiting.extend(node.id for node in ast.walk(seen[name]) if isinstance(node, ast.Name))
    return "\n".join(dict.fromkeys(ast.unparse(seen[name]) for name in sorted(seen)))


def _names(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top level of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def _bare(node: ast.stmt) -> ast.stmt:
    """A definition without its decorators and docstrings."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            part.decorator_list = []
            if ast.get_docstring(part) is not None:
                part.body = part.body[1:] or [ast.Pass()]
    return node
