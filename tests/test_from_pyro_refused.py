"""Ordinary Pyro models that are refused: the message says what to write, and what it says is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from pyro_scripts import dawid_skene, drawn, whole
from torch import nn

import calibrant as cal
from calibrant.errors import CalibrantError
from calibrant.program import Program, check_program

X, Y, TABLE = drawn(6), drawn(7)[1:], drawn(6, 3)


@dataclass
class Refused:
    """What is refused, the words of the refusal, and what follows them: a call of from_pyro."""

    before: Callable[[], Any]
    words: tuple[str, ...]
    after: tuple[Program, tuple[Any, ...]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


REFUSED: dict[str, Refused] = {}


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


# -- plates ------------------------------------------------------------------------------------------------------------


def loop(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"y_{i}", dist.Normal(slope * x[i], 1.0), obs=None if y is None else y[i])


REFUSED["a loop over the data"] = Refused(
    lambda: cal.from_pyro(loop, X, Y),
    ("'y_0'", "with pyro.plate('data', len(y)):", "one site with obs=y"),
    (line, (X, Y)),
)


def without_plate(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


REFUSED["no plate"] = Refused(
    lambda: cal.from_pyro(without_plate, X, Y),
    ("observed site 'y' lies in no plate", 'with pyro.plate("data", len(y)):'),
    (line, (X, Y)),
)
REFUSED["several plates"] = Refused(
    lambda: cal.from_pyro(dawid_skene, whole(4, 6)),
    ("['items', 'raters']", "plate='items'"),
    (dawid_skene, (whole(4, 6),)),
    {"plate": "items"},
)
REFUSED["an unknown plate"] = Refused(
    lambda: cal.from_pyro(line, X, Y, plate="rows"), ("no plate 'rows'", "it has ['data']"), (line, (X, Y))
)


class InPlate(PyroModule):
    """Random weights that are read in the plate, and before it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.weight = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x, y=None):
        mean = None if self.inside else self.weight * x
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.weight * x if mean is None else mean, 1.0), obs=y)


REFUSED["random weights in the plate"] = Refused(
    lambda: cal.from_pyro(InPlate(True), X, Y), ("PyroSample 'weight'", "before the plate"), (InPlate(False), (X, Y))
)

# -- data --------------------------------------------------------------------------------------------------------------


def mask_of_nan(y):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y.nan_to_num())


def mask_as_argument(seen, y=None):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(seen)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


GAPS = torch.where(torch.arange(6) == 2, torch.nan, Y)
REFUSED["a mask from the data"] = Refused(
    lambda: cal.from_pyro(mask_of_nan, GAPS),
    ("'y' is observed", "depends on it too", "a mask", "def model(seen, y=None)"),
    (mask_as_argument, (~GAPS.isnan(), GAPS)),
)


def autoregression(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("steps", dist.Normal(slope * y[:, :-1], 1.0).to_event(1), obs=y[:, 1:])


def autoregression_of(before, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(before)):
        pyro.sample("steps", dist.Normal(slope * before, 1.0).to_event(1), obs=y)


REFUSED["autoregression"] = Refused(
    lambda: cal.from_pyro(autoregression, TABLE),
    ("'y' is observed", "earlier values", "argument of its own"),
    (autoregression_of, (TABLE[:, :-1], TABLE[:, 1:])),
)


def of_outside_data(y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(slope * X, 1.0), obs=y)


REFUSED["a covariate from outside"] = Refused(
    lambda: cal.from_pyro(of_outside_data, Y),
    ("does not run for 3 of its 6 data", "is an argument of the model"),
    (line, (X, Y)),
)


def dependent(y=None, times=None):
    with pyro.plate("data", len(times)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.cumsum(0), 1.0), obs=y)


REFUSED["data that depend on each other"] = Refused(
    lambda: cal.from_pyro(dependent, Y, X), ("'y' has other densities", "on that datum and the shared latents alone")
)


def many(x, y=None):
    for i in range(len(x)):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


REFUSED["a site for each datum"] = Refused(
    lambda: cal.from_pyro(many, X, Y), ("'z_5'", "the same sites each time"), (line, (X, Y))
)

# -- arguments ---------------------------------------------------------------------------------------------------------

REFUSED["no arguments"] = Refused(
    lambda: cal.from_pyro(line), ("(x, y)", "svi.step or mcmc.run", "cal.from_pyro(model, x)"), (line, (X, Y))
)
REFUSED["too many arguments"] = Refused(lambda: cal.from_pyro(line, X, Y, X), ("(x, y)", "too many"), (line, (X, Y)))


def starred(*args):
    return line(*args)


REFUSED["*args"] = Refused(
    lambda: cal.from_pyro(starred, X, Y), ("takes *args", "def model(x, y=None)"), (line, (X, Y))
)


def of_a_dict(data):
    return line(data["x"], data["y"])


REFUSED["a dict of tensors"] = Refused(
    lambda: cal.from_pyro(of_a_dict, {"x": X, "y": Y}), ("'data' is a dict of tensors", "by name"), (line, (X, Y))
)
REFUSED["numpy"] = Refused(
    lambda: cal.from_pyro(line, X.numpy(), Y), ("'x' is an array of numpy", "torch.as_tensor(x)"), (line, (X, Y))
)
REFUSED["an unknown covariate"] = Refused(
    lambda: cal.from_pyro(line, X, Y, covariates=["z"]), ("'z' is no argument of the model", "['x', 'y']")
)


def line_beside(x, other, y=None):
    line(x, y)


REFUSED["a covariate of another length"] = Refused(
    lambda: cal.from_pyro(line_beside, X, torch.ones(2), Y, covariates=["x", "other"]),
    ("'other' has no dimension of size 6",),
    (line_beside, (X, torch.ones(2), Y)),
    {"covariates": ["x"]},
)
REFUSED["a model that fails"] = Refused(
    lambda: cal.from_pyro(line, X, Y[:4]), ("'y' has no density at its value", "svi.step"), (line, (X, Y))
)


# -- distributions, modules --------------------------------------------------------------------------------------------


def of_torch(y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", torch.distributions.Normal(torch.zeros(len(y)), 1.0), obs=y)


def of_pyro(y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(torch.zeros(len(y)), 1.0), obs=y)


REFUSED["a distribution of torch"] = Refused(
    lambda: cal.from_pyro(of_torch, Y), ("Normal of torch", "pyro.distributions.Normal"), (of_pyro, (Y,))
)


class Odd(dist.TorchDistribution):
    """A distribution that cannot be built again from its parameters."""

    arg_constraints: dict = {}
    support = dist.constraints.real

    def __init__(self, tensor):
        self._loc = tensor
        super().__init__(tensor.shape, torch.Size(), validate_args=False)

    def expand(self, shape, _instance=None):
        return Odd(self._loc.expand(shape))

    def sample(self, sample_shape=()):
        return torch.normal(self._loc.expand(*sample_shape, *self._loc.shape), 1.0)

    def log_prob(self, value):
        return -((value - self._loc) ** 2) / 2


def odd(y, left):
    data = pyro.plate("rows", len(y) if left else y.shape[1], dim=-2 if left else -1)
    rest = pyro.plate("rest", y.shape[1] if left else len(y), dim=-1 if left else -2)
    with data, rest:
        pyro.sample("y", Odd(torch.zeros(y.shape)), obs=y)


REFUSED["data to the right, of a distribution without parameters"] = Refused(
    lambda: cal.from_pyro(odd, TABLE.T, False, plate="rows"),
    ("'y' lie in batch dimension -1 of 2", "Odd cannot be rearranged", "dim=-2"),
    (odd, (TABLE, True)),
    {"plate": "rows"},
)


def scale_of_entries(y, weight):
    with pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", y.shape[1], dim=-1), poutine.scale(scale=weight):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


REFUSED["a scale within a datum"] = Refused(
    lambda: cal.from_pyro(scale_of_entries, TABLE, 1 + TABLE.abs(), plate="rows"),
    ("scale around site 'y' differs within a datum",),
    (scale_of_entries, (TABLE, 1 + TABLE[:, :1].abs())),
    {"plate": "rows"},
)

NETS = {"decoder": nn.Linear(2, 3)}


def from_a_dict(x):
    decoder = NETS["decoder"]
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = NETS["decoder"]

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


REFUSED["a module out of a dict"] = Refused(
    lambda: cal.from_pyro(from_a_dict, TABLE), ("['decoder']", "class Model(nn.Module)"), (Model().model, (TABLE,))
)


# -- what agrees with the model's own densities for some of the data alone ---------------------------------------------

SORTED = torch.linspace(-1.0, 2.0, 21)  # the first and last are the extremes, the middle one is the mean
OTHERS = ("other densities for some of the data", "is an argument of the model")


def centred(x, y=None):
    line(x - x.mean(), y)


def scaled(x, y=None):
    line((x - x.min()) / (x.max() - x.min()), y)


def weakly_coupled(x, y=None):
    line(x + 0.02 * x.mean(), y)


for coupled in (centred, scaled):
    REFUSED[f"{coupled.__name__} covariates, sorted"] = Refused(
        lambda model=coupled: cal.from_pyro(model, SORTED, drawn(21)),
        OTHERS,
        (line, (SORTED - SORTED.mean(), drawn(21))),
    )
REFUSED["a weak coupling, far from the prior"] = Refused(
    lambda: cal.from_pyro(weakly_coupled, drawn(50), 100 + drawn(50)), OTHERS
)


# -- missing values ----------------------------------------------------------------------------------------------------


def seen_as_argument(x, seen, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y, obs_mask=seen)


REFUSED["missing values without a mask"] = Refused(
    lambda: cal.from_pyro(line, X, GAPS), ("'y'", "obs_mask=seen"), (seen_as_argument, (X, ~GAPS.isnan(), GAPS))
)
REFUSED["missing values without a mask, in new data"] = Refused(
    lambda: cal.from_pyro(line, X, Y).data(X, GAPS),
    ("'y'", "obs_mask=seen"),
    (seen_as_argument, (X, ~GAPS.isnan(), GAPS)),
)
REFUSED["a mask made of new data"] = Refused(
    lambda: cal.from_pyro(mask_of_nan, Y).data(GAPS), ("'y'", "a mask"), (mask_as_argument, (~GAPS.isnan(), GAPS))
)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    with pytest.raises(CalibrantError) as caught:
        case.before()
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in case.words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


FOLLOWED = {name: case for name, case in REFUSED.items() if case.after is not None}


@pytest.mark.parametrize("case", FOLLOWED.values(), ids=FOLLOWED)
def test_what_it_says_is_taken(case):
    model, args = case.after
    program = cal.from_pyro(model, *args, **case.options)
    check_program(program, *program.data(*args).tensors())
