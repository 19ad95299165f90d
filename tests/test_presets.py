"""Presets of models: their arguments, their size, what they mean, how they are trained, and the command line."""

import inspect
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from agreement import limit
from cases import all_cases
from commands import good, refused

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.guides.encoders.ea_vae import EAVAEConvEncoder
from calibrant.guides.families.plain import TruncatedGamma
from calibrant.inference.fitting.kl_weights import schedules_of

NAMES = ["van-hateren", "natural-softlaplace", "natural-lognormal", "mnist"]
MODELS = ("vae", "ea-vae")
BOTH = [(model, preset) for model in MODELS for preset in NAMES]
TRAININGS = [(*pair, by) for pair in BOTH for by in ("recommended", "authors")]


def small(model, preset):
    return cal.models.card(model).presets[preset].small


def weights(*modules):
    return sum(weight.numel() for module in modules for weight in module.parameters())


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_presets_of_the_paper_are_listed_and_among_the_cases_of_the_tests(model):
    assert cal.models.list_presets(model) == NAMES
    assert cal.models.list_presets("gsm") == []
    assert set(NAMES) <= {case.name for case in all_cases(model)}
    assert all(preset.about for preset in cal.models.card(model).presets.values())


@pytest.mark.parametrize(("model", "preset"), BOTH)
def test_a_recipe_has_all_arguments_so_that_it_rebuilds_the_model_without_the_preset(model, preset):
    built = cal.models.create(model, preset=preset, **small(model, preset))
    arguments = built.recipe.arguments
    assert "preset" not in arguments
    assert {"shape", "latents", "prior", "decoder", "likelihood"} <= set(arguments)
    again = cal.models.create(built.recipe.name, **json.loads(json.dumps(arguments)))
    again.load_state_dict(built.state_dict())
    assert again.recipe == built.recipe


@pytest.mark.parametrize(
    ("shape", "latents"), [((1, 40, 40), 1800), ((1, 16, 16), 288), ((1, 5, 5), 28), ((1, 1, 1), 1)]
)
@pytest.mark.parametrize("preset", NAMES[:3])
def test_latents_follow_the_number_of_pixels(shape, latents, preset):
    vae, ea = (cal.models.training(model, preset, shape=shape).arguments["latents"] for model in MODELS)
    assert (vae, ea) == (latents, max(1, latents - 1))
    assert cal.models.create("vae", preset=preset, shape=shape).recipe.arguments["latents"] == latents


def test_what_is_given_takes_the_place_of_the_preset():
    decoder = {"name": "mlp", "hidden": 7}
    model = cal.models.create("ea-vae", preset="mnist", shape=(1, 16, 16), decoder=decoder, latents=3)
    assert model.recipe.arguments == {
        "shape": [1, 16, 16],
        "latents": 3,
        "prior": "normal",
        "decoder": decoder,
        "scale_prior": "lognormal",
        "multiplies": "logits",
        "likelihood": "bernoulli",
    }
    module = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Unflatten(1, (1, 8, 8)))
    assert cal.models.create("ea-vae", preset="mnist", shape=(1, 8, 8), decoder=module).decoder is module


def test_unknown_names_are_refused_with_the_nearest_ones():
    with pytest.raises(ProgramError, match="unknown preset 'van-hatern' of the model 'ea-vae': did you mean van-hat"):
        cal.models.create("ea-vae", preset="van-hatern")
    with pytest.raises(ProgramError, match="unknown preset 'mnist' of the model 'gsm': the model 'gsm' has none"):
        cal.models.create("gsm", preset="mnist", shape=(1, 8, 8))
    with pytest.raises(ProgramError, match=r"unknown training 'author' of the preset 'mnist' .*: did you mean authors"):
        cal.models.training("vae", "mnist", by="author")
    with pytest.raises(ProgramError, match="unknown model"):
        cal.models.list_presets("vea")
    with pytest.raises(ProgramError, match=r"shape \(channels, 8h, 8w\), not \(1, 28, 28\)"):
        cal.models.create("vae", preset="mnist", shape=(1, 28, 28))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"name": "cauchy"}, "unknown latent prior 'cauchy'"),
        ({"scale": 2.0}, "unknown latent prior None"),
        ({"name": "normal", "sd": 2.0}, r"has no parameters \['sd'\]; it has loc and scale"),
        ({"name": "laplace", "scale": 0.0}, "scale=0: it must be positive"),
    ],
)
def test_priors_that_cannot_be_made_are_refused(prior, message):
    with pytest.raises(ProgramError, match=message):
        cal.models.create("vae", shape=(4,), prior=prior)


# -- the models of the paper -------------------------------------------------------------------------------------------

DRAWS = 40_000
MOMENTS = {  # mean and variance of the scale, and of a latent, by the paper's priors
    "van-hateren": (math.sqrt(2), 1.0, 1.0),
    "natural-softlaplace": (None, None, 2.0),
    "natural-lognormal": (math.exp(0.5), (math.e - 1) * math.e, 2.0),
    "mnist": (math.exp(0.5), (math.e - 1) * math.e, 1.0),
}


@pytest.mark.parametrize("preset", NAMES)
def test_priors_are_those_of_the_paper(preset):
    model = cal.models.create("ea-vae", preset=preset, **{**small("ea-vae", preset), "latents": 2})
    values = {name: value.double() for name, value in cal.program.sample_prior(model, DRAWS, seed=0).items()}
    mean, variance, of_latents = MOMENTS[preset]
    z, s = values["z"], values["scale"]
    squares = z.square()
    assert ((squares.mean(0) - of_latents).abs() < limit(4) * squares.std(0) / DRAWS**0.5).all()
    if mean is None:  # softplus(u), u ~ Laplace(0, 1): u = log(e^s − 1), and u/|u| is a fair coin
        u = torch.expm1(s).log()
        assert abs(u.abs().mean() - 1) < limit(4) * u.abs().std() / DRAWS**0.5
        assert abs(u.sign().mean()) < limit(4) / DRAWS**0.5
    else:
        assert abs(s.mean() - mean) < limit(4) * s.std() / DRAWS**0.5
        logs = s.log()
        if preset != "van-hateren":
            assert abs(logs.std() - 1) < limit(4) / DRAWS**0.5
        else:
            assert abs(s.var() - variance) < limit(4) * (s - mean).square().std() / DRAWS**0.5


@pytest.mark.parametrize("preset", NAMES)
def test_the_scale_stands_where_it_does_in_the_paper(preset):
    model = cal.models.create("ea-vae", preset=preset, **small("ea-vae", preset))
    with torch.no_grad():
        for name, weight in model.decoder.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    s, z = torch.tensor([0.0, 3.0]), torch.randn(2, model.recipe.arguments["latents"])
    with pyro.get_param_store().scope():
        run = pyro.poutine.trace(pyro.condition(model, {"scale": s, "z": z})).get_trace(2)
    fn, plain = run.nodes["x"]["fn"].base_dist, model.decoder(z)
    if preset == "mnist":
        torch.testing.assert_close(fn.logits, s[:, None, None, None] * plain)
        assert (fn.probs[0] == 0.5).all(), "mid-grey where the scale is 0"
        return
    bias, noise = model.decoder.bias.reshape(1, 4, 4), 0.4603 if preset == "van-hateren" else 0.4
    torch.testing.assert_close(fn.stddev, torch.full_like(plain, noise / 0.88586))
    scaled = 3 * plain[1] if preset == "van-hateren" else 3 * (plain[1] - bias) + bias
    torch.testing.assert_close(fn.mean[1], scaled)
    torch.testing.assert_close(fn.mean[0], torch.zeros_like(bias) if preset == "van-hateren" else bias)


def size_of_mlp(pixels, units, latents, scale):
    """The numbers of parameters of the paper's networks for natural images, layer by layer: weights, then biases."""
    encoder = pixels * units + units + units * units + units + 2 * (units * latents + latents)
    branch = units * 20 + 20 + 20 + 1 if scale else 0
    return encoder + branch + latents * pixels + pixels


@pytest.mark.parametrize(
    ("model", "latents", "millions"), [("vae", 1800, 17.29), ("ea-vae", 1799, 17.32)], ids=["vae", "ea-vae"]
)
def test_networks_for_van_hateren_have_the_size_of_the_paper(model, latents, millions):
    found = cal.models.training(model, "van-hateren", by="authors")
    built = cal.models.create(found.model, **found.arguments)
    guide = cal.guides.amortize(built, {"x": torch.randn(4, 1, 40, 40)}, **found.guide)
    assert weights(built, guide) == size_of_mlp(1600, 2000, latents, model == "ea-vae")
    assert round(weights(built, guide) / 1e6, 2) == millions


def size_of_conv(maps, latents, scale):
    """The same for MNIST at 32×32, of encoder and decoder."""
    flat = 4 * maps * 16
    conv = 16 * maps + maps + 16 * maps * 2 * maps + 2 * maps + 16 * 2 * maps * 4 * maps + 4 * maps
    branch = maps * 256 * 20 + 20 if scale else 0
    heads = 2 * (flat * latents + latents) + (2 * 21 if scale else 0)
    back = 16 * 4 * maps * 2 * maps + 2 * maps + 16 * 2 * maps * maps + maps + 16 * maps + 1
    return conv + branch + heads, latents * flat + flat + back


@pytest.mark.parametrize(("model", "latents"), [("vae", 5), ("ea-vae", 4)])
def test_networks_for_mnist_have_the_size_of_the_paper(model, latents):
    found = cal.models.training(model, "mnist", by="authors", decoder={"name": "ea-vae-conv", "width": 4})
    built = cal.models.create(found.model, **found.arguments)
    encoder = {**found.guide["encoder"], "width": 4}
    guide = cal.guides.amortize(built, {"x": torch.rand(4, 1, 32, 32)}, **{**found.guide, "encoder": encoder})
    assert (weights(guide), weights(built)) == size_of_conv(4, latents, model == "ea-vae")
    full = cal.models.create(model, preset="mnist")
    assert weights(full) == size_of_conv(64, latents, model == "ea-vae")[1]
    assert inspect.signature(EAVAEConvEncoder).parameters["width"].default == 64


def test_the_scale_sees_its_own_branch_and_the_latents_see_the_rest():
    found = cal.models.training("ea-vae", "van-hateren", by="authors", shape=(1, 4, 4))
    model = cal.models.create("ea-vae", **found.arguments)
    x = {"x": torch.randn(6, 1, 4, 4)}
    guide = cal.guides.amortize(model, x, **found.guide)

    def distributions():
        with pyro.get_param_store().scope():
            nodes = pyro.poutine.trace(guide).get_trace(x, 6).nodes
        return nodes["scale"]["fn"].mean.detach(), nodes["z"]["fn"].mean.detach()

    before = distributions()
    with torch.no_grad():
        guide.encoder.branch[1].bias.add_(1.0)
    scale, z = distributions()
    assert not torch.allclose(scale, before[0])
    assert torch.equal(z, before[1])
    with torch.no_grad():
        guide.encoder.rest[0].bias.add_(1.0)
    assert torch.equal(distributions()[0], scale)
    assert not torch.allclose(distributions()[1], z)


def test_the_truncated_gamma_is_the_one_of_the_paper():
    """θ times a Gamma(2, 1) between 0.001 and 6.5: mean 1.936 θ, variance 1.642 θ², 1.1% cut away."""
    theta = torch.tensor([0.3, 2.0], dtype=torch.float64)
    q = TruncatedGamma(theta)
    torch.testing.assert_close(q.mean / theta, torch.full_like(theta, 1.936), rtol=1e-3, atol=0)
    torch.testing.assert_close(q.variance / theta**2, torch.full_like(theta, 1.642), rtol=1e-3, atol=0)
    grid = torch.linspace(0, 7, 70_001, dtype=torch.float64)[:, None] * theta
    density = q.log_prob(grid.clamp_min(1e-12)).exp()
    torch.testing.assert_close(torch.trapezoid(density, grid, dim=0), torch.ones_like(theta), rtol=1e-3, atol=0)
    assert q.log_prob(7 * theta).isneginf().all()
    torch.manual_seed(0)
    draws = q.rsample((DRAWS,))
    error = (draws.mean(0) - q.mean) / (q.stddev / DRAWS**0.5)
    assert (error.abs() < limit(2)).all()
    assert q.log_prob(draws).isfinite().all()


def test_draws_of_the_truncated_gamma_carry_the_gradient_of_their_scale():
    theta = torch.tensor(0.7, requires_grad=True)
    draws = TruncatedGamma(theta).rsample((1000,))
    (slope,) = torch.autograd.grad(draws.sum(), theta)
    torch.testing.assert_close(slope, (draws.detach() / 0.7).sum())


# -- training ----------------------------------------------------------------------------------------------------------


def images(model, preset, by, count=120):
    """Images that a training takes: real, binary, or grey for the cross-entropy."""
    draw = torch.Generator().manual_seed(0)
    shape = (count, *small(model, preset)["shape"])
    if preset != "mnist":
        return {"x": torch.randn(shape, generator=draw)}
    grey = torch.rand(shape, generator=draw)
    return {"x": grey if by == "authors" else grey.round()}


@pytest.mark.parametrize(("model", "preset", "by"), TRAININGS)
def test_every_training_runs_as_it_is_written(model, preset, by):
    found = cal.models.training(model, preset, by, **small(model, preset))
    assert (found.model, found.preset, found.by) == (model, preset, by)
    assert found.data_options["size"] == small(model, preset)["shape"][-1]
    assert set(found.data_options) <= set(next(iter(cal.data.list_data(found.data))).options)
    data, built = images(model, preset, by), cal.models.create(found.model, **found.arguments)
    assert built.recipe is not None
    guide = cal.guides.amortize(built, data, **found.guide)
    fit = cal.inference.fit(built, guide, data, **{**found.fit, "epochs": 1, "batch_size": 40})
    assert math.isfinite(fit.elbo)
    assert fit.is_elbo == ((preset, by) != ("mnist", "authors"))
    assert fit.kl_weights == schedules_of(found.fit.get("kl_weights"))
    assert by == "authors" or not fit.kl_weights


def test_the_settings_of_the_authors():
    at = {pair: cal.models.training(*pair, by="authors") for pair in BOTH}
    weight = {pair: found.fit["kl_weights"] for pair, found in at.items()}
    assert weight["ea-vae", "van-hateren"] == {"scale": 2.0}
    assert weight["vae", "van-hateren"] == {}
    assert weight["vae", "mnist"] == weight["ea-vae", "mnist"] == {"z": 4.0}
    assert weight["ea-vae", "natural-lognormal"] == {"scale": [[100, 10.0], [200, 1.0]]}
    assert weight["vae", "natural-softlaplace"] == {"z": [[100, 0.01], [200, 1.0]]}
    rates = {preset: (at["vae", preset].fit["lr"], at["vae", preset].fit["batch_size"]) for preset in NAMES}
    assert rates == {
        "van-hateren": (3e-5, 128),
        "natural-softlaplace": (3e-5, 512),
        "natural-lognormal": (3e-5, 512),
        "mnist": (1e-3, 128),
    }
    free = cal.models.create("ea-vae", **at["ea-vae", "natural-lognormal"].arguments | small("ea-vae", NAMES[2]))
    assert free.decoder.column_norm is None
    assert cal.models.create("ea-vae", preset=NAMES[2], **small("ea-vae", NAMES[2])).decoder.column_norm is not None


# -- cross-entropy of grey images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grey():
    """A VAE with one latent and four pixels, trained on cross-entropy with a small weight of the divergence, and the
    same model with the Bernoulli likelihood."""
    torch.manual_seed(0)
    arguments = {"preset": "mnist", "shape": (1, 2, 2), "latents": 1, "decoder": {"name": "mlp", "hidden": 8}}
    data = cal.data.Data({"x": torch.rand(400, 1, 1, 1) * torch.rand(400, 1, 2, 2)})
    model = cal.models.create("vae", **arguments, likelihood="cross-entropy")
    guide = cal.guides.amortize(model, data)
    fit = cal.inference.fit(
        model, guide, data, validation=data, epochs=15, batch_size=100, lr=1e-2, kl_weights={"z": 0.01}
    )
    bernoulli = cal.models.create("vae", **arguments, likelihood="bernoulli")
    bernoulli.load_state_dict(model.state_dict())
    return model, guide, fit, bernoulli, data


def binary_images():
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).reshape(16, 1, 2, 2)


def shares(x):
    """The probability `(n, 16)` of each binary image if a pixel is 1 with the probability of its grey value."""
    flat, b = x.flatten(1)[:, None], binary_images().flatten(1)
    return (flat.log() * b + (1 - flat).log() * (1 - b)).sum(-1).exp()


def log_probabilities(bernoulli, output):
    """Of each binary image, `(n, 16)`, given the outputs of the decoder."""
    fn = bernoulli.likelihood(output)
    return torch.stack([fn.log_prob(b.expand(len(output), 1, 2, 2)) for b in binary_images()], 1)


def test_cross_entropy_is_the_mean_log_probability_of_random_binarisations(grey):
    model, _, _, bernoulli, data = grey
    x = data.batch(torch.arange(20))[0]["x"].double().clamp(1e-6, 1 - 1e-6)
    with torch.no_grad():
        output = model.decoder(torch.randn(20, 1)).double()
        of_binary = log_probabilities(bernoulli, output)
        torch.testing.assert_close((shares(x) * of_binary).sum(1), model.likelihood(output).log_prob(x))


def test_the_unweighted_value_bounds_the_evidence_of_binarised_images_and_the_weighted_one_does_not(grey):
    _, _, fit, bernoulli, data = grey
    z = torch.linspace(-8, 8, 2001)[:, None]
    with torch.no_grad():
        rows = log_probabilities(bernoulli, bernoulli.decoder(z))
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0])
    evidence = (rows + log_prior[:, None] + math.log(16 / 2000)).logsumexp(0)
    assert abs(float(evidence.exp().sum()) - 1) < 1e-3
    x = data.batch(torch.arange(len(data)))[0]["x"].double().clamp(1e-6, 1 - 1e-6)
    mean = (shares(x) @ evidence.double()).numpy()
    assert fit.elbo < mean.mean()
    assert max(row["objective"] for row in fit.history) > mean.mean(), "a weighted objective is no bound"
    assert not fit.is_elbo


def test_the_bernoulli_model_has_posterior_reference_and_evidence(grey):
    model, guide, _, bernoulli, data = grey
    binary = {"x": data.batch(torch.arange(8))[0]["x"].round()}
    with pytest.raises(ProgramError, match="training loss"):
        cal.inference.posterior(model, guide, binary)
    tree = cal.inference.posterior(bernoulli, guide, binary, draws=50)
    stats = tree["sample_stats"]
    assert np.isfinite((stats["log_p"] - stats["log_q"]).values).all()
    assert np.isfinite(cal.inference.iwae_bound(bernoulli, guide, binary)["bound"].values).all()


# -- the command line --------------------------------------------------------------------------------------------------


def test_a_preset_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("patches.npz", x=np.random.default_rng(0).normal(size=(200, 1, 4, 4)).astype(np.float32))
    given = ("--data", "patches.npz", "--epochs", "1", "--batch-size", "40")
    good("fit", "ea-vae", *given, "--set", "preset=van-hateren", "--set", "prior=normal", "--out", "run")
    recipe = cal.load("run")[0].recipe
    assert (recipe.arguments["latents"], recipe.arguments["prior"]) == (17, "normal")
    assert recipe.arguments["multiplies"] == "output"
    said = refused("fit", "ea-vae", *given, "--set", "preset=van-hatern", "--out", "other")
    assert "unknown preset 'van-hatern' of the model 'ea-vae': did you mean van-hateren" in said
    assert "unknown preset 'mnist' of the model 'gsm': the model 'gsm' has none" in refused(
        "fit", "gsm", *given, "--set", "preset=mnist", "--out", "other"
    )


def test_presets_are_listed():
    out, _ = good("list", "presets")
    assert "ea-vae preset=natural-lognormal" in out
    assert "s ~ LogNormal(0, 1), x = W s·z + b + noise" in out


# -- the page ----------------------------------------------------------------------------------------------------------


NARROW = '{"name": "ea-vae-conv", "width": 2}'
SHORTER = {
    "shape=(1, 16, 16))": f"shape=(1, 16, 16), decoder={NARROW})",
    "**t.guide)": f'**{{**t.guide, "encoder": {NARROW}}})',
    "**t.fit)": '**{**t.fit, "epochs": 1})',
}


def test_the_examples_of_the_page_run(monkeypatch):
    page = (Path(__file__).parents[1] / "docs/presets.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))

    def some_images(name, size, values):
        assert (name, size) == ("mnist", 16)
        grey = torch.rand(260, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        return dict.fromkeys(("train", "test"), cal.data.Data({"x": grey.round() if values == "binarised" else grey}))

    monkeypatch.setattr(cal.data, "load", some_images)
    names: dict = {"cal": cal}
    for long, short in SHORTER.items():
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "docs/presets.md", "exec"), names)
    assert names["fit"].kl_weights == {"z": [[0.0, 4.0]]}
    assert names["posterior"]["posterior"].sizes["data"] == 100
    assert np.isfinite(names["evidence"]["bound"].values).all()
