"""Draws come in blocks that keep to a budget of memory, and the block size does not change what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import refused
from pyro.nn import PyroModule
from small_models import build, hierarchical

import calibrant as cal
from calibrant import memory
from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics import predictive_tallies, simulation_ranks
from calibrant.inference import drawing, scoring
from calibrant.inference.bounds import evidence
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.memory import GIB, Measured, blocks, halved, in_blocks, is_memory_error, limited, measured_rows

WIDTH = 40


class Linear(PyroModule):
    """x = z + ε with the posterior Normal(x / 2, 1/2) in every entry."""

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([WIDTH]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


class Dense(PyroModule):
    """The exact posterior, with a covariance matrix for every row."""

    def forward(self, observed, size):
        covariance = 0.5 * torch.eye(WIDTH).repeat(size, 1, 1)
        with pyro.plate("data", size):
            pyro.sample("z", dist.MultivariateNormal(observed["x"] / 2, covariance_matrix=covariance))


OBSERVED = {"x": torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2))}


class Failing:
    """Raises an error of the given kind whenever a run has more rows than there is memory for."""

    def __init__(self, function: Any, most: int, error: Exception) -> None:
        self.function, self.most, self.error, self.failures = function, most, error, 0

    def __call__(self, guide: Any, observed: Any, size: int, *more: Any) -> Any:
        if size > self.most:
            self.failures += 1
            raise self.error
        return self.function(guide, observed, size, *more)


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
]


def right(draws: Any) -> None:
    """Draws `(chain, draw, data, entry)` of the exact posterior, within 5 Monte Carlo standard errors."""
    values = np.asarray(draws, dtype=float)[0]
    count = len(values)
    z = (values.mean(0) - OBSERVED["x"].numpy() / 2) / np.sqrt(0.5 / count)
    assert np.abs(z).max() < 5
    assert abs(values.var(0).mean() / 0.5 - 1) < 5 * np.sqrt(2 / values[..., 0].size / WIDTH)


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 300])
def test_what_lives_at_the_same_time_is_measured(count):
    with Measured() as found:
        kept = torch.zeros(count, 100)
        for _ in range(5):
            kept = kept + 1  # the old and the new one live together
        kept.view(-1)[:10].square().sum()
    assert 2 * kept.nbytes <= found.peak <= 2 * kept.nbytes + 1000


def test_the_rows_of_a_block_follow_from_the_memory_of_a_row():
    constant = torch.zeros(50_000)

    def run(times: int) -> torch.Tensor:
        every_time = constant + 1
        return torch.zeros(4 * times, 1000).sum() + every_time.sum()

    assert measured_rows(100, 4, run) == 100
    with limited(4_000_000 / GIB):
        assert measured_rows(10**6, 4, run) == pytest.approx(1000, rel=0.1)  # 4,000 bytes a row
    with limited(1 / GIB):
        assert measured_rows(10**6, 4, run) == 1


def test_what_is_known_of_a_program_is_not_measured_again():
    calls: list[int] = []

    def run(times: int) -> torch.Tensor:
        calls.append(times)
        return torch.zeros(4 * times, 1000)

    known: dict[tuple[int, int], int] = {}
    with limited(4_000_000 / GIB):
        first = measured_rows(10**6, 4, run, known)
        assert measured_rows(10**6, 4, run, known) == first == pytest.approx(1000, rel=0.1)
    assert calls == [32, 16]
    with limited(2_000_000 / GIB):  # the limit is today's, whatever it was when the rows were measured
        assert measured_rows(10**6, 4, run, known) == pytest.approx(500, rel=0.1)
    measured_rows(10**6, 2, run, known)
    assert calls == [32, 16, 32, 16]  # other rows


def test_problems_with_other_data_know_the_memory_of_a_run():
    program = cal.models.create("ppca", shape=(4,), latents=2)
    guide = cal.guides.amortize(program, {"x": torch.zeros(8, 4)})
    problem = Problem.of(program, guide, {"x": torch.zeros(8, 4)})
    posterior_of(problem, 50)
    assert problem.peaks
    assert problem.of_others(Data({"x": torch.ones(8, 4)})).peaks is problem.peaks
    assert problem.with_guide(guide).peaks == {}


def test_measuring_leaves_random_state_as_it_is():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured_rows(10**9, 4, lambda times: torch.randn(times))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("free", "expected"), [("MemAvailable:    4194304 kB\n", 2 * GIB), ("nothing", None)])
def test_the_budget_is_half_of_what_is_free(free, expected, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\n{free}")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert expected is None or memory.budget() == expected
    assert memory.budget() > 0
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 2}\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 0\n")
    assert memory.budget() == GIB // 4
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")  # files, which the system gives up
    assert memory.budget() == 3 * GIB // 8
    (tmp_path / "memory.max").write_text("max\n")
    assert expected is None or memory.budget() == expected
    with limited(3.0):
        assert memory.budget() == 3 * GIB
        with limited(None):
            assert memory.budget() == 3 * GIB


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 7, 20, 21, 100, 1000])
@pytest.mark.parametrize(("data", "draws"), [(1, 1), (5, 7), (20, 3)])
def test_blocks_hold_everything_once_and_in_its_place(data, draws, rows):
    index = torch.cat([(i[:, None] * draws + d).flatten() for i, parts in blocks(data, draws, rows) for d in parts])
    assert sorted(index.tolist()) == list(range(data * draws))
    assert all(len(i) * len(d) <= rows for i, parts in blocks(data, draws, rows) for d in parts)
    found = in_blocks(lambda i, d: [d[:, None] * 100 + i], data, draws, rows)[0]
    assert torch.equal(found, torch.arange(draws)[:, None] * 100 + torch.arange(data))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [1, 2, 5, 11, 100])
def test_runs_are_halved_where_an_allocation_fails(most, error):
    def run(index: torch.Tensor, draws: torch.Tensor) -> list[torch.Tensor]:
        if len(index) * len(draws) > most:
            raise error
        return [draws[:, None] * 100 + index]

    found = halved(run, torch.arange(4), torch.arange(7))[0]
    assert torch.equal(found, torch.arange(7)[:, None] * 100 + torch.arange(4))


def test_other_errors_are_raised_and_one_row_is_the_least():
    def run(error: Exception) -> Any:
        def failing(*_: Any) -> Any:
            raise error

        return failing

    assert not is_memory_error(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        halved(run(RuntimeError("shape mismatch")), torch.arange(4), torch.arange(7))
    with pytest.raises(InferenceError, match="one draw of one datum"):
        halved(run(MemoryError()), torch.arange(4), torch.arange(7))


# -- draws -------------------------------------------------------------------------------------------------------------


def drawn(**options: Any) -> Any:
    return cal.inference.posterior(Linear(), cal.guides.wrap(Dense()), OBSERVED, draws=400, **options)


@pytest.mark.parametrize("gib", [1.0, 3.0, 1000.0])
def test_draws_do_not_depend_on_a_budget_that_holds_a_block(gib):
    ours, default = drawn(memory=gib), drawn()
    assert ours["posterior"].to_dataset().identical(default["posterior"].to_dataset())
    assert ours["sample_stats"].to_dataset().identical(default["sample_stats"].to_dataset())


@pytest.mark.parametrize("mib", [40, 10, 1, 0.001])
def test_draws_in_smaller_blocks_are_as_right(mib):
    """With 0.001 MiB every row is a run of its own."""
    tree = (
        drawn(memory=mib / 1024)
        if mib > 0.01
        else cal.inference.posterior(Linear(), cal.guides.wrap(Dense()), OBSERVED, draws=60, memory=mib / 1024)
    )
    right(tree["posterior"]["z"])
    stats = tree["sample_stats"]
    assert float((stats["log_p"] - stats["log_q"]).std(("chain", "draw")).max()) < 1e-4  # it is the posterior


def test_a_block_holds_as_much_as_is_allowed(monkeypatch):
    sizes: list[int] = []
    original = drawing.scored

    def counting(*given: Any, repeats: int = 1) -> Any:
        found = original(*given[:4], given[4] if len(given) > 4 else repeats)
        sizes.append(len(found.values["z"]))
        return found

    monkeypatch.setattr(drawing, "scored", counting)
    with Measured() as whole:
        drawn(memory=0.02)
    assert max(sizes) < 400 * 6  # one run without a budget
    assert whole.peak < 0.03 * GIB


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_draws_are_made_where_memory_is_shorter_than_it_seemed(error, monkeypatch):
    failing = Failing(scoring.guide_trace, 300, error)
    monkeypatch.setattr(scoring, "guide_trace", failing)
    right(drawn()["posterior"]["z"])
    assert failing.failures


def test_a_limit_that_is_no_number_of_gib_is_refused():
    for given in (0, -1.0, float("nan")):
        with pytest.raises(InferenceError, match="in GiB"):
            drawn(memory=given)
    assert "--memory 0.0: give the GiB" in refused("run", "ppca", "--memory", "0")


# -- calibration, evidence, predictive checks --------------------------------------------------------------------------


def calibrated(model: Any = None, guide: Any = None, observed: Any = None, **options: Any) -> Any:
    given = (model or Linear(), guide or cal.guides.wrap(Dense()), observed or OBSERVED)
    return cal.evaluation.calibration(*given, simulations=100, draws=100, **options)


@pytest.mark.parametrize("gib", [0.004, 0.0001])
def test_ranks_in_smaller_blocks_are_as_right(gib):
    assert calibrated(memory=1.0).identical(calibrated())
    found = cal.evaluation.uniformity(calibrated(memory=gib))
    assert float(found["p_value"].min()) * len(found["quantity"]) > 1e-4
    assert float(abs(found["spread"] - 1).max()) < 0.4


def test_ranks_given_shared_latents_come_in_parts_too():
    observed = {"x": torch.randn(20, generator=torch.Generator().manual_seed(3))}
    guide = cal.guides.amortize(hierarchical, observed)
    whole, parts = (calibrated(hierarchical, guide, observed, memory=m) for m in (None, 1e-5))
    assert whole["prior_sbc"].sizes == parts["prior_sbc"].sizes


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("recorded", [True, False])
def test_ranks_are_made_where_memory_is_shorter_than_it_seemed(error, recorded, monkeypatch):
    failing = Failing(simulation_ranks.guide_trace, 700, error)
    monkeypatch.setattr(simulation_ranks, "guide_trace", failing)
    monkeypatch.setattr(simulation_ranks, "_RECORDED_FROM", 2 if recorded else 1000)
    found = cal.evaluation.uniformity(calibrated())
    assert float(found["p_value"].min()) * len(found["quantity"]) > 1e-4
    assert failing.failures


def test_the_evidence_at_reference_draws_is_the_same_in_blocks():
    model, observed = build("ppca", 2)
    guide = cal.guides.amortize(model, observed)
    draws = cal.inference.reference(model, observed, draws=100, chains=2)["posterior"].dataset
    data = cal.data.Data(observed)
    whole = evidence.log_ratios(model, guide, data, draws)
    for gib in (1e-5, 1e-6):
        with limited(gib):
            np.testing.assert_allclose(evidence.log_ratios(model, guide, data, draws), whole, rtol=1e-12)


@pytest.mark.parametrize("error", ERRORS[1:3], ids=lambda error: type(error).__name__)
def test_predictive_draws_come_in_blocks_too(error, monkeypatch):
    given = (Linear(), cal.guides.wrap(Dense()), OBSERVED)
    whole = cal.evaluation.predictive_check(*given, draws=60)
    assert whole.identical(cal.evaluation.predictive_check(*given, draws=60))
    with limited(0.001):
        small = cal.evaluation.predictive_check(*given, draws=60)
    failing = Failing(predictive_tallies.guide_trace, 100, error)
    monkeypatch.setattr(predictive_tallies, "guide_trace", failing)
    for found in (small, cal.evaluation.predictive_check(*given, draws=60)):
        assert found.sizes == whole.sizes
        close = np.abs(found["predictive_mean"] - whole["predictive_mean"]) / whole["predictive_sd"]
        assert float(close.max()) < 5 * np.sqrt(2 / 60)
    assert failing.failures
