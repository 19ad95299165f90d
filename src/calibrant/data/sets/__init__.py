"""Registered data sets: every file here registers its own; a new data set is one new file."""

from calibrant.registries import import_all

import_all(__name__, __path__)
