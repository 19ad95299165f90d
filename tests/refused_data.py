"""Data and covariates that do not fit their program, and the words of the refusal."""

import pyro
import pyro.distributions as dist
import torch
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

from calibrant.errors import DataError

# -- data --------------------------------------------------------------------------------------------------------------


def images(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None, None], 1.0).expand([size, 2, 2]).to_event(2))


def binary(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z[:, None].expand(-1, 2)).to_event(1))


def counts(size, trials):
    with pyro.plate("data", size):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("x", dist.Binomial(trials, p))


def classes(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Categorical(logits=z))


def labelled(size, label, dose=None):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(label, 1.0))


GREY = torch.zeros(5000, 2)
GREY[4321, 1] = 0.37
LABEL = {"label": torch.zeros(6)}

DATA = {
    "no observations": Case(plain(conjugate), ("no observations", "observed="), DataError, {}),
    "lists": Case(plain(conjugate), ("'x'", "must be a tensor"), DataError, {"x": [0.0, 1.0]}),
    "a number": Case(plain(conjugate), ("'x'", "leading dimension data"), DataError, {"x": torch.zeros(())}),
    "no data": Case(plain(conjugate), ("'x': 0", "at least one"), DataError, {"x": torch.zeros(0)}),
    "NaN": Case(
        plain(conjugate),
        ("'x'", "not finite at datum 2", "mask"),
        DataError,
        {"x": torch.tensor([0.0, 1.0, torch.nan])},
    ),
    "infinity": Case(
        plain(images),
        ("'x'", "not finite at datum 1"),
        DataError,
        {"x": torch.tensor([0.0, -torch.inf])[:, None, None]},
    ),
    "lengths of observations": Case(
        plain(conjugate), ("'x': 6", "'y': 5", "need the same number of data"), DataError, {**X, "y": torch.zeros(5)}
    ),
    "wrong event shape": Case(
        plain(images), ("'x'", "shape (2, 3) per datum", "samples (2, 2)"), DataError, {"x": torch.zeros(6, 2, 3)}
    ),
    "missing channel": Case(
        plain(images), ("'x'", "shape (1, 2, 2) per datum", "samples (2, 2)"), DataError, {"x": torch.zeros(6, 1, 2, 2)}
    ),
    "event that would broadcast": Case(
        plain(images), ("'x'", "shape (1, 2) per datum", "samples (2, 2)"), DataError, {"x": torch.zeros(6, 1, 2)}
    ),
    "grey values": Case(
        plain(binary), ("'x'", "Bernoulli", "datum 4321", "transform", "likelihood"), DataError, {"x": GREY}
    ),
    "counts beyond their trials": Case(
        plain(counts),
        ("'x'", "Binomial", "datum 3", "support"),
        DataError,
        {"x": torch.tensor([0.0, 2.0, 5.0, 4.0])},
        {"trials": torch.tensor([1.0, 2.0, 5.0, 3.0])},
    ),
    "half a class": Case(plain(classes), ("'x'", "Categorical", "datum 1"), DataError, {"x": torch.tensor([0.0, 1.5])}),
    "a class too many": Case(plain(classes), ("'x'", "Categorical", "datum 1"), DataError, {"x": torch.tensor([0, 3])}),
    "missing covariate": Case(plain(labelled), ("['label']", "covariates="), DataError),
    "unknown covariate": Case(
        plain(labelled), ("['lable']", "['dose', 'label']"), DataError, X, {**LABEL, "lable": torch.zeros(6)}
    ),
    "length of a covariate": Case(
        plain(labelled), ("'label': 5", "need the same number of data"), DataError, X, {"label": torch.zeros(5)}
    ),
    "NaN in a covariate": Case(
        plain(labelled), ("'label'", "not finite at datum 0"), DataError, X, {"label": torch.full((6,), torch.nan)}
    ),
}
