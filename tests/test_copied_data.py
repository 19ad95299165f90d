"""Covariates that hold the observed data: one warning, and nothing that simulates."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import pad

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.evaluation import calibration, posterior_calibration, predictive_check
from calibrant.program import check_program
from calibrant.program.copied_data import covariate_with_data

Y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
COUNTS = torch.poisson(3 * torch.ones(200), generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))

COPIES = {
    "the series": (Y, Y),
    "in another dtype": (Y, Y.double()),
    "its past, padded": (Y, pad(Y[:, :-1], (1, 0))),
    "its past": (Y[:, 2:], Y[:, :-1]),
    "its beginning": (Y, Y[:, :5]),
    "its first value": (Y, Y[:, 0]),
    "a column of several": (Y, torch.stack([torch.ones_like(Y), Y], -1)),
    "one long series": (Y.reshape(1, -1), Y.reshape(1, -1)[:, :-1]),
    "steps of several entries": (Y.reshape(40, 4, 2), Y.reshape(40, 4, 2)[:, :-1]),
    "numbers": (Y[:, 0], Y[:, 0]),
    "a number among features": (Y[:, 0], Y),
    "counts": (COUNTS, COUNTS.long()),
    "classes": ((COUNTS > 3).float(), COUNTS > 3),
    "images": (IMAGES, IMAGES),
    "the datum before": (Y[1:], Y[:-1]),
    "the count two data before": (COUNTS[2:], COUNTS[:-2]),
}
OTHERS = {
    "other numbers": (Y, torch.randn(40, 8, generator=torch.Generator().manual_seed(3))),
    "nearly the same": (Y, Y + 1e-3),
    "a mask": (Y, Y > 0),
    "ones": (torch.ones(40, 8), torch.ones(40, 8)),
    "few equal numbers by chance": (torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 1, 1])),
    "steps": (Y, torch.arange(8.0).expand(40, 8)),
    "counts and another column": (COUNTS, COUNTS.flip(0)),
    "another shape": (IMAGES, Y[:5]),
}


@pytest.mark.parametrize(("data", "covariate"), COPIES.values(), ids=COPIES)
def test_a_covariate_that_holds_data_is_seen(data, covariate):
    other = torch.randn(len(data))
    assert covariate_with_data({"y": data}, {"other": other, "past": covariate}) == ("past", "y")


@pytest.mark.parametrize(("data", "covariate"), OTHERS.values(), ids=OTHERS)
def test_other_covariates_are_not(data, covariate):
    assert covariate_with_data({"y": data}, {"past": covariate}) is None
    assert covariate_with_data({"y": data}, {}) is None


def autoregression(size, past):
    with pyro.plate("data", size):
        a = pyro.sample("a", dist.Normal(0.0, 0.5))
        before = pad(past[:, :-1], (1, 0))
        pyro.sample("y", dist.Normal(a[:, None] * before, 1.0).to_event(1))


def posterior_of_autoregression(observed, size, past):
    before = pad(past[:, :-1], (1, 0))
    precision = 4.0 + before.square().sum(-1)
    with pyro.plate("data", size):
        pyro.sample("a", dist.Normal((before * observed["y"]).sum(-1) / precision, precision**-0.5))


def test_it_is_told_once_and_keeps_its_posterior():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            check_program(autoregression, {"y": Y}, {"past": Y})
    assert [str(warning.message) for warning in caught] == [
        "the covariate 'past' holds the data of 'y': simulated data would keep these data, so that calibration and "
        "predictive checks are left out"
    ]
    with pytest.warns(UserWarning, match="'past' holds the data of 'y'"):
        tree = cal.inference.posterior(autoregression, posterior_of_autoregression, {"y": Y}, covariates={"past": Y})
    log_weights = tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]
    assert float(log_weights.std(("chain", "draw")).max()) < 1e-4


@pytest.mark.filterwarnings("ignore:the covariate 'past'")
def test_it_is_not_simulated():
    given = {"covariates": {"past": Y}}
    guide = posterior_of_autoregression
    for question in (
        lambda: calibration(autoregression, guide, {"y": Y}, **given),
        lambda: predictive_check(autoregression, guide, {"y": Y}, **given),
        lambda: posterior_calibration(autoregression, lambda data, seed: None, {"y": Y}, **given),
    ):
        with pytest.raises(ProgramError, match=r"'past' holds the data of 'y', which simulated.*can't be simulated"):
            question()
