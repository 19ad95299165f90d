"""Where pages with code are executed, and when anew.

Their working folder is docs/_build/work/DIGEST, where DIGEST is that of the package's code, so that the numbers on a
page are those of the code that it describes. Pages that read `runs/demo` share one quick run of the demonstration.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import calibrant

if TYPE_CHECKING:  # tests use what is here without Sphinx
    from sphinx.application import Sphinx
    from sphinx.config import Config

DEMO = "runs/demo"
LIMIT = 90  # processor seconds of a page: 60 where it is written, and half as much again on slower processors
KERNEL = """c.IPKernelApp.exec_lines = ["import os; os.chdir({folder!r})"]
c.IPKernelApp.log_level = "ERROR"
"""


def digest(package: Path) -> str:
    """Sixteen digits of the sha256 of a package's files."""
    files = (file for file in sorted(package.rglob("*")) if file.suffix in {".py", ".html", ".css"})
    whole = hashlib.sha256()
    for file in files:
        whole.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def prepare(app: Sphinx, config: Config) -> None:
    """Make the folder of this code, drop those of other code, and let every kernel start there."""
    source = Path(app.srcdir)
    work = source / "_build" / "work"
    package = Path(calibrant.__file__).parent
    here = work / digest(package)
    for old in work.iterdir() if work.is_dir() else ():
        if old != here:
            shutil.rmtree(old)
    profile = here / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text(KERNEL.format(folder=str(here)), encoding="utf-8")
    os.environ["IPYTHONDIR"] = str(here / "ipython")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]).strip(
        os.pathsep
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.nb_execution_cache_path = str(here / "cache")
    if config.nb_execution_mode != "off" and reads_the_demo(source):
        run_demo(here)


def reads_the_demo(source: Path) -> bool:
    """Whether a page that is executed reads the demonstration."""
    pages = (page.read_text(encoding="utf-8") for page in source.glob("*.md"))
    return any(DEMO in page for page in pages if "file_format: mystnb" in page)


def run_demo(folder: Path) -> None:
    """The quick demonstration, once for this code."""
    if (folder / DEMO / "report.html").is_file():
        return
    print("running the quick demonstration, which pages share", flush=True)
    command = [sys.executable, "-m", "calibrant", "run", "--quick", "--overwrite", "--out", DEMO]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the demonstration failed:\n{done.stderr}")


class Clock:
    """Processor seconds of each page's kernel: told in the end, with a warning for a page that takes too long."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.spent: dict[str, float] = {}

    def start(self, app: Sphinx, name: str, source: list[str]) -> None:
        self.begun = _of_children()

    def stop(self, app: Sphinx, doctree: Any) -> None:
        if (spent := _of_children() - self.begun) > 0:
            self.spent[app.env.docname] = spent

    def tell(self, app: Sphinx, error: Exception | None) -> None:
        from sphinx.util import logging

        for name, spent in self.spent.items():
            print(f"{name}: executed in {spent:.0f} processor seconds")
            if spent > LIMIT:
                logging.getLogger(__name__).warning(
                    f"{name} takes {spent:.0f} processor seconds; at most {LIMIT} are allowed"
                )


def _of_children() -> float:
    """Processor seconds of the processes that this one has waited for."""
    return os.times().children_user + os.times().children_system


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", prepare, priority=100)  # before MyST-NB reads its settings
    clock = Clock()
    app.connect("source-read", clock.start)
    app.connect("doctree-read", clock.stop)
    app.connect("build-finished", clock.tell)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
