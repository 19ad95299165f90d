"""The settings of a run and the request of a command. Nothing slow is imported, so that `calibrant --help` is quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MODELS = ("vae", "ea-vae", "ea-vae+collapsed")  # the demonstration
DATA = "natural-patches"

# Names that `--help` shows. They are defined in `guides/structure.py`, `guides/families/choosing.py`,
# `guides/encoders/choosing.py` and `inference/fitting/objectives.py`, which are too slow to import for `--help`.
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
    "softplus-laplace",
    "flow",
    "log-variance",
    "laplace-log-variance",
    "lognormal-log-variance",
    "gamma-truncated",
    "vonmises",
    "vmf",
    "bernoulli",
    "onehot",
    "categorical",
)
ENCODERS = ("mlp", "conv", "set", "sequence", "sigma-vae", "ea-vae-mlp", "ea-vae-conv")
OBJECTIVES = ("stl", "kl", "iwae", "dreg")

# Settings that must stay the same when a training is resumed.
TRAINING = ("structure", "family", "encoder", "objective", "epochs", "batch_size", "lr", "seed", "train_data")

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


def model_of(name: str) -> str:
    """The model of a member of a run: "ea-vae" for "ea-vae+collapsed", which is one more guide for the same model."""
    return name if structure_of(name) is None else name.rpartition("+")[0]


def structure_of(name: str) -> str | None:
    """The structure of the guide that a member of a run adds for the model of an earlier one; else None."""
    structure = name.rpartition("+")[2]
    return structure if "+" in name and structure in STRUCTURES else None


def option(help: str, group: str = "", **form: Any) -> dict[str, Any]:
    """Metadata of a field for the command line.

    Args:
        help: description of the field.
        group: group of options that it belongs to; a field without a group is not an option of the command line.
        form: `minimum` of a number; `flag`, if the option has another name; `shown`, the default in words.
    """
    return {"help": help, "group": group, **form}


@dataclass(frozen=True)
class Effort:
    """How much a check does; the defaults are the budget for which its error rates and power are stated."""

    draws: int = field(
        default=1000,
        metadata=option("guide draws per datum, and draws per reference chain", "check", minimum=100),
    )
    chains: int = field(default=4, metadata=option("number of reference chains", "check", minimum=1))
    warmup: int = field(
        default=1000, metadata=option("adaptation steps per reference chain (MCMC only)", "check", minimum=1)
    )
    simulations: int = field(
        default=2000,
        metadata=option("number of simulated data on which the guide's calibration is tested", "check", minimum=100),
    )
    memory: float | None = field(
        default=None,
        metadata=option(
            "GiB that one run of model and guide may take; from 2 GiB on, results do not depend on it",
            "check",
            shown="None: half of the free memory",
        ),
    )
    predictive_draws: int = field(default=200, metadata=option("posterior predictive draws per datum"))
    gap_data: int | None = field(default=None, metadata=option("number of data whose gap is split; None for all data"))
    contrast_images: int = field(default=32, metadata=option("number of images in the contrast experiment"))
    contrast_levels: int = field(
        default=13, metadata=option("number of contrasts in the contrast experiment, from 0.1 to 10 times the noise")
    )
    remedies: bool = field(
        default=False, metadata=option("try remedies for the guide, which takes a few trainings", "check")
    )
    remedy_steps: int = field(default=2000, metadata=option("training steps of each richer guide that is tried"))


@dataclass(frozen=True)
class Settings(Effort):
    """The settings of a run: how it trains, and how much its check does.

    Posteriors and references are always computed on the CPU, in float64. The defaults of `warmup` and `gap_data` are
    smaller than those of `Effort`.
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
    encoder: str | dict[str, Any] | None = field(
        default=None,
        metadata=option(
            'encoder of the guide: NAME, {"name": NAME, OPTION: VALUE}, or INPUT=NAME for one input, repeated: '
            + ", ".join(ENCODERS),
            "training",
            shown="None: by the shape of the data",
        ),
    )
    objective: str = field(
        default="stl", metadata=option(f"objective of the training: {', '.join(OBJECTIVES)}", "training")
    )
    epochs: int = field(
        default=22,
        metadata=option(
            "passes over the training data; without it, few data get more: at least 1,000 steps", "training", minimum=1
        ),
    )
    batch_size: int = field(default=256, metadata=option("number of data in each training step", "training", minimum=1))
    lr: float = field(default=3e-3, metadata=option("peak learning rate", "training"))
    seed: int = field(
        default=0,
        metadata=option("random seed for data split, initial weights, minibatches, draws", "training", minimum=0),
    )
    train_data: int | None = field(default=None, metadata=option("number of training data that are used; None for all"))
    device: str = field(default="cpu", metadata=option("device to train on", "training"))
    held_out: int = field(
        default=128,
        metadata=option("number of checked test data; with fewer than 73, no guide can pass", "check", minimum=2),
    )
    warmup: int = 300
    gap_data: int | None = 16


@dataclass(frozen=True)
class Request:
    """The options of a command; None and empty values stand for options that were not given."""

    models: tuple[str, ...] = field(default=(), metadata=option("registered names or FILE.py:Class"))
    data: str | None = field(
        default=None,
        metadata=option(
            "registered data set, FILE.npz, FILE.npy, FILE.csv, FOLDER/ or FILE.py:function", "data", shown=DATA
        ),
    )
    data_root: str | None = field(
        default=None,
        metadata=option("folder with the files of the registered data sets", "data", shown="$CALIBRANT_DATA"),
    )
    download: bool = field(default=False, metadata=option("download a registered data set that is missing", "data"))
    data_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=option(
            "NAME=VALUE: an option of the data set, JSON or a plain word, such as size=14", "data", flag="--data-option"
        ),
    )
    site: dict[str, str] = field(
        default_factory=dict,
        metadata=option("NAME=KEY: the data's KEY holds the program's site or covariate NAME", "data"),
    )
    arguments: dict[str, Any] = field(
        default_factory=dict,
        metadata=option("NAME=VALUE: an argument of the model, JSON or a plain word", "model", flag="--set"),
    )
    settings: dict[str, Any] = field(default_factory=dict, metadata=option("the fields of `Settings` that were given"))
    quick: bool = field(default=False, metadata=option("small run, to see that everything works", "folder"))
    out: Path | None = field(default=None, metadata=option("run folder", "folder", shown="runs/MODEL-DATA-N"))
    overwrite: bool = field(
        default=False, metadata=option("replace the run in --out (a folder of anything else is kept)", "folder")
    )
    resume: bool = field(default=False, metadata=option("continue the run in --out", "folder"))
    chosen: dict[str, Any] = field(
        default_factory=dict, metadata=option("other fields of `Settings`, chosen to suit the data")
    )

    def asked(self) -> dict[str, Any]:
        """The settings that were given, including those of a quick run."""
        return {**(QUICK if self.quick else {}), **self.settings}

    def made(self) -> Settings:
        """All settings, with the defaults of those that were neither given nor chosen."""
        return Settings(**{**(QUICK if self.quick else {}), **self.chosen, **self.settings})


# -- the demonstration -------------------------------------------------------------------------------------------------

# What the demonstration gives its models, and its settings, unless they are given.
_ARGUMENTS: Mapping[str, Any] = {"latents": 16}
_CHOSEN: Mapping[str, Any] = {"memory": 0.5}  # GiB, since several processes run side by side
_ABOUT = {True: (1, 2), False: (4, 6)}  # quick or not → minutes on two cores, and on one


def demonstration(request: Request) -> Request:
    """The request of a run that names no model. Where a guide is asked for, the models have that guide alone."""
    is_asked = {"structure", "family", "encoder"} & set(request.asked())
    return replace(
        request,
        models=tuple(name for name in MODELS if structure_of(name) is None or not is_asked),
        data=request.data or DATA,
        arguments={**_ARGUMENTS, **request.arguments},
        chosen={**_CHOSEN, **request.chosen},
    )


def is_demonstration(request: Request) -> bool:
    """Whether a request has the data and models of the demonstration, whose further guides a program may not allow."""
    models = set(request.models)
    return request.data == DATA and {name for name in MODELS if structure_of(name) is None} <= models <= set(MODELS)


def announced(request: Request) -> str:
    """A line that says what `calibrant run` is about to do; for the demonstration as it is, how long it takes."""
    if request.resume:
        return f"Continuing the run in {request.out} ..."
    names = request.models or demonstration(request).models
    models = [name for name in names if structure_of(name) is None]
    added = [f"a {structure_of(name)} guide for {model_of(name)}" for name in names if structure_of(name) is not None]
    guides = "its guide" if len(names) == 1 else "every guide"
    told = f"Training {_listed([*models, *added])} on {request.data or DATA}, then checking {guides} against the "
    is_plain = not (request.models or request.data or request.arguments or set(request.settings) - {"seed"})
    if not is_plain:
        return f"{told}reference posterior ..."
    minutes = _ABOUT[request.quick][(os.cpu_count() or 1) < 2]
    return f"{told}exact posterior: about {minutes} minute{'s' * (minutes > 1)} ..."


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
