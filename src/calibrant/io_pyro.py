"""What Pyro's inference returns as an ArviZ `DataTree`: MCMC, SVI, guides, `Predictive`, and draws in a dict.

This file uses nothing else of this package, so that it can move to ArviZ as it is. Adapters bring draws, model and
arguments of each kind of inference into one form; the model is run at the draws for what they alone do not tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from arviz_base import dict_to_dataset
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import SVI, Predictive, config_enumerate
from pyro.infer.autoguide import AutoDelta, init_to_sample
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

Arrays = dict[str, np.ndarray]
Draws = dict[str, Tensor]
Names = Mapping[str, Sequence[str]]
Nodes = Mapping[str, Any]
Run = Any  # a model or guide with its arguments, called without any
SAMPLE_DIMS = ("chain", "draw")


# -- what a run of a model says of its sites ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A site of a model or guide."""

    role: str  # "latent", "observed", "deterministic" or "factor"
    plates: dict[int, str]  # position from the right, -1 or lower → the plate there
    event_dim: int
    event_names: tuple[str, ...]  # as many as are known
    shape: tuple[int, ...]  # of the value: batch and event
    discrete: bool

    def event_dim_in(self, group: str, ndim: int) -> int:
        """Number of event dimensions of an array with `ndim` dimensions besides those of draws."""
        unconstrained = ndim - len(self.shape) + self.event_dim  # a simplex has an entry less, a matrix a dimension
        return {"log_likelihood": 0, "unconstrained_posterior": unconstrained}.get(group, self.event_dim)

    def dims(self, shape: Sequence[int], event_dim: int) -> list[tuple[str | None, int]]:
        """Name, or None, and size of all dimensions of an array, without those of size 1 that belong to no plate."""
        batch = len(shape) - event_dim
        named = [(self.plates.get(i - batch), size) for i, size in enumerate(shape[:batch])]
        events = [*self.event_names, *[None] * event_dim][:event_dim]
        return [(name, size) for name, size in named if name or size != 1] + [*zip(events, shape[batch:], strict=True)]


def _sites(nodes: Nodes) -> dict[str, Site]:
    """The sites of a run, without those of plates, and without latents that are auxiliary."""
    sampled = {name: node for name, node in nodes.items() if node["type"] == "sample"}
    found = {n: _site(node) for n, node in sampled.items() if type(node["fn"]).__name__ != "_Subsample"}
    return {n: site for n, site in found.items() if site.role != "latent" or not nodes[n]["infer"].get("is_auxiliary")}


def _site(node: Nodes) -> Site:
    frames = {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}
    shape, event_dim, role = tuple(node["value"].shape), len(node["fn"].event_shape), "latent"
    if node["infer"].get("_deterministic"):
        role = "deterministic"
        if event_dim == len(shape):  # also what Pyro records if the model said nothing
            event_dim = _fewest_event_dims(shape, {dim: frame.size for dim, frame in frames.items()})
    elif node["is_observed"]:
        role = "factor" if node["infer"].get("is_auxiliary") and node["value"].numel() == 0 else "observed"
    names, discrete = tuple(node["infer"].get("event_dims", ())), getattr(node["fn"], "has_enumerate_support", False)
    return Site(role, {dim: frame.name for dim, frame in frames.items()}, event_dim, names, shape, bool(discrete))


def _fewest_event_dims(shape: tuple[int, ...], plates: dict[int, int]) -> int:
    """The fewest event dimensions that leave a batch in which every dimension is that of a plate, or of size 1."""
    for event_dim in range(len(shape)):
        batch = len(shape) - event_dim
        if all(size in (1, plates.get(i - batch)) for i, size in enumerate(shape[:batch])):
            return event_dim
    return len(shape)


def _refuse_subsamples(nodes: Nodes, names: Iterable[str]) -> None:
    for name, frame in ((n, frame) for n in names for frame in nodes[n]["cond_indep_stack"]):
        if frame.vectorized and frame.full_size not in (None, -1, frame.size):
            raise ValueError(
                f"site {name!r} lies in plate {frame.name!r}, of which a run sees {frame.size} of {frame.full_size}: "
                "give a `model`, or a guide, without `subsample_size`, and all data in `model_args`"
            )


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()


# -- adapters: draws, model and arguments of each kind of inference ----------------------------------------------------


class PyroInferenceAdapter:
    """One form for all that has draws of a posterior: model with arguments, draws `(chain, draw, *shape)` of sites."""

    def __init__(self, model: Run, samples: Draws):
        self.model, self.samples = model, samples
        self.sample_stats: Arrays = {}  # name → array (chain, draw)
        self.sites: dict[str, Site] = {}  # what is known of them without a model


class MCMCAdapter(PyroInferenceAdapter):
    """`pyro.infer.MCMC` after `run`; Pyro keeps divergences, mean acceptance, and the step size of a single chain."""

    def __init__(self, mcmc: Any, model: Run):
        if getattr(mcmc, "_samples", None) is None:
            raise ValueError("the MCMC object holds no draws: call its run(...) first (StreamingMCMC never has any)")
        super().__init__(model, mcmc.get_samples(group_by_chain=True))
        found, shape = mcmc._diagnostics, (mcmc.num_chains, mcmc.num_samples)
        if all("divergences" in chain for chain in found):
            self.sample_stats["diverging"] = np.zeros(shape, dtype=bool)
            for chain, diagnostics in enumerate(found):
                self.sample_stats["diverging"][chain, list(diagnostics["divergences"])] = True
        if all("acceptance rate" in chain for chain in found):
            rates = [[float(chain["acceptance rate"])] for chain in found]
            self.sample_stats["mean_acceptance_rate"] = np.repeat(rates, shape[1], axis=1)
        if mcmc.num_chains == 1 and hasattr(mcmc.kernel, "step_size"):
            self.sample_stats["step_size"] = np.full(shape, float(mcmc.kernel.step_size))


class GuideAdapter(PyroInferenceAdapter):
    """A trained guide, of Pyro or of the user; its log density at the draws is `log_q`, unless the guide is a point."""

    def __init__(self, guide: Run, model: Run, num_samples: int):
        super().__init__(model, {})
        nodes: Nodes = poutine.trace(guide).get_trace().nodes
        self.sites = {name: site for name, site in _sites(nodes).items() if site.role == "latent"}
        _refuse_subsamples(nodes, self.sites)
        values: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        log_q = np.zeros((1, num_samples))
        for draw in range(num_samples):
            trace: Any = poutine.trace(guide).get_trace()
            log_q[0, draw] = float(trace.log_prob_sum(lambda name, node: not node["is_observed"]))
            for name in values:
                values[name].append(trace.nodes[name]["value"].detach())
        self.samples = {name: torch.stack(found)[None] for name, found in values.items()}
        modules = list(guide.func.modules()) if isinstance(guide.func, torch.nn.Module) else []
        auxiliary = [n["fn"] for n in nodes.values() if n["type"] == "sample" and n["infer"].get("is_auxiliary")]
        drawn = auxiliary or [nodes[name]["fn"] for name in self.sites]
        if not any(isinstance(module, AutoDelta) for module in modules) and not any(map(_is_point, drawn)):
            self.sample_stats["log_q"] = log_q


def _is_point(fn: Any) -> bool:
    return isinstance(fn, dist.Delta) or (hasattr(fn, "base_dist") and _is_point(fn.base_dist))


def _adapter(
    inference: Any, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], num_samples: int, num_chains: int
) -> PyroInferenceAdapter:
    known = model or getattr(getattr(inference, "kernel", inference), "model", None)
    bound = None if known is None else partial(known, *args, **kwargs)
    if isinstance(inference, AbstractMCMC):
        return MCMCAdapter(inference, bound)
    guide, draws = (inference, None) if callable(inference) else (None, inference or {})
    if isinstance(inference, SVI | Predictive):
        guide, draws = inference.guide, getattr(inference, "posterior_samples", None)
        num_samples = getattr(inference, "num_samples", None) or num_samples
    if guide is not None:
        return GuideAdapter(partial(guide, *args, **kwargs), bound, num_samples)
    if isinstance(draws, Mapping):
        return PyroInferenceAdapter(bound, {n: torch.as_tensor(v) for n, v in _by_chain(draws, num_chains).items()})
    kind = type(inference).__name__
    raise TypeError(f"posterior is of type {kind}: give an MCMC, SVI or Predictive object, a guide, or a dict of draws")


def _by_chain(arrays: Nodes, num_chains: int, draws: int | None = None) -> dict[str, Any]:
    """Arrays or tensors `(draw, *shape)` as `(chain, draw, *shape)`."""
    found = {name: value if isinstance(value, Tensor) else np.asarray(value) for name, value in arrays.items()}
    for name, value in found.items():
        count = value.shape[0] if value.ndim else 0
        if count % num_chains or draws not in (None, count // num_chains):
            raise ValueError(f"{name!r} has {count} draws, not those of {num_chains} chains of {draws or 'one length'}")
    return {name: value.reshape((num_chains, -1, *value.shape[1:])) for name, value in found.items()}


# -- the model at the draws --------------------------------------------------------------------------------------------


class _Unobserve(Messenger):
    """Draws the named sites instead of taking their observations."""

    def __init__(self, names: Collection[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names and msg["is_observed"]:
            msg.update(is_observed=False, value=None, done=False)


def _mask(node: Nodes) -> Tensor:
    """Which entries of an observed site count: those that neither `poutine.mask` nor a masked distribution hides."""
    inner = node["fn"]._mask if isinstance(node["fn"], dist.MaskedDistribution) else True
    return torch.as_tensor(inner) & torch.as_tensor(True if node["mask"] is None else node["mask"])


class ModelRuns:
    """A model, run at draws `(draw, *shape of the site)`; discrete latents without draws are summed out."""

    def __init__(self, adapter: PyroInferenceAdapter):
        self.model = adapter.model
        self.draws = {name: value.flatten(0, 1) for name, value in adapter.samples.items()}
        self.nodes: Nodes = poutine.trace(InitMessenger(self._first)(self.model)).get_trace().nodes
        self.sites = _sites(self.nodes)
        self.draws = {name: value for name, value in self.draws.items() if name in self.sites}
        self.missing = [name for name in self.names("latent") if name not in self.draws]
        self.unknown = [name for name in self.missing if not self.sites[name].discrete]  # cannot be summed out
        self.nesting = max((-dim for site in self.sites.values() for dim in site.plates), default=0)

    def _first(self, node: Nodes) -> Tensor:
        """The first draw of a latent site, or one of its prior; `Predictive` puts dimensions of size 1 to the left."""
        name, shape = node["name"], tuple(node["fn"].shape())
        if name not in self.draws:
            return init_to_sample(node)
        found = tuple(self.draws[name].shape[1:])
        if (1,) * (len(found) - len(shape)) + shape != found:
            raise ValueError(f"draws of {name!r} have shape {found}, and the model's {shape}: give their `model_args`")
        self.draws[name] = self.draws[name].reshape((-1, *shape))
        return self.draws[name][0]

    def names(self, role: str) -> list[str]:
        return [name for name, site in self.sites.items() if site.role == role]

    def observations(self) -> Arrays:
        """Values of observed sites, NaN where they are masked."""
        found = {}
        for name in self.names("observed"):
            value, mask = self.nodes[name]["value"], _mask(self.nodes[name])
            hidden = ~mask.reshape((*mask.shape, *[1] * self.sites[name].event_dim))
            found[name] = _array(torch.where(hidden, torch.nan, value.double()) if hidden.any() else value)
        return found

    def at_draws(self, groups: Collection[str], batch_size: int) -> dict[str, Arrays]:
        """Group → name → array `(draw, *shape)`; `batch_size` draws are run at once, if that changes nothing."""
        _refuse_subsamples(self.nodes, [*self.names("observed"), *self.names("deterministic")])
        if self.unknown:
            raise ValueError(f"latent sites {self.unknown} have no draws, without which the model cannot be run")
        count = len(next(iter(self.draws.values())))
        step = 1 if self.missing else min(batch_size, count)
        like = self._read({name: value[0] for name, value in self.draws.items()}, groups)
        if step > 1:
            self._check_at_once(step)
        blocks = [self._block(start, step, groups, like) for start in range(0, count, step)]
        return {g: {n: np.concatenate([block[g][n] for block in blocks]) for n in arrays} for g, arrays in like.items()}

    def _block(self, start: int, step: int, groups: Collection[str], like: dict[str, Draws]) -> dict[str, Arrays]:
        """Group → name → array `(step, *shape)`: a block of draws, in a plate around the model if there are several."""
        block = {name: value[start : start + step] for name, value in self.draws.items()}
        if step == 1:
            run = self._read({name: value[0] for name, value in block.items()}, groups)
            return {group: {name: _array(value[None]) for name, value in found.items()} for group, found in run.items()}
        rows = len(next(iter(block.values())))
        for name, value in block.items():  # draws to the left of all plates
            gap = self.nesting + 1 + self.sites[name].event_dim - value.dim()
            block[name] = value.reshape((rows, *[1] * gap, *value.shape[1:]))
        run, found = self._read(block, groups, rows), {}
        for group, shapes in like.items():
            found[group] = {n: _array(self._fit(run[group][n], rows, one.shape, group, n)) for n, one in shapes.items()}
        return found

    def _fit(self, value: Tensor, rows: int, shape: torch.Size, group: str, name: str) -> Tensor:
        """A value of a run of many draws as `(draw, *shape of one draw)`."""
        if group == "sample_stats":
            return value
        gap = self.nesting - len(shape) + self.sites[name].event_dim_in(group, len(shape))
        return value.expand((rows, *[1] * gap, *shape)).reshape((rows, *shape))

    def _check_at_once(self, step: int) -> None:
        """Draws that are run at once must have the log likelihoods and deterministic sites that each has alone."""
        groups = ("log_likelihood", "posterior")
        like = self._read({name: value[0] for name, value in self.draws.items()}, groups)
        try:
            at_once = self._block(0, step, groups, like)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"draws cannot be run at once ({error}): leave out `batch_size`") from error
        for index, group in itertools.product((0, step - 1), groups):
            for name, alone in self._block(index, 1, groups, like)[group].items():
                if not np.allclose(at_once[group][name][index], alone[0], 1e-3, 1e-4, equal_nan=True):
                    raise ValueError(f"{name!r} differs if draws are run at once: leave out `batch_size`")

    def _read(self, values: Draws, groups: Collection[str], count: int = 0) -> dict[str, Draws]:
        """Group → name → value, of one draw, or of `count` draws in a plate around the model."""
        found = {}
        if set(groups) - {"posterior_predictive"}:
            nodes = self._nodes(self.model, values, count, enumerated=bool(self.missing))
            readers = {"posterior": self._deterministic, "sample_stats": self._log_joint}
            readers.update(unconstrained_posterior=self._on_the_line, log_likelihood=self._log_likelihood)
            found = {group: reader(nodes) for group, reader in readers.items() if group in groups}
        if "posterior_predictive" in groups:
            observed = self.names("observed")
            nodes = self._nodes(_Unobserve(observed)(self.model), values, count)
            found["posterior_predictive"] = {name: nodes[name]["value"] for name in observed}
        return found

    def _nodes(self, model: Run, values: Draws, count: int, enumerated: bool = False) -> Nodes:
        if count:
            model = pyro.plate("_draws", count, dim=-self.nesting - 1)(model)
        if enumerated:
            model = poutine.condition(config_enumerate(model, default="parallel"), data=values)
            model = poutine.enum(model, first_available_dim=-self.nesting - 1)
        else:
            model = poutine.condition(model, data=values)
        return poutine.trace(model).get_trace().nodes

    def _deterministic(self, nodes: Nodes) -> Draws:
        """Deterministic sites, without those that depend on latents which are summed out."""
        found = {name: nodes[name]["value"] for name in self.names("deterministic")}
        return {n: v for n, v in found.items() if not self.missing or v.shape == self.sites[n].shape}

    def _log_joint(self, nodes: Nodes) -> Draws:
        """The log density of everything, with all scales and masks."""
        sites = [nodes[name] for name in self.sites]
        found = [scale_and_mask(node["fn"].log_prob(node["value"]), node["scale"], node["mask"]) for node in sites]
        many = max(value.dim() for value in found) > self.nesting
        return {"log_p": sum(value.flatten(1).sum(1) if many else value.sum() for value in found)}

    def _on_the_line(self, nodes: Nodes) -> Draws:
        real = {name: nodes[name] for name in self.draws if not self.sites[name].discrete}
        return {name: biject_to(node["fn"].support).inv(node["value"]) for name, node in real.items()}

    def _log_likelihood(self, nodes: Nodes) -> Draws:
        """Log density of each observation, without the scale of subsampling, and NaN where it is masked."""
        found = {}
        for name, node in ((name, nodes[name]) for name in self.names("observed")):
            if (mask := _mask(node)).any():
                found[name] = torch.where(mask, node["fn"].log_prob(node["value"]), torch.nan)
        shared = [name for name, value in found.items() if self.missing and value.dim() > self.nesting]
        if not shared:
            return found
        plates = [self.sites[name].plates for name in [*shared, *self.missing]]
        if len(shared) > 1 or any(other != plates[0] for other in plates):
            raise ValueError(
                f"observations share the sites {self.missing}, so that none has a log likelihood of its own: draw them "
                "too (pyro.infer.infer_discrete), and give all draws as a dict"
            )
        weights = sum(nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in self.missing)
        total = found[shared[0]] + weights
        marginal = total.flatten(0, total.dim() - self.nesting - 1).logsumexp(0)
        return {**found, shared[0]: marginal.reshape(self.nodes[shared[0]]["fn"].batch_shape)}


# -- the tree ----------------------------------------------------------------------------------------------------------


class PyroConverter:
    """Names the dimensions of groups by the plates of sites, and by what the user gives."""

    def __init__(self, sites: dict[str, Site], coords: Names, dims: Names, event_dims: Names, pred_dims: Names):
        self.coords, self.dims, self.pred_dims, self.sites = coords, dims, pred_dims, dict(sites)
        for name, names in event_dims.items():
            if (site := sites.get(name)) is None or len(names) > len(site.shape):
                raise ValueError(f"event_dims has {len(names)} names for {name!r}, no site with as many dimensions")
            event_dim = len(names) if site.role == "deterministic" else site.event_dim
            self.sites[name] = replace(site, event_dim=event_dim, event_names=tuple(names))

    def dataset(self, group: str, arrays: Nodes) -> xr.Dataset:
        """A group of arrays `(chain, draw, *shape)`, or `(*shape)` of data, with named dimensions."""
        lead = () if group.endswith("_data") else SAMPLE_DIMS
        arrays = {name.replace("/", "."): _array(value) for name, value in arrays.items()}
        layouts = {name: self._layout(group, name, a.shape[len(lead) :]) for name, a in arrays.items()}
        pairs = [(name, dim, size) for name, layout in layouts.items() for dim, size in layout]
        sizes = {dim: size for _, dim, size in sorted(pairs, key=lambda pair: pair[2])}
        for name, dim, size in pairs:
            if size not in (1, sizes[dim]):
                raise ValueError(f"{name!r} has {size} entries along {dim!r}, where others have {sizes[dim]}")
            if dim in lead or dim in arrays:
                raise ValueError(f"{dim!r}, a dimension of {name!r}, has another meaning too: rename it by `dims`")
            if len(self.coords.get(dim, range(sizes[dim]))) != sizes[dim]:
                raise ValueError(f"coords has {len(self.coords[dim])} labels of {dim!r} for {sizes[dim]} of {group}")
        kept = {n: [(dim, size) for dim, size in layout if size == sizes[dim]] for n, layout in layouts.items()}
        return dict_to_dataset(
            {n: a.reshape((*a.shape[: len(lead)], *[size for _, size in kept[n]])) for n, a in arrays.items()},
            dims={name: [dim for dim, _ in layout] for name, layout in kept.items()},
            coords={dim: self.coords[dim] for dim in sizes if dim in self.coords},
            sample_dims=list(lead),
            inference_library=pyro,
        )

    def _layout(self, group: str, name: str, shape: tuple[int, ...]) -> list[tuple[str, int]]:
        site, given = self.sites.get(name), (self.pred_dims if group.startswith("predictions") else self.dims).get(name)
        if site and group == "unconstrained_posterior" and shape != site.shape:
            site, given = replace(site, event_names=()), None
        found = site.dims(shape, site.event_dim_in(group, len(shape))) if site else [(None, size) for size in shape]
        if given is not None:
            if len(given) > len(found) and group != "log_likelihood":
                raise ValueError(f"dims[{name!r}] has {len(given)} names for {len(found)} dimensions, {shape}")
            found = [(dim, size) for dim, (_, size) in zip([*given, *[None] * len(found)], found, strict=False)]
        number = iter(range(len(found)))
        return [(f"{name}_dim_{next(number)}" if dim is None else dim.replace("/", "."), size) for dim, size in found]


def to_datatree(
    posterior: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Nodes | None = None,
    posterior_predictive: Nodes | bool = False,
    predictions: Nodes | None = None,
    log_likelihood: bool = False,
    unconstrained: bool = False,
    constant_data: Nodes | None = None,
    predictions_constant_data: Nodes | None = None,
    coords: Names | None = None,
    dims: Names | None = None,
    event_dims: Names | None = None,
    pred_dims: Names | None = None,
    num_samples: int = 1000,
    num_chains: int = 1,
    batch_size: int = 1,
    seed: int = 0,
) -> xr.DataTree:
    """What Pyro's inference returns as an ArviZ `DataTree`, whose dimensions have the names of the plates.

    Args:
        posterior: `MCMC` after `run`, a trained guide or its `SVI`, a `Predictive`, or draws as of `get_samples()`.
        model: the model of draws or of your own guide; else in place of the one that `posterior` knows.
        model_args, model_kwargs: arguments of model and guide, with the observations; an `MCMC` object knows them.
        prior, posterior_predictive, predictions: what `Predictive` returned; `posterior_predictive=True` draws it anew.
        log_likelihood: whether the log density of each observation is computed.
        unconstrained: whether the draws are also given on the real line, as `unconstrained_posterior`.
        constant_data, predictions_constant_data: covariates, name → array.
        coords: dimension → its labels.
        dims: name → names of all its dimensions, after `chain` and `draw`, in place of those of plates.
        event_dims: site → names of its event dimensions; without names they are `z_dim_0`, …
        pred_dims: as `dims`, for `predictions` and `predictions_constant_data`.
        num_samples, num_chains: number of draws of a guide; number of chains of draws in a dict.
        batch_size: draws at which the model is run at once, in a plate around it, as `Predictive(parallel=True)` does.
        seed: random seed for the draws; the random state outside stays as it is.

    Returns:
        `posterior` (with deterministic sites), `sample_stats`, `observed_data`, and what is asked for. A guide has one
        chain, and `log_p` and `log_q` as `loo_approximate_posterior` wants them. Masked observations are NaN.
    """
    if isinstance(posterior, AbstractMCMC):
        model_args = getattr(posterior, "_args", ()) if model_args is None else model_args
        model_kwargs = getattr(posterior, "_kwargs", {}) if model_kwargs is None else model_kwargs
    predictive = posterior_predictive if isinstance(posterior_predictive, Mapping) else None
    again = predictive is None and bool(posterior_predictive or isinstance(posterior, Predictive))
    asked = {"posterior_predictive": again, "log_likelihood": log_likelihood, "unconstrained_posterior": unconstrained}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        adapter = _adapter(posterior, model, model_args or (), model_kwargs or {}, num_samples, num_chains)
        runs = ModelRuns(adapter) if adapter.model else None
        groups = _computed(adapter, runs, [group for group, wanted in asked.items() if wanted], batch_size)
        if isinstance(posterior, Predictive) and not adapter.samples and runs:
            prior = Predictive(_Unobserve(runs.names("observed"))(runs.model), num_samples=posterior.num_samples)()
    for name, value in _by_chain(prior or {}, 1).items():
        groups.setdefault("prior_predictive" if runs and name in runs.names("observed") else "prior", {})[name] = value
    shape = next((value.shape[:2] for value in adapter.samples.values()), (num_chains, None))
    groups.update({"posterior_predictive": _by_chain(predictive, *shape)} if predictive else {})
    groups.update(predictions=_by_chain(predictions or {}, *shape), constant_data=constant_data or {})
    groups["predictions_constant_data"] = predictions_constant_data or {}
    sites = {**adapter.sites, **(runs.sites if runs else {})}
    converter = PyroConverter(sites, coords or {}, dims or {}, event_dims or {}, pred_dims or {})
    return xr.DataTree.from_dict({n: converter.dataset(n, arrays) for n, arrays in groups.items() if arrays})


def _computed(
    adapter: PyroInferenceAdapter, runs: ModelRuns | None, asked: list[str], batch_size: int
) -> dict[str, Any]:
    """Group → name → array, of the draws, of runs of the model at the draws, and of its observations."""
    groups: dict[str, Any] = {"posterior": adapter.samples, "sample_stats": adapter.sample_stats}
    if runs is None:
        if asked:
            raise ValueError(f"{asked} need the model: give `model` and `model_args`")
        return groups
    wanted = [group for group in asked if runs.draws]
    if runs.draws and runs.names("deterministic") and not runs.unknown:
        wanted.append("posterior")
    if "log_q" in adapter.sample_stats and not runs.missing:
        wanted.append("sample_stats")
    chains = len(next(iter(adapter.samples.values()), ()))
    for group, arrays in (runs.at_draws(wanted, batch_size) if wanted else {}).items():
        groups[group] = {**_by_chain(arrays, chains), **groups.get(group, {})}
    draws = groups["posterior"]
    groups["posterior"] = {name: draws[name] for name in [*runs.sites, *draws] if name in draws}
    return {**groups, "observed_data": runs.observations()}
