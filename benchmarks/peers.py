"""Our checks beside those of sbi and ArviZ, on the same draws: power at equal false-alarm rate.

    python -m benchmarks.peers [--quick] [--repetitions N] [--forests] [--json FILE]

A repetition is 500 simulations of the program with 500 draws of the guide each (ranks), and 500 draws of the guide
and of the exact posterior for one datum (C2ST). Every method gives a number that grows with the error it sees; the
threshold is the 95% quantile of that number for the exact guide, so that all methods accuse it equally often, whatever
they promise. "Nominal" is how often a method accuses the exact guide at its own threshold, p ≤ 0.05, where it has one.

Ours: `uniformity` and the log joint's bias and spread, TARP as a test of randomised ranks, `c2st`. sbi's: what
`check_sbc` says of the latents' ranks (Kolmogorov and Smirnov; C2ST), `check_tarp`, `c2st` (random forest); both of its
C2STs with `--forests` alone. ArviZ's: the simultaneous band of `ecdf_pit` around the latents' ranks and, as ours,
around the log joint's; its number is the smallest pointwise probability along the ECDF. ArviZ's uniformity tests (POT,
PRIT, PIET) are newer than the release that Python 3.11 has. Rows of sbi are left out where it is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import beta, binom
from torch import Generator, Tensor

from benchmarks.cells import Budget
from benchmarks.planted import Problem, pair
from benchmarks.power import pit_values, repeated, sbc_tree, trees
from benchmarks.structure import write
from calibrant.evaluation import c2st, uniformity

BUDGET = Budget(data=1, draws=500, simulations=500, ranked=500)
DEFECTS = ("sd × 0.9", "mean + 0.1 sd", "correlation ignored", "prior as posterior", "tails lost")
LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """Power of a method at equal false-alarm rate, by defect, and its own false-alarm rate where it states one."""

    method: str
    quantity: str
    repetitions: int
    nominal: float | None
    power: dict[str, float]


def repetition(problem: Problem, defect: str, number: int, forests: bool = False) -> dict[str, dict[str, Any]]:
    """Method → its number, and its p-value where it has one."""
    generator, guide = Generator().manual_seed(number), problem.guides[defect]
    theta, x = problem.simulate(BUDGET.simulations, generator)
    points, _ = problem.simulate(BUDGET.simulations, generator)
    drawn = guide.draw(x, BUDGET.draws, generator)
    pits = pit_values(problem, guide, theta, x, points, theta.std(0), drawn, generator)
    calibration = sbc_tree(problem, pits, BUDGET.draws)
    post, ref, _ = trees(problem, guide, BUDGET, generator)
    found = _ours(calibration, float(c2st(post, ref, seed=number)["c2st_p"][0]))
    found |= _arviz(calibration)
    one = [torch.from_numpy(tree["posterior"]["z"].values[0, : BUDGET.draws, 0]) for tree in (post, ref)]
    return found | _sbi(theta, drawn[0], one, number, forests)


def _of_p(p_value: float) -> dict[str, Any]:
    return {"number": -p_value, "p": p_value}


def _ours(calibration: xr.DataTree, classified: float) -> dict[str, dict[str, Any]]:
    table = uniformity(calibration)
    row = table.sel(quantity="log_joint")
    bias = abs(float(row["bias"] / row["bias_se"]))
    spread = abs(float(np.log(row["spread"]) / (row["spread_se"] / row["spread"])))
    p_values = {str(q): float(p) for q, p in zip(table["quantity"].values, table["p_value"].values, strict=True)}
    latents = [p for q, p in p_values.items() if q.startswith("z[")]
    return {
        "calibrant: log joint, bias and spread": {"number": max(bias, spread)},
        "calibrant: log joint, ECDF": _of_p(p_values["log_joint"]),
        "calibrant: latents, ECDF": _of_p(min(1.0, min(latents) * len(latents))),
        "calibrant: HPD ranks": _of_p(p_values["hpd"]),
        "calibrant: TARP ranks": _of_p(p_values["tarp"]),
        "calibrant: C2ST": _of_p(classified),
    }


def _arviz(calibration: xr.DataTree) -> dict[str, dict[str, Any]]:
    """The ECDF's smallest two-sided pointwise probability, whose calibrated limit is the simultaneous band."""
    from arviz_stats.ecdf_utils import compute_ecdf

    group, found = calibration["prior_sbc"].dataset, {}
    columns = {"latents": group["z"].values[0].T, "log joint": group["log_joint"].values}
    for name, values in columns.items():
        smallest = 1.0
        for column in values:
            points = np.arange(1, len(column)) / len(column)
            counts = compute_ecdf(column, points) * len(column)
            low, high = binom.cdf(counts, len(column), points), binom.sf(counts - 1, len(column), points)
            smallest = min(smallest, float(np.minimum(low, high).min()))
        found[f"ArviZ: {name}, simultaneous band"] = {"number": -np.log(max(smallest, 1e-300))}
    return found


def _sbi(theta: Tensor, draws: Tensor, one: list[Tensor], seed: int, forests: bool) -> dict[str, dict[str, Any]]:
    try:
        from sbi.diagnostics.sbc import check_uniformity_c2st, check_uniformity_frequentist
        from sbi.diagnostics.tarp import _run_tarp, check_tarp, get_tarp_references
        from sbi.utils.metrics import c2st as forest
    except ImportError:
        return {}
    torch.manual_seed(seed)  # sbi draws from the global generator
    counted = (draws < theta).sum(0).float()
    p_value = float(check_uniformity_frequentist(counted, BUDGET.draws).min())
    references = get_tarp_references(theta)
    curve, grid = _run_tarp(draws.float(), theta.float(), references.float(), z_score_theta=True)
    area, tarp_p = check_tarp(curve, grid)
    found = {
        "sbi: SBC of latents, KS": _of_p(min(1.0, p_value * theta.shape[1])),
        "sbi: TARP, KS": _of_p(float(tarp_p)),
        "sbi: TARP, area": {"number": abs(area)},
    }
    if forests:
        ranked = check_uniformity_c2st(counted, BUDGET.draws)
        found["sbi: SBC of latents, C2ST of ranks"] = {"number": float(ranked.max())}
        found["sbi: C2ST, random forest"] = {"number": float(forest(*one))}
    return found


def made(defect: str, repetitions: int, work: Path, forests: bool) -> list[dict[str, dict[str, Any]]]:
    """All repetitions of a guide, those in the work folder and the missing ones."""
    path = work / f"peers-{defect.replace(' ', '-')}{'-forests' if forests else ''}.jsonl"
    return repeated(path, repetitions, lambda number: repetition(pair(), defect, number + 1, forests))


def rows(outcomes: Mapping[str, list[dict[str, dict[str, Any]]]]) -> list[Row]:
    """A row a method, from the outcomes of every guide."""
    found = []
    for method in outcomes["exact"][0]:
        numbers = {g: np.array([o[method]["number"] for o in each]) for g, each in outcomes.items()}
        exact = numbers.pop("exact")
        threshold = np.quantile(exact, 1 - LEVEL, method="higher")
        nominal = None
        if "p" in outcomes["exact"][0][method]:
            nominal = float(np.mean([o[method]["p"] <= LEVEL for o in outcomes["exact"]]))
        power = {guide: float((each > threshold).mean()) for guide, each in numbers.items()}
        library, quantity = method.split(": ", 1)
        found.append(Row(library, quantity, len(exact), nominal, power))
    return found


def table(made_rows: list[Row]) -> str:
    """Percent, in Markdown."""
    defects = list(made_rows[0].power)
    lines = [f"| library | check | nominal | {' | '.join(defects)} |", f"|---|---|--:|{'--:|' * len(defects)}"]
    for row in made_rows:
        nominal = "" if row.nominal is None else f"{row.nominal:.0%}"
        cells = [f"{row.power[defect]:.0%}" for defect in defects]
        lines.append(f"| {row.method} | {row.quantity} | {nominal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def half_width(repetitions: int) -> float:
    """The widest that a 95% interval of a rate is on one side."""
    return float(beta.isf(0.025, repetitions / 2 + 1, repetitions / 2)) - 0.5


def main() -> None:
    """Repeat, count and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="6 repetitions, whose figures say nothing")
    options.add_argument("--repetitions", type=int, default=100)
    options.add_argument("--forests", action="store_true", help="sbi's random forests too: five times as long")
    options.add_argument("--work", type=Path, default=Path("runs/power"), help="folder of finished repetitions")
    options.add_argument("--json", help="write the rows to this file")
    asked = options.parse_args()
    torch.set_num_threads(1)
    count = 6 if asked.quick else asked.repetitions
    counts = {"exact": count, **dict.fromkeys(DEFECTS, count // 2)}
    outcomes = {guide: made(guide, number, asked.work, asked.forests) for guide, number in counts.items()}
    found = rows(outcomes)
    print(table(found))
    print(
        f"\n{count} repetitions of the exact guide, {count // 2} of each other: ± {half_width(count // 2):.0%} at most"
    )
    if not any(row.method == "sbi" for row in found):
        print("sbi is not installed (`pip install calibrant[bench]`): its rows are left out")
    write(found, asked.json)


if __name__ == "__main__":
    main()
