"""Which of the given keys are observations and which covariates: the program decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.data.dataset import Data, as_data
from calibrant.errors import DataError
from calibrant.program.contract import Program, covariate_names


def bind(model: Program, observed: Mapping[str, Any] | Data, covariates: Mapping[str, Any] | None = None) -> Data:
    """The data as the program takes them: keys that its `forward` names are covariates, the others observations.

    Raises:
        DataError: for data that are no dict of arrays or `Data`, or whose lengths differ.
    """
    data = as_data(observed, covariates)
    names = covariate_names(model)
    return data.split_keys([key for key in (*data.observed_names, *data.covariate_names) if key not in names], names)


def bind_fixed(model: Program, observed: Mapping[str, Any] | Data, covariates: Mapping[str, Any] | None = None) -> Data:
    """As `bind`, for posteriors: a datum must be the same whenever, and beside whichever others, it is looked at.

    Raises:
        DataError: as `bind`, and for a transform that is random or that mixes data.
    """
    data = bind(model, observed, covariates)
    if data.transform is None:
        return data
    alone, together = ({**rows, **cols} for rows, cols in (data.batch([0]), data.batch(range(min(len(data), 4)))))
    if changed := [n for n, v in alone.items() if not torch.allclose(v[0].double(), together[n][0].double())]:
        raise DataError(
            f"the transform gives another {changed[0]!r} each time, or beside other data: a posterior is of fixed "
            "data, so draw its noise once, and take its statistics from the whole data set"
        )
    return data
