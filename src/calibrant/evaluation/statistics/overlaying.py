"""Guide and reference as ArviZ overlays them: the same data, and as many chains and draws."""

from __future__ import annotations

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.joining import Side, joined_labels, require_same_problem
from calibrant.inference.references.gate import passed_labels

_SAMPLE = {"chain", "draw"}


def side_by_side(post: xr.DataTree, ref: xr.DataTree) -> dict[str, xr.DataTree]:
    """Guide and reference in a dictionary that ArviZ's plots take as it is.

        both = side_by_side(post, ref)
        plot_forest(both, var_names=["z"], coords={"data": [3]})
        plot_dist(both, var_names=["scale"], coords={"data": [0, 1, 2]})

    ArviZ overlays trees that have the same chains, draws and data. So the guide's draws, which are independent, are
    divided among as many chains as the reference has; of the longer chains, evenly spaced draws are taken.

    Args:
        post: a tree of `posterior`, or another one of independent draws.
        ref: a tree of `reference`; data that fail its gate are left out.

    Returns:
        `guide` and `reference`, with the groups of the trees that were given.

    Raises:
        InferenceError: for trees of different models or data, without data in common, or with fewer than 80 draws.
    """
    sides = Side.read(post, "guide"), Side.read(ref, "reference")
    joined = joined_labels(*sides)
    require_same_problem(*sides, joined)
    passed = passed_labels(ref)
    labels = [label for label in joined.tolist() if label in passed]
    if not labels:
        raise InferenceError("none of the data has a reference posterior that passes the gate")
    chains = sides[1].posterior.sizes["chain"]
    draws = min(sides[0].draws // chains, sides[1].posterior.sizes["draw"])
    return {side.name: _arranged(side, labels, chains, draws) for side in sides}


def _arranged(side: Side, labels: list[object], chains: int, draws: int) -> xr.DataTree:
    """A tree of some data, in so many chains and draws."""
    have, rows = side.posterior.sizes["draw"], side.rows(np.array(labels))
    if side.posterior.sizes["chain"] == chains:
        chain = np.arange(chains)[:, None] + np.zeros((1, draws), dtype=int)
        draw = np.zeros((chains, 1), dtype=int) + np.linspace(0, have - 1, draws).astype(int)
    else:
        chain, draw = np.divmod(np.linspace(0, side.draws - 1, chains * draws).astype(int).reshape(chains, draws), have)
    at = {name: xr.DataArray(index, dims=("chain", "draw")) for name, index in (("chain", chain), ("draw", draw))}
    named = {"chain": np.arange(chains), "draw": np.arange(draws)}
    groups = {}
    for name, node in side.tree.children.items():
        group = node.to_dataset()
        group = group.isel(data=rows) if "data" in group.dims and name != "convergence" else group
        if set(group.dims) >= _SAMPLE and group.sizes["draw"] == have:
            group = group.drop_vars(_SAMPLE, errors="ignore").isel(at).assign_coords(named)
            group = group.transpose("chain", "draw", ...)
        groups[f"/{name}"] = group
    return xr.DataTree.from_dict(groups)
