"""The likelihood of a β-VAE."""

from __future__ import annotations

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.gaussian import Gaussian
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.registries import Case

VARIANCE_OVER_BETA = {"sse": 0.5, "half-sse": 1.0}


@register_likelihood(
    "beta",
    density_of="real numbers",
    equations="x ~ Normal(location, σ²), σ² = β/2 for the loss SSE + β KL, σ² = β for ½ SSE + β KL",
    paper="Higgins et al. 2017, beta-VAE; Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202",
    cases=(
        Case({}, {"x": (1,)}),
        Case({"beta": 0.1, "error": "half-sse"}, {"x": (1, 4, 4)}),
    ),
)
class BetaGaussian(Gaussian):
    """Normal noise with the fixed variance that makes β·(−ELBO) the loss of a β-VAE, except for a constant.

    A weight β of the KL divergence and a noise variance are one and the same choice: what is trained with this
    likelihood and an unweighted ELBO has the same optimum, and its ELBO is that of a model.

    Args:
        beta: weight β of the KL divergence, which is summed over the latents, in squared data units.
        error: reconstruction error of the loss, summed over all entries: "sse" for the squared error, "half-sse" for
            half of it. An error that is averaged over D entries multiplies β by D.

    Raises:
        ProgramError: for a weight that is not positive, or an unknown error.
    """

    def __init__(self, beta: float = 1.0, error: str = "sse") -> None:
        if error not in VARIANCE_OVER_BETA:
            raise ProgramError(f"error={error!r} is given, wanted one of {tuple(VARIANCE_OVER_BETA)}")
        if not beta > 0:
            raise ProgramError(f"beta={beta} is given: the weight of the KL divergence must be positive")
        super().__init__((VARIANCE_OVER_BETA[error] * beta) ** 0.5, learn=False)
