"""How long a calibration takes, and what sharing a datum's work among its draws saves.

    python -m benchmarks.calibration [--quick] [--json FILE]

10,000 simulations with 1,000 draws each of an EA-VAE with 16 latents on images of 16×16 pixels, all ranks included, by
the guide that `amortize` makes. Beside it, in turn and with a twentieth of the simulations each, the same with the
whole guide run on every draw. The goal is a minute on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

import calibrant as cal
from calibrant.evaluation import calibration

LATENTS, SHAPE, DRAWS = 16, (1, 16, 16), 1_000


@dataclass(frozen=True)
class Row:
    """Seconds of a calibration, and microseconds of one of its draws."""

    what: str
    simulations: int
    draws: int
    threads: int
    seconds: float
    microseconds: float


@contextmanager
def _unshared() -> Iterator[None]:
    """Inside, the guide runs on every draw."""
    names: dict[str, Any] = calibration.__globals__
    shared = names["encoded_once"]
    names["encoded_once"] = lambda guide, repeats: nullcontext()
    try:
        yield
    finally:
        names["encoded_once"] = shared


def timed(what: str, model: PyroModule, guide: PyroModule, data: dict[str, Tensor], simulations: int) -> Row:
    start = time.perf_counter()
    calibration(model, guide, data, simulations, DRAWS)
    seconds = time.perf_counter() - start
    return Row(what, simulations, DRAWS, torch.get_num_threads(), seconds, 1e6 * seconds / (simulations * DRAWS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the simulations")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    model = cal.models.create("ea-vae", shape=SHAPE, latents=LATENTS).eval()
    data = {"x": cal.program.sample_prior(model, 500, seed=0)["x"]}
    guide = cal.guides.amortize(model, data).eval()
    whole, part = (500, 200) if options.quick else (10_000, 500)
    rows = []
    for _ in range(2):
        rows.append(timed("shared", model, guide, data, part))
        with _unshared():
            rows.append(timed("guide run on every draw", model, guide, data, part))
    rows.append(timed("shared", model, guide, data, whole))
    for row in rows:
        print(
            f"{row.what:<24}{row.simulations:>7} × {row.draws}: {row.seconds:6.1f} s, {row.microseconds:5.1f} µs a draw"
        )
    ratio = min(r.seconds for r in rows[1:4:2]) / min(r.seconds for r in rows[0:4:2])
    print(f"sharing: {ratio:.1f} times as fast ({torch.get_num_threads()} threads)")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
