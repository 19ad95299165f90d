"""What a run does, and what a command asked for; imports nothing heavy, so that `calibrant --help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = ("vae", "ea-vae")
DATA = "natural-patches"

# Names that `--help` shows; what they stand for is in `guides/structure.py`, `guides/families/choosing.py`
# and `inference/fitting/objectives.py`, which are too heavy to be imported for it.
STRUCTURES = ("faithful", "mean-field", "program", "full", "collapsed")
FAMILIES = (
    "normal",
    "laplace",
    "studentt",
    "lognormal",
    "gamma",
    "beta",
    "dirichlet",
    "transformed",
    "dense",
    "low-rank",
    "gamma-fixed",
    "flow",
    "vonmises",
    "vmf",
    "bernoulli",
    "onehot",
    "categorical",
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


def option(help: str, group: str = "", **form: Any) -> dict[str, Any]:
    """What the command line has to know of a field.

    Args:
        help: what it is, in words.
        group: the group of options that it belongs to; without a group it is no option of the command line.
        form: `minimum` of a number; `flag`, where the option has another name; `shown`, the default in words.
    """
    return {"help": help, "group": group, **form}


@dataclass(frozen=True)
class Effort:
    """How much a check does; the defaults are the budget that its error rates and power are stated for."""

    draws: int = field(
        default=1000,
        metadata=option("draws of the guide for each datum, and draws of each reference chain", "check", minimum=100),
    )
    chains: int = field(default=4, metadata=option("number of reference chains", "check", minimum=1))
    warmup: int = field(
        default=1000, metadata=option("adaptation steps of each reference chain (MCMC only)", "check", minimum=1)
    )
    simulations: int = field(
        default=2000,
        metadata=option(
            "number of data that the model simulates, on which the guide is calibrated", "check", minimum=100
        ),
    )
    predictive_draws: int = field(default=200, metadata=option("posterior predictive draws for each datum"))
    gap_data: int | None = field(default=None, metadata=option("number of data whose gap is split; None for all"))
    contrast_images: int = field(default=32, metadata=option("number of images in the contrast experiment"))
    contrast_levels: int = field(
        default=13, metadata=option("number of contrasts in that experiment, from 0.1 to 10 times the noise")
    )
    remedies: bool = field(
        default=False, metadata=option("try what could improve the guide, which takes a few trainings", "check")
    )
    remedy_steps: int = field(default=2000, metadata=option("training steps of each richer guide that is tried"))


@dataclass(frozen=True)
class Settings(Effort):
    """How a run trains, and how much its check does.

    Posteriors and references are always computed on the CPU, in float64. A run's `warmup` and `gap_data` are smaller
    than those of `Effort`.
    """

    structure: str = field(
        default="faithful", metadata=option(f"structure of the guide: {', '.join(STRUCTURES)}", "training")
    )
    family: str | dict[str, str] = field(
        default="auto",
        metadata=option(
            f"families of the guide: NAME for all latents, or SITE=NAME for one, repeated: {', '.join(FAMILIES)}",
            "training",
        ),
    )
    objective: str = field(
        default="stl", metadata=option(f"what training maximises: {', '.join(OBJECTIVES)}", "training")
    )
    epochs: int = field(default=22, metadata=option("passes over the training data", "training", minimum=1))
    batch_size: int = field(default=256, metadata=option("number of data in each training step", "training", minimum=1))
    lr: float = field(default=3e-3, metadata=option("first learning rate", "training"))
    seed: int = field(
        default=0,
        metadata=option("random seed of the run: data split, first weights, minibatches, draws", "training", minimum=0),
    )
    train_data: int | None = field(default=None, metadata=option("number of training data that are used; None for all"))
    device: str = field(default="cpu", metadata=option("device to train on", "training"))
    held_out: int = field(
        default=128,
        metadata=option("number of test data that are checked; with fewer than 73, nothing passes", "check", minimum=2),
    )
    warmup: int = 300
    gap_data: int | None = 16


@dataclass(frozen=True)
class Request:
    """What a command was asked for; None and empty stand for what it was not told."""

    models: tuple[str, ...] = field(default=(), metadata=option("registered names or FILE.py:Class"))
    data: str | None = field(
        default=None, metadata=option("registered data set, FILE.npz, FILE.npy or FILE.py:function", "data", shown=DATA)
    )
    data_root: str | None = field(
        default=None,
        metadata=option("folder with the files of the registered data sets", "data", shown="$CALIBRANT_DATA"),
    )
    download: bool = field(default=False, metadata=option("download a registered data set that is not there", "data"))
    site: dict[str, str] = field(
        default_factory=dict,
        metadata=option("NAME=KEY: the program's site or covariate NAME is the data's KEY", "data"),
    )
    arguments: dict[str, Any] = field(
        default_factory=dict,
        metadata=option("NAME=VALUE: an argument of the model, JSON or a plain word", "model", flag="--set"),
    )
    settings: dict[str, Any] = field(
        default_factory=dict, metadata=option("the fields of `Settings` that were asked for")
    )
    chosen: dict[str, Any] = field(
        default_factory=dict, metadata=option("other fields of `Settings`, chosen to suit the data")
    )
    out: Path | None = field(default=None, metadata=option("run folder", "folder", shown="runs/MODEL-DATA-N"))
    overwrite: bool = field(
        default=False, metadata=option("replace the run in --out, but never a folder of anything else", "folder")
    )
    resume: bool = field(default=False, metadata=option("continue the run in --out", "folder"))
    quick: bool = field(default=False, metadata=option("small run, to see that everything works", "folder"))

    def asked(self) -> dict[str, Any]:
        """The settings that were asked for, those of a quick run among them."""
        return {**(QUICK if self.quick else {}), **self.settings}

    def made(self) -> Settings:
        """All settings."""
        return Settings(**{**(QUICK if self.quick else {}), **self.chosen, **self.settings})
