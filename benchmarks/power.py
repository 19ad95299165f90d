"""The check, checked: how often does it see a planted defect, and how often does it accuse an exact guide?

    python -m benchmarks.power [--quick] [--only PART …] [--json FILE]

A repetition is all that a check at the default budget looks at, made anew: 128 data of the program with 1,000 draws of
the guide and 4 × 1,000 independent draws of the exact posterior, and 2,000 simulations with 1,000 draws each.
`compare`, `weights`, `uniformity`, `c2st` (of one datum) and `verdicts` judge it, as they judge any guide. Repetitions
are independent of each other; intervals are Clopper and Pearson's, 95%.

For exact guides, and for most defects, Pyro is replaced: programs and guides are tensors (`benchmarks.planted`), which
is several times faster; `tests/test_benchmarks.py` holds the ranks against those of `evaluation.calibration` for the
same program and guide. The rows of "trained" have nothing replaced: a guide that `fit` trained, with a defect in the
distribution that it samples from (`benchmarks.trained`), judged by `posterior`, `reference`, `calibration` and so on.

"small" is the same with 20 data and 100 draws of the guide, everything else as large as before.

Answers of a verdict are those within the family of all primary verdicts (Holm). The tests that describe are counted at
p ≤ 0.05 each, a vector latent's with Bonferroni over its entries.

Every repetition is kept in the work folder: a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Generator, Tensor

from benchmarks.cells import FOOLED as FOOLED_CELLS
from benchmarks.cells import PARTS, QUICK, Budget, Cell
from benchmarks.chains import CHAINS, Chains
from benchmarks.fooled import FOOLED
from benchmarks.hierarchy import Hierarchy
from benchmarks.planted import PLANTED, Guide, Problem
from benchmarks.power_tables import LEVEL, TESTS, Row, show
from benchmarks.structure import write
from benchmarks.trained import TRAINED, Trained
from calibrant.evaluation import c2st, compare, uniformity, verdicts, weights
from calibrant.evaluation.judgements.conclusion import conclude
from calibrant.evaluation.statistics.simulation_ranks import below, tarp_distance
from calibrant.inference.references.gate import exact_convergence
from calibrant.inference.trees import SAMPLE

_ENTRIES = 400_000  # of a batch of draws: they stay in the processor's cache


def quick(cells: list[Cell]) -> list[Cell]:
    """The first guide of the part and the last, twice each."""
    return [replace(cell, repetitions=QUICK, epochs=1) for cell in (cells[0], cells[-1])]


Drawn = tuple[xr.DataTree, xr.DataTree, xr.Dataset | None, xr.DataTree]

# -- a check -----------------------------------------------------------------------------------------------------------


def sampled(problem: Problem, defect: str, budget: Budget, seed: int) -> Drawn:
    """As `Trained.sampled`, of an exact sampler."""
    generator, guide = Generator().manual_seed(seed), problem.guides[defect]
    return *trees(problem, guide, budget, generator), ranks(problem, guide, budget, generator)


def by_chains(source: Chains, defect: str, budget: Budget, seed: int) -> Drawn:
    """As `sampled`, with a reference of Markov chains."""
    post, exact, informed, calibration = sampled(source.problem, defect, budget, seed)
    x = torch.as_tensor(exact["observed_data"]["x"].values)
    return post, source.reference(x, budget.reference, seed), informed, calibration


def outcome(
    post: xr.DataTree,
    ref: xr.DataTree,
    informed: xr.Dataset | None,
    calibration: xr.DataTree,
    seed: int,
    classified: bool = True,
) -> dict[str, Any]:
    """Statuses by quantity, p-values by test; several p-values of one test are combined by Bonferroni.

    C2ST is of the first datum, and left out unless `classified`.
    """
    comparison = compare(post, ref, informed=informed)
    diagnosed = weights(post) if "sample_stats" in post.children else None
    found = verdicts(comparison, diagnosed, calibration)
    statuses: dict[str, list[str]] = {}
    for verdict in found:
        statuses.setdefault(verdict.quantity, []).append(verdict.status)
    answers = {name: worst(each) for name, each in statuses.items()} | {"whole": conclude(found, comparison).status}
    table = uniformity(calibration)
    named = table["site"].isin(TESTS).values
    labels, values = table["quantity"].values.tolist(), table["p_value"].values
    p_values = {label: float(p) for label, p, one in zip(labels, values, named, strict=True) if one}
    p_values["latents"] = float(values[~named].min()) * int((~named).sum())
    if classified:
        one = c2st(post.isel(data=[0]), ref.isel(data=[0]), seed=seed)
        p_values["c2st"] = float(one["c2st_p"][0])
    return {"answers": answers, "p": p_values}


def worst(statuses: list[str]) -> str:
    """Of several: one failure fails, and all have to pass."""
    return next(status for status in ("fail", "cannot tell", "pass", "describes") if status in statuses)


def trees(
    problem: Problem, guide: Guide, budget: Budget, generator: Generator
) -> tuple[xr.DataTree, xr.DataTree, xr.Dataset]:
    """Draws of a guide and of the exact posterior of new data, as `inference` has them, and informed directions."""
    _, x = problem.simulate(budget.data, generator)
    theta, log_q = guide.draw(x, budget.draws, generator)
    log_p = problem.log_likelihood(theta, x) + problem.log_prior(theta)
    labels, dims = np.arange(budget.data), (*SAMPLE, "data")
    stats = xr.Dataset({"log_p": (dims, log_p[None].numpy()), "log_q": (dims, log_q[None].numpy())}, {"data": labels})
    exact, exact_q = problem.guides["exact"].draw(x, 4 * budget.reference, generator)
    few = exact[:: max(1, len(exact) // 100)][:100]
    exact_p = problem.log_likelihood(exact[:8], x) + problem.log_prior(exact[:8])
    gate = exact_convergence(np.zeros(len(labels)), (exact_p - exact_q[:8]).mean(0).numpy(), labels)
    chains = exact.unflatten(0, (4, budget.reference))
    post = {"/posterior": _group(problem, theta[None], dims, labels), "/sample_stats": stats}
    observed = xr.Dataset({"x": (("data", "x_dim_0"), x.numpy())}, {"data": labels})
    ref = {"/posterior": _group(problem, chains, dims, labels), "/convergence": gate, "/observed_data": observed}
    return xr.DataTree.from_dict(post), xr.DataTree.from_dict(ref), _informed(problem, few, x)


def _informed(problem: Problem, theta: Tensor, x: Tensor) -> xr.Dataset:
    """What `evaluation.informed_directions` finds at draws of the exact posterior."""
    moving = theta.double().clone().requires_grad_()
    likelihood = problem.log_likelihood(moving, x)
    (slope,) = torch.autograd.grad(likelihood.sum(), moving)
    scaled = (slope * theta.double().std(0)).transpose(0, 1)
    direction = torch.linalg.svd(scaled, full_matrices=False)[2][:, 0]
    direction[scaled.flatten(1).abs().amax(1) == 0] = torch.nan
    labels = [latent for name, size in problem.sites.items() for latent in _labels(name, size)]
    dimensions = 2 * likelihood.detach().var(0)
    variables = {"direction": (("data", "latent"), direction.numpy()), "dimensions": ("data", dimensions.numpy())}
    return xr.Dataset(variables, {"data": np.arange(len(x)), "latent": labels})


def _labels(name: str, size: int | None) -> list[str]:
    return [name] if size is None else [f"{name}[{i}]" for i in range(size)]


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
    for rows in torch.arange(budget.simulations).split(max(1, _ENTRIES // (budget.ranked * truth.shape[1]))):
        drawn = guide.draw(x[rows], budget.ranked, generator)
        parts.append(pit_values(problem, guide, truth[rows], x[rows], points[rows], scale, drawn, generator))
    return sbc_tree(problem, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, budget.ranked)


def sbc_tree(problem: Problem, pits: Mapping[str, Tensor], draws: int) -> xr.DataTree:
    """PIT values as `evaluation.calibration` returns them."""
    arrays = {name: value[None].numpy() for name, value in pits.items()}
    latents = arrays["theta"].shape[-1]
    arrays = by_site(problem, arrays.pop("theta")) | arrays
    group = {n: ((*SAMPLE, f"{n}_dim_0") if v.ndim == 3 else SAMPLE, v) for n, v in arrays.items()}
    return xr.DataTree.from_dict({"/prior_sbc": xr.Dataset(group, attrs={"guide_draws": draws, "latents": latents})})


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
    """A row from what is in the work folder, and from what is made for it if `new`; None without any repetition."""
    cut_short = [cell.epochs] if cell.program in TRAINED and cell.epochs is not None else []
    text = json.dumps([cell.program, cell.guide, asdict(cell.budget), *cut_short])
    digest = hashlib.sha256(text.encode()).hexdigest()
    first = int(digest[:6], 16) * 10**6

    described = cell.program not in FOOLED_CELLS

    def repetition(number: int) -> dict[str, Any]:
        source, seed = _source(cell.program, work, cell.epochs), first + number
        if isinstance(source, Trained | Hierarchy):
            return outcome(*source.sampled(cell.guide, **asdict(cell.budget), seed=seed), seed, described)
        if isinstance(source, Chains):
            return outcome(*by_chains(source, cell.guide, cell.budget, seed), seed, described)
        return outcome(*sampled(source, cell.guide, cell.budget, seed), seed, described)

    outcomes = repeated(work / f"{digest[:12]}.jsonl", cell.repetitions, repetition if new else None)
    return summary(cell, outcomes) if outcomes else None


def repeated(path: Path, count: int, repetition: Callable[[int], Any] | None) -> list[Any]:
    """So many repetitions: those that the file keeps, and the missing ones, unless there is nothing to make them by."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if repetition is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in range(len(found), count):
            found.append(repetition(number))
            with path.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    return found[:count]


@cache
def _source(program: str, work: Path, epochs: int | None) -> Problem | Trained | Hierarchy | Chains:
    return Trained(program, work, epochs) if program in TRAINED else PROBLEMS[program]()


PROBLEMS: Mapping[str, Callable[[], Any]] = {
    **PLANTED,
    **FOOLED,
    **CHAINS,
    "hierarchy": Hierarchy,
    "hierarchy, 8 data": Hierarchy,
}


def summary(cell: Cell, outcomes: list[dict[str, Any]]) -> Row:
    """Outcomes, counted."""
    answers, p_values = (
        {name: [o[key][name] for o in outcomes] for name in outcomes[0][key]} for key in ("answers", "p")
    )
    rates = {name: each.count("fail") / len(each) for name, each in answers.items()}
    rates |= {name: float(np.mean(np.array(each) <= LEVEL)) for name, each in p_values.items()}
    passes = {name: each.count("pass") / len(each) for name, each in answers.items()}
    return Row(cell.program, cell.guide, len(outcomes), rates, passes, asdict(cell.budget))


def main() -> None:
    """Repeat, count and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a small run, whose figures say little")
    options.add_argument(
        "--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    options.add_argument("--made", action="store_true", help="rows of what is in the work folder, nothing new")
    options.add_argument("--work", type=Path, default=Path("runs/power"), help="folder of finished repetitions")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", help="write the rows to this file, beside its rows of other guides")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    rows: list[Row] = []
    for name in asked.only:
        for cell in quick(PARTS[name]) if asked.quick else PARTS[name]:
            if row := made(cell, asked.work, new=not asked.made):
                rows.append(row)
                print(f"{name}, {row.program}, {row.guide}: fails {row.rates['whole']:.1%}", flush=True)
    show(rows)
    write(together(rows, asked.json), asked.json)


def together(rows: list[Row], path: str | None) -> list[Row]:
    """The rows, and those of the file that no row replaces, in the order of the parts."""
    earlier = [Row(**row) for row in json.loads(Path(path).read_text())] if path and Path(path).is_file() else []
    found = {_key(row.program, row.guide, row.budget): row for row in [*earlier, *rows]}
    cells = [cell for part in PARTS.values() for cell in part]
    keys = [_key(cell.program, cell.guide, asdict(cell.budget)) for cell in cells]
    return [found[key] for key in keys if key in found]


def _key(program: str, guide: str, budget: Mapping[str, int]) -> tuple[str, str, str]:
    return program, guide, json.dumps(budget, sort_keys=True)


if __name__ == "__main__":
    main()
