"""Masks and scales: around observations, a density that nothing simulates; around latents, refused by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal, Normal

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.evaluation import calibration, posterior_calibration, predictive_check, weights
from calibrant.program import check_program, log_density, sample_prior

SEEN = torch.tensor([True, False, True, True, False, True])
X = {"x": torch.linspace(-1.0, 1.0, 6)}
PAIRS = {"x": torch.linspace(-1.0, 1.0, 12).reshape(6, 2)}
GIVEN = {"seen": SEEN}

# -- latents are neither masked nor scaled -----------------------------------------------------------------------------


def one(around=None, prior=lambda seen: dist.Normal(0.0, 1.0)):
    """A program with one latent: with a handler around it, or a distribution of its own."""

    def program(size, seen):
        with pyro.plate("data", size):
            with poutine.mask(mask=True) if around is None else around(seen):
                z = pyro.sample("z", prior(seen))
            pyro.sample("x", dist.Normal(z.reshape(size, -1).mean(-1), 0.5))

    return program


def handled(handler):
    """The whole program of a latent and its observation in a handler, as `@poutine.scale(scale=...)` does it."""

    @handler
    def program(size, seen):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5))

    return program


def shared(handler):
    def program(size, seen):
        with handler:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(z, 0.5))

    return program


def pair(mask):
    return one(prior=lambda seen: dist.Normal(0.0, 1.0).expand([len(seen), 2]).mask(mask(seen)).to_event(1))


def masked_component(seen):
    components = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).expand([len(seen), 2])
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components.mask(seen[:, None].expand(-1, 2)))


MASKED = {
    ".mask(covariate)": one(prior=lambda seen: dist.Normal(0.0, 1.0).expand([len(seen)]).mask(seen)),
    ".mask(False)": one(prior=lambda seen: dist.Normal(0.0, 1.0).mask(False)),
    ".mask of entries before .to_event": pair(lambda seen: torch.tensor([True, False])),
    ".mask of a covariate before .to_event": pair(lambda seen: seen[:, None].expand(-1, 2)),
    ".mask after .to_event": one(
        prior=lambda seen: dist.Normal(0.0, 1.0).expand([len(seen), 2]).to_event(1).mask(seen)
    ),
    ".mask of a component": one(prior=masked_component),
    ".mask of a base distribution": one(
        prior=lambda seen: dist.TransformedDistribution(
            dist.Normal(torch.zeros(len(seen)), 1.0).mask(seen), [dist.transforms.ExpTransform()]
        )
    ),
    "poutine.mask": one(lambda seen: poutine.mask(mask=seen)),
    "poutine.mask of the program": handled(poutine.mask(mask=False)),
    "a mask of a discrete latent": one(prior=lambda seen: dist.Bernoulli(0.3 * torch.ones(len(seen))).mask(seen)),
    "a mask of a shared latent": shared(poutine.mask(mask=torch.tensor(False))),
}
SCALED = {
    "poutine.scale": one(lambda seen: poutine.scale(scale=4.0)),
    "a scale from a covariate": one(lambda seen: poutine.scale(scale=1.0 + seen)),
    "a tensor": one(lambda seen: poutine.scale(scale=torch.tensor(0.5))),
    "poutine.handlers.scale": one(lambda seen: poutine.handlers.scale(scale=0.1)),
    "a decorated program": handled(poutine.scale(scale=0.5)),
    "a scale of a shared latent": shared(poutine.scale(scale=0.01)),
}


def normal_guide(observed, size, seen):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"], 0.5))


ENTRIES = {
    "check_program": lambda model: check_program(model, X, GIVEN),
    "amortize": lambda model: cal.guides.amortize(model, X, covariates=GIVEN),
    "fit": lambda model: cal.inference.fit(model, normal_guide, X, covariates=GIVEN, epochs=1),
    "posterior": lambda model: cal.inference.posterior(model, normal_guide, X, covariates=GIVEN),
    "reference": lambda model: cal.inference.reference(model, X, covariates=GIVEN),
    "calibration": lambda model: calibration(model, normal_guide, X, covariates=GIVEN),
    "check": lambda model: cal.evaluation.check(model, normal_guide, X, covariates=GIVEN),
}


@pytest.mark.parametrize("model", MASKED.values(), ids=MASKED)
def test_a_masked_latent_is_refused(model):
    with pytest.raises(ProgramError, match=r"latent 'z' is masked.*leave the mask out.*mask the observations alone"):
        check_program(model, X, GIVEN)


@pytest.mark.parametrize("model", SCALED.values(), ids=SCALED)
def test_a_scaled_latent_is_refused(model):
    with pytest.raises(ProgramError, match=r"latent 'z' has a scale of .*leave the scale out.*inverse scale around"):
        check_program(model, X, GIVEN)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("model", [MASKED["poutine.mask"], SCALED["poutine.scale"]], ids=["mask", "scale"])
def test_every_entry_point_refuses_it(entry, model):
    with pytest.raises(ProgramError, match=r"^latent 'z' (is masked|has a scale of 4)"):
        entry(model)


def guide_in(handler):
    def guide(observed, size, seen):
        with handler:
            normal_guide(observed, size, seen)

    return guide


def guide_of_masked_sites(observed, size, seen):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"], 0.5).mask(seen))


GUIDES = {
    "poutine.mask": guide_in(poutine.mask(mask=False)),
    ".mask": guide_of_masked_sites,
    "poutine.scale": guide_in(poutine.scale(scale=4.0)),
    "decorated": poutine.scale(normal_guide, scale=0.5),
}


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
def test_a_guide_is_neither_masked_nor_scaled(guide):
    for entry in (cal.inference.posterior, cal.inference.fit, calibration):
        with pytest.raises(ProgramError, match=r"the guide: latent 'z' .*leave the (mask|scale) out"):
            entry(one(), cal.guides.wrap(guide), X, covariates=GIVEN)


def test_a_mask_of_true_and_a_scale_of_one_change_nothing():
    def program(size):
        with pyro.plate("data", size), poutine.mask(mask=True), poutine.scale(scale=1.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(True))
            pyro.sample("x", dist.Normal(z, 0.5))

    check_program(program, X)
    values = sample_prior(program, 4)
    expected = Normal(0.0, 1.0).log_prob(values["z"]) + Normal(values["z"], 0.5).log_prob(values["x"])
    torch.testing.assert_close(log_density(program, values).joint, expected)


# -- the remedies: the observations are masked or scaled alone, and the numbers are right ------------------------------


def series(size, length):
    """Two steps, of which the second may be missing."""
    with pyro.plate("data", size):
        z0 = pyro.sample("z0", dist.Normal(0.0, 1.0))
        pyro.sample("x0", dist.Normal(z0, 0.5))
        z1 = pyro.sample("z1", dist.Normal(0.8 * z0, 1.0))
        pyro.sample("x1", dist.Normal(z1, 0.5).mask(length > 1))


def posterior_of_the_series(observed, size, length):
    prior = torch.tensor([[1.0, 0.8], [0.8, 1.64]])
    precision = torch.linalg.inv(prior) + torch.diag_embed(torch.stack([torch.ones(size), length > 1], -1) / 0.25)
    seen = torch.stack([observed["x0"], observed["x1"] * (length > 1)], -1) / 0.25
    with pyro.plate("data", size):
        mean = torch.linalg.solve(precision, seen)
        cov = torch.linalg.inv(precision)
        z0 = pyro.sample("z0", dist.Normal(mean[:, 0], cov[:, 0, 0].sqrt()))
        slope = cov[:, 0, 1] / cov[:, 0, 0]
        spread = (cov[:, 1, 1] - slope * cov[:, 0, 1]).sqrt()
        pyro.sample("z1", dist.Normal(mean[:, 1] + slope * (z0 - mean[:, 0]), spread))


def test_with_observations_masked_alone_a_missing_step_has_its_prior_and_the_evidence_is_exact():
    length = torch.tensor([1, 2] * 10)
    data = sample_prior(series, 20, {"length": length}, seed=0)
    data = {"x0": data["x0"], "x1": torch.where(length > 1, data["x1"], 0.0)}
    tree = cal.inference.posterior(series, posterior_of_the_series, data, 400, covariates={"length": length})
    found = weights(tree)
    x, prior = torch.stack([data["x0"], data["x1"]], 1), torch.tensor([[1.25, 0.8], [0.8, 1.89]])
    both = MultivariateNormal(torch.zeros(2), prior).log_prob(x)
    wanted = torch.where(length > 1, both, Normal(0.0, 1.25**0.5).log_prob(data["x0"]))
    assert found["log_evidence"].values == pytest.approx(wanted.numpy(), abs=1e-4)
    assert found["elbo"].values == pytest.approx(wanted.numpy(), abs=1e-4)


WEIGHT = 0.25


def weighted(likelihood):
    def program(size, weight):
        with pyro.plate("data", size):
            likelihood(pyro.sample("z", dist.Normal(0.0, 1.0)), weight)

    return program


def scaled_normal(scale):
    def likelihood(z, weight):
        with poutine.scale(scale=scale(weight)):
            pyro.sample("x", dist.Normal(z, 0.5))

    return likelihood


def scaled_event(z, weight):
    with poutine.scale(scale=WEIGHT):
        pyro.sample("x", dist.Normal(z[:, None], 0.5).expand([len(z), 1]).to_event(1).mask(weight > 0))


WEIGHTED = {
    "a number": weighted(scaled_normal(lambda weight: WEIGHT)),
    "a tensor": weighted(scaled_normal(lambda weight: torch.tensor(WEIGHT))),
    "a covariate": weighted(scaled_normal(lambda weight: weight)),
    "an event": weighted(scaled_event),
    "two scales": weighted(
        lambda z, weight: poutine.scale(lambda: scaled_normal(lambda weight: WEIGHT / 2)(z, weight), scale=2.0)()
    ),
    "a scaled function": weighted(
        lambda z, weight: poutine.handlers.scale(lambda: pyro.sample("x", dist.Normal(z, 0.5)), scale=WEIGHT)()
    ),
}


def posterior_of_weighted(observed, size, weight):
    """Normal with precision 1 + w / 0.25 = 2: what the inverse of a scale of 4 around the latent asks for."""
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"].reshape(size) / 2, 0.5**0.5))


def weighted_data(name):
    x = torch.linspace(-2.0, 2.0, 8)
    return {"x": x[:, None] if name == "an event" else x}, {"weight": torch.full((8,), WEIGHT)}


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_likelihood_has_the_posterior_of_its_weights(name):
    data, given = weighted_data(name)
    tree = cal.inference.posterior(WEIGHTED[name], posterior_of_weighted, data, 200, covariates=given)
    spread = (tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]).std(("chain", "draw"))
    assert float(spread.max()) < 1e-4
    x = data["x"].reshape(8).double()
    # ∫ N(z; 0, 1) N(x; z, ½)^w dz with w / ½² = 1
    wanted = Normal(0.0, 2**0.5).log_prob(x) + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    wanted = wanted - WEIGHT * 0.5 * torch.log(torch.tensor(2 * torch.pi * 0.25))
    assert weights(tree)["log_evidence"].values == pytest.approx(wanted.numpy(), abs=1e-4)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_likelihood_is_not_simulated(name):
    data, given = weighted_data(name)
    questions = [
        lambda model: calibration(model, posterior_of_weighted, data, covariates=given),
        lambda model: predictive_check(model, posterior_of_weighted, data, covariates=given),
        lambda model: posterior_calibration(model, lambda data, seed: None, data, covariates=given),
    ]
    for group in ("prior", "prior_predictive", "posterior_predictive"):
        questions.append(
            lambda model, group=group: cal.inference.posterior(
                model, posterior_of_weighted, data, 4, covariates=given, groups=[group]
            )
        )
    for question in questions:
        with pytest.raises(ProgramError, match=r"site 'x' is scaled, a weighted likelihood.*can't be simulated"):
            question(WEIGHTED[name])
    with pytest.warns(UserWarning, match=r"draws of \['x'\] ignore the scale"):
        sample_prior(WEIGHTED[name], 8, given)


@pytest.mark.slow
@pytest.mark.usefixtures("small_check")
def test_a_check_of_a_weighted_likelihood_leaves_out_what_simulates():
    data, given = weighted_data("a number")
    found = cal.evaluation.check(
        WEIGHTED["a number"], posterior_of_weighted, data, covariates=given, draws=500, simulations=100
    )
    assert found.result.calibration is None
    assert found.result.predictive is None
    notes = [note for note in found.result.config["notes"] if "'x' is scaled" in note]
    assert [note.partition(":")[0] for note in notes] == ["no calibration by simulation", "no predictive check"]
    assert "fail" not in [verdict.status for verdict in found.verdicts]
    mean = found.result.reference["posterior"]["z"].mean(("chain", "draw"))
    assert mean.values == pytest.approx(data["x"].numpy() / 2, abs=0.2)


# -- masks of observations ---------------------------------------------------------------------------------------------


def moving_mask(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(z > 0))


def moving_mask_around(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=(w + z) > 0):
            pyro.sample("x", dist.Normal(z, 1.0))


def moving_mixture(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        otherwise = dist.Normal(torch.zeros(size), 10.0)
        pyro.sample("x", dist.MaskedMixture(z > 0, otherwise, dist.Normal(z, 1.0)))


def missing_at_random(size):
    """The mask follows from another observation."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(y > 0))


def moving_number(size):
    w = pyro.sample("w", dist.Normal(0.5, 1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=w > 0):
            pyro.sample("x", dist.Normal(z + w, 1.0))


def test_one_number_computed_from_a_latent_is_no_mask_of_another():
    def program(size):
        w = pyro.sample("w", dist.Normal(0.5, 1.0))
        with pyro.plate("data", size):
            with poutine.mask(mask=w > 0):
                z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0))

    with pytest.raises(ProgramError, match="latent 'z' is masked"):
        check_program(program, X)


@pytest.mark.parametrize("program", [moving_mask, moving_mask_around, moving_number])
def test_a_mask_that_changes_with_a_latent_is_refused(program):
    with pytest.raises(ProgramError, match=r"mask of observed site 'x' changes with a latent.*dist.MaskedMixture\("):
        check_program(program, X)


def test_masks_from_covariates_and_other_observations_are_allowed_and_simulated():
    check_program(moving_mixture, X)
    check_program(missing_at_random, {**X, "y": torch.randn(6)})
    calibration(missing_at_random, missing_guide, {**X, "y": torch.randn(6)}, simulations=100, draws=50)


def missing_guide(observed, size):
    precision = 2.0 + (observed["y"] > 0)
    with pyro.plate("data", size):
        mean = (observed["y"] + torch.where(observed["y"] > 0, observed["x"], 0.0)) / precision
        pyro.sample("z", dist.Normal(mean, precision**-0.5))
