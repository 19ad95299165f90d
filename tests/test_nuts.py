"""What batched NUTS promises beside its draws' distribution: lanes that do not depend on each other, and refusals.

`test_nuts_coordinates`, `test_nuts_warmup` and `test_nuts_repair` test its parts; `test_nuts_truth` and
`test_nuts_calibration` test the distribution.
"""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import small_models
import torch
from agreement import limit
from small_models import COUNTS, elementwise, nuts

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference.references import lanes
from calibrant.inference.references import random_numbers as counter
from calibrant.inference.references.lanes import NutsSettings, sample_nuts
from calibrant.program import as_program
from calibrant.streams import stream


@pytest.fixture
def one_look(monkeypatch):
    small_models.one_look(monkeypatch)


def few_draws(observed=COUNTS, seed=1, warmup=20, draws=30, scale=1.0):
    """Draws `(chain, draw, data)` of chains that no gate judges."""

    def program(size):
        with pyro.plate("data", size):
            rate = pyro.sample("rate", dist.Gamma(2.0, scale))
            pyro.sample("x", dist.Poisson(rate))

    data = observed if isinstance(observed, cal.data.Data) else cal.data.Data(observed)
    settings = NutsSettings(warmup=warmup, draws=draws)
    return sample_nuts(as_program(program), data, settings, seed, cal.progress.silent)[0].draws["rate"].numpy()


def assert_same(ours, theirs):
    """The same random numbers for the same densities. Arithmetic in batches of another shape may round differently,
    which chains of a density that is log-concave forget; other random numbers give draws that have nothing in common.
    """
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.fixture(scope="module")
def counts():
    return few_draws()


def test_the_tolerance_is_wider_than_rounding_and_narrower_than_another_seed(counts):
    """The prior's rate is off by ten roundings."""
    assert_same(few_draws(scale=1 + 2e-15), counts)
    assert np.mean(np.abs(few_draws(seed=2) / counts - 1) > 1e-5) > 0.99


def test_draws_do_not_depend_on_the_place_in_the_batch(counts):
    order = torch.tensor([5, 0, 3])
    assert_same(few_draws(cal.data.Data(COUNTS).subset(order)), counts[:, :, order])


def test_few_lanes_at_a_time(counts, monkeypatch):
    """Two data at a time, lanes handed on from one to the next."""
    monkeypatch.setattr(lanes, "_LANES", {"cpu": 8})
    assert_same(few_draws(), counts)


def test_lanes_are_dropped(counts, monkeypatch):
    """Lanes that are over leave the batch."""
    dropped = []

    def worth_dropping(self, left, slots):
        dropped.append(2 * left <= slots)
        return dropped[-1]

    monkeypatch.setattr(lanes._Run, "_worth_dropping", worth_dropping)
    assert_same(few_draws(), counts)
    assert any(dropped)


class Poisoned(pyro.nn.PyroModule):
    """A density that is infinite (1), nowhere (2), or has a gradient of NaN (3), for data that say so."""

    def forward(self, size, poison):
        with pyro.plate("data", size):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate))
            pyro.factor("infinite", torch.where(poison == 1, torch.inf, torch.where(poison == 2, -torch.inf, 0.0)))
            # The square root's slope at zero is infinite, and zero times that is NaN.
            pyro.factor("slope", 0.0 * (rate * (poison != 3)).sqrt())


@pytest.fixture(scope="module")
def clean():
    """The reference by one look, of data none of which is poisoned."""
    with pytest.MonkeyPatch.context() as patch:
        small_models.one_look(patch)
        return nuts(Poisoned(), COUNTS, covariates={"poison": torch.zeros(6)}, warmup=50)


def test_same_seed_same_draws(counts, clean):
    np.testing.assert_array_equal(few_draws(), counts)
    assert_same(few_draws(seed=stream(1, "reference"), warmup=50, draws=500), clean["posterior"]["rate"])


def test_poisoned_data_are_reported_and_change_no_other(clean, one_look):
    tree = nuts(Poisoned(), COUNTS, covariates={"poison": torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0])}, warmup=50)
    convergence, others = tree["convergence"].dataset, [0, 4, 5]
    assert not convergence["is_reference"][1:4].any()
    assert all("no finite log density" in str(reason) for reason in convergence["reason"].values[1:4])
    assert_same(*(each["posterior"]["rate"].isel(data=others) for each in (tree, clean)))


def test_data_without_any_density_are_all_reported(one_look):
    """The line of progress has no effective sample size then."""
    told = []
    tree = nuts(
        Poisoned(),
        COUNTS,
        covariates={"poison": torch.ones(6)},
        warmup=50,
        progress=lambda *line: told.append(line[-1]),
    )
    assert not tree["convergence"]["is_reference"].any()
    assert any("ESS of the density nan" in text for text in told)


def test_an_interrupt_returns_what_is_complete(one_look, monkeypatch):
    monkeypatch.setattr(lanes, "_LANES", {"cpu": 8})

    def stop(stage, done, total, text=""):
        if stage == "reference" and done >= 2:
            raise KeyboardInterrupt

    tree = nuts(elementwise, COUNTS, warmup=50, progress=stop)
    labels = tree["posterior"]["data"].values
    assert 2 <= len(labels) < 6
    assert np.isfinite(tree["posterior"]["rate"]).all()
    np.testing.assert_array_equal(tree["observed_data"]["x"], COUNTS["x"].numpy()[labels])


@pytest.mark.gpu
def test_on_a_gpu(one_look):
    """Another device, another stream: the posterior is the same."""

    class Program(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, size):
            with pyro.plate("data", size):
                rate = pyro.sample("rate", dist.Gamma(2.0, self.rate))
                pyro.sample("x", dist.Poisson(rate))

    tree = nuts(Program().cuda(), COUNTS)
    assert bool(tree["convergence"]["is_reference"].all())
    truth = dist.Gamma(2.0 + COUNTS["x"], torch.tensor(2.0))
    ess = tree["convergence"]["ess_bulk"].values
    error = tree["posterior"]["rate"].mean(("chain", "draw")).values - truth.mean.numpy()
    assert (np.abs(error) < limit(len(error)) * truth.stddev.numpy() / ess**0.5).all()


# -- discrete latents --------------------------------------------------------------------------------------------------


def test_a_discrete_latent_may_be_certain():
    def two_groups(size):
        with pyro.plate("data", size):
            group = pyro.sample("group", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(20 * group, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    tree = nuts(two_groups, {"x": torch.tensor([0.0, 20.0])})
    assert (tree["convergence"]["rhat"] < 1.1).all()
    assert not any("group" in reason for reason in tree["convergence"]["reason"].values)
    assert tree["posterior"]["group"].mean(("chain", "draw")).values.tolist() == [0.0, 1.0]
    assert json.loads(tree["posterior"].attrs["latents"]) == ["group", "z"]


def test_a_discrete_support_is_that_of_all_data():
    def coins(size, n):
        with pyro.plate("data", size):
            p = pyro.sample("p", dist.Beta(2.0, 2.0))
            heads = pyro.sample("heads", dist.Binomial(n, p))
            pyro.sample("x", dist.Normal(heads, 1.0))

    n = torch.tensor([2.0] * 8 + [5.0])
    with pytest.raises(InferenceError, match="a support that differs between data"):
        nuts(coins, {"x": torch.ones(9)}, covariates={"n": n})


def test_infinite_discrete_latents_are_refused_by_name():
    def program(size):
        with pyro.plate("data", size):
            n = pyro.sample("n", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(n, 1.0))

    with pytest.raises(InferenceError, match=r"'n' has infinitely many values"):
        nuts(program, {"x": torch.zeros(2)})


def test_shared_discrete_latents_are_refused_by_name():
    def program(size):
        which = pyro.sample("which", dist.Bernoulli(0.5))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(which, 1.0))

    with pytest.raises(InferenceError, match=r"'which'.*shared"):
        nuts(program, {"x": torch.zeros(2)})


def test_too_many_combinations_are_refused():
    def program(size):
        with pyro.plate("data", size):
            on = pyro.sample("on", dist.Bernoulli(0.5).expand([12]).to_event(1))
            pyro.sample("x", dist.Normal(on.sum(-1), 1.0))

    with pytest.raises(InferenceError, match=r"'on'.*2\^12"):
        nuts(program, {"x": torch.zeros(2)})


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_counter_based_numbers_are_uniform_and_independent():
    keys = counter.fold(counter.mix(torch.tensor([5])), torch.arange(200))
    numbers = counter.to_uniform(counter.stream(keys[:, None], torch.arange(500)))
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    largest = limit(1)
    centred = (numbers - 0.5) * 12**0.5
    for product in (centred, centred**2 - 1, centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(product.mean()) / float(product.std()) * product.numel() ** 0.5) < largest
    assert len(torch.unique(numbers)) == numbers.numel()
    noise = counter.normal(keys, 500)
    assert abs(float((noise**4).mean()) - 3) < largest * (96 / noise.numel()) ** 0.5
