"""Writes what README and docs show of the demonstration, from a run folder: `python docs/make_demo.py runs/demo`.

- docs/demo.json: the verdicts and the conclusion of every member, and how the run was made
- docs/demo.png: the first screen of its report, photographed by Chromium if that is installed
- docs/contrast.png: its contrast curves
- the story's sentences in README.md and docs/start-here.md, between `<!-- story -->` and `<!-- end -->`
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrant import store
from calibrant.evaluation.checking import judged
from calibrant.evaluation.judgements.conclusion import Conclusion
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.remedying.next_steps import concluded
from calibrant.evaluation.reporting.contrast_plots import contrast_figure
from calibrant.evaluation.results import RunResult
from calibrant.workflow.telling import sentence

ROOT = Path(__file__).parents[1]
STORED = ROOT / "docs" / "demo.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "start-here.md")
PLACE = re.compile(r"(<!-- story -->\n).*?(<!-- end -->)", re.DOTALL)
SIZE = (1280, 860)  # of the first screen, in pixels


def load(folder: Path) -> list[RunResult]:
    """The results of all members of a run."""
    return [store.load_result(member) for member in store.members(folder, store.read_any_config(folder))]


def content(results: list[RunResult]) -> dict[str, Any]:
    """What is stored of a run: settings, versions, verdicts, conclusions."""
    members = {}
    for result in results:
        found = judged(result)
        members[result.name] = {
            "conclusion": asdict(concluded(result, found)),
            "verdicts": [asdict(verdict) for verdict in found],
        }
    request = results[0].config["request"]
    made = {name: request[name] for name in ("data", "arguments", "asked", "quick")}
    return {"made": made, "versions": results[0].config["versions"], "members": members}


def story(stored: dict[str, Any]) -> list[str]:
    """The sentences that follow from stored verdicts."""
    members = stored["members"]
    return [
        sentence(name, [Verdict(**one) for one in of["verdicts"]], Conclusion(**of["conclusion"]), list(members))
        for name, of in members.items()
    ]


def text(page: Path, stored: dict[str, Any]) -> str:
    """A page with the story written anew."""
    told = "\n".join(f"{number}. {line}" for number, line in enumerate(story(stored), 1))
    return PLACE.sub(lambda found: f"{found[1]}\n{told}\n\n{found[2]}", page.read_text(encoding="utf-8"))


def photograph(report: Path, picture: Path) -> None:
    """Photograph the first screen of a report."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print(f"{picture} stays as it is: Chromium is not installed")
        return
    size = f"--window-size={SIZE[0]},{SIZE[1]}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={picture}", size]
    subprocess.run([browser, *options, report.resolve().as_uri()], check=True, capture_output=True)


def main(folder: Path) -> None:
    results = load(folder)
    STORED.write_text(json.dumps(content(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = {result.name: result.contrast for result in results if result.contrast is not None}
    contrast_figure(shown).savefig(ROOT / "docs" / "contrast.png", dpi=100)
    photograph(folder / store.REPORT, ROOT / "docs" / "demo.png")
    for page in PAGES:
        page.write_text(text(page, json.loads(STORED.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
