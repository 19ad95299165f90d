"""Programs that give an image a class: classifier, ELK, nivMF and HET-XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.models.parts.classes import entropy
from calibrant.representations.learners.learner import Plan
from calibrant.representations.learners.programs import HEAD, ClassProgram
from calibrant.representations.learners.registry import register_method
from calibrant.representations.learners.trunks import Inputs

SCORES = ("entropy", "covariance")


@register_method(
    "classifier",
    paper="baseline of Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="softmax regression on the embedding, by cross-entropy",
    unit="class entropy in nats",
)
class Classifier(ClassProgram):
    """Softmax regression on the embedding; uncertainty: class entropy in nats. The model `classifier`."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs, "classifier", "stl", 1, latents=inputs.latents, project=inputs.trunk != "none")


@register_method(
    "elk",
    paper="Kirchhof et al. 2022, arXiv 2207.03784; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="von Mises–Fisher distributions of image and classes, by the softmax of their overlap",
    unit="1/κ of the image",
    plan=Plan(steps=600),
)
class ELK(ClassProgram):
    """The model `elk`; uncertainty: 1/κ of the image. Arguments: those of the model."""

    def __init__(self, inputs: Inputs, **arguments: Any) -> None:
        super().__init__(inputs, "elk", "stl", 1, latents=inputs.latents, **{**HEAD, **arguments})


@register_method(
    "nivmf",
    paper="Kirchhof et al. 2022, arXiv 2207.03784; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="draws of the image's von Mises–Fisher distribution under non-isotropic class densities, by their softmax",
    unit="1/κ of the image",
    plan=Plan(steps=400),
)
class NivMF(ClassProgram):
    """The model `nivmf`; uncertainty: 1/κ of the image. Arguments: those of the model."""

    def __init__(self, inputs: Inputs, **arguments: Any) -> None:
        super().__init__(inputs, "nivmf", "stl", 1, latents=inputs.latents, **{**HEAD, **arguments})


@register_method(
    "het-xl",
    paper="Collier et al. 2023, arXiv 2301.12860; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="softmax regression on an embedding with Gaussian noise that depends on the image, by log mean probability",
    unit="class entropy in nats, or half the log determinant of the noise covariance",
    plan=Plan(steps=600),
)
class HetXL(ClassProgram):
    """The model `het-xl`; the noise is in an embedding of `latents` dimensions with every trunk.

    Class probabilities are means over draws of the noise that come from the same standard Normal numbers for every
    image, drawn with the initial weights. So a prediction does not depend on the batch.

    Args:
        inputs: what the network is built for.
        particles: number of draws of the noise per datum in training.
        draws: number of draws of the noise in predictions.
        score: "entropy" for class entropy, "covariance" for the log volume of the noise.
        arguments: those of the model.
    """

    noise: Tensor

    def __init__(
        self, inputs: Inputs, particles: int = 10, draws: int = 64, score: str = "entropy", **arguments: Any
    ) -> None:
        if score not in SCORES:
            raise ProgramError(f"score={score!r}: give one of {', '.join(map(repr, SCORES))}")
        super().__init__(inputs, "het-xl", "iwae", particles, latents=inputs.latents, **arguments)
        self.score = score
        self.register_buffer("noise", torch.randn(draws, self.model.width + self.model.rank))

    def class_probabilities(self, x: Tensor) -> Tensor:
        noisy = self.model.noisy(x)
        diagonal, factor = self.noise.split([self.model.width, self.model.rank], 1)
        z = (
            noisy.loc
            + noisy.cov_diag.sqrt() * diagonal[:, None]
            + torch.einsum("nmr,dr->dnm", noisy.cov_factor, factor)
        )
        return self.model.logits_at(z).softmax(-1).mean(0)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Class entropy in nats, or half the log determinant of the noise covariance: `(n,)`."""
        if self.score == "entropy":
            return entropy(self.class_probabilities(x))
        noisy = self.model.noisy(x)
        # log |D + V Vᵀ| = log |D| + log |1 + Vᵀ D⁻¹ V|
        inner = noisy.cov_factor.mT @ (noisy.cov_factor / noisy.cov_diag[..., None])
        small = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device) + inner
        return (noisy.cov_diag.log().sum(-1) + small.logdet()) / 2
