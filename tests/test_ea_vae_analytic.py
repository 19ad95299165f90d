"""The limits of docs/papers/ea-vae-analytic.md: beside quadrature, at their stated rates, and as the page says them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import gammaln

import calibrant as cal
from calibrant.binding import bind
from calibrant.data.registry import data_root
from calibrant.inference.references.exact import ExactPosterior, solve
from calibrant.inference.references.sampling import structure_of
from calibrant.models.gsm import GSM
from calibrant.reproductions.scale_limits import GammaPrior, LogNormalPrior, blank_limit, bright_limit

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/papers/ea-vae-analytic.md"
STORED = ROOT / "benchmarks/results/reproduce-ea-vae-analytic-quick.json"
PRIORS = {
    "gamma": (GammaPrior(2.0, 1.4), {"name": "gamma", "concentration": 2.0, "rate": 1.4}),
    "lognormal": (LogNormalPrior(0.3, 0.8), {"name": "lognormal", "loc": 0.3, "scale": 0.8}),
}


def posterior(program: Any, images: torch.Tensor) -> ExactPosterior:
    data = bind(program, {"x": images})
    structure = structure_of(program, data)
    assert structure is not None
    return solve(structure, data.tensors()[0]["x"])


class Quadrature:
    """The posterior of log s on a grid, written down anew: gains `(n,)`, image `u` `(n,)` in units of the noise."""

    def __init__(self, prior: Any, gains: np.ndarray, u: np.ndarray) -> None:
        self.log_scale = np.linspace(-18, 14, 100_001)
        self.s = s = np.exp(self.log_scale)
        if isinstance(prior, GammaPrior):
            density = prior.shape * self.log_scale - prior.rate * s
        else:
            density = -((self.log_scale - prior.loc) ** 2) / (2 * prior.width**2)
        for gain, count, square in _groups(gains, u):
            t = 1 + (s * gain) ** 2
            density = density - count / 2 * np.log(t) - square / (2 * t)
        weights = np.exp(density - density.max())
        self.weights = weights / weights.sum()

    def mean(self, values: np.ndarray) -> float:
        return float(self.weights @ values)

    @property
    def cv(self) -> float:
        centre = self.mean(self.s)
        return math.sqrt(self.mean((self.s - centre) ** 2)) / centre


def _groups(gains: np.ndarray, u: np.ndarray) -> list[tuple[float, int, float]]:
    """Equal gains together: gain, how many there are, and the sum of their u²."""
    return [(g, int((gains == g).sum()), float((u[gains == g] ** 2).sum())) for g in np.unique(gains)]


# -- the identity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("latents", [5, 20], ids=["few latents", "more latents than pixels"])
def test_the_squared_norm_of_the_latents_follows_from_the_scale(prior, latents):
    """E[|z|² | x] = k − E[λ(s) | x], for the package's posterior of images of every contrast, blank ones too."""
    torch.manual_seed(0)
    shown, given = PRIORS[prior]
    model = GSM((12,), scale_prior=given, dictionary=torch.randn(12, latents), noise=0.3, learn_noise=False)
    x = torch.randn(12) * torch.tensor([0.0, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e4])[:, None]
    found = posterior(model, x)
    squares = (found.mean["y"] ** 2 + found.sd["y"] ** 2).sum(1)
    left, values, _ = torch.linalg.svd(model.dictionary.double() / 0.3, full_matrices=False)
    for image, square in zip(x.double(), squares, strict=True):
        q = Quadrature(shown, values.numpy(), (left.T @ image).numpy() / 0.3)
        assert math.isclose(float(square), latents - q.mean(_slope(shown, q)), rel_tol=1e-6)
    if prior == "gamma":  # by the package alone
        assert torch.allclose(squares, latents - 2.0 + 1.4 * found.mean["scale"], rtol=1e-7)


def _slope(prior: Any, q: Quadrature) -> np.ndarray:
    if isinstance(prior, GammaPrior):
        return prior.shape - prior.rate * q.s
    return (prior.loc - q.log_scale) / prior.width**2


@pytest.mark.parametrize("latent", ["normal", "laplace"])
def test_the_identity_holds_for_any_decoder_of_the_scaled_latents(latent):
    """One latent and a decoder that is not linear, on a grid of both; planted: a decoder that sees the scale alone."""
    log_scale, z = np.meshgrid(np.linspace(-12, 5, 1001), np.linspace(-30, 30, 3001), indexing="ij")
    scale, x, b = np.exp(log_scale), np.array([0.7, -0.4]), 0.5**0.5
    prior = -(z**2) / 2 if latent == "normal" else -abs(z) / b

    def left(code: np.ndarray) -> float:
        density = 2 * log_scale - 1.4 * scale + prior
        for value, weight in zip(x, (1.0, -2.0), strict=True):
            density = density - (value - np.tanh(weight * code + 0.2)) ** 2 / (2 * 0.3**2)
        weights = np.exp(density - density.max())
        size = z**2 if latent == "normal" else abs(z) / b
        return float((weights * (size - 1 + 2 - 1.4 * scale)).sum() / weights.sum())

    assert abs(left(scale * z)) < 1e-3
    assert abs(left(scale + z)) > 0.05


# -- without contrast --------------------------------------------------------------------------------------------------


def test_a_blank_image_loses_as_much_variance_as_the_prior_rises():
    for prior in (GammaPrior(3.0, 0.7), LogNormalPrior(-0.5, 1.3)):
        gains = np.random.default_rng(0).uniform(0.1, 8.0, 40)
        q = Quadrature(prior, gains, np.zeros(40))
        lost = sum(q.mean(1 - 1 / (1 + (q.s * gain) ** 2)) for gain in gains)
        assert math.isclose(lost, q.mean(_slope(prior, q)), rel_tol=1e-8)


@pytest.mark.parametrize("shape", [1.0, 2.0, 3.5])
def test_the_floor_of_the_scale_under_a_gamma_prior_has_its_first_correction(shape):
    """The error of the mean falls as 1/R² in the number of directions; without the correction, as 1/R (planted)."""
    prior, counts = GammaPrior(shape, 1e-6), np.array([25, 50, 100, 200])
    off, plain = [], []
    for count in counts:
        gains = np.full(count, 3.0)
        q = Quadrature(prior, gains, np.zeros(count))
        mean = math.sqrt(2 / (9 * count)) * math.exp(gammaln((shape + 1) / 2) - gammaln(shape / 2))
        off.append(abs(blank_limit(prior, gains).mean / q.mean(q.s) - 1))
        plain.append(abs(mean / q.mean(q.s) - 1))
    rates = -np.diff(np.log2([off, plain]))
    assert np.allclose(rates[0], 2.0, atol=0.35)
    assert np.allclose(rates[1], 1.0, atol=0.2)
    assert math.isclose(blank_limit(GammaPrior(2.0, 1.0), np.ones(9)).cv, math.sqrt(4 / math.pi - 1))


def test_the_rate_of_a_gamma_prior_lowers_the_floor_by_the_variance():
    gains = np.full(10_000, 5.0)
    for rate in (1.0, 10.0):
        prior = GammaPrior(2.0, rate)
        q = Quadrature(prior, gains, np.zeros(10_000))
        with_rate, without = blank_limit(prior, gains).mean, blank_limit(GammaPrior(2.0, 0.0), gains).mean
        assert math.isclose(with_rate - without, q.mean(q.s) - without, rel_tol=0.05)


def test_the_floor_under_a_lognormal_prior_is_that_of_lamberts_function():
    prior, errors = LogNormalPrior(0.0, 1.0), []
    for gain in (1e1, 1e3, 1e6):
        gains = np.full(4000, gain)
        q, limit = Quadrature(LogNormalPrior(0.0, 1.0), gains, np.zeros(4000)), blank_limit(prior, gains)
        lost = q.mean(-q.log_scale)
        errors.append([abs(limit.mean / q.mean(q.s) - 1), abs(limit.lost / lost - 1), abs(limit.cv / q.cv - 1)])
    assert np.all(np.array(errors) < [0.003, 0.015, 0.01])
    assert np.all(np.diff(errors, axis=0)[:, :2] < 0)  # they fall with the logarithm of the gain


# -- at high contrast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_the_width_of_the_scale_at_high_contrast_is_right_to_the_order_of_one_over_n(prior):
    shown, errors = PRIORS[prior][0], []
    for count in (50, 100, 200, 400):
        gains, u = np.full(count, 100.0), np.full(count, 1000.0)
        q, limit = Quadrature(shown, gains, u), bright_limit(shown, gains, 100.0 * count)
        errors.append([abs(limit.cv / q.cv - 1), abs(limit.mean / q.mean(q.s) - 1)])
    assert np.allclose(-np.diff(np.log2(np.array(errors).T))[:, -1], 1.0, atol=0.25)
    assert max(errors[-1]) < 0.006


def test_the_cv_is_one_over_the_root_of_two_n_only_where_the_prior_is_flat():
    gains = np.full(100, 50.0)

    def cv(prior: Any, scale: float) -> float:
        q = Quadrature(prior, gains, scale * gains)
        assert math.isclose(bright_limit(prior, gains, scale**2 * 100).cv, q.cv, rel_tol=0.02)
        return q.cv * math.sqrt(200)

    assert math.isclose(cv(GammaPrior(2.0, 1e-6), 10.0), 1.0, rel_tol=0.03)
    assert cv(GammaPrior(2.0, 1.4), 1000.0) < 0.5
    limit = bright_limit(GammaPrior(2.0, 1.4), gains, 1e8**2 * 100)
    assert math.isclose(limit.cv * math.sqrt(3 * 1.4 * limit.mean), 1.0, rel_tol=1e-3)
    assert math.isclose(limit.mean, (1e8**2 * 100 / 1.4) ** (1 / 3), rel_tol=1e-3)
    assert math.isclose(limit.between, 1 / 3, rel_tol=1e-3)
    assert math.isclose(bright_limit(LogNormalPrior(0.0, 1.0), gains, 1e8**2 * 100).between, 0.5, rel_tol=1e-2)


def test_what_is_left_along_the_mean_is_about_half_a_prior_variance():
    for prior, _ in PRIORS.values():
        gains, u = np.full(300, 20.0), np.full(300, 200.0)
        q = Quadrature(prior, gains, u)
        means = q.s * 20.0 / (1 + (q.s * 20.0) ** 2)
        between = float((u**2).sum()) * (q.mean(means**2) - q.mean(means) ** 2)
        assert math.isclose(between, bright_limit(prior, gains, float((u**2 / 400).sum())).between, rel_tol=0.02)
        assert 0.45 < between < 0.51


# -- explained power ---------------------------------------------------------------------------------------------------


def test_only_explained_power_counts_where_gains_are_equal():
    torch.manual_seed(0)
    columns = torch.linalg.qr(torch.randn(30, 8, dtype=torch.float64)).Q
    model = GSM((30,), scale_prior="gamma", dictionary=3.0 * columns, noise=0.5, learn_noise=False)
    images = torch.randn(6, 30, dtype=torch.float64)
    power = ((images @ columns) ** 2).sum(1, keepdim=True)
    found = posterior(model, (images * (4.0 / power).sqrt()).float())
    total = torch.stack([found.covariance(datum).trace() for datum in range(6)])
    for value in (found.mean["scale"], found.sd["scale"], total):
        assert torch.allclose(value, value[:1], rtol=1e-6)
    plain = posterior(model, images.float())
    assert plain.mean["scale"].std() > 0.05  # the images themselves differ


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prior", PRIORS)
def test_what_no_latent_explains_is_as_good_as_blank_at_every_contrast(prior, seed):
    """A shift that is left by rounding explained it, times a scale of 1e17, under a LogNormal prior."""
    torch.manual_seed(seed)
    dictionary = torch.randn(12, 5)
    model = GSM((12,), scale_prior=PRIORS[prior][1], dictionary=dictionary, noise=0.3, learn_noise=False)
    span = torch.linalg.qr(dictionary.double()).Q
    images = torch.randn(1, 12, dtype=torch.float64) * torch.tensor([0.0, 1.0, 100.0, 1e4])[:, None]
    found = posterior(model, images - images @ span @ span.T)
    assert found.structure.shift is not None
    assert not found.structure.shift.any()
    for value in (found.mean["scale"], found.sd["scale"]):
        assert torch.allclose(value, value[0], rtol=1e-4)


def test_every_direction_that_an_image_gains_makes_all_coordinates_more_certain():
    rng = np.random.default_rng(0)
    gains, u = rng.uniform(0.2, 5.0, 6), rng.normal(0, 2, 6)
    for prior, _ in PRIORS.values():
        for direction in range(6):
            before = None
            for more in (0.0, 0.5, 2.0, 10.0, 50.0):
                q = Quadrature(prior, gains, np.where(np.arange(6) == direction, np.hypot(u, more), u))
                variances = np.array([q.mean(1 / (1 + (q.s * gain) ** 2)) for gain in gains])
                assert before is None or np.all(variances < before)
                before = variances


# -- without a scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppca", "vae"])
def test_without_a_scale_the_covariance_does_not_depend_on_the_image(name):
    torch.manual_seed(0)
    given = {"decoder": "linear"} if name == "vae" else {}
    model = cal.models.create(name, shape=(1, 5, 5), latents=4, **given)
    images = torch.randn(1, 1, 5, 5) * torch.tensor([1e-3, 1e-1, 1.0, 10.0, 1e3])[:, None, None, None]
    found = posterior(model, images)
    covariances = torch.stack([found.covariance(datum) for datum in range(5)])
    assert (covariances - covariances[0]).abs().max() < 1e-10
    scaled = cal.models.create("ea-vae", shape=(1, 5, 5), latents=4)  # planted: with a scale they differ
    assert posterior(scaled, images).sd["z"].std(0).min() > 1e-2


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_page_are_computed_again(tmp_path):
    stored = cal.reproductions.load_results(STORED)
    found = cal.reproductions.run("ea-vae", domain="analytic", quick=True, out=tmp_path / "run")
    assert found.experiments == stored.experiments
    for name in stored.experiments:
        before, now = stored.table(name), found.table(name)
        assert [(row["row"], row["number"]) for row in now] == [(row["row"], row["number"]) for row in before]
        for one, other in zip(before, now, strict=True):
            assert math.isclose(one["ours"], other["ours"], rel_tol=1e-5, abs_tol=1e-9), one
    assert [claim["exact"]["answer"] for claim in found.claims] == [claim["exact"]["answer"] for claim in stored.claims]


def test_the_numbers_of_orban_are_those_of_the_page():
    file = data_root(None) / "orban-gsm" / "model_parameters.mat"
    if not file.is_file():
        pytest.skip("the parameters of Orbán et al. 2016 are not below the data root")
    from scipy.io import loadmat

    parts = {name: torch.tensor(value.astype(float)) for name, value in loadmat(file).items() if name[0] != "_"}
    noise, covariance = float(parts["sigmaX"]), (parts["rho"] + parts["rho"].T) / 2
    prior = {"name": "gamma", "concentration": 2.0, "rate": 0.5}
    model = GSM((256,), scale_prior=prior, dictionary=parts["A"], covariance=covariance, noise=noise, learn_noise=False)
    assert model.covariance_root is not None
    root = model.covariance_root.double()
    left, gains, _ = torch.linalg.svd(model.dictionary.double() @ root / noise, full_matrices=False)
    image = noise * left @ gains
    found = posterior(model, torch.stack([0 * image, 100 * image, 1000 * image]))
    shown = GammaPrior(2.0, 0.5)
    blank, *bright = (
        blank_limit(shown, gains.numpy()),
        *(bright_limit(shown, gains.numpy(), 248.0 * scale**2) for scale in (100, 1000)),
    )
    mean, cv = found.mean["scale"], found.sd["scale"] / found.mean["scale"]
    inner = torch.linalg.solve_triangular(root, found.covariance(0), upper=False)
    lost = 248 - torch.linalg.solve_triangular(root, inner.T, upper=False).trace()
    ratio = (found.sd["y"][0] / covariance.diagonal().sqrt()).mean()
    wanted = [
        (mean[0], blank.mean), (cv[0], blank.cv), (lost, blank.lost), (ratio, None),
        (mean[1], bright[0].mean), (mean[2], bright[1].mean), (cv[2], bright[1].cv),
    ]  # fmt: skip
    told = re.findall(r"^\|[^\n]*\| ([\d.]+) \| ([\d.]*) *\|$", PAGE.read_text().split("Orbán")[1], re.MULTILINE)
    assert len(told) == len(wanted)
    for (quadrature, limit), (value, other) in zip(told, wanted, strict=True):
        assert math.isclose(float(quadrature), float(value), rel_tol=2e-3)
        assert other is None or math.isclose(float(limit), float(other), rel_tol=2e-3)
