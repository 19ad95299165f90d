"""Uncertainty between images: fits with known coefficients, models with known posteriors, guides that are blind."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from contrast_models import LATENTS, SHAPE, ExactGuide, PlainGuide, flat, images, model
from pyro.nn import PyroModule
from scipy.special import entr
from scipy.stats import norm

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation import average_image_experiment, class_mean_images, interpolation_experiment
from calibrant.evaluation.uncertainty.quadratic_fits import THRESHOLDS, quadratics
from calibrant.inference.references.exact import solve
from calibrant.inference.references.sampling import exact_structure

PAIRS = 12

# -- fits --------------------------------------------------------------------------------------------------------------


def curves(count, noise, offset=0.0, repeats=1, seed=0):
    """Noisy copies of 1 + .8 λ − λ², whose middle is .25 above its chord and whose vertex is at .4."""
    steps, generator = np.linspace(0, 1, 11), np.random.default_rng(seed)
    truth = 1 + 0.8 * steps - steps**2
    bend = offset * generator.normal(size=(repeats, count, 1)) * 4 * steps * (1 - steps)
    found = truth + noise * generator.normal(size=(repeats, count, len(steps))) + bend
    return steps, found, np.full_like(found, noise**2)


def test_a_quadratic_is_found_exactly():
    fits = quadratics(*curves(1, 0.0))
    assert fits.bulge == pytest.approx(0.25)
    assert fits.vertex == pytest.approx(0.4)
    assert fits.concave.all()
    assert fits.shares() == pytest.approx([float(t >= 0.1) for t in THRESHOLDS])


@pytest.mark.parametrize("missing", [False, True])
def test_errors_of_fits_are_those_of_the_points(missing):
    steps, found, variance = curves(2000, 0.03)
    if missing:
        found[..., [1, 2, 5, 8, 9, 10]] = np.nan
    fits = quadratics(steps, found, variance)
    for value, error, truth in ((fits.bulge, fits.bulge_se, 0.25), (fits.vertex, fits.vertex_se, 0.4)):
        squares = ((value - truth) / error) ** 2
        assert abs(squares.mean() - 1) < limit(4) * squares.std() / math.sqrt(len(squares))
    halved = ((quadratics(steps, found, variance / 4).bulge - 0.25) / fits.bulge_se * 2) ** 2
    assert abs(halved.mean() - 1) > limit(4) * halved.std() / math.sqrt(len(halved))


def test_repeats_that_bend_whole_curves_widen_the_error():
    fits = quadratics(*curves(400, 0.01, offset=0.1, repeats=4))
    squares = ((fits.bulge - 0.25) / fits.bulge_se) ** 2
    assert abs(squares.mean() - 1) < limit(1) * math.sqrt(2 / 400)
    alone = quadratics(*(part[:1] if part.ndim == 3 else part for part in curves(400, 0.01, offset=0.1, repeats=4)))
    assert (((alone.bulge - 0.25) / alone.bulge_se) ** 2).mean() > 10  # which cannot be known from one repeat


def test_straight_curves_are_called_concave_as_often_as_stated():
    steps, found, variance = curves(4000, 0.05)
    straight = found - 0.8 * steps + steps**2
    share = quadratics(steps, straight, variance).concave.mean()
    assert abs(share - 0.025) < limit(1) * math.sqrt(0.025 * 0.975 / 4000)


def test_curves_with_too_few_points_count_at_either_extreme():
    steps, found, variance = curves(4, 0.001)
    found[0, 0, 3:] = np.nan
    fits = quadratics(steps, found, variance)
    assert fits.known.tolist() == [False, True, True, True]
    assert not fits.concave[0]
    assert fits.shares()[-1] == 1.0
    low, high = fits.bounds()
    assert (low[-1], high[-1]) == (0.75, 1.0)
    assert (low[0], high[0]) == (0.0, 0.25)


# -- models whose posteriors are known ---------------------------------------------------------------------------------


def opposites():
    """Images and nearly their negatives, so that blends have little contrast."""
    x = images(2 * PAIRS)["x"]
    return {"x": x[:PAIRS]}, {"x": 0.3 * x[PAIRS:] - x[:PAIRS]}


def interpolated(name, guide=None, **options):
    target = model(name)
    settings = {"steps": 11, "reference_pairs": PAIRS, "reference_steps": 11, "draws": 400, "chains": 1, **options}
    return interpolation_experiment(target, guide or ExactGuide(target), *opposites(), **settings)


def truth(name):
    """The exact posterior sd of every blend, `(pair, step)`; the prior's is 1."""
    target, (starts, ends) = model(name), opposites()
    steps = torch.linspace(0, 1, 11, dtype=torch.float64).reshape(1, -1, 1, 1, 1)
    x = (1 - steps) * starts["x"][:, None].double() + steps * ends["x"][:, None].double()
    solution = solve(exact_structure(target, starts), x.flatten(0, 1))
    return solution.sd["z"].mean(1).reshape(PAIRS, 11).numpy()


@pytest.fixture(scope="module")
def ea_vae():
    return interpolated("ea-vae")


def test_both_sources_follow_the_exact_curve(ea_vae):
    wanted = truth("ea-vae")
    z = ((ea_vae["posterior_sd"] - wanted) / ea_vae["posterior_sd_se"]).values
    assert np.abs(z).max() < limit(z.size)
    assert abs((z**2).mean() - 1) < 2 * limit(1) * math.sqrt(2 / z.size)  # the errors are not too large either
    reversed_blends = (ea_vae["posterior_sd"] - wanted[:, ::-1]) / ea_vae["posterior_sd_se"]
    assert np.abs(reversed_blends).max() > limit(z.size)


def test_fits_are_those_of_the_exact_curve(ea_vae):
    fits = quadratics(ea_vae["step"].values, truth("ea-vae")[None], np.zeros((1, PAIRS, 11)))
    assert fits.concave.mean() > 0.5
    z = ((ea_vae["bulge"] - fits.bulge) / ea_vae["bulge_se"]).values
    assert np.abs(z).max() < limit(z.size)
    sure = np.abs(fits.bulge) > 5 * ea_vae["bulge_se"].values.max()
    assert (ea_vae["concave"].values[:, sure] == (fits.bulge > 0)[sure]).all()
    assert (ea_vae["mean_bulge"] > 5 * ea_vae["mean_bulge_se"]).all()
    ends = truth("ea-vae")[:, [0, -1]].mean()
    assert ea_vae["middle_over_ends"].values == pytest.approx(truth("ea-vae")[:, 5].mean() / ends, rel=0.03)
    assert ea_vae.attrs["decided"] == 1
    assert ea_vae.attrs["share_reference"] == 1.0


BLIND = {
    "a guide that is blind to contrast": ("ea-vae", PlainGuide(flat(0.5), scale=True)),
    "a guide with a fixed scale": ("ea-vae", None),
    "a model without a scale": ("vae", None),
}


class FixedScale(PyroModule):
    """A planted defect: the exact posterior of z given that the scale is its prior's median."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, observed, size):
        loading, noise, scale = self.target.decoder.weight, self.target.likelihood.scale, math.exp(-1.5)
        gain = torch.eye(LATENTS) + (scale / noise) ** 2 * loading.T @ loading
        mean = (observed["x"].flatten(1) - self.target.decoder.bias) @ loading @ gain.inverse() * scale / noise**2
        with pyro.plate("data", size):
            pyro.sample("scale", dist.LogNormal(torch.full((size,), -1.5), 0.01))
            pyro.sample("z", dist.MultivariateNormal(mean, gain.inverse()))


@pytest.mark.parametrize(("name", "guide"), BLIND.values(), ids=BLIND)
def test_no_bulge_without_a_scale_or_with_a_planted_defect(name, guide):
    if guide is None:
        guide = FixedScale(model(name)) if name == "ea-vae" else ExactGuide(model(name))
    found = interpolated(name, guide, reference_pairs=4, reference_steps=5).sel(source="amortized")
    z = (found["bulge"] / found["bulge_se"]).values
    assert np.abs(z).max() < limit(PAIRS)
    assert float(found["share_concave"][-1]) < 0.3
    assert abs(found["mean_bulge"]) < limit(1) * float(np.sqrt((found["bulge_se"] ** 2).sum())) / PAIRS


def test_the_guide_is_compared_at_the_pairs_and_steps_of_the_reference():
    found = interpolated("ea-vae", reference_pairs=3, reference_steps=5, draws=50)
    drawn = np.isfinite(found["posterior_sd"].sel(source="exact"))
    assert drawn.sum() == 15
    assert np.flatnonzero(drawn.any("step")).tolist() == [0, 6, 11]  # evenly spread, the last included
    assert np.flatnonzero(drawn.any("pair")).tolist() == [0, 2, 5, 8, 10]
    assert np.isfinite(found["compared_bulge"]).sum("pair").values.tolist() == [3, 3]
    assert np.isfinite(found["bulge"]).sum("pair").values.tolist() == [3, PAIRS]


def test_the_guide_alone():
    found = interpolated("ea-vae", reference_pairs=0, draws=50)
    assert not np.isfinite(found["posterior_sd"].sel(source="exact")).any()
    assert np.isfinite(found["bulge"].sel(source="amortized")).all()
    assert found.attrs["decided"] == 0


def test_label_entropy_is_that_of_the_average_probabilities():
    """With a probit read-out of one latent of a linear model, the average probability has a closed form."""
    target = model("vae")

    def read_out(draws):
        on = norm.cdf(6 * draws[..., 0])
        return np.stack([on, 1 - on], -1)

    found = interpolated("vae", read_out=read_out, draws=2000, steps=5, reference_steps=5)
    starts, _ = opposites()
    solution = solve(exact_structure(target, starts), starts["x"].double())
    mean, sd = solution.mean["z"][:, 0].numpy(), solution.sd["z"][:, 0].numpy()
    on = norm.cdf(mean / np.sqrt(1 / 36 + sd**2))
    wanted = entr(on) + entr(1 - on)
    assert found["label_entropy"].isel(step=0).values == pytest.approx(np.stack([wanted, wanted]), abs=0.03)
    single = entr(norm.cdf(6 * mean)) + entr(norm.cdf(-6 * mean))  # that of the posterior mean, which is wrong
    assert np.abs(single - wanted).max() > 0.1


class Brightness(PyroModule):
    """A guide whose scale is the share of pixels that are on."""

    def forward(self, observed, size):
        on = observed["x"].flatten(1).mean(1)
        with pyro.plate("data", size):
            pyro.sample("scale", dist.LogNormal((on + 0.1).log(), 1e-6))
            pyro.sample("z", dist.Normal(torch.zeros(size, LATENTS), 1.0).to_event(1))


def test_binary_blends_are_made_with_the_same_uniforms_at_every_step():
    target = cal.models.create("ea-vae", shape=SHAPE, latents=LATENTS, multiplies="logits").eval()
    dark, bright = {"x": torch.full((3, *SHAPE), 0.2)}, {"x": torch.ones(3, *SHAPE)}
    options = {"steps": 11, "reference_pairs": 0, "draws": 10}
    found = interpolation_experiment(target, Brightness(), dark, bright, **options)
    on = found["scale_mean"].sel(source="amortized").values - 0.1
    assert (np.diff(on) >= -1e-5).all()  # with new uniforms at every step, some share would fall
    assert on[:, -1] == pytest.approx(1.0, abs=1e-4)
    assert len(np.unique(on[:, 3].round(4))) > 1  # pairs have uniforms of their own
    again = interpolation_experiment(target, Brightness(), dark, bright, binarisations=20, **options)
    mean = again["scale_mean"].sel(source="amortized").values - 0.1
    assert mean[:, 0] == pytest.approx(0.2, abs=limit(3) * math.sqrt(0.16 / 16 / 20))


REFUSED = {
    "steps": ({"steps": 3}, "give five steps or more"),
    "reference": ({"reference_steps": 4}, "five steps of the reference or more"),
    "ends": ({"ends": {"x": torch.zeros(3, *SHAPE)}}, "give both as many images"),
    "name": ({"ends": {"y": torch.zeros(PAIRS, *SHAPE)}}, "None"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_interpolated_is_refused(change, message):
    target, (starts, ends) = model("vae"), opposites()
    with pytest.raises(InferenceError, match=message):
        interpolation_experiment(target, ExactGuide(target), **{"starts": starts, "ends": ends, **change})


# -- class means and the average image ---------------------------------------------------------------------------------


def test_class_means_are_decoded_from_average_posterior_means():
    target, x = model("vae"), images(60)
    labels = np.arange(60) % 3
    found = class_mean_images(target, ExactGuide(target), x, labels, draws=200)
    solution = solve(exact_structure(target, x), x["x"].double())
    loading, bias = (part.detach().double() for part in (target.decoder.weight, target.decoder.bias))
    error = (loading @ solution.covariance(0) @ loading.T).diagonal().sqrt().numpy() / math.sqrt(20 * 200)
    for one in range(3):
        wanted = (loading @ solution.mean["z"][labels == one].mean(0) + bias).numpy()
        z = (found.sel({"class": one}).values.ravel() - wanted) / error
        assert np.abs(z).max() < limit(z.size)
        other = (found.sel({"class": (one + 1) % 3}).values.ravel() - wanted) / error
        assert np.abs(other).max() > limit(z.size)  # labels that are mixed up would be seen


def test_the_scale_of_a_class_is_its_geometric_mean():
    target, x = model("ea-vae"), images(20)

    class Known(PyroModule):
        def forward(self, observed, size):
            with pyro.plate("data", size):
                level = torch.where(observed["x"].flatten(1).std(1) > 1.0, 1.0, -1.0)
                pyro.sample("scale", dist.LogNormal(level, 1e-4))
                pyro.sample("z", dist.Normal(torch.ones(size, LATENTS), 1e-4).to_event(1))

    strong = (x["x"].flatten(1).std(1) > 1.0).float().mean()
    assert 0 < strong < 1
    found = class_mean_images(target, Known(), x, np.zeros(20))
    wanted = (2 * strong - 1).exp() * target.decoder.weight.sum(1) + target.decoder.bias
    assert found.values.ravel() == pytest.approx(wanted.detach().numpy(), abs=1e-3)


def test_labels_are_one_per_image():
    target = model("vae")
    with pytest.raises(InferenceError, match="give one each"):
        class_mean_images(target, ExactGuide(target), images(4), np.zeros(3))


@pytest.mark.parametrize("name", ["vae", "ea-vae"])
def test_the_average_image_against_the_closed_form(name):
    target, x = model(name), images(40)
    found = average_image_experiment(target, ExactGuide(target), x, images=40, draws=400, chains=1)
    solution = solve(exact_structure(target, x), torch.cat([x["x"].mean(0, keepdim=True), x["x"]]).double())
    average, *singles = solution.sd["z"].mean(1).tolist()
    z = (found["average_sd"] - average) / found["average_sd_se"]
    assert np.abs(z).max() < limit(2)
    assert found["images_sd"].values == pytest.approx(np.mean(singles), rel=0.02)
    assert found["ratio"].values == pytest.approx(average / np.mean(singles), rel=0.03)
    assert (abs(average / np.mean(singles) - 1) < 0.01) == (name == "vae")
    assert found.attrs["decided"] == 1


def test_a_blind_guide_is_as_sure_of_the_average_image_as_of_others():
    guide = PlainGuide(flat(0.5), scale=True)
    found = average_image_experiment(model("ea-vae"), guide, images(40), images=12, chains=1)
    exact, blind = found["ratio"].values
    assert exact > 1 + 4 * float(found["ratio_se"][0])
    assert abs(blind - 1) < limit(1) * float(found["ratio_se"][1])
