"""`results.json`: the tables of a run, with everything that is needed to tell how its numbers came about."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from calibrant.errors import RunError
from calibrant.folders.configuration import finite, versions
from calibrant.folders.files import digest_of_file, new_file
from calibrant.folders.records import check_unchanged, record
from calibrant.reproductions.claims import claims_of
from calibrant.reproductions.folder import REPORT, RESULTS, Plan
from calibrant.reproductions.found import Found, Summary, judged, table
from calibrant.reproductions.page import beside_paper, claim_lines, on_training, wide, write_page
from calibrant.reproductions.registering import PAPERS

SCHEMA, VERSION = "calibrant-reproduction", 1


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        folder: the run folder.
        content: the content of `results.json`.
    """

    folder: Path
    content: Mapping[str, Any] = field(repr=False)

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.folder / REPORT

    @property
    def experiments(self) -> list[str]:
        """Names of the experiments that were run."""
        return [name for name, part in self.content["experiments"].items() if not part["left_out"]]

    def table(self, experiment: str) -> list[dict[str, Any]]:
        """The rows of an experiment: one for each row and number, with the paper's value, ours and its error.

        Raises:
            RunError: for an experiment that was not run.
        """
        if experiment not in self.experiments:
            raise RunError(f"experiment {experiment!r} was not run here; there are {', '.join(self.experiments)}")
        return [dict(row) for row in self.content["experiments"][experiment]["rows"]]

    def lines(self, experiment: str) -> list[list[str]]:
        """The table of an experiment as people read it: the heading, then a line for each row.

        Raises:
            RunError: for an experiment that was not run.
        """
        self.table(experiment)
        return wide(self.content["experiments"][experiment])

    def sentences(self, experiment: str) -> list[str]:
        """What an experiment found, in sentences."""
        self.table(experiment)
        part = self.content["experiments"][experiment]
        beside = [sentence for _, sentence in beside_paper(part)]
        return [
            *part["sentences"],
            *(ordering["sentence"] for ordering in part["orderings"]),
            *beside,
            *on_training(part),
        ]

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The paper's claims, each with the answers of the exact posterior and of the guide (`claims_of`)."""
        return [dict(claim) for claim in self.content.get("claims", [])]

    @property
    def claim_lines(self) -> list[list[str]]:
        """The claims as people read them: the heading, then a line for each; empty if there are none."""
        return claim_lines(self.claims)

    @property
    def failed(self) -> list[str]:
        """A line for every cell that failed: experiment, row, seed and reason."""
        lines = (
            f"{name}, {row['row']}, seed {seed}: {reason}"
            for name in self.experiments
            for row in self.table(name)
            for seed, reason in row["failed"].items()
        )
        return list(dict.fromkeys(lines))


def write_results(
    plan: Plan, found: Sequence[Found], left_out: Mapping[str, str], config_sha256: str, command: str
) -> Results:
    """Write `results.json` and the report of finished cells.

    Args:
        plan: the run.
        found: the cells of every experiment.
        left_out: experiment → why it was not run.
        config_sha256: sha256 of settings, cards' facts, data and code.
        command: command line that the report shows.
    """
    summaries = [summarised(part) for part in found]
    experiments = {part.card.name: _experiment(part, summary) for part, summary in zip(found, summaries, strict=True)}
    experiments |= {name: {"left_out": reason} for name, reason in left_out.items()}
    content = {
        "schema": SCHEMA,
        "version": VERSION,
        "paper": asdict(PAPERS[plan.paper]),
        "quick": plan.quick,
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "config_sha256": config_sha256,
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "claims": [claim for part in found for claim in claims_of(part)],
        "experiments": experiments,
    }
    results = Results(plan.out, finite(content))
    with new_file(plan.out / RESULTS) as new:
        new.write_text(json.dumps(results.content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        record(plan.out / RESULTS, digest_of_file(new))
    pictures = {part.card.name: summary.pictures for part, summary in zip(found, summaries, strict=True)}
    write_page(results.report, results.content, pictures, command)
    return results


def summarised(found: Found) -> Summary:
    """Sentences and pictures of an experiment; if its function fails, a sentence that says so."""
    if found.card.summarise is None:
        return Summary()
    try:
        return found.card.summarise(found)
    except Exception as error:
        failed = [f"{row}, seed {seed}" for (row, seed), cell in found.cells.items() if cell.failed]
        after = f" (these cells failed: {'; '.join(failed)})" if failed else ""
        return Summary([f"There are no sentences or pictures: {type(error).__name__}: {error}{after}."])


def _experiment(found: Found, summary: Summary) -> dict[str, Any]:
    card = found.card
    return {
        "answers": card.answers,
        "shows": card.shows,
        "reduced": card.reduced_quick if found.quick else card.reduced,
        "settings": card.settings_of(found.quick),
        "data": {needs.name: found.used[needs.label] for needs in found.card.needs if needs.label in found.used},
        "numbers": dict(card.numbers),
        "seeds": list(found.seeds),
        "rows": table(found, summary),
        "orderings": [judged(found, ordering) for ordering in card.orderings],
        "domain": card.domain,
        "sentences": list(summary.sentences),
        "left_out": "",
    }


def load_results(folder: str | Path) -> Results:
    """Load the results of a run folder, or of a copy of its `results.json`.

    Raises:
        RunError: for a file that is missing or damaged, or has another schema.
    """
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise RunError(f"there is no {path}: calibrant reproduce writes it at the end of a run")
    check_unchanged(path, "run the command again with --resume, which writes it anew")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(content, dict) or (content.get("schema"), content.get("version")) != (SCHEMA, VERSION):
        raise RunError(f"{path} is no {SCHEMA} of version {VERSION}: write it anew with this version of calibrant")
    return Results(path.parent, content)
