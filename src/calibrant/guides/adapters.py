"""Guides from encoders that were trained elsewhere, and guides written by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.models.trained_decoder import as_module
from calibrant.program.contract import PLATE, Program, as_program
from calibrant.program.modules import check_modules

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "loc, scale": lambda scale: scale,
    "loc, log_scale": lambda log_scale: log_scale.exp(),
    "loc, log_variance": lambda log_variance: (log_variance / 2).exp(),
}


class EncoderGuide(PyroModule):
    """`latent ~ Normal(loc, scale)`, with loc and scale from `encoder(site, *covariates)`; see `from_encoder`."""

    encoder: Any

    def __init__(self, encoder: nn.Module, output: str, latent: str, site: str, covariates: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.output = encoder, output
        self.latent, self.site, self.covariates = latent, site, covariates

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
        output: meaning of the pair: "loc, scale" (a standard deviation), "loc, log_scale" or "loc, log_variance".
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
            "returns it (vae.encode), or a module around yours that does"
        )
    if parts[0].shape != parts[1].shape:
        shapes = [tuple(part.shape) for part in parts]
        raise ProgramError(f"the encoder returns {output!r} of shapes {shapes}: both have the shape of the latents")
    return parts[0], parts[1]


def wrap(guide: Program) -> PyroModule:
    """A guide written by hand, checked as far as possible without data; `fit` and `posterior` check the rest.

    Args:
        guide: a function, a module, or a method of a module, called as `guide(observed, size, **covariates)`. It
            samples the latents of the model under the same names, local ones in `pyro.plate("data", size)`; its weights
            are parameters of a module.

    Raises:
        ProgramError: for another signature, tensors that are not buffers, layers that are random or mix data.
    """
    if isinstance(guide, type):
        raise ProgramError(f"{guide.__name__} is a class: give an instance, wrap({guide.__name__}(...))")
    is_method = isinstance(guide, MethodType) and isinstance(guide.__self__, nn.Module)
    program = as_program(as_module(guide, "guide") if is_method else guide)
    _check_signature(guide.forward if isinstance(guide, nn.Module) else guide)
    check_modules(program)
    return program


def _check_signature(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    given = list(signature.parameters.values())
    positional = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in given):
        raise ProgramError(
            f"the guide takes {signature}, wanted (observed, size, **covariates): observed is a dict with a tensor per "
            "observed site, and size the number of data"
        )
