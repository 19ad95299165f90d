"""What connects cells: the contexts in which they run, and the trained weights that they keep for each other."""

from __future__ import annotations

from dataclasses import dataclass

from calibrant.errors import RunError, names_to_offer
from calibrant.program.contract import Program
from calibrant.progress import Progress, silent
from calibrant.reproductions.cells import read_cell
from calibrant.reproductions.context import Context
from calibrant.reproductions.folder import Plan
from calibrant.reproductions.jobs import Job
from calibrant.reproductions.kept import read_kept, set_kept, write_kept
from calibrant.reproductions.splits import Source


def context_of(plan: Plan, job: Job, source: Source, progress: Progress = silent) -> Context:
    """The context in which a cell runs."""
    card = job.card
    return Context(
        card=card,
        row=job.row,
        seed=job.seed,
        data=source.data(card, job.seed),
        used=source.used(card),
        settings=card.settings_of(plan.quick),
        quick=plan.quick,
        device=plan.device,
        folder=plan.training_folder(card, job.row, job.seed, job.digest),
        progress=progress,
        shelf=RunShelf(plan, job, source),
        caches=plan.caches,
    )


@dataclass(frozen=True)
class RunShelf:
    """The trained weights of a run, as one cell sees them.

    Attributes:
        plan: the run.
        job: the cell.
        source: where data come from.
    """

    plan: Plan
    job: Job
    source: Source

    def keep(self, name: str, model: Program, guide: Program) -> str:
        """Write the weights of a model and its guide, and return their sha256."""
        path = self.plan.weights_file(self.job.card, self.job.row, self.job.seed, name)
        return write_kept(path, self.job.digest, model, guide)

    def earlier(self, row: str) -> Context:
        """The context of a row of the experiment that the card uses, with the same seed."""
        return context_of(self.plan, self._used(row), self.source)

    def take(self, row: str, name: str, model: Program, guide: Program, device: str) -> None:
        """Load the weights that a row of the experiment that the card uses has kept.

        Raises:
            RunError: if the row failed or kept nothing, and for weights that are damaged or do not fit.
        """
        job = self._used(row)
        cell = read_cell(self.plan.cell_file(job.card, job.row, job.seed))
        if cell is None:
            raise RunError(f"the training {job} is damaged: --resume trains again")
        if cell.failed:
            raise RunError(f"the training {job} failed ({cell.failed}): --resume tries it again")
        if name not in cell.kept:
            what = f"a model with the name {name!r}" if name else "a model"
            raise RunError(f"{job} has not kept {what}: call context.keep in the cells of {job.card.name}")
        weights = read_kept(self.plan.weights_file(job.card, job.row, job.seed, name), job.digest, cell.kept[name])
        if weights is None:
            raise RunError(f"the weights of the training {job} are missing or damaged: --resume trains again")
        set_kept(model, guide, weights, device)

    def _used(self, row: str) -> Job:
        """The cell of a row of the experiment that the card uses."""
        card, used = self.job.card, {job.row: job for job in self.job.uses}
        if not card.uses:
            raise RunError(f"experiment {card.name!r} names no experiment that trains: give uses= on its card")
        if row not in used:
            raise RunError(f"{card.uses} has no row {row!r} in this run; {names_to_offer(row, used)}")
        return used[row]
