"""Where the time of a check goes: processor seconds and peak memory of its stages.

    python -m benchmarks.checking [--quick] [--cases demo latents] [--json FILE]

Two cases, each in one process with one thread: `demo`, the member `ea-vae` of `calibrant run` without arguments, from
its data to its report; and `latents`, a check from Python of 400 data with 64 latents each (`ppca`, 1,000 draws, 4
chains). Times are those of the processor, so that other programs do not lengthen them. A stage begins where the one
before it ended, as in the display of progress; `silent` is the longest time between two reports, in which a display
shows the running clock alone. `peak` is the largest memory of the process during the stage (Linux), with the libraries
that are loaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import calibrant as cal
from benchmarks.storing import keep
from calibrant.settings import QUICK, Request, demonstration
from calibrant.workflow.running import run

_MIB = 1024  # KiB, in which Linux tells memory


@dataclass
class Stage:
    """A row of the table; seconds of the processor, MiB."""

    case: str
    stage: str
    seconds: float = 0.0
    silent: float = 0.0
    peak: float = 0.0
    share: float = 0.0


class Watch:
    """A function `progress` that keeps the time and the memory of every stage."""

    def __init__(self, case: str) -> None:
        self.case, self.stages = case, dict[str, Stage]()
        self.current: str | None = None
        self.at = time.process_time()
        _forget_peak()

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Add what has passed to the running stage, or, after one has ended, to the one that begins."""
        now, name = time.process_time(), self.current or stage
        row = self.stages.setdefault(name, Stage(self.case, name))
        row.seconds += now - self.at
        row.silent = max(row.silent, now - self.at)
        row.peak = max(row.peak, _peak())
        _forget_peak()
        self.at, self.current = now, None if done >= total else stage

    def rows(self) -> list[Stage]:
        """All stages, in their order, with their shares."""
        total = sum(row.seconds for row in self.stages.values())
        return [replace(row, share=row.seconds / total) for row in self.stages.values()]


def _peak() -> float:
    """Largest memory of the process since `_forget_peak`, in MiB; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / _MIB for line in lines if line.startswith("VmHWM:")), 0.0)


def _forget_peak() -> None:
    with suppress(OSError):  # elsewhere a peak is that of all stages so far
        Path("/proc/self/clear_refs").write_text("5")


# -- the cases ---------------------------------------------------------------------------------------------------------


def demo(watch: Watch, quick: bool) -> None:
    """One member of the demonstration, as `calibrant run ea-vae` with its settings runs it."""
    with tempfile.TemporaryDirectory() as folder:
        request = replace(demonstration(Request(quick=quick)), models=("ea-vae",), out=Path(folder) / "run")
        run(request, watch)


def latents(watch: Watch, quick: bool) -> None:
    """A check of a linear model from Python, whose guide is trained for a few epochs."""
    data, draws, simulations = (100, 300, 200) if quick else (400, 1000, 2000)
    torch.manual_seed(0)
    model = cal.models.create("ppca", shape=(16, 16), latents=64).eval()
    x = cal.program.sample_prior(model, 2000 + data, seed=1)["x"].detach()
    guide = cal.guides.amortize(model, {"x": x[:2000]})
    model.requires_grad_(False)
    held = {"x": x[2000:]}
    cal.inference.fit(model, guide, {"x": x[:2000]}, validation=held, epochs=4, progress=watch)
    found = cal.evaluation.check(
        model, guide.eval(), held, draws=draws, simulations=simulations, warmup=300, progress=watch
    )
    watch("report", 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder) / "report.html")
    watch("report", 1, 1)


CASES: dict[str, Callable[[Watch, bool], None]] = {"demo": demo, "latents": latents}


def measure(case: str, quick: bool) -> list[Stage]:
    """The stages of a case."""
    watch = Watch(case)
    CASES[case](watch, quick)
    return watch.rows()


# -- the table ---------------------------------------------------------------------------------------------------------


def show(rows: list[Stage]) -> None:
    """The table of a case, and its totals."""
    print(f"{'case':>8}{'stage':>44}{'seconds':>9}{'share':>7}{'silent':>8}{'peak MiB':>10}")
    for row in rows:
        print(f"{row.case:>8}{row.stage:>44}{row.seconds:>9.1f}{row.share:>7.0%}{row.silent:>8.1f}{row.peak:>10,.0f}")
    total, peak = sum(row.seconds for row in rows), max(row.peak for row in rows)
    print(f"{rows[0].case:>8}{'all':>44}{total:>9.1f}{1:>7.0%}{max(row.silent for row in rows):>8.1f}{peak:>10,.0f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    small = f"{QUICK['held_out']} data of the demonstration, 100 data with 64 latents"
    parser.add_argument("--quick", action="store_true", help=small)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Stage] = []
    for case in asked.cases:
        rows += measure(case, asked.quick)
        show([row for row in rows if row.case == case])
    if asked.json:
        keep(asked.json, rows, quick=asked.quick)


if __name__ == "__main__":
    main()
