"""Warnings point at the line of the user, however deep in the package they are raised."""

import warnings

import pyro
import pyro.distributions as dist

import calibrant as cal


def scaled(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(z, 1.0))


def inner() -> None:
    cal.program.sample_prior(scaled, 3)


def test_the_innermost_line_outside_the_package_is_told():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        inner()
    (one,) = [warning for warning in told if "ignore the scale" in str(warning.message)]
    first = inner.__code__.co_firstlineno
    assert (one.filename, one.lineno) == (__file__, first + 1)
