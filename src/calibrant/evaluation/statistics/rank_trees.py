"""The result tree of a calibration: the ranks of true values among draws, and how well the draws recover them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from torch import nn

from calibrant.inference.trees import SAMPLE, event_dims, scalars, with_coords

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recovered:
    """True values of continuous latents, and moments of the draws among which they are ranked.

    Attributes:
        names: names of the latents.
        value: true values, `(simulation, latent)`.
        mean: means of the draws, `(simulation, latent)`.
        variance: variances of the draws, `(simulation, latent)`.
        before: variance before the simulated data are seen, `(latent,)`.
    """

    names: Sequence[str]
    value: Array
    mean: Array
    variance: Array
    before: Array


def pit_values(less: Array, equal: Array, draws: Array | int, generator: np.random.Generator) -> Array:
    """PIT values from the numbers of draws that are less than the truth and that equal it; ties are broken at random.

    They are exactly uniform if the truth and the draws are exchangeable.
    """
    return (less + generator.uniform(size=less.shape) * (equal + 1)) / (draws + 1)


def rank_tree(
    program: nn.Module, pits: Mapping[str, Array], recovered: Recovered, attrs: Mapping[str, Any]
) -> xr.DataTree:
    """A tree with the groups `prior_sbc` and `recovery`.

    Args:
        program: the program, whose `dims` and `coords` name dimensions.
        pits: name → PIT values `(simulation, *event)`.
        recovered: the continuous latents.
        attrs: attributes of both groups.
    """
    arrays = {name: ((*SAMPLE, *event_dims(program, name, pit.ndim - 1)), pit[None]) for name, pit in pits.items()}
    group = with_coords(xr.Dataset(arrays, attrs=attrs), getattr(program, "coords", {}))
    return xr.DataTree.from_dict({"/prior_sbc": group, "/recovery": _recovery(recovered, group).assign_attrs(attrs)})


def _recovery(found: Recovered, group: xr.Dataset) -> xr.Dataset:
    if not found.names:
        return xr.Dataset()
    latents = scalars(group, found.names)
    with np.errstate(divide="ignore", invalid="ignore"):
        variables = {
            "z_score": (("draw", "latent"), (found.value - found.mean) / np.sqrt(found.variance)),
            "contraction": (("draw", "latent"), 1 - found.variance / found.before),
        }
    coords = {
        "draw": np.arange(len(found.value)),
        "latent": np.array([latent.label for latent in latents], dtype=str),
        "site": ("latent", np.array([latent.site for latent in latents], dtype=str)),
    }
    return xr.Dataset(variables, coords)
