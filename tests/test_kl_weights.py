"""Weights of the divergences in training: solutions against theory, true ELBOs beside them, schedules, refusals."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from commands import interrupt_at
from pyro.nn import PyroModule
from small_models import coin, hierarchical
from stored_runs import same
from torch import nn

import calibrant as cal
from calibrant.errors import InferenceError, RunError
from calibrant.inference.fitting import loop, objectives, state
from calibrant.inference.fitting.kl_weights import schedules_of, still_change, weights_at
from calibrant.inference.fitting.objectives import analytic_kl, elbo_terms, path_derivative
from calibrant.program import as_program

NOISE = 0.5
SPREADS = torch.tensor([2.0, 0.3, 0.1])  # standard deviations of the data, which lie near a line


class Linear(PyroModule):
    """x = w z + noise of 0.5, z ~ N(0, 1)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.8, 0.2, -0.2]))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None] * self.w, NOISE).to_event(1))


class LinearGuide(PyroModule):
    """z ~ N(slope · x, sd²), which holds the posterior under any weight."""

    def __init__(self):
        super().__init__()
        self.slope, self.log_sd = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"] @ self.slope, self.log_sd.exp()))


def line(count=1000):
    draw = torch.Generator().manual_seed(0)
    return {"x": torch.randn(count, 3, generator=draw) * SPREADS}


def trained(weight, learned=True, **options):
    """Model, guide and result of a training on data all of which are held out too; the decoder is learned or kept."""
    model, guide, data = Linear(), LinearGuide(), cal.data.Data(line())
    model.requires_grad_(learned)
    weights = None if weight is None else {"z": weight}
    options = {"epochs": 40, "batch_size": 250, "lr": 0.1, "kl_weights": weights, "validation": data, **options}
    return model, guide, cal.inference.fit(model, guide, data, **options)


def posterior(w, weight):
    """The first slope and the sd of the posterior that maximises E log p(x | z) − weight · KL(q, N(0, 1)).

    Divided by the weight, this is the ELBO of the model whose noise variance is multiplied by it.
    """
    variance = weight * NOISE**2
    precision = 1 + float(w.square().sum()) / variance
    return [float(w[0]) / variance / precision, precision**-0.5]


def found(guide):
    return [float(guide.slope[0].detach()), float(guide.log_sd.exp().detach())]


@pytest.mark.parametrize("objective", ["stl", "kl"])
@pytest.mark.parametrize("weight", [4.0, 0.25])
def test_the_posterior_is_the_one_of_theory(weight, objective):
    model, guide, fit = trained(weight, learned=False, objective=objective)
    np.testing.assert_allclose(found(guide), posterior(model.w, weight), rtol=0.05)
    assert fit.kl_weights == {"z": [[0.0, weight]]}
    assert "trained with weights of the KL divergences of z" in str(fit)


def test_a_weight_that_changes_nothing_would_be_noticed(monkeypatch):
    monkeypatch.setattr(objectives, "_weighted_kl", lambda terms, *_: terms)
    model, guide, _ = trained(4.0, learned=False)
    np.testing.assert_allclose(found(guide), posterior(model.w, 1.0), rtol=0.05)
    assert abs(found(guide)[1] / posterior(model.w, 4.0)[1] - 1) > 0.3


def test_the_decoder_is_the_one_of_theory():
    """Probabilistic PCA: |w|² is the largest eigenvalue of the second moments minus the noise variance of theory."""
    model, guide, _ = trained(4.0, epochs=60)
    x = line()["x"].double()
    largest = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    assert abs(float(model.w.detach().norm()) / math.sqrt(largest - 4 * NOISE**2) - 1) < 0.05
    assert abs(found(guide)[1] / math.sqrt(4 * NOISE**2 / largest) - 1) < 0.05
    assert math.sqrt(largest - NOISE**2) / math.sqrt(largest - 4 * NOISE**2) > 1.1  # a weight of 1 would be noticed


def closed_form(model, guide, x):
    """The ELBO of every datum, and the divergence of its posterior from the prior."""
    w, mean, sd = model.w.detach(), x @ guide.slope.detach(), float(guide.log_sd.exp().detach())
    error = (x - mean[:, None] * w).square().sum(1) + w.square().sum() * sd**2
    likelihood = -error / (2 * NOISE**2) - 1.5 * math.log(2 * math.pi * NOISE**2)
    divergence = 0.5 * (sd**2 + mean**2 - 1) - math.log(sd)
    return likelihood - divergence, divergence


def test_what_is_reported_is_the_elbo_and_what_chooses_the_weights_is_not():
    model, guide, fit = trained(4.0)
    elbos, divergences = closed_form(model, guide, line()["x"])
    assert abs(fit.elbo - float(elbos.mean())) < limit(1) * fit.elbo_se
    weighted = float((elbos - 3 * divergences).mean())
    best = max(row["objective"] for row in fit.history)
    assert abs(best - weighted) < limit(1) * 4 * fit.elbo_se
    assert fit.elbo - weighted > 10 * limit(1) * fit.elbo_se
    assert max(row["validation"] for row in fit.history) > fit.elbo  # weights of an earlier epoch had a higher ELBO
    assert fit.history[-1]["weight of z"] == 4.0


def test_a_weight_of_one_is_the_elbo():
    ours, theirs = (trained(weight, epochs=4)[2] for weight in (1.0, None))
    np.testing.assert_allclose([row["train"] for row in ours.history], [row["train"] for row in theirs.history], 1e-5)
    assert theirs.kl_weights == {}
    assert "objective" not in theirs.history[0]


# -- terms -------------------------------------------------------------------------------------------------------------


def test_all_objectives_agree_on_the_weighted_terms():
    model, guide, x = Linear(), LinearGuide(), line(50)["x"]
    elbos, divergences = closed_form(model, guide, x)
    for objective in (path_derivative, analytic_kl, elbo_terms):
        with torch.no_grad():
            runs = [objective(model, guide, {"x": x}, 50, {}, {"z": torch.tensor(3.0)}) for _ in range(200)]
        for values, wanted in (("local", elbos), ("bound", elbos - 2 * divergences)):
            draws = torch.stack([getattr(terms, values).mean() for terms in runs])
            assert abs(draws.mean() - wanted.mean()) < limit(6) * draws.std() / 200**0.5 + 1e-4


class Coins(PyroModule):
    def __init__(self, logit=0.4):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("k", dist.Bernoulli(logits=self.logit.expand(size)))


@pytest.mark.parametrize("rows", [4096, 8])
def test_discrete_latents_are_summed_out_with_their_weight(rows, monkeypatch):
    monkeypatch.setattr(objectives, "ROWS", rows)  # beyond which the data are divided
    guide, x = Coins(), torch.linspace(-1, 2, 10)
    q = torch.stack([1 - guide.logit.sigmoid(), guide.logit.sigmoid()])
    likelihood = torch.stack([dist.Normal(k, 1.0).log_prob(x) for k in (0.0, 1.0)], 1)
    divergence = (q * (q.log() - math.log(0.5))).sum()
    for objective in (path_derivative, elbo_terms):
        terms = objective(as_program(coin), guide, {"x": x}, 10, {}, {"k": 5.0})
        torch.testing.assert_close(terms.local, (likelihood @ q) - divergence)
        torch.testing.assert_close(terms.bound, (likelihood @ q) - 5 * divergence)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_weights_are_interpolated_between_epochs():
    found = schedules_of({"scale": [[100, 10.0], [200, 1.0]], "z": 4})
    assert found == {"scale": [[100.0, 10.0], [200.0, 1.0]], "z": [[0.0, 4.0]]}
    at = {epoch: weights_at(found, epoch)["scale"] for epoch in (0, 100, 150, 200, 300)}
    assert at == {0: 10.0, 100: 10.0, 150: 5.5, 200: 1.0, 300: 1.0}
    assert [still_change(found, epoch) for epoch in (0, 199, 200)] == [True, True, False]
    assert not still_change(schedules_of({"z": 4}), 0)


def test_a_schedule_ends_at_the_solution_of_its_last_weight_and_patience_waits_for_it():
    model, guide, fit = trained([[0, 8.0], [20, 0.5]], learned=False, patience=1)
    np.testing.assert_allclose(found(guide), posterior(model.w, 0.5), rtol=0.05)
    assert [fit.history[epoch]["weight of z"] for epoch in (9, 19)] == [4.25, 0.5]
    assert fit.epochs > 20


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded however few there are, and compared in every epoch."""
    for module in (state, loop):
        monkeypatch.setattr(module, "RECORDED_FROM", 0)
    monkeypatch.setattr(loop, "_VERIFIED", 1)


def test_a_recorded_training_follows_a_schedule(recorded):
    schedule = [[0, 8.0], [3, 0.5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ours = trained(schedule, epochs=4)[2]
    theirs, constant = (trained(w, epochs=4, compile=False)[2] for w in (schedule, 8.0))
    losses = [[row["train"] for row in fit.history] for fit in (ours, theirs, constant)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert abs(losses[0][-1] - losses[2][-1]) > 0.01  # a graph that kept the first weight would be noticed


def test_a_training_is_resumed_in_the_middle_of_a_schedule(tmp_path, monkeypatch):
    options = {"epochs": 4, "run_dir": tmp_path}
    *_, whole = uninterrupted = trained([[0, 8.0], [3, 0.5]], epochs=4)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 9)
        trained([[0, 8.0], [3, 0.5]], **options)
    for other in (4.0, None, [[0, 8.0], [2, 0.5]]):
        with pytest.raises(RunError, match="kl_weights was"):
            trained(other, resume=True, **options)
    *_, resumed = again = trained([[0, 8.0], [3, 0.5]], resume=True, **options)
    assert resumed == whole
    for ours, theirs in zip(again[:2], uninterrupted[:2], strict=True):
        assert same(ours.state_dict(), theirs.state_dict())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1.0, "0 or more"),
        (math.inf, "0 or more"),
        (0.0, "last weight is above 0"),
        ("much", r"give a number, or points such as \[\[0, 0.1\], \[20, 1.0\]\]"),
        ([0.1, 1.0], "give a number, or points"),
        ([], "give a number, or points"),
        ([[0, 0.1, 3]], "give a number, or points"),
        ([[20, 0.1], [0, 1.0]], "epochs of its points must rise"),
        ([[0, 1.0], [20, 0.0]], "last weight is above 0"),
    ],
)
def test_weights_that_are_none_are_refused(weight, message):
    with pytest.raises(InferenceError, match=f"kl_weights: 'z' has .*{message}"):
        trained(weight)


def test_names_and_objectives_without_such_a_divergence_are_refused():
    with pytest.raises(InferenceError, match=r"names \['scale'\], which are no latents of a datum; those are \['z'\]"):
        trained(None, kl_weights={"scale": 2.0})
    with pytest.raises(InferenceError, match=r"objective='iwae' has no divergences.*use objective='stl' or 'kl'"):
        trained(2.0, objective="iwae")
    x = {"x": torch.randn(40, 1, 4, 4)}
    model = cal.models.create("ea-vae", shape=(1, 4, 4), latents=2)
    guide = cal.guides.amortize(model, x, structure="collapsed")
    with pytest.raises(InferenceError, match=r"a collapsed guide .* use structure='faithful'"):
        cal.inference.fit(model, guide, x, epochs=1, kl_weights={"z": 2.0})
    cal.inference.fit(model, cal.guides.amortize(model, x, structure="faithful"), x, epochs=1, kl_weights={"z": 2.0})


def test_a_shared_latent_has_no_weight():
    x = {"x": torch.randn(40)}
    guide = cal.guides.amortize(hierarchical, x)
    with pytest.raises(InferenceError, match=r"names \['centre'\], which are no latents of a datum; those are \['z'\]"):
        cal.inference.fit(hierarchical, guide, x, epochs=1, kl_weights={"centre": 2.0})


def chain(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(y, 0.5))


class Backwards(PyroModule):
    """Draws y, then z given y."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, observed, size):
        with pyro.plate("data", size):
            y = pyro.sample("y", dist.Normal(self.slope * observed["x"], 0.5))
            pyro.sample("z", dist.Normal(0.5 * y, 0.7))


def test_divergences_that_cannot_be_told_apart_have_one_weight():
    x = {"x": torch.randn(40)}
    message = r"the guide draws 'y' before 'z', on which its prior depends.*let the guide draw 'z' first"
    with pytest.raises(InferenceError, match=message):
        cal.inference.fit(chain, Backwards(), x, epochs=1, kl_weights={"y": 2.0})
    cal.inference.fit(chain, Backwards(), x, epochs=1, kl_weights={"y": 2.0, "z": 2.0})
    for structure in ("faithful", "mean-field"):
        guide = cal.guides.amortize(chain, x, structure=structure)
        cal.inference.fit(chain, guide, x, epochs=1, kl_weights={"y": 2.0})
