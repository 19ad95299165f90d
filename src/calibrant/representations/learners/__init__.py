"""Methods that learn a representation with an uncertainty: every file here registers its methods."""

from calibrant.registries import import_all

import_all(__name__, __path__)
