"""Guides that break the contract are refused: by name, and with the remedy."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
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
from torch.distributions import constraints

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


GUIDES = {
    "support": (positive, plain(normal_guide), ("'z'", "outside the model's support", "choose a family")),
    "event": (two_entries, plain(guide_without_event), ("'z'", ".to_event(")),
    "shape": (two_entries, plain(normal_guide), ("'z'", "(4,)", "(4, 4)")),
    "name": (conjugate, plain(guide_of_another_site), ("['y']", "['z']")),
    "plate": (conjugate, plain(guide_without_plate), ("'z'", "data plate", "not of both")),
    "minibatch": (conjugate, plain(guide_with_minibatch), ("'z'", "subsample_size")),
    "mixing": (conjugate, plain(guide_that_centres), ("'z'", "that datum")),
    "scale": (conjugate, plain(guide_with_scale), ("'z'", "masked or scaled", "not in both")),
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
