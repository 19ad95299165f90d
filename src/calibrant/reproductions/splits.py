"""The data of an experiment: which set is there, and its splits for a seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.registry import DATA_SETS, load
from calibrant.errors import DataError
from calibrant.reproductions.cards import Experiment, Needs

Splits = Mapping[str, Data]


class Source:
    """Where data come from; what was loaded for the last seed is kept.

    Args:
        root: folder of the files of registered sets, as for `calibrant.data.load`.
        download: whether to download a set that is missing.
        quick: whether the run is a quick one.
    """

    def __init__(self, root: str | Path | None, download: bool, quick: bool) -> None:
        self.root, self.download, self.quick = root, download, quick
        self._seed = -1
        self._kept: dict[str, Splits] = {}

    def chosen(self, needs: Needs) -> Needs | None:
        """What is there of a need: itself, its fallback, or nothing."""
        state = DATA_SETS[needs.name].state(self.root)
        if state == "ready" or (self.download and state == "to download"):
            return needs
        return None if needs.fallback is None else self.chosen(needs.fallback)

    def missing(self, card: Experiment) -> str:
        """A sentence about data of an experiment that are not there; empty if it can run."""
        for needs in card.needs:
            if self.chosen(needs) is None:
                how = "give --download" if DATA_SETS[needs.name].downloads else "put its files below the data root"
                return f"the data set {needs.name} is not there: {how} (`calibrant list data` shows where)"
        return ""

    def used(self, card: Experiment) -> dict[str, str]:
        """Name of each data set that the experiment asks for → name of the one that it gets."""
        found = {needs.label: self.chosen(needs) for needs in card.needs}
        return {name: needs.name for name, needs in found.items() if needs is not None}

    def options(self, card: Experiment) -> dict[str, Mapping[str, Any]]:
        """Name of each data set that the experiment asks for → options of the one that it gets."""
        found = {needs.label: self.chosen(needs) for needs in card.needs}
        return {name: needs.options_of(self.quick) for name, needs in found.items() if needs is not None}

    def data(self, card: Experiment, seed: int) -> dict[str, Splits]:
        """Name of each data set that the experiment asks for → its splits `train`, `validation` and `test`.

        Raises:
            DataError: for data that are not there, or cannot be read.
        """
        if reason := self.missing(card):
            raise DataError(f"experiment {card.name}: {reason}")
        if seed != self._seed:
            self._seed, self._kept = seed, {}
        found = ((needs.label, self.chosen(needs)) for needs in card.needs)
        return {name: self._splits(needs, seed) for name, needs in found if needs is not None}

    def _splits(self, needs: Needs, seed: int) -> Splits:
        key = repr(needs)
        if key not in self._kept:
            splits = load(needs.name, self.root, self.download, seed, **needs.options_of(self.quick))
            most = {**needs.most, **(needs.quick if self.quick else {})}
            self._kept[key] = {name: _part(part, needs.keys, most.get(name)) for name, part in splits.items()}
        return self._kept[key]


def _part(data: Data, keys: tuple[str, ...], count: int | None) -> Data:
    """Some keys of a split, and at most so many data, evenly spaced in it."""
    data = data.select(keys)
    if count is None or count >= len(data):
        return data
    return data[np.linspace(0, len(data) - 1, count).round().astype(int)]
