"""Classes as unit vectors, beside a continuous latent: the same posterior as that of classes as numbers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit

import calibrant as cal
from calibrant.inference.fitting.objectives import path_derivative
from calibrant.inference.graphs.recording import record
from calibrant.inference.references.target import target_of

A = torch.tensor([[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.5, -1.0], [-1.5, -0.5, 0.0, 1.0]])
B = torch.tensor([[0.8, -0.3, 0.4, 0.1], [-0.2, 0.6, 0.5, -0.7]])
LABEL, KNOWN = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 0, 0, 0, 1, 0])
COVARIATES = {"label": LABEL, "known": KNOWN}


class SemiSupervised(pyro.nn.PyroModule):
    """The class of some data is known, and x is Normal around a sum of what class and z contribute."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("a", A)
        self.register_buffer("b", B)

    def forward(self, size: int, label: torch.Tensor, known: torch.Tensor) -> None:
        logits = torch.where(known[:, None] > 0, 40 * torch.eye(3)[label], torch.zeros(size, 3))
        with pyro.plate("data", size):
            y = pyro.sample("y", self.kind(logits=logits))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mean = self.a[y] if self.kind is dist.Categorical else y @ self.a
            pyro.sample("x", dist.Normal(mean + z @ self.b, 0.7).to_event(1))


KINDS = (dist.OneHotCategorical, dist.OneHotCategoricalStraightThrough, dist.Categorical)


def data() -> dict[str, torch.Tensor]:
    noise = torch.randn(len(LABEL), 6, generator=torch.Generator().manual_seed(1))
    return {"x": A[LABEL] + noise[:, :2] @ B + 0.7 * noise[:, 2:]}


def truth() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p(y | x), E[z | x] and log p(x), by Bayes' rule with z integrated out."""
    x, a, b = data()["x"].double(), A.double(), B.double()
    covariance = b.T @ b + 0.49 * torch.eye(4)
    logits = torch.where(KNOWN[:, None] > 0, 40 * torch.eye(3)[LABEL], torch.zeros(len(LABEL), 3)).double()
    seen = torch.stack([torch.distributions.MultivariateNormal(mean, covariance).log_prob(x) for mean in a], 1)
    joint = logits.log_softmax(1) + seen
    means = torch.stack([(x - mean) @ torch.linalg.solve(covariance, b.T) for mean in a], 1)
    return joint.softmax(1), (joint.softmax(1)[..., None] * means).sum(1), joint.logsumexp(1)


def classes(tree: Any) -> np.ndarray:
    """Indicators of the classes of the draws, `(chain, draw, data, 3)`."""
    y = tree["posterior"]["y"].transpose("chain", "draw", "data", ...).values
    return y if y.ndim == 4 else (y[..., None] == np.arange(3)).astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_chains_is_that_of_the_mixture(kind: Any) -> None:
    x, model = data(), SemiSupervised(kind)
    with target_of(model, cal.data.Data(x, COVARIATES)) as target:
        q = torch.randn(len(LABEL), 2)
        found = target.log_density(q, q.new_zeros(len(LABEL), 0), target.covariates, target.observed)
        prior = torch.where(KNOWN[:, None] > 0, 40 * torch.eye(3)[LABEL], torch.zeros(len(LABEL), 3)).log_softmax(1)
        mean = A.double() + (q @ B.double())[:, None]
        seen = torch.distributions.Normal(mean, 0.7).log_prob(x["x"].double()[:, None]).sum(-1)
        wanted = (prior + seen).logsumexp(1) + torch.distributions.Normal(0.0, 1.0).log_prob(q).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_mixture(kind: Any) -> None:
    p, mean, _ = truth()
    tree = cal.inference.reference(SemiSupervised(kind), data(), covariates=COVARIATES, warmup=300, draws=1000)
    assert tree["convergence"]["is_reference"].values.all(), tree["convergence"]["reason"].values
    ess = float(tree["convergence"]["ess_bulk"].min())
    share = classes(tree).mean((0, 1))
    wanted = p.numpy()
    error = np.sqrt(np.maximum(wanted * (1 - wanted), 1 / ess) / ess)
    assert (np.abs(share - wanted) / error).max() < limit(wanted.size)
    z = tree["posterior"]["z"].values
    scores = (z.mean((0, 1)) - mean.numpy()) / (z.std((0, 1)) / np.sqrt(ess))
    assert np.abs(scores).max() < limit(mean.numel())
    assert (share[KNOWN.bool().numpy()].max(1) > 0.99).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_learns_the_mixture(kind: Any) -> None:
    torch.manual_seed(0)
    label, known = torch.randint(0, 3, (600,)), (torch.arange(600) % 4 == 0).long()
    x = {"x": A[label] + torch.randn(600, 2) @ B + 0.7 * torch.randn(600, 4)}
    model, covariates = SemiSupervised(kind), {"label": label, "known": known}
    guide = cal.guides.amortize(model, x, covariates=covariates)
    cal.inference.fit(model, guide, x, covariates=covariates, epochs=60, batch_size=60, lr=0.01)
    tree = cal.inference.posterior(model, guide, data(), covariates=COVARIATES, draws=2000)
    p, _, evidence = truth()
    assert np.abs(classes(tree).mean((0, 1)) - p.numpy()).max() < 0.1
    elbo = (tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]).mean(("chain", "draw"))
    assert float(evidence.mean()) - float(elbo.mean()) < 0.15
    bound = cal.evaluation.weights(tree)["log_evidence"]
    assert float(bound.mean()) == pytest.approx(float(evidence.mean()), abs=0.05)


def test_training_with_unit_vectors_runs_and_ranks_are_computed() -> None:
    model, x = SemiSupervised(dist.OneHotCategorical), data()
    guide = cal.guides.amortize(model, x, covariates=COVARIATES)
    assert [site["family"] for site in guide.spec["sites"] if site["name"] == "y"] == ["onehot"]
    assert np.isfinite(cal.inference.fit(model, guide, x, covariates=COVARIATES, epochs=1).elbo)
    found = cal.evaluation.calibration(model, guide, x, covariates=COVARIATES, simulations=100, draws=50)
    assert {"y", "z"} <= set(found["prior_sbc"].data_vars)


def test_a_step_with_unit_vectors_is_recorded() -> None:
    """Half of the time of a long training depends on it; torch's own one-hot draws cannot be recorded."""
    model, x = SemiSupervised(dist.OneHotCategorical), data()
    guide = cal.guides.amortize(model, x, covariates=COVARIATES)

    def step(seen: torch.Tensor) -> tuple[torch.Tensor]:
        return (path_derivative(model, guide, {"x": seen}, len(seen), COVARIATES).local,)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(step, x["x"])
