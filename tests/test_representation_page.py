"""The example of docs/representation-metrics.md runs as it stands, and its table names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calibrant import evaluation

TEXT = (Path(__file__).parents[1] / "docs/representation-metrics.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_its_metrics(capsys, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert "steps=300" in block
    exec(compile(block.replace("steps=300", "steps=20, batch_size=64"), "page", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == re.findall(r'"(\w+)"', block.split("for name in")[1])[:5]
    assert (tmp_path / "reject.png").stat().st_size > 5000


@pytest.mark.parametrize("name", re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE))
def test_functions_of_the_table_are_public(name):
    assert name in evaluation.__all__
