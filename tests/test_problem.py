"""A problem is bound and checked once, whatever is asked of it; the public functions refuse what they refused."""

import sys
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch

import calibrant as cal
from calibrant.errors import DataError, ProgramError
from calibrant.inference.problem import Problem

CHECKS = ("bind", "bind_fixed", "check_program", "check_guide")


def model(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def guide(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"] / 2, 0.5**0.5).to_event(1))


X = {"x": torch.linspace(-2.0, 2.0, 12).reshape(6, 2)}


@pytest.fixture
def counted(monkeypatch):
    """How often each check is called, from wherever it was imported to."""
    calls = Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return count

    modules = [module for name, module in sys.modules.items() if name.startswith("calibrant.")]
    for name in CHECKS:
        for module in modules:
            if name in vars(module):
                monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return calls


def test_a_check_binds_and_checks_once(counted):
    found = cal.evaluation.check(model, guide, X, draws=500, simulations=100, seed=1)
    parts = ("comparison", "weights", "calibration", "predictive", "gap")
    assert all(getattr(found.result, part) is not None for part in parts)
    assert counted == {"bind": 1, "bind_fixed": 1, "check_program": 1, "check_guide": 1}  # one calls the other


CALLS = {
    "posterior": lambda model, guide, data: cal.inference.posterior(model, guide, data, 10),
    "refine": lambda model, guide, data: cal.guides.refine(model, guide, data, steps=0),
    "gap": lambda model, guide, data: cal.evaluation.gap(model, guide, data, draws=100, steps=0),
    "calibration": lambda model, guide, data: cal.evaluation.calibration(model, guide, data, 100, 50),
    "predictive_check": lambda model, guide, data: cal.evaluation.predictive_check(model, guide, data, draws=20),
    "contrast_experiment": lambda model, guide, data: cal.evaluation.contrast_experiment(model, guide, data, noise=1.0),
    "remedies": lambda model, guide, data: cal.evaluation.remedies(model, guide, data, draws=100),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_function_refuses_a_guide_of_another_program(call):
    def other(observed, size):
        with pyro.plate("data", size):
            pyro.sample("w", dist.Normal(observed["x"] / 2, 1.0).to_event(1))

    with pytest.raises(ProgramError, match=r"the guide: it samples \['w'\]"):
        call(model, other, X)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_function_refuses_data_of_another_shape(call):
    with pytest.raises(DataError, match="has shape"):
        call(model, guide, {"x": torch.zeros(6, 3)})


def rates(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.LogNormal(z, 1.0).to_event(1))


def test_other_values_of_a_problem_are_looked_at_and_a_part_of_it_is_not(counted):
    problem = Problem.of(rates, guide, {"x": X["x"].exp()})
    counted.clear()
    assert problem.of_some(problem.data[:2]).program is problem.program
    assert not counted
    with pytest.raises(DataError, match="outside the support"):
        problem.of_others(problem.data.__class__({"x": X["x"]}))


def test_images_that_a_likelihood_cannot_take_at_some_contrast_are_refused():
    with pytest.raises(DataError, match="outside the support"):
        cal.evaluation.contrast_experiment(rates, guide, {"x": X["x"].exp()}, noise=1.0)
