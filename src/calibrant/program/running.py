"""Translation of errors in a program's run into messages that name the site and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pyro.nn import PyroModule

from calibrant.errors import CalibrantError, ProgramError
from calibrant.program.contract import PLATE

_SHAPE_MISMATCH = re.compile(r"inside plate\('(.*)'\) at site (.*) dim (-\d+), (\d+) vs (\d+)")


@contextmanager
def running(program: PyroModule, failure: str) -> Iterator[None]:
    """Turn any error in a run of the program into a `ProgramError`, and refuse parameters in Pyro's parameter store."""
    state = program._pyro_context.param_state
    try:
        yield
    except CalibrantError:
        raise
    except Exception as error:
        if state["params"]:
            raise _param_error(state["params"]) from error
        if found := _SHAPE_MISMATCH.search(str(error)):
            raise _mismatch_error(*found.groups()) from error
        reason = str(error).partition("\n")[0]
        if "Multiple sample sites" in reason:
            reason += f'; a plate that is entered twice is built once, plate = pyro.plate("{PLATE}", size)'
        raise ProgramError(f"{failure}: {type(error).__name__}: {reason}") from error
    else:
        if state["params"]:
            raise _param_error(state["params"])
    finally:
        state.update({"params": {}, "constraints": {}})


def _param_error(names: Iterable[str]) -> ProgramError:
    return ProgramError(
        f"pyro.param or pyro.module is called for {sorted(names)}: make each an nn.Parameter, PyroParam or "
        "submodule in __init__, and use it as an attribute"
    )


def _mismatch_error(plate: str, site: str, dim: str, size: str, found: str) -> ProgramError:
    return ProgramError(
        f"site {site!r} has {found} entries in batch dimension {dim} where the plate {plate!r} has {size}: the "
        "dimensions beyond the data belong to the event, so end its distribution with .to_event(their number)"
    )
