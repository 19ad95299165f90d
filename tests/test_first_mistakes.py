"""What people get wrong in their first hour is told in one sentence, with a remedy that works."""

from __future__ import annotations

import warnings

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError, RunError
from calibrant.printing import number


def visits(size):
    """Counts of three plants with a common rate."""
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        return pyro.sample("visits", dist.Poisson(rate[:, None].expand(-1, 3)).to_event(1))


COUNTS = torch.tensor([[0.0, 1.0, 2.0], [3.0, 2.0, 4.0]] * 8)


@pytest.fixture(scope="module")
def guide():
    return cal.guides.amortize(visits, {"visits": COUNTS}, structure="mean-field")


def test_the_columns_of_a_frame_are_the_entries_of_a_site():
    frame = pd.DataFrame(COUNTS.numpy(), columns=["a", "b", "c"])
    with pytest.raises(ProgramError, match=r"give \{'visits': frame\}"):
        cal.guides.amortize(visits, frame)
    cal.guides.amortize(visits, {"visits": frame})  # the remedy


def test_a_misspelt_site_is_told_the_site_that_was_meant():
    with pytest.raises(ProgramError, match=r"never samples 'visit'.*did you mean 'visits'\?"):
        cal.guides.amortize(visits, {"visit": COUNTS})


def test_a_guide_in_the_place_of_the_model_is_told_so(guide):
    with pytest.raises(ProgramError, match="give the model first, then its guide"):
        cal.inference.fit(guide, visits, {"visits": COUNTS}, epochs=1)


@pytest.mark.parametrize("draws", [0, -1, 2.0, True])
def test_draws_are_a_whole_number(guide, draws):
    with pytest.raises(InferenceError, match=r"draws=.*give a whole number"):
        cal.inference.posterior(visits, guide, {"visits": COUNTS}, draws=draws)


def test_a_folder_comes_first(guide):
    with pytest.raises(RunError, match=r"give save\(FOLDER, model, guide\)"):
        cal.save(visits, guide, "folder")


def test_a_noise_scale_that_nobody_has_trained_is_told():
    decoder = torch.nn.Linear(2, 4).eval()
    with pytest.warns(UserWarning, match="not that of your training") as told:
        model = cal.models.from_decoder(decoder, prior=2, likelihood="gaussian")
    remedies = ("beta", {"name": "gaussian", "scale": 0.1, "learn": False}, {"name": "gaussian", "scale": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for likelihood in remedies:
            cal.models.from_decoder(decoder, prior=2, likelihood=likelihood)
    assert not model.likelihood.is_started
    assert told[0].filename == __file__  # the line of the user, not one of ours


def test_a_squared_error_by_another_name_is_told_its_likelihood():
    with pytest.raises(ProgramError, match='For a squared error: "beta"'):
        cal.models.from_decoder(torch.nn.Linear(2, 4).eval(), prior=2, likelihood="mse")


def test_a_reference_tells_how_far_it_is_before_the_first_datum_is_complete():
    told: list[tuple[str, int, str]] = []

    def progress(stage, done, total, text=""):
        told.append((stage, done, text))

    cal.inference.reference(visits, {"visits": COUNTS[:3]}, method="nuts", warmup=100, draws=500, progress=progress)
    first = [text for stage, done, text in told if stage == "reference" and done == 0 and "iterations" in text][:3]
    shares = [int(text.removesuffix("% of the iterations")) for text in first]
    assert len(shares) == 3
    assert shares == sorted(set(shares))


@pytest.mark.parametrize(
    ("error", "shown"), [(0.001, "1.234 ± 0.001"), (0.02, "1.23 ± 0.02"), (0.0, "1.23"), (None, "1.23")]
)
def test_no_error_is_printed_as_zero(error, shown):
    assert number(1.234, error) == shown
