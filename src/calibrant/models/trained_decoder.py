"""Programs from decoders that were trained elsewhere."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from calibrant.errors import ProgramError, warn
from calibrant.models.parts.likelihoods.protocol import outputs_of, takes_logits
from calibrant.models.parts.likelihoods.registry import make_likelihood
from calibrant.program.contract import PLATE
from calibrant.program.environment import defaults, seeded
from calibrant.program.modules import check_modules

Prior = int | Sequence[int] | Distribution | Callable[[], Distribution]
Likelihood = str | dict[str, Any] | Callable[[Any], Distribution]
_SIZE = 7  # number of data in the test run that finds wrong shapes


class DecoderModel(PyroModule):
    """`latent ~ prior()`, `site ~ likelihood(decoder(latent, *covariates))`; built by `from_decoder`."""

    decoder: Any
    prior: Any
    likelihood: Any

    def __init__(self, decoder: nn.Module, prior: Any, likelihood: Any, latent: str, site: str) -> None:
        super().__init__()
        self.decoder, self.prior, self.likelihood = decoder, prior, likelihood
        self.latent, self.site = latent, site

    def forward(self, size: int) -> Tensor:
        return self.run(size)

    def run(self, size: int, *covariates: Tensor) -> Tensor:
        """Run the program, with the covariates in the decoder's order."""
        with pyro.plate(PLATE, size):
            z = pyro.sample(self.latent, self.prior())
            return pyro.sample(self.site, self.likelihood(self.decoder(z, *covariates)))


def from_decoder(
    decoder: nn.Module | Callable[..., Any],
    prior: Prior,
    likelihood: Likelihood,
    *,
    latent: str = "z",
    site: str = "x",
    covariates: Sequence[str] = (),
) -> DecoderModel:
    """Build a program from a decoder: `latent ~ prior`, `site ~ likelihood(decoder(latent, *covariates))`.

    The decoder is used as it is, neither copied nor trained. Its training loss determines the likelihood. If the loss
    of a datum with D entries is a reconstruction error plus the KL divergence summed over the latents, choose:

    ==================================================  ===========================================================
    reconstruction error                                likelihood
    ==================================================  ===========================================================
    binary cross-entropy of logits                      `"bernoulli"`
    binary cross-entropy of probabilities               `lambda p: dist.Bernoulli(p).to_event(p.dim() - 1)`
    squared error, summed over the entries              `"beta"`: a Gaussian of fixed scale ½^½
    squared error, averaged over the entries            `{"name": "beta", "beta": D}`
    either squared error, the KL multiplied by β        that of its row, with β or β·D as `"beta"`
    half the squared error                              that of its row, with `"error": "half-sse"` beside it
    Gaussian, the decoder returns (mean, log variance)  `lambda o: dist.Normal(o[0], (o[1] / 2).exp()).to_event(1)`
    ==================================================  ===========================================================

    Cross-entropy is summed over the entries. For grey values it is not a log likelihood, and such data are refused:
    train on binary data, or use `dist.ContinuousBernoulli`, which adds the missing constant.

    Args:
        decoder: a module or a method of one (`vae.decode`), in `eval()`, that maps latents `(size, *event)` to its
            output.
        prior: a number of latents or their event shape, for standard Normals; a Pyro distribution, whose tensors become
            buffers of the model; or a function or module without arguments that returns one (a module if it has
            weights).
        likelihood: "bernoulli", "beta" (see the table), "gaussian" (a scale that `inference.fit` still has to learn),
            or `{"name": …, **arguments}`; or a function or module (a module if it has weights) that maps the output to
            a Pyro distribution with batch shape `(size,)`.
        latent: name of the latents.
        site: name of the observations.
        covariates: names of the tensors that the decoder takes after the latents, in the decoder's order.

    Raises:
        ProgramError: for shapes that do not fit together, a prior or likelihood that is not a Pyro distribution, and
            layers in training mode that draw random numbers or mix data.
    """
    module = as_module(decoder, "decoder")
    with defaults(module, {}) as place:
        parts = _as_prior(prior, place), _as_likelihood(likelihood)
    model = _class_with(tuple(covariates))(module, *parts, latent, site)
    check_modules(model)
    _warn_of_untrained_noise(parts[1])
    with torch.no_grad(), seeded(0), defaults(model, {}):
        z = _prior_draws(model)
        if not covariates:
            _check_likelihood(model, _run_decoder(model, z))
    return model


def as_module(part: Any, name: str) -> nn.Module:
    """Return a module unchanged, and a method of a module as a module that holds its weights.

    Raises:
        ProgramError: for anything else, such as a function, whose weights could be neither moved nor stored.
    """
    if isinstance(part, nn.Module):
        return part
    if isinstance(part, MethodType) and isinstance(part.__self__, nn.Module):
        return _Method(part.__self__, part.__name__)
    raise ProgramError(
        f"the {name} is a {type(part).__name__}, whose weights could be neither moved nor stored: give an nn.Module "
        "(an instance) or a method of one"
    )


class _Method(nn.Module):
    """A method of a module, as a module."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = owner, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.owner, self.name)(*args, **kwargs)


def _class_with(names: tuple[str, ...]) -> type[DecoderModel]:
    """`DecoderModel` with a `forward` that names the covariates, as the contract of programs requires."""
    if not names:
        return DecoderModel

    def forward(self: DecoderModel, size: int, **covariates: Tensor) -> Tensor:
        return self.run(size, *(covariates[name] for name in names))

    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    known = [inspect.Parameter(name, positional) for name in ("self", "size")]
    signature = inspect.Signature([*known, *(inspect.Parameter(name, keyword) for name in names)])
    setattr(forward, "__signature__", signature)  # noqa: B010  (mypy knows no such attribute of a function)
    return type("DecoderModel", (DecoderModel,), {"forward": forward})


# -- the prior ---------------------------------------------------------------------------------------------------------


class HeldPrior(nn.Module):
    """A distribution whose tensors are buffers, so that it follows the model to another device or dtype."""

    def __init__(self, prior: Distribution) -> None:
        super().__init__()
        self.prior = prior
        for name, tensor in _tensors(prior):
            self.register_buffer(name, tensor.clone())

    def forward(self) -> Distribution:
        return _with_tensors(self.prior, dict(self.named_buffers()))


def _as_prior(prior: Prior, place: tuple[torch.device, torch.dtype]) -> Any:
    if isinstance(prior, Distribution):
        return HeldPrior(prior).to(*place)
    if callable(prior):
        return prior
    shape = [prior] if isinstance(prior, int) else list(prior)
    if not all(isinstance(entries, int) and entries > 0 for entries in shape):
        raise ProgramError(f"prior={prior!r} is not a number of latents, event shape, Pyro distribution or function")
    return lambda: dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))


def _tensors(part: Distribution, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a distribution and of the distributions inside it, by path."""
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise ProgramError("the prior has weights: give a module whose forward() returns it")
            yield f"{path}{name}", value
        elif isinstance(value, Distribution):
            yield from _tensors(value, f"{path}{name}_")
        elif _has_state(value):
            raise ProgramError(f"the prior keeps tensors in {name!r}: give a function or module that returns it")


def _has_state(value: Any) -> bool:
    """Whether a value such as a list of transforms holds tensors, weights or distributions."""
    if isinstance(value, list | tuple):
        return any(_has_state(entry) for entry in value)
    if isinstance(value, Transform):
        return isinstance(value, nn.Module) or any(_has_state(entry) for entry in vars(value).values())
    return isinstance(value, Tensor | nn.Module | Distribution)


def _with_tensors(part: Distribution, tensors: dict[str, Tensor], path: str = "") -> Distribution:
    new = copy.copy(part)
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            new.__dict__[name] = tensors[f"{path}{name}"]
        elif isinstance(value, Distribution):
            new.__dict__[name] = _with_tensors(value, tensors, f"{path}{name}_")
    return new


def _prior_draws(model: DecoderModel) -> Tensor:
    try:
        prior = model.prior()
    except Exception as error:
        raise ProgramError(f"prior= can't be called without arguments: {_first_line(error)}") from error
    _require_pyro(prior, "prior")
    if prior.batch_shape:
        raise ProgramError(
            f"the prior has batch shape {tuple(prior.batch_shape)}: these dimensions belong to the event, so end it "
            f"with .to_event({len(prior.batch_shape)})"
        )
    return prior.expand([_SIZE]).sample().to(torch.get_default_dtype())


# -- the likelihood ----------------------------------------------------------------------------------------------------


def _as_likelihood(likelihood: Likelihood) -> Any:
    if isinstance(likelihood, MethodType) and isinstance(likelihood.__self__, nn.Module):
        return as_module(likelihood, "likelihood")
    return make_likelihood(likelihood) if isinstance(likelihood, str | dict) else likelihood


def _warn_of_untrained_noise(likelihood: Any) -> None:
    """Warn of a noise scale that waits for a training: a decoder that is only checked was trained with another."""
    if not getattr(likelihood, "is_started", True):
        warn(
            f"the noise scale of the likelihood {type(likelihood).__name__} is learned, and is not that of your "
            "training: inference.fit sets it. To check a trained decoder without that, state the noise of its loss: "
            'likelihood="beta" for a squared error, or {"name": "gaussian", "scale": SCALE, "learn": False}',
        )


def _run_decoder(model: DecoderModel, z: Tensor) -> Any:
    try:
        output = model.decoder(z)
    except Exception as error:
        raise ProgramError(
            f"the decoder does not take {model.latent!r} of shape {tuple(z.shape)}, which are {_SIZE} prior draws "
            f"({_first_line(error)}): give the prior the event shape that it takes"
        ) from error
    logits = isinstance(output, Tensor) and takes_logits(model.likelihood, tuple(output.shape[1:]))
    if logits and ((output >= 0) & (output <= 1)).all():
        warn(
            f"the decoder's outputs all lie between 0 and 1, and {type(model.likelihood).__name__} takes them as "
            "logits: after a sigmoid, give likelihood=lambda p: dist.Bernoulli(p).to_event(p.dim() - 1)",
        )
    return output


def _check_likelihood(model: DecoderModel, output: Any) -> None:
    try:
        fn = model.likelihood(output)
    except Exception as error:
        raise ProgramError(
            f"the likelihood does not take the decoder's output, {_shape_of(output)} ({_first_line(error)})"
            f"{_what_it_takes(model.likelihood, output)}"
        ) from error
    _require_pyro(fn, "likelihood")
    if tuple(fn.batch_shape) == (_SIZE,):
        return
    found = f"the likelihood has batch shape {tuple(fn.batch_shape)} for {_SIZE} data, wanted ({_SIZE},)"
    if fn.batch_shape[:1] == (_SIZE,):
        raise ProgramError(f"{found}: all other dimensions belong to the event, so end it with .to_event(their number)")
    raise ProgramError(f"{found}: the decoder's output is {_shape_of(output)}, its leading dimension must be the data")


def _what_it_takes(likelihood: nn.Module, output: Any) -> str:
    if not isinstance(output, Tensor):
        return ": give a function of this output that returns a distribution"
    names = ", ".join(outputs_of(likelihood, tuple(output.shape[1:])))
    return f": the decoder must return the tuple ({names})" if "," in names else ""


def _require_pyro(fn: Any, part: str) -> None:
    if isinstance(fn, TorchDistributionMixin):
        return
    if isinstance(fn, Distribution):
        raise ProgramError(f"the {part} is a torch distribution: use {type(fn).__name__} of pyro.distributions")
    raise ProgramError(f"the {part} returns a {type(fn).__name__}, wanted a Pyro distribution")


def _shape_of(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
