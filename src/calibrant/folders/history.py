"""`history.csv`: ELBO and learning rate of every epoch of a training."""

from __future__ import annotations

import csv
from pathlib import Path

from calibrant.errors import RunError
from calibrant.folders.files import new_file

HISTORY = "history.csv"


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    with new_file(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0] if history else ["epoch", "train", "validation", "lr"])
        writer.writeheader()
        writer.writerows(history)


def load_history(run_dir: str | Path) -> list[dict[str, float]]:
    """Read the rows of `history.csv`, one per epoch; an empty list if there is no such file.

    Raises:
        RunError: for a file that cannot be read.
    """
    path = Path(run_dir) / HISTORY
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {key: int(v) if key == "epoch" else float(v) for key, v in row.items()} for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it to continue without the history") from error
