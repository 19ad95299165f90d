"""The PIT of pixels: its distribution under a true model is known, and a wrong noise shows beside it."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from linear_guides import Linear
from pyro.nn import PyroModule
from scipy.stats import norm
from torch import nn

import calibrant as cal
from calibrant.errors import InferenceError

LINEAR = Linear.random(8, 2, 0.7)
DATA = LINEAR.data(400)


def expected_coverage(levels):
    """Entries inside central intervals of an exact posterior, which has seen them: residuals in predictive sds."""
    residual = LINEAR.noise**4 * torch.linalg.inv(LINEAR.marginal.covariance_matrix).diagonal()
    predictive = (LINEAR.loading @ LINEAR.covariance @ LINEAR.loading.T).diagonal() + LINEAR.noise**2
    ratio = (predictive / residual).sqrt().numpy()
    return np.array([(2 * norm.cdf(norm.ppf(0.5 + level / 2) * ratio) - 1).mean() for level in levels])


def calibration(linear=LINEAR, data=DATA, **options):
    return cal.evaluation.pixel_calibration(linear.program(), linear.guide(), data, draws=30, **options)


@pytest.fixture(scope="module")
def found():
    return calibration()


@pytest.mark.parametrize("end", ["", "_null"])
def test_a_true_model_has_the_coverage_of_the_closed_form(found, end):
    errors = found[f"coverage{end}"].sel(observed="x") - expected_coverage(found["level"].values)
    scores = errors / found[f"coverage{end}_se"].sel(observed="x")
    assert float(np.abs(scores).max()) < limit(6)
    too_high = found[f"coverage{end}"].sel(observed="x") - found["level"]
    assert float((too_high / found[f"coverage{end}_se"].sel(observed="x")).max()) > limit(6)  # not that of the levels


def test_a_true_model_looks_like_its_own_data_and_errors_count_data(found):
    assert float(found["difference"].item()) < 3 * float(found["difference_floor"].item())
    assert float(found["distance"].item()) > limit(1) * float(found["distance_se"].item())
    assert float(found["pit_density"].mean()) == pytest.approx(1.0)
    assert float(found["pit_ecdf"][0, -1]) == pytest.approx(1.0)
    by_datum = found["coverage_data"].sel(observed="x")
    np.testing.assert_allclose(found["coverage_se"][0], by_datum.std("data", ddof=1) / 400**0.5)


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_a_wrong_noise_is_seen_beside_the_model_s_own_data(factor):
    wrong = Linear(LINEAR.loading, factor * LINEAR.noise)
    result = calibration(wrong)
    assert float(result["difference"].item()) > 5 * float(result["difference_floor"].item())
    gap = (result["coverage"] - result["coverage_null"]).sel(observed="x", level=0.8)
    error = np.hypot(result["coverage_se"], result["coverage_null_se"]).sel(observed="x", level=0.8)
    assert float(gap / error) * (1 if factor > 1 else -1) > limit(1)


class Coin(PyroModule):
    """Binary entries with a probability of their own, whatever the latent."""

    def __init__(self):
        super().__init__()
        self.likelihood = cal.models.make_likelihood("bernoulli")

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.likelihood(0.0 * z[:, None] + torch.linspace(-2.0, 2.0, 30)))


def prior(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))


def test_the_pit_of_binary_pixels_is_uniform_where_the_latents_have_not_seen_them(monkeypatch):
    data = {"x": cal.program.sample_prior(Coin(), 500, seed=1)["x"]}
    found = cal.evaluation.pixel_calibration(Coin(), prior, data, draws=2)
    assert miss(found) < limit(101)
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)  # P(X ≤ x), not randomised
    assert miss(cal.evaluation.pixel_calibration(Coin(), prior, data, draws=2)) > limit(101)


def miss(found):
    inner = found.isel(u=slice(5, -5))  # where some entries are expected
    scores = (inner["pit_ecdf"] - inner["u"]) / inner["pit_ecdf_se"]
    return float(np.abs(scores).max())


class Constant(nn.Module):
    """A decoder whose outputs are the same for all latents."""

    def __init__(self, outputs):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = [torch.randn(shape, generator=generator) for shape in outputs.values()]

    def forward(self, z):
        parts = [0.0 * z.sum(-1).reshape(-1, *[1] * part.dim()) + part for part in self.parts]
        return parts[0] if len(parts) == 1 else tuple(parts)


DENSITIES = [card for card in cal.models.list_likelihoods() if getattr(card.cls, "is_density", True)]


@pytest.mark.parametrize("card", DENSITIES, ids=lambda card: card.name)
def test_the_pit_of_every_likelihood_is_uniform_where_the_latents_have_not_seen_the_data(card):
    case = card.cases[-1]
    shape = next(iter(case.observed.values()))
    likelihood = cal.models.make_likelihood({"name": card.name, **case.arguments})
    decoder = Constant(likelihood.outputs(shape))
    model = cal.models.create("vae", shape=shape, latents=1, decoder=decoder, likelihood=likelihood).eval()
    data = {"x": cal.program.sample_prior(model, 300, seed=1)["x"].detach()}
    assert miss(cal.evaluation.pixel_calibration(model, prior_of_vector, data, draws=2)) < limit(101)


def prior_of_vector(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(torch.zeros(size, 1), 1.0).to_event(1))


class Whole(PyroModule):
    """Noise that is correlated, so that the likelihood has to tell the distribution of entries."""

    def __init__(self, tells):
        super().__init__()
        self.likelihood = Correlated() if tells else Silent()

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.likelihood(0.0 * z[:, None] + torch.zeros(2)))


class Silent(nn.Module):
    def forward(self, output):
        return dist.MultivariateNormal(output, torch.tensor([[4.0, 1.9], [1.9, 1.0]]).to(output.dtype))


class Correlated(Silent):
    def marginals(self, output):
        return dist.Normal(output, torch.tensor([2.0, 1.0]).to(output.dtype))


def test_entries_of_a_joint_distribution_are_those_that_the_likelihood_tells():
    data = {"x": cal.program.sample_prior(Whole(True), 500, seed=1)["x"]}
    found = cal.evaluation.pixel_calibration(Whole(True), prior, data, draws=2)
    assert miss(found) < limit(101)
    with pytest.raises(InferenceError, match=r"'x'.*MultivariateNormal.*predictive_check"):
        cal.evaluation.pixel_calibration(Whole(False), prior, data)
    assert cal.evaluation.predictive_check(Whole(False), prior, {"x": data["x"][:8]}, draws=20) is not None


def test_masked_pixels_count_nowhere():
    def program(size, seen):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], torch.ones(3)).mask(seen).to_event(1))

    def guide(observed, size, seen):
        prior(observed, size)

    x, seen = torch.zeros(6, 3), torch.ones(6, 3, dtype=torch.bool)
    seen[:, 2] = False
    x[:, 2] = 1000.0
    found = cal.evaluation.pixel_calibration(program, guide, {"x": x}, covariates={"seen": seen}, draws=50)
    assert (found["coverage"] == 1.0).all()
    assert float(found["coverage_null"].min()) < 1.0


def test_entries_without_a_distribution_function_are_refused_by_name():
    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()))

    with pytest.raises(InferenceError, match=r"'x': Poisson has no distribution function.*predictive_check"):
        cal.evaluation.pixel_calibration(program, prior, {"x": torch.ones(8)})


def test_levels_outside_the_unit_interval_are_refused():
    with pytest.raises(InferenceError, match="between 0 and 1"):
        calibration(levels=(0.5, 95))


def test_the_picture_shows_both(found):
    figure = cal.evaluation.coverage_figure(found)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["simulated data", "data"]
