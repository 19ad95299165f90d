"""Ordinary Pyro models as programs: the densities of Pyro, the draws of Pyro, and what is refused."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro_scripts import SCRIPTS, dawid_skene, drawn, factor_analysis, mixed_effects, whole, with_parameters

import calibrant as cal
from calibrant.errors import CalibrantError, ProgramError
from calibrant.program import check_program, deterministic, factors, log_density, sample_prior, trace

BITS = {torch.float32: 1e-6, torch.float64: 1e-12}


@contextmanager
def dtype_of(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def built(script, size=None):
    """The model, what it is called with, and its program."""
    model, args = script.build(), script.call(size or script.size)
    return model, args, cal.from_pyro(model, *args, plate=script.plate)


def by_pyro(script, model, args, values):
    """Pyro's own log densities of the sites of a model at these values, which have the data first."""
    moved = {name: script.moved.get(name, lambda v: v)(value) for name, value in values.items()}
    with poutine.trace() as tracer, poutine.condition(data=moved):
        model(*args)
    run = tracer.get_trace()
    run.compute_log_prob()
    pyro.clear_param_store()
    return run


def held(program, data):
    """Values of all sites with a value: the data, and draws of everything else."""
    observed, covariates = data.tensors()
    run = trace(program, len(data), covariates, observed)
    left_out = {*factors(run), *deterministic(run)}
    return {name: site["value"] for name, site in cal.program.messages(run).items() if name not in left_out}


def differences(script, model, args, program):
    """Site → largest relative difference from Pyro's log densities, each site summed over data."""
    data = program.data(*args)
    values = held(program, data)
    with torch.no_grad():
        run = by_pyro(script, model, args, values)
        found = log_density(program, values, len(data), data.tensors()[1], observed=data.observed_names)
    sites = {name: script.names.get(name, name) for name, site in run.nodes.items() if "log_prob_sum" in site}
    recorded = deterministic(run)
    sites = {name: new for name, new in sites.items() if new in found and name not in recorded}
    assert set(sites.values()) == set(found), "sites"
    pairs = {new: (float(found[new].sum()), float(run.nodes[name]["log_prob_sum"])) for name, new in sites.items()}
    return {name: abs(a - b) / max(1.0, abs(b)) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_densities_are_those_of_pyro(script, dtype):
    with dtype_of(dtype):
        model, args, program = built(script)
        found = differences(script, model, args, program)
    assert max(found.values()) < BITS[dtype], found


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_contract_is_kept(script):
    _, args, program = built(script)
    observed, covariates = program.data(*args).tensors()
    assert check_program(program, observed, covariates) is program
    assert set(observed) == set(program.observed)
    assert set(covariates) == set(program.covariates)
    names = set(cal.program.sites(program, observed, covariates))
    assert names.isdisjoint(observed)


# -- planted defects ---------------------------------------------------------------------------------------------------


def test_transposed_data_are_seen():
    """As many annotators as items: only the densities tell which dimension is which."""
    ratings = whole(4, 4)
    program = cal.from_pyro(dawid_skene, ratings, plate="items")
    values = held(program, program.data(ratings))
    right = log_density(program, values, 4)["rating"].sum()
    wrong = log_density(program, {**values, "rating": values["rating"].T}, 4)["rating"].sum()
    assert abs(float(right - wrong)) > 0.1
    run = by_pyro(SCRIPTS["Dawid-Skene, items to the right"], dawid_skene, (ratings,), values)
    assert float(run.nodes["rating"]["log_prob_sum"]) == pytest.approx(float(right), rel=1e-5)


def test_the_dimension_of_a_square_covariate_is_found_by_the_densities():
    def model(exposure, y=None):
        steps, series = exposure.shape
        with pyro.plate("steps", steps, dim=-2), pyro.plate("series", series, dim=-1):
            pyro.sample("y", dist.Poisson(exposure), obs=y)

    args = 1 + drawn(4, 4).abs(), whole(4, 4).float()
    for plate, dim in (("series", 1), ("steps", 0)):
        program = cal.from_pyro(model, *args, plate=plate)
        data = program.data(*args)
        assert program.roles["exposure"].dim == dim
        found = log_density(program, data.tensors()[0], 4, data.tensors()[1])["y"]
        assert torch.allclose(found, dist.Poisson(args[0]).log_prob(args[1]).sum(1 - dim))


def test_a_wrong_layout_is_refused(monkeypatch):
    """The check inside from_pyro compares with Pyro: values in their own order are not those of the items."""
    from calibrant.pyro_models import handlers

    right = handlers.Layout.to_model

    def wrong(self, value):
        return right(self, value.flip(0))

    monkeypatch.setattr(handlers.Layout, "to_model", wrong)
    with pytest.raises(ProgramError, match="has other densities for some of the data"):
        cal.from_pyro(mixed_effects_of_one_plate, torch.arange(5.0), drawn(5))


def mixed_effects_of_one_plate(x, y=None):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_wrong_plate_is_refused():
    with pytest.raises(ProgramError, match="'obs' lies in the plates \\['rows'\\], not in 'groups'"):
        cal.from_pyro(mixed_effects, *SCRIPTS["mixed effects"].call(7), plate="groups")


def test_another_reading_of_the_same_model():
    """Columns as data, whose loadings are local and whose scores are shared."""
    x = drawn(6, 4)
    program = cal.from_pyro(factor_analysis, x, plate="columns")
    observed = program.data(x).tensors()[0]
    latents = cal.program.sites(program, observed)
    assert {name: (site.local, *site.event_shape) for name, site in latents.items()} == {
        "loading": (True, 2),
        "centre": (True,),
        "z": (False, 6, 1, 2),
    }
    script = SCRIPTS["factor analysis"]
    values = held(program, program.data(x))
    run = by_pyro(replace(script, moved={"x": lambda v: v.T}), factor_analysis, (x,), values)
    found = log_density(program, values, 4)
    for name in values:
        assert float(found[name].sum()) == pytest.approx(float(run.nodes[name]["log_prob_sum"]), rel=1e-5)


# -- draws -------------------------------------------------------------------------------------------------------------

_SIMULATED = ["Dawid-Skene, items to the left", "several measurements of a person", "factor analysis", "beta-binomial"]


@pytest.mark.parametrize("name", _SIMULATED)
def test_the_draws_are_those_of_pyro(name):
    """Means and variances of all entries of the data, given the same shared latents: z of the difference below 5."""
    script, size = SCRIPTS[name], 4000
    model, args, program = built(script)
    observed, covariates = program.data(*args).tensors()
    run = trace(program, len(next(iter(observed.values()))), covariates)
    shared = {n: s["value"] for n, s in cal.program.messages(run).items() if not cal.program.is_local(s)}
    index = torch.arange(size) % script.size
    ours = sample_prior(program, size, {n: v[index] for n, v in covariates.items()}, seed=1, values=shared)
    big = [drawn_again(arg, program.roles[n].dim, index) for n, arg in zip(program.roles, args, strict=False)]
    with poutine.trace() as tracer, poutine.condition(data=shared), poutine.uncondition():
        model(*big)
    for site in program.observed:
        theirs = tracer.get_trace().nodes[site]["value"]
        theirs = theirs.T if site in script.moved else theirs
        for power in (1, 2):
            a, b = (values.reshape(size, -1).double().log1p() ** power for values in (ours[site].abs(), theirs.abs()))
            error = ((a.var(0) + b.var(0)) / size).sqrt()
            assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


def drawn_again(arg, dim, index):
    return arg.index_select(dim, index) if isinstance(arg, torch.Tensor) else arg


# -- parameters, copies, data ------------------------------------------------------------------------------------------


def test_parameters_start_where_pyro_left_them():
    model, x = with_parameters(), drawn(7, 3)
    pyro.param("scale.of.x", torch.tensor([3.0, 3.0, 3.0]), constraint=dist.constraints.positive)
    program = cal.from_pyro(model, x)
    pyro.clear_param_store()
    weights = dict(program.named_parameters())
    assert set(weights) == {"outside.all.0.weight", "outside.all.0.bias", "parameters_used.unconstrained.scale_of_x"}
    assert torch.allclose(weights["parameters_used.unconstrained.scale_of_x"].exp(), torch.tensor(3.0))


def test_a_copy_has_weights_of_its_own():
    program = cal.from_pyro(with_parameters(), drawn(7, 3))
    values = sample_prior(program, 7, seed=1)
    twin = copy.deepcopy(program)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(2)
    before, after = (log_density(one, values, 7)["x"] for one in (program, twin))
    assert not torch.allclose(before, after)
    assert torch.equal(before, log_density(program, values, 7)["x"])
    check_program(twin.requires_grad_(False), {"x": values["x"]})
    assert all(weight.requires_grad for weight in program.parameters())


def test_data_of_another_call():
    script = SCRIPTS["missing data, obs_mask="]
    _, _, program = built(script)
    x, seen, y = script.call(11)
    data = program.data(x, seen, y=torch.where(seen, y, torch.nan))
    observed, covariates = data.tensors()
    assert len(data) == 11
    assert torch.equal(observed["y"][seen], y[seen])
    assert torch.equal(covariates["x"], x)
    with pytest.raises(CalibrantError, match="different numbers of data"):
        program.data(x, seen[:5], y)


def test_columns_of_one_array():
    """Covariates and observations that share their memory."""
    table, model = drawn(7, 3), SCRIPTS["logistic regression"].build()
    program = cal.from_pyro(model, table[:, :2], (table[:, 2] > 0).float())
    assert (program.covariates, program.observed) == (("x",), ("y",))
    normal = cal.from_pyro(mixed_effects_of_one_plate, table[:, 0], table[:, 1])
    assert (normal.covariates, normal.observed) == (("x",), ("y",))
    same = cal.from_pyro(mixed_effects_of_one_plate, torch.ones(5), torch.zeros(5))
    assert (same.covariates, same.observed) == (("x",), ("y",))


def test_covariates_by_name_alone():
    """What is observed may be left out where the model runs without it."""
    sigma, effect = SCRIPTS["eight schools"].call(8)
    program = cal.from_pyro(SCRIPTS["eight schools"].build(), plate="schools", covariates={"sigma": sigma})
    assert program.covariates == ("sigma",)
    check_program(program, {"effect": effect}, {"sigma": sigma})
    other = cal.from_pyro(SCRIPTS["eight schools"].build(), sigma, effect)
    values = sample_prior(other, 8, {"sigma": sigma}, seed=0)
    a, b = (log_density(one, values, 8, {"sigma": sigma}).joint for one in (program, other))
    assert torch.equal(a, b)
