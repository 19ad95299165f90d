"""The run folder of a reproduction: which run it belongs to, and where its files are."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibrant.errors import RunError
from calibrant.folders.configuration import CONFIG, FORMAT, REPRODUCTION, read_any_config, versions, write_config
from calibrant.reproductions.cards import Experiment, file_name
from calibrant.reproductions.registering import PAPERS, experiment, list_experiments

CELLS, TRAININGS, RESULTS, REPORT = "cells", "trainings", "results.json", "report.html"


@dataclass(frozen=True)
class Plan:
    """What is run, and into which folder.

    Attributes:
        paper: name of the paper.
        only: names of experiments; empty for all.
        quick: whether the run is a quick one.
        seeds: number of seeds of every experiment; None for that on its card.
        device: device of trainings.
        out: the run folder.
        data_root: folder of the files of registered data sets.
        download: whether to download data that are missing.
    """

    paper: str
    only: tuple[str, ...]
    quick: bool
    seeds: int | None
    device: str
    out: Path
    data_root: str | None = None
    download: bool = False

    @property
    def experiments(self) -> list[Experiment]:
        """The cards of the experiments, in the order of the paper's file."""
        return [card for card in list_experiments(self.paper) if not self.only or card.name in self.only]

    def seeds_of(self, card: Experiment) -> tuple[int, ...]:
        """The seeds of an experiment: 0, 1, …"""
        return tuple(range(self.seeds or card.seeds[0 if self.quick else 1]))

    def cell_file(self, card: Experiment, row: str, seed: int) -> Path:
        """The file of a finished cell."""
        return self.out / CELLS / card.name / f"{file_name(row)}.{seed}.safetensors"

    def training_folder(self, card: Experiment, row: str, seed: int, digest: str) -> Path:
        """The folder of a cell's checkpoints, which another digest does not share."""
        return self.out / TRAININGS / card.name / f"{file_name(row)}.{seed}-{digest[:12]}"

    def resuming(self) -> str:
        """The command that goes on with this run."""
        words = ["calibrant", "reproduce", self.paper, *(word for name in self.only for word in ("--only", name))]
        words += ["--quick"] if self.quick else []
        words += ["--seeds", str(self.seeds)] if self.seeds else []
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--data-root", self.data_root] if self.data_root else []
        return shlex.join([*words, "--out", str(self.out), "--resume"])


def default_folder(paper: str, quick: bool) -> Path:
    """Where a run goes if no folder is named."""
    return Path("runs", f"reproduce-{paper}{'-quick' if quick else ''}")


def completed(plan: Plan, resume: bool, overwrite: bool) -> Plan:
    """Complete the plan of a run that is resumed, and refuse a folder that cannot be used; nothing is written.

    Raises:
        RunError: for a folder that holds something else, a run that neither option names, and a run to resume that is
            another one.
    """
    if resume:
        return _resumed(plan)
    if plan.out.is_dir() and any(plan.out.iterdir()):
        _stored(plan.out)
        if not overwrite:
            raise RunError(
                f"{plan.out} holds a run: --resume continues it, --overwrite replaces it, --out FOLDER names another"
            )
    elif plan.out.exists() and not plan.out.is_dir():
        raise RunError(f"{plan.out} is a file: name a folder, --out FOLDER")
    return plan


def open_folder(plan: Plan, resume: bool) -> None:
    """Create the run folder, without what it holds of a run that is not resumed, and say whose run it is."""
    if not resume and plan.out.is_dir() and any(plan.out.iterdir()):
        clear(plan.out)
    plan.out.mkdir(parents=True, exist_ok=True)
    kept = {"paper": plan.paper, "only": list(plan.only), "quick": plan.quick, "seeds": plan.seeds}
    config = {REPRODUCTION: {**kept, "device": plan.device}, "sha256": {}, "versions": versions()}
    write_config(plan.out, {"format": FORMAT, **config})


def check_names(plan: Plan) -> None:
    """Raise `RunError` for a paper or an experiment that is not there, and for a number of seeds below one."""
    PAPERS[plan.paper]
    for name in plan.only:
        experiment(plan.paper, name)
    if plan.seeds is not None and plan.seeds < 1:
        raise RunError(f"--seeds {plan.seeds}: give the number of seeds, 1 or more")


def _stored(folder: Path) -> dict[str, Any]:
    """What a run folder says about its run."""
    try:
        config = read_any_config(folder)
    except RunError as error:
        raise RunError(f"{error}, so it is left alone: name another folder, --out FOLDER") from error
    if REPRODUCTION not in config:
        raise RunError(
            f"{folder} holds a run of another command, so it is left alone: name another folder, --out FOLDER"
        )
    return config[REPRODUCTION]


def _resumed(plan: Plan) -> Plan:
    if not (plan.out / CONFIG).is_file():
        raise RunError(f"there is no run in {plan.out} to resume: leave --resume out, or name its folder, --out FOLDER")
    stored = _stored(plan.out)
    for what, now, before in (("paper", plan.paper, stored["paper"]), ("--quick", plan.quick, stored["quick"])):
        if now != before:
            raise RunError(
                f"{plan.out} was made with other settings ({what} was {before}, is {now}): resume it with those, or "
                "start a new run, --out FOLDER"
            )
    both = tuple(dict.fromkeys((*stored["only"], *plan.only))) if stored["only"] else ()
    return replace(plan, only=both, seeds=plan.seeds or stored["seeds"])


def clear(folder: Path) -> None:
    """Delete what `calibrant reproduce` wrote into a run folder, and nothing else.

    Raises:
        RunError: for a link in the place of a folder inside it.
    """
    inside = [folder / CELLS, folder / TRAININGS]
    for part in inside:
        if part.is_symlink():
            raise RunError(f"{part} is a link: calibrant stays inside {folder}, so delete the link")
    for part in inside:
        if part.is_dir():
            shutil.rmtree(part)
    for file in (RESULTS, REPORT, CONFIG):
        (folder / file).unlink(missing_ok=True)


def clear_trainings(plan: Plan, card: Experiment, row: str, seed: int, digest: str) -> None:
    """Delete the checkpoints of a cell that belong to another configuration than the one with this digest."""
    own = plan.training_folder(card, row, seed, digest)
    for training in own.parent.glob(f"{file_name(row)}.{seed}-*"):
        if training != own and not training.is_symlink():
            shutil.rmtree(training)
