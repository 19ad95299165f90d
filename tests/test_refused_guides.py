"""Guides that break the contract are refused: by name, and with the remedy."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from refused import (  # noqa
    IMAGES,
    Case,
    X,
    conjugate,
    decoder_of,
    in_eval,
    module,
    plain,
    random_weight,
    tensor_attribute,
    through_decoder,
    weight,
)
from torch import nn
from torch.distributions import AffineTransform, constraints

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError


def normal_guide(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"], 1.0))


def positive(size):
    with pyro.plate("data", size):
        rate = pyro.sample("z", dist.Exponential(1.0))
        pyro.sample("x", dist.Normal(rate, 1.0))


def two_entries(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def two_levels(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def guide_without_event(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"][:, None].expand(-1, 4), 1.0))


def guide_of_another_site(observed, size):
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(observed["x"], 1.0))


def guide_without_plate(observed, size):
    pyro.sample("z", dist.Normal(observed["x"], 1.0).to_event(1))


def guide_with_minibatch(observed, size):
    with pyro.plate("data", 2 * size, subsample_size=size):
        pyro.sample("z", dist.Normal(observed["x"], 1.0))


def guide_that_centres(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"] - observed["x"].mean(), 1.0))


def guide_with_param(observed, size):
    scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"], scale))


def guide_with_scale(observed, size):
    with poutine.scale(scale=0.5):
        normal_guide(observed, size)


def guide_with_dropout(self, observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(self.dropout(observed["x"]), 1.0))


def guide_of_a_tensor(x, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def guide_of_data(x, y=None):
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal(x, 1.0))


def guide_of_one_argument(x):
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal(x, 1.0))


def guide_of_a_point(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Delta(observed["x"]))


def guide_that_observes(observed, size):
    normal_guide(observed, size)
    with pyro.plate("rows", size):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=observed["x"])


def guide_with_noise(observed, size):
    with pyro.plate("data", size):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(observed["x"] + 0.5 * noise, log_density=0.7))


def guide_with_transformed_noise(observed, size):
    """The remedy of the one before."""
    with pyro.plate("data", size):
        noise = dist.Normal(torch.zeros(size), 1.0)
        pyro.sample("z", dist.TransformedDistribution(noise, [AffineTransform(observed["x"], 0.5)]))


def guide_of_half_a_plate(observed, size):
    with pyro.plate("data", size, subsample_size=size // 2) as rows:
        pyro.sample("z", dist.Normal(observed["x"][rows], 1.0))


DICT = ("'dict'", "a guide takes (observed, size, **covariates)", "dict with a tensor per observed site")
GUIDES = {
    "a tensor as observed": (conjugate, plain(guide_of_a_tensor), DICT),
    "guide(x, y=None)": (conjugate, plain(guide_of_data), DICT),
    "guide(x)": (conjugate, plain(guide_of_one_argument), ("this one (x)", "(observed, size, **covariates)")),
    "AutoNormal": (
        conjugate,
        lambda: AutoNormal(conjugate),
        ("AutoNormal", 'calibrant.guides.amortize(model, observed, "mean-field")'),
    ),
    "AutoMultivariateNormal": (
        conjugate,
        lambda: AutoMultivariateNormal(conjugate),
        ("AutoMultivariateNormal", 'calibrant.guides.amortize(model, observed, "full")'),
    ),
    "point": (conjugate, plain(guide_of_a_point), ("'z'", "point mass", "draw it from a distribution")),
    "observed site": (conjugate, plain(guide_that_observes), ("leave the observed sites ['x'] out",)),
    "auxiliary site": (conjugate, plain(guide_with_noise), ("leave ['noise'] out", "dist.TransformedDistribution")),
    "too few sites": (two_levels, plain(normal_guide), ("sample ['w'] too",)),
    "half a plate": (conjugate, plain(guide_of_half_a_plate), ('pyro.plate("data", size)', "subsample_size")),
    "support": (positive, plain(normal_guide), ("'z'", "outside the model's support", "choose a family")),
    "event": (two_entries, plain(guide_without_event), ("'z'", ".to_event(")),
    "shape": (two_entries, plain(normal_guide), ("'z'", "(4,)", "(4, 4)")),
    "name": (conjugate, plain(guide_of_another_site), ("['y']", "['z']")),
    "plate": (conjugate, plain(guide_without_plate), ("'z'", "data plate", "not of both")),
    "minibatch": (conjugate, plain(guide_with_minibatch), ("'z'", "subsample_size")),
    "mixing": (conjugate, plain(guide_that_centres), ("'z'", "that datum")),
    "scale": (conjugate, plain(guide_with_scale), ("'z'", "scale of 0.5", "leave the scale out")),
    "pyro.param": (conjugate, plain(guide_with_param), ("['scale']", "nn.Parameter")),
    "dropout": (
        conjugate,
        module(lambda: {"dropout": nn.Dropout(0.5)}, guide_with_dropout),
        ("'dropout'", "training mode", ".eval()"),
    ),
}


@pytest.mark.parametrize(("model", "build", "words"), GUIDES.values(), ids=GUIDES)
def test_guide_that_does_not_fit_is_refused(model, build, words):
    observed = {"x": torch.linspace(-1.0, 1.0, 6)}
    with pytest.raises(ProgramError) as caught:
        cal.inference.posterior(model, build(), observed, draws=2)
    message = str(caught.value)
    assert message.startswith("the guide: ")
    assert not [word for word in words if word not in message], message


def test_dropout_of_a_guide_may_stay_in_eval_but_not_be_trained():
    guide, observed = GUIDES["dropout"][1]().eval(), {"x": torch.linspace(-1.0, 1.0, 6)}
    cal.inference.posterior(conjugate, guide, observed, draws=2)
    with pytest.raises(ProgramError, match=r"density of \['z'\] changes from run to run .*p=0"):
        cal.inference.fit(conjugate, guide, observed, epochs=1)
    guide.dropout.p = 0.0
    with pytest.raises(InferenceError, match="nothing to train"):
        cal.inference.fit(conjugate, guide, observed, epochs=1)


@pytest.mark.parametrize("built", [True, False])
def test_wrap_refuses_what_the_run_would(built):
    """A guide of Pyro's own and one of another signature are refused before there are any data."""
    with pytest.raises(ProgramError, match="guides.amortize" if built else "this one"):
        cal.guides.wrap(AutoNormal(conjugate) if built else guide_of_one_argument)


@pytest.mark.parametrize("structure", ["mean-field", "full"])
def test_what_stands_for_a_guide_of_pyros_own_runs(structure):
    observed = {"x": torch.linspace(-1.0, 1.0, 12)}
    guide = cal.guides.amortize(conjugate, observed, structure)
    cal.inference.fit(conjugate, guide, observed, epochs=1)
    cal.inference.posterior(conjugate, guide, observed, draws=2)


def test_transformed_noise_is_a_guide():
    """The remedy for an auxiliary site, with the same draws and their density: z ~ N(x, 1/2)."""
    observed = {"x": torch.linspace(-1.0, 1.0, 6)}
    tree = cal.inference.posterior(conjugate, cal.guides.wrap(guide_with_transformed_noise), observed, draws=50)
    z, log_q = tree["posterior"]["z"].values, tree["sample_stats"]["log_q"].values
    right = dist.Normal(observed["x"].double(), 0.5).log_prob(torch.tensor(z, dtype=torch.float64))
    assert torch.allclose(torch.tensor(log_q), right, atol=1e-4)
