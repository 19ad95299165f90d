"""Modes that chains cannot travel between: all are found, and have the mass that they have.

Every truth is known: the posterior of `two_signs` is symmetric, and the mixtures are given by their weights.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import small_models
import torch
from agreement import limit
from small_models import nuts

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference.diagnostics import ess
from calibrant.inference.references import composing, grouping, partition, searching
from calibrant.inference.references.composing import Mode
from calibrant.inference.references.lanes import NutsSettings
from calibrant.program import as_program


def two_signs(size):
    """The sign of z is not seen."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.1))


class OneSign(pyro.nn.PyroModule):
    """A guide that knows the positive mode alone."""

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 0.1))


def mixture(size, weights, places, sds):
    """The posterior of z is a mixture of Normals, for data that say nothing."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        parts = weights.log() + dist.Normal(places, sds).log_prob(z[:, None])
        pyro.factor("mixture", parts.logsumexp(1) - dist.Normal(0.0, 5.0).log_prob(z))
        pyro.sample("x", dist.Normal(torch.zeros(size), 1.0))


# -- references --------------------------------------------------------------------------------------------------------


X = torch.linspace(0.6, 2.0, 10)


def test_both_signs_have_half_of_the_mass():
    """A guide that knows one sign does not hide the other."""
    tree = nuts(two_signs, {"x": X}, init=OneSign())
    convergence, z = tree["convergence"].dataset, tree["posterior"]["z"].values
    assert convergence["is_reference"].values.all(), convergence["reason"].values
    assert (np.abs((z > 0).mean(1) - 0.5) < 0.01).all()  # in every chain
    assert (convergence["modes"] == 2).all()
    apart = int(convergence["apart"].sum())
    assert apart >= 8  # now and then, a chain moves
    assert convergence.attrs["starts"] == 32
    assert convergence.attrs["expected_wrong"] == pytest.approx(apart / (2**15 - 1))  # half of the starts explore
    assert (convergence["ess_bulk"] >= 400).all()
    mean = 100 * X / 101  # of |z|, whose posterior is Normal
    assert (np.abs(np.abs(z).mean((0, 1)) - mean.numpy()) < limit(len(X)) * 101**-0.5 / 400**0.5).all()


def test_without_the_search_data_pass_that_lack_a_sign(monkeypatch):
    """One in eight of those whose signs stand apart, on average."""
    small_models.one_look(monkeypatch)
    x = torch.cat([X, X, X])
    tree = nuts(two_signs, {"x": x}, starts=0, warmup=50)
    passed = tree["convergence"]["is_reference"].values
    positive = (tree["posterior"]["z"].values > 0).mean((0, 1))
    assert "modes" not in tree["convergence"]
    assert (np.abs(positive[passed] - 0.5) > 0.1).any()


WEIGHTS = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.9999, 0.0001]])
PLACES = torch.tensor([[0.0, 6.0], [0.0, 6.0], [-5.0, 5.0]])
SDS = torch.tensor([[1.0, 0.3], [1.0, 1.0], [1.0, 0.5]])


def test_masses_are_right():
    """Of unequal masses and widths, of modes that hardly mix, and of a mode without mass."""
    values = {"weights": WEIGHTS, "places": PLACES, "sds": SDS}
    tree = nuts(mixture, {"x": torch.zeros(3)}, covariates=values, warmup=200)
    convergence = tree["convergence"].dataset
    assert convergence["is_reference"].values.all(), convergence["reason"].values
    assert convergence["modes"].values.tolist() == [2, 2, 1]
    assert not convergence["apart"][1]
    z = torch.tensor(tree["posterior"]["z"].values).flatten(0, 1).double()
    second = (z > 0.5 * PLACES.sum(1)).double().mean(0)
    exact = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(PLACES, SDS))
    expected = 1 - exact.cdf(0.5 * PLACES.sum(1))
    np.testing.assert_allclose(second, expected, atol=0.01)
    near = exact.cdf(torch.tensor([6.3, 7.0, -4.0])) - exact.cdf(torch.tensor([5.7, 5.0, -6.0]))
    found = ((z > torch.tensor([5.7, 5.0, -6.0])) & (z < torch.tensor([6.3, 7.0, -4.0]))).double().mean(0)
    np.testing.assert_allclose(found, near, atol=0.03)


@pytest.mark.slow
def test_many_modes_leave_a_datum_out():
    places = torch.arange(-9.0, 11.0, 2.0)[None]
    values = {"weights": torch.full((1, 10), 0.1), "places": places, "sds": torch.full((1, 10), 0.1)}
    convergence = nuts(mixture, {"x": torch.zeros(1)}, covariates=values)["convergence"].dataset
    assert not convergence["is_reference"].any()
    assert "more than 8 modes" in str(convergence["reason"].values[0])
    assert int(convergence["modes"][0]) > 8


@pytest.mark.slow
def test_modes_of_shared_latents():
    """The sign of a shared latent is not seen; a local latent goes with it."""

    def program(size):
        sign = pyro.sample("sign", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(sign, 0.5))
            pyro.sample("x", dist.Normal(z.abs(), 0.1))

    tree = nuts(program, {"x": torch.tensor([1.0, 1.2, 1.1, 0.9])}, warmup=200)
    convergence = tree["convergence"].dataset
    positive = tree["posterior"]["sign"].values > 0
    assert convergence.attrs["starts"] == 16
    assert (convergence["modes"] >= 2).all()
    assert convergence["is_reference"].values.all(), convergence["reason"].values
    assert abs(positive.mean() - 0.5) < 0.02
    z = tree["posterior"]["z"].values
    assert abs((z > 0).mean() - 0.5) < 0.02


@pytest.mark.slow
def test_no_wrong_mass_among_300_data_that_pass():
    """Data of the model itself; where modes touch, chains cross by themselves. A lost mode errs by .5."""
    x = cal.program.sample_prior(two_signs, 330, seed=5)["x"]
    tree = nuts(two_signs, {"x": x}, warmup=300)
    passed = tree["convergence"]["is_reference"].values
    apart = tree["convergence"]["apart"].values
    positive = (tree["posterior"]["z"].values > 0).astype(float)
    error = np.abs(positive.mean((0, 1)) - 0.5)
    assert passed.sum() >= 300, tree["convergence"]["reason"].values[~passed]
    assert error[passed & apart].max() < 0.02
    mixed = passed & ~apart
    assert (error[mixed] < 0.5 * limit(int(mixed.sum())) / np.sqrt(ess(positive)[mixed])).all()
    assert error[passed].max() < 0.15
    assert tree["convergence"].attrs["expected_wrong"] < 1e-6


def test_too_few_starts_are_refused():
    with pytest.raises(InferenceError, match="starts=2: give at least 4"):
        nuts(two_signs, {"x": torch.zeros(2)}, starts=2)


# -- the search --------------------------------------------------------------------------------------------------------


def test_hard_shapes_with_one_mode_are_not_taken_for_several():
    """Strong correlation, a funnel, and tails without moments."""

    def program(size):
        near = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
        with pyro.plate("data", size):
            pyro.sample("correlated", dist.MultivariateNormal(torch.zeros(2), near))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.5))
            pyro.sample("funnel", dist.Normal(0.0, scale[:, None]).expand([size, 5]).to_event(1))
            pyro.sample("heavy", dist.StudentT(1.0, torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(size), 1.0))

    data = cal.data.Data({"x": torch.zeros(8)})
    found = searching.search(as_program(program), data, 32, NutsSettings(), None, 1, cal.progress.silent)
    assert found == {}


def gaussian_chains(places, sd=1.0, draws=30, seed=0):
    """Chains `(start, draw, width)` that stay at their places."""
    places = np.array(places, float)
    return places[:, None] + sd * np.random.default_rng(seed).standard_normal((len(places), draws, places.shape[1]))


LEFT = np.array([-5.0, 0.0])


def two_normals(z):
    return np.logaddexp(-0.5 * np.square(z - LEFT).sum(-1), -0.5 * np.square(z + LEFT).sum(-1))


def test_groups_are_divided_by_valleys_and_not_by_distance():
    draws = gaussian_chains([[-5.0, 0.0]] * 3 + [[5.0, 0.0]] * 5)
    assert grouping.nested_rhat(draws[None])[0] > 2
    found = grouping.groups_of(draws, two_normals)
    assert found.apart
    assert found.labels.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    flat = grouping.groups_of(draws, lambda z: -0.5 * np.square(z / [8.0, 1.0]).sum(-1))
    assert (flat.count, flat.apart) == (1, False)


def test_a_chain_that_moves_is_in_no_group():
    draws = gaussian_chains([[-5.0, 0.0]] * 3 + [[5.0, 0.0]] * 4)
    draws[0, 10:] += [10.0, 0.0]
    found = grouping.groups_of(draws, two_normals)
    assert not found.apart
    assert found.labels.tolist() == [-1, 1, 1, 0, 0, 0, 0]


def test_lost_chains_and_places_without_mass_are_in_no_group():
    draws = gaussian_chains([[-5.0, 0.0]] * 3 + [[5.0, 0.0]] * 4)
    draws[1, 3] = np.nan
    found = grouping.groups_of(draws, lambda z: two_normals(z) - np.where(z[:, 0] > 0, 40.0, 0.0))
    assert found.labels.tolist() == [0, -1, 0, -1, -1, -1, -1]
    assert not found.apart


# -- weights and composition -------------------------------------------------------------------------------------------


def test_a_partition_divides_groups_in_the_gap_between_them():
    groups = [gaussian_chains([[-5.0, 0.0]], 1.0, 400)[0], gaussian_chains([[5.0, 0.0]], 0.2, 400)[0]]
    table = partition.stacked([partition.fitted(groups)] * 2, [0, 1])
    at = torch.tensor([[[-5.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [5.0, 0.0]]]).double().expand(2, -1, -1)
    found = table.log_shares(at).exp()
    np.testing.assert_allclose(found.sum(-1), 1.0)
    assert (found[0, :2, 0] > 0.99).all()
    assert (found[0, 3:, 1] > 0.99).all()
    lanes = partition.log_own_share(at[:, 0], table.rows())
    np.testing.assert_allclose(lanes, table.log_shares(at)[:, 0].diagonal())


def test_weights_and_their_errors():
    modes = [  # of a run in which another datum has three groups
        Mode(np.log(3.0) + 700, 0.02, np.array([0.999, 0.001, 0.0])),
        Mode(700.0, 0.04, np.array([0.003, 0.997, 0.0])),
    ]
    weights, errors = composing.weights_of(modes)
    np.testing.assert_allclose(weights, [0.75, 0.25])
    np.testing.assert_allclose(errors, 0.75 * 0.25 * np.hypot(0.02, 0.04))
    assert composing.imbalance(modes, weights) == pytest.approx(0.0)
