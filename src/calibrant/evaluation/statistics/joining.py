"""Two result trees of the same data, joined datum by datum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.inference.trees import data_labels, latent_names

MIN_DRAWS = 80  # least number of draws per datum: two in each block of `marginals.BLOCKS`


def check_same_problem(post: xr.DataTree, ref: xr.DataTree) -> None:
    """Refuse two trees with different weights, observations, covariates or latents.

    Raises:
        InferenceError: for trees that `compare` would refuse.
    """
    amortized, reference = Side.read(post, "amortized"), Side.read(ref, "reference")
    require_same_problem(amortized, reference, joined_labels(amortized, reference))
    common_latents(amortized, reference)


@dataclass(frozen=True)
class Side:
    """The parts of one of the two trees that a comparison needs."""

    name: str
    tree: xr.DataTree
    posterior: xr.Dataset
    labels: np.ndarray

    @classmethod
    def read(cls, tree: xr.DataTree, name: str) -> Side:
        if "posterior" not in tree.children:
            raise InferenceError(f"the {name} tree has no group `posterior`, only {sorted(tree.children)}")
        posterior = tree["posterior"].to_dataset()
        if not {"chain", "draw"} <= set(posterior.dims):
            raise InferenceError(
                f"the group `posterior` of the {name} tree has dimensions {sorted(map(str, posterior.dims))}; "
                "it needs `chain` and `draw`"
            )
        labels = data_labels(tree)
        values, counts = np.unique(labels, return_counts=True)
        if (counts > 1).any():
            twice = values[counts > 1].tolist()[0]
            raise InferenceError(f"the {name} tree has datum {twice!r} more than once: give every datum its own label")
        side = cls(name, tree, posterior, labels)
        if side.draws < MIN_DRAWS:
            raise InferenceError(f"the {name} tree has {side.draws} draws per datum; at least {MIN_DRAWS} are needed")
        return side

    @property
    def draws(self) -> int:
        return self.posterior.sizes["chain"] * self.posterior.sizes["draw"]

    @property
    def independent(self) -> bool:
        """Whether the draws are independent; unless the tree says so, they may be correlated."""
        return bool(self.posterior.attrs.get("independent_draws", 0))

    @property
    def method(self) -> str:
        return str(self.posterior.attrs.get("method", "unknown"))

    @property
    def model_sha256(self) -> str:
        return str(self.posterior.attrs.get("model_sha256", self.tree.attrs.get("model_sha256", "")))

    def group(self, name: str) -> xr.Dataset:
        return self.tree[name].to_dataset() if name in self.tree.children else xr.Dataset()

    def rows(self, labels: np.ndarray) -> list[int]:
        """The positions of labels along `data`."""
        position = {label: i for i, label in enumerate(self.labels.tolist())}
        return [position[label] for label in labels.tolist()]


def joined_labels(amortized: Side, reference: Side) -> np.ndarray:
    theirs = set(reference.labels.tolist())
    joined = amortized.labels[[label in theirs for label in amortized.labels.tolist()]]
    if len(joined) == 0:
        raise InferenceError(
            f"the trees have no datum in common: `data` is {amortized.labels[:3].tolist()}… in the amortized tree and "
            f"{reference.labels[:3].tolist()}… in the reference; compute both for the same data (or give `index=`)"
        )
    return joined


def require_same_problem(amortized: Side, reference: Side, joined: np.ndarray) -> None:
    """Refuse trees with different weights, observations or covariates, if both trees store them."""
    a, r = amortized.model_sha256, reference.model_sha256
    if a and r and a != r:
        raise InferenceError(
            f"the trees are of different models: `model_sha256` is {a[:12]}… in the amortized tree and {r[:12]}… "
            "in the reference; compute both with the same weights"
        )
    for name in ("observed_data", "constant_data"):
        ours, theirs = amortized.group(name), reference.group(name)
        for site in set(ours.data_vars) & set(theirs.data_vars):
            _check_same_values(
                name,
                str(site),
                select_rows(ours[site], amortized, joined),
                select_rows(theirs[site], reference, joined),
                joined,
            )


def select_rows(values: xr.DataArray, side: Side, labels: np.ndarray) -> np.ndarray:
    """The values of some data, data first; all values if the variable has no dimension `data`."""
    return values.isel(data=side.rows(labels)).transpose("data", ...).values if "data" in values.dims else values.values


def _check_same_values(group: str, site: str, ours: np.ndarray, theirs: np.ndarray, joined: np.ndarray) -> None:
    where = f"variable `{site}` of the group `{group}`"
    if ours.shape != theirs.shape:
        raise InferenceError(
            f"the trees differ in {where}: shape {ours.shape} (amortized) and {theirs.shape} (reference)"
        )
    same = _equal(ours, theirs)
    bad = np.logical_not(same).reshape(same.shape[0], -1).any(1)
    if bad.any():
        example = f" (first: datum {joined.tolist()[int(bad.argmax())]!r})" if len(bad) == len(joined) else ""
        raise InferenceError(
            f"the trees differ in {where} for {int(bad.sum())} of {len(bad)} joined data{example}; "
            "compute both from the same observations"
        )


def _equal(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Which entries agree, up to rounding to float32; the result has at least one dimension."""
    if not np.issubdtype(ours.dtype, np.number):
        return np.atleast_1d(ours == theirs)
    smallest = 1e-6 * float(np.nanmax(np.abs(theirs), initial=0.0))
    return np.atleast_1d(np.isclose(ours, theirs, rtol=1e-5, atol=smallest, equal_nan=True))


def common_latents(amortized: Side, reference: Side) -> list[str]:
    """The latents to compare: those that the trees name, else all variables that both trees have."""
    named = {s.name: latent_names(s.posterior) for s in (amortized, reference) if "latents" in s.posterior.attrs}
    if len(named) == 2 and set(named["amortized"]) != set(named["reference"]):
        raise InferenceError(
            f"the trees name different latents: {sorted(named['amortized'])} (amortized) and "
            f"{sorted(named['reference'])} (reference)"
        )
    both = [name for name in latent_names(reference.posterior) if name in set(latent_names(amortized.posterior))]
    names = next(iter(named.values()), both)
    if not names:
        raise InferenceError("the groups `posterior` of the trees have no variable in common: nothing to compare")
    for name in names:
        for side in (amortized, reference):
            if name not in side.posterior:
                found = sorted(map(str, side.posterior.data_vars))
                raise InferenceError(f"latent `{name}` is missing from the {side.name} tree, which has {found}")
        _check_same_event(name, amortized, reference)
    return names


def varying(amortized: Side, reference: Side, names: list[str]) -> npt.NDArray[np.intp]:
    """Positions of the scalars of some sites that vary, in the order of `trees.scalars`.

    The support of a site may fix entries, such as the upper triangle of a Cholesky factor: they have one value in all
    draws of both sides, about which there is nothing to compare.
    """
    fixed = [_fixed(amortized.posterior[name], reference.posterior[name]) for name in names]
    return np.flatnonzero(~np.concatenate(fixed)) if fixed else np.zeros(0, dtype=np.intp)


def _fixed(ours: xr.DataArray, theirs: xr.DataArray) -> npt.NDArray[np.bool_]:
    """Which entries of an event have one value on both sides; none if that holds for all of them."""
    plate = [dim for dim in ("chain", "draw", "data") if dim in theirs.dims]
    a, r = (side.transpose(*plate, ...).values for side in (ours, theirs))
    shape = r.shape[len(plate) :]
    a, r = a.reshape(-1, int(np.prod(shape))), r.reshape(-1, int(np.prod(shape)))
    found = (r == r[:1]).all(0) & (a == r[:1]).all(0)
    return found & ~found.all()


def is_discrete(draws: xr.DataArray) -> bool:
    values = draws.values
    return all(bool((some == np.rint(some)).all()) for some in (values[:, :10], values))


def _check_same_event(name: str, amortized: Side, reference: Side) -> None:
    def shape(side: Side) -> tuple[str, tuple[int, ...]]:
        sizes = side.posterior[name].sizes
        event = tuple(n for dim, n in sizes.items() if dim not in ("chain", "draw", "data"))
        return ("local" if "data" in sizes else "shared"), event

    ours, theirs = shape(amortized), shape(reference)
    if ours != theirs:
        raise InferenceError(
            f"latent `{name}` is {ours[0]} with event shape {ours[1]} in the amortized tree and {theirs[0]} with event "
            f"shape {theirs[1]} in the reference"
        )
