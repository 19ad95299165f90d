"""Translation of errors in a program's run into messages that name the site and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from calibrant.calls import States, parameters_in_modules
from calibrant.errors import CalibrantError, ProgramError
from calibrant.program.contract import PLATE

TOTALS_THAT_DIFFER = (
    "for totals that differ between data, give the total as a covariate n and use "
    "dist.Poisson(n[..., None] * probs).to_event(1), which has the same posterior (probs of a DirichletMultinomial "
    "are a Dirichlet latent)"
)
_SHAPE_MISMATCH = re.compile(r"inside plate\('(.*)'\) at site (.*) dim (-\d+), (\d+) vs (\d+)")


@contextmanager
def running(failure: str) -> Iterator[None]:
    """Turn any error in a run of a program into a `ProgramError`, and refuse parameters in Pyro's parameter store."""
    with parameters_in_modules() as states:
        try:
            yield
        except CalibrantError:
            raise
        except Exception as error:
            _refuse_params(states, error)
            if found := _SHAPE_MISMATCH.search(str(error)):
                raise _mismatch_error(*found.groups()) from error
            raise ProgramError(f"{failure}: {_reason(error)}") from error
        _refuse_params(states)


def _reason(error: Exception) -> str:
    """The first line of an error, and what to do where that is known."""
    reason = str(error).partition("\n")[0]
    if "Multiple sample sites" in reason:
        reason += f'; a plate that is entered twice is built once, plate = pyro.plate("{PLATE}", size)'
    if "nhomogeneous total" in reason:
        return f"a Multinomial has one total of counts; {TOTALS_THAT_DIFFER}"
    if "intermediates cache" in reason:
        reason = "a transform has no inverse, so that its density is known at no given value: use another flow"
    return f"{type(error).__name__}: {reason}"


@contextmanager
def in_full_precision() -> Iterator[None]:
    """Refuse a run that computes in low precision inside, as autocast does, where its weights are float32."""
    with _Dtypes() as dtypes:
        yield
    if narrow := dtypes.seen & {torch.float16, torch.bfloat16}:
        raise ProgramError(
            f"it computes in {min(map(str, narrow))} inside, so that a result in float64 would be that of another "
            "program: remove torch.autocast and casts to this dtype from the forward() of its modules"
        )


class _Dtypes(TorchFunctionMode):
    """Notes the dtypes of all that is computed, inside modules and under autocast too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {part.dtype for part in tree_leaves(result) if isinstance(part, Tensor)}
        return result


def _refuse_params(states: States, error: Exception | None = None) -> None:
    if names := sorted({name for state in states.values() for name in state["params"]}):
        raise _param_error(names) from error


def _param_error(names: Iterable[str]) -> ProgramError:
    if modules := {name.partition("$$$")[0] for name in names if "$$$" in name}:
        return ProgramError(
            f"pyro.module is called for {sorted(modules)}: leave the call out; modules are attributes of the program, "
            "made in the __init__ of its PyroModule"
        )
    if centred := [name for name in names if name.endswith("_centered")]:
        return ProgramError(
            f"poutine.reparam makes the parameters {sorted(centred)}: give it a dict of latents alone, and how far "
            "each is centred, {'z': LocScaleReparam(0.0)}"
        )
    first = min(names)
    return ProgramError(
        f"pyro.param is called for {sorted(names)}: write the program as a PyroModule with self.{first} = "
        f"nn.Parameter(tensor) in __init__, or PyroParam(tensor, constraint=...), and use self.{first} in forward"
    )


def _mismatch_error(plate: str, site: str, dim: str, size: str, found: str) -> ProgramError:
    return ProgramError(
        f"site {site!r} has {found} entries in batch dimension {dim} where the plate {plate!r} has {size}: the "
        "dimensions beyond the data belong to the event, so end its distribution with .to_event(their number)"
    )
