"""`history.csv`: ELBO and learning rate of every epoch of a training."""

from __future__ import annotations

import csv
from pathlib import Path

from calibrant.errors import RunError
from calibrant.folders.files import digest_of_file, new_file
from calibrant.folders.records import check_unchanged

HISTORY = "history.csv"
_COLUMNS = ("epoch", "train", "validation", "lr")


def write_history(path: Path, history: list[dict[str, float]]) -> str:
    """Write the history; returns the sha256 of the file."""
    with new_file(path) as new:
        with new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, history[0] if history else _COLUMNS)
            writer.writeheader()
            writer.writerows(history)
        return digest_of_file(new)


def load_history(run_dir: str | Path) -> list[dict[str, float]]:
    """Read the rows of `history.csv`, one per epoch; an empty list if there is no such file.

    Raises:
        RunError: for a file that cannot be read, or is not the one that was written.
    """
    path = Path(run_dir) / HISTORY
    if not path.is_file():
        return []
    remedy = "delete it to continue without the history"
    check_unchanged(path, remedy)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"it has no column {', '.join(missing)}")
            return [{key: int(v) if key == "epoch" else float(v) for key, v in row.items()} for row in reader]
    except (ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error}): {remedy}") from error
