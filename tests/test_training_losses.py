"""Training losses that are no densities: they are trained, and refused by name wherever a density is needed."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import parameters
from commands import good, refused
from pyro.nn import PyroModule
from torch import nn

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.program.tracing import guide_trace

CARDS = [card for card in cal.models.list_likelihoods() if not card.cls.is_density]
ALL = parameters([(card.name, case, (card.name, case)) for card in CARDS for case in card.cases])
PROPER = {
    "gaussian-optimal-per-image": "'student-t-radius', or draw .* as the model 'sigma-image-vae' does",
    "cross-entropy": "'continuous-bernoulli', or 'bernoulli' on data that are binarised",
}
SHAPE = (1, 4, 4)


def grey(count=60):
    return {"x": torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))}


def vae(name):
    return cal.models.create("vae", shape=SHAPE, latents=2, likelihood=name)


@pytest.mark.parametrize("named", ALL)
def test_the_class_and_its_distribution_say_that_it_is_no_density(named):
    name, case = named
    likelihood = cal.models.make_likelihood({"name": name, **case.arguments})
    shape = case.observed["x"]
    fn = likelihood(torch.randn(5, *shape))
    assert (tuple(fn.batch_shape), tuple(fn.event_shape)) == ((5,), shape)
    x = torch.rand(5, *shape)
    assert fn.support.check(x).all()
    assert fn.log_prob(x).shape == (5,)
    assert fn.expand([3, 5]).log_prob(x.expand(3, 5, *shape)).shape == (3, 5)
    with pytest.raises(ProgramError, match=f"'x'.*is a training loss and no density.*'{name}', use {PROPER[name]}"):
        cal.program.sample_prior(cal.models.create("vae", shape=shape, latents=2, likelihood=likelihood), 3)


def test_the_loss_of_an_image_is_that_of_the_normal_at_its_own_error():
    x, mean = (torch.randn(7, *SHAPE, dtype=torch.float64) for _ in range(2))
    found = cal.models.make_likelihood("gaussian-optimal-per-image")(mean).log_prob(x)
    scale = (x - mean).square().flatten(1).mean(1).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, dist.Normal(mean, scale).to_event(3).log_prob(x))


def test_cross_entropy_is_that_of_torch():
    x, logits = torch.rand(7, *SHAPE), torch.randn(7, *SHAPE)
    found = cal.models.make_likelihood("cross-entropy")(logits).log_prob(x)
    wanted = -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(found, wanted)


REFUSED = {
    "sample_prior": lambda m, g, d: cal.program.sample_prior(m, 3),
    "posterior": lambda m, g, d: cal.inference.posterior(m, g, d),
    "reference": lambda m, g, d: cal.inference.reference(m, d),
    "log_evidence": lambda m, g, d: cal.inference.log_evidence(m, d),
    "gap": lambda m, g, d: cal.evaluation.gap(m, g, d, None),
    "check": lambda m, g, d: cal.evaluation.check(m, g, d),
    "calibration": lambda m, g, d: cal.evaluation.calibration(m, g, d),
    "predictive_check": lambda m, g, d: cal.evaluation.predictive_check(m, g, d),
    "posterior_calibration": lambda m, g, d: cal.evaluation.posterior_calibration(m, lambda *args: None, d),
    "refine": lambda m, g, d: cal.guides.refine(m, g, d),
}


@pytest.mark.parametrize("name", PROPER)
def test_it_is_trained_as_no_elbo_and_refused_elsewhere(name):
    model, data = vae(name), grey()
    guide = cal.guides.amortize(model, data)
    said = []
    fit = cal.inference.fit(model, guide, data, epochs=2, progress=lambda *args: said.append(args[-1]))
    assert not fit.is_elbo
    assert fit.history[-1]["validation"] > fit.history[0]["validation"] - 5
    assert said[-1].startswith("held-out value of a training loss, no ELBO: ")
    assert guide_trace(guide, data, 60, {}).nodes["z"]["value"].shape == (60, 2), "the guide draws by itself"
    for function in REFUSED.values():
        with pytest.raises(ProgramError, match=rf"'x'.*training loss.*'{name}', use {PROPER[name]}"):
            function(model, guide, data)


def test_a_density_has_an_elbo():
    model, data = vae("gaussian-optimal"), grey()
    guide = cal.guides.amortize(model, data)
    assert cal.inference.fit(model, guide, data, epochs=1).is_elbo


def test_the_commands_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("grey.npz", x=grey(200)["x"].numpy())
    given = ("vae", "--data", "grey.npz", "--set", "latents=2", "--set", "likelihood=cross-entropy", "--epochs", "2")
    assert "'cross-entropy', use 'continuous-bernoulli'" in refused("run", *given, "--out", "run")
    assert not (tmp_path / "run").exists(), "before anything is trained"
    out, _ = good("fit", *given, "--out", "fit")
    assert "held-out value of a training loss, no ELBO: " in out
    assert "note: the likelihood is a training loss and no density" in out
    assert "check it with" not in out
    assert "'cross-entropy', use 'continuous-bernoulli'" in refused("check", "fit")


# -- users' own distributions ------------------------------------------------------------------------------------------


class OwnScale(dist.Normal):
    """A noise scale from the values of each row, or a proper one."""

    def __init__(self, loc, power, validate_args=None):
        self.power = power
        super().__init__(loc, torch.ones_like(loc), validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape), self.power)

    def log_prob(self, value):
        entries = value.shape[-1]
        error = (value - self.loc).square().mean(-1, keepdim=True)
        return (-0.5 * (self.power + entries) / entries * (error + 0.1 * (self.power > 0)).log()).expand(value.shape)


class Declared(OwnScale):
    is_density = False


class OwnModel(PyroModule):
    def __init__(self, power, cls=OwnScale):
        super().__init__()
        self.power, self.cls = power, cls
        self.weight = nn.Parameter(torch.randn(2, 16))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            return pyro.sample("x", self.cls(z @ self.weight, self.power).to_event(1))


def test_a_scale_from_the_observation_is_refused_by_its_mass_and_the_remedy_works():
    data = {"x": torch.randn(40, 16)}
    with pytest.raises(ProgramError, match=r"'x' has infinite mass.*−16.*16 entries.*is_density = False"):
        cal.program.check_program(OwnModel(0.0), data)
    cal.program.check_program(OwnModel(0.01), data)  # the tails of a Student-t with a hundredth of a degree of freedom
    model = OwnModel(0.0, Declared)
    guide = cal.guides.amortize(model, data)
    assert not cal.inference.fit(model, guide, data, epochs=1).is_elbo
    with pytest.raises(ProgramError, match=r"'x' .Declared. is a training loss.*choose a likelihood with a density"):
        cal.inference.posterior(model, guide, data)


class Heavy(PyroModule):
    """Proper densities with heavy or awkward tails."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            return pyro.sample("x", self.fn(z))


PROPER_TAILS = {
    "cauchy": lambda z: dist.Cauchy(z, 1.0).to_event(1),
    "student-t": lambda z: dist.StudentT(0.01, z, 1.0).to_event(1),
    "angles": lambda z: dist.VonMises(z, 2.0).to_event(1),
    "masked": lambda z: dist.Normal(z, 1.0).mask(torch.tensor([True, False, False, True])).to_event(1),
    "laplace": lambda z: dist.Laplace(z, 1.0).to_event(1),
    "multivariate student-t": lambda z: dist.MultivariateStudentT(torch.tensor(0.05), z, torch.eye(4)),
}


@pytest.mark.parametrize("name", PROPER_TAILS)
def test_proper_tails_are_taken(name):
    x = torch.rand(20, 4) - 0.5
    cal.program.check_program(Heavy(PROPER_TAILS[name]), {"x": x})
