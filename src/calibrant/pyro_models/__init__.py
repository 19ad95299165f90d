"""Ordinary Pyro models as programs: `from_pyro` takes a model with `obs=` arguments and plates of any name as it is."""

from calibrant.calls import own_calls
from calibrant.pyro_models.adapting import PyroProgram, from_pyro

__all__ = ["PyroProgram", "from_pyro"]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
