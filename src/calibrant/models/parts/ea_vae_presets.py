"""The models of the EA-VAE paper (arXiv 2404.15390) by name, from its code, and two ways to train each of them.

Pixels of natural images are in standard deviations of all pixels of the training images, as the data sets of this
package are: the noise of 0.4603 and of 0.4 of the paper is divided by the standard deviation 0.88586 of its images.
Numbers of latents and widths follow the number of pixels, in the paper's proportions at 40×40.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from calibrant.models.presets import Preset, Shape, TrainingProtocol

Values = Mapping[str, Any]

_PIXEL_SD = 0.88586  # of the paper's natural images
_UNIT_LAPLACE = {"name": "laplace", "scale": 0.5**0.5}  # standard deviation 1
_GAMMA = {"name": "gamma", "concentration": 2.0, "rate": 2.0**0.5}  # mean √2, standard deviation 1
_NETWORK = {"name": "ea-vae-conv"}
_FREE = {"name": "linear", "column_norm": None}
_SCALARS = 20  # features of the scale that branch off behind the first layer


def _latents(shape: Shape) -> int:
    """1,800 of the VAE for 1,600 pixels."""
    return max(1, 9 * prod(shape) // 8)


def _latents_beside_a_scale(shape: Shape) -> int:
    """One less than those of the VAE."""
    return max(1, _latents(shape) - 1)


def _units(shape: Shape) -> int:
    """2,000 in a hidden layer for 1,600 pixels."""
    return max(1, 5 * prod(shape) // 4)


def _side(shape: Shape) -> int:
    return shape[-1]


def _noise(sd: float) -> Values:
    return {"name": "gaussian", "scale": sd / _PIXEL_SD, "learn": False}


_VAN_HATEREN = {"shape": (1, 40, 40), "prior": _UNIT_LAPLACE, "decoder": "linear", "likelihood": _noise(0.4603)}
_NATURAL = {"shape": (1, 40, 40), "prior": "laplace", "decoder": "linear", "likelihood": _noise(0.4)}
_MNIST = {"shape": (1, 32, 32), "prior": "normal", "decoder": _NETWORK, "likelihood": "bernoulli"}
_SMALL_PATCH: Values = {"shape": (1, 4, 4)}
_SMALL_DIGIT: Values = {"shape": (1, 8, 8), "decoder": {**_NETWORK, "width": 2}}


# -- training ----------------------------------------------------------------------------------------------------------

_DEPARTURES = "ours: the learning rate decays, the weights of the best epoch are kept, no weight decay"
_PATCHES = TrainingProtocol(
    about="the ELBO; columns of fixed norm; posteriors whose shape is learned, z given the scale",
    data="natural-patches",
    data_options={"size": _side},
    guide={"structure": "faithful", "encoder": {"name": "mlp", "hidden": _units}},
    fit={"epochs": 30, "batch_size": 256, "lr": 3e-3},
)
_DIGITS = TrainingProtocol(
    about="the ELBO of binary images; posteriors whose shape is learned, z given the scale",
    data="mnist",
    data_options={"size": _side, "values": "binarised"},
    guide={"structure": "faithful"},
    fit={"epochs": 50, "batch_size": 128, "lr": 1e-3},
)


def _trainings(recommended: TrainingProtocol, authors: TrainingProtocol) -> Mapping[str, TrainingProtocol]:
    return {"recommended": recommended, "authors": authors}


def _van_hateren(scalars: int, family: Values, kl_weights: Values, objective: str) -> Mapping[str, TrainingProtocol]:
    weighted = "the divergence of the scale counts twice" if kl_weights else "the ELBO"
    authors = TrainingProtocol(
        about=f"{weighted}; free columns; {_DEPARTURES}; their epoch had 4,000 steps",
        data="van-hateren",
        data_options={"size": _side},
        arguments={"decoder": _FREE},
        guide={
            "structure": "mean-field",
            "encoder": {"name": "ea-vae-mlp", "hidden": _units, "scalars": scalars},
            "family": family,
        },
        fit={"epochs": 10_000, "batch_size": 128, "lr": 3e-5, "objective": objective, "kl_weights": kl_weights},
    )
    return _trainings(replace(_PATCHES, data="van-hateren"), authors)


def _natural(family: Values, kl_weights: Values) -> Mapping[str, TrainingProtocol]:
    authors = TrainingProtocol(
        about=f"weights of a divergence that change between epochs 100 and 200; free columns; {_DEPARTURES}, and heads "
        "of this package; their epoch had 1,000 steps, on van Hateren's patches",
        data="natural-patches",
        data_options={"size": _side},
        arguments={"decoder": _FREE},
        guide={
            "structure": "mean-field",
            "encoder": {"name": "ea-vae-mlp", "hidden": _units},
            "family": {"z": "laplace", **family},
        },
        fit={"epochs": 5000, "batch_size": 512, "lr": 3e-5, "objective": "kl", "kl_weights": kl_weights},
    )
    return _trainings(_PATCHES, authors)


def _mnist(scalars: int, family: Values) -> Mapping[str, TrainingProtocol]:
    authors = TrainingProtocol(
        about=f"cross-entropy of grey images; the divergence of z counts four times; {_DEPARTURES}",
        data="mnist",
        data_options={"size": _side, "values": "unit"},
        arguments={"likelihood": "cross-entropy"},
        guide={
            "structure": "mean-field",
            "encoder": {**_NETWORK, "scalars": scalars},
            "family": {"z": "log-variance", **family},
        },
        fit={"epochs": 500, "batch_size": 128, "lr": 1e-3, "objective": "kl", "kl_weights": {"z": 4.0}},
    )
    return _trainings(_DIGITS, authors)


# -- presets -----------------------------------------------------------------------------------------------------------

_PLAIN_NATURAL = _natural({}, {"z": [[100, 0.01], [200, 1.0]]})
_ANNEALED_SCALE = {"scale": [[100, 10.0], [200, 1.0]]}

VAE_PRESETS: Mapping[str, Preset] = {
    "van-hateren": Preset(
        "van Hateren's patches: linear, Laplace latents with standard deviation 1, noise of 0.52 pixel sds",
        {**_VAN_HATEREN, "latents": _latents},
        _SMALL_PATCH,
        _van_hateren(0, {"z": "laplace-log-variance"}, {}, "kl"),
    ),
    "natural-softlaplace": Preset(
        "natural patches: linear, Laplace(0, 1) latents, noise of 0.45 pixel sds; the same as natural-lognormal",
        {**_NATURAL, "latents": _latents},
        _SMALL_PATCH,
        _PLAIN_NATURAL,
    ),
    "natural-lognormal": Preset(
        "natural patches: linear, Laplace(0, 1) latents, noise of 0.45 pixel sds; the same as natural-softlaplace",
        {**_NATURAL, "latents": _latents},
        _SMALL_PATCH,
        _PLAIN_NATURAL,
    ),
    "mnist": Preset(
        "binary MNIST: 5 Normal latents, three transposed convolutions, Bernoulli",
        {**_MNIST, "latents": 5},
        _SMALL_DIGIT,
        _mnist(0, {}),
    ),
}
EA_VAE_PRESETS: Mapping[str, Preset] = {
    "van-hateren": Preset(
        "van Hateren's patches: Laplace latents with standard deviation 1, s ~ Gamma(2, √2), x = s·(W z + b) + noise",
        {**_VAN_HATEREN, "latents": _latents_beside_a_scale, "scale_prior": _GAMMA, "multiplies": "output"},
        _SMALL_PATCH,
        _van_hateren(
            _SCALARS, {"scale": "gamma-truncated", "z": "laplace-log-variance"}, {"scale": 2.0}, objective="stl"
        ),
    ),
    "natural-softlaplace": Preset(
        "natural patches: Laplace(0, 1) latents, s = softplus(Laplace(0, 1)), x = W s·z + b + noise",
        {**_NATURAL, "latents": _latents_beside_a_scale, "scale_prior": "softplus-laplace", "multiplies": "latents"},
        _SMALL_PATCH,
        _natural({"scale": "softplus-laplace"}, _ANNEALED_SCALE),
    ),
    "natural-lognormal": Preset(
        "natural patches: Laplace(0, 1) latents, s ~ LogNormal(0, 1), x = W s·z + b + noise",
        {**_NATURAL, "latents": _latents_beside_a_scale, "scale_prior": "lognormal", "multiplies": "latents"},
        _SMALL_PATCH,
        _natural({"scale": "lognormal"}, _ANNEALED_SCALE),
    ),
    "mnist": Preset(
        "binary MNIST: 4 Normal latents, s ~ LogNormal(0, 1) multiplies the logits (0 is mid-grey), Bernoulli",
        {**_MNIST, "latents": 4, "scale_prior": "lognormal", "multiplies": "logits"},
        _SMALL_DIGIT,
        _mnist(_SCALARS, {"scale": "lognormal-log-variance"}),
    ),
}
