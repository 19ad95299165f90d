"""Programs whose latents are all discrete: their posterior is a finite sum, here written a second time as one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from pyro import poutine

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError
from calibrant.inference.fitting.objectives import elbo_terms, path_derivative
from calibrant.program import as_program

DATA = 5
BITS = [torch.tensor(0.0), torch.tensor(1.0)]
UNITS = list(torch.eye(3))
LEVELS = torch.tensor([-1.5, 0.0, 2.0])


def classes(size):
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.deterministic("level", LEVELS.to(k.device)[k])
        pyro.sample("x", dist.Normal(LEVELS[k], 1.0))


def bits(size):
    """Several bits, and one that depends on the first of them."""
    with pyro.plate("data", size):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.7])).to_event(1))
        c = pyro.sample("c", dist.Bernoulli(0.1 + 0.8 * b[:, 0]))
        pyro.sample("x", dist.Normal(b.sum(-1) - 2 * c, 0.5))


def unit(size):
    with pyro.plate("data", size):
        y = pyro.sample("y", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(y @ LEVELS.to(y), 1.0))


def units(size):
    """The class as a unit vector, twice, in one event."""
    with pyro.plate("data", size):
        y = pyro.sample("y", dist.OneHotCategorical(torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])).to_event(1))
        pyro.sample("x", dist.Normal((y @ LEVELS.to(y)).sum(-1), 1.0))


def counts(size):
    with pyro.plate("data", size):
        n = pyro.sample("n", dist.Binomial(4, torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(n, 1.0))


def chain(size):
    """A hidden Markov chain of three steps, whose last observation is weighted by a factor."""
    with pyro.plate("data", size):
        for t in range(3):
            logits = torch.zeros(size, 3) if t == 0 else 2 * torch.eye(3)[k]  # noqa: F821
            k = pyro.sample(f"k{t}", dist.Categorical(logits=logits))
            if t < 2:
                pyro.sample(f"x{t}", dist.Normal(LEVELS[k], 1.0))
        pyro.factor("seen", -0.5 * (LEVELS[k] - 1.0) ** 2)


def known(size, label):
    """The prior of a datum depends on a covariate, and excludes a class."""
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Categorical(logits=torch.where(label[:, None] == torch.arange(3), -torch.inf, 0.0)))
        pyro.sample("x", dist.Normal(LEVELS[k], 1.0))


def mixed_classes(size):
    """The prior is a mixture of distributions of classes."""
    parts = dist.Categorical(torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]))
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts))
        pyro.sample("x", dist.Normal(LEVELS[k], 1.0))


def mixed_bits(size):
    """The prior of two bits is a mixture whose components are chosen for each of them."""
    weights, parts = (
        dist.Categorical(torch.tensor([[0.3, 0.7], [0.5, 0.5]])),
        dist.Bernoulli(torch.tensor([[0.1, 0.8]] * 2)),
    )
    with pyro.plate("data", size):
        b = pyro.sample("b", dist.MixtureSameFamily(weights, parts).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(-1), 1.0))


PROGRAMS: dict[str, tuple[Callable[..., Any], dict[str, list[torch.Tensor]]]] = {
    "classes": (classes, {"k": list(torch.arange(3))}),
    "bits": (bits, {"b": [torch.stack(b) for b in itertools.product(BITS, repeat=3)], "c": BITS}),
    "unit": (unit, {"y": UNITS}),
    "units": (units, {"y": [torch.stack(y) for y in itertools.product(UNITS, repeat=2)]}),
    "counts": (counts, {"n": [torch.tensor(float(n)) for n in range(5)]}),
    "chain": (chain, {f"k{t}": list(torch.arange(3)) for t in range(3)}),
    "known": (known, {"k": list(torch.arange(3))}),
    "mixed classes": (mixed_classes, {"k": list(torch.arange(3))}),
    "mixed bits": (mixed_bits, {"b": [torch.stack(b) for b in itertools.product(BITS, repeat=2)]}),
}
Posterior = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]


def observations(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    sites = ["x0", "x1"] if name == "chain" else ["x"]
    values = torch.randn(len(sites), DATA, generator=torch.Generator().manual_seed(3)) + 0.5
    return dict(zip(sites, values, strict=True)), ({"label": torch.arange(DATA) % 3} if name == "known" else {})


def by_hand(name: str) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """All combinations of values, and log p(values, x) `(combinations, data)`, by Pyro's handlers, one at a time."""
    program, values = PROGRAMS[name]
    observed, covariates = observations(name)
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    joint = torch.empty(len(combinations), DATA, dtype=torch.float64)
    for row, chosen in enumerate(combinations):
        for datum in range(DATA):
            held = {n: v[None] for n, v in chosen.items()} | {n: v[datum : datum + 1] for n, v in observed.items()}
            conditioned = poutine.condition(program, data=held)
            run = poutine.trace(conditioned).get_trace(1, **{n: v[datum : datum + 1] for n, v in covariates.items()})
            joint[row, datum] = run.log_prob_sum()
    return combinations, joint


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_reference_is_the_finite_sum(name: str, method: str) -> None:
    program, (observed, covariates) = PROGRAMS[name][0], observations(name)
    combinations, joint = by_hand(name)
    tree = cal.inference.reference(program, observed, method, draws=1000, covariates=covariates)
    assert tree["posterior"].attrs["method"] == "exact"
    gate = tree["convergence"]
    assert gate["is_reference"].values.all()
    np.testing.assert_allclose(gate["log_evidence"].values, joint.logsumexp(0), rtol=1e-5, atol=1e-5)
    probabilities, count, scores = joint.softmax(0).numpy(), 4000, []
    for row, chosen in enumerate(combinations):
        same = np.ones((4, 1000, DATA), dtype=bool)
        for site, value in chosen.items():
            drawn = tree["posterior"][site].transpose("chain", "draw", "data", ...).values.reshape(4, 1000, DATA, -1)
            same &= (drawn == value.reshape(-1).numpy()).all(-1)
        p = probabilities[row]
        assert not same[..., p == 0].any()
        scores.append((same.mean((0, 1)) - p)[p > 0] / np.sqrt(np.maximum(p * (1 - p), 1 / count) / count)[p > 0])
    assert np.abs(np.concatenate(scores)).max() < limit(joint.numel())


def test_recorded_values_belong_to_the_draws() -> None:
    posterior = cal.inference.reference(classes, {"x": torch.randn(DATA)}, draws=10)["posterior"]
    np.testing.assert_array_equal(posterior["level"], LEVELS.numpy()[posterior["k"].values])
    assert posterior.attrs["latents"] == '["k"]'


def test_draws_do_not_depend_on_the_number_of_other_data() -> None:
    x = torch.randn(DATA)
    some, every = (cal.inference.reference(classes, {"x": part}, draws=50)["posterior"]["k"] for part in (x[:2], x))
    np.testing.assert_array_equal(some.values, every.values[:, :, :2])


@pytest.mark.parametrize("method", ["nuts", "pyro-nuts"])
def test_chains_are_refused_with_the_method_that_works(method: str) -> None:
    with pytest.raises(InferenceError, match=r"are discrete.*use method='exact'"):
        cal.inference.reference(classes, {"x": torch.randn(DATA)}, method)


def test_a_datum_without_a_density_is_named() -> None:
    def program(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("inside", torch.where(k > 5, 0.0, -torch.inf))

    with pytest.raises(InferenceError, match="evidence of datum 0 is -inf"):
        cal.inference.reference(program, {"x": torch.zeros(2)})


def trained(program: Callable[..., Any], observed: dict[str, torch.Tensor], epochs: int) -> Any:
    guide = cal.guides.amortize(program, observed)
    cal.inference.fit(program, guide, observed, epochs=epochs, batch_size=20, lr=0.01)
    return guide


def exact_guide(name: str) -> Callable[..., Any]:
    """A guide that is the posterior: every latent given the earlier ones, from the sums by hand."""
    combinations, joint = by_hand(name)
    sites = list(PROGRAMS[name][1])
    prior = {n: s["fn"] for n, s in cal.program.trace(PROGRAMS[name][0], DATA).nodes.items() if n in sites}

    def guide(observed, size):
        datum = (observed["x"][:, None] == observations(name)[0]["x"].to(observed["x"])).int().argmax(1)
        with pyro.plate("data", size):
            for site in sites:
                values = torch.stack([one[site] for one in combinations]).to(observed["x"])
                if isinstance(prior[site], dist.OneHotCategorical):
                    pyro.sample(site, dist.OneHotCategorical(logits=joint.T.to(observed["x"])[datum]))
                else:
                    order = values.reshape(-1).argsort()
                    pyro.sample(site, dist.Categorical(logits=joint.T.to(observed["x"])[datum][:, order]))

    return guide


@pytest.mark.parametrize("name", ["classes", "unit", "counts", "mixed classes"])
def test_objectives_sum_out_every_kind_of_values(name: str) -> None:
    """At the posterior, the ELBO of every datum is its log evidence, without noise."""
    x = observations(name)[0]
    _, joint = by_hand(name)
    for objective in (elbo_terms, path_derivative):
        terms = objective(PROGRAMS[name][0], as_program(exact_guide(name)), x, DATA, {})
        torch.testing.assert_close(terms.local, joint.logsumexp(0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classes", "unit", "counts", "mixed classes"])
def test_a_guide_learns_the_finite_posterior(name: str) -> None:
    program = PROGRAMS[name][0]
    x = {"x": cal.program.sample_prior(program, 300, seed=0)["x"]}
    tree = cal.inference.posterior(program, trained(program, x, 30), x, draws=200)
    evidence = float(cal.inference.log_evidence(program, x).mean())
    elbo = float((tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]).mean())
    assert evidence - 0.06 < elbo < evidence + 0.01
    assert float(cal.evaluation.weights(tree)["log_evidence"].mean()) == pytest.approx(evidence, abs=0.02)
    assert cal.inference.importance(tree)["posterior"].sizes["draw"] == 200


def test_a_check_goes_on_and_judges_the_evidence() -> None:
    x = {"x": cal.program.sample_prior(classes, 300, seed=0)["x"]}
    good, bad = trained(classes, x, 15), cal.guides.amortize(classes, x)
    with torch.no_grad():
        bad.heads[0].out.bias += torch.tensor([3.0, 0.0, 0.0])
    few = {"x": x["x"][:40]}
    for guide, status in ((good, "pass"), (bad, "fail")):
        found = cal.evaluation.check(classes, guide, few, draws=500, simulations=200)
        assert {v.quantity: v.status for v in found.verdicts}["evidence gap"] == status
        assert (found.conclusion.status == "fail") == (status == "fail")
        assert found.result.calibration is not None
        assert found.result.comparison is not None
        assert found.result.comparison.attrs["discrete"] == "k"
        assert any("nothing to refine" in note for note in found.result.config["notes"])


INFINITE: dict[str, Callable[[], Any]] = {
    "poisson": lambda: dist.Poisson(2.0),
    "geometric": lambda: dist.Geometric(torch.tensor(0.5)),
    "mixture": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(torch.ones(2))),
    "multinomial": lambda: dist.Multinomial(2, torch.ones(3)),
}


@pytest.mark.parametrize("prior", INFINITE.values(), ids=INFINITE)
def test_values_that_cannot_be_listed_are_refused_with_a_remedy(prior: Callable[[], Any]) -> None:
    def program(size):
        with pyro.plate("data", size):
            n = pyro.sample("n", prior().expand([size]))
            pyro.sample("x", dist.Normal(n.reshape(size, -1).sum(-1), 1.0))

    with pytest.raises(InferenceError, match="a Categorical"):
        cal.inference.reference(program, {"x": torch.randn(3)})
    with pytest.raises(ProgramError, match="a Categorical"):
        cal.guides.amortize(program, {"x": torch.randn(3)})


def long_chain(size):
    with pyro.plate("data", size):
        for t in range(8):
            logits = torch.zeros(size, 3) if t == 0 else 2 * torch.eye(3)[k]  # noqa: F821
            k = pyro.sample(f"k{t}", dist.Categorical(logits=logits))
            pyro.sample(f"x{t}", dist.Normal(LEVELS[k], 1.0))


def test_long_chains_are_refused_early_and_the_remedy_runs() -> None:
    x = torch.randn(6, 8)
    sites = {f"x{t}": x[:, t] for t in range(8)}
    for call in (cal.guides.amortize, cal.inference.reference):
        with pytest.raises(InferenceError, match=r"6561 combinations.*DiscreteHMM"):
            call(long_chain, sites)

    def remedy(size):
        with pyro.plate("data", size):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            seen = dist.Normal(shift[:, None, None] + LEVELS.to(shift), 1.0)
            stay = (2 * torch.eye(3)).expand(size, 1, 3, 3)
            pyro.sample("x", dist.DiscreteHMM(torch.zeros(size, 3), stay, seen, duration=8))

    guide = cal.guides.amortize(remedy, {"x": x})
    assert np.isfinite(cal.inference.fit(remedy, guide, {"x": x}, epochs=1).elbo)
