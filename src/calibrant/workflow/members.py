"""The members of a run by name: a model, or MODEL+STRUCTURE, one more guide for the model of an earlier member.

Such a guide is trained for the weights of the earlier member, which do not change. So both have the same exact
posterior, and the run shows what another guide makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from calibrant.errors import RunError
from calibrant.settings import STRUCTURES, model_of, structure_of
from calibrant.userfile import is_user_spec


def member_folder(name: str) -> str:
    """The name of a member's folder inside the run folder."""
    return re.sub(r"[^\w-]+", "-", name.rpartition(":")[2] if is_user_spec(name) else name)


def check_members(names: Sequence[str]) -> None:
    """Refuse members that would share a folder, and further guides of a model that is not in the run before them.

    Raises:
        RunError: naming the member, and what to write in its place.
    """
    for number, name in enumerate(names):
        model, structure = model_of(name), structure_of(name)
        if structure is None and "+" in name and not is_user_spec(name):
            wrong = name.rpartition("+")[2]
            raise RunError(f"{name}: there is no structure {wrong!r}: MODEL+STRUCTURE takes {', '.join(STRUCTURES)}")
        if structure is not None and model not in names[:number]:
            raise RunError(
                f"{name} is one more guide for the model of {model}: name {model} before it ({model} {name}), or train "
                f"a model of its own, {model} --structure {structure}"
            )
    if len({member_folder(name) for name in names}) < len(names):
        raise RunError(f"the models {', '.join(names)} would share a folder: run them one by one")
