"""The split of log p(x) − ELBO, where both parts are known in closed form."""

import math
from statistics import NormalDist

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation.gap import gap

DATA = 60


def limit(count: int) -> float:
    return NormalDist().inv_cdf(1 - 1e-5 / (2 * count))


@pytest.fixture(scope="module")
def model():
    """A ppca whose posterior is far from a product: columns at an angle, little noise."""
    built = cal.models.create("ppca", shape=(4,), latents=2)
    with torch.no_grad():
        built.decoder.directions.copy_(torch.tensor([[1.0, 0.8], [0.9, 1.0], [0.2, 0.4], [0.0, 0.3]]))
        built.likelihood.log_scale.fill_(math.log(0.4))
    return built.requires_grad_(False).eval()


class Known(PyroModule):
    """The best product of Normals for each datum, shifted by `shift` and stretched by `stretch` posterior sds."""

    precision: Tensor
    gain: Tensor
    bias: Tensor

    def __init__(self, model, shift=0.0, stretch=1.0):
        super().__init__()
        directions, variance = model.decoder.directions.double(), 0.4**2
        precision = torch.eye(2).double() + directions.T @ directions / variance
        self.register_buffer("precision", precision.float())
        self.register_buffer("gain", torch.linalg.solve(precision, directions.T / variance).float())
        self.register_buffer("bias", model.decoder.bias.detach().clone())
        self.shift, self.stretch = shift, stretch

    def forward(self, observed, size):
        sd = self.precision.diagonal().rsqrt()
        loc = (observed["x"] - self.bias) @ self.gain.T + self.shift * sd
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(loc, self.stretch * sd).to_event(1))

    def divergence(self, shift: float, stretch: float) -> float:
        """KL(q‖p) of Normals with one mean apart from a shift; q is a product."""
        precision = self.precision.double()
        variance = stretch**2 / precision.diagonal()
        offset = shift * precision.diagonal().rsqrt()
        inner = (precision.diagonal() * variance).sum() + offset @ precision @ offset
        return float(0.5 * (inner - 2 - precision.logdet() - variance.log().sum()))


@pytest.fixture(scope="module")
def observed(model):
    return {"x": cal.program.sample_prior(model, DATA, seed=1)["x"]}


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.7, 1.4), (-1.5, 0.6)])
def test_both_gaps_are_those_of_the_closed_form(model, observed, shift, stretch):
    """Sixty data and their means, within Monte Carlo errors; refining may leave up to 0.005 nats."""
    guide = Known(model, shift, stretch)
    result = gap(model, guide, observed, draws=2000)
    best, worse = guide.divergence(0.0, 1.0), guide.divergence(shift, stretch) - guide.divergence(0.0, 1.0)
    assert best > 0.3
    wanted = {"approximation_gap": best, "amortization_gap": worse, "gap": best + worse}
    for name, value in wanted.items():
        errors, se = result[name].values - value, result[f"{name}_se"].values
        assert (np.abs(errors) < limit(3 * DATA) * se + 0.02).all(), name
        mean_se = math.sqrt((se**2).sum()) / DATA
        assert abs(errors.mean()) < limit(3) * mean_se + 0.005, (name, errors.mean(), mean_se)
    np.testing.assert_allclose(result["gap"], result["approximation_gap"] + result["amortization_gap"], atol=1e-9)
    assert result.attrs["evidence"] == "exact"
    assert (result["log_evidence_se"] == 0).all()
    exact = cal.inference.log_evidence(model, observed)
    np.testing.assert_allclose(result["log_evidence"], exact, atol=1e-9)


def test_without_refining_all_is_approximation(model, observed):
    """Planted: a guide that is never refined. The same noise on both sides makes the amortization gap zero."""
    guide = Known(model, 0.7, 1.4)
    result = gap(model, guide, observed, steps=0, draws=500)
    assert np.abs(result["amortization_gap"]).max() < 1e-6
    worse = guide.divergence(0.7, 1.4) - guide.divergence(0.0, 1.0)
    se = math.sqrt(float((result["approximation_gap_se"] ** 2).sum())) / DATA
    assert float(result["approximation_gap"].mean()) - guide.divergence(0.0, 1.0) > 0.8 * worse > limit(1) * se + 0.005


def counts(size):
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Poisson(rate[:, None].expand(-1, 5)).to_event(1))


def fixed(observed, size):
    with pyro.plate("data", size):
        pyro.sample("rate", dist.LogNormal(torch.zeros(size), 0.6))


def test_evidence_by_importance_sampling():
    """Gamma–Poisson under LogNormals: the evidence is known, and its error is that of the refined guide's draws.

    The log weights of the best LogNormal are a cubic with a local maximum one sd above the mean, which 2.3 % of the
    draws exceed, all of them far below the mean. k-hat is that of this tail alone once PSIS fits it to fewer than
    2.3 % of the draws, from 17,000 draws on; to more, it takes the heap of weights under the maximum for a heavy tail.
    """
    x = cal.program.sample_prior(counts, 40, seed=1)["x"]
    result = gap(counts, fixed, {"x": x}, draws=20_000)
    total = x.double().sum(1)
    shape = 3 + total
    exact = 3 * math.log(2.0) - math.lgamma(3.0) + torch.lgamma(shape) - shape * math.log(7.0)
    exact = (exact - torch.lgamma(x.double() + 1).sum(1)).numpy()
    assert result.attrs["evidence"] == "importance"
    assert (result["pareto_k"] < result.attrs["good_k"]).all()
    assert (np.abs(result["log_evidence"] - exact) < limit(40) * result["log_evidence_se"] + 1e-3).all()
    approximation = exact - result["elbo_refined"]
    assert (np.abs(result["approximation_gap"] - approximation) < limit(40) * result["log_evidence_se"] + 1e-3).all()
    assert float(result["approximation_gap"].mean()) < 0.05 < float(result["amortization_gap"].mean())
    # What is common to evidence and ELBO cancels: the difference is known better than either.
    assert (result["approximation_gap_se"] < result["elbo_refined_se"]).all()


def test_shared_latents_are_refused():
    def model(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(centre, 1.0))

    with pytest.raises(InferenceError, match=r"\['centre'\] are shared"):
        gap(model, lambda observed, size: None, {"x": torch.zeros(3)})


def test_written_and_read_back(model, observed, tmp_path):
    result = gap(model, Known(model), {"x": observed["x"][:3]}, steps=2, draws=100)
    cal.store.save_dataset(result, tmp_path / "gap.nc")
    assert cal.store.load_dataset(tmp_path / "gap.nc").identical(result)
