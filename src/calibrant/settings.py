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
    "remedy_steps": 200,
}


@dataclass(frozen=True)
class Effort:
    """How much a check does; the defaults are the budget that its error rates and power are stated for.

    Attributes:
        draws: of the guide for a datum, and of each chain of the reference.
        chains: of the reference.
        warmup: adaptation steps of a chain (MCMC alone).
        simulations: data that the model simulates, to calibrate the guide on.
        predictive_draws: posterior predictive draws of a datum.
        gap_data: how many data have their gap split; None for all.
        contrast_images: images of the contrast experiment.
        contrast_levels: its number of contrasts, from 0.1 to 10 times the noise.
        remedies: whether remedies are tried.
        remedy_steps: of the training of each richer guide that is tried.
    """

    draws: int = 1000
    chains: int = 4
    warmup: int = 1000
    simulations: int = 2000
    predictive_draws: int = 200
    gap_data: int | None = None
    contrast_images: int = 32
    contrast_levels: int = 13
    remedies: bool = False
    remedy_steps: int = 2000


@dataclass(frozen=True)
class Settings(Effort):
    """How a run trains, and how much its check does, as `Effort`.

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
        held_out: how many test data are checked.
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
    held_out: int = 128
    warmup: int = 300
    gap_data: int | None = 16


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
