"""The split of data into observations and covariates, by the arguments of the program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.data.dataset import Data, as_data
from calibrant.errors import DataError
from calibrant.program.contract import Program, as_program, check_not_arguments, covariate_names


def bind(model: Program, observed: Mapping[str, Any] | Data, covariates: Mapping[str, Any] | None = None) -> Data:
    """Split data into covariates, which are the keys that the program takes as arguments, and observations.

    Args:
        model: the program.
        observed: site → array, or a `Data`.
        covariates: keyword → array.

    Raises:
        DataError: for data that are neither a dict of arrays nor a `Data`, or whose lengths differ.
        ProgramError: for a program that takes all observations as arguments.
    """
    data = as_data(observed, covariates)
    names = covariate_names(model)
    if set(data.observed_names) <= set(names):
        check_not_arguments(as_program(model), data.observed_names, data.covariate_names)
    return data.split_keys([key for key in (*data.observed_names, *data.covariate_names) if key not in names], names)


def bind_fixed(model: Program, observed: Mapping[str, Any] | Data, covariates: Mapping[str, Any] | None = None) -> Data:
    """Split data as `bind` does, and refuse data whose values are not fixed, which have no single posterior.

    Raises:
        DataError: for the reasons of `bind`, and for a transform that is random or that mixes data.
    """
    data = bind(model, observed, covariates)
    if data.transform is None:
        return data
    alone, together = ({**rows, **cols} for rows, cols in (data.batch([0]), data.batch(range(min(len(data), 4)))))
    if changed := [n for n, v in alone.items() if not torch.allclose(v[0].double(), together[n][0].double())]:
        raise DataError(
            f"the transform of {changed[0]!r} is random, or depends on other data of the batch: a posterior needs "
            "fixed data, so draw the noise once, and take statistics from the whole data set"
        )
    return data
