"""The start of a learned noise scale, its course in the history of a training, and the warning if it comes too late."""

import math
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from test_optimal_noise import SHAPE, images

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.evaluation.reporting.run_plots import training_curves
from calibrant.evaluation.reporting.style import data_uri
from calibrant.program.environment import seeded

LATE = "noise scale of 'likelihood'"


def trained(likelihood, x=None, **options):
    x = images(400) if x is None else x
    with seeded(0):
        model = cal.models.create("vae", shape=SHAPE, latents=3, likelihood=likelihood)
        guide = cal.guides.amortize(model, {"x": x})
    given = {"epochs": 3, "batch_size": 40, "compile": False, "validation": cal.data.Data({"x": images(40, 1)})}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit = cal.inference.fit(model, guide, {"x": x}, **given | options)
    return model, guide, fit, [str(w.message) for w in found if LATE in str(w.message)]


@pytest.mark.parametrize("shape", [(), SHAPE])
def test_a_scale_of_the_data_starts_at_their_spread_around_the_mean_of_each_entry_once(shape, tmp_path):
    x = images(400) * torch.linspace(0.8, 3.0, 16).reshape(SHAPE) + torch.linspace(-5, 5, 16).reshape(SHAPE)
    model, guide, _, _ = trained({"name": "gaussian", "scale": "data", "shape": shape}, x, epochs=0)
    variance = x.var(0, unbiased=False)
    wanted = variance.sqrt() if shape else variance.mean().sqrt()
    torch.testing.assert_close(model.likelihood.scale.detach(), wanted, rtol=1e-5, atol=0)
    model.likelihood.log_scale.data.fill_(0.5)
    cal.inference.fit(model, guide, {"x": x}, epochs=0)
    assert bool((model.likelihood.log_scale == 0.5).all()), "a model that goes on training keeps its scale"
    cal.store.save_run(tmp_path / "run", model, guide, cal.inference.Fit(elbo=0.0))
    loaded = cal.load(tmp_path / "run")
    cal.inference.fit(*loaded, {"x": x}, epochs=0)
    assert bool((loaded[0].likelihood.log_scale == 0.5).all()), "one that was loaded, too"


@pytest.mark.parametrize(
    ("likelihood", "unit"), [("discretised-gaussian", 1.0), ("discretised-logistic", math.pi / 3**0.5)]
)
def test_discretised_noise_starts_with_the_standard_deviation_of_the_data(likelihood, unit):
    x = (255 * (0.5 + 0.05 * images(400)).clamp(0, 1)).round() / 255
    some = {"epochs": 0, "validation": cal.data.Data({"x": x[:40]})}
    model, _, _, _ = trained(likelihood, x, **some)
    torch.testing.assert_close(unit * model.likelihood.scale, x.var(0, unbiased=False).mean().sqrt(), rtol=1e-4, atol=0)
    given, _, _, _ = trained({"name": likelihood, "scale": 0.3}, x, **some)
    assert math.isclose(given.likelihood.scale.item(), 0.3, rel_tol=1e-6)


@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian-optimal"])
def test_a_frozen_model_keeps_its_noise(likelihood):
    """Its guide is trained for the model that it is, which is what the remedy of posterior_calibration promises."""
    model = cal.models.create("vae", shape=SHAPE, latents=3, likelihood=likelihood).requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    x = 5.0 * images(100)
    guide = cal.guides.amortize(model, {"x": x})
    fit = cal.inference.fit(model, guide, {"x": x}, epochs=2, batch_size=20, compile=False)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert fit.history[-1]["train"] == pytest.approx(fit.history[-1]["validation"], rel=0.2)  # one scale for both


def test_a_number_is_kept_and_other_words_are_refused():
    model, *_ = trained({"name": "gaussian", "scale": 0.7}, epochs=0)
    assert float(model.likelihood.scale) == pytest.approx(0.7)
    for wrong in ("auto", 0.0, -1.0):
        with pytest.raises(ProgramError, match=r'give a positive number, or "data"'):
            cal.models.make_likelihood({"name": "gaussian", "scale": wrong})
    with pytest.raises(ProgramError, match="scale=NUMBER"):
        cal.models.make_likelihood({"name": "gaussian", "learn": False})


def test_entries_that_never_vary_and_data_that_do_not_vary_start_at_a_positive_scale():
    x = images(400) * (torch.arange(16).reshape(SHAPE) > 2)
    model, *_ = trained({"name": "gaussian", "shape": SHAPE}, x, epochs=0)
    assert float(model.likelihood.scale.min()) == pytest.approx(0.1 * float(x.var(0, unbiased=False).mean().sqrt()))
    model, *_ = trained("gaussian", torch.ones(60, *SHAPE), epochs=0)
    assert float(model.likelihood.scale) == pytest.approx(0.4)


class Masked(PyroModule):
    """A learned noise whose entries are masked."""

    def __init__(self):
        super().__init__()
        self.noise = cal.models.make_likelihood("gaussian")

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", self.noise(z).mask(torch.ones(size).bool()))


def test_the_noise_of_masked_entries_keeps_its_scale():
    model, data = Masked(), {"x": torch.randn(40, 2)}
    cal.inference.fit(model, cal.guides.amortize(model, data), data, epochs=0)
    assert float(model.noise.scale) == pytest.approx(0.4)


def test_the_history_has_the_scale_of_every_epoch_and_no_step_moves_it_further_than_the_rate():
    model, _, fit, _ = trained({"name": "gaussian", "scale": 1.0}, lr=1e-3, epochs=5)
    course = [row["noise"] for row in fit.history]
    assert len(course) == 5
    assert max(course) > float(model.likelihood.scale) - 1e-6 > min(course) - 2e-6
    assert all(abs(math.log(now / last)) < 1.05 * 10 * 1e-3 for last, now in zip([1.0, *course], course, strict=False))
    settled, _, fit, _ = trained("gaussian-optimal")
    assert fit.history[-1]["noise"] == pytest.approx(float(settled.likelihood.scale), rel=0.2)
    _, _, fit, _ = trained({"name": "gaussian", "scale": 0.4, "learn": False})
    assert "noise" not in fit.history[0]


class Pair(PyroModule):
    def __init__(self):
        super().__init__()
        for name in "xy":
            setattr(self, name, cal.models.make_likelihood("gaussian"))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            for name in "xy":
                pyro.sample(name, getattr(self, name)(z))


def test_several_scales_have_a_column_each():
    model, data = Pair(), {"x": torch.randn(40, 2), "y": torch.randn(40, 2)}
    fit = cal.inference.fit(model, cal.guides.amortize(model, data), data, epochs=1)
    assert {"noise of x", "noise of y"} < set(fit.history[0])


def test_a_scale_that_comes_too_late_is_told_and_each_remedy_works():
    *_, said = trained({"name": "gaussian", "scale": 8.0})
    assert len(said) == 1
    assert "train for longer, give" in said[0]
    best = float(said[0].partition("give ")[2].split()[0])
    for likelihood, options in (
        ({"name": "gaussian", "scale": best}, {}),
        ({"name": "gaussian", "scale": 8.0}, {"epochs": 30, "lr": 3e-2}),
        ("gaussian-optimal", {}),
    ):
        *_, said = trained(likelihood, **options)
        assert not said, likelihood
    assert not trained({"name": "gaussian", "scale": 8.0, "learn": False})[-1], "a fixed scale is the user's"


def test_the_picture_of_a_training_shows_the_scale_of_models_that_have_one():
    rows = [{"epoch": i, "train": -1.0 / i, "validation": -1.1 / i, "lr": 1e-3} for i in range(1, 6)]
    with_noise = [{**row, "noise": 1.0 / row["epoch"]} for row in rows]
    plain, below, both = (
        data_uri(training_curves([SimpleNamespace(name=str(i), history=history) for i, history in enumerate(shown)]))
        for shown in ([rows], [with_noise], [rows, with_noise])
    )
    assert len({plain, below, both}) == 3
