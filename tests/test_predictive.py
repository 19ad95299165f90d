"""Predictive checks: a true model with its exact posterior shows nothing, and every misfit in what is meant for it."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from scipy.stats import binom, norm, wasserstein_distance

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError
from calibrant.evaluation.judgements.on_predictions import predictive_sentences
from calibrant.evaluation.reporting import predictive_plots
from calibrant.evaluation.statistics import predictive_tallies as predictive_draws
from calibrant.evaluation.statistics.data_statistics import differences, moments, transport
from calibrant.evaluation.statistics.predictive_tests import predictive_check
from calibrant.store import load_dataset, save_dataset

SIDE, LATENTS, NOISE = 8, 2, 0.5
LOADING = 0.5 * torch.randn(SIDE * SIDE, LATENTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
COVARIANCE = torch.linalg.inv(torch.eye(LATENTS, dtype=torch.float64) + LOADING.T @ LOADING / NOISE**2)
ROOT = torch.linalg.cholesky(COVARIANCE)


def image(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENTS]).to_event(1))
        mean = (z @ LOADING.to(z).T).reshape(-1, SIDE, SIDE)
        pyro.sample("x", dist.Normal(mean, NOISE).to_event(2))


def image_guide(observed, size):
    """The exact posterior."""
    x = observed["x"].reshape(size, -1)
    mean = x @ (LOADING @ COVARIANCE / NOISE**2).to(x)
    with pyro.plate("data", size):
        pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=ROOT.to(x)))


def images(count, seed, scale=1.0, noise=None):
    """Data of the model, with another scale of the latents or noise `(count, pixels)` of another kind."""
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(count, LATENTS, generator=generator, dtype=torch.float64)
    white = torch.randn(count, SIDE * SIDE, generator=generator, dtype=torch.float64)
    return {"x": (z @ LOADING.T + NOISE * (white if noise is None else noise(white))).reshape(-1, SIDE, SIDE)}


def heavy(white):
    """Student's t with 3 degrees of freedom, of the same variance."""
    return dist.StudentT(torch.tensor(3.0, dtype=torch.float64)).sample(white.shape) / 3**0.5


def smooth(white):
    """Neighbours averaged, of the same variance."""
    x = white.reshape(-1, SIDE, SIDE)
    return (0.5 * sum(x.roll(shift, (1, 2)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1)))).reshape(len(x), -1)


@pytest.fixture(scope="module")
def truth():
    return predictive_check(image, image_guide, images(500, 1), draws=60, seed=2)


def z_scores(result, name, null):
    if f"{null}_se" in result:
        return ((result[name] - result[null]) / np.hypot(result[f"{name}_se"], result[f"{null}_se"])).values
    return ((result[name] - (1.0 if "ratio" in name else 0.0)) / result[f"{name}_se"]).values


def test_nothing_is_found_under_a_true_model_with_its_exact_posterior(truth):
    names = [f"{part}_{what}" for part in ("prior", "aggregate") for what in ("mean_difference", "sd_ratio")]
    found = [np.ravel(z_scores(truth, name, "")) for name in names]
    found += [np.ravel(z_scores(truth, name, f"{name}_null")) for name in ("extreme", "coverage")]
    scores = np.concatenate(found)
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() < limit(scores.size)
    for part in ("prior", "aggregate"):
        excess = truth[f"{part}_wasserstein"] - truth[f"{part}_wasserstein_null"]
        assert (excess < limit(10) * truth[f"{part}_wasserstein_null_sd"]).all()
    said = " ".join(predictive_sentences(truth))
    assert "times" not in said
    assert "too" not in said
    assert "pass" not in said


def test_entries_are_covered_as_often_as_the_exact_posterior_has_it(truth):
    """x − E(x_new | x) and x_new − E(x_new | x) are Normals of known variance: intervals hold more than their level."""
    loading, covariance = LOADING.numpy(), COVARIANCE.numpy()
    rest = np.eye(SIDE**2) - loading @ covariance @ loading.T / NOISE**2
    residual = np.diag(rest @ (loading @ loading.T + NOISE**2 * np.eye(SIDE**2)) @ rest.T)
    predicted = NOISE**2 + np.diag(loading @ covariance @ loading.T)
    # The rank of an observation among `draws` is Binomial, with the probability at the quantile t of its residual.
    draws, t = truth.attrs["draws"], (np.arange(400) + 0.5) / 400
    below = norm.cdf(np.sqrt(residual / predicted)[:, None] * norm.ppf(t))
    shares = binom.pmf(np.arange(draws + 1)[:, None, None], draws, below).mean((1, 2))
    ends = np.arange(draws + 2) / (draws + 1)  # a rank's PIT is uniform between two of these

    def expected(level):
        inside = np.clip(ends, 0.5 - 0.5 * level, 0.5 + 0.5 * level)
        return (shares * np.diff(inside)).sum() * (draws + 1)

    for level in truth["level"].values:
        one = truth.sel(level=level, observed="x")
        assert abs(one["coverage"] - expected(level)) < limit(4) * one["coverage_se"]
    assert (truth["coverage"] > truth["level"] - limit(4) * truth["coverage_se"]).all()
    off = (truth["pit_ecdf"] - truth["u"]).isel(observed=0)
    bound = limit(101) * truth["pit_ecdf_se"].isel(observed=0) + 1e-12
    assert (off.sel(u=slice(0, 0.49)) < bound).all(), "PIT values far out are too many"
    assert (off.sel(u=slice(0.51, 1)) > -bound).all()


@pytest.mark.parametrize(
    ("misfit", "caught"),
    [
        ({"noise": lambda white: 1.5 * white}, {"coverage": -1, "prior_mean_difference.power high": -1}),
        ({"noise": lambda white: 0.6 * white}, {"coverage": 1, "prior_mean_difference.power high": 1}),
        ({"scale": 1.5}, {"aggregate_sd_ratio": 1, "prior_mean_difference.contrast": -1}),
        ({"scale": 0.7}, {"aggregate_sd_ratio": -1, "prior_mean_difference.contrast": 1}),
        ({"noise": heavy}, {"prior_mean_difference.kurtosis": -1, "extreme.kurtosis": 1}),
        ({"noise": smooth}, {"prior_mean_difference.power high": 1, "extreme.power high": 1}),
    ],
)
def test_a_misfit_is_caught_by_what_is_meant_for_it(misfit, caught):
    result = predictive_check(image, image_guide, images(400, 5, **misfit), draws=30, seed=6)
    for what, sign in caught.items():
        name, _, statistic = what.partition(".")
        one = result.sel(statistic=statistic) if statistic else result
        scores = sign * np.ravel(z_scores(one, name, f"{name}_null"))
        assert (scores > limit(8)).all(), (what, scores)
    said = predictive_sentences(result)
    for statistic in (what.partition(".")[2] for what in caught if "." in what):
        assert any(f"`{statistic}`" in sentence and "±" in sentence for sentence in said)


def test_sentences_give_the_size_of_a_misfit():
    twice = {"x": 2.0 * images(400, 7)["x"]}
    result = predictive_check(image, image_guide, twice, draws=30)
    said = predictive_sentences(result)
    contrast = next(sentence for sentence in said if "times the `contrast`" in sentence)
    assert float(contrast.split("have ")[1].split(" ")[0]) == pytest.approx(0.5, abs=0.05)
    power = next(sentence for sentence in said if "at high frequencies" in sentence)
    assert float(power.split("have ")[1].split(" ")[0]) == pytest.approx(0.25, abs=0.05)
    assert any("too few, since the data spread more" in sentence for sentence in said)


def test_a_wrong_guide_shows_in_the_aggregate_posterior():
    def prior_guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"].new_zeros(size, LATENTS), 0.6).to_event(1))

    result = predictive_check(image, prior_guide, images(300, 8), draws=30)
    scores = z_scores(result, "aggregate_sd_ratio", "")
    assert (scores < -limit(2)).all()
    assert np.abs(z_scores(result, "prior_sd_ratio", "")).max() < limit(8)
    assert any("for which the guide's posterior is wrong" in sentence for sentence in predictive_sentences(result))


def test_distances_are_scipys_and_their_p_values_uniform():
    generator = np.random.default_rng(0)
    values = generator.lognormal(size=(20, 30))
    found = transport(values[0], values[1:])
    assert found["wasserstein"] == pytest.approx(wasserstein_distance(values[0], values[1:].ravel()), rel=1e-9)
    p = [transport(v[0], v[1:])["p"] for v in generator.lognormal(size=(1500, 20, 15)).round(1)]
    ranks = np.bincount(np.round(20 * np.array(p)).astype(int), minlength=21)[1:]
    expected = len(p) / 20
    # Ties of rounded values only make p larger.
    assert (np.cumsum(ranks) - expected * np.arange(1, 21) < limit(20) * np.sqrt(len(p)) / 2).all()
    assert transport(values[0] * 2, values[1:])["p"] == 1 / 20


def test_errors_of_differences_are_those_of_repetitions():
    generator, scores = np.random.default_rng(1), []
    for _ in range(600):
        centres = 1.5 * generator.normal(size=(80, 1))
        draws = 2.0 + centres + generator.normal(size=(80, 5))  # five draws of every datum
        ours, theirs = moments(draws.mean(1), (draws**2).mean(1)), moments(generator.normal(size=400))
        found = differences(ours, theirs)
        scores.append([(found["mean_difference"] - 2.0) / found["mean_difference_se"]])
        scores[-1].append((found["sd_ratio"] - np.sqrt(3.25)) / found["sd_ratio_se"])
    spread, centre = np.std(scores, 0), np.mean(scores, 0)
    assert np.abs(spread - 1.0).max() < 0.15  # 600 repetitions know it within .03
    assert np.abs(centre).max() < 0.3


def counts(size, exposure):
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(4.0, 2.0))
        pyro.sample("n", dist.Poisson((rate * exposure)[:, None].expand(-1, 6)).to_event(1))


def counts_guide(observed, size, exposure):
    with pyro.plate("data", size):
        pyro.sample("rate", dist.Gamma(4.0 + observed["n"].sum(-1), 2.0 + 6.0 * exposure))


def test_counts_and_covariates():
    exposure = torch.linspace(0.2, 3.0, 500)
    torch.manual_seed(0)
    rate = dist.Gamma(4.0, 2.0).sample((500,))
    n = dist.Poisson((rate * exposure)[:, None].expand(-1, 6)).sample()
    result = predictive_check(counts, counts_guide, {"n": n}, covariates={"exposure": exposure}, draws=40)
    assert result["statistic"].values.tolist() == ["mean", "dispersion", "zeros", "maximum"]
    names = ("prior_mean_difference", "prior_sd_ratio", "aggregate_mean_difference", "aggregate_sd_ratio")
    found = [np.ravel(z_scores(result, name, "")) for name in names]
    found += [np.ravel(z_scores(result, name, f"{name}_null")) for name in ("extreme", "coverage")]
    assert np.abs(np.concatenate(found)).max() < limit(18)
    more = torch.poisson((rate * exposure)[:, None] * dist.Gamma(2.0, 2.0).sample((500, 6)))
    result = predictive_check(counts, counts_guide, {"n": more}, covariates={"exposure": exposure}, draws=40)
    assert z_scores(result, "prior_mean_difference", "")[1] < -limit(8)
    assert result["coverage"].sel(level=0.9).item() < 0.86


def masked(size, seen):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None].expand(-1, 5), 1.0).mask(seen > 0).to_event(1))


def masked_guide(observed, size, seen):
    precision = 1.0 + seen.sum(-1)
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal((seen * observed["x"]).sum(-1) / precision, precision**-0.5))


def test_masked_entries_do_not_count():
    torch.manual_seed(0)
    x, seen = torch.randn(400, 1) + torch.randn(400, 5), (torch.rand(400, 5) < 0.6).float()
    seen[0] = 0.0
    found = [
        predictive_check(masked, masked_guide, {"x": torch.where(seen > 0, x, v)}, covariates={"seen": seen}, draws=40)
        for v in (0.0, 50.0)
    ]
    xr.testing.assert_allclose(found[0]["coverage"], found[1]["coverage"])
    assert np.isnan(found[0]["coverage_data"].values[0, 0]).all()
    assert np.abs(z_scores(found[0], "coverage", "coverage_null")).max() < limit(4)
    assert np.abs(z_scores(found[0], "prior_mean_difference", "")).max() < limit(4)


def test_a_run_is_no_larger_than_memory_allows(monkeypatch):
    whole = predictive_check(image, image_guide, images(12, 3), draws=50)
    monkeypatch.setattr(predictive_draws, "ELEMENTS", 20 * (SIDE**2 + LATENTS))
    sizes, simulate = [], predictive_draws.Runs.simulate

    def spied(self, observed, covariates, repeats, from_guide):
        run = simulate(self, observed, covariates, repeats, from_guide)
        sizes.append(len(run.latents))
        return run

    monkeypatch.setattr(predictive_draws.Runs, "simulate", spied)
    parts = predictive_check(image, image_guide, images(12, 3), draws=50)
    assert max(sizes[1:]) == 20  # the first run measures the memory of a row
    assert {name: value.shape for name, value in parts.items()} == {name: v.shape for name, v in whole.items()}
    error = np.sqrt(2.0 / 50) * whole["predictive_sd"]
    assert (abs(parts["predictive_mean"] - whole["predictive_mean"]) < limit(error.size) * error).all()
    assert (parts["tail_probability"] > 0).all()
    assert (parts["tail_probability"] < 1).all()


def test_own_statistics_and_two_observed_sites():
    def two(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0))
            pyro.sample("b", dist.Bernoulli(logits=z[:, None].expand(-1, 4)).to_event(1))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(0.5 * observed["a"], 0.7))

    data = {"a": torch.randn(60), "b": torch.randint(0, 2, (60, 4)).float()}
    own = {"largest": lambda x: x.reshape(len(x), -1).amax(1)}
    result = predictive_check(two, guide, data, statistics=own, draws=20)
    labels = ["value of a", "largest of a", "mean of b", "largest of b"]
    assert result["statistic"].values.tolist() == labels
    assert result["observation"].values.tolist() == ["a", "a", "b", "b"]
    np.testing.assert_allclose(result["observed_statistic"].sel(statistic="largest of b"), data["b"].amax(1))
    assert result["latent"].values.tolist() == ["z"]
    assert len(predictive_sentences(result)) > 3


def test_what_is_refused():
    data = images(4, 0)

    def shared(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(centre, 1.0))

    def shared_guide(observed, size):
        pyro.sample("centre", dist.Normal(0.0, 1.0))

    with pytest.raises(InferenceError, match=r"latents \['centre'\] are shared"):
        predictive_check(shared, shared_guide, {"x": torch.zeros(4)})
    with pytest.raises(InferenceError, match="'flat' gives shape"):
        predictive_check(image, image_guide, data, statistics={"flat": lambda x: x.mean(1)})
    with pytest.raises(InferenceError, match="'log' is not finite"):
        predictive_check(image, image_guide, data, statistics={"log": lambda x: x.flatten(1).mean(1).log()})
    with pytest.raises(InferenceError, match="level=90"):
        predictive_check(image, image_guide, data, level=90)
    with pytest.raises(InferenceError, match="draws >= 20"):
        predictive_check(image, image_guide, data, draws=5)


def test_a_factor_is_refused_and_an_improper_prior_leaves_the_prior_out():
    def program(prior, factor):
        def model(size):
            with pyro.plate("data", size):
                z = pyro.sample("z", prior)
                if factor:
                    pyro.factor("f", -z.abs())
                pyro.sample("x", dist.Normal(z[:, None].expand(-1, 3), 1.0).to_event(1))

        return model

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"].mean(-1), 3**-0.5))

    data = {"x": 5.0 + 10.0 * torch.randn(50, 1) + torch.randn(50, 3)}
    with pytest.raises(ProgramError, match="'f' is a factor"):
        predictive_check(program(dist.Normal(0.0, 1.0), True), guide, data)
    improper = dist.ImproperUniform(dist.constraints.real, (), ())
    result = predictive_check(program(improper, False), guide, data, draws=30)
    assert not [name for name in result.data_vars if "prior" in name or "aggregate" in name or "null" in name]
    assert predictive_sentences(result)[0].startswith("the prior is improper")
    assert predictive_plots.prior_statistics(result) is None
    assert predictive_plots.aggregate_posterior(result) is None
    assert predictive_plots.entry_coverage(result) is not None


def test_it_is_stored_and_repeats(truth, tmp_path):
    save_dataset(truth, tmp_path / "predictive.nc")
    stored = load_dataset(tmp_path / "predictive.nc")
    assert predictive_sentences(stored) == predictive_sentences(truth)
    a, b = (predictive_check(image, image_guide, images(20, 1), draws=20, seed=4) for _ in range(2))
    xr.testing.assert_identical(a, b)


def test_few_data_are_not_said_to_be_reproduced():
    few, many = (predictive_check(image, image_guide, images(n, 1), draws=40, seed=4) for n in (12, 400))
    assert any("the data are too few to tell (misfits for" in sentence for sentence in predictive_sentences(few))
    assert any("reproduce all statistics" in sentence for sentence in predictive_sentences(many))


@pytest.mark.parametrize("name", predictive_plots.CAPTIONS)
def test_pictures(truth, name):
    figure = getattr(predictive_plots, name)(truth)
    assert any(axes.has_data() for axes in figure.axes)


def test_registered_models():
    model = cal.models.create("ea-vae", shape=(1, 8, 8), latents=3).eval()
    data = {"x": cal.program.sample_prior(model, 40, seed=0)["x"]}
    guide = cal.guides.amortize(model, data).eval()
    result = predictive_check(model, guide, data, draws=20)
    assert result["latent"].values.tolist() == ["scale", "z[0]", "z[1]", "z[2]"]
    assert "power middle" in result["statistic"].values
