"""The check, checked: how often does it see a planted defect, and how often does it accuse an exact guide?

    python -m benchmarks.power [--quick] [--only PART …] [--json FILE]

A part is all that a check at the default budget looks at, made anew: 128 data of the program with 1,000 draws of the
guide and 4 × 1,000 independent draws of the exact posterior, and 2,000 simulations with 1,000 draws each. `compare`,
`weights`, `uniformity`, `c2st` (of one datum) and `verdicts` judge it, as they judge a trained guide. What is replaced
is Pyro alone: programs and guides are tensors here (`benchmarks.planted`), because handlers would cost minutes a part;
`tests/test_benchmarks.py` holds the ranks against those of `evaluation.calibration` for the same program and guide.

A repetition is a check of 128 data and 2,000 simulations taken at random, none twice, from all parts of its row
together, after every part has been a repetition by itself: data and simulations are independent of each other, so that
any such choice is a check. Repetitions beyond the parts overlap by chance, and share what is accidental in the pool.
Intervals therefore count independent parts, not repetitions, and are wider than Clopper and Pearson's for as many
repetitions: the latter's limits (95%) at the rate of all repetitions, for as many trials as there are parts. C2ST is
counted over parts alone.

"small" is the same with 20 data and 100 draws of the guide, everything else as large as before; "trained" trains real
guides for a short time and prints what the check says, once.

Answers of a verdict are those within the family of all primary verdicts (Holm). The tests that describe are counted at
p ≤ 0.05 each, a vector latent's with Bonferroni over its entries.

Every part and every repetition is kept in the work folder: a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import xarray as xr
from scipy.stats import beta
from torch import Generator, Tensor

import calibrant as cal
from benchmarks.planted import PROBLEMS, Guide, Problem
from benchmarks.structure import write
from calibrant.evaluation import Verdict, c2st, compare, uniformity, verdicts, weights
from calibrant.evaluation.calibration import below, tarp_distance
from calibrant.evaluation.conclusion import conclude
from calibrant.inference import fit, posterior, reference
from calibrant.inference.gate import exact_convergence
from calibrant.inference.trees import SAMPLE
from calibrant.program import sample_prior
from calibrant.store import load_tree, save_tree

LEVEL, TAIL = 0.05, 0.025
POWERFUL, CAUGHT = 0.95, 0.9  # what the check promises
_ENTRIES = 400_000  # of a batch of draws: they stay in the processor's cache

VERDICTS = ("sd", "mean", "coverage", "correlation", "k-hat", "log joint", "evidence gap")
TESTS = ("latents", "log_likelihood", "log_joint", "hpd", "tarp", "c2st")


@dataclass(frozen=True)
class Budget:
    """What a check may cost."""

    data: int = 128
    draws: int = 1000
    simulations: int = 2000


BUDGET, SMALL = Budget(), Budget(data=20, draws=100)

STRONG = ("sd × 0.8", "mean + 0.3 sd", "correlation ignored", "prior as posterior")  # and the missing mode
WEAK = ("sd × 0.9", "sd × 1.1", "sd × 1.25", "mean + 0.1 sd", "low contrast", "tails lost")
OF_GSM = ("sd × 0.8", "sd × 1.25", "mean + 0.3 sd", "prior as posterior", "low contrast")
OF_PPCA = ("sd × 0.8", "one latent × 0.7", "tails lost")
FALSE_ALARMS, POWER = 2000, 100  # repetitions
QUICK = 5


@dataclass(frozen=True)
class Cell:
    """A row to be made: a guide of a program, and how many parts and repetitions."""

    program: str
    guide: str
    budget: Budget
    parts: int
    repetitions: int


def _cells(
    program: str, exact: tuple[int, int], defects: Mapping[str, int], budget: Budget = BUDGET, repetitions: int = POWER
) -> list[Cell]:
    wrong = [Cell(program, guide, budget, parts, repetitions) for guide, parts in defects.items()]
    return [Cell(program, "exact", budget, *exact), *wrong]


PARTS: Mapping[str, list[Cell]] = {
    "two modes": _cells("two modes", (160, FALSE_ALARMS), {"missing mode": 40}),
    "pair": _cells("pair", (110, FALSE_ALARMS), dict.fromkeys(STRONG, 30) | dict.fromkeys(WEAK, 15)),
    "gsm": _cells("gsm", (10, POWER), dict.fromkeys(OF_GSM, 6)),
    "ppca": _cells("ppca", (8, POWER), dict.fromkeys(OF_PPCA, 6)),
    "small": _cells("pair", (100, 500), dict.fromkeys(("sd × 0.9", "mean + 0.1 sd", "tails lost"), 50), SMALL, 500)
    + _cells("two modes", (100, 500), {}, SMALL),
}


@dataclass(frozen=True)
class Row:
    """What the check said of one guide.

    Attributes:
        parts: independent ones.
        rates: check → the share of the repetitions in which it failed, or its p-value was at most 0.05; "whole" is the
            conclusion.
        passes: verdict → the share in which it passed.
    """

    program: str
    guide: str
    repetitions: int
    parts: int
    rates: dict[str, float]
    passes: dict[str, float]
    budget: dict[str, int] = field(repr=False)

    @property
    def is_exact(self) -> bool:
        """Whether the guide has no defect."""
        return self.guide == "exact"

    @property
    def is_small(self) -> bool:
        """Whether the budget is too small for anything to pass."""
        return self.budget["draws"] < BUDGET.draws

    def interval(self, rate: float) -> tuple[float, float]:
        """Of the probability of what happened at this rate; see above."""
        count = rate * self.parts
        low = float(beta.ppf(TAIL, count, self.parts - count + 1)) if rate > 0 else 0.0
        high = float(beta.isf(TAIL, count + 1, self.parts - count)) if rate < 1 else 1.0
        return low, high


def quick(cells: list[Cell]) -> list[Cell]:
    """The exact guide and one defect, with one part each."""
    return [replace(cell, parts=1, repetitions=QUICK) for cell in cells[:2]]


# -- a check -----------------------------------------------------------------------------------------------------------


def part(problem: Problem, defect: str, budget: Budget, seed: int) -> xr.DataTree:
    """What a check of new data and simulations looks at: groups `comparison`, `weights` and `prior_sbc`."""
    generator, guide = Generator().manual_seed(seed), problem.guides[defect]
    post, ref = trees(problem, guide, budget, generator)
    compared = compare(post, ref)
    compared = compared.drop_dims(["left_out", "observed_site"])
    one = c2st(post.isel(data=[0]), ref.isel(data=[0]), seed=seed)
    calibration = ranks(problem, guide, budget, generator)
    groups = {"/comparison": compared.assign_attrs(c2st_p=float(one["c2st_p"][0])), "/weights": weights(post)}
    return xr.DataTree.from_dict({**groups, "/prior_sbc": calibration["prior_sbc"].to_dataset()})


@dataclass(frozen=True)
class Pool:
    """All parts of a row together."""

    comparison: xr.Dataset
    weights: xr.Dataset
    prior_sbc: xr.Dataset
    budget: Budget
    parts: int

    @classmethod
    def read(cls, paths: list[Path], budget: Budget) -> Pool:
        """From the files of the parts."""
        groups: dict[str, list[xr.Dataset]] = {"comparison": [], "weights": [], "prior_sbc": []}
        for path in paths:
            tree = load_tree(path)
            for name, found in groups.items():
                found.append(tree[name].to_dataset())
        along = {"comparison": "data", "weights": "data", "prior_sbc": "draw"}
        joined = {n: xr.concat(g, along[n], combine_attrs="override", data_vars="minimal") for n, g in groups.items()}
        return cls(**joined, budget=budget, parts=len(paths))

    def outcome(self, number: int) -> dict[str, Any]:
        """What the check says in a repetition: the part of this number, or data and simulations at random."""
        data, simulations = (self._chosen(number, size) for size in (self.budget.data, self.budget.simulations))
        compared, weighed = self.comparison.isel(data=data), self.weights.isel(data=data)
        calibration = xr.DataTree.from_dict({"/prior_sbc": self.prior_sbc.isel(draw=simulations)})
        return outcome(verdicts(compared, weighed, calibration), calibration, compared)

    def _chosen(self, number: int, size: int) -> np.ndarray | slice:
        if number < self.parts:
            return slice(number * size, (number + 1) * size)
        return np.random.default_rng([number, size]).choice(self.parts * size, size, replace=False)


def outcome(found: Sequence[Verdict], calibration: xr.DataTree, comparison: xr.Dataset) -> dict[str, Any]:
    """Statuses by quantity, p-values by test; several p-values of one test are combined by Bonferroni."""
    statuses: dict[str, list[str]] = {}
    for verdict in found:
        statuses.setdefault(verdict.quantity, []).append(verdict.status)
    answers = {name: worst(each) for name, each in statuses.items()} | {"whole": conclude(found, comparison).status}
    table = uniformity(calibration)
    named = table["site"].isin(TESTS).values
    labels, p_values = table["quantity"].values.tolist(), table["p_value"].values
    tests = {label: float(p) for label, p, one in zip(labels, p_values, named, strict=True) if one}
    return {"answers": answers, "p": tests | {"latents": float(p_values[~named].min()) * int((~named).sum())}}


def worst(statuses: list[str]) -> str:
    """Of several: one failure fails, and all have to pass."""
    return next(status for status in ("fail", "cannot tell", "pass") if status in statuses)


def trees(problem: Problem, guide: Guide, budget: Budget, generator: Generator) -> tuple[xr.DataTree, xr.DataTree]:
    """Draws of a guide and of the exact posterior of new data, in the format of `inference`."""
    _, x = problem.simulate(budget.data, generator)
    theta, log_q = guide.draw(x, budget.draws, generator)
    log_p = problem.log_likelihood(theta, x) + problem.log_prior(theta)
    labels, dims = np.arange(budget.data), (*SAMPLE, "data")
    stats = xr.Dataset({"log_p": (dims, log_p[None].numpy()), "log_q": (dims, log_q[None].numpy())}, {"data": labels})
    exact = problem.guides["exact"].draw(x, 4 * 1000, generator)[0].unflatten(0, (4, 1000))
    gate = exact_convergence(np.zeros(len(labels)), np.zeros(len(labels)), labels)
    post = {"/posterior": _group(problem, theta[None], dims, labels), "/sample_stats": stats}
    return tuple(  # type: ignore[return-value]
        xr.DataTree.from_dict(groups)
        for groups in (post, {"/posterior": _group(problem, exact, dims, labels), "/convergence": gate})
    )


def _group(problem: Problem, theta: Tensor, dims: tuple[str, ...], labels: np.ndarray) -> xr.Dataset:
    attrs = {"latents": json.dumps(list(problem.sites)), "independent_draws": 1}
    values = {name: value.astype(np.float32) for name, value in by_site(problem, theta.numpy()).items()}
    events = {name: [f"{name}_dim_0"] if problem.sites[name] else [] for name in values}
    return xr.Dataset({n: ([*dims, *events[n]], v) for n, v in values.items()}, {"data": labels}, attrs)


def by_site(problem: Problem, theta: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays `(…, latents)` cut into sites."""
    found, place = {}, 0
    for name, size in problem.sites.items():
        found[name] = theta[..., place] if size is None else theta[..., place : place + size]
        place += size or 1
    return found


def ranks(problem: Problem, guide: Guide, budget: Budget, generator: Generator) -> xr.DataTree:
    """What `evaluation.calibration` finds, as far as verdicts and `uniformity` need it."""
    truth, x = problem.simulate(budget.simulations, generator)
    points, _ = problem.simulate(budget.simulations, generator)
    scale, parts = truth.std(0), []
    for rows in torch.arange(budget.simulations).split(max(1, _ENTRIES // (budget.draws * truth.shape[1]))):
        drawn = guide.draw(x[rows], budget.draws, generator)
        parts.append(pit_values(problem, guide, truth[rows], x[rows], points[rows], scale, drawn, generator))
    return sbc_tree(problem, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, budget.draws)


def sbc_tree(problem: Problem, pits: Mapping[str, Tensor], draws: int) -> xr.DataTree:
    """PIT values as `evaluation.calibration` returns them."""
    arrays = {name: value[None].numpy() for name, value in pits.items()}
    arrays = by_site(problem, arrays.pop("theta")) | arrays
    group = {n: ((*SAMPLE, f"{n}_dim_0") if v.ndim == 3 else SAMPLE, v) for n, v in arrays.items()}
    return xr.DataTree.from_dict({"/prior_sbc": xr.Dataset(group, attrs={"guide_draws": draws})})


def pit_values(
    problem: Problem,
    guide: Guide,
    truth: Tensor,
    x: Tensor,
    points: Tensor,
    scale: Tensor,
    drawn: tuple[Tensor, Tensor],
    generator: Generator,
) -> dict[str, Tensor]:
    """Of simulated latents `(data, latents)` among the draws of a guide, and of what is computed from them."""
    many = _quantities(problem, drawn[0], x, points, scale, drawn[1])
    true = _quantities(problem, truth[None], x, points, scale, guide.log_q(truth[None], x))
    return {name: _pit(true[name][0], many[name], generator) for name in many}


def _quantities(
    problem: Problem, theta: Tensor, x: Tensor, points: Tensor, scale: Tensor, log_q: Tensor
) -> dict[str, Tensor]:
    likelihood = problem.log_likelihood(theta, x)
    joint = likelihood + problem.log_prior(theta)
    tarp = tarp_distance(theta, points, scale)
    return {"theta": theta, "log_likelihood": likelihood, "log_joint": joint, "hpd": log_q, "tarp": tarp}


def _pit(truth: Tensor, draws: Tensor, generator: Generator) -> Tensor:
    less, equal = below(truth, draws)
    noise = torch.rand(less.shape, generator=generator, dtype=torch.float64)
    return (less + noise * (equal + 1)) / (len(draws) + 1)


# -- rows --------------------------------------------------------------------------------------------------------------


def made(cell: Cell, work: Path, new: bool = True) -> Row | None:
    """A row from what is in the work folder, and from what is made for it if `new`; None without any part."""
    text = json.dumps([cell.program, cell.guide, asdict(cell.budget)])
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder, first = work / digest[:12], int(digest[:6], 16) * 10**6
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.nc" for number in range(cell.parts)]
    problem = PROBLEMS[cell.program]()
    for number, path in enumerate(paths):
        if new and not path.is_file():
            save_tree(part(problem, cell.guide, cell.budget, first + number), path)
    paths = [path for path in paths if path.is_file()]
    if not paths:
        return None
    outcomes = _outcomes(paths, cell, folder / f"{len(paths)}-parts.jsonl")
    return summary(cell, len(paths), outcomes, float(np.mean([_classified(path) <= LEVEL for path in paths])))


def _classified(path: Path) -> float:
    with h5py.File(path) as file:  # a hundred times faster than the whole part
        return float(np.ravel(file["comparison"].attrs["c2st_p"])[0])


def _outcomes(parts: list[Path], cell: Cell, path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    if len(lines) < cell.repetitions:
        pool = Pool.read(parts, cell.budget)
        for number in range(len(lines), cell.repetitions):
            lines.append(json.dumps(pool.outcome(number)))
            with path.open("a") as file:
                file.write(lines[-1] + "\n")
    return [json.loads(line) for line in lines[: cell.repetitions]]


def summary(cell: Cell, parts: int, outcomes: list[dict[str, Any]], c2st_rate: float) -> Row:
    """Outcomes, counted."""
    answers, p_values = (
        {name: [o[key][name] for o in outcomes] for name in outcomes[0][key]} for key in ("answers", "p")
    )
    rates = {name: each.count("fail") / len(each) for name, each in answers.items()}
    rates |= {name: float(np.mean(np.array(each) <= LEVEL)) for name, each in p_values.items()}
    passes = {name: each.count("pass") / len(each) for name, each in answers.items()}
    found = rates | {"c2st": c2st_rate}
    return Row(cell.program, cell.guide, len(outcomes), parts, found, passes, asdict(cell.budget))


OF_TRAINED = "gsm, trained"
TRAINED = (("mean-field", 3), ("faithful", 1), ("faithful", 30), ("collapsed", 30))


def trained_rows(few: bool) -> Iterator[Row]:
    """Guides of a Gaussian scale mixture, trained for few epochs on 4,000 simulated data, each checked once."""
    torch.manual_seed(0)
    model = cal.models.create("gsm", shape=(1, 3, 3), latents=4).eval().requires_grad_(False)
    budget = Budget(32, 500, 200) if few else BUDGET
    train, held = ({"x": sample_prior(model, size, {}, seed=size)["x"]} for size in (4000, budget.data))
    ref = reference(model, held, draws=budget.draws)
    for structure, epochs in TRAINED[:1] if few else TRAINED:
        guide = cal.guides.amortize(model, train, structure)
        fit(model, guide, train, epochs=epochs, batch_size=128, lr=3e-3)
        guide.eval()
        post = posterior(model, guide, held, draws=budget.draws, seed=1)
        calibration = cal.evaluation.calibration(model, guide, held, budget.simulations, budget.draws)
        compared = compare(post, ref)
        found = verdicts(compared, weights(post), calibration)
        tested = c2st(post.isel(data=[0]), ref.isel(data=[0]))["c2st_p"].values
        label = f"{structure}, {epochs} {'epoch' if epochs == 1 else 'epochs'}"
        print(
            f"gsm, {label}: {conclude(found, compared).status}",
            *(f"  {v.status}: {v.sentence}" for v in found),
            sep="\n",
        )
        cell = Cell(OF_TRAINED, label, budget, 1, 1)
        yield summary(cell, 1, [outcome(found, calibration, compared)], float(tested[0] <= LEVEL))


# -- tables ------------------------------------------------------------------------------------------------------------


def percentage(row: Row, rate: float | None) -> str:
    """A rate with its interval, in percent."""
    if rate is None:
        return ""
    low, high = row.interval(rate)
    return f"{100 * rate:.3g} [{100 * low:.2g}, {100 * high:.3g}]"


def table(rows: list[Row], columns: Mapping[str, Callable[[Row], float | None]]) -> str:
    """Percent of the repetitions, in Markdown."""
    lines = [f"| program | guide | n | parts | {' | '.join(columns)} |", f"|---|---|--:|--:|{'--:|' * len(columns)}"]
    for row in rows:
        program = f"{row.program}, small budget" if row.is_small else row.program
        cells = [percentage(row, rate(row)) for rate in columns.values()]
        lines.append(f"| {program} | {row.guide} | {row.repetitions} | {row.parts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(check: str) -> Callable[[Row], float | None]:
    return lambda row: row.rates.get(check)


CONCLUSIONS: Mapping[str, Callable[[Row], float | None]] = {
    "fail": _rate("whole"),
    "cannot tell": lambda row: max(0.0, 1 - row.rates["whole"] - row.passes["whole"]),
    "pass": lambda row: row.passes["whole"],
}


def judged(rows: list[Row]) -> list[Row]:
    """Rows of planted guides at the default budget."""
    return [row for row in rows if not row.is_small and row.program != OF_TRAINED]


def blindness(rows: list[Row]) -> str:
    """What each check sees no more often than it accuses an exact guide, and what nearly always.

    Blind: the interval of the power reaches down into that of the false-alarm rate for the same program.
    """
    lines = ["| check | blind to | sees in 95% or more |", "|---|---|---|"]
    exact = {row.program: row for row in judged(rows) if row.is_exact}
    for check in (*VERDICTS, *TESTS):
        blind, sees = [], []
        for row in judged(rows):
            false = exact.get(row.program)
            if row.is_exact or false is None or check not in row.rates:
                continue
            if row.interval(row.rates[check])[0] <= false.interval(false.rates[check])[1]:
                blind.append(f"{row.guide} ({row.program})")
            elif row.rates[check] >= POWERFUL:
                sees.append(f"{row.guide} ({row.program})")
        lines.append(f"| {check} | {', '.join(blind) or '–'} | {', '.join(sees) or '–'} |")
    return "\n".join(lines)


def requirements(rows: list[Row]) -> Iterator[tuple[str, bool]]:
    """What must hold, as far as the rows say."""
    for row in judged(rows):
        name, failed, passed = f"{row.program}, {row.guide}", row.rates["whole"], row.passes["whole"]
        rate = percentage(row, failed)
        if row.is_exact:
            yield f"{name}: false alarms of the whole check ≤ 5%: {rate}", failed <= LEVEL
            continue
        if row.guide in (*STRONG, "missing mode"):
            yield f"{name}: power ≥ 95%: {rate}", failed >= POWERFUL
        yield f"{name}: fails ({rate}) or cannot tell, never passes ({passed:.1%})", passed == 0
    for row in rows:
        if row.is_small:
            passed = row.passes["whole"]
            yield f"{row.program}, {row.guide}, 20 data and 100 draws: never passes ({passed:.1%})", passed == 0


def show(rows: list[Row]) -> None:
    """All tables, and what holds."""
    by_verdict, by_test = ({check: _rate(check) for check in checks} for checks in (VERDICTS, TESTS))
    for title, columns in (("conclusion", CONCLUSIONS), ("verdicts: fail", by_verdict), ("p ≤ 0.05", by_test)):
        print(f"\n{title}, % of the repetitions\n\n{table(rows, columns)}")
    print(f"\n{blindness(rows)}\n")
    for text, holds in requirements(rows):
        print("PASS  " if holds else "MISSED", text)


def main() -> None:
    """Repeat, count and print."""
    names = [*PARTS, "trained"]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a small run, whose figures say little")
    options.add_argument("--only", nargs="+", default=names, choices=names, metavar="PART", help=", ".join(names))
    options.add_argument("--made", action="store_true", help="rows of the parts in the work folder, no new ones")
    options.add_argument("--work", type=Path, default=Path("runs/power"), help="folder of finished parts")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", help="write the rows to this file")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    rows: list[Row] = []
    for name in asked.only:
        for cell in quick(PARTS.get(name, [])) if asked.quick else PARTS.get(name, []):
            if row := made(cell, asked.work, new=not asked.made):
                rows.append(row)
                print(f"{name}, {row.guide}: fails {row.rates['whole']:.1%}", flush=True)
        if name == "trained":
            rows += trained_rows(asked.quick)
    show(rows)
    write(rows, asked.json)


if __name__ == "__main__":
    main()
