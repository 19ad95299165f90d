"""The rows of a benchmark in a JSON file, with what they were measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def keep(file: Path, rows: Iterable[Any], **settings: Any) -> None:
    """Write rows, which are instances of a dataclass, with `settings` and a line about the machine."""
    machine = (
        f"PyTorch {torch.__version__}, {platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine, **settings, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
