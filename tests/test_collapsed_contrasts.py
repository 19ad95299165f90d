"""Collapsed guides beyond the contrasts of their training, the nodes that centre them, and their recorded steps."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import calibrant as cal
from calibrant.guides import CollapsedGuide, amortize
from calibrant.guides.amortizing import from_spec
from calibrant.inference import fit, log_evidence, posterior
from calibrant.inference.fitting import loop, state
from calibrant.inference.references.exact import solve
from calibrant.linear_gaussian import spectrum
from calibrant.linear_gaussian.density import bounds, log_prior, prior_of_scale
from calibrant.linear_gaussian.detection import detect
from calibrant.linear_gaussian.spectrum import project, spectrum_of, weighted_scales

LEVELS = (0.0, 1e-3, 0.1, 1.0, 10.0, 100.0)  # of the noise; contrasts of training lie between 0.3 and 5
PRIORS: dict[str, Any] = {
    "lognormal": {},
    "gamma of the output": {"scale_prior": "gamma", "multiplies": "output"},
    "softplus-laplace": {"scale_prior": "softplus-laplace"},
}


def model_of(prior: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    noise = {"name": "gaussian", "scale": 0.5, "learn": False}
    return cal.models.create("ea-vae", shape=(1, 6, 6), latents=12, likelihood=noise, **PRIORS[prior])


def patches(count: int, seed: int) -> Tensor:
    """Data of another model, with contrasts of a narrow range."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(count, 8, generator=generator) @ torch.randn(8, 36, generator=generator)
    contrast = torch.empty(count, 1).uniform_(-1.0, 1.0, generator=generator).exp()
    return (contrast * signal / 8**0.5 + 0.5 * torch.randn(count, 36, generator=generator)).reshape(-1, 1, 6, 6)


def briefly_trained(prior: str, centred: bool = True) -> tuple[Any, CollapsedGuide]:
    """Model and guide after sixty steps; without `centred`, a guide as earlier versions made it."""
    model, observed = model_of(prior), {"x": patches(1000, 1)}
    guide: Any = amortize(model, observed, structure="collapsed", seed=1)
    if not centred:
        guide = from_spec({name: value for name, value in guide.spec.items() if name != "centred"}, model=model)
    fit(model, guide, observed, epochs=4, batch_size=60, lr=5e-3)
    return model, guide


def gaps(model: Any, guide: Any, x: Tensor, draws: int = 200) -> Tensor:
    """log p(x) − ELBO of every image, in nats."""
    stats = posterior(model, guide, {"x": x}, draws=draws)["sample_stats"]
    bound = torch.as_tensor((stats["log_p"] - stats["log_q"]).mean(("chain", "draw")).values)
    return log_evidence(model, {"x": x}) - bound


def shown() -> Tensor:
    """The same images at all contrasts, blank ones too."""
    x = patches(8, 2)
    x = x - x.mean((1, 2, 3), keepdim=True)
    return torch.cat([0.5 * level * x / x.square().mean((1, 2, 3), keepdim=True).sqrt() for level in LEVELS])


@pytest.mark.parametrize("prior", PRIORS)
def test_a_briefly_trained_guide_is_right_beyond_the_contrasts_of_its_training(prior):
    """Within 0.3 nats for every single image, where a guide in units of the prior is tens of nats off.

    Under priors with a Gaussian or a light tail the gap is below 0.1; the log of a softplus-Laplace has a kink.
    """
    found = gaps(*briefly_trained(prior), shown())
    assert float(found.max()) < 0.3, found.reshape(len(LEVELS), -1).amax(1)
    if prior == "lognormal":  # the defect
        assert float(gaps(*briefly_trained(prior, centred=False), shown()).max()) > 10


def moments(prior: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and sd of the scale by the nodes, and by the exact solution, `(data,)` each."""
    structure = detect(model_of(prior), {"x": x}, {})
    assert structure is not None
    exact, noise = solve(structure, x), structure.noise
    left, gain, _ = torch.linalg.svd(structure.loading / noise[:, None], full_matrices=False)
    parts = spectrum_of(left, gain, structure.shift / noise)
    images = project(parts, (x.flatten(1).double() - structure.offset) / noise)
    distribution = prior_of_scale(structure, x.device)
    log_scale, weights = weighted_scales(parts, images, partial(log_prior, distribution), bounds(distribution))
    s = log_scale.exp()
    mean = (weights * s).sum(1)
    sd = (weights * (s - mean[:, None]).square()).sum(1).sqrt()
    return mean, sd, exact.mean["scale"], exact.sd["scale"]


@pytest.mark.parametrize("prior", PRIORS)
def test_a_few_nodes_have_the_moments_of_the_exact_posterior(prior, monkeypatch):
    """Means within 0.1 sds, sds within 8%, from blank images to a hundred times the noise."""
    mean, sd, exact_mean, exact_sd = moments(prior, shown())
    assert float(((mean - exact_mean) / exact_sd).abs().max()) < 0.1
    assert float((sd / exact_sd - 1).abs().max()) < 0.08
    monkeypatch.setattr(spectrum, "_SCAN", 17)  # the defect: nodes three e-folds apart
    monkeypatch.setattr(spectrum, "_ROUNDS", 1)
    _, sd, _, exact_sd = moments(prior, shown())
    assert float((sd / exact_sd - 1).abs().max()) > 0.08


def test_a_shift_that_is_a_rounding_error_explains_no_image():
    """A rest of 1e-17 would explain an image by a scale of 1e20; a real one is kept."""
    left, gain, _ = torch.linalg.svd(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double(), False)
    within, across = left @ torch.ones(3).double(), torch.full((9,), 1e-6).double()
    assert not spectrum_of(left, gain, within).shift_rest.any()
    rest = across - left @ (left.T @ across)
    torch.testing.assert_close(spectrum_of(left, gain, within + across).shift_rest, rest, rtol=1e-6, atol=1e-15)


def test_the_exact_scale_follows_contrast_at_any_contrast():
    """Under a prior with so light a tail, log s grows with log contrast, and no second mode wins."""
    model, x = model_of("lognormal"), patches(8, 2)
    structure = detect(model, {"x": x}, {})
    assert structure is not None
    logs = torch.stack([solve(structure, x * factor).mean["scale"].log() for factor in (1.0, 1e2, 1e4)])
    assert bool(((logs[1:] - logs[:-1]) < torch.tensor(1e2).log() + 1.0).all())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["stl", "dreg"])
def test_a_recorded_training_is_the_same(objective, monkeypatch):
    """The conditional follows the weights of the model inside the graph."""
    for module in (state, loop):
        monkeypatch.setattr(module, "RECORDED_FROM", 0)
    ends = []
    for compile in ("auto", False):
        model, observed = model_of("gamma of the output"), {"x": patches(200, 1)}
        guide = amortize(model, observed, structure="collapsed", family={"scale": "lognormal"}, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            fit(
                model,
                guide,
                observed,
                epochs=3,
                batch_size=50,
                lr=1e-2,
                objective=objective,
                particles=2,
                compile=compile,
            )
        ends.append([*model.parameters(), *guide.parameters()])
    start = list(model_of("gamma of the output").parameters())
    assert not torch.allclose(start[0], ends[0][0], atol=1e-3)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_guide_of_an_earlier_version_is_loaded_as_it_was(tmp_path):
    """Its specification does not say "centred", and its weights have other names."""
    model, guide = briefly_trained("lognormal", centred=False)
    assert not any(name.startswith("encoder.encoder") for name in guide.state_dict())
    cal.store.save_run(tmp_path, model, guide, cal.inference.Fit())
    loaded = cal.load(tmp_path)
    x = patches(5, 3)
    ours, theirs = (posterior(*pair, {"x": x}, draws=2, seed=1)["posterior"] for pair in ((model, guide), loaded))
    assert ours["scale"].equals(theirs["scale"])
