"""Matching the keys of the data with the sites and covariates of the program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.data.dataset import Data
from calibrant.errors import DataError, ProgramError
from calibrant.program.contract import Program, as_program, covariate_names
from calibrant.program.environment import defaults, seeded
from calibrant.program.latents import sites
from calibrant.program.running import running
from calibrant.program.tracing import is_local, sampled, trace


def match_sites(
    model: Program, splits: dict[str, Data], given: Mapping[str, str]
) -> tuple[dict[str, Data], dict[str, str], list[str]]:
    """The splits with the keys that the program takes, the mapping from its names to the data's keys, and notes."""
    train = splits["train"]
    shapes = _site_shapes(model, train, given)
    keys, covariates = train.keys(), covariate_names(model)
    notes = list(train.notes)
    if given:
        wanted = {name: name for name in covariates if name in keys} | dict(given)
        if unknown := [name for name in given if name not in shapes and name not in covariates]:
            raise DataError(f"--site: the model has no {', '.join(unknown)}; {_names(shapes, covariates, keys)}")
    else:
        wanted = {key: key for key in keys if key in shapes or key in covariates}
        if _labels_by_another_name(train, wanted, shapes):
            del wanted["y"]
        if not set(wanted) & set(shapes) and (name := _only_observed(model, train, shapes, wanted)):
            wanted[name] = "x"
            notes.append(f"the model's observed site is {name}: it gets the data's x")
        left = [key for key in keys if key not in wanted.values() and key != "y"]
        if left or not set(wanted) & set(shapes):
            raise DataError(
                f"the model has no place for {', '.join(left or keys)}; {_names(shapes, covariates, keys)}: say which "
                f"key belongs to which site, --site NAME=KEY{_example(shapes, keys)}; all other keys are then ignored"
            )
    return {split: part.select(wanted) for split, part in splits.items()}, wanted, notes


def _example(shapes: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    same = [name for name in shapes if name in keys]
    return f" (such as --site {same[0]}={same[0]})" if same else ""


def _names(shapes: Mapping[str, Any], covariates: tuple[str, ...], keys: tuple[str, ...]) -> str:
    taken = f" and takes the covariates {', '.join(covariates)}" if covariates else ""
    return f"it samples {', '.join(shapes)}{taken}; the data have {', '.join(keys)}"


def _site_shapes(model: Program, data: Data, given: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Event shapes of the local sites that the program samples."""
    wanted = {name: given.get(name, name) for name in covariate_names(model)}
    rows = {k: v for part in data.batch([0, 0]) for k, v in part.items()}
    covariates = {name: rows[key] for name, key in wanted.items() if key in rows}
    program = as_program(model)
    try:
        with torch.no_grad(), seeded(0), defaults(program, covariates), running("it does not run for 2 data"):
            found = sampled(trace(program, 2, covariates))
    except ProgramError as error:
        if set(wanted) <= set(covariates):
            raise
        raise DataError(
            f"the model takes the covariates {', '.join(wanted)}, the data have {', '.join(data.keys())}: "
            "--site NAME=KEY"
        ) from error
    local = {name: tuple(site["value"].shape[1:]) for name, site in found.items() if is_local(site)}
    if not local:
        raise ProgramError(
            f"the model samples {', '.join(found) or 'nothing'} outside the data plate: put local latents and "
            'observations in pyro.plate("data", size)'
        )
    return local


def _labels_by_another_name(data: Data, wanted: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the key `y` holds the labels of an image set, and only happens to share its name with a site."""
    if "y" not in wanted or "y" not in shapes:
        return False
    rows = {k: v for part in data.batch([0]) for k, v in part.items()}
    return tuple(rows["y"].shape[1:]) != shapes["y"]


def _only_observed(
    model: Program, data: Data, shapes: Mapping[str, tuple[int, ...]], covariates: Mapping[str, str]
) -> str | None:
    """The only site with the event shape of `x`, if it is the only site without children; else None."""
    rows = {k: v for part in data.batch([0]) for k, v in part.items()}
    found = [name for name, shape in shapes.items() if "x" in rows and shape == tuple(rows["x"].shape[1:])]
    if len(found) != 1:
        return None
    latent = sites(model, {found[0]: rows["x"]}, {name: rows[key] for name, key in covariates.items()})
    return found[0] if all(site.children for site in latent.values()) else None
