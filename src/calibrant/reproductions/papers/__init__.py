"""Registered papers: every file here registers one with its experiments; a new paper is one new file."""

from calibrant.registries import import_all

import_all(__name__, __path__)
