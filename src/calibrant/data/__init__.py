"""Observations for programs: `Data`, registered data sets, and users' own files.

>>> import calibrant as cal
>>> data = cal.data.load("natural-patches")
>>> observed, covariates = data["train"].batch(slice(0, 64))
>>> observed["x"].shape
torch.Size([64, 1, 16, 16])
"""

import calibrant.data.sets  # noqa: F401  registers the data sets
from calibrant.calls import own_calls
from calibrant.data.dataset import Data, as_data
from calibrant.data.people import HumanLabels, human_labels, list_human_labels
from calibrant.data.registry import DataSet, data_root, list_data, load, register_data

__all__ = [
    "Data",
    "DataSet",
    "HumanLabels",
    "as_data",
    "data_root",
    "human_labels",
    "list_data",
    "list_human_labels",
    "load",
    "register_data",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
