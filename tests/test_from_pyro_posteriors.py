"""Programs of ordinary Pyro models go all the way: guide, training, posterior, reference, command line."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from agreement import assert_agrees, from_draws
from commands import good
from pyro.infer import MCMC, NUTS
from pyro_scripts import SCRIPTS

import calibrant as cal
from calibrant.models import create
from calibrant.program import check_program


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_guide_training_and_posterior(name):
    script = SCRIPTS[name]
    args = script.call(script.size)
    program = cal.from_pyro(script.build(), *args, plate=script.plate)
    data = program.data(*args)
    if not cal.program.sites(program, *data.tensors()):
        pytest.skip("no latents")
    guide = cal.guides.amortize(program, data)
    cal.inference.fit(program, guide, data, epochs=1, validation=data)
    tree = cal.inference.posterior(program, guide, data, draws=5)
    assert set(guide.order) <= set(tree["posterior"].data_vars)
    assert all(bool(draws.notnull().all()) for draws in tree["posterior"].data_vars.values())


def by_pyro(model, args, draws, **options):
    """Draws of two chains of Pyro's own NUTS, site → (chain, draw, …)."""
    chains = []
    for seed in (0, 1):
        pyro.set_rng_seed(seed)
        mcmc = MCMC(NUTS(model, **options), num_samples=draws, warmup_steps=300, disable_progbar=True)
        mcmc.run(*args)
        chains.append(mcmc.get_samples())
    pyro.clear_param_store()
    return {name: np.stack([chain[name].numpy() for chain in chains]) for name in chains[0]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("logistic regression", 30, {}),
        ("mixed effects", 24, {}),
        ("Dawid-Skene, items to the right", 20, {"max_plate_nesting": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_the_posterior_of_pyro(name, size, options):
    script = SCRIPTS[name]
    model, args = script.build(), script.call(size)
    program = cal.from_pyro(model, *args, plate=script.plate)
    truth = by_pyro(model, args, 1500, **options)
    tree = cal.inference.reference(program, program.data(*args), warmup=500, draws=1500)
    assert tree["convergence"]["is_reference"].all()
    ours = {site: tree["posterior"][site].values.reshape(4, 1500, *draws.shape[2:]) for site, draws in truth.items()}
    assert_agrees(ours, {site: from_draws(draws) for site, draws in truth.items()})


_FILE = """
import pyro
import pyro.distributions as dist
import torch

import calibrant

EXPOSURE = torch.linspace(1.0, 5.0, 60)
COUNTS = torch.arange(60) % 4


def model(exposure, counts=None):
    with pyro.plate("rows", len(exposure), subsample_size=10) as index:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("counts", dist.Poisson(rate * exposure[index]), obs=None if counts is None else counts[index])


def program():
    return calibrant.from_pyro(model, EXPOSURE, COUNTS)


def data():
    return program().data(EXPOSURE, COUNTS)


def number():
    return 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.py").write_text(_FILE)
    return "rows.py"


def test_a_program_from_a_function_of_a_file(file):
    program = create(f"{file}:program")
    assert program.recipe.name == "rows.py:program"
    assert program.plate == "rows"
    with pytest.raises(cal.errors.ProgramError, match=r"returns int, not a module.*calibrant\.from_pyro"):
        create(f"{file}:number")
    with pytest.raises(cal.errors.ProgramError, match=r"no class of modules.*calibrant\.from_pyro"):
        create(f"{file}:COUNTS")
    check_program(program, *cal.data.load(f"{file}:data")["train"].tensors())


@pytest.mark.slow
def test_the_command_line_takes_it(file):
    out = good("run", f"{file}:program", "--data", f"{file}:data", "--out", "run", "--quick")[0]
    assert "rate" in out
    again, _ = cal.load("run", model=f"{file}:program")
    assert again.covariates == ("exposure",)
    good("check", "run", "--model", f"{file}:program", "--data", f"{file}:data", "--quick")


def test_what_the_commonest_refusal_prints_is_taken():
    script = SCRIPTS["logistic regression"]
    (model, (x, y)) = script.build(), script.call(7)
    with pytest.raises(cal.errors.ProgramError, match=r"calibrant\.from_pyro\(model, x, y\)"):
        check_program(model, {"y": y}, {"x": x})
    program = cal.from_pyro(model, x, y)
    check_program(program, {"y": y}, {"x": x})
    assert torch.equal(program.data(x, y).tensors()[0]["y"], y)
