"""Every registered model, by existing: prior simulation, density, shapes, guide, training, storage, users' errors."""

import pyro
import pytest
import torch

import calibrant as cal
from calibrant.errors import CalibrantError, DataError, ProgramError

SHAPE = (1, 8, 8)
COMMON = {"shape": SHAPE, "latents": 3}
# Options of a model beyond its defaults, so that every branch of every constructor is run.
VARIANTS = {
    "ppca": [{"noise": "diagonal"}],
    "gsm": [
        {"scale_prior": "gamma"},
        {"scale_prior": {"name": "rayleigh", "scale": 2.0}},
        {"dictionary": torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).tolist()},
        {"covariance": [[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]], "learn_noise": False},
    ],
    "vae": [
        {"prior": "laplace", "decoder": "mlp"},
        {"decoder": "conv", "likelihood": {"name": "gaussian", "scale": 0.1, "learn": False}},
        {"decoder": "mlp", "likelihood": "bernoulli"},
    ],
    "ea-vae": [
        {"scale_prior": "gamma", "multiplies": "output"},
        {"scale_prior": "softplus-laplace", "prior": "laplace", "decoder": "mlp"},
        {"multiplies": "logits", "decoder": "conv"},
        {"multiplies": "output", "decoder": "conv", "prior": "laplace"},
    ],
}
CASES = [(name, variant) for name in cal.models.list_models() for variant in [{}, *VARIANTS.get(name, [])]]
STRUCTURES = ("mean-field", "faithful")


def build(name, variant):
    torch.manual_seed(3)
    return cal.models.create(name, **{**COMMON, **variant})


def simulate(model, size=48):
    return {"x": cal.program.sample_prior(model, size, seed=1)["x"]}


@pytest.fixture(
    params=CASES, ids=lambda case: "-".join([case[0], *(f"{key}={str(value)[:12]}" for key, value in case[1].items())])
)
def case(request):
    return request.param


@pytest.fixture
def model(case):
    return build(*case)


def test_every_option_of_the_issue_is_registered():
    assert {"ppca", "gsm", "vae", "ea-vae"} <= set(cal.models.list_models())


def test_card_names_its_source(case):
    card = cal.models.card(case[0])
    assert all((card.paper, card.equations, card.licence, card.cls.__doc__))


def test_prior_simulation_fits_the_contract(model):
    values = simulate(model, 5)
    assert values["x"].shape == (5, *SHAPE)
    assert cal.program.check_program(model, values) is model
    assert torch.equal(values["x"], simulate(model, 5)["x"])  # a seed gives the same draws


def test_density_is_that_of_pyro(model):
    values = cal.program.sample_prior(model, 4, seed=2)
    density = cal.program.log_density(model, values, observed=["x"])
    run = pyro.poutine.trace(pyro.condition(model, data=values)).get_trace(4)
    torch.testing.assert_close(density.joint.sum(), run.log_prob_sum())
    torch.testing.assert_close(density.joint, density.latent + density.observed)
    assert all(term.shape == (4,) for term in density.values())


def test_shapes_do_not_depend_on_the_number_of_data(model):
    for size in (1, 2, 7):
        values = cal.program.sample_prior(model, size, seed=0)
        assert all(len(value) == size for value in values.values())


def test_float64_run_agrees_and_leaves_the_module_alone(model):
    values = cal.program.sample_prior(model, 4, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with cal.program.defaults(model, values, torch.float64):
        double = cal.program.log_density(
            cal.program.in_double(model), {name: value.double() for name, value in values.items()}, observed=["x"]
        ).joint
    assert double.dtype == torch.float64
    single = cal.program.log_density(model, values, observed=["x"]).joint
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fresh_guide_is_near_the_prior(model, structure):
    observed = simulate(model, 400)
    guide = cal.guides.amortize(model, observed, structure=structure)
    tree = cal.inference.posterior(model, guide, observed, draws=4, seed=0)["posterior"].dataset
    prior = cal.program.sample_prior(model, 4000, seed=5)
    assert list(tree.data_vars) == list(cal.program.sites(model, observed))
    for name, draws in tree.data_vars.items():
        low, high = prior[name].quantile(0.01), prior[name].quantile(0.99)
        inside = ((draws.values > float(low)) & (draws.values < float(high))).mean()
        assert inside > 0.9, (name, inside)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_training_raises_the_elbo(model, structure):
    observed = simulate(model, 200)
    guide = cal.guides.amortize(model, observed, structure=structure)
    start = cal.inference.posterior(model, guide, observed, draws=10)["sample_stats"]
    fit = cal.inference.fit(model, guide, observed, epochs=4, batch_size=32, lr=3e-3, seed=1)
    end = cal.inference.posterior(model, guide, observed, draws=10)["sample_stats"]
    assert fit.epochs == len(fit.history) == 4
    assert float((end["log_p"] - end["log_q"]).mean()) > float((start["log_p"] - start["log_q"]).mean())
    assert not model.training
    assert not guide.training


def test_training_is_reproducible(case):
    losses = []
    for _ in range(2):
        model = build(*case)
        guide = cal.guides.amortize(model, simulate(model), seed=4)
        fit = cal.inference.fit(model, guide, simulate(build(*case)), epochs=2, batch_size=16, seed=2)
        losses.append([row["validation"] for row in fit.history])
    assert losses[0] == losses[1]


def test_save_and_load_give_the_same_densities(case, tmp_path):
    model = build(*case)
    observed = simulate(model)
    guide = cal.guides.amortize(model, observed)
    fit = cal.inference.fit(model, guide, observed, epochs=1, batch_size=16)
    cal.store.save_run(tmp_path / "run", model, guide, fit)
    model2, guide2 = cal.load(tmp_path / "run")
    trees = [cal.inference.posterior(m, g, observed, draws=3, seed=1) for m, g in ((model, guide), (model2, guide2))]
    for group in ("posterior", "sample_stats"):
        assert trees[0][group].dataset.identical(trees[1][group].dataset)


def test_the_exact_posterior_is_found_where_it_should_be(case):
    name, variant = case
    model = build(name, variant)
    gaussian = variant.get("likelihood", "gaussian") != "bernoulli" and variant.get("multiplies") != "logits"
    linear = variant.get("decoder", "linear") == "linear" and variant.get("prior", "normal") == "normal"
    if not (linear and gaussian):
        with pytest.raises(CalibrantError, match="no exact posterior"):
            cal.inference.reference(model, simulate(model, 2), method="exact")
        return
    tree = cal.inference.reference(model, simulate(model, 4), draws=10)
    assert tree["posterior"].attrs["method"] == "exact"
    assert bool(tree["convergence"]["is_reference"].all())


def test_users_mistakes(model):
    good = simulate(model, 4)["x"]
    with pytest.raises(ProgramError, match="never samples 'image'"):
        cal.program.check_program(model, {"image": good})
    with pytest.raises(DataError, match="shape"):
        cal.program.check_program(model, {"x": good[:, :, :4]})
    with pytest.raises(DataError, match="not finite at datum 2"):
        cal.program.check_program(model, {"x": torch.where(torch.arange(4)[:, None, None, None] == 2, torch.nan, good)})
    with pytest.raises(DataError, match="no covariates"):
        cal.program.check_program(model, {"x": good}, {"label": torch.zeros(4)})


@pytest.mark.parametrize("name", cal.models.list_models())
def test_wrong_arguments(name):
    with pytest.raises(ProgramError, match="latent_size"):
        cal.models.create(name, shape=SHAPE, latent_size=3)
    with pytest.raises(ProgramError, match="did you mean"):
        cal.models.create(name + "x")


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("vae", {"prior": "cauchy"}, "cauchy"),
        ("vae", {"decoder": "transformer"}, "transformer"),
        ("vae", {"likelihood": "poisson"}, "poisson"),
        ("vae", {"likelihood": {"name": "gaussian", "sigma": 1.0}}, "sigma"),
        ("vae", {"likelihood": {"name": "gaussian", "scale": -1.0}}, "positive"),
        ("vae", {"latents": 0}, "latents"),
        ("vae", {"decoder": "conv", "shape": (5,)}, "conv"),
        ("ea-vae", {"scale_prior": "rayleigh"}, "rayleigh"),
        ("ea-vae", {"scale_prior": {"name": "gamma", "shape": 2.0}}, "shape"),
        ("ea-vae", {"multiplies": "everything"}, "everything"),
        ("ea-vae", {"multiplies": "output", "likelihood": "bernoulli"}, "logits"),
        ("ea-vae", {"multiplies": "logits", "likelihood": "gaussian"}, "logits"),
        ("gsm", {"dictionary": [[1.0, 2.0]]}, "dictionary"),
        ("gsm", {"covariance": [[1.0, 2.0], [2.0, 1.0]], "latents": 2}, "covariance"),
        ("ppca", {"noise": "pink"}, "pink"),
    ],
)
def test_wrong_values(name, arguments, word):
    with pytest.raises(ProgramError, match=word):
        cal.models.create(name, **{**COMMON, **arguments})


def test_columns_of_the_linear_ea_vae_keep_their_norm():
    model = build("ea-vae", {})
    guide = cal.guides.amortize(model, simulate(model))
    cal.inference.fit(model, guide, simulate(model), epochs=2, batch_size=16, lr=1e-2)
    torch.testing.assert_close(model.decoder.weight.norm(dim=0), torch.full((3,), (64 / 3) ** 0.5))


def test_scale_multiplies_what_it_says():
    scale, z = torch.tensor([0.5, 2.0]), torch.randn(2, 3)
    latents, output = (build("ea-vae", {"multiplies": what}) for what in ("latents", "output"))
    for model in (latents, output):
        torch.nn.init.constant_(model.decoder.bias, 1.0)
    torch.testing.assert_close(latents.scaled(scale, z), latents.decoder(scale[:, None] * z))
    torch.testing.assert_close(output.scaled(scale, z), scale[:, None, None, None] * output.decoder(z))
    assert not torch.allclose(latents.scaled(scale, z), output.scaled(scale, z))
