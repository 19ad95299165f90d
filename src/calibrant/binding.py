"""The split of data into observations and covariates, by the arguments of the program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from calibrant.data.dataset import Data, as_data
from calibrant.errors import DataError, ProgramError
from calibrant.program.contract import Program, as_program, check_not_arguments, covariate_names
from calibrant.program.environment import defaults, seeded
from calibrant.program.running import running
from calibrant.program.tracing import is_local, sampled, trace

_READ_AGAIN = 8  # items of a Dataset that are read twice


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
    data = _without_labels(model, data, names)
    if set(data.observed_names) <= set(names):
        check_not_arguments(as_program(model), data.observed_names, data.covariate_names)
    return data.split_keys([key for key in (*data.observed_names, *data.covariate_names) if key not in names], names)


def _without_labels(model: Program, data: Data, names: Collection[str]) -> Data:
    """The data without the labels of a labelled data set, unless the program takes them or samples such values."""
    labels = [name for name in data.optional if name not in names]
    if not labels:
        return data
    rows, given = data.batch([0])
    program, covariates = as_program(model), {name: value for name, value in {**rows, **given}.items() if name in names}
    try:
        with torch.no_grad(), seeded(0), defaults(program, covariates), running("it does not run for one datum"):
            found = sampled(trace(program, 1, covariates))
    except ProgramError:  # `check_program` says what is wrong
        return data
    shapes = {name: tuple(site["value"].shape[1:]) for name, site in found.items() if is_local(site)}
    unused = [name for name in labels if shapes.get(name) != tuple(rows[name].shape[1:])]
    kept = [name for name in (*data.observed_names, *data.covariate_names) if name not in unused]
    return data.select(kept) if unused else data


def bind_fixed(model: Program, observed: Mapping[str, Any] | Data, covariates: Mapping[str, Any] | None = None) -> Data:
    """Split data as `bind` does, and refuse data whose values are not fixed, which have no single posterior.

    Raises:
        DataError: for the reasons of `bind`, and for a transform that is random or that mixes data.
    """
    data = bind(model, observed, covariates)
    if not data.is_stored:
        _refuse_random_items(data)
    if data.transform is None:
        return data
    alone, together = ({**rows, **cols} for rows, cols in (data.batch([0]), data.batch(range(min(len(data), 4)))))
    if changed := [n for n, v in alone.items() if not torch.allclose(v[0].double(), together[n][0].double())]:
        raise DataError(
            f"the transform of {changed[0]!r} is random, or depends on other data of the batch: a posterior needs "
            "fixed data, so draw the noise once, and take statistics from the whole data set"
        )
    return data


def _refuse_random_items(data: Data) -> None:
    """Refuse a Dataset whose items change when they are read again, such as randomly cropped images.

    Raises:
        DataError: naming the key.
    """
    rows = range(min(len(data), _READ_AGAIN))
    first, again = ({**observed, **covariates} for observed, covariates in (data.batch(rows), data.batch(rows)))
    if changed := [name for name, value in first.items() if not torch.equal(value, again[name])]:
        raise DataError(
            f"{changed[0]!r} changes when an item of the Dataset is read again: a posterior needs fixed data, so leave "
            "out random transforms, or read the items once into a tensor"
        )
