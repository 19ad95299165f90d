"""The example of docs/representation-applications.md runs as it stands."""

import re
from pathlib import Path

import pytest

import calibrant as cal

PAGE = Path(__file__).parents[1] / "docs/representation-applications.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert "repeats=5" in block
    names: dict = {}
    exec(compile(block.replace("repeats=5", "repeats=2, rounds=3"), str(PAGE), "exec"), names)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"safe", "caps", "learning", "certain", "map"}
    assert names["few"]["r_auroc_low"].min() > 0.5
    assert "gain_over_random" in capsys.readouterr().out


@pytest.mark.parametrize("name", re.findall(r"\*\*`(\w+)`\*\*", TEXT))
def test_functions_that_the_page_explains_exist(name):
    assert callable(getattr(cal.evaluation, name))
