"""`inference.sample`: the forms of starts and data, the result, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import constraints

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference.references import lanes
from calibrant.inference.references.given_starts import GivenStarts
from calibrant.inference.references.partition import Places
from calibrant.memory import Measured
from calibrant.progress import silent

SHORT = {"warmup": 20, "draws": 30, "compile": False}
LONG = {**SHORT, "draws": 500}  # long enough for a verdict; where they are refused, none are drawn
X = torch.tensor([-2.0, 0.0, 5.0])


def normal(q, x=0.0):
    return -0.5 * ((q - torch.as_tensor(x)[..., None]) ** 2).sum(-1)


def named(q, x):
    return -0.5 * ((q["mu"] - x["y"]) ** 2 + (q["sigma"].log() - q["mu"][:, None]).square().sum(-1))


NAMED: dict[str, Any] = {
    "start": {"mu": torch.randn(3, 4), "sigma": torch.ones(3, 4, 2)},
    "data": {"y": X},
    "supports": {"sigma": constraints.positive},
}


@contextmanager
def without_verdict() -> Iterator[None]:
    """Chains that are too short for a verdict are drawn, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibrant.inference.sampling_densities.shortfall", lambda chains, draws: "")
        patch.setattr("calibrant.inference.references.repair._LOOKS", 1)
        yield


@pytest.fixture
def quick() -> Iterator[None]:
    with without_verdict():
        yield


@pytest.fixture(scope="module")
def many() -> Any:
    """Three posteriors with labels, in three dimensions."""
    start = torch.linspace(-1.0, 1.0, 12).reshape(1, 4, 3).expand(3, 4, 3)
    with without_verdict():
        return cal.inference.sample(normal, start, data=X, coords={"data": ["a", "b", "c"]}, seed=2, **SHORT)


def test_a_single_posterior_has_no_dimension_of_data(quick):
    tree = cal.inference.sample(normal, np.random.default_rng(0).normal(size=(4, 2)), **SHORT)
    q = tree["posterior"]["q"]
    assert (q.dims, q.shape, q.dtype) == (("chain", "draw", "q_dim_0"), (4, 30, 2), np.float64)
    assert tree["sample_stats"]["lp"].dims == ("chain", "draw")
    np.testing.assert_allclose(tree["sample_stats"]["lp"], -0.5 * (q**2).sum("q_dim_0"), rtol=1e-12)
    assert set(tree.children) == {"posterior", "sample_stats", "convergence"}
    assert tree["convergence"].sizes == {"data": 1}
    attributes = tree["posterior"].attrs
    assert (attributes["method"], attributes["latents"]) == ("nuts", '["q"]')
    assert json.loads(attributes["settings"]) == {"chains": 4, "warmup": 20, "draws": 30, "seed": 0}


def test_names_dimensions_and_labels_are_in_the_result(quick):
    dims, coords = {"sigma": ["side"]}, {"side": ["left", "right"], "data": [7, 8, 9]}
    tree = cal.inference.sample(named, **NAMED, dims=dims, coords=coords, **SHORT)
    posterior = tree["posterior"].dataset
    assert posterior["mu"].dims == ("chain", "draw", "data")
    assert posterior["sigma"].dims == ("chain", "draw", "data", "side")
    assert {name: posterior[name].values.tolist() for name in coords} == coords
    assert (posterior["sigma"] > 0).all()
    assert tree["observed_data"]["y"].values.tolist() == X.tolist()


def test_draws_of_a_posterior_follow_from_its_label_and_not_from_its_place(quick, many):
    start = torch.linspace(-1.0, 1.0, 12).reshape(1, 4, 3)
    alone = cal.inference.sample(normal, start, data=X[1:2], coords={"data": ["b"]}, seed=2, **SHORT)
    assert (alone["posterior"]["q"].sel(data="b") == many["posterior"]["q"].sel(data="b")).all()
    other = cal.inference.sample(normal, start, data=X[1:2], coords={"data": ["b"]}, seed=3, **SHORT)
    assert (other["posterior"]["q"] != alone["posterior"]["q"]).all()


def test_a_function_of_one_point_gives_the_same_draws(quick, many):
    start = torch.linspace(-1.0, 1.0, 12).reshape(1, 4, 3).expand(3, 4, 3)
    labels = {"data": ["a", "b", "c"]}
    one = cal.inference.sample(normal, start, data=X, batched=False, coords=labels, seed=2, **SHORT)
    np.testing.assert_allclose(one["posterior"]["q"][:, :5], many["posterior"]["q"][:, :5], rtol=1e-6)


def test_a_function_that_cannot_be_recorded_runs_with_a_warning(quick):
    def log_density(q):
        return normal(q) if float(q.detach().abs().max()) < 1e6 else normal(q) - 1e9

    start = torch.randn(4, 1)
    with pytest.warns(RuntimeWarning, match="could not be recorded"):
        found = cal.inference.sample(log_density, start, **SHORT)
    recorded = cal.inference.sample(normal, start, **SHORT)
    np.testing.assert_allclose(found["posterior"]["q"][:, :5], recorded["posterior"]["q"][:, :5], rtol=1e-6)


def test_a_module_computes_the_density(quick):
    network = torch.nn.Linear(2, 1).double()
    tree = cal.inference.sample(lambda q: normal(q) + network(q).tanh()[:, 0], torch.randn(4, 2), **SHORT)
    assert np.isfinite(tree["posterior"]["q"]).all()


def test_starts_outside_the_support_are_drawn_anew(quick):
    def log_density(q):
        return torch.where(q[:, 0] > 0, normal(q), -torch.inf)

    start = torch.tensor([[0.5], [-1.0], [1.0], [2.0]])
    tree = cal.inference.sample(log_density, start, **SHORT)
    assert (tree["posterior"]["q"] > 0).all()


def test_a_posterior_without_a_finite_start_is_named(quick):
    start = torch.randn(3, 4, 1)
    tree = cal.inference.sample(lambda q, x: normal(q, x) - torch.where(x > 1, torch.inf, 0.0), start, data=X, **SHORT)
    reasons = tree["convergence"]["reason"].values
    assert ["no finite log density" in reason for reason in reasons] == [False, False, True]


# -- what is refused ---------------------------------------------------------------------------------------------------


def leaks(q):
    return normal(q - q.mean(0))


def knows_its_place(q):
    return normal(q) + torch.arange(len(q))


def draws(q):
    return normal(q + torch.randn_like(q))


def has_rows_of_its_own(q):
    return normal(q) + torch.zeros(6)


START = torch.randn(4, 2)
FUNCTIONS = {
    "a sum over rows": (
        lambda q: normal(q).sum(),
        "returns the shape (), and should return (6,): sum over",
    ),
    "a column": (lambda q: normal(q)[:, None], "returns the shape (6, 1)"),
    "no sum": (lambda q: -(q**2), "returns the shape (6, 2)"),
    "a sum over the wrong dimension": (lambda q: -(q**2).sum(0), "returns the shape (2,)"),
    "float32": (lambda q: normal(q).float(), "returns float32: parameters and data are float64"),
    "a module in float32": (lambda q: torch.nn.Linear(2, 1, dtype=torch.float32)(q)[:, 0], "module.double()"),
    "numpy": (lambda q: torch.as_tensor(-(q.detach().numpy() ** 2).sum(-1)), "cannot be differentiated"),
    "a number": (lambda q: 1.0, "returns float, not a tensor: return a tensor of shape (6,)"),
    "no function": (torch.eye(2), "log_density is no function"),
    "numpy of a tensor with a gradient": (lambda q: -(q.numpy() ** 2).sum(-1), "without numpy"),
    "data that are not given": (lambda q, x: normal(q), "called with the parameters alone"),
    "a typing error": (lambda q: q.missing, "has no attribute 'missing'"),
    "random numbers": (draws, "other values for the same points"),
    "a leak": (leaks, "in one row depends on other rows"),
    "a place": (knows_its_place, "or on the place of the row"),
    "rows of its own": (has_rows_of_its_own, "takes 6 rows, but not 3"),
    "nowhere": (lambda q: normal(q) * torch.nan, "finite at none of the 4 starts (nan at 4)"),
}


@pytest.mark.parametrize(("function", "message"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_that_are_no_such_density_are_refused(function, message):
    with pytest.raises(InferenceError) as refused:
        cal.inference.sample(function, START, **LONG)
    assert message in str(refused.value)


def test_a_function_of_one_point_that_vmap_cannot_run_is_refused():
    def log_density(q):
        return -0.5 * (q**2).sum() if q[0] > 0 else -(q**2).sum()

    with pytest.raises(InferenceError, match=r"torch\.func\.vmap.*torch\.where"):
        cal.inference.sample(log_density, START, batched=False, **LONG)
    with pytest.raises(InferenceError, match=r"returns the shape \(2,\), and should return \(\)"):
        cal.inference.sample(lambda q: -(q**2), START, batched=False, **LONG)


class _Wrong(torch.autograd.Function):
    """−½ z², with a gradient that is a multiple of the right one."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(z)
        ctx.factor = factor
        return -0.5 * z**2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return -ctx.factor * ctx.saved_tensors[0] * grad, None


@pytest.mark.parametrize(("factor", "told"), [(-1.0, True), (0.5, True), (1.2, True), (1.0, False)])
def test_a_wrong_gradient_is_told(factor, told, monkeypatch, recwarn):
    monkeypatch.setattr("calibrant.inference.sampling_densities.run_and_repair", _enough)
    with pytest.raises(_EnoughError):
        cal.inference.sample(lambda q: _Wrong.apply(q, factor).sum(-1), START, **LONG)
    found = any("gradient of log_density does not fit its values" in str(warning.message) for warning in recwarn)
    assert found is told


class _EnoughError(Exception):
    """The checks are over."""


def _enough(*arguments: Any, **options: Any) -> None:
    raise _EnoughError


ROWS = torch.randn(3, 4, 2)
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "one point": ({"start": torch.zeros(2)}, "start has shape (2,): give a start for each chain, (chains, d)"),
    "one point for all posteriors": ({"start": torch.zeros(4, 2), "data": X}, "start.expand(3, -1, -1)"),
    "other posteriors": ({"start": ROWS[:2], "data": X}, "start has shape (2, 4, 2), and data have 3 rows"),
    "posteriors without data": ({"start": ROWS}, "start has shape (3, 4, 2)"),
    "other chains": ({"start": {"a": ROWS[0], "b": ROWS[0, :3]}}, "with different numbers of chains"),
    "a point by name": ({"start": {"a": torch.zeros(())}}, "start['a'] has shape ()"),
    "few chains": ({"start": ROWS[0, :2]}, "2 chains (at least 4 are needed): give more starts"),
    "few draws": ({"start": ROWS[0], "draws": 100}, "100 draws per chain (at least 500 are needed)"),
    "no numbers": ({"start": [["a"]]}, "start is no tensor or array of numbers"),
    "nothing": ({"start": {}}, "start is empty"),
    "infinity": ({"start": ROWS[0] / 0}, "start holds NaN or infinity"),
    "other rows of data": ({"start": ROWS, "data": {"a": X, "b": X[:2]}}, "{'a': 3, 'b': 2}"),
    "a name of a dimension": ({"start": {"draw": ROWS[0]}}, "no parameter can be called 'draw'"),
    "supports of a tensor": ({"start": ROWS[0], "supports": {"q": constraints.positive}}, "give start as a mapping"),
    "supports misspelt": (
        {"start": {"sigma": ROWS[0]}, "supports": {"sigm": constraints.positive}},
        "supports names 'sigm', which is no parameter: did you mean sigma?",
    ),
    "a discrete support": (
        {"start": {"n": torch.ones(4)}, "supports": {"n": constraints.positive_integer}},
        "torch has no map",
    ),
    "starts on the line": (
        {"start": {"s": torch.tensor([1.0, -1.0, 2.0, 3.0])}, "supports": {"s": constraints.positive}},
        "start['s'] leaves the support GreaterThan(lower_bound=0.0) in 1 chains, first at (1,)",
    ),
    "dims misspelt": ({"start": {"sigma": ROWS[0]}, "dims": {"sigme": ["side"]}}, "dims names 'sigme'"),
    "supports without a name": ({"start": {"s": ROWS[0]}, "supports": constraints.positive}, "name of a parameter →"),
    "too many dims": (
        {"start": ROWS[0], "dims": {"q": ["a", "b"]}},
        "dims['q'] = ['a', 'b']: give a list of at most 1",
    ),
    "coords of another length": (
        {"start": ROWS[0], "dims": {"q": ["side"]}, "coords": {"side": ["left"]}},
        "coords['side'] holds 1 labels: give 2",
    ),
    "draws with a fraction": ({"start": ROWS[0], "draws": 500.5}, "draws=500.5: give a whole number"),
    "negative warmup": ({"start": ROWS[0], "warmup": -1}, "warmup=-1: give a whole number"),
    "a word for dense": ({"start": ROWS[0], "dense": "yes"}, "dense='yes': give True, False or"),
    "labels": ({"start": ROWS, "data": X, "coords": {"data": [1, 1, 2]}}, "3 different labels"),
    "acceptance": ({"start": ROWS[0], "target_accept": 1.0}, "target_accept=1.0"),
    "memory": ({"start": torch.zeros(4, 1000), "draws": 200_000}, "4 × 200000 draws of 1000 numbers in 1 posteriors"),
}


@pytest.mark.parametrize(("arguments", "message"), FORMS.values(), ids=FORMS)
def test_forms_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(InferenceError) as refused:
        cal.inference.sample(normal, **{**LONG, **arguments})
    assert message in str(refused.value)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_results_take_no_more_than_three_times_the_memory_of_the_draws(monkeypatch):
    """Vectors of the chains, values of the parameters by blocks, and these put together."""
    monkeypatch.setattr(lanes, "_RECORD_ROWS", 512)
    posteriors, width = 64, 100
    start = {"s": torch.ones(posteriors, 4, width)}
    draws = 8 * posteriors * 4 * 60 * width
    with Measured() as measured:
        run = _run(start, torch.zeros(posteriors), lanes.NutsSettings(draws=60), {"s": constraints.positive})
        run.q[:] = 0.0
        run.complete[:] = True
        result = run.result()
    assert result.draws["s"].nbytes == draws
    assert 2 * draws < measured.peak < 3.5 * draws


def test_lanes_are_fewer_where_data_are_large(monkeypatch):
    monkeypatch.setitem(lanes._LANE_BYTES, "cpu", 2**24)
    start = torch.randn(256, 4, 2)
    few = [_run(start, torch.zeros(256, size), lanes.NutsSettings())._capacity() for size in (1, 2**12)]
    assert few[0] > 4 * few[1] >= 4 * 4


def _run(start: Any, data: torch.Tensor, settings: lanes.NutsSettings, supports: Any = ()) -> lanes._Run:
    given = GivenStarts.of(start, data, dict(supports))
    target, places = given.target(normal, True, torch.device("cpu")), Places(given.vectors(torch.device("cpu")))
    return lanes._Run(target, torch.arange(len(data)), places, settings, silent)
