"""Calibration around the observed data: uniform for an exact procedure, and not for one with a planted defect."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.nn import PyroModule
from scipy.signal import lfilter
from scipy.stats import binom

from calibrant.data import Data
from calibrant.errors import InferenceError, ProgramError
from calibrant.evaluation import posterior_calibration, uniformity
from calibrant.evaluation.statistics.posterior_ranks import JOINT

X = {"x": 0.5 + torch.randn(10, generator=torch.Generator().manual_seed(0))}


def mean(size: int) -> None:
    """The posterior of m is N(Σx / (n + ¼), 1 / (n + ¼))."""
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(m, 1.0))


def tree(attrs: dict[str, Any] | None = None, **draws: np.ndarray) -> xr.DataTree:
    """Draws `(chain, draw, …)`, as a user would give them."""
    dims = ("chain", "draw", "data")
    arrays = {name: (dims[: value.ndim], value) for name, value in draws.items()}
    return xr.DataTree.from_dict({"/posterior": xr.Dataset(arrays, attrs=attrs or {})})


def exact(sd: float = 1.0, ignores: bool = False, count: int = 1000):
    """The exact posterior of m, one whose sd is wrong, or the prior."""

    def infer(data: dict[str, torch.Tensor], seed: int) -> xr.DataTree:
        x = data["x"].double().numpy()
        precision = 0.25 + (0 if ignores else len(x))
        noise = np.random.default_rng(seed).normal(size=(1, count)) * sd / math.sqrt(precision)
        return tree(m=noise if ignores else x.sum() / precision + noise)

    return infer


def smallest_p(found: xr.DataTree, quantity: str) -> float:
    return float(uniformity(found).sel(quantity=quantity)["p_value"])


def test_an_exact_procedure_is_uniform():
    found = posterior_calibration(mean, exact(), X, simulations=200)
    table = uniformity(found)
    assert table["quantity"].values.tolist() == ["m", *JOINT]
    assert float(table["p_value"].min()) * 3 > 1e-5
    assert (table.attrs["simulations"], table.attrs["latents"]) == (200, 1)
    assert 20 <= table.attrs["guide_draws"] <= 100
    np.testing.assert_allclose(found["recovery"]["contraction"].mean("draw"), 0.5, atol=0.05)
    assert float(found["recovery"]["z_score"].std()) == pytest.approx(1.0, abs=0.25)


def test_planted_defects_are_seen():
    """An sd that is .7 of the right one spreads the scores by √((1 + .7²)/2) / .7 = 1.23, since the truth is drawn with
    the wrong sd as well. The prior in place of the posterior is seen by the densities alone."""
    narrow = uniformity(posterior_calibration(mean, exact(0.7), X, simulations=400)).sel(quantity="m")
    assert float(narrow["p_value"]) < 1e-5
    assert float(narrow["spread"]) == pytest.approx(1.23, abs=4 * float(narrow["spread_se"]) + 0.02)
    prior = posterior_calibration(mean, exact(ignores=True), X, simulations=100)
    assert smallest_p(prior, "m") > 1e-5
    assert all(smallest_p(prior, name) < 1e-5 for name in JOINT)


@pytest.mark.truth
def test_false_alarms():
    """Of an exact procedure, each quantity at its level."""
    tables = [uniformity(posterior_calibration(mean, exact(), X, 100, 50, seed=seed)) for seed in range(60)]
    found = np.array([table["p_value"].values <= 0.05 for table in tables]).sum(0)
    assert found.max() <= binom.isf(1e-5 / 3, 60, 0.05)


def hierarchical(size: int, offset: torch.Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z + offset, 1.0))


def of_both(data: Any, seed: int) -> xr.DataTree:
    """Exact draws of m and, given m, of z."""
    rows, cols = data.tensors() if isinstance(data, Data) else (data, data)
    y, generator = (rows["x"] - cols["offset"]).double().numpy(), np.random.default_rng(seed)
    precision = 0.25 + len(y) / 2
    m = y.sum() / 2 / precision + generator.normal(size=(1, 500)) / math.sqrt(precision)
    return tree(m=m, z=(m[..., None] + y) / 2 + math.sqrt(0.5) * generator.normal(size=(1, 500, len(y))))


def test_local_latents_and_covariates():
    """Draws of local latents give the log joint of all latents; the covariates are repeated for the new data."""
    offset, seen = torch.linspace(-1, 1, 10), []

    def infer(data, seed):
        seen.append(data)
        return of_both(data, seed)

    found = posterior_calibration(hierarchical, infer, X, 150, 50, covariates={"offset": offset})
    assert float(uniformity(found)["p_value"].min()) * 3 > 1e-5
    assert [len(given["x"]) for given in seen[:3]] == [10, 20, 20]
    assert all(torch.equal(given["offset"][-10:], offset) for given in seen)
    assert all(torch.equal(given["x"][:10], X["x"]) for given in seen)
    assert not torch.equal(seen[1]["x"], seen[2]["x"])
    alone = posterior_calibration(
        hierarchical,
        lambda data, seed: tree(m=of_both(data, seed)["posterior"]["m"].values),
        Data(X, {"offset": offset}),
        20,
    )
    assert list(alone["prior_sbc"].data_vars) == ["m"]


def test_a_log_joint_is_that_of_the_program():
    """A procedure that gives m but the wrong z, a prior draw, is seen by the densities."""

    def infer(data, seed):
        right = of_both(data, seed)["posterior"]
        noise = np.random.default_rng(seed + 1).normal(size=right["z"].shape)
        return tree(m=right["m"].values, z=right["m"].values[..., None] + noise)

    found = posterior_calibration(hierarchical, infer, X, 100, 50, covariates={"offset": torch.zeros(10)})
    assert smallest_p(found, "m") > 1e-5
    assert smallest_p(found, "log_likelihood") < 1e-5


@pytest.mark.parametrize("thinned", [True, False])
def test_draws_of_chains_are_thinned(thinned):
    """Ranks among draws that are not independent are too often extreme; a tree may say that they are independent."""

    def infer(data, seed):
        precision, noise = 0.25 + len(data["x"]), np.random.default_rng(seed).normal(size=(2, 4000))
        chains = lfilter([math.sqrt(1 - 0.97**2)], [1, -0.97], noise)[:, 500:]
        draws = float(data["x"].sum()) / precision + chains / math.sqrt(precision)
        return tree(m=draws) if thinned or len(data["x"]) == 10 else tree({"independent_draws": 1}, m=draws[:, :50])

    found = posterior_calibration(mean, infer, X, 100)
    assert (found["prior_sbc"].attrs["guide_draws"] < 100) == thinned
    assert (smallest_p(found, "m") > 1e-5) == thinned


def test_the_seed_decides_and_a_procedure_may_take_none():
    def plain(data):
        precision = 0.25 + len(data["x"])
        return tree(m=(data["x"].sum() / precision + torch.randn(1, 500) / math.sqrt(precision)).numpy())

    first, again, other = (posterior_calibration(mean, plain, X, 20, 20, seed=seed)["prior_sbc"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["m"], again["m"])
    assert not np.allclose(first["m"], other["m"])
    assert len(np.unique(first["m"])) == 20


def test_a_program_whose_control_flow_depends_on_values():
    def branches(size):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(m if float(m) > 0 else 1.0 * m, 1.0))

    same = [posterior_calibration(program, exact(), X, 20, 20)["prior_sbc"] for program in (mean, branches)]
    for name in ("m", *JOINT):
        np.testing.assert_allclose(same[0][name], same[1][name])


def local(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def test_refusals():
    def answers(found):
        return lambda data: found

    many = np.random.default_rng(0).normal(size=(1, 100))
    slow = np.repeat(many[:, :5], 20, 1)
    cases: list[tuple[Any, str]] = [
        (None, "infer returned NoneType without a group 'posterior' for the observed data"),
        (tree(mu=many), r"no draws of the shared latents \['m'\] for the observed data: its posterior has \['mu'\]"),
        (tree(m=np.zeros((1, 100, 3))), r"draws of 'm' with dimensions .* wanted \('chain', 'draw'\) and then \(\)"),
        (tree(m=many * np.nan), "draws of 'm' that are not finite"),
        (tree(m=many[:, :3]), "1 × 3 draws for the observed data"),
        (tree(m=slow), "effectively independent draws of 'm' for the observed data, and at least 20 are needed"),
    ]
    for answer, message in cases:
        with pytest.raises(InferenceError, match=message):
            posterior_calibration(mean, answers(answer), X, 20)
    with pytest.raises(InferenceError, match="too few to tell"):
        posterior_calibration(mean, exact(), X, simulations=10)
    with pytest.raises(InferenceError, match=r"\['z'\], are local.*evaluation.calibration"):
        posterior_calibration(local, exact(), X, 20)

    learned = Learned()

    def trains(data):
        learned.sd.data += 0.1
        return tree(m=many)

    with pytest.raises(InferenceError, match="changed the weights of the model"):
        posterior_calibration(learned, trains, X, 20)

    def becomes_slow(data):
        return tree({"independent_draws": 1}, m=many) if len(data["x"]) == 10 else tree(m=slow)

    with pytest.raises(InferenceError, match="draws of 'm' for half of the simulations"):
        posterior_calibration(mean, becomes_slow, X, 20)

    def factor(size):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(m, 1.0))
            pyro.factor("f", m * torch.ones(size))

    with pytest.raises(ProgramError, match="is a factor"):
        posterior_calibration(factor, exact(), X, 20)
    far = tree(m=1e38 + many.astype(np.float32))
    with pytest.raises(InferenceError, match="'x' that are not finite"):
        posterior_calibration(steep, answers(far), X, 20)


class Learned(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.sd = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, size: int) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(m, self.sd))


def steep(size: int) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(1e10 * m, 1.0))
