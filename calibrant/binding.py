"""Which of the given keys are observations and which covariates: the program decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calibrant.data import Data, as_data
from calibrant.program import Program, covariate_names


def bind(model: Program, observed: Mapping[str, Any] | Data, covariates: Mapping[str, Any] | None = None) -> Data:
    """The data as the program takes them: keys that its `forward` names are covariates, the others observations.

    Raises:
        DataError: for data that are no dict of arrays or `Data`, or whose lengths differ.
    """
    data = as_data(observed, covariates)
    names = covariate_names(model)
    return data.split_keys([key for key in (*data.observed_names, *data.covariate_names) if key not in names], names)
