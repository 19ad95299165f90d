"""Likelihoods: every file here registers its own; a new likelihood is one new file."""

from calibrant.registries import import_all

import_all(__name__, __path__)
