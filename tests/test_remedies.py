"""Remedies where it is known in closed form what each can recover, planted ones that do nothing, and the sentences."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from pyro.nn import PyroModule
from small_models import coin, coin_guide
from torch import Tensor, nn

import calibrant as cal
from calibrant.data import as_data
from calibrant.errors import InferenceError, NonFiniteLoss
from calibrant.evaluation import remedies, remedy_sentences
from calibrant.evaluation.remedying import measuring, richer, trying
from calibrant.evaluation.remedying.richer import TrainingData, has_weights, richer_guides, trained_guide
from calibrant.inference.trees import model_sha256

DATA = 25
OBLIQUE = [[1.0, 0.8], [0.9, 1.0], [0.2, 0.4], [0.0, 0.3]]
ORTHOGONAL = [[1.0, 0.5], [0.5, -1.0], [0.4, 0.0], [0.0, 0.3]]
NOISE = 0.4


def linear(directions: list[list[float]]) -> PyroModule:
    """ppca: x = A z + 0.4 ε, with the Gaussian posterior of two latents."""
    built = cal.models.create("ppca", shape=(4,), latents=2)
    with torch.no_grad():
        built.decoder.directions.copy_(torch.tensor(directions))
        built.likelihood.log_scale.fill_(math.log(NOISE))
    return built.requires_grad_(False).eval()


class Product(PyroModule):
    """The best product of Normals for each datum, shifted by `shift` and stretched by `stretch` of its sds."""

    precision: Tensor
    gain: Tensor
    bias: Tensor

    def __init__(self, model: PyroModule, shift: float = 0.0, stretch: float = 1.0) -> None:
        super().__init__()
        directions = model.decoder.directions.double()
        precision = torch.eye(2).double() + directions.T @ directions / NOISE**2
        self.register_buffer("precision", precision.float())
        self.register_buffer("gain", torch.linalg.solve(precision, directions.T / NOISE**2).float())
        self.register_buffer("bias", model.decoder.bias.detach().clone())
        self.shift, self.stretch = shift, stretch

    def forward(self, observed, size):
        sd = self.precision.diagonal().rsqrt()
        loc = (observed["x"] - self.bias) @ self.gain.T + self.shift * sd
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(loc, self.stretch * sd).to_event(1))

    def divergence(self) -> float:
        """KL(q‖p) in closed form; with no shift and stretch 1, what correlation costs any product."""
        precision = self.precision.double()
        variance = self.stretch**2 / precision.diagonal()
        offset = self.shift * precision.diagonal().rsqrt()
        inner = (precision.diagonal() * variance).sum() + offset @ precision @ offset
        return float(0.5 * (inner - 2 - precision.logdet() - variance.log().sum()))


def only(monkeypatch, **kinds) -> None:
    """Of the richer guides, these alone are tried."""
    monkeypatch.setattr(trying, "richer_guides", lambda *given: kinds)


def value(result: xr.Dataset, remedy: str, name: str) -> float:
    return float(result[name].sel(remedy=remedy))


def misses(result: xr.Dataset, remedy: str, name: str, wanted: float, slack: float) -> bool:
    se = value(result, remedy, f"{name}_se")
    return abs(value(result, remedy, name) - wanted) > limit(10) * se + slack


@pytest.fixture(scope="module")
def oblique():
    model = linear(OBLIQUE)
    x = {"x": cal.program.sample_prior(model, DATA, seed=1)["x"]}
    return model, x, cal.inference.reference(model, x, draws=1000, seed=7)


@pytest.fixture(scope="module")
def train(oblique):
    return {"x": cal.program.sample_prior(oblique[0], 3000, seed=2)["x"]}


@pytest.fixture(scope="module")
def tried(oblique, train):
    """A shifted and stretched product, refined, resampled and replaced."""
    model, x, reference = oblique
    with pytest.MonkeyPatch.context() as patch:
        only(patch, collapsed=("collapsed", {}))
        return remedies(model, Product(model, 0.5, 0.8), x, reference, train=train, refine_steps=80)


def test_every_part_of_the_gap_is_recovered_by_its_remedy(oblique, tried):
    """Refining recovers shift and stretch, to 0.01 nats; the exact guide the correlation too."""
    model, best = oblique[0], Product(oblique[0]).divergence()
    gap = Product(model, 0.5, 0.8).divergence()
    assert best > 0.5
    assert gap - best > 0.2
    assert not misses(tried, "guide", "gap", gap, 0.0)
    assert misses(tried, "guide", "gap", gap + 0.1, 0.0)
    left = {"refined": (best, 0.01), "collapsed": (0.0, 1e-6)}
    for remedy, (gap_left, slack) in left.items():
        assert not misses(tried, remedy, "gap", gap_left, slack), remedy
        assert not misses(tried, remedy, "gain", gap - gap_left, slack), remedy
        assert not misses(tried, remedy, "recovered", 1 - gap_left / gap, slack / gap), remedy
        assert misses(tried, remedy, "recovered", 1 - gap_left / gap + 0.1, slack / gap), remedy
    assert tried.attrs["evidence"] == "exact"
    assert (tried.attrs["trained_on"], tried.attrs["training_data"]) == ("given", 3000)
    assert (tried["reason"] == "").all()


@pytest.mark.slow
def test_a_dense_normal_recovers_the_correlation_too(oblique, train, monkeypatch):
    """Trained in 500 steps: within 0.02 nats of the whole gap, and no check fails; in 10 it recovers less."""
    model, x, reference = oblique
    only(monkeypatch, full=("full", {}))
    guide = Product(model, 0.5, 0.8)
    result = remedies(model, guide, x, reference, train=train, steps=500, refine_steps=0)
    assert not misses(result, "full", "gap", 0.0, 0.02)
    assert not misses(result, "full", "recovered", 1.0, 0.02)
    assert value(result, "full", "fails") == 0
    assert remedy_sentences(result)[0].startswith("a full structure recovers ")
    fresh = remedies(model, guide, x, reference, train=train, steps=10, refine_steps=0)
    assert misses(fresh, "full", "gap", 0.0, 0.02)


def test_draws_are_judged_by_the_reference(tried):
    """Refined: sd of the best product, whose coverage stays too low. Exact: no check fails."""
    assert value(tried, "guide", "fails") == tried.attrs["checks"] == 8
    assert value(tried, "refined", "fails") > 0
    assert value(tried, "collapsed", "fails") == 0
    assert value(tried, "collapsed", "sd_error") < 0.05 < 0.3 < value(tried, "refined", "sd_error")
    assert value(tried, "guide", "mean_error") > 0.2
    assert value(tried, "collapsed", "khat_good") == 1  # k-hat of weights that are equal but for rounding is noise


def test_resampling_gives_a_bound_and_no_elbo(tried):
    assert math.isnan(value(tried, "resampled", "elbo"))
    assert value(tried, "resampled", "khat_good") < 1
    assert value(tried, "resampled", "recovered") > 0.7


def test_sentences_name_what_recovers_most_first(tried):
    sentences = remedy_sentences(tried)
    assert sentences[0].startswith("a collapsed guide recovers 100.0% ± 0.0% of the gap (")
    assert sentences[0].endswith("afterwards every check against the reference passes (8 of 8 failed before)")
    assert any("k-hat is too large" in line for line in sentences if line.startswith("resampling"))
    assert sentences[-1].startswith("refining every datum recovers ")
    assert "checks against the reference fail (8 before)" in sentences[-1]


def test_a_wrong_scale_is_what_refining_and_resampling_mend(monkeypatch):
    """The posterior is a product of Normals, the guide 1.3 times as wide; refining in no steps recovers nothing."""
    model = linear(ORTHOGONAL)
    x = {"x": cal.program.sample_prior(model, DATA, seed=1)["x"]}
    reference = cal.inference.reference(model, x, draws=1000, seed=7)
    only(monkeypatch)
    monkeypatch.setattr(measuring, "_POOL_ROWS", 60_000)  # pools of part of the data, joined
    guide = Product(model, stretch=1.3)
    result = remedies(model, guide, x, reference, refine_steps=60)
    assert not misses(result, "guide", "gap", guide.divergence(), 0.0)
    assert not misses(result, "refined", "recovered", 1.0, 0.01)
    assert not misses(result, "resampled", "recovered", 1.0, 0.01)
    assert not misses(result, "guide", "sd_error", math.log(1.3), 0.005)
    assert misses(result, "guide", "sd_error", 0.0, 0.03)
    for remedy in ("refined", "resampled"):
        assert not misses(result, remedy, "sd_error", 0.0, 0.03)
        assert value(result, remedy, "fails") == 0
    nothing = remedies(model, guide, x, reference, refine_steps=0, draws=500)
    assert abs(value(nothing, "refined", "recovered")) < 1e-5
    assert value(nothing, "refined", "fails") == value(nothing, "guide", "fails") > 0
    assert any(
        line.startswith("no gain beyond its error or 1% of the gap: refining") for line in remedy_sentences(nothing)
    )


def test_without_evidence_the_best_bound_stands_for_it(oblique, monkeypatch):
    """Gaps are then too small, and resampling, whose bound it may be, has no share."""
    model, x, _ = oblique
    only(monkeypatch)

    def unknown(*given):
        raise InferenceError("not known")

    monkeypatch.setattr(measuring, "log_evidence_of", unknown)
    guide = Product(model, 0.3, 1.2)
    result = remedies(model, guide, x, refine_steps=50, draws=300)
    assert result.attrs["evidence"] == "bound"
    assert value(result, "guide", "gap") < guide.divergence() + limit(1) * value(result, "guide", "gap_se")
    assert math.isnan(value(result, "resampled", "recovered"))
    assert np.isnan(result["fails"]).all()
    assert result.attrs["comparison"] == "no reference given"
    sentences = remedy_sentences(result)
    assert "of the gap to the best bound of log p(x)" in sentences[0]
    assert any("its gain is not known, since log p(x) is not" in line for line in sentences)


def test_a_reference_without_evidence_is_bridged(oblique, monkeypatch):
    model, x, reference = oblique
    only(monkeypatch)
    groups = {name: group.to_dataset() for name, group in reference.children.items()}
    groups["convergence"] = groups["convergence"].drop_vars("log_evidence")
    groups["convergence"]["is_reference"][:1] = False  # no more than 5% are left out
    drawn = xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    guide = Product(model, 0.3, 1.1)
    result = remedies(model, guide, x, drawn, refine_steps=50, draws=500)
    assert result.attrs["evidence"] == "bridge"
    assert (result.attrs["data"], result.attrs["left_out"]) == (DATA - 1, 1)
    assert not misses(result, "guide", "gap", guide.divergence(), 0.0)


# -- richer guides -----------------------------------------------------------------------------------------------------


def names(model, guide, x) -> list[str]:
    return list(richer_guides(model, guide, as_data(x), 0))


@pytest.mark.parametrize(
    ("model", "structure", "family", "wanted"),
    [
        ("gsm", "mean-field", "auto", ["faithful", "full", "full, flow", "collapsed"]),
        ("gsm", "faithful", "auto", ["full", "full, flow", "collapsed"]),
        ("gsm", "collapsed", "auto", []),
        ("gsm", "collapsed", {"scale": "lognormal"}, ["collapsed"]),
        ("ppca", "mean-field", "auto", ["full", "full, flow", "collapsed"]),  # with one latent, faithful is no richer
    ],
)
def test_what_is_richer(model, structure, family, wanted):
    torch.manual_seed(0)
    built = cal.models.create(model, shape=(4,), latents=2).eval()
    x = {"x": cal.program.sample_prior(built, 20, seed=1)["x"]}
    assert names(built, cal.guides.amortize(built, x, structure, family), x) == wanted


@pytest.mark.slow
def test_flows_are_for_small_latents_where_there_are_some():
    """A scale beside twelve others; all of them where none is small; those that the guide has stay."""
    found = {}
    for name in ("gsm", "ppca"):
        built = cal.models.create(name, shape=(14,), latents=12).eval()
        x = {"x": cal.program.sample_prior(built, 20, seed=1)["x"]}
        found[name] = richer_guides(built, cal.guides.amortize(built, x), as_data(x), 0)["full, flow"][1]
        flowing = cal.guides.amortize(built, x, "full", "flow")
        assert names(built, flowing, x) == ["collapsed"]
    assert found == {"gsm": {"scale": "flow"}, "ppca": {"z": "flow"}}


def test_a_flow_is_kept_and_discrete_latents_have_none():
    def model(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z * k[:, None], 1.0).to_event(1))

    program, x = cal.program.as_program(model), {"x": torch.randn(20, 2)}
    guide = cal.guides.amortize(program, x, "mean-field", {"z": "flow"})
    found = richer_guides(program, guide, as_data(x), 0)
    assert found == {"faithful": ("faithful", {"z": "flow"})}  # full has the same sites


class Noisy(PyroModule):
    """A program that training mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1))


def test_the_model_stays_as_it_is():
    """Its weights, its mode and whether they take gradients."""
    model = Noisy().eval()
    before, sha = copy.deepcopy(model.state_dict()), model_sha256(model)
    training = TrainingData.of(model, as_data({"x": torch.randn(10, 3)}), None, 0)
    assert training.source == "simulated"
    few = TrainingData(training.data[:600], "given")
    guide = trained_guide(model, few, "full", {}, None, 2, 0, cal.progress.silent)
    assert has_weights(guide)
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert model_sha256(model) == sha
    assert not any(part.training for part in model.modules())


# -- what can't be done ------------------------------------------------------------------------------------------------


def test_a_guide_without_continuous_latents(monkeypatch):
    """It can be resampled, but not refined; its means are not compared."""
    x = {"x": torch.linspace(-1, 2, 10)}
    only(monkeypatch)
    result = remedies(coin, coin_guide, x, draws=200)
    assert "nothing to refine" in str(result["reason"].sel(remedy="refined").values)
    assert np.isnan(result["elbo"].sel(remedy="refined"))
    assert str(result["reason"].sel(remedy="resampled").values) == ""
    sentences = remedy_sentences(result)
    assert any(line.startswith("could not be tried: refining every datum: the guide has no") for line in sentences)


def test_shared_latents_have_no_gap_of_a_datum():
    def model(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    x = {"x": torch.linspace(-1, 1, 10)}
    result = remedies(model, cal.guides.amortize(model, x, "mean-field"), x)
    assert "full" in result["remedy"].values
    assert all("shared" in str(reason) for reason in result["reason"].values)
    assert np.isnan(result["elbo"]).all()
    [sentence] = remedy_sentences(result)
    assert sentence.startswith("could not be tried: refining every datum, resampling by importance, ")


def test_a_training_that_overflows_is_tried_again_with_a_lower_rate(oblique, train, monkeypatch):
    rates = []

    def overflows(*given, lr, **rest):
        rates.append(lr)
        if len(rates) == 1:
            raise NonFiniteLoss("not finite", [])

    monkeypatch.setattr(richer, "fit", overflows)
    data = TrainingData(cal.binding.bind(oblique[0], train), "given")
    assert has_weights(trained_guide(oblique[0], data, "full", {}, None, 100, 0, cal.progress.silent))
    assert rates[1] < rates[0]


def test_a_model_that_cannot_be_simulated_needs_training_data(monkeypatch):
    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (size,), ()))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 0.9))

    only(monkeypatch, full=("full", {}))
    x = {"x": torch.linspace(-1, 2, 10)}
    result = remedies(model, guide, x, refine_steps=20, draws=200)
    assert "none can be simulated" in str(result["reason"].sel(remedy="full").values)
    assert result.attrs["trained_on"] == "nothing"
    given = remedies(model, guide, x, refine_steps=0, draws=200, steps=10, train={"x": torch.randn(100)})
    assert str(given["reason"].sel(remedy="full").values) == ""


def test_simulated_training_data_have_the_covariates_of_the_judged_ones():
    def model(size, dose):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(100.0 * dose + z.sum(-1), 0.01))

    program, dose = cal.program.as_program(model), torch.tensor([1.0, 2.0, 5.0])
    judged = cal.binding.bind(program, {"x": 100 * dose}, {"dose": dose})
    rows, covariates = TrainingData.of(program, judged, None, 0).data.tensors()
    assert covariates["dose"].unique().tolist() == dose.tolist()
    assert ((rows["x"] - 100 * covariates["dose"]).abs() < 10).all()


# -- sentences ---------------------------------------------------------------------------------------------------------


def told(gains: dict[str, tuple[float, float]], gap: float = 0.4, **attrs: object) -> xr.Dataset:
    """A result by hand: gain ± error by remedy, over 100 data."""
    remedy, count = ["guide", *gains], len(gains) + 1
    columns = {
        "elbo": [-5.0] * count,
        "gap": [gap, *(gap - gain for gain, _ in gains.values())],
        "gap_se": [0.01] * count,
        "gain": [math.nan, *(gain for gain, _ in gains.values())],
        "gain_se": [math.nan, *(se for _, se in gains.values())],
        "recovered": [math.nan, *(gain / gap for gain, _ in gains.values())],
        "recovered_se": [math.nan, *(se / gap for _, se in gains.values())],
        "sd_error": [0.1] * count,
        "sd_error_se": [0.01] * count,
        "fails": [3.0] + [0.0] * len(gains),
        "unclear": [0.0] * count,
        "khat_good": [1.0] * count,
        "seconds": [4.0] * count,
    }
    variables = {name: ("remedy", values) for name, values in columns.items()}
    variables["reason"] = ("remedy", [""] * count)
    attributes = {"data": 100, "evidence": "exact", "trained_on": "given", "checks": 7, **attrs}
    return xr.Dataset(variables, coords={"remedy": remedy}, attrs=attributes)


def test_words_of_a_remedy_that_helps():
    [first, second] = remedy_sentences(told({"refined": (0.372, 0.008), "faithful": (0.004, 0.004)}))
    assert first == (
        "refining every datum recovers 93% ± 2% of the gap (0.37 of 0.40 nats) in 4 s; "
        "afterwards every check against the reference passes (3 of 7 failed before)"
    )
    assert second == "no gain beyond its error or 1% of the gap: a faithful structure (+0.004 ± 0.004 nats)"


def test_words_where_the_gap_shrinks_and_the_sds_are_worse():
    result = told({"refined": (0.3, 0.01)})
    result["sd_error"][1] = 0.3
    [line] = remedy_sentences(result)
    assert line.endswith("; but sds are further off, by 35% (root mean square), 11% before")
    result["sd_error_se"][1] = 0.2
    assert "further off" not in remedy_sentences(result)[0]


def test_words_where_nothing_helps():
    [line] = remedy_sentences(told({"refined": (0.002, 0.001), "full": (-0.3, 0.01)}, trained_on="simulated"))
    assert line == (
        "no remedy tried helps: the guide leaves a gap of 0.40 ± 0.01 nats; refining every datum +0.002 ± 0.001 nats, "
        "a full structure, made for data simulated from the model, -0.30 ± 0.01 nats"
    )


def test_noise_is_no_improvement():
    """Four remedies that do nothing, 200 times: claims in 1% at most; all of the gap is seen every time."""
    rng = np.random.default_rng(0)
    kinds, repeats = ("refined", "resampled", "faithful", "full"), 200
    draws = rng.standard_normal((repeats, 4, 20)) * 0.1

    def claims(shift: float) -> int:
        found = 0
        for gains in draws[: repeats if shift == 0 else 50] + shift:
            means, errors = gains.mean(1), gains.std(1, ddof=1) / math.sqrt(20)
            result = told(dict(zip(kinds, zip(means, errors, strict=True), strict=True)), gap=0.5, data=20)
            found += not remedy_sentences(result)[0].startswith("no remedy")
        return found

    assert claims(0.0) < 0.005 * repeats + limit(1) * math.sqrt(0.005 * repeats)  # gains: half of the 1%
    assert claims(0.5) == 50
