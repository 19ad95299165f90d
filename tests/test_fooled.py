"""What once fooled the check: short forms of the rows of benchmarks/power.py, which measures the rates."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from benchmarks import cells, power
from benchmarks.fooled import OneDirection
from benchmarks.hierarchy import Hierarchy
from benchmarks.planted import TwoModes
from calibrant.evaluation import compare, conclude, verdicts, weights
from calibrant.evaluation.judgements.against_reference import COMPARED
from calibrant.evaluation.judgements.decisions import Verdict

SHORT = cells.Budget(data=40, draws=300, simulations=1000, reference=200, ranked=100)
SHARED = cells.Budget(data=8, draws=20_000, simulations=2000, reference=2000, ranked=200)
CASES = {
    "one direction": ("prior as posterior", {"direction", "log likelihood", "evidence gap"}),
    "mean field": ("best mean field", {"direction", "log likelihood", "evidence gap"}),
    "own directions": ("best mean field", {"direction"}),
    "one pair": ("one correlation ignored", {"correlation", "direction"}),
    "Cauchy": ("median + 0.3", {"mean", "shape"}),
    "t, 2 degrees": ("scale × 0.8", {"sd"}),
    "LogNormal 1.5": ("scale × 0.8", {"sd", "shape"}),
    "hierarchy, 8 data": ("three bumps in the shared latent", {"shape"}),
}


SMALLER = {"one direction": lambda: OneDirection(80, 0.7), "mean field": lambda: OneDirection(40, 0.4)}


def check(program: str, guide: str, budget: cells.Budget, seed: int = 1) -> tuple[list[Verdict], str]:
    """Verdicts and status of a check."""
    source = SMALLER.get(program, power.PROBLEMS.get(program))()
    if isinstance(source, Hierarchy):
        post, ref, informed, ranks = source.sampled(guide, **asdict(budget), seed=seed)
    else:
        post, ref, informed, ranks = power.sampled(source, guide, budget, seed)
    comparison = compare(post, ref, informed=informed)
    found = verdicts(comparison, weights(post) if "sample_stats" in post.children else None, ranks)
    return found, conclude(found, comparison).status


def budget_of(program: str) -> cells.Budget:
    return SHARED if program.startswith("hierarchy") else SHORT


@pytest.mark.parametrize("program", CASES)
def test_the_planted_defect_fails_where_it_lies(program):
    guide, wanted = CASES[program]
    found, status = check(program, guide, budget_of(program))
    assert status == "fail"
    assert wanted <= {verdict.quantity for verdict in found if verdict.status == "fail"}


@pytest.mark.parametrize("program", [*CASES, "single data"])
def test_the_exact_guide_does_not_fail(program):
    found, status = check(program, "exact", budget_of(program))
    assert "fail" not in {verdict.status for verdict in found}
    assert status != "fail"


@pytest.mark.parametrize("program", ["Cauchy", "LogNormal 1.5", "single data"])
def test_the_exact_guide_passes_with_the_default_budget(program):
    assert check(program, "exact", cells.BUDGET)[1] == "pass"


@pytest.mark.parametrize("guide", ["one of 128: mean + 1 sd", "six of 128: sd × 0.68", "twelve of 128: sd × 0.78"])
def test_a_guide_that_is_wrong_for_few_data_fails_and_the_worst_is_named(guide):
    found, status = check("single data", guide, cells.BUDGET)
    assert status == "fail"
    (single,) = [verdict for verdict in found if verdict.quantity == "single data"]
    assert single.status == "fail"
    assert single.datum


def test_small_errors_of_all_sds_of_many_latents_do_not_fail():
    """3% in one direction, or at random: small in every latent and in every sum of latents."""
    for guide in ("sd × 1.03", "sds 3% off"):
        assert check("mean field", guide, SHORT)[1] != "fail"


def test_bumps_in_local_latents_given_the_shared_one_fail():
    found, status = check("hierarchy, 8 data", "three bumps in the local latents", SHARED)
    assert status == "fail"
    failed = {(verdict.site, verdict.quantity) for verdict in found if verdict.status == "fail"}
    assert ("z", "shape") in failed


def two_modes_with_a_partial_reference(guide: str) -> tuple[list[Verdict], str, list[Verdict]]:
    """Half of the data have no reference: verdicts with and without simulated data, and the status with them."""
    problem = TwoModes(0.1)
    post, ref, informed, ranks = power.sampled(problem, guide, cells.BUDGET, 2)
    gate = ref["convergence"].to_dataset()
    ref["convergence"] = gate.assign(is_reference=("data", np.arange(gate.sizes["data"]) % 2 == 0))
    comparison = compare(post, ref, informed=informed)
    found = verdicts(comparison, weights(post), ranks)
    return found, conclude(found, comparison).status, verdicts(comparison, weights(post))


def test_simulated_data_decide_where_many_data_have_no_reference():
    found, status, without = two_modes_with_a_partial_reference("exact")
    assert status == "pass"
    assert [verdict.status for verdict in found if verdict.quantity == "ranks"] == ["pass"]
    assert "pass" not in {verdict.status for verdict in without if verdict.quantity in COMPARED}
    found, status, _ = two_modes_with_a_partial_reference("missing mode")
    assert status == "fail"
    assert [verdict.status for verdict in found if verdict.quantity == "ranks"] == ["fail"]
