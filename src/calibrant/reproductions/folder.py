"""The run folder of a reproduction: which run it belongs to, and where its files are."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibrant.errors import RunError, names_to_offer
from calibrant.folders.configuration import CONFIG, FORMAT, REPRODUCTION, read_any_config, versions, write_config
from calibrant.reproductions.cards import Experiment, file_name
from calibrant.reproductions.registering import PAPERS, experiment, list_experiments

CELLS, WEIGHTS, TRAININGS, CACHES = "cells", "weights", "trainings", "caches"
RESULTS, REPORT = "results.json", "report.html"


@dataclass(frozen=True)
class Plan:
    """What is run, and into which folder.

    Attributes:
        paper: name of the paper.
        only: names of experiments; empty for all.
        domains: names of domains; empty for all.
        quick: whether the run is a quick one.
        seeds: number of seeds of every experiment; None for that on its card.
        device: device of trainings.
        out: the run folder.
        data_root: folder of the files of registered data sets.
        download: whether to download data that are missing.
    """

    paper: str
    only: tuple[str, ...]
    domains: tuple[str, ...]
    quick: bool
    seeds: int | None
    device: str
    out: Path
    data_root: str | None = None
    download: bool = False

    @property
    def experiments(self) -> list[Experiment]:
        """The cards of the experiments and of those that they use, in the order in which they were registered."""
        return with_used(self.paper, [card for card in list_experiments(self.paper) if self.asks_for(card)])

    def asks_for(self, card: Experiment) -> bool:
        """Whether an experiment is one of those that are asked for by name and domain."""
        return (not self.only or card.name in self.only) and (not self.domains or card.domain in self.domains)

    def seeds_of(self, card: Experiment) -> tuple[int, ...]:
        """The seeds of an experiment: 0, 1, …"""
        return tuple(range(self.seeds or card.seeds[0 if self.quick else 1]))

    def cell_file(self, card: Experiment, row: str, seed: int) -> Path:
        """The file of a finished cell."""
        return self.out / CELLS / card.name / f"{file_name(row)}.{seed}.safetensors"

    def weights_file(self, card: Experiment, row: str, seed: int, name: str) -> Path:
        """The file of trained weights that a cell keeps under a name."""
        ending = f".{file_name(name)}" if name else ""
        return self.out / WEIGHTS / card.name / f"{file_name(row)}.{seed}{ending}.safetensors"

    def training_folder(self, card: Experiment, row: str, seed: int, digest: str) -> Path:
        """The folder of a cell's checkpoints, which another digest does not share."""
        return self.out / TRAININGS / card.name / f"{file_name(row)}.{seed}-{digest[:12]}"

    @property
    def caches(self) -> Path:
        """The folder of what cells compute for each other, such as features of images."""
        return self.out / CACHES

    def resuming(self) -> str:
        """The command that goes on with this run."""
        words = ["calibrant", "reproduce", self.paper, *(word for name in self.only for word in ("--only", name))]
        words += [word for name in self.domains for word in ("--domain", name)]
        words += ["--quick"] if self.quick else []
        words += ["--seeds", str(self.seeds)] if self.seeds else []
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--data-root", self.data_root] if self.data_root else []
        return shlex.join([*words, "--out", str(self.out), "--resume"])


def with_used(paper: str, cards: Sequence[Experiment]) -> list[Experiment]:
    """Experiments with those whose trained models they use, in the order in which they were registered."""
    names, waiting = set[str](), [card.name for card in cards]
    while waiting:
        name = waiting.pop()
        names.add(name)
        if used := experiment(paper, name).uses:
            waiting.append(used)
    return [card for card in list_experiments(paper) if card.name in names]


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
    kept = {"paper": plan.paper, "only": list(plan.only), "domains": list(plan.domains)}
    config = {
        REPRODUCTION: {**kept, "quick": plan.quick, "seeds": plan.seeds, "device": plan.device},
        "sha256": {},
        "versions": versions(),
    }
    write_config(plan.out, {"format": FORMAT, **config})


def check_names(plan: Plan) -> None:
    """Raise `RunError` for what is not there: a paper, an experiment, a domain; and for a number of seeds below one."""
    PAPERS[plan.paper]
    known = domains_of(plan.paper)
    for name in plan.domains:
        if not known:
            raise RunError(f"{plan.paper} has no domains: leave --domain out")
        if name not in known:
            raise RunError(f"unknown domain {name!r} of {plan.paper}; {names_to_offer(name, known)}")
    for name in plan.only:
        card = experiment(plan.paper, name)
        if not plan.asks_for(card):
            raise RunError(
                f"experiment {name!r} belongs to {_domain(card)}: leave --domain out, or name an experiment of "
                f"{' or '.join(plan.domains)}"
            )
    if plan.seeds is not None and plan.seeds < 1:
        raise RunError(f"--seeds {plan.seeds}: give the number of seeds, 1 or more")


def domains_of(paper: str) -> list[str]:
    """The domains of a paper's experiments, in the order in which they were registered."""
    return list(dict.fromkeys(card.domain for card in list_experiments(paper) if card.domain))


def _domain(card: Experiment) -> str:
    return f"the domain {card.domain}" if card.domain else "no domain"


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
    before = replace(plan, only=tuple(stored["only"]), domains=tuple(stored.get("domains", ())))
    return replace(_both(before, plan), seeds=plan.seeds or stored["seeds"])


def _both(before: Plan, now: Plan) -> Plan:
    """The plan of a resumed run, which has the experiments that it had before and those that are asked for now."""
    if not (before.only or before.domains) or not (now.only or now.domains):
        return before
    if before.domains == now.domains:
        return replace(now, only=tuple(dict.fromkeys((*before.only, *now.only))) if before.only and now.only else ())
    if not (before.only or now.only):
        return replace(now, domains=tuple(dict.fromkeys((*before.domains, *now.domains))))
    cards = [card for card in list_experiments(now.paper) if before.asks_for(card) or now.asks_for(card)]
    return replace(now, only=tuple(card.name for card in cards), domains=())


def clear(folder: Path) -> None:
    """Delete what `calibrant reproduce` wrote into a run folder, and nothing else.

    Raises:
        RunError: for a link in the place of a folder inside it.
    """
    inside = [folder / part for part in (CELLS, WEIGHTS, TRAININGS, CACHES)]
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
