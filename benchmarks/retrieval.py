"""Time and memory of nearest neighbours among many images, by cosine.

`python -m benchmarks.retrieval --images 100000 --queries 2000` compares some queries with the whole database: the
blocks, and so the peak of memory, are those of all queries, and the time grows in proportion to their number.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from calibrant.evaluation import nearest_neighbours

_PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Row:
    """What one search took.

    Attributes:
        gib_input: size of the embeddings.
        gib_beyond: largest memory during the search beyond what was taken before it, the input included.
        cpu_seconds: of the search, over all threads.
        machine: kind of processor.
    """

    images: int
    queries: int
    features: int
    threads: int
    gib_input: float
    gib_beyond: float
    seconds: float
    cpu_seconds: float
    machine: str


def measure(images: int, queries: int, features: int = 1280, seed: int = 0) -> Row:
    """Search the nearest neighbour of the first `queries` images among all."""
    generator = np.random.default_rng(seed)
    x = np.empty((images, features), dtype=np.float32)
    for part in np.array_split(x, max(1, images // 10_000)):
        part[:] = generator.standard_normal(part.shape, dtype=np.float32)
    nearest_neighbours(x[:100])
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    nearest_neighbours(x[:queries], x, own=np.arange(queries))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    return Row(
        images, queries, features, torch.get_num_threads(), _gib(x.nbytes), _gib(peak[0] - before),
        round(wall, 1), round(cpu, 1), platform.machine(),
    )  # fmt: skip


def _resident() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _gib(count: int) -> float:
    return round(count / 2**30, 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[20_000, 100_000], help="sizes of the database")
    parser.add_argument("--queries", type=int, default=2_000, help="queries of each; at most all images")
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--json", help="write the rows to this file")
    asked = parser.parse_args()
    rows = [measure(images, min(asked.queries, images), asked.features) for images in asked.images]
    for row in rows:
        print(row)
    if asked.json:
        Path(asked.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
