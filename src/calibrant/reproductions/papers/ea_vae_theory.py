"""What the exact posterior of a linear EA-VAE, a Gaussian scale mixture, must do: its limits beside its quadrature."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibrant.binding import bind
from calibrant.inference.references.exact import ExactPosterior, solve
from calibrant.inference.references.sampling import structure_of
from calibrant.models.gsm import GSM
from calibrant.reproductions.cards import Claim, Needs
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary
from calibrant.reproductions.papers.ea_vae import PAPER
from calibrant.reproductions.registering import register_experiment
from calibrant.reproductions.scale_limits import GammaPrior, LogNormalPrior, blank_limit, bright_limit

PIXELS = 144
NOISE = 0.4
GAMMA: dict[str, Any] = {"name": "gamma", "concentration": 2.0, "rate": 2.0**0.5}
LOGNORMAL: dict[str, Any] = {"name": "lognormal", "loc": 0.0, "scale": 1.0}
DOMAIN = "analytic"


class Mixture(NamedTuple):
    """A Gaussian scale mixture, its prior and its gains."""

    model: GSM
    prior: GammaPrior | LogNormalPrior
    gains: np.ndarray


def mixture(context: Context, dictionary: Tensor) -> Mixture:
    """A Gaussian scale mixture with a dictionary `(pixels, latents)`, and the row's prior of the scale."""
    given = context.arguments["prior"]
    prior: GammaPrior | LogNormalPrior
    if given["name"] == "gamma":
        prior = GammaPrior(given["concentration"], given["rate"])
    else:
        prior = LogNormalPrior(given["loc"], given["scale"])
    model = GSM((1, 12, 12), scale_prior=given, dictionary=dictionary, noise=NOISE, learn_noise=False)
    gains = torch.linalg.svdvals(model.dictionary.double()) / model.likelihood.noise_sd(torch.zeros(1)).double()
    return Mixture(model, prior, gains.numpy())


def directions(context: Context, latents: int) -> Tensor:
    """A dictionary with columns of norm √(pixels/latents), which are orthogonal if there are no more than pixels."""
    generator = torch.Generator().manual_seed(context.stream("dictionary"))
    columns = torch.randn(PIXELS, latents, generator=generator, dtype=torch.float64)
    if latents <= PIXELS:
        columns = torch.linalg.qr(columns).Q
    return (PIXELS / latents) ** 0.5 * torch.nn.functional.normalize(columns, dim=0)


def exact(model: GSM, images: Tensor) -> ExactPosterior:
    """The exact posterior of images `(data, pixels)`, by quadrature over the scale."""
    data = bind(model, {"x": images.reshape(-1, 1, 12, 12)})
    structure = structure_of(model, data)
    assert structure is not None
    return solve(structure, data.tensors()[0]["x"])


def _known(value: float) -> Measured:
    """A number that no chance is in."""
    return Measured(float(value), 0.0)


# -- a blank image -----------------------------------------------------------------------------------------------------

ROWS = {
    "Gamma, 36 latents": {"prior": GAMMA, "latents": 36},
    "Gamma, 144 latents": {"prior": GAMMA, "latents": 144},
    "Gamma, 288 latents": {"prior": GAMMA, "latents": 288},
    "LogNormal, 36 latents": {"prior": LOGNORMAL, "latents": 36},
    "LogNormal, 144 latents": {"prior": LOGNORMAL, "latents": 144},
    "LogNormal, 288 latents": {"prior": LOGNORMAL, "latents": 288},
}


def _blank(found: Found) -> Summary:
    floors = "; ".join(
        f"{row}: {found.mean(row, 'E[s], exact').value:.4f} (prior mean {found.mean(row, 'prior mean of s').value:.3g})"
        for row in found.rows
    )
    return Summary(
        [
            "E[s | blank] is a lower limit, which the noise and the number of pixels set, and not the prior mean: "
            f"{floors}.",
            "The variances of all latents together lose as much as the prior of s rises at that floor: shape − rate · "
            "E[s] under a Gamma prior, whatever the dictionary. With many latents, each of them keeps its prior.",
        ]
    )


@register_experiment(
    PAPER,
    "blank-limit",
    answers="the analytical part of version 3",
    shows="What the exact posterior says of an image without any contrast, beside its limit for many latents.",
    rows=ROWS,
    numbers={
        "prior mean of s": "data units",
        "E[s], exact": "data units",
        "E[s], limit": "data units",
        "CV of s, exact": "of its mean",
        "CV of s, limit": "of its mean",
        "variance lost, exact": "prior variances, sum over latents",
        "variance lost, limit": "prior variances, sum over latents",
        "sd lost, exact": "prior sds, mean over latents",
    },
    needs=(),
    reduced="12×12 pixels, noise of sd 0.4, columns of norm √(pixels/latents).",
    reduced_quick="12×12 pixels, noise of sd 0.4, columns of norm √(pixels/latents).",
    minutes=(0.1, 0.1),
    seeds=(1, 1),
    claims=tuple(
        Claim("the latents of a blank image have the prior's uncertainty", row, "sd lost", "within", 0.1)
        for row in ("Gamma, 36 latents", "LogNormal, 36 latents")
    ),
    summarise=_blank,
    domain=DOMAIN,
)
def blank(context: Context, row: str, seed: int) -> dict[str, Any]:
    """The posterior of a blank image by quadrature, and in the limit of many latents."""
    model, prior, gains = mixture(context, directions(context, context.arguments["latents"]))
    found, limit = exact(model, torch.zeros(1, PIXELS)), blank_limit(prior, gains)
    mean, sd = float(found.mean["scale"][0]), found.sd["y"][0].double()
    return {
        "prior mean of s": prior.mean,
        "E[s], exact": mean,
        "E[s], limit": limit.mean,
        "CV of s, exact": float(found.sd["scale"][0]) / mean,
        "CV of s, limit": limit.cv,
        "variance lost, exact": float((1 - sd**2).sum()),
        "variance lost, limit": limit.lost,
        "sd lost, exact": _known(float(1 - sd.mean())),
    }


# -- a bright image ----------------------------------------------------------------------------------------------------

BRIGHT = {
    f"{name}, {latents} latents, contrast {contrast}": {"prior": prior, "latents": latents, "contrast": contrast}
    for name, prior in (("Gamma", GAMMA), ("LogNormal", LOGNORMAL))
    for latents, contrasts in ((36, (1, 10, 100, 1000)), (288, (10, 100)))
    for contrast in contrasts
}
ACROSS, ALONG, OUTSIDE = "sd across the mean", "variance along the mean", "variance outside the span"


def _bright(found: Found) -> Summary:
    steps = "; ".join(
        f"{row}: {found.mean(row, f'{ACROSS}, exact').value:.3g} and {found.mean(row, f'{ALONG}, exact').value:.3g}"
        for row in found.rows
        if found.card.rows[row]["latents"] == 36
    )
    return Summary(
        [
            "Across the posterior mean, the sd of z falls as 1/s, and s grows with contrast (at last as its power 2/3 "
            "under a Gamma prior). Along it, the variance stays, since s and the length of z cannot be told apart "
            f"({steps}).",
            "Directions that do not reach the image keep the prior's variance at every contrast.",
            "The CV of s is 1/√(2n) only while the prior is flat over the posterior of s; a Gamma prior, whose tail is "
            "exponential, narrows it further at every contrast.",
        ]
    )


@register_experiment(
    PAPER,
    "contrast-limit",
    answers="the analytical part of version 3",
    shows="What the exact posterior says of images of rising contrast, beside its limit for high contrast.",
    rows=BRIGHT,
    numbers={
        "E[s], exact": "data units",
        "E[s], limit": "data units",
        "CV of s, exact": "of its mean",
        "CV of s, limit": "of its mean",
        "1/√(2n)": "n directions that the image reaches",
        f"{ACROSS}, exact": "prior sds",
        f"{ACROSS}, limit": "prior sds",
        f"{ALONG}, exact": "prior variances",
        f"{ALONG}, limit": "prior variances",
        f"{OUTSIDE}, exact": "prior variances",
    },
    needs=(),
    reduced="12×12 pixels, columns of norm √(pixels/latents), contrast in units of the noise (sd 0.4).",
    reduced_quick="12×12 pixels, columns of norm √(pixels/latents), contrast in units of the noise (sd 0.4).",
    minutes=(0.1, 0.1),
    seeds=(1, 1),
    claims=tuple(
        Claim(
            "the latents become more certain with contrast",
            f"{name}, 36 latents, contrast 100",
            ACROSS,
            "below",
            minus=f"{name}, 36 latents, contrast 10",
        )
        for name in ("Gamma", "LogNormal")
    ),
    summarise=_bright,
    domain=DOMAIN,
)
def bright(context: Context, row: str, seed: int) -> dict[str, Any]:
    """The posterior of a noiseless image of the model by quadrature, and in the limit of high contrast."""
    given = context.arguments
    model, prior, gains = mixture(context, directions(context, given["latents"]))
    left, values, right = torch.linalg.svd(model.dictionary.double())
    n, contrast = len(values), given["contrast"] * NOISE
    signs = torch.randn(n, generator=torch.Generator().manual_seed(context.stream("signs")), dtype=torch.float64).sign()
    found = exact(model, contrast * (left[:, :n] * values) @ signs)
    limit = bright_limit(prior, gains, contrast**2 * n)
    covariance = right @ found.covariance(0) @ right.T
    mean = torch.nn.functional.normalize(right[:n] @ found.mean["y"][0], dim=0)
    inside, along = covariance[:n, :n], float(mean @ covariance[:n, :n] @ mean)
    outside = {f"{OUTSIDE}, exact": float(covariance.diagonal()[n:].mean())} if len(right) > n else {}
    given_s = 1 - limit.lost / n
    return {
        "E[s], exact": float(found.mean["scale"][0]),
        "E[s], limit": limit.mean,
        "CV of s, exact": float(found.sd["scale"][0] / found.mean["scale"][0]),
        "CV of s, limit": limit.cv,
        "1/√(2n)": (2 * n) ** -0.5,
        f"{ACROSS}, exact": _known(((float(inside.trace()) - along) / (n - 1)) ** 0.5),
        f"{ACROSS}, limit": given_s**0.5,
        f"{ALONG}, exact": along,
        f"{ALONG}, limit": limit.between + given_s,
        **outside,
    }


# -- explained power ---------------------------------------------------------------------------------------------------

PATCHES = Needs("natural-patches", {"size": 12}, most={"train": 20_000, "test": 500}, quick={"train": 4000, "test": 64})
LIKE = "natural patches"
UNLIKE = ("pixels permuted", "white noise", "white noise, four times the contrast")
KINDS: dict[str, dict[str, Any]] = {
    LIKE: {},
    "natural patches, a tenth of the contrast": {"contrast": 0.1},
    "the same, what the dictionary leaves": {"kind": "rest"},
    "pixels permuted": {"kind": "permuted"},
    "white noise": {"kind": "noise"},
    "white noise, four times the contrast": {"kind": "noise", "contrast": 4.0},
}
IMAGES: dict[str, dict[str, Any]] = {row: {"prior": GAMMA, "contrast": 1.0, **given} for row, given in KINDS.items()}


def pictures(context: Context, patches: Tensor, dictionary: Tensor) -> Tensor:
    """Images `(images, pixels)` of the row's kind, each with the contrast of a patch times that of the row."""
    kind, generator = context.arguments.get("kind", "patches"), torch.Generator().manual_seed(context.stream("images"))
    found = patches
    if kind == "rest":
        span = torch.linalg.qr(dictionary).Q
        found = patches - patches @ span @ span.T
    elif kind == "permuted":
        found = torch.stack([column[torch.randperm(len(column), generator=generator)] for column in patches.T], 1)
    elif kind == "noise":
        found = torch.randn(patches.shape, generator=generator, dtype=patches.dtype)
    norms = patches.norm(dim=1, keepdim=True)
    return context.arguments["contrast"] * norms * torch.nn.functional.normalize(found, dim=1)


def _explained(found: Found) -> Summary:
    power = {row: found.mean(row, "explained power").value for row in found.rows}
    sd = {row: found.mean(row, "sd of z, exact").value for row in found.rows}
    told = "; ".join(f"{row}: {round(power[row], 6):.3g}, {sd[row]:.3f}" for row in found.rows)
    return Summary(
        [
            f"Explained power, in units of the noise, and posterior sd of z over the prior's: {told}.",
            "White noise with exactly the explained power of each image has exactly the same sd: the posterior of s "
            "knows nothing of an image but this number. What is unlike the training images is uncertain where the "
            "dictionary explains little of it, and certain where it explains much.",
        ]
    )


@register_experiment(
    PAPER,
    "explained-power",
    answers="beyond the paper: is the posterior of unlike images wide because they are unlike?",
    shows="The exact posterior of natural patches, of noise and of what no latent can explain, at several contrasts.",
    rows=IMAGES,
    numbers={
        "contrast": "pixel sd over the noise's, root mean square",
        "explained power": "of the noise, mean over latents and images",
        "E[s], exact": "data units",
        "sd of z, exact": "prior sds, root mean square over latents, mean over images",
        "sd of z, noise of this power": "white noise scaled to the explained power of each image",
    },
    needs=(
        Needs("natural-patches", {"size": 12}, most={"train": 20_000, "test": 500}, quick={"train": 4000, "test": 64}),
    ),
    reduced="Whitened 12×12 patches; the 36 leading principal components, of equal norm, are the dictionary.",
    reduced_quick="Whitened 12×12 patches; the 36 leading principal components, of equal norm, are the dictionary.",
    minutes=(0.2, 0.5),
    seeds=(1, 3),
    claims=tuple(
        Claim(
            f"images unlike those of the training are less certain: {row}",
            row,
            "sd of z",
            "above",
            minus="natural patches",
            by="ours",
        )
        for row in ("pixels permuted", "white noise", "white noise, four times the contrast")
    ),
    summarise=_explained,
    domain=DOMAIN,
)
def explained(context: Context, row: str, seed: int) -> dict[str, Any]:
    """The exact posterior of images of a row, and of white noise that has the explained power of each."""
    train, test = (context.splits[name].tensors()[0]["x"].flatten(1).double() for name in ("train", "test"))
    components = torch.linalg.svd(train - train.mean(0), full_matrices=False)[2][:36].T
    model, _, _ = mixture(context, (PIXELS / 36) ** 0.5 * components)
    images = pictures(context, test - test.mean(1, keepdim=True), components)
    power = ((images @ components) ** 2).sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(context.stream("noise"))
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    matched = noise * (power / ((noise @ components) ** 2).sum(1, keepdim=True)).sqrt()
    found, other = (exact(model, one) for one in (images, matched))
    return {
        "contrast": float(images.square().mean().sqrt()) / NOISE,
        "explained power": Measured.of(power / 36 / NOISE**2),
        "E[s], exact": Measured.of(found.mean["scale"]),
        "sd of z, exact": Measured.of(found.sd["y"].square().mean(1).sqrt()),
        "sd of z, noise of this power": Measured.of(other.sd["y"].square().mean(1).sqrt()),
    }
