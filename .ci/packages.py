"""Whether wheel and source distribution in dist/ hold what they must: all that the repository has, and nothing else.

Run it in the repository after `python -m build`; `make package` does both.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "src/calibrant/"
OWN = ("PKG-INFO", "setup.cfg", "MANIFEST.in")  # what the build adds, or needs itself


def main() -> int:
    """Print what is missing, or too much; returns the exit code."""
    (wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
    known = set(subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines())
    known = {name for name in known if Path(name).is_file()} - {*OWN}
    package = {name.removeprefix("src/") for name in known if name.startswith(PACKAGE)}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    source = {name for name in names if name not in OWN and ".egg-info/" not in name}
    faults = [
        *(f"{wheel.name} lacks {name}" for name in sorted(package - held)),
        *(f"{wheel.name} has {name}, which the repository lacks" for name in sorted(held - package)),
        *(f"{sdist.name} lacks {name}" for name in sorted(known - source)),
        *(f"{sdist.name} has {name}, which the repository lacks" for name in sorted(source - known)),
    ]
    for fault in faults:
        print(fault)
    for file, held_files in ((wheel, held), (sdist, source)):
        print(f"{file}: {len(held_files)} files, {file.stat().st_size / 2**20:.1f} MiB")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
