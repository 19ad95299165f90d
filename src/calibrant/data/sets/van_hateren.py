"""Whitened patches of the van Hateren images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.photographs import cut_patches, patch_data, plan_patches
from calibrant.data.registry import register_data
from calibrant.errors import DataError
from calibrant.registries import Case

VAN_HATEREN_SHAPE = (1024, 1536)


@register_data(
    "van-hateren",
    description="36,000 whitened 16×16 patches of van Hateren's calibrated outdoor images, from their .iml files",
    source="van Hateren & van der Schaaf 1998, Proc. R. Soc. B 265, 359–366",
    licence="free for scientific, non-commercial use, with citation",
    folder="van-hateren",
    keys={"x": ((1, 16, 16), "float32")},
    cases=(Case({"size": 12}, {"x": (1, 12, 12)}),),
)
def van_hateren(root: Path, download: bool, size: int = 16, seed: int = 0) -> dict[str, Data]:
    """Whitened patches of log intensity from every ROOT/van-hateren/imk*.iml; otherwise like `natural_patches`.

    Raises:
        DataError: for a missing folder, a file of another length, or a size that the images are too small for.
    """
    folder = root / "van-hateren"
    files = sorted(folder.glob("imk*.iml"))
    if not files:
        raise DataError(
            f"van-hateren: there is no imk*.iml in {folder}, and no automatic download: put van Hateren's images "
            "there, or give the folder above them (root=, --data-root, CALIBRANT_DATA)"
        )
    plan = plan_patches([VAN_HATEREN_SHAPE] * len(files), size, seed)
    patches = cut_patches(map(_log_intensity, files), plan, size)
    return patch_data("van-hateren", [file.stem for file in files], patches, plan)


def _log_intensity(path: Path) -> np.ndarray:
    """Log of the linear intensity in an .iml file (big-endian 16-bit integers); 1 is added for the few zeros."""
    raw = path.read_bytes()
    height, width = VAN_HATEREN_SHAPE
    if len(raw) != 2 * height * width:
        raise DataError(f"{path} has {len(raw)} bytes, not the {2 * height * width} of an .iml image: copy it again")
    return np.log1p(np.frombuffer(raw, ">u2").reshape(height, width).astype(np.float64))
