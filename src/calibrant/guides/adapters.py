"""Guides from encoders that were trained elsewhere, and guides written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoContinuous, AutoDiagonalNormal, AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from calibrant.errors import ProgramError
from calibrant.guides.describing import weights_of
from calibrant.models.trained_decoder import as_module
from calibrant.program.contract import PLATE, Program, arguments, as_program
from calibrant.program.modules import check_modules
from calibrant.shown import Shown

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "loc, scale": lambda scale: scale,
    "loc, log_scale": lambda log_scale: log_scale.exp(),
    "loc, variance": lambda variance: variance.sqrt(),
    "loc, log_variance": lambda log_variance: (log_variance / 2).exp(),
    "loc, precision": lambda precision: precision.rsqrt(),
    "loc, log_precision": lambda log_precision: (-log_precision / 2).exp(),
}


class EncoderGuide(Shown, PyroModule):
    """`latent ~ Normal(loc, scale)`, with loc and scale from `encoder(site, *covariates)`; see `from_encoder`."""

    encoder: Any

    def __init__(self, encoder: nn.Module, output: str, latent: str, site: str, covariates: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.output = encoder, output
        self.latent, self.site, self.covariates = latent, site, covariates

    def facts(self) -> dict[str, str]:
        inputs = ", ".join((self.site, *self.covariates))
        encoder = f"{type(self.encoder).__name__} of {inputs}, read as {self.output}"
        return {f"`{self.latent}`": "normal", "encoder": encoder, **weights_of(self)}

    def forward(self, observed: Mapping[str, Tensor], size: int, **covariates: Tensor) -> Tensor:
        inputs = observed[self.site], *(covariates[name] for name in self.covariates)
        loc, second = _pair(self.encoder(*inputs), self.output)
        with pyro.plate(PLATE, size):
            return pyro.sample(self.latent, self._normal(loc, OUTPUTS[self.output](second)))

    def _normal(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        try:
            return dist.Normal(loc, scale).to_event(loc.dim() - 1)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise ProgramError(
                f"the encoder's output, read as {self.output!r}, gives no Normal ({reason}): output= is one of "
                f"{list(OUTPUTS)}"
            ) from error


def from_encoder(
    encoder: nn.Module | Callable[..., Any],
    output: str = "loc, scale",
    *,
    latent: str = "z",
    site: str = "x",
    covariates: Sequence[str] = (),
) -> EncoderGuide:
    """A guide from your own encoder: a Normal with independent entries.

    The module itself is used; it is neither copied nor trained, and has to preprocess its input (flatten or rescale it)
    by itself. A run folder stores its weights; `load(run, model=…, guide=…)` loads them into a model and a guide that
    you have built again.

    Args:
        encoder: a module, or a method of one (`vae.encode`), in `eval()`. It maps observations `(size, *event)` to a
            pair of tensors, each with the shape of the latents, or to one tensor whose halves along dimension 1 are
            that pair.
        output: meaning of the pair: "loc, scale" (a standard deviation), "loc, variance" (as the encoders of scvi-tools
            return it), "loc, precision" (one over the variance), or "loc, log_scale", "loc, log_variance" and "loc,
            log_precision" for their logs.
        latent: name of the latent site in the model.
        site: name of the observed site in the model.
        covariates: names of the covariates that the encoder takes after the observations, in its order.

    Raises:
        ProgramError: for an unknown `output`, and for layers in training mode that are random or mix data; in a run of
            the guide, for an output of the encoder that is not such a pair.
    """
    if output not in OUTPUTS:
        raise ProgramError(f"unknown output {output!r}; known: {list(OUTPUTS)}")
    guide = EncoderGuide(as_module(encoder, "encoder"), output, latent, site, tuple(covariates))
    check_modules(guide)
    return guide


def _pair(result: Any, output: str) -> tuple[Tensor, Tensor]:
    if isinstance(result, Tensor):
        if result.dim() < 2 or result.shape[1] % 2:
            raise ProgramError(
                f"the encoder returns a tensor of shape {tuple(result.shape)}, wanted {output!r} as the halves of "
                "dimension 1"
            )
        first, second = result.chunk(2, 1)
        return first, second
    parts = list(result) if isinstance(result, tuple | list) else [result]
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        kinds = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise ProgramError(
            f"the encoder returns {kinds}, wanted the pair {output!r} or one tensor with both: give the method that "
            f"returns it (vae.encode), or a module around yours whose forward(self, x) does: {_remedy(result)}"
        )
    if parts[0].shape != parts[1].shape:
        shapes = [tuple(part.shape) for part in parts]
        raise ProgramError(f"the encoder returns {output!r} of shapes {shapes}: both have the shape of the latents")
    return parts[0], parts[1]


def _remedy(result: Any) -> str:
    """The body of a `forward` that takes the pair from what an encoder returns, as far as that can be told."""
    call = "out = self.encoder(x); return "
    if isinstance(result, Distribution):
        return f'{call}out.mean, out.stddev, with output="loc, scale"'
    if isinstance(result, Mapping):
        first, second = [*(f"out[{key!r}]" for key in result), "…", "…"][:2]
    elif isinstance(result, tuple | list):
        last = len(result) - 1
        first, second = (f"out[{max(last - 1, 0)}]", f"out[{last}]")
    else:
        first, second = [*(f"out.{key}" for key in getattr(result, "__dict__", {})), "…", "…"][:2]
    return f"{call}{first}, {second}"


def wrap(guide: Program) -> PyroModule:
    """A guide written by hand, checked as far as possible without data; `fit` and `posterior` check the rest.

    Args:
        guide: a function, a module, or a method of a module, called as `guide(observed, size, **covariates)`. It
            samples the latents of the model under the same names, local ones in `pyro.plate("data", size)`; its weights
            are parameters of a module.

    Raises:
        ProgramError: for another signature, tensors that are not buffers, layers that are random or mix data.
    """
    program = as_program(guide)
    check_called_as_guide(program)
    check_modules(program)
    return program


def check_called_as_guide(guide: PyroModule) -> None:
    """Refuse guides of Pyro's own, and guides that do not take the observations and the number of data.

    Raises:
        ProgramError: with the guide that `amortize` builds in its place, or the arguments found.
    """
    if isinstance(guide, AutoGuide):
        dense = isinstance(guide, AutoContinuous) and not isinstance(guide, AutoDiagonalNormal)
        raise ProgramError(
            f"{type(guide).__name__} is a guide of Pyro's own, with parameters for one set of data alone: build one by "
            f'calibrant.guides.amortize(model, observed, "{"full" if dense else "mean-field"}")'
        )
    given = arguments(guide)
    positional = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in given):
        found = ", ".join(argument.name for argument in given)
        raise ProgramError(
            f"a guide takes (observed, size, **covariates), this one ({found}): observed is a dict with a tensor per "
            "observed site, and size the number of data"
        )
