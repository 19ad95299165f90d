"""Data of many rows: what a training does with them besides its steps is done once, in parts, with the same results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import DataError
from calibrant.guides.many_draws import Encodings
from calibrant.inference import problem
from calibrant.inference.fitting.state import Modules, Plan, initial_state
from calibrant.program.contract import as_program

ROWS = problem._ROWS
SIZE = 2 * ROWS + 100  # two whole blocks and a smaller one
held_out = import_module("calibrant.inference.fitting.held_out")
loop = import_module("calibrant.inference.fitting.loop")

# -- supports ----------------------------------------------------------------------------------------------------------


def positive(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.LogNormal(z, 1.0))


def counts(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Binomial(5, logits=z))


def counts_of_given_totals(size: int, total: Tensor) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Binomial(total, logits=z))


def totals() -> Tensor:
    return torch.arange(SIZE) % 5 + 1.0


# program, covariates, data inside the support, a value outside it, and number of runs of the program
SUPPORTS: dict[str, tuple[Any, Callable[[], dict[str, Tensor]], Callable[[], Tensor], float, int]] = {
    "fixed": (positive, dict, lambda: torch.ones(SIZE), -1.0, 1),
    "of a parameter": (counts, dict, lambda: torch.full((SIZE,), 5.0), 6.0, 2),
    "of covariates": (counts_of_given_totals, lambda: {"total": totals()}, totals, 5.0, 3),
}


@pytest.mark.parametrize("kind", SUPPORTS)
def test_a_datum_outside_the_support_is_found_in_every_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, covariates, inside, outside, expected = SUPPORTS[kind]
    labels, runs = np.array([f"row {i}" for i in range(SIZE)]), list[int]()
    trace = problem.trace
    monkeypatch.setattr(problem, "trace", lambda *given: runs.append(1) or trace(*given))
    problem.check_supports(as_program(program), Data({"x": inside()}, covariates(), coords={"data": labels}))
    assert len(runs) == expected
    for bad in (0, ROWS - 1, ROWS, 2 * ROWS - 2, 2 * ROWS, SIZE - 2):  # none of them with a total of 5
        x = inside()
        x[[bad, SIZE - 1]] = outside
        with pytest.raises(DataError, match=rf"(?s)outside the support.*at datum row {bad}:"):
            problem.check_supports(as_program(program), Data({"x": x}, covariates(), coords={"data": labels}))


# -- the split ---------------------------------------------------------------------------------------------------------


def test_the_split_is_that_of_the_first_numbers_of_a_permutation() -> None:
    labels = np.array([f"row {i}" for i in range(1000)])[::-1]
    data = Data({"x": torch.arange(1000.0)}, coords={"data": labels})
    train, held = loop._split(positive, data, 0.15, 3)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(loop.stream(3, "fit", "validation")))
    for part, places in ((train, order[150:]), (held, order[:150])):
        places = places.sort().values
        assert torch.equal(part.batch(slice(None))[0]["x"], places.float())
        assert part.labels().tolist() == labels[places.numpy()].tolist()


@pytest.mark.parametrize("kind", [np.int64, np.uint8, str, object])
def test_repeated_labels_are_found(kind: type) -> None:
    labels = np.arange(200).astype(str if kind is object else kind).astype(kind)
    assert Data({"x": torch.zeros(200)}, coords={"data": labels}).labels().tolist() == labels.tolist()
    labels[-1] = labels[3]
    with pytest.raises(DataError, match="repeats a label"):
        Data({"x": torch.zeros(200)}, coords={"data": labels})


# -- held-out data -----------------------------------------------------------------------------------------------------


class Line(PyroModule):
    """A local latent, and on request a shared one and a discrete one."""

    def __init__(self, shared: bool = False, discrete: bool = False) -> None:
        super().__init__()
        self.shared, self.discrete = shared, discrete
        self.decoder = nn.Linear(2, 3)

    def forward(self, size: int) -> None:
        shift = pyro.sample("w", dist.Normal(0.0, 1.0)) if self.shared else torch.zeros(())
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.4)) if self.discrete else torch.zeros(size)
            z = pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + shift + k[:, None], 0.5).to_event(1))


@contextmanager
def anew(encodings: Encodings, part: int) -> Iterator[None]:
    yield


# program, objective, and runs of the encoder for three parts of the data and four draws: a sum over discrete values
# encodes twice in a run, other rows the second time
PROGRAMS = {
    "local": (Line(), "stl", 3),
    "several draws": (Line(), "iwae", 3),
    "shared": (Line(shared=True), "stl", 3),
    "discrete": (Line(discrete=True), "stl", 2 * 3 * 4),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_held_out_data_are_encoded_once_for_all_draws(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, objective, expected = PROGRAMS[kind]
    data = Data({"x": torch.randn(20, 3, generator=torch.Generator().manual_seed(1))})
    modules = Modules(model, cal.guides.amortize(model, data, seed=0)).eval()
    plan, runs = Plan(objective, 2, 1, 20, 1e-2, 10.0, 1, False, 0), list[int]()
    state = initial_state(modules, plan, data, data)
    encoder = modules.guide.encoder
    given = type(encoder).forward
    monkeypatch.setattr(type(encoder), "forward", lambda self, inputs: runs.append(1) or given(self, inputs))
    monkeypatch.setattr(held_out, "EVALUATED", 8)  # two parts of 8 data, and one of 4
    once = held_out.held_out_elbo(state, data, plan, 20, (4, 4))
    assert len(runs) == expected
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.mul_(1.1)  # the next call encodes anew
    later = held_out.held_out_elbo(state, data, plan, 20, (4, 4))
    assert later[0] != once[0]
    assert len(runs) == 2 * expected
    assert "forward" not in vars(encoder)
    monkeypatch.setattr(Encodings, "of", anew)
    assert held_out.held_out_elbo(state, data, plan, 20, (4, 4)) == later
    assert len(runs) == 2 * expected + 3 * 4 * (2 if kind == "discrete" else 1)


def test_encodings_are_kept_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 3)
    guide = cal.guides.amortize(Line(), {"x": x}, seed=0).eval()
    monkeypatch.setattr("calibrant.guides.many_draws._KEPT", 8 * guide.encoder.features)  # one part of two
    kind, runs = type(guide.encoder), list[int]()
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, given: runs.append(len(runs)) or forward(self, given))
    encodings, parts, found, collected = Encodings(guide), (x, -x), [], list[int]()
    for _ in range(3):
        for place, part in enumerate(parts):
            with encodings.of(place):
                found.append(guide.encoder({"x": part}))
                collected.append(len(guide.encoder._forward_hooks))
    assert collected == [1, 1, 0, 0, 0, 0]  # outputs are collected in the first run alone, also of what is not kept
    assert len(runs) == 4  # the first part once, the second one every time
    assert all(torch.equal(found[i], found[i % 2]) for i in range(6))
    assert not torch.equal(found[0], found[1])
