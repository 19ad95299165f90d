"""What the structure of a guide costs: guides of one frozen model, against its exact evidence and exact posterior.

    python -m benchmarks.structure [--quick] [--models gsm ea-vae] [--structures …] [--json FILE]

Each model is trained once on natural patches, with its collapsed guide, and frozen; then every guide is trained for it
from the start with the same epochs, minibatches and learning rate. The models are linear and Gaussian given a scale, so
that evidence and posterior are exact, and all that is left between evidence and ELBO is the guide's. Data that took no
part in training judge it. Trainings and rows are kept in the work folder under a hash of what they depend on: a run
that was interrupted goes on where it was, and rows can be made one at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.nn import PyroModule

import calibrant as cal
from calibrant import store
from calibrant.data import Data
from calibrant.guides import amortize
from calibrant.inference import fit, importance, log_evidence, posterior, reference
from calibrant.inference.trees import model_sha256

BLOCKS = {"gsm": "y", "ea-vae": "z"}  # the latents beside the scale
Family = str | dict[str, str]
STRUCTURES: dict[str, tuple[str, Callable[[str], Family]]] = {
    "mean-field": ("mean-field", lambda block: "auto"),
    "faithful": ("faithful", lambda block: "auto"),
    "full": ("full", lambda block: "auto"),
    "full, flow of the scale": ("full", lambda block: {"scale": "flow", block: "dense"}),
    "full, flow of all": ("full", lambda block: "flow"),
    "collapsed": ("collapsed", lambda block: "auto"),
    "collapsed, LogNormal scale": ("collapsed", lambda block: {"scale": "lognormal"}),
}
DEFAULT = ("mean-field", "faithful", "full, flow of the scale", "collapsed")


@dataclass(frozen=True)
class Plan:
    """How models and guides are trained and judged.

    Attributes:
        data: a registered set of patches.
        size: side of a patch, in pixels.
        train_data: training patches that are used.
        model_epochs, model_lr: of the training of the model, with a guide of its own.
        guide_epochs, guide_lr: of the guides of the frozen model.
        batch_size, seed: of both.
        judged: test patches for ELBO and evidence, with `elbo_draws` draws each.
        compared: test patches whose posteriors are compared, with `draws` draws and as many in each reference chain.
    """

    data: str = "natural-patches"
    size: int = 16
    train_data: int = 30_000
    model_epochs: int = 10
    model_lr: float = 3e-3
    guide_epochs: int = 22
    guide_lr: float = 5e-3
    batch_size: int = 256
    seed: int = 0
    judged: int = 2_000
    elbo_draws: int = 8
    compared: int = 128
    draws: int = 1_000


OF_MODELS = ("data", "size", "train_data", "model_epochs", "model_lr", "batch_size", "seed")  # what a model depends on
OF_POSTERIORS = ("data", "size", "judged", "compared", "draws", "seed")
VALIDATION = 2_000  # patches at most, and a tenth of the training patches
QUICK: Mapping[str, Any] = {
    "train_data": 4_000,
    "model_epochs": 3,
    "guide_epochs": 3,
    "judged": 300,
    "compared": 16,
    "draws": 500,
}


@dataclass(frozen=True)
class Row:
    """A line of the table. Nats a patch; `…_se` over the patches, as if they were independent.

    Attributes:
        elbo, evidence, gap: means over the judged patches; gap = evidence − ELBO, patch by patch.
        sd_ratio: by site, the geometric mean over patches and entries of the guide's over the exact posterior's sd.
        mean_error: by site, the root of the mean square error of the guide's mean, in exact posterior sds, without the
            part that Monte Carlo noise adds.
        khat: median over the compared patches; `good`: the share of them below `good_k`.
        epoch_seconds: processor seconds of an epoch of training, median.
    """

    model: str
    guide: str
    elbo: float
    elbo_se: float
    evidence: float
    gap: float
    gap_se: float
    sd_ratio: dict[str, float]
    sd_ratio_se: dict[str, float]
    mean_error: dict[str, float]
    mean_error_se: dict[str, float]
    khat: float
    good: float
    good_k: float
    parameters: int
    epoch_seconds: float
    model_sha256: str
    plan: dict[str, Any] = field(repr=False)


class Bench:
    """Patches, and the work folder in which trainings and rows are kept."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        splits = cal.data.load(plan.data, size=plan.size)
        self.train = _spaced(splits["train"], plan.train_data)
        self.validation = _spaced(splits["validation"], min(VALIDATION, plan.train_data // 10))
        self.test = _spaced(splits["test"], plan.judged)
        self.compared = _spaced(splits["test"], plan.compared)

    def folder(self, what: Any, fields: Iterable[str] | None = None) -> Path:
        """Where something is kept: named by a hash of what it depends on, all of the plan or some fields."""
        settings = asdict(self.plan)
        text = json.dumps([{name: settings[name] for name in fields or settings}, what], sort_keys=True)
        return self.work / hashlib.sha256(text.encode()).hexdigest()[:12]

    def model(self, name: str, arguments: Mapping[str, Any]) -> PyroModule:
        """A model trained with its collapsed guide, frozen."""
        folder = self.folder(["model", name, dict(arguments)], OF_MODELS)
        if not (folder / store.MODEL).is_file():
            torch.manual_seed(self.plan.seed)
            model = cal.models.create(name, shape=(1, self.plan.size, self.plan.size), **arguments)
            guide = amortize(model, self.train, "collapsed", seed=self.plan.seed)
            trained = self.fit(model, guide, folder, self.plan.model_epochs, self.plan.model_lr)
            store.save_run(folder, model, guide, trained)
        model, _ = cal.load(folder)
        return model.requires_grad_(False)

    def fit(self, model: PyroModule, guide: PyroModule, folder: Path, epochs: int, lr: float) -> cal.inference.Fit:
        """Train, or go on; the processor seconds of every epoch are noted in the folder."""
        resume, begun = store.has_checkpoint(folder / store.CHECKPOINTS), time.process_time()

        def note(stage: str, done: int, total: int, text: str = "") -> None:
            nonlocal begun
            now = time.process_time()
            with (folder / "seconds.txt").open("a") as file:
                file.write(f"{now - begun:.2f}\n")
            print(f"    epoch {done}/{total}: {text}, {now - begun:.1f} s", flush=True)
            begun = now

        options: dict[str, Any] = {"batch_size": self.plan.batch_size, "seed": self.plan.seed}
        data = {"observed": self.train, "validation": self.validation}
        return fit(model, guide, **data, **options, epochs=epochs, lr=lr, run_dir=folder, resume=resume, progress=note)

    def row(self, title: str, label: str, model: PyroModule, structure: str, family: Family) -> Row:
        """A guide of a frozen model, trained and judged."""
        folder = self.folder(["guide", model_sha256(model), structure, family])
        training = self.plan.guide_epochs, self.plan.guide_lr
        return self.judge(title, label, lambda: model, structure, family, folder, training)

    def joint_row(self, title: str, label: str, make: Callable[[], PyroModule], structure: str, family: Family) -> Row:
        """A guide trained together with a new model, and judged; `label` names it in the work folder too."""
        folder = self.folder(["joint", title, label, structure, family])
        training = self.plan.model_epochs, self.plan.model_lr
        return self.judge(title, label, make, structure, family, folder, training)

    def judge(
        self,
        title: str,
        label: str,
        make: Callable[[], PyroModule],
        structure: str,
        family: Family,
        folder: Path,
        training: tuple[int, float],
    ) -> Row:
        """Train what is not frozen of a model and a new guide, and judge the guide; or the row that is kept."""
        kept = folder / "row.json"
        if kept.is_file():
            return Row(**{**json.loads(kept.read_text()), "model": title, "guide": label})
        print(f"{title}: {label}", flush=True)
        model = make()
        guide = amortize(model, self.train, structure, family, seed=self.plan.seed)
        self.fit(model, guide, folder, *training)
        row = self._judged(title, label, model, guide, folder)
        kept.write_text(json.dumps(asdict(row)))
        return row

    def _judged(self, title: str, label: str, model: PyroModule, guide: PyroModule, folder: Path) -> Row:
        plan = self.plan
        stats = posterior(model, guide, self.test, draws=plan.elbo_draws, seed=plan.seed)["sample_stats"]
        elbo = (stats["log_p"] - stats["log_q"]).mean(("chain", "draw")).values
        exact, ref = self._exact(model)
        post = posterior(model, guide, self.compared, draws=plan.draws, seed=plan.seed + 1)
        comparison = cal.evaluation.compare(post, ref)
        weights = importance(post)["importance"]
        sites = [str(name) for name in dict.fromkeys(comparison["site"].values.tolist())]
        ratios = {site: sd_ratio(comparison, site) for site in sites}
        errors = {site: mean_error(comparison, site) for site in sites}
        khat, good_k = weights["pareto_k"].values, float(weights.attrs["good_k"])
        seconds = [float(line) for line in (folder / "seconds.txt").read_text().split()]
        return Row(
            title,
            label,
            *_mean(elbo),
            float(exact.mean()),
            *_mean(exact - elbo),
            {site: value for site, (value, _) in ratios.items()},
            {site: se for site, (_, se) in ratios.items()},
            {site: value for site, (value, _) in errors.items()},
            {site: se for site, (_, se) in errors.items()},
            float(np.median(khat)),
            float((khat < good_k).mean()),
            good_k,
            sum(weight.numel() for weight in guide.parameters()),
            float(np.median(seconds)),
            model_sha256(model),
            asdict(plan),
        )

    def _exact(self, model: PyroModule) -> tuple[np.ndarray, xr.DataTree]:
        """The exact log evidence of the judged patches, and draws of the exact posteriors of the compared ones."""
        folder = self.folder(["exact", model_sha256(model)], OF_POSTERIORS)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "evidence.npy").is_file():
            np.save(folder / "evidence.npy", log_evidence(model, self.test).numpy())
        if not (folder / store.REFERENCE).is_file():
            store.save_tree(reference(model, self.compared, draws=self.plan.draws), folder / store.REFERENCE)
        return np.load(folder / "evidence.npy"), store.load_tree(folder / store.REFERENCE)


def _spaced(data: Data, count: int) -> Data:
    return data[np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)]


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def _of_site(comparison: xr.Dataset, variable: str, site: str) -> np.ndarray:
    """A statistic of the entries of a site, `(data, entries)`."""
    chosen = comparison[variable].isel(latent=comparison["site"].values == site)
    return chosen.transpose("data", "latent").values


def sd_ratio(comparison: xr.Dataset, site: str) -> tuple[float, float]:
    """Geometric mean over data and entries of a site, with its standard error over data."""
    mean, se = _mean(np.log(_of_site(comparison, "sd_ratio", site)).mean(1))
    return float(np.exp(mean)), float(np.exp(mean) * se)


def mean_error(comparison: xr.Dataset, site: str) -> tuple[float, float]:
    """Root mean square over data and entries of a site, without the Monte Carlo noise, and its standard error."""
    squares = _of_site(comparison, "mean_error", site) ** 2 - _of_site(comparison, "mean_error_se", site) ** 2
    mean, se = _mean(squares.mean(1))
    root = max(mean, 0.0) ** 0.5
    return root, se / (2 * root) if root > 0 else se**0.5


# -- the table ---------------------------------------------------------------------------------------------------------

HEAD = (
    "| model | guide | ELBO | gap to log p(x) | scale: sd ratio | mean error | latents: sd ratio | mean error "
    "| k-hat | below good k | s/epoch |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def line(row: Row) -> str:
    """A row of the table, in Markdown."""
    scale, block = "scale", next(site for site in row.sd_ratio if site != "scale")
    cells = [
        row.model,
        row.guide,
        f"{row.elbo:.2f} ± {row.elbo_se:.2f}",
        f"{row.gap:.3f} ± {row.gap_se:.3f}",
        *(
            f"{values[site]:.3f} ± {errors[site]:.3f}"
            for site in (scale, block)
            for values, errors in ((row.sd_ratio, row.sd_ratio_se), (row.mean_error, row.mean_error_se))
        ),
        f"{row.khat:.2f}",
        f"{row.good:.0%}",
        f"{row.epoch_seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def show(rows: list[Row]) -> None:
    """The table."""
    print(HEAD)
    for row in rows:
        print(line(row))


def write(rows: list[Row], path: str | None) -> None:
    """The rows as JSON."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def parser(description: str | None, work: str) -> argparse.ArgumentParser:
    """The options that the tables of guides share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a small run, whose figures say little")
    made.add_argument("--work", type=Path, default=Path(work), help="folder of trainings and finished rows")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", help="write the rows to this file")
    return made


def main() -> None:
    """Train, judge and print."""
    options = parser(__doc__, "runs/structure")
    options.add_argument("--models", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    options.add_argument("--structures", nargs="+", default=list(DEFAULT), choices=list(STRUCTURES))
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    bench = Bench(Plan(**(QUICK if asked.quick else {})), asked.work)
    rows = []
    for name in asked.models:
        model = bench.model(name, {})
        for label in asked.structures:
            structure, family = STRUCTURES[label]
            rows.append(bench.row(name, label, model, structure, family(BLOCKS[name])))
            show(rows[-1:])
    print()
    show(rows)
    write(rows, asked.json)


if __name__ == "__main__":
    main()
