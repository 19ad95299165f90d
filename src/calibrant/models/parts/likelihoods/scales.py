"""Scales of noise: which entries of an observation share one, and how small or large one can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape

SHARING = ("all", "channel", "position", "entry")
BEFORE_DATA = 0.4  # noise scale that the data will set, until they do
_LEAST = 0.1  # least start of the scale of an entry, as a share of the spread of all entries: some never vary
_FARTHEST = 14.0  # |log scale|: scales of 1e-6 to 1e6, with which float32 holds densities of residuals up to 1e6


def _first_scale(scale: float | str, learn: bool) -> tuple[float, bool]:
    """The first value of a noise scale, and whether it is given: "data" waits for the training data, at 0.4.

    Raises:
        ProgramError: for a scale that is not positive, or one that neither is given nor can be learned.
    """
    if scale == "data":
        if not learn:
            raise ProgramError("a noise scale that is not learned has to be given: scale=NUMBER")
        return BEFORE_DATA, False
    if isinstance(scale, str) or not scale > 0:
        raise ProgramError(f'the noise scale is {scale!r}: give a positive number, or "data"')
    return float(scale), True


def shape_of_scales(per: str, shape: Shape) -> Shape:
    """Shape of the scales of an observation, which broadcasts to its event shape.

    Args:
        per: "all" for one scale, "channel" for one per index of the first dimension, "position" for one per place in
            the other dimensions (shared by the channels), or "entry" for one per entry.
        shape: event shape of the observations.

    Raises:
        ProgramError: for an unknown word, or for observations without channels.
    """
    if per not in SHARING:
        raise ProgramError(f"per={per!r} is given, wanted one of {SHARING}")
    if per in ("channel", "position") and len(shape) < 2:
        raise ProgramError(
            f"per={per!r} needs observations with channels, shape (channels, height, width), not {tuple(shape)}: use "
            'per="entry"'
        )
    if per == "entry":
        return tuple(shape)
    ones = (1,) * len(shape)
    return {"all": ones, "channel": (*shape[:1], *ones[1:]), "position": (*ones[:1], *shape[1:])}[per]


def bounded_scale(log_scale: Tensor, lowest: float | None) -> Tensor:
    """Scale from its logarithm, which a decoder returns and which may be any number.

    The logarithm λ becomes `lowest` + softplus(λ − `lowest`), a soft clip (Chua et al. 2018, arXiv 1805.12114, appendix
    A.1). Beyond ±14 the result stays constant, so that float32 does not overflow.

    Args:
        log_scale: natural logarithm of the scale, any shape.
        lowest: lower limit of the logarithm; None for no soft clip.
    """
    clipped = log_scale if lowest is None else lowest + softplus(log_scale - lowest)
    return clipped.clamp(-_FARTHEST, _FARTHEST).exp()


class NoiseAround(Likelihood):
    """Base of the noise around the decoder's output whose scales do not depend on the latents.

    Args:
        scale: scale of the noise, in data units; its initial value if it is learned; "data" for that of the data.
        learn: whether the scale is learned.
        shape: shape of the scales, which broadcasts to the event shape.

    Raises:
        ProgramError: for a scale that is not positive, or one that neither is given nor can be learned.
    """

    log_scale: Tensor
    unit_sd: float = 1.0  # standard deviation of the noise with scale 1

    def __init__(self, scale: float | str, learn: bool, shape: Shape = ()) -> None:
        super().__init__()
        first, self.is_started = _first_scale(scale, learn)
        log_scale = torch.full(shape, first).log()
        if learn:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """Scale of the noise, in data units."""
        return self.log_scale.exp()

    def scale_for(self, mean_squares: Tensor) -> Tensor:
        """The scale of noise with these variances of the entries, pooled to the shape of the scale."""
        shape = self.log_scale.shape
        return (mean_squares.sum_to_size(shape) * shape.numel() / mean_squares.numel()).sqrt() / self.unit_sd

    def start_noise(self, mean_squares: Tensor) -> None:
        least = _LEAST * mean_squares.mean().sqrt()
        if least > 0:  # the data vary
            with torch.no_grad():
                self.log_scale.copy_(self.scale_for(mean_squares).clamp_min(least / self.unit_sd).log())
        self.is_started = True

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"location": shape}
