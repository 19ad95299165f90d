"""What an ordinary Pyro model does when it is run as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from calibrant.calls import parameters_in_modules
from calibrant.errors import CalibrantError, ProgramError
from calibrant.program.contract import PLATE, Program, as_program
from calibrant.program.tracing import Hold, is_deterministic, is_factor
from calibrant.pyro_models.handlers import Sites, plates_sized, with_masks
from calibrant.pyro_models.layouts import Layout, by_datum
from calibrant.pyro_models.parameters import Recorder

Nodes = Mapping[str, Any]
_RIGHT_CALL = "give what you give to svi.step or mcmc.run, cal.from_pyro(model, x, y)"


@dataclass(frozen=True)
class Seen:
    """A run of a model by itself.

    Attributes:
        nodes: its sites, without plates.
        sites: what is known about them.
        recorder: its parameters.
    """

    nodes: Nodes
    sites: Sites
    recorder: Recorder

    def size(self) -> int:
        """Number of data."""
        frames = (frame for site in self.nodes.values() for frame in site["cond_indep_stack"])
        return next(frame.size for frame in frames if frame.name == self.sites.plate)

    def with_density(self) -> dict[str, str]:
        """Site of the model with a density → its name in the program; missing entries are left out."""
        names = {name: self.sites.name(name) for name, site in self.nodes.items() if not is_deterministic(site)}
        return {name: new for name, new in names.items() if new}

    def sampled(self) -> list[str]:
        """Sites with a value and a density, so no factors."""
        return [name for name in self.with_density() if not is_factor(self.nodes[name])]

    def observed(self) -> list[str]:
        """Sites of the data that have obs=."""
        return [name for name in self.sampled() if self.nodes[name]["is_observed"] and self.is_local(name)]

    def is_local(self, name: str) -> bool:
        """Whether a site lies in the plate of the data."""
        return self.sites.frame(self.nodes[name]) is not None

    def value(self, name: str) -> Tensor:
        """The value of a site, with the data first if it has some; missing entries have one of the others."""
        site, layout = self.nodes[name], self._layout(name)
        value = _filled(site["value"])
        return value if layout is None else layout.to_program(value, site["fn"].event_dim)

    def density(self, name: str, missing: Tensor | None = None) -> Tensor:
        """Pyro's own log density of a site, in nats: one for each datum, or one number.

        Args:
            name: the site.
            missing: the value of missing entries; None for one of the other values.

        Raises:
            ProgramError: for a value that the distribution cannot take.
        """
        site, layout = self.nodes[name], self._layout(name)
        value = _filled(site["value"], missing)
        try:
            found: Tensor = scale_and_mask(site["fn"].log_prob(value), site["scale"], site["mask"])
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ProgramError(f"site {name!r} has no density at its value ({reason}): {_RIGHT_CALL}") from error
        return found.sum() if layout is None else by_datum(layout.to_program(found, 0)).sum(1)

    def observations(self) -> dict[str, Tensor]:
        """Values of the observed sites, by their names in the program."""
        names = self.with_density()
        return {names[name]: self.value(name).detach() for name in self.observed()}

    def _layout(self, name: str) -> Layout | None:
        site = self.nodes[name]
        frame = self.sites.frame(site)
        return None if frame is None else Layout.of(site["fn"].batch_shape, frame, site["cond_indep_stack"])


def _filled(value: Tensor, missing: Tensor | None = None) -> Tensor:
    if not value.is_floating_point() or not value.isnan().any() or value.isnan().all():
        return value
    return torch.where(value.isnan(), value[~value.isnan()][0] if missing is None else missing, value)


def refuse_missing(seen: Seen) -> None:
    """Refuse missing observations that no mask excludes: they would get a value of another datum, and count.

    Raises:
        ProgramError: naming the site.
    """
    for name in seen.observed():
        value = seen.nodes[name]["value"]
        is_missing = value.isnan()
        if not is_missing.any() or is_missing.all():
            continue
        low, high = (seen.density(name, end) for end in (value[~is_missing].min(), value[~is_missing].max()))
        if not torch.allclose(low, high, rtol=1e-5, atol=1e-5, equal_nan=True):
            raise ProgramError(
                f"site {name!r} observes missing values (NaN) without a mask: let the model take the mask as an "
                f"argument of its own, as in def model(seen, y=None), give the site obs_mask=seen, and give "
                "seen=~y.isnan()"
            )


def first_look(model: Program, values: Mapping[str, Any], plate: str | None) -> Seen:
    """Run a model, and find the plate of its data and what is observed there.

    Args:
        model: the model.
        values: its arguments.
        plate: the plate that holds the data; None to find it.

    Raises:
        ProgramError: for a model that does not run, or without one plate that holds all that is observed.
    """
    seen = look(model, values, Sites(""))
    nodes = seen.nodes
    name = plate or _find_plate(nodes)
    frames = {frame.name: frame for site in nodes.values() for frame in site["cond_indep_stack"]}
    _check_plate(nodes, frames, name)
    _refuse_weights_in_plate(model, nodes, name)
    others = {other: frame.size for other, frame in frames.items() if other != name}
    sites = Sites(name, plates=others, masked=with_masks(iter(nodes)))
    found = Seen(nodes, sites, seen.recorder)
    return replace(found, sites=replace(sites, observed=frozenset(found.observed()), recorded=_recorded(found)))


def with_plates_of_the_same_data(seen: Seen) -> Iterator[Seen]:
    """A run in which other plates of the same size hold the same data too, and the run as it is.

    Such plates are never around a site of the data plate.

    Raises:
        ProgramError: for an observed site outside the plate, when the run as it is is asked for.
    """
    together = {f.name for n, s in seen.nodes.items() if seen.is_local(n) for f in s["cond_indep_stack"]}
    same = {name for name, size in seen.sites.plates.items() if size == seen.size()} - together
    if same:
        plates = {name: size for name, size in seen.sites.plates.items() if name not in same}
        wider = replace(seen, sites=replace(seen.sites, same=frozenset(same), plates=plates))
        observed = frozenset(wider.observed())
        yield replace(wider, sites=replace(wider.sites, observed=observed, recorded=_recorded(wider)))
    _refuse_outside(seen)
    yield seen


def look(
    model: Program,
    values: Mapping[str, Any],
    sites: Sites,
    size: int | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> Seen:
    """Run a model by itself, without subsampling.

    Args:
        model: the model.
        values: its arguments.
        sites: what is known about it.
        size: number of data; None for that of the model.
        held: values at which sites are fixed.

    Raises:
        ProgramError: for a model that does not run, or with distributions of torch.
    """
    recorder = Recorder()
    sizes = sites.sizes(size)
    try:
        with parameters_in_modules(), plates_sized(sizes), Hold(held or {}), poutine.trace() as tracer, recorder:
            model(**values)
    except CalibrantError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ProgramError(
            f"the model does not run with these arguments ({type(error).__name__}: {reason}): {_RIGHT_CALL}"
        ) from error
    found = tracer.get_trace().nodes
    nodes = {n: s for n, s in found.items() if s["type"] == "sample" and not site_is_subsample(s)}
    for name, site in nodes.items():
        if not isinstance(site["fn"], TorchDistributionMixin):
            kind = type(site["fn"]).__name__
            raise ProgramError(f"site {name!r} draws from {kind} of torch: take pyro.distributions.{kind}")
    return Seen(nodes, sites, recorder)


def _is_data(site: Mapping[str, Any]) -> bool:
    return site["is_observed"] and not is_deterministic(site) and not is_factor(site)


def _find_plate(nodes: Nodes) -> str:
    """The only plate that holds all observed sites, or the one called data."""
    observed = [name for name, site in nodes.items() if _is_data(site)]
    stacks = {name: {frame.name for frame in nodes[name]["cond_indep_stack"]} for name in observed or nodes}
    if alone := [name for name in observed if not stacks[name]]:
        raise ProgramError(
            f'observed site {alone[0]!r} lies in no plate: draw it in `with pyro.plate("{PLATE}", len(y)):`, one entry '
            "for each datum; entries that depend on each other are the event of one datum, in a plate of size 1"
        )
    everything = sorted(set().union(*stacks.values()))
    common = set.intersection(*stacks.values()) if observed else set(everything)
    if PLATE in common or len(common) == 1:
        return PLATE if PLATE in common else common.pop()
    if not everything:
        raise ProgramError(f'the model has no plate: draw its data in `with pyro.plate("{PLATE}", len(y)):`')
    raise ProgramError(
        f"the model has the plates {everything}: say which of them holds the data, whose entries are independent given "
        f"all that is outside, as in cal.from_pyro(model, ..., plate={everything[0]!r})"
    )


def _check_plate(nodes: Nodes, frames: Mapping[str, Any], plate: str) -> None:
    """Refuse a plate that the model lacks, and a loop over the data."""
    if plate not in frames:
        raise ProgramError(f"the model has no plate {plate!r}; it has {sorted(frames)}")
    if frames[plate].dim is None:
        name = next(n for n, s in nodes.items() if any(f.name == plate for f in s["cond_indep_stack"]))
        raise ProgramError(
            f"site {name!r} is drawn in a loop over the data, `for i in pyro.plate({plate!r}, ...)`: draw all data at "
            f"once, `with pyro.plate({plate!r}, len(y)):`, at one site with obs=y"
        )


def _refuse_weights_in_plate(model: Program, nodes: Nodes, plate: str) -> None:
    """Refuse random weights of modules that are read in the plate, which would be drawn for every datum."""
    modules = as_program(model).modules()
    weights = {attribute for part in modules for attribute in getattr(part, "_pyro_samples", ())}
    for name, site in nodes.items():
        in_plate = any(frame.name == plate for frame in site["cond_indep_stack"])
        if in_plate and name.rpartition(".")[2] in weights:
            raise ProgramError(
                f"the PyroSample {name!r} is read inside the plate {plate!r}, which draws one for every datum: read it "
                "once before the plate, or call its layer there"
            )


def _refuse_outside(seen: Seen) -> None:
    """Refuse observed sites outside the plate of the data."""
    for name, site in seen.nodes.items():
        if _is_data(site) and not seen.is_local(name):
            plate, own = seen.sites.plate, sorted(frame.name for frame in site["cond_indep_stack"])
            raise ProgramError(
                f"observed site {name!r} lies in {f'the plates {own}' if own else 'no plate'}, not in {plate!r}: all "
                f"that is observed lies in the plate of the data; draw it in `with pyro.plate({plate!r}, ...):`, or "
                f"name the plate that holds the data, as in cal.from_pyro(model, ..., plate={(own or [PLATE])[0]!r})"
            )


def _recorded(seen: Seen) -> dict[str, int | None]:
    """Where the data lie in the values of deterministic sites of the data plate."""
    found: dict[str, int | None] = {}
    for name, site in seen.nodes.items():
        frame = seen.sites.frame(site)
        if frame is not None and frame.dim is not None and is_deterministic(site):
            shape = site["value"].shape
            dims = [dim for dim, count in enumerate(shape) if count == seen.size()]
            place = len(shape) + frame.dim
            found[name] = place if place in dims else dims[0] if dims else None
    return found


def observed_arguments(model: Program, values: Mapping[str, Any], seen: Seen) -> frozenset[str]:
    """The arguments that are values of observed sites: these change with them, or share their memory."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.dim()}
    return frozenset(name for name in tensors if _is_seen_in_values(model, values, name, seen))


def _is_seen_in_values(model: Program, values: Mapping[str, Any], name: str, seen: Seen) -> bool:
    own = {site: seen.nodes[site]["value"] for site in seen.sampled() if _is_data(seen.nodes[site])}
    again = _with_other_rows(model, values, name, seen, [site for site in seen.sampled() if site not in own])
    if again is None or torch.equal(_other_rows(values[name]), values[name]):
        return values[name].data_ptr() in {value.data_ptr() for value in own.values()}
    found = {site: again.nodes[site]["value"] for site in own if site in again.nodes}
    pairs = [(value.nan_to_num(), own[site].nan_to_num()) for site, value in found.items()]
    return any(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs)


def _other_rows(value: Tensor) -> Tensor:
    return value.roll([1] * value.dim(), list(range(value.dim())))


def _with_other_rows(model: Program, values: Mapping[str, Any], name: str, seen: Seen, held: list[str]) -> Seen | None:
    """A run with the entries of an argument in another order; None if the model does not run with them."""
    fixed = {site: seen.nodes[site]["value"] for site in held}
    try:
        return look(model, {**values, name: _other_rows(values[name])}, seen.sites, held=fixed)
    except ProgramError:
        return None


def refuse_both(model: Program, values: Mapping[str, Any], seen: Seen, observed: frozenset[str]) -> None:
    """Refuse an argument that is observed, and on which a distribution or a mask depends too.

    Raises:
        ProgramError: naming the argument and the site.
    """
    for name in sorted(observed):
        again = _with_other_rows(model, values, name, seen, seen.sampled())
        for site in () if again is None else [site for site in seen.sampled() if site in again.nodes]:
            found, wanted = again.density(site), seen.density(site)  # type: ignore[union-attr]
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True):
                raise ProgramError(
                    f"the argument {name!r} is observed, and the distribution of site {site!r} depends on it too: give "
                    "what that distribution reads (a mask, a total, earlier values) as an argument of its own, as in "
                    f"def model(seen, {name}=None)"
                )
