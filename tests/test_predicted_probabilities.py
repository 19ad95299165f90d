"""Predicted probabilities of labels, and the verdicts on them, against programs with known p(y | x)."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from pyro.nn import PyroModule
from torch import Tensor, nn

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation.judgements.on_probabilities import MARGIN

Array = npt.NDArray[np.float64]
VALUES = 4


class Labels(PyroModule):
    """z ~ Normal(x, noise), y ~ Categorical(sharpness · z); without noise there is no latent."""

    def __init__(self, sharpness: float = 1.0, noise: float = 1.0, sites: int = 1) -> None:
        super().__init__()
        self.noise, self.sites = noise, sites
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, size: int, x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(x, self.noise).to_event(1)) if self.noise else x
            for site in range(self.sites):
                pyro.sample("y" if site == 0 else f"y{site}", dist.Categorical(logits=self.sharpness * z))


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def drawn(probabilities: Array, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    levels = generator.random((len(probabilities), 1))
    return (levels > probabilities.cumsum(1)).sum(1).clip(0, probabilities.shape[1] - 1)


def predictions(halves: Array, observed: npt.NDArray[np.int64]) -> xr.Dataset:
    """A dataset like that of `predicted_probabilities`, from probabilities `(half, data, value)` of a site y."""
    with np.errstate(divide="ignore"):
        log_p = np.log(halves.mean(0)[np.arange(len(observed)), observed])
    return xr.Dataset(
        {
            "y_probability": (("half", "data", "y_value"), halves),
            "y_observed": ("data", observed),
            "log_p": ("data", log_p),
        },
        {"y_value": [str(value) for value in range(halves.shape[2])]},
        {"sites": json.dumps(["y"]), "observed_sites": 1, "latents": json.dumps(["z"])},
    )


def answer(predicted: xr.Dataset) -> str:
    return cal.evaluation.conclude(cal.evaluation.probability_verdicts(predicted)).status


def twice(probabilities: Array) -> Array:
    return np.stack([probabilities, probabilities])


# -- probabilities -----------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_program_averaged_over_its_prior() -> None:
    torch.manual_seed(0)
    model, x = Labels(sites=2).double().eval(), torch.randn(6, VALUES).double()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    observed = {"y": y, "y1": (y + 1) % VALUES}
    found = cal.evaluation.predicted_probabilities(model, cal.guides.prior(model), observed, 4000, covariates={"x": x})
    z = x + torch.randn(200_000, 6, VALUES).double()
    each = z.softmax(-1)
    exact, spread = each.mean(0).numpy(), each.std(0).numpy()
    for site in observed:
        difference = found[f"{site}_probability"].values - exact
        np.testing.assert_allclose(found[f"{site}_probability"].sum(f"{site}_value"), 1, atol=1e-9)
        assert np.abs(difference / spread).max() * 2000**0.5 < limit(48)
        assert found[f"{site}_observed"].values.tolist() == observed[site].tolist()
    both = (each[:, torch.arange(6), y] * each[:, torch.arange(6), observed["y1"]]).mean(0).log().numpy()
    assert (np.abs(found["log_p"].values - both) / found["log_p_se"].values).max() < limit(6)
    assert json.loads(found.attrs["latents"]) == ["z"]


def test_without_latents_they_are_exact() -> None:
    torch.manual_seed(0)
    model, x, y = Labels(noise=0.0).double().eval(), torch.randn(5, VALUES).double(), torch.tensor([0, 1, 2, 3, 0])
    found = cal.evaluation.predicted_probabilities(model, cal.guides.prior(model), {"y": y}, 2, covariates={"x": x})
    np.testing.assert_allclose(found["y_probability"].mean("half"), x.softmax(-1), atol=1e-12)
    np.testing.assert_allclose(found["log_p"], cal.inference.log_evidence(model, {"y": y}, covariates={"x": x}))


def test_values_that_cannot_be_listed_are_left_out() -> None:
    def regression(size: int, x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

    torch.manual_seed(0)
    x, y = torch.randn(50), torch.randn(50)
    found = cal.evaluation.check(regression, cal.guides.prior(regression), {"y": y}, covariates={"x": x}, draws=200)
    assert found.conclusion.status == "cannot tell"
    assert "no observed site has finitely many values" in str(found.conclusion)
    wanted = dist.Normal(x, 2**0.5).log_prob(y).mean()
    assert float(found.result.probabilities["log_p"].mean()) == pytest.approx(float(wanted), abs=0.05)
    with pytest.raises(InferenceError, match="two draws"):
        cal.evaluation.predicted_probabilities(
            regression, cal.guides.prior(regression), {"y": y}, 1, covariates={"x": x}
        )


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "spread"),
    [(2, 1.0), (10, 1.5), *(pytest.param(*hard, marks=pytest.mark.slow) for hard in ((2, 4.0), (10, 6.0)))],
)
def test_right_predictions_pass_and_planted_defects_fail(values: int, spread: float) -> None:
    generator, answers = np.random.default_rng(0), {name: Counter() for name in (*DEFECTS, "right")}
    for _ in range(100):
        logits = generator.normal(size=(4000, values)) * spread
        observed = drawn(softmax(logits), generator)
        answers["right"][answer(predictions(twice(softmax(logits)), observed))] += 1
        for name, defect in DEFECTS.items() if answers["right"].total() <= 20 else ():
            answers[name][answer(predictions(twice(softmax(defect(logits))), observed))] += 1
    assert answers["right"]["pass"] >= 95, answers
    assert answers["right"]["fail"] <= 1, answers
    for name in DEFECTS:
        assert answers[name]["fail"] == 20, answers


DEFECTS: dict[str, Callable[[Array], Array]] = {
    "logits × 3": lambda logits: 3 * logits,
    "logits / 3": lambda logits: logits / 3,
    "one class too likely": lambda logits: logits + logits.std() * np.eye(logits.shape[1])[1],
    "other data": lambda logits: np.roll(logits, 1, 0),
}


def test_at_the_margin_no_more_than_the_stated_shares_fail_or_pass() -> None:
    """A tilt of one class whose effect is the margin: 5% may fail, 1 in 1,000 pass."""
    generator, answers = np.random.default_rng(1), Counter()
    truth = softmax(generator.normal(size=(2000, 4)))
    share = truth[:, 1].mean()
    variance = (truth[:, 1] * (1 - truth[:, 1])).mean()
    moved = truth.copy()
    moved[:, 1] = truth[:, 1] * (1 - MARGIN * variance**0.5 / share)
    moved[:, [0, 2, 3]] *= ((1 - moved[:, 1]) / (1 - truth[:, 1]))[:, None]
    for _ in range(300):
        answers[answer(predictions(twice(moved), drawn(truth, generator)))] += 1
    assert answers["pass"] <= 3, answers  # 0.3 are expected at most
    assert answers["fail"] <= 30, answers  # 15 are expected at most


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_noise_of_few_draws_is_no_error_of_the_predictions(share: float) -> None:
    """Confidence, bins and the most probable value come from one half of the draws, probabilities from the other."""
    generator, logits = np.random.default_rng(2), np.random.default_rng(3).normal(size=(4000, 10)) * 1.5
    truth = softmax(logits)
    effects: list[list[float]] = []
    for _ in range(40):
        gammas = generator.gamma(twice(truth) / share + 1e-9)
        halves = gammas / gammas.sum(2, keepdims=True)
        found = cal.evaluation.probability_verdicts(predictions(halves, drawn(truth, generator)))
        effects.append([v.effect for v in found if v.quantity == "confidence"])
    mean, error = np.mean(effects), np.std(effects) / 40**0.5
    assert abs(mean) < 1.3 * limit(1) * error, (mean, error)
    one = halves[:1].repeat(2, 0)  # planted: the same half on both sides
    same = cal.evaluation.probability_verdicts(predictions(one, drawn(truth, generator)))
    assert same[0].effect < -limit(1) * np.std(effects) or share < 0.1


def test_fewer_data_cannot_tell_and_the_conclusion_says_how_many_are_needed() -> None:
    generator = np.random.default_rng(0)
    truth = softmax(generator.normal(size=(300, 4)))
    found = cal.evaluation.conclude(
        cal.evaluation.probability_verdicts(predictions(twice(truth), drawn(truth, generator)))
    )
    assert found.status == "cannot tell"
    assert "Use at least 4,000 data" in str(found)


@pytest.mark.parametrize(("count", "asked"), [(50, False), (80, True)])
def test_frequencies_are_not_asked_about_if_every_value_is_rare(count: int, asked: bool) -> None:
    generator = np.random.default_rng(0)
    truth = softmax(0.1 * generator.normal(size=(count, 6)))
    found = cal.evaluation.probability_verdicts(predictions(twice(truth), drawn(truth, generator)))
    assert ("frequencies" in [verdict.quantity for verdict in found]) is asked
    assert not any("the 6 rarest" in verdict.sentence for verdict in found)


def test_labels_that_never_vary_and_certain_predictions() -> None:
    certain = np.eye(3)[np.zeros(4000, dtype=int)]
    right, wrong = np.zeros(4000, dtype=int), np.zeros(4000, dtype=int)
    wrong[:200] = 1
    assert answer(predictions(twice(certain), right)) == "pass"
    said = cal.evaluation.conclude(cal.evaluation.probability_verdicts(predictions(twice(certain), wrong)))
    assert said.status == "fail"
    assert "200 of 4000 data have observations whose predicted probability is zero" in str(said)


# -- check -------------------------------------------------------------------------------------------------------------


def simulated(model: Labels, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(count, VALUES)
    with torch.no_grad():
        y = cal.program.trace(model, count, {"x": x}).nodes["y"]["value"]
    return {"y": y}, {"x": x}


def test_check_judges_predictions_and_says_so(tmp_path: Path) -> None:
    model = Labels(sharpness=1.5).eval()
    observed, covariates = simulated(model, 3000)
    found = cal.evaluation.check(model, cal.guides.prior(model), observed, covariates=covariates, draws=100)
    assert found.conclusion.status == "pass", found
    words = str(found)
    assert "You can trust the predicted probabilities of `y`" in words
    assert "not judged as a posterior: inference.importance" in words
    assert "better than the frequencies of the labels alone" in words
    assert [v.quantity for v in found.verdicts if v.primary] == ["confidence", "frequencies", "reliability"]
    page = found.save(tmp_path / "report.html").read_text()
    assert "The predicted probabilities, and the observations" in page
    assert "Observed shares over predicted probabilities" in page
    assert "There is no reference posterior" not in page
    with torch.no_grad():
        model.sharpness *= 3
    sharp = cal.evaluation.check(model, cal.guides.prior(model), observed, covariates=covariates, draws=100)
    assert sharp.conclusion.status == "fail"
    assert "too confident" in str(sharp.conclusion)


def test_check_of_a_program_without_latents_has_no_word_on_a_posterior() -> None:
    model = Labels(noise=0.0).eval()
    observed, covariates = simulated(model, 3000)
    found = cal.evaluation.check(model, cal.guides.prior(model), observed, covariates=covariates)
    assert found.conclusion.status == "pass"
    assert "posterior" not in str(found)
    empty = cal.guides.amortize(model, observed, covariates=covariates)
    again = cal.evaluation.check(model, empty, observed, covariates=covariates)
    assert str(again) == str(found)
    assert found.result.probabilities.attrs["draws"] == 2
