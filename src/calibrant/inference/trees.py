"""Results as ArviZ `DataTree`s: building them, and reading latents and draws from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant._version import __version__
from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.rounding import as_stored

Array = npt.NDArray[np.float64]
_BLOCK_ELEMENTS = 2**21  # 16 MiB of float64; diagnostics hold a few copies of a block


@dataclass(frozen=True)
class Latent:
    """One scalar of a latent site: its site and its position in the site's event, `()` for a scalar site."""

    site: str
    index: tuple[int, ...]

    @property
    def label(self) -> str:
        """The name shown to users, such as `scale`, `z[3]` or `z[1,2]`."""
        return f"{self.site}[{self.position}]" if self.index else self.site

    @property
    def position(self) -> str:
        """The index as text: `3` or `1,2`, empty for a scalar site."""
        return ",".join(map(str, self.index))


def latent_names(posterior: xr.Dataset) -> list[str]:
    """Names of the latents of a `posterior` group: its attribute `latents`, or all variables with draws without it."""
    if "latents" in posterior.attrs:
        return [str(name) for name in json.loads(posterior.attrs["latents"])]
    return [str(name) for name, var in posterior.data_vars.items() if {"chain", "draw"} <= set(var.dims)]


def scalars(posterior: xr.Dataset, names: Sequence[str]) -> list[Latent]:
    """All scalars of the named sites, in the order in which `draw_blocks` and `shared_draws` stack them."""
    plate = {"chain", "draw", "data"}
    shapes = {name: [n for dim, n in posterior[name].sizes.items() if dim not in plate] for name in names}
    return [Latent(name, index) for name in names for index in np.ndindex(*shapes[name])]


def draw_blocks(posterior: xr.Dataset, names: Sequence[str], rows: Sequence[int]) -> Iterator[Array]:
    """Draws of the named local sites, in blocks of data, which bound the memory.

    Args:
        posterior: a group with variables `(chain, draw, data, …)`.
        names: names of local latent sites.
        rows: positions along `data`.

    Yields:
        float64 arrays `(data, chain, draw, latent)`; together they hold all `rows` in their order.
    """
    per_datum = posterior.sizes["chain"] * posterior.sizes["draw"] * len(scalars(posterior, names))
    step = max(1, _BLOCK_ELEMENTS // max(1, per_datum))
    for start in range(0, len(rows), step):
        block = posterior[list(names)].isel(data=list(rows[start : start + step]))
        yield _stack([block[name].transpose("data", "chain", "draw", ...).values for name in names], 3)


def shared_draws(posterior: xr.Dataset, names: Sequence[str]) -> Array:
    """Draws of the named shared sites, float64 `(chain, draw, latent)`."""
    return _stack([posterior[name].transpose("chain", "draw", ...).values for name in names], 2)


def _stack(arrays: list[np.ndarray], batch_dims: int) -> Array:
    flat = [a.reshape(*a.shape[:batch_dims], int(np.prod(a.shape[batch_dims:]))) for a in arrays]
    return np.concatenate(flat, axis=-1, dtype=np.float64)


def data_labels(tree: xr.DataTree) -> np.ndarray:
    """Labels along `data`: those of the group `posterior`, or of `observed_data` if all latents are shared."""
    names = [name for name in ("posterior", "observed_data") if name in tree.children]
    return labels_of(*(tree[name].to_dataset() for name in names))


def labels_of(*groups: xr.Dataset) -> np.ndarray:
    """Labels of the first group with the dimension or coordinate `data`; without such a group, one datum called 0."""
    for group in groups:
        if "data" in group.coords or "data" in group.dims:
            return np.atleast_1d(group["data"].values)
    return np.zeros(1, dtype=np.int64)


SAMPLE = ("chain", "draw")


def model_sha256(model: nn.Module) -> str:
    """A hash of the weights and buffers of a model, which tells whether two results belong to the same model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_tree(
    draws: Mapping[str, Tensor],
    *,
    model: PyroModule,
    data: Data,
    local: Iterable[str],
    latents: Iterable[str],
    method: str,
    independent: bool,
    sample_stats: Mapping[str, Tensor | np.ndarray],
    settings: Mapping[str, Any],
) -> xr.DataTree:
    """A result tree with `posterior`, `sample_stats`, `observed_data` and `constant_data`.

    Args:
        draws: site → `(chain, draw, data, *event)`, or `(chain, draw, *event)` for a shared site; they are stored in
            the dtype that `rounding.as_stored` chooses.
        model: the program, whose weights are hashed and whose `dims` and `coords` name dimensions.
        data: the data, with one entry per posterior.
        local: names of the sites with a data dimension.
        latents: names of the latent sites in `draws`; all other sites are deterministic.
        method: "amortized", "exact", "nuts" or "pyro-nuts".
        independent: whether the draws are independent.
        sample_stats: name → `(chain, draw, data)`, or `(chain, draw)`.
        settings: settings of the method, JSON values.
    """
    local, latents = set(local), list(latents)
    attributes = {
        **attributes_of(method, independent, latents, settings),
        "model_sha256": model_sha256(model),
    }
    kept = as_stored(draws, model, data, latents, local)
    posterior = {name: _array(model, name, value.numpy(), SAMPLE, name in local) for name, value in kept.items()}
    stats = {name: _statistic(value) for name, value in sample_stats.items()}
    observed, covariates = data.tensors()
    coords = {"data": data.coords["data"], **data.event_coords, **getattr(model, "coords", {})}
    dims = {**_image_dims(model, data, {**observed, **covariates}), **data.dims}
    groups = {
        "posterior": xr.Dataset(posterior, attrs=attributes),
        "sample_stats": xr.Dataset(stats, attrs=attributes),
        "observed_data": xr.Dataset({n: _given(model, dims, n, v) for n, v in observed.items()}),
        "constant_data": xr.Dataset({n: _given(model, dims, n, v) for n, v in covariates.items()}),
    }
    return xr.DataTree.from_dict({f"/{name}": with_coords(group, coords) for name, group in groups.items()})


def attributes_of(
    method: str, independent: bool, latents: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, str | int]:
    """What the groups `posterior` and `sample_stats` say of their draws; the arguments are those of `build_tree`."""
    return {
        "method": method,
        "independent_draws": int(independent),
        "latents": json.dumps(list(latents)),
        "settings": json.dumps(dict(settings)),
        "inference_library": "calibrant",
        "inference_library_version": __version__,
    }


def _given(model: nn.Module, dims: Mapping[str, Sequence[str]], name: str, value: Tensor) -> xr.DataArray:
    """An observation or covariate, with the names of dimensions that the model or the data give it."""
    return _array(model, name, _short(value), (), True, tuple(dims.get(name, ())))


_IMAGE_DIMS = ("channel", "height", "width")


def _image_dims(model: nn.Module, data: Data, values: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Names of the dimensions of data that are images, `(data, 1 or 3, height, width)`, all of the first one's size.

    If the model or the data use one of these names, there are none.
    """
    named = [*getattr(model, "dims", {}).values(), *data.dims.values()]
    used = {name for names in named for name in names} | {*getattr(model, "coords", {}), *data.event_coords}
    shapes = {n: value.shape[1:] for n, value in values.items() if value.ndim == 4 and value.shape[1] in (1, 3)}
    first = next(iter(shapes.values()), None)
    return {} if used & set(_IMAGE_DIMS) else {name: _IMAGE_DIMS for name, shape in shapes.items() if shape == first}


def add_group(
    tree: xr.DataTree,
    name: str,
    values: Mapping[str, Tensor],
    model: nn.Module,
    leading: tuple[str, ...],
    local: Iterable[str],
) -> None:
    """Add a group of arrays `(*leading, data, *event)` to a tree; arrays of shared sites have no `data` dimension."""
    local, observed = set(local), tree["observed_data"].to_dataset()
    dims = {str(n): tuple(map(str, array.dims[1:])) for n, array in observed.data_vars.items()}
    arrays = {n: _array(model, n, _short(v), leading, n in local, dims.get(n, ())) for n, v in values.items()}
    group = xr.Dataset(arrays)
    known = {str(dim): values.values for dim, values in observed.coords.items()}
    coords = {**known, **getattr(model, "coords", {})}
    tree[name] = xr.DataTree(with_coords(group, coords))


def with_coords(group: xr.Dataset, coords: Mapping[str, Any]) -> xr.Dataset:
    """The dataset with coordinates for all its dimensions; those not in `coords` get 0, 1, …, as in ArviZ."""
    return group.assign_coords({n: coords.get(str(n), np.arange(size)) for n, size in group.sizes.items()})


def _array(
    model: nn.Module, name: str, value: Any, leading: tuple[str, ...], local: bool, dims: tuple[str, ...] = ()
) -> xr.DataArray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    leading = (*leading, "data") if local else leading
    return xr.DataArray(array, dims=(*leading, *event_dims(model, name, array.ndim - len(leading), dims)))


def _short(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float64 else value


def event_dims(model: nn.Module, name: str, count: int, given: tuple[str, ...] = ()) -> list[str]:
    """Names of the event dimensions of a site: those in `model.dims`, or of its data, or else `NAME_dim_0`, …"""
    return named_dims(name, count, getattr(model, "dims", {}).get(name, given))


def named_dims(name: str, count: int, given: Sequence[str]) -> list[str]:
    """Names of the dimensions of a variable: those that are given, and `NAME_dim_0`, … for those that are not."""
    named = list(given)
    return [named[i] if i < len(named) else f"{name}_dim_{i}" for i in range(count)]


def _statistic(value: Any) -> xr.DataArray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return xr.DataArray(array, dims=(*SAMPLE, "data")[: array.ndim])


def require_memory(entries: int, what: str, width: int = 4, budget: int = 4 << 30) -> None:
    """Refuse results that exceed a memory budget.

    Args:
        entries: number of entries.
        what: description of the results, for the error message.
        width: bytes per entry.
        budget: memory budget in bytes.

    Raises:
        InferenceError: if the results are larger; the message says what to reduce.
    """
    if width * entries > budget:
        raise InferenceError(
            f"{what} take {width * entries / 2**30:.1f} GiB, more than {budget / 2**30:.0f} GiB: reduce draws, or take "
            "fewer data"
        )
