"""The code of docs/coming-from-elsewhere.md runs: its cells, and both columns of its tables as far as they are ours."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro_scripts import drawn

import calibrant as cal
from calibrant.program import log_density

PAGE = Path(__file__).parents[1] / "docs/coming-from-elsewhere.md"
TEXT = PAGE.read_text(encoding="utf-8")
CELLS = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", TEXT, flags=re.DOTALL)


def table(heading):
    """The code of a table's cells, row by row."""
    part = TEXT.partition(heading)[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [re.findall(r"`(.*?)` \|", line) for line in lines if "`" in line]


AROUND, INSIDE, THERE = (
    table(f"## {name}") for name in ("Around a Pyro model", "Inside a Pyro model", "There and here")
)


def shortened(cell):
    """A cell with a training of few steps."""
    return (
        cell.replace("epochs=400", "epochs=2").replace("torch.rand(400)", "torch.rand(200)").replace("(400,)", "(200,)")
    )


@pytest.fixture(scope="module")
def names():
    """What the cells of the page define."""
    found = {"__name__": "page"}
    for cell in CELLS:
        exec(compile(shortened(cell), str(PAGE), "exec"), found)
    yield found
    pyro.clear_param_store()


def run(code, names):
    try:
        exec(compile(code, str(PAGE), "exec"), names)
    except Exception as error:
        raise AssertionError(f"{code}\n{type(error).__name__}: {error}") from error


def test_the_tables_are_read():
    assert (len(AROUND), len(INSIDE)) == (16, 13)
    assert {len(row) for row in AROUND + INSIDE + THERE} == {2}
    assert len(THERE) > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_around_a_model(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for there, here in AROUND:
        run(there, names)
        run(here, names)
    pyro.clear_param_store()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_there_and_here(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, here in THERE:
        run(here, names)


_MODEL = """
def model(x, table, seen, weight, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    {there}


class Program(Parts):
    def forward(self, size, x, seen, weight):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        {here}
"""


@pytest.mark.parametrize("row", INSIDE, ids=lambda row: row[0][:80])
def test_inside_a_model(row):
    """The densities of both columns agree."""
    names = {"pyro": pyro, "dist": dist, "torch": torch, "poutine": pyro.poutine}
    parts = next(cell for cell in CELLS if "class Parts" in cell)
    run(parts + textwrap.dedent(_MODEL).format(there=row[0], here=row[1]), names)
    x, seen, weight = drawn(6), torch.arange(6) % 3 > 0, 1 + drawn(6).abs()
    given = {"x": x, "seen": seen, "weight": weight}
    args = x, drawn(3, 6), seen, weight, drawn(7)[1:]
    there, here = cal.from_pyro(names["model"], *args, plate="rows"), names["Program"]()
    data = there.data(*args)
    values = {**drawn_from(here, given), **data.tensors()[0]}
    found = log_density(there, values, 6, data.tensors()[1])
    wanted = log_density(here, values, 6, given)
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


def drawn_from(program, covariates):
    run = cal.program.trace(program, 6, covariates)
    return {name: site["value"] for name, site in cal.program.sampled(run).items()}
