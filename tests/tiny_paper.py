"""A paper whose cells take no time, for the tests of reproductions; other processes import this file too.

The environment variable TINY_PAPER says what a cell does besides: "fail ROW SEED", "kill ROW SEED".
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

import calibrant as cal
from calibrant.reproductions import Context, Found, Measured, Needs, Ordering, Picture, Summary, Target

NUMBERS = {"mean": "grey values", "noise": "sd"}
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="

cal.reproductions.register_paper("tiny", title="A tiny paper", arxiv="0000.00000", sentence="It has two rows.")


def summarised(found: Found) -> Summary:
    gain = found.difference("much", "little", "mean")
    best = {"mean": dict(enumerate(found.values("much", "mean")))}
    return Summary(
        [f"Much is {gain} more than little."], [Picture("Dots", "How to read it: not at all.", PIXEL)], {"best": best}
    )


@cal.reproductions.register_experiment(
    "tiny",
    "means",
    answers="Figure 0",
    shows="That a mean moves by what is added.",
    rows={"little": {"added": 0.0}, "much": {"added": 1.0}},
    numbers=NUMBERS,
    needs=(Needs("digits", quick={"train": 100}),),
    minutes=(0.01, 0.02),
    settings={"noise": 0.1},
    quick={"noise": 0.2},
    reduced_quick="Less noise than in the paper.",
    seeds=(3, 4),
    targets=(
        Target("little", "mean", 0.3, 0.5),
        Target("much", "mean", 7.0, 0.1),
        Target("much", "noise", 1.0, because="it is"),
    ),
    orderings=(Ordering("mean", ("little", "much"), "much is more than little"),),
    summarise=summarised,
)
def means(context: Context, row: str, seed: int) -> dict[str, Any]:
    """The mean grey value of the test data, with a shift and a noise that all rows of a seed share."""
    what, *place = (os.environ.get("TINY_PAPER") or "nothing").split()
    if place == [row, str(seed)]:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("planted")
    assert context.row == row
    assert context.seed == seed
    x = context.splits["test"].tensors()[0]["x"]
    noise = (
        torch.randn((), generator=torch.Generator().manual_seed(context.stream("noise"))) * context.settings["noise"]
    )
    shifted = x.mean((1, 2, 3)) + context.arguments["added"] + noise
    return {"mean": Measured.of(shifted), "noise": torch.randn(()), "first image": x[0]}


@cal.reproductions.register_experiment(
    "tiny",
    "absent",
    answers="Figure 1",
    shows="What happens without data.",
    rows={"one": {}},
    numbers={"one": "ones"},
    needs=(Needs("van-hateren"),),
    minutes=(1, 100),
)
def absent(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Never called where the data are absent."""
    return {"one": 1.0}
