"""Habits of Pyro programs that the contract replaces: recognised where they happen, with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn

from calibrant.errors import ProgramError
from calibrant.program.contract import PLATE, Values, arguments, size_error
from calibrant.program.modules import dotted
from calibrant.program.supports import innermost
from calibrant.program.tracing import is_deterministic, is_factor, is_local

_TAKEN_FOR_DATA = re.compile(r"\bint\b|\bNoneType\b")  # in errors of a program that takes its first argument for data


@contextmanager
def taking_size(program: PyroModule, covariates: Values) -> Iterator[None]:
    """Refuse a program that fails because it takes the number of data, or an argument that is None, for data."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        first, *others = (argument.name for argument in arguments(program))
        if not _TAKEN_FOR_DATA.search(reason) or (first == "size" and set(others) <= set(covariates)):
            raise
        raise size_error(program, covariates, f" and fails ({type(error).__name__}: {reason})") from error


class Statements(Messenger):
    """Refuses observations inside a program, and random weights that are read in the data plate, as they occur."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.weights = {
            dotted(path, name)
            for path, module in program.named_modules()
            for name in getattr(module, "_pyro_samples", ())
        }
        self.partly_observed: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg) or is_deterministic(msg) or is_factor(msg):
            return
        if not isinstance(msg["fn"], TorchDistributionMixin):
            kind = type(msg["fn"]).__name__
            raise ProgramError(f"site {name!r} draws from {kind} of torch: take pyro.distributions.{kind}")
        if msg["mask"] is not None and name.endswith("_observed"):
            self.partly_observed.add(name.removesuffix("_observed"))
        if name.endswith("_unobserved") and name.removesuffix("_unobserved") in self.partly_observed:
            raise _partly_observed_error(name.removesuffix("_unobserved"))
        if msg["is_observed"]:
            raise _observed_error(msg)
        if name in self.weights and is_local(msg):
            raise ProgramError(
                f"the PyroSample {name!r} is read inside the plate {PLATE!r}, which draws one for every datum: read it "
                "once before the plate, or call its layer there"
            )


def _observed_error(site: Mapping[str, Any]) -> ProgramError:
    name = site["name"]
    if site["mask"] is not None and name.endswith("_observed"):
        return _partly_observed_error(name.removesuffix("_observed"))
    if isinstance(innermost(site["fn"]), dist.Delta):
        return ProgramError(
            f"site {name!r} keeps a density of its own when it is reparameterized (SplitReparam, NeuTraReparam): leave "
            "it out of poutine.reparam"
        )
    start = f"site {name!r} has its value inside the program (obs= or pyro.condition): leave it out"
    if is_local(site):
        return ProgramError(f"{start}, and give observed={{{name!r}: ...}}")
    return ProgramError(
        f'{start}; what is observed is drawn in pyro.plate("{PLATE}", size) and given as observed={{{name!r}: ...}}, '
        "and the value of a latent that is fixed takes the place of its pyro.sample"
    )


def _partly_observed_error(name: str) -> ProgramError:
    return ProgramError(
        f"site {name!r} has obs_mask=: leave out obs= and obs_mask=, mask its distribution, as in "
        f"pyro.sample({name!r}, dist.Normal(loc, scale).mask(seen)) with the covariate seen, and give observed="
        f"{{{name!r}: ...}} with any value inside the support where it is missing; missing values are summed out"
    )


def check_plates(name: str, site: Mapping[str, Any]) -> None:
    """Refuse a site of the data plate that lies in other plates too."""
    others = {f.name: f.size for f in site["cond_indep_stack"] if f.vectorized and f.name != PLATE}
    if is_local(site) and others:
        sizes = ", ".join(str(size) for size in others.values())
        raise ProgramError(
            f"site {name!r} lies in the plates {list(others)} beside {PLATE!r}: leave them out, and make their entries "
            f'event in `with pyro.plate("{PLATE}", size):`, as in dist.Normal(loc, scale).expand([size, {sizes}])'
            f".to_event({len(others)}), with parameters that have the data first (loc[:, None])"
        )


def plate_error(name: str, site: Mapping[str, Any]) -> ProgramError:
    """The error for an observed site outside the data plate."""
    plates = [frame.name for frame in site["cond_indep_stack"]]
    remedy = f'draw it in `with pyro.plate("{PLATE}", size):`'
    if plates:
        return ProgramError(f"observed site {name!r} lies in the plates {plates}, none called {PLATE!r}: {remedy}")
    return ProgramError(
        f"observed site {name!r} lies in no plate: {remedy}; entries that depend on each other (a series, a Gaussian "
        f"process) are the event of one datum, whose size is 1: observed={{{name!r}: value[None]}}"
    )


def shapes_error(name: str, site: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], sizes: object) -> ProgramError:
    """The error for a site of the data plate whose leading dimension is not the data, or whose event changes."""
    remedy = ": .to_event counts the dimensions after the data"
    if is_deterministic(site):
        remedy = ": record a value for each datum, torch.stack(..., -1) for several, or what all share before the plate"
    return ProgramError(
        f"site {name!r} has the shapes {list(shapes)} for {sizes} data: in the plate {PLATE!r}, the leading dimension "
        f"is the data and all other dimensions stay the same{remedy}"
    )


def support_error(name: str, site: Mapping[str, Any], observed: bool) -> ProgramError:
    """The error for a support that depends on other latents."""
    if site["fn"].support.is_discrete:
        remedy = (
            "draw it from dist.Categorical over every value that it can ever have, with probabilities of 1e-6 where a "
            "value is impossible"
        )
    elif observed:
        remedy = (
            "draw a latent on a fixed support, transform it, and observe the result with some noise, "
            "dist.Normal(result, noise)"
        )
    else:
        remedy = "sample it on a fixed support and transform it"
    return ProgramError(f"the support of site {name!r} changes with other latents: {remedy}")
