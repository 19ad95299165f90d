"""The Frey faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Size
from calibrant.data.registry import register_data
from calibrant.data.splits import SPLITS
from calibrant.errors import DataError
from calibrant.registries import Case

FILE, FRAMES, SHAPE = "frey_rawface.mat", 1965, (28, 20)
CHAPTERS = 5


@register_data(
    "frey-face",
    description="1,965 frames of a video of one face, 28×20, grey",
    source="B. Frey; Roweis & Saul 2000, Science 290, 2323–2326",
    licence="none stated; on S. Roweis's page of data for research",
    folder="frey-face",
    keys={"x": ((1, *SHAPE), "float32")},
    cases=(
        Case({"size": [14, 10], "values": "dequantised"}, {"x": (1, 14, 10)}),
        Case({"values": "binarised"}, {"x": (1, *SHAPE)}),
    ),
)
def frey_face(root: Path, download: bool, size: Size = None, values: str = "unit", seed: int = 0) -> dict[str, Data]:
    """The Frey faces, `x` (1, 28, 20), from frey_rawface.mat; 1,575 / 195 / 195 frames.

    Neighbouring frames of a video are nearly equal, so that a random split would test on copies of training data (root
    mean square difference of a test frame to the nearest training frame: .043 at random, .055 here). The video is
    divided into five chapters; the first 80% of each are for training, then 10% for validation and 10% for the test.
    The split has no seed.

    Raises:
        DataError: for a missing file, or a file that holds anything else.
    """
    images = Images("frey-face", size, values, seed)
    data = images.data(_frames(root / "frey-face" / FILE)[:, None])
    place = np.arange(FRAMES) % (FRAMES // CHAPTERS) / (FRAMES // CHAPTERS)
    part = np.digitize(place, [0.8, 0.9])
    return {split: data[part == number] for number, split in enumerate(SPLITS)}


def _frames(path: Path) -> np.ndarray:
    """The frames in the order of the video, 8-bit, `(frames, height, width)`."""
    from scipy.io import loadmat

    if not path.is_file():
        raise DataError(
            f"frey-face: there is no {FILE} in {path.parent}, and no automatic download: put the file from "
            "https://cs.nyu.edu/~roweis/data.html there, or give the folder above (root=, --data-root, CALIBRANT_DATA)"
        )
    try:
        faces = loadmat(path, variable_names=["ff"])["ff"]
    except Exception as error:  # a damaged file raises errors of any kind
        raise DataError(f"{path} cannot be read as the Frey faces: copy the file again") from error
    if faces.shape != (SHAPE[0] * SHAPE[1], FRAMES) or faces.dtype != np.uint8:
        raise DataError(f"{path} holds an array {faces.shape} of {faces.dtype}, not the 1,965 faces: copy it again")
    return faces.T.reshape(FRAMES, *SHAPE)
