"""Every registered model, on the cases of its card: prior simulation, density, shapes, guide, training, storage, and
what users do wrong. A model of any kind is tested by existing."""

import math

import numpy as np
import pyro
import pytest
import torch
from cases import ModelCase, jittered, model_cases

import calibrant as cal
from calibrant.errors import CalibrantError, DataError, ProgramError

SHAPE = (1, 8, 8)
COMMON = {"shape": SHAPE, "latents": 3}
ALL = model_cases()
# Both structures on the first case of each model, the faithful one on all others.
TRAINED = [
    *(pytest.param((*p.values, "faithful"), id=f"{p.id}-faithful") for p in ALL),
    *(pytest.param((*p.values, "mean-field"), id=f"{p.id}-mean-field") for p in model_cases(first=True)),
]


@pytest.fixture(params=ALL)
def case(request):
    return request.param


@pytest.fixture
def model(case):
    return case.build()


def has_latents(model, data):
    return bool(cal.program.sites(model, *data[:4].tensors()))


def elbo(model, guide, data):
    """The ELBO; of a program without latents, its log density."""
    if not has_latents(model, data):
        return float(cal.inference.log_evidence(model, data).mean())
    stats = cal.inference.posterior(model, guide, data, draws=10)["sample_stats"]
    return float((stats["log_p"] - stats["log_q"]).mean())


def untrained(case, structure):
    model = case.build()
    data = case.data(model, 128)
    if not has_latents(model, data):
        return model, cal.guides.prior(model), data
    return model, cal.guides.amortize(model, data, structure=structure, seed=4), data


def train(model, guide, data):
    return cal.inference.fit(model, guide, data, epochs=4, batch_size=32, lr=3e-3, seed=1)


@pytest.fixture(scope="module", params=TRAINED)
def trained(request):
    """A model and its guide after a short training, and what was known before it."""
    case, structure = request.param
    model, guide, data = untrained(case, structure)
    latents = has_latents(model, data)
    fresh = cal.inference.posterior(model, guide, data, draws=4, seed=0)["posterior"].dataset if latents else {}
    found = {"case": case, "structure": structure, "fresh": fresh, "start": elbo(model, guide, data)}
    return {**found, "fit": train(model, guide, data), "model": model, "guide": guide, "data": data}


def test_the_models_of_the_papers_are_registered():
    assert {"ppca", "gsm", "vae", "ea-vae"} <= set(cal.models.list_models())


@pytest.mark.parametrize("name", cal.models.list_models())
def test_a_card_says_what_the_model_is_and_has_cases(name):
    card = cal.models.card(name)
    assert all((card.name, card.paper, card.equations, card.licence, card.cls.__doc__))
    assert card.cases
    assert all(case.observed for case in card.cases)
    assert len({case.name or str(case.arguments) for case in card.cases}) == len(card.cases)


# -- the program -------------------------------------------------------------------------------------------------------


def test_prior_simulation_fits_the_contract(case, model):
    values = case.values(model, 5)
    observed = {name: values[name] for name in case.case.observed}
    assert {name: tuple(value.shape) for name, value in observed.items()} == {
        name: (5, *shape) for name, shape in case.case.observed.items()
    }
    assert cal.program.check_program(model, observed, case.covariates(5)) is model
    again = case.values(model, 5)
    assert all(torch.equal(values[name], again[name]) for name in values)  # a seed gives the same draws


def test_density_is_that_of_pyro(case, model):
    values, covariates = case.values(model, 4, seed=2), case.covariates(4)
    density = cal.program.log_density(model, values, 4, covariates, observed=case.case.observed)
    with pyro.get_param_store().scope():
        run = pyro.poutine.trace(pyro.condition(model, data=values)).get_trace(4, **covariates)
    torch.testing.assert_close(density.joint.sum(), run.log_prob_sum())
    torch.testing.assert_close(density.joint.sum(), density.latent.sum() + density.observed.sum())
    assert all(term.shape in ((4,), ()) for term in density.values())
    assert all(density[name].shape == (4,) for name in case.case.observed)


def test_shapes_do_not_depend_on_the_number_of_data(case, model):
    latents = cal.program.sites(model, *case.data(model, 4).tensors())
    for size in (1, 2, 7):
        values = case.values(model, size, seed=0)
        for name, site in latents.items():
            assert values[name].shape == ((size,) if site.local else ()) + tuple(site.event_shape)


def test_float64_run_agrees_and_leaves_the_module_alone(case, model):
    values, covariates = case.values(model, 4, seed=2), case.covariates(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    single = cal.program.log_density(model, values, 4, covariates, observed=case.case.observed).joint
    wide, wide_covariates = (
        {name: value.double() if value.is_floating_point() else value for name, value in part.items()}
        for part in (values, covariates)
    )
    with cal.program.defaults(model, wide, torch.float64):
        program = cal.program.in_double(model)
        double = cal.program.log_density(program, wide, 4, wide_covariates, observed=case.case.observed).joint
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_latent_says_something_of_what_is_observed(case, model):
    jittered(model)
    latents = cal.program.sites(model, *case.data(model, 4).tensors())
    reached, more = set(case.case.observed), True
    while more:  # back from the observations, through other latents
        more = {name for name, site in latents.items() if set(site.children) & reached} - reached
        reached |= more
    assert reached >= set(latents)


def test_the_exact_posterior_is_found_where_the_card_says(case, model):
    data = case.data(model, 4)
    if not case.case.is_exact:
        with pytest.raises(CalibrantError, match="no exact posterior" if has_latents(model, data) else "no latents"):
            cal.inference.reference(model, data, method="exact")
        return
    tree = cal.inference.reference(model, data, draws=10)
    assert tree["posterior"].attrs["method"] == "exact"
    assert bool(tree["convergence"]["is_reference"].all())


# -- guide, training, storage ------------------------------------------------------------------------------------------


def test_fresh_guide_is_near_the_prior(trained):
    case, model = trained["case"], trained["model"]
    runs = [case.values(case.build(), 100, seed=seed) for seed in range(40)]  # each with its own shared latents
    latents = cal.program.sites(model, *trained["data"].tensors())
    assert sorted(trained["fresh"]) == sorted(latents)
    for name in (name for name, site in latents.items() if site.local):
        draws, expected = trained["fresh"][name].values, torch.cat([run[name] for run in runs]).double().numpy()
        low, high = np.quantile(expected, 0.01), np.quantile(expected, 0.99)
        inside = ((draws >= low) & (draws <= high)).mean()
        assert inside > 0.9, (name, inside)


def test_training_raises_the_elbo(trained):
    model, guide, fit = trained["model"], trained["guide"], trained["fit"]
    assert fit.epochs == len(fit.history) == 4
    assert elbo(model, guide, trained["data"]) > trained["start"]
    assert not model.training
    assert not guide.training


def test_training_is_reproducible(trained):
    again = train(*untrained(trained["case"], trained["structure"]))
    assert [row["validation"] for row in again.history] == [row["validation"] for row in trained["fit"].history]


def test_save_and_load_give_the_same_weights_draws_and_densities(trained, tmp_path):
    pair = trained["model"], trained["guide"]
    cal.store.save_run(tmp_path / "run", *pair, trained["fit"])
    loaded = cal.load(tmp_path / "run")
    for ours, theirs in zip(pair, loaded, strict=True):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
        assert not theirs.training
    assert loaded[0].recipe == pair[0].recipe
    if not has_latents(loaded[0], trained["data"]):
        return
    trees = [cal.inference.posterior(*modules, trained["data"][:32], draws=3, seed=1) for modules in (pair, loaded)]
    for group in ("posterior", "sample_stats"):
        assert trees[0][group].dataset.identical(trees[1][group].dataset)


# -- what users do wrong -----------------------------------------------------------------------------------------------


def test_users_mistakes(case, model):
    observed, covariates = case.data(model, 4).tensors()
    name, good = next(iter(observed.items()))
    with pytest.raises(ProgramError, match="never samples 'nothing of the kind'"):
        cal.program.check_program(model, {"nothing of the kind": good}, covariates)
    with pytest.raises(DataError, match="shape"):
        cal.program.check_program(model, {**observed, name: good[..., None]}, covariates)
    spoiled = good.clone()
    spoiled[2] = math.nan
    with pytest.raises(DataError, match="not finite at datum 2"):
        cal.program.check_program(model, {**observed, name: spoiled}, covariates)
    with pytest.raises(DataError, match="no covariates"):
        cal.program.check_program(model, observed, {**covariates, "nothing_of_the_kind": torch.zeros(4)})
    for missing in covariates:
        rest = {key: value for key, value in covariates.items() if key != missing}
        with pytest.raises(DataError, match=missing):
            cal.program.check_program(model, observed, rest)


@pytest.mark.parametrize("case", model_cases(first=True))
def test_wrong_arguments(case):
    with pytest.raises(ProgramError, match="number_of_the_beast"):
        cal.models.create(case.model, **case.case.arguments, number_of_the_beast=3)
    with pytest.raises(ProgramError, match="did you mean"):
        cal.models.create(case.model + "x")


def test_a_name_is_registered_once():
    def another(module):
        return type("Another", (torch.nn.Module,), {"__module__": module})

    about = {"paper": "none", "equations": "none", "licence": "none"}
    with pytest.raises(ProgramError, match="'vae' is given to two"):
        cal.models.register_model("vae", **about)(another("somewhere.else"))
    assert cal.models.card("vae").cls is cal.models.VAE
    card = cal.models.card("vae")  # a notebook cell that is run again registers the same class anew
    cal.models.register_model(
        "vae",
        paper=card.paper,
        equations=card.equations,
        licence=card.licence,
        cases=card.cases,
        presets=card.presets,
    )(card.cls)
    assert cal.models.card("vae") == card


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


def build(**arguments):
    return ModelCase("ea-vae", cal.models.Case({**COMMON, **arguments}, {"x": SHAPE})).build()


def test_columns_of_the_linear_ea_vae_keep_their_norm():
    model = build()
    data = {"x": cal.program.sample_prior(model, 48, seed=1)["x"]}
    guide = cal.guides.amortize(model, data)
    cal.inference.fit(model, guide, data, epochs=2, batch_size=16, lr=1e-2)
    torch.testing.assert_close(model.decoder.weight.norm(dim=0), torch.full((3,), (64 / 3) ** 0.5))


def test_scale_multiplies_what_it_says():
    scale, z = torch.tensor([0.5, 2.0]), torch.randn(2, 3)
    latents, output = (build(multiplies=what) for what in ("latents", "output"))
    for model in (latents, output):
        torch.nn.init.constant_(model.decoder.bias, 1.0)
    torch.testing.assert_close(latents.scaled(scale, z), latents.decoder(scale[:, None] * z))
    torch.testing.assert_close(output.scaled(scale, z), scale[:, None, None, None] * output.decoder(z))
    assert not torch.allclose(latents.scaled(scale, z), output.scaled(scale, z))
