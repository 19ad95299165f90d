"""Traps of Pyro 1.9, ArviZ 0.23 and their neighbours that concern what this package does: ours does not have them."""

import ast
import math
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from arviz_stats.base import array_stats
from pyro.nn import PyroModule
from small_models import any_length

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.inference.fitting.objectives import elbo_terms
from calibrant.inference.references.lanes import NutsSettings, sample_nuts
from calibrant.program import as_program
from calibrant.program.tracing import guide_trace
from calibrant.progress import silent


def conjugate(size):
    """Posterior N(x/2, √½), evidence N(0, √2)."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def exact(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"] / 2, 0.5**0.5))


def narrow(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"] / 2, 0.6))


def rows(count, seed=0):
    return {"x": math.sqrt(2) * torch.randn(count, generator=torch.Generator().manual_seed(seed))}


def test_normalised_importance_weights():
    """Pyro's `vectorized_importance_weights(normalized=True)` raises TypeError: no test takes that branch.

    Weights of an exact guide are all equal, hence normalised for each datum where each has as many as its draws.
    """
    x = rows(3)
    groups = {
        guide: cal.inference.importance(cal.inference.posterior(conjugate, guide, x, draws=500))["importance"]
        for guide in (exact, narrow)
    }
    np.testing.assert_allclose(groups[exact]["ess"], 500, rtol=1e-6)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(x["x"].double())
    np.testing.assert_allclose(groups[exact]["log_evidence"], evidence, atol=1e-6)
    assert ((groups[narrow]["ess"] > 50) & (groups[narrow]["ess"] < 499)).all()


def test_k_hat_does_not_grow_with_the_number_of_data():
    """Pyro's `psis_diagnostic` gives one k-hat for the whole batch: 0.35 for one datum, 1.13 for 256 of the same."""
    tree = cal.inference.posterior(conjugate, narrow, rows(256), draws=2000)
    found = cal.inference.importance(tree)["importance"].dataset
    assert found["pareto_k"].dims == ("data",)
    assert (found["pareto_k"] < found.attrs["good_k"]).mean() > 0.95
    alone = cal.inference.importance(tree.isel(data=[3]))["importance"]["pareto_k"]
    assert float(alone[0]) == pytest.approx(float(found["pareto_k"][3]), rel=1e-6)
    weights = tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]
    joint = array_stats.psislw(-weights.sum("data").values.ravel())[1]
    assert joint > 1 > float(found["pareto_k"].mean())  # what Pyro would have said


def test_a_minibatch_is_the_one_that_was_given():
    """Pyro's AutoGuides draw a subsample of their own in a `pyro.plate(..., subsample=index)` (issue 3468).

    Rows that come out of order are met by the guide as by the model: with the exact guide every datum's ELBO is its
    evidence, whatever was drawn, and a guide's parameters follow the datum.
    """
    x, index = rows(10), torch.tensor([7, 1, 4])
    some = {"x": x["x"][index]}
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(some["x"])
    assert torch.allclose(elbo_terms(conjugate, exact, some, 3, {}).local, evidence, atol=1e-5)
    amortized = cal.guides.amortize(conjugate, x).eval()
    for guide in (amortized, cal.guides.refine(conjugate, amortized, x, steps=5)):
        held = {"z": torch.linspace(-1.0, 1.0, 10)}
        whole = guide_trace(guide, x, 10, {}, held).nodes["z"]["fn"].log_prob(held["z"])
        part = guide_trace(guide, some, 3, {}).nodes["z"]["fn"].log_prob(held["z"][index])
        assert torch.allclose(part, whole[index], atol=1e-5)
        assert not torch.allclose(part, whole[:3], atol=1e-2)


def test_a_subsample_of_the_programs_own_is_refused():
    """The same trap, seen from the program."""

    def subsampled(size):
        with pyro.plate("data", size, subsample=torch.tensor([0, 1])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    with pytest.raises(ProgramError, match="minibatches are taken by the library"):
        cal.guides.amortize(subsampled, rows(10))


def test_chains_are_not_processes():
    """Pyro's `MCMC(num_chains=8)` on two cores warns that chains will be drawn sequentially.

    Here one evaluation of the program moves all chains of all data, in this process.
    """
    sizes = []

    def model(size):
        sizes.append(size)
        conjugate(size)

    data = cal.data.Data(rows(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawn, _ = sample_nuts(as_program(model), data, NutsSettings(chains=8, warmup=20, draws=20), 0, silent)
    assert drawn.draws["z"].shape[:3] == (8, 20, 5)
    assert 8 * 5 in sizes
    assert len(sizes) < 8 * 20  # far fewer than the chains' iterations, let alone leapfrogs
    assert not multiprocessing.active_children()


class Named(PyroModule):
    """A model that names the dimension of its latent."""

    dims = {"z": ["factor"]}

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.5], [0.0, 2.0]]))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 0.5).to_event(1))


@pytest.fixture(scope="module")
def trees():
    model, x = Named().eval(), {"x": torch.randn(3, 2, generator=torch.Generator().manual_seed(0))}
    guide = cal.guides.amortize(model, x).eval()
    with pytest.MonkeyPatch.context() as patch:  # too few draws for the gate are enough for the form of a tree
        any_length(patch)
        nuts = cal.inference.reference(model, x, method="nuts", warmup=30, draws=30)
    return {"amortized": cal.inference.posterior(model, guide, x, draws=100), "nuts": nuts}


def test_sample_stats_hold_more_than_divergences(trees):
    """ArviZ's `from_pyro(mcmc)` keeps `diverging` alone, and has no place for a guide's densities."""
    wanted = {"lp", "energy", "acceptance_rate", "step_size", "tree_depth", "n_steps", "diverging"}
    assert wanted <= set(trees["nuts"]["sample_stats"].data_vars)
    assert {"log_p", "log_q"} <= set(trees["amortized"]["sample_stats"].data_vars)
    for tree in trees.values():
        assert all(stat.dims == ("chain", "draw", "data") for stat in tree["sample_stats"].data_vars.values())


def test_plates_and_named_dimensions_are_dimensions(trees):
    """ArviZ's `from_pyro` calls the dimension of the plate `z_dim_0`."""
    for tree in trees.values():
        assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "factor")


def test_a_guide_becomes_a_tree_as_chains_do(trees):
    """ArviZ's `from_pyro(svi)` raises AttributeError: it knows MCMC alone."""
    amortized, nuts = trees["amortized"], trees["nuts"]
    assert isinstance(amortized, xr.DataTree)
    assert set(amortized.children) <= set(nuts.children)
    assert amortized["posterior"]["z"].dims == nuts["posterior"]["z"].dims


def test_arviz_itself_is_not_imported():
    """On Python 3.11 pip takes arviz 0.23, which cannot read a DataTree; its parts, arviz-base and so on, can."""
    imported = set()
    for file in Path(cal.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    assert "arviz_stats" in imported
    assert "arviz" not in imported


@pytest.mark.parametrize("structure", ["faithful", "mean-field", "program", "full", "collapsed"])
def test_parameters_exist_before_the_first_run(structure):
    """Parameters of Pyro's AutoGuides are made when they first run, which breaks saving, moving and compiling."""
    x = {"x": torch.randn(20, 5)}
    guide = cal.guides.amortize(cal.models.create("gsm", shape=(5,), latents=2), x, structure)
    before = {name: value.shape for name, value in guide.state_dict().items()}
    guide_trace(guide, x, 20, {})
    assert {name: value.shape for name, value in guide.state_dict().items()} == before
    assert before
    assert not pyro.get_param_store().keys()
