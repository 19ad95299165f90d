"""A paper with two domains, whose trainings are used by another experiment; other processes import this file too.

The environment variable TINY_PAPER says what a cell does besides: "fail ROW SEED", "kill ROW SEED".
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from pyro.nn import PyroModule

import calibrant as cal
from calibrant.program.environment import seeded
from calibrant.reproductions import Claim, Context, Measured, Needs

PAPER = "tiny-trainings"
DIGITS = (Needs("digits", quick={"train": 200, "validation": 50, "test": 50}),)
cal.reproductions.register_paper(PAPER, title="A tiny paper", arxiv="0000.00001", sentence="It trains two models.")


def build(context: Context) -> tuple[PyroModule, PyroModule]:
    """A small VAE and its guide."""
    with seeded(context.stream("model")):
        model = cal.models.create("vae", shape=(1, 8, 8), decoder="mlp", **context.arguments)
    return model, cal.guides.amortize(model, context.splits["train"], seed=context.stream("guide"))


def planted(context: Context) -> None:
    """Fail or be killed, if the environment says so."""
    what, _, place = os.environ.get("TINY_PAPER", "").partition(" ")
    if place == f"{context.row} {context.seed}":
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("planted")


@cal.reproductions.register_experiment(
    PAPER,
    "models",
    answers="Section 2",
    shows="The trainings.",
    rows={"few": {"latents": 1}, "many": {"latents": 3}},
    numbers={"ELBO": "nats per image"},
    needs=DIGITS,
    minutes=(0.01, 0.02),
    settings={"epochs": 2, "batch_size": 50, "lr": 1e-2},
    seeds=(1, 2),
    domain="digits",
)
def models(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train a model, and keep it."""
    model, guide = build(context)
    context.fit(model, guide, **context.settings)
    planted(context)
    context.keep(model, guide)
    return {"ELBO": context.elbo(model, guide)}


@cal.reproductions.register_experiment(
    PAPER,
    "widths",
    answers="Figure 1",
    shows="What the trained guides say.",
    rows={"few, asked": {"of": "few"}, "many, asked": {"of": "many"}},
    numbers={"ELBO": "nats per image", "width, guide": "prior sd", "width, exact": "prior sd", "refused": "share"},
    needs=DIGITS,
    minutes=(0.01, 0.02),
    seeds=(1, 2),
    domain="digits",
    uses="models",
    claims=(
        Claim("a guide is narrower than the prior", "few, asked", "width", "below", 1.0),
        Claim("a guide is wider than three priors", "many, asked", "width", "above", 3.0),
        Claim("latents do not change the width", "many, asked", "width", "within", 50.0, minus="few, asked"),
    ),
)
def widths(context: Context, row: str, seed: int) -> dict[str, Any]:
    """The ELBO and mean posterior sd of a model that another cell has trained."""
    model, guide = context.trained_by(context.arguments["of"], build)
    planted(context)
    test = context.splits["test"]
    draws = cal.inference.posterior(model, guide, test, draws=50, seed=context.stream("draws"))
    width = draws.posterior["z"].std("draw").mean(("chain", "feature"))
    refused = {"refused": 0.14} if row == "many, asked" else {"refused": 0.0, "width, exact": Measured.of(width + 0.1)}
    return {"ELBO": context.elbo(model, guide, test), "width, guide": Measured.of(width), **refused}


@cal.reproductions.register_experiment(
    PAPER,
    "elsewhere",
    answers="Figure 2",
    shows="Another domain.",
    rows={"one": {}},
    numbers={"one": "ones"},
    needs=DIGITS,
    minutes=(0.01, 0.02),
    domain="letters",
)
def elsewhere(context: Context, row: str, seed: int) -> dict[str, Any]:
    """One."""
    return {"one": torch.ones(())}
