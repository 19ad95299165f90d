"""`calibrant bench` and `inference.bench`: every part has its figures or says why not, and nothing is changed."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from commands import fit_rows, good, refused, weights
from pyro.nn import PyroModule

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference.graphs.metering import metered, preparing, running_meter
from calibrant.inference.speed import measuring
from calibrant.workflow import benching

QUICK: dict[str, Any] = {"seconds": 0.02, "data": 2, "warmup": 20, "draws": 500, "starts": 0, "batch_size": 8}
X = torch.randn(24, generator=torch.Generator().manual_seed(0)) + 1


class Positive(PyroModule):
    """One latent with no closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
            pyro.sample("x", dist.Normal(self.weight * rate, 0.5))


class NoLatent(PyroModule):
    """Has nothing to infer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(self.mean, 1.0))


class Counts(PyroModule):
    """A discrete latent with infinitely many values, which no chain moves and no sum covers."""

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            count = pyro.sample("count", dist.Poisson(2.0))
            pyro.sample("x", dist.Normal(count, 0.5))


class CountsGuide(PyroModule):
    """A guide without weights."""

    def forward(self, observed: dict[str, torch.Tensor], size: int) -> None:
        with pyro.plate("data", size):
            pyro.sample("count", dist.Poisson(observed["x"].exp()))


class NoGuide(PyroModule):
    """A guide of nothing."""

    def forward(self, observed: dict[str, torch.Tensor], size: int) -> None:
        pass


def measured(model: PyroModule, guide: PyroModule, **more: Any) -> cal.inference.Bench:
    return cal.inference.bench(model, guide, {"x": X}, **{**QUICK, "progress": False, **more})


def named(found: cal.inference.Bench) -> dict[str, measuring.Speed]:
    return {f"{row.part}: {row.what}": row for row in found.rows}


@pytest.fixture
def untrained(monkeypatch):
    """The part that takes seconds is left out."""
    monkeypatch.setattr(measuring, "_training", lambda *given: [])


def test_every_part_has_its_figures_and_weights_stay():
    model, stages = cal.models.create("ppca", shape=(3,), latents=2).eval(), []
    data = {"x": X.reshape(-1, 1).expand(-1, 3) + 0.1 * torch.randn(24, 3)}
    guide = cal.guides.amortize(model, data, family="normal", structure="mean-field")
    before = [value.clone() for part in (model, guide) for value in part.state_dict().values()]
    bench = cal.inference.bench(
        model, guide, data, **QUICK, progress=lambda stage, done, total, text: stages.append((stage, done))
    )
    after = [value for part in (model, guide) for value in part.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not model.training
    assert list(dict.fromkeys(stages)) == [
        (stage, done) for stage in ("training", "posterior", "reference") for done in (0, 1)
    ]
    found = named(bench)
    assert list(found) == [
        "training: steps",
        "training: data",
        "training: share of the matrix rate",
        "training: share of time outside arithmetic",
        "training: recorded over eager",
        "posterior: draws",
        "reference: seconds per datum",
    ]
    assert all(row.value is not None and math.isfinite(row.value) and row.value >= 0 for row in found.values())
    assert found["training: data"].value == pytest.approx(8 * found["training: steps"].value)
    assert found["reference: seconds per datum"].how.startswith("exact")


def test_chains_that_take_long_are_stopped_and_what_they_did_tells_their_speed(monkeypatch, untrained):
    """By a clock that ticks when it is read, the second report of the chains comes too late."""
    model, ticks = Positive(), itertools.count()
    monkeypatch.setattr(measuring, "now", lambda device: float(next(ticks)))
    monkeypatch.setattr(measuring, "metered", lambda: metered(lambda: 0.0))
    bench = measured(model, cal.guides.amortize(model, {"x": X}), seconds=0.25)
    stopped, leapfrogs, compiling = (row for row in bench.rows if row.part == "reference")
    assert stopped.value is None
    assert stopped.how.startswith("stopped after 3 seconds, at 10% of the iterations: 4 chains of 20 + 500 iterations")
    assert leapfrogs.value > 2 * 4 * 52 / 3
    assert compiling.value == 0
    assert "–" in str(bench)
    assert "stopped" in bench._repr_html_()
    assert "torch" in repr(bench)


def test_effective_draws_are_those_of_the_worst_latent_without_compiling(monkeypatch, untrained):
    """100 and 300 effective draws of two data in the 40 seconds that compiling leaves of 50."""
    clock = iter([0.0, 50.0])

    def sampled(program: Any, data: Any, plan: Any, **more: Any) -> xr.DataTree:
        meter = running_meter()
        meter.leapfrogs, meter.preparing = 8000, 10.0
        values = {"ess_bulk": [100.0, 400.0], "ess_tail": [200.0, 300.0], "is_reference": [False, True]}
        convergence = xr.Dataset({name: ("data", np.array(value)) for name, value in values.items()})
        posterior = xr.Dataset(attrs={"method": "nuts"})
        return xr.DataTree.from_dict({"posterior": posterior, "convergence": convergence})

    monkeypatch.setattr(measuring, "reference_of", sampled)
    monkeypatch.setattr(measuring, "_posterior", lambda *given: [])
    monkeypatch.setattr(measuring, "now", lambda device: next(clock))
    found = named(measured(Positive(), cal.guides.amortize(Positive(), {"x": X})))
    wanted = {"seconds per datum": 20.0, "effective draws": 10.0, "leapfrogs": 200.0, "compiling": 10.0}
    assert {what: found[f"reference: {what}"].value for what in wanted} == pytest.approx(wanted)
    assert "1 of 2 data pass" in found["reference: effective draws"].how


def reasons(found: cal.inference.Bench) -> dict[str, str]:
    return {row.part: row.how for row in found.rows if row.value is None}


def test_what_a_program_does_not_allow_is_a_row_that_says_why():
    found = reasons(measured(Counts(), CountsGuide()))
    assert set(found) == {"training", "reference"}
    assert all("latent 'count' has infinitely many values" in why for why in found.values())


def test_without_latents_there_is_no_posterior_to_measure(untrained):
    found = reasons(measured(NoLatent(), NoGuide()))
    assert set(found) == {"posterior", "reference"}
    assert all("no latents" in why for why in found.values())


@pytest.mark.parametrize(("given", "words"), [({"seconds": 0}, "seconds=0"), ({"data": 0}, "data=0")])
def test_numbers_that_measure_nothing_are_refused(given, words):
    with pytest.raises(InferenceError, match=words):
        measured(NoLatent(), NoGuide(), **given)


def test_nothing_is_counted_without_a_measurement():
    with preparing():
        assert running_meter() is None
    ticks = iter([1.0, 3.5])
    with metered(lambda: next(ticks)) as meter, preparing():
        assert running_meter() is meter
    assert (meter.preparing, running_meter()) == (2.5, None)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("elsewhere", "untrained")
def test_the_command_measures_a_run_and_a_model_of_ones_own(monkeypatch):
    monkeypatch.setattr(benching, "_QUICK", 0.02)
    fit_rows("run")
    before = weights("run"), {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    out, _ = good("bench", "run", "--quick", "--json", "speed.json")
    assert before[1] == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    content = json.loads(Path("speed.json").read_text())
    assert {"processor", "cores", "threads", "torch", "device"} <= content["machine"].keys()
    assert [(row["part"], row["what"]) for row in content["rows"]] == [
        ("posterior", "draws"),
        ("reference", "seconds per datum"),
    ]
    assert content["machine"]["processor"] in out
    assert "exact" in out
    good("bench", "user.py:Mine+full", "--data", "rows.npz", "--site", "picture=x", "--quick")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("vea", "unknown model 'vea'; did you mean vae"),
        ("runs/absent", "there is no run in runs/absent"),
        ("foreign", "no run folder of calibrant"),
        ("vae+tree", "there is no structure 'tree'"),
        ("vae --data nothing.npz", "there is no file nothing.npz"),
        ("vae --data rows.npz --set latent=3", "no argument latent"),
        ("vae --json absent/speed.json", "there is no folder absent"),
        ("vae --data rows.npz --device gpu", "device 'gpu' can't be used here"),
        ("absent.py:Mine", "there is no file absent.py"),
    ],
)
def test_mistakes_of_the_command_end_in_one_line(words, message):
    Path("foreign").mkdir()
    assert message in refused("bench", *words.split())


@pytest.mark.usefixtures("elsewhere")
def test_without_a_name_an_ea_vae_with_chains_is_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(
        benching, "bench_of", lambda *given, **more: seen.append((given, more)) or measuring.Bench("", {}, [])
    )
    monkeypatch.setattr("calibrant.cli.show_speeds", lambda found: None)
    good("bench", "--quick", "--batch-size", "32")
    ((name, problem, plan, *_), more), *_ = seen
    assert (name, plan.batch_size, plan.data, plan.starts) == ("ea-vae", 32, 4, 0)
    assert more == {"keep": True}
    assert len(problem.data) > 256
