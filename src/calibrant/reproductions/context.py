"""What a cell's function gets: data, settings, random streams, and a training that can be stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from calibrant.binding import bind
from calibrant.data.dataset import Data
from calibrant.errors import RunError
from calibrant.inference.fitting.checkpoints import CHECKPOINTS, has_checkpoint
from calibrant.inference.fitting.lengths import INTERRUPTED
from calibrant.inference.fitting.loop import fit
from calibrant.inference.fitting.objectives import elbo_terms
from calibrant.inference.fitting.state import Fit, Modules
from calibrant.program.contract import Program, as_program
from calibrant.program.environment import defaults, seeded
from calibrant.progress import Progress, silent
from calibrant.reproductions.cards import Experiment, Needs, file_name
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.splits import Splits
from calibrant.streams import stream

_ROWS = 4096  # data that are evaluated at a time
Builder = Callable[["Context"], tuple[Program, Program]]


class Shelf(Protocol):
    """The trained weights of a run, as one cell sees them."""

    def keep(self, name: str, model: Program, guide: Program) -> str:
        """Write the weights of a model and its guide, and return their sha256."""

    def earlier(self, row: str) -> Context:
        """The context of a row of the experiment that the card uses, with the same seed."""

    def take(self, row: str, name: str, model: Program, guide: Program, device: str) -> None:
        """Load the weights that a row of the experiment that the card uses has kept."""


@dataclass(frozen=True)
class Context:
    """What a cell may use, and all that it may depend on.

    Attributes:
        card: the experiment.
        row: the row; `arguments` are those of the row on the card.
        seed: the seed. Rows with the same seed have the same data and the same random streams.
        data: name of each data set that the card asks for → its splits `train`, `validation` and `test`.
        used: the same names → name of the set that they got, which differs where a fallback is used.
        settings: the card's settings, with the changes of a quick run.
        quick: whether the run is a quick one.
        device: device of trainings.
        folder: folder of the cell's checkpoints.
        progress: called with (stage, done, total, text).
        shelf: where the cell keeps trained weights, and takes those of cells of the experiment that its card uses; None
            outside a run, where nothing is kept.
        trained: the trainings so far: name → number of steps, and why it ended.
        kept: the trained weights that were kept so far: name → sha256.
        caches: folder of the run for files that several cells use, such as features of images, each of which says by a
            digest what it is of; None outside a run.
    """

    card: Experiment
    row: str
    seed: int
    data: Mapping[str, Splits]
    used: Mapping[str, str]
    settings: Mapping[str, Any]
    quick: bool
    device: str
    folder: Path
    progress: Progress = silent
    shelf: Shelf | None = None
    trained: dict[str, tuple[int, str]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    caches: Path | None = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The row's arguments on the card."""
        return self.card.rows[self.row]

    @property
    def splits(self) -> Splits:
        """The splits of the first data set.

        Raises:
            RunError: for an experiment without data.
        """
        if not self.card.needs:
            raise RunError(f"experiment {self.card.name!r} has no data: name a data set in needs= on its card")
        return self.data[self.card.needs[0].label]

    def blocks(self, label: str | None = None) -> int | None:
        """Number of blocks of dependent test data (`Needs.blocks`) of a data set, by default of the first one."""
        needs = next(one for one in self.card.needs if label in (None, one.label))
        used: Needs | None = needs
        while used is not None and used.name != self.used[needs.label]:
            used = used.fallback
        return None if used is None else used.blocks

    def stream(self, *names: str | int) -> int:
        """The seed for one purpose: the same for all rows, so that their difference is not one of chance."""
        return stream(self.seed, "reproduce", self.card.paper, self.card.name, *names)

    def fit(
        self, model: Program, guide: Program, splits: Splits | None = None, name: str = "training", **options: Any
    ) -> Fit:
        """Train model and guide on the training data; the weights are chosen on the validation data.

        Test data take no part. A training that was stopped goes on where it was.

        Args:
            model: the program.
            guide: its guide.
            splits: splits with `train` and `validation`; None for those of the first data set.
            name: name of the training, one for each training of a cell.
            options: options of `calibrant.inference.fit`.
        """
        splits = self.splits if splits is None else splits
        folder, train = self.folder / file_name(name), splits["train"]
        found = fit(
            model,
            guide,
            train,
            validation=splits["validation"],
            device=self.device,
            run_dir=folder,
            resume=has_checkpoint(folder / CHECKPOINTS),
            progress=self.progress,
            **{"seed": self.stream("fit", name), **options},
        )
        if found.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        size = min(options.get("batch_size", 256), len(train))
        self.trained[name] = found.epochs * (len(train) // size), found.stopped
        return found

    def keep(self, model: Program, guide: Program, name: str = "") -> None:
        """Keep the weights of a trained model and its guide, for cells of experiments that use this one.

        Args:
            model: the program.
            guide: its guide.
            name: name of the two, if a cell keeps several.
        """
        if self.shelf is not None:
            self.kept[name] = self.shelf.keep(name, model, guide)

    def trained_by(self, row: str, build: Builder, name: str = "") -> tuple[Program, Program]:
        """The model and guide that a row of the experiment in `uses` has trained and kept, with the same seed.

        Args:
            row: row of the experiment that the card uses.
            build: function that makes model and guide, with any weights, from the context of that row: its card,
                settings, arguments and data.
            name: the name with which they were kept.

        Returns:
            The two, in `eval()`, on the device of the run.

        Raises:
            RunError: if the row is not there, failed, or kept nothing, and for weights that do not fit.
        """
        if self.shelf is None:
            raise RunError("there are no trained weights outside a run: call calibrant.reproductions.run")
        model, guide = build(self.shelf.earlier(row))
        self.shelf.take(row, name, model, guide, self.device)
        return model, guide

    def elbo(self, model: Program, guide: Program, data: Data | None = None, draws: int = 16) -> Measured:
        """The ELBO in nats per datum, with the standard error of its mean over the data.

        Args:
            model: the program, in `eval()` as `fit` leaves it.
            guide: its guide, without shared latents.
            data: the data; None for the test data of the first data set.
            draws: number of draws of the guide for each datum.
        """
        bound = bind(model, self.splits["test"] if data is None else data)
        modules = Modules(as_program(model), as_program(guide))
        total = torch.zeros(len(bound), dtype=torch.float64)
        with seeded(self.stream("elbo")), defaults(modules, bound.batch([0], modules.device)[0]):
            for index in torch.arange(len(bound), device="cpu").split(_ROWS):
                observed, covariates = bound.batch(index, modules.device)
                for _ in range(draws):
                    terms = elbo_terms(modules.model, modules.guide, observed, len(index), covariates)
                    total[index] += terms.local.double().cpu()
        return Measured.of(total / draws)
