"""Scales of noise: which entries of an observation share one, and how small or large one can be."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.protocol import Shape

SHARING = ("all", "channel", "position", "entry")
_BEFORE = 0.4  # noise scale that the data will set, until they do
_FARTHEST = 14.0  # |log scale|: scales of 1e-6 to 1e6, with which float32 holds densities of residuals up to 1e6


def first_scale(scale: float | str, learn: bool) -> tuple[float, bool]:
    """The first value of a noise scale, and whether it is given: "data" waits for the training data, at 0.4.

    Raises:
        ProgramError: for a scale that is not positive, or one that neither is given nor can be learned.
    """
    if scale == "data":
        if not learn:
            raise ProgramError("a noise scale that is not learned has to be given: scale=NUMBER")
        return _BEFORE, False
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
