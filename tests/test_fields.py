"""Receptive and projective fields, posterior means and the aggregate posterior of models whose posteriors are known."""

import math

import numpy as np
import pytest
import torch
from agreement import limit
from contrast_models import LATENTS, SHAPE, ExactGuide, PlainGuide, flat, images, model

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation import (
    aggregate_posterior,
    posterior_means,
    projective_fields,
    receptive_fields,
    white_noise_fields,
)
from calibrant.inference.references.exact import solve
from calibrant.inference.references.sampling import exact_structure

COUNT = 300


def simulated(name="vae", count=COUNT):
    return {"x": cal.program.sample_prior(model(name), count, seed=3)["x"]}


def matrices():
    """The linear model's posterior mean is M (x − b), and its images have the covariance C."""
    target = model("vae")
    loading = target.decoder.weight.detach().double()
    variance = float(target.likelihood.scale.detach()) ** 2
    covariance = loading @ loading.T + variance * torch.eye(len(loading))
    return (loading.T @ covariance.inverse()).numpy(), covariance.numpy()


@pytest.fixture(scope="module")
def linear():
    return receptive_fields(model("vae"), ExactGuide(model("vae")), simulated(), draws=100)


def test_fields_of_a_linear_model_are_known(linear):
    """F = C Mᵀ over all images; over these ones, exactly their own covariance times Mᵀ."""
    to_mean, covariance = matrices()
    own = to_mean @ np.cov(simulated()["x"].flatten(1).double().numpy().T)
    field, error = (linear[name].values.reshape(2, LATENTS, -1) for name in ("field", "field_se"))
    assert field[0] == pytest.approx(own, abs=1e-4)
    z = (field - to_mean @ covariance) / error
    assert np.abs(z).max() < limit(z.size)
    assert abs((z**2).mean() - 1) < 0.5  # entries depend on one another
    draws = (field[1] - own) / np.abs(own).max()
    assert np.abs(draws).max() < 0.05
    assert np.abs((field[:, ::-1] - to_mean @ covariance) / error).max() > limit(z.size)  # latents in a wrong order


def test_fields_of_a_guide_that_ignores_images_are_zero():
    found = receptive_fields(model("vae"), PlainGuide(flat(0.5), scale=False), simulated(count=100), draws=50)
    z = (found["field"] / found["field_se"]).sel(source="amortized").values
    assert np.abs(z).max() < limit(z.size)
    assert np.abs(found["field"]).sel(source="exact").max() > 0.3
    assert found["images"].values.tolist() == [100, 100]


def test_white_noise_gives_the_matrix_of_a_linear_model():
    found = white_noise_fields(model("vae"), ExactGuide(model("vae")), images(40), draws=200)
    to_mean, _ = matrices()
    field, error = (found[name].values.reshape(2, LATENTS, -1) for name in ("field", "field_se"))
    assert field[0] == pytest.approx(to_mean, abs=1e-5)
    z = (field[1] - to_mean) / error[1]
    assert np.abs(z).max() < limit(z.size)
    assert abs((z**2).mean() - 1) < limit(1) * math.sqrt(2 / z.size)


def test_white_noise_needs_real_pixels_and_enough_images():
    target = model("vae")
    with pytest.raises(InferenceError, match="two images of noise a pixel"):
        white_noise_fields(target, ExactGuide(target), images(4), images=20)
    binary = cal.models.create("vae", shape=SHAPE, latents=LATENTS, likelihood="bernoulli").eval()
    on = {"x": (images(4)["x"] > 0).float()}
    with pytest.raises(InferenceError, match="use receptive_fields"):
        white_noise_fields(binary, PlainGuide(flat(1.0), scale=False), on)
    assert receptive_fields(binary, PlainGuide(flat(1.0), scale=False), on, reference=False)["field"].shape[0] == 1


def test_projective_fields_are_the_columns_of_a_linear_decoder():
    loading = model("vae").decoder.weight.detach().T.reshape(LATENTS, *SHAPE).double().numpy()
    assert projective_fields(model("vae"), images(4), step=2.0)["field"].values == pytest.approx(2 * loading, abs=1e-5)
    target = model("ea-vae")
    loading = target.decoder.weight.detach().T.reshape(LATENTS, *SHAPE).double().numpy()
    found = projective_fields(target, images(4), at={"scale": 3.0})
    assert found["field"].values == pytest.approx(3 * loading, abs=1e-4)
    mean = float(target.prior_of_scale().mean)
    assert projective_fields(target, images(4))["field"].values == pytest.approx(mean * loading, abs=1e-4)
    with pytest.raises(InferenceError, match="the latents are"):
        projective_fields(target, images(4), at={"y": 1.0})


def test_projective_fields_of_binary_images_are_changes_of_probabilities():
    target = cal.models.create("vae", shape=SHAPE, latents=LATENTS, likelihood="bernoulli", decoder="linear").eval()
    weight, bias = (part.detach().double() for part in (target.decoder.weight, target.decoder.bias))
    wanted = (torch.sigmoid(weight.T + bias) - torch.sigmoid(bias)).reshape(LATENTS, *SHAPE)
    on = {"x": (images(4)["x"] > 0).float()}
    assert projective_fields(target, on)["field"].values == pytest.approx(wanted.numpy(), abs=1e-6)


@pytest.mark.parametrize("name", ["vae", "ea-vae"])
def test_posterior_means_and_their_errors(name):
    target, x = model(name), images(60)
    found = posterior_means(target, ExactGuide(target), x, draws=100)
    solution = solve(exact_structure(target, x), x["x"].double())
    exact, guide = (found.sel(source=source) for source in ("exact", "amortized"))
    assert exact["mean"].values == pytest.approx(solution.mean["z"].numpy(), abs=1e-8)
    assert exact["variance"].values == pytest.approx(solution.sd["z"].numpy() ** 2, abs=1e-8)
    squares = ((guide["mean"] - exact["mean"]) ** 2 / guide["mean_error"]).values
    assert abs(squares.mean() - 1) < limit(1) * squares.mean(1).std() / math.sqrt(len(squares))
    assert found["prior_sd"].values == pytest.approx(np.ones(LATENTS))


def test_without_a_closed_form_means_are_those_of_draws():
    target, x = model("vae"), images(12)
    found = posterior_means(target, ExactGuide(target), x, method="importance", draws=500)
    solution, exact = solve(exact_structure(target, x), x["x"].double()), found.sel(source="exact")
    assert (exact["mean_error"] > 0).all()
    z = (exact["mean"] - solution.mean["z"].numpy()) / np.sqrt(exact["mean_error"])
    assert np.abs(z).max() < limit(z.size)


# -- the aggregate posterior -------------------------------------------------------------------------------------------


def test_the_aggregate_posterior_of_a_models_own_data_is_its_prior():
    found = aggregate_posterior(model("vae"), ExactGuide(model("vae")), simulated(count=1500), draws=30)
    z = ((found["variance"] - 1) / found["variance_se"]).values
    assert np.abs(z).max() < limit(z.size)
    assert np.abs((found["average_variance"] - 1) / found["average_variance_se"]).max() < limit(2)
    assert found["variance"].values == pytest.approx((found["within"] + found["between"]).values)
    to_mean, covariance = matrices()
    between = np.diag(to_mean @ covariance @ to_mean.T)
    assert np.abs((found["between"] - between) / found["between_se"]).max() < limit(2 * LATENTS)
    assert found["within"].sel(source="exact").values == pytest.approx(1 - between, abs=1e-6)


DEFECTS = {
    "a guide that is too wide": (lambda target: ExactGuide(target, widen=2.0), simulated),
    "a guide that returns the prior's half": (lambda target: PlainGuide(flat(0.5), scale=False), simulated),
    "data of another contrast": (ExactGuide, lambda count: {"x": 1.4 * simulated(count=count)["x"]}),
}


@pytest.mark.parametrize(("guide", "data"), DEFECTS.values(), ids=DEFECTS)
def test_a_planted_defect_leaves_the_prior(guide, data):
    target = model("vae")
    found = aggregate_posterior(target, guide(target), data(count=600), draws=30).sel(source="amortized")
    assert abs(found["average_variance"] - 1) > limit(2) * found["average_variance_se"]


def test_monte_carlo_error_is_no_part_of_the_aggregate_posterior():
    """With three draws an image, the plain variance of the means would have a third of the posterior variance."""
    guide = PlainGuide(flat(0.8), scale=False)
    found = aggregate_posterior(model("vae"), guide, simulated(count=1500), draws=3, reference=False)
    z = found["average_between"] / found["average_between_se"]
    assert abs(float(z[0])) < limit(1)
    assert 2 * limit(1) * float(found["average_between_se"][0]) < 0.64 / 3
    assert float(found["average_within"][0]) == pytest.approx(0.64, rel=0.03)
