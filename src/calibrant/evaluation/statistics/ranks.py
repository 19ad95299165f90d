"""Probability integral transform: the ranks of reference draws among the guide's draws."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.inference.references.gate import passed_labels
from calibrant.inference.trees import latent_names
from calibrant.streams import stream


def pit(post: xr.DataTree, ref: xr.DataTree, draws: int = 100, seed: int = 0) -> xr.DataTree:
    """PIT values of reference draws under the guide, in a group for `arviz_plots.plot_ecdf_pit`.

    Each of `draws` reference draws, evenly spaced along the chains, is ranked among separate guide draws. Its value is
    drawn uniformly from the interval that the rank stands for: if guide and reference agree, the values of a latent are
    exactly uniform on (0, 1), and as independent as the reference draws are.

        tree = pit(post, ref)
        plot_ecdf_pit(tree, group="pit", sample_dims=["chain", "draw", "data"])             # over all data
        plot_ecdf_pit(tree, group="pit", sample_dims=["chain", "draw"], coords={"data": 3})  # of one datum

    Args:
        post: the tree to be judged, usually of `posterior`.
        ref: the tree to judge by, usually of `reference`; data that fail the gate are left out.
        draws: number of PIT values per datum and latent.
        seed: random seed for the uniform parts of the values.

    Returns:
        A tree with the group `pit`: every local latent that both trees have, `(chain, draw, data, …)` with one chain;
        the attribute `guide_draws` is the number of guide draws among which each value is ranked.

    Raises:
        InferenceError: for fewer guide or reference draws than asked for, or trees without data or latents in common.
    """
    ours, theirs = post["posterior"].dataset, ref["posterior"].dataset
    passed = passed_labels(ref)
    labels = [label for label in ours["data"].values.tolist() if label in passed]
    names = [n for n in latent_names(ours) if n in theirs and "data" in ours[n].dims and ours[n].sizes["data"]]
    if not labels or not names:
        raise InferenceError("the trees have no datum with a reference posterior, or no local latent, in common")
    counts = [group.sizes["chain"] * group.sizes["draw"] for group in (ours, theirs)]
    if not 1 <= draws <= min(counts):
        raise InferenceError(
            f"draws={draws}: there are {counts[0]} draws of the guide and {counts[1]} of the reference"
        )
    generator = np.random.default_rng(stream(seed, "pit"))
    group = {
        name: _ranks(ours[name].sel(data=labels), theirs[name].sel(data=labels), draws, generator) for name in names
    }
    dataset = xr.Dataset(group, attrs={"guide_draws": counts[0] // draws})
    # plot_ecdf_pit looks every dimension up by its coordinate.
    missing = {name: np.arange(size) for name, size in dataset.sizes.items() if name not in dataset.coords}
    return xr.DataTree.from_dict({"/pit": dataset.assign_coords(missing)})


def _ranks(ours: xr.DataArray, theirs: xr.DataArray, draws: int, generator: np.random.Generator) -> xr.DataArray:
    order = [dim for dim in theirs.dims if dim not in ("chain", "draw")]
    guide, truth = (_flat(values, order) for values in (ours, theirs))
    truth = truth[np.linspace(0, len(truth) - 1, draws).astype(int)]
    among = len(guide) // draws
    # Every `draws`-th draw, so that a block spans all chains.
    rank = sum((guide[block * draws : (block + 1) * draws] < truth).astype(np.float64) for block in range(among))
    values = (rank + generator.uniform(size=truth.shape)) / (among + 1)
    coords = {name: coord for name, coord in theirs.coords.items() if not {"chain", "draw"} & set(coord.dims)}
    return xr.DataArray(values[None], dims=("chain", "draw", *order), coords=coords)


def _flat(values: xr.DataArray, order: Sequence[Hashable]) -> np.ndarray:
    """The draws chain by chain, `(chain · draw, data, …)`."""
    array = values.transpose("chain", "draw", *order).values
    return array.reshape(-1, *array.shape[2:])
