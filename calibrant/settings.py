"""What a run does, and what a command asked for; imports nothing heavy, so that `calibrant --help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = ("vae", "ea-vae")
DATA = "natural-patches"

# Names that `--help` shows; what they stand for is in `guides/structure.py`, `guides/families.py` and
# `inference/objectives.py`, which are too heavy to be imported for it.
STRUCTURES = ("faithful", "mean-field", "program", "full", "collapsed")
FAMILIES = (
    *("normal", "laplace", "studentt", "lognormal", "gamma", "beta", "dirichlet", "transformed", "dense", "low-rank"),
    *("gamma-fixed", "flow", "vonmises", "vmf", "bernoulli", "onehot", "categorical"),
)
OBJECTIVES = ("stl", "kl", "iwae", "dreg")

# What a training that goes on must not change.
TRAINING = ("structure", "family", "objective", "epochs", "batch_size", "lr", "seed", "train_data")

QUICK: Mapping[str, Any] = {
    "epochs": 4,
    "train_data": 8_000,
    "held_out": 16,
    "draws": 500,
    "simulations": 200,
    "predictive_draws": 50,
    "contrast_images": 8,
    "contrast_levels": 5,
}


@dataclass(frozen=True)
class Settings:
    """How a run trains, samples and compares.

    Attributes:
        structure: of the guide, one of `STRUCTURES`.
        family: of the guide: "auto", one of `FAMILIES` for all sites, or one by site.
        objective: what training maximises, one of `OBJECTIVES`.
        epochs: passes over the training data.
        batch_size: data a step.
        lr: first learning rate.
        seed: of everything random: the split, the first weights, the minibatches, the draws.
        train_data: how many training data are used; None for all.
        device: where to train. Posteriors and references are always computed on the CPU, in float64.
        draws: draws of the guide a datum, and of each reference chain.
        chains: reference chains.
        warmup: adaptation steps of a reference chain (MCMC alone).
        held_out: how many test data are checked.
        simulations: data that the model simulates, to calibrate the guide on.
        predictive_draws: posterior predictive draws a datum.
        remedies: whether remedies are tried.
        contrast_images: images of the contrast experiment.
        contrast_levels: its number of contrasts, from 0.1 to 10 times the noise.
    """

    structure: str = "faithful"
    family: str | dict[str, str] = "auto"
    objective: str = "stl"
    epochs: int = 22
    batch_size: int = 256
    lr: float = 3e-3
    seed: int = 0
    train_data: int | None = None
    device: str = "cpu"
    draws: int = 1000
    chains: int = 4
    warmup: int = 300
    held_out: int = 128
    simulations: int = 2000
    predictive_draws: int = 200
    remedies: bool = False
    contrast_images: int = 32
    contrast_levels: int = 13


@dataclass(frozen=True)
class Request:
    """What a command was asked for; None and empty stand for what it was not told.

    Attributes:
        models: registered names or `FILE.py:Class`.
        data: a registered name, `FILE.npz`, `FILE.npy` or `FILE.py:function`.
        data_root: folder of the registered sets' files.
        download: whether to fetch a set that is not there.
        site: the program's name → the data's key.
        arguments: of the models' constructors.
        settings: fields of `Settings` by name.
        quick: a small run; `settings` go before it.
        out: the run folder.
        overwrite: replace a run folder.
        resume: go on with the training in `out`.
    """

    models: tuple[str, ...] = ()
    data: str | None = None
    data_root: str | None = None
    download: bool = False
    site: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    out: Path | None = None
    overwrite: bool = False
    resume: bool = False

    def asked(self) -> dict[str, Any]:
        """The settings that were asked for, those of a quick run among them."""
        return {**(QUICK if self.quick else {}), **self.settings}
