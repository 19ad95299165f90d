"""Prior guides in run folders and on the page that explains them."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrant as cal
from calibrant import workflow
from calibrant.errors import RunError
from calibrant.settings import Request

PAGE = Path(__file__).parents[1] / "docs/prior-guides.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
PROGRAM = """
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule


class Noisy(PyroModule):
    def __init__(self, shape=(4,)):
        super().__init__()
        self.mean = torch.nn.Linear(*shape, 3)

    def forward(self, size, x):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.mean(x), 1.0).to_event(1))
            pyro.sample("y", dist.Categorical(logits=z))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder of a user's model with its prior guide, beside the model's file and data."""
    (tmp_path / "noisy.py").write_text(PROGRAM)
    torch.manual_seed(0)
    model = cal.models.create(f"{tmp_path}/noisy.py:Noisy")
    x = torch.randn(600, 4)
    with torch.no_grad():
        y = cal.program.trace(model, 600, {"x": x}).nodes["y"]["value"]
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    guide = cal.guides.prior(model)
    fit = cal.inference.fit(
        model, guide, {"y": y}, covariates={"x": x}, objective="iwae", particles=4, epochs=1, batch_size=100
    )
    return cal.store.save_run(tmp_path / "run", model, guide, fit)


def test_a_run_folder_is_loaded_checked_and_reported(folder: Path) -> None:
    spec = f"{folder.parent}/noisy.py:Noisy"
    model, guide = cal.load(folder, model=spec)
    assert guide.model is model
    assert json.loads((folder / "config.json").read_text())["guide"] == {"structure": "prior"}
    request = Request((spec,), data=str(folder.parent / "data.npz"), out=folder, settings={"draws": 50})
    outcome = workflow.check_run(request)
    (result,) = outcome.results
    assert result.reference is None
    assert result.probabilities is not None
    assert result.probabilities.attrs["draws"] == 50
    again = workflow.report_run(Request((spec,), out=folder)).results[0]
    np.testing.assert_array_equal(again.probabilities["y_probability"], result.probabilities["y_probability"])
    assert "The predicted probabilities" in (folder / "report.html").read_text()
    assert "not judged as a posterior" in workflow.summarise(again).conclusion


def test_a_run_folder_with_another_specification_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    cal.store.write_config(folder, {**config, "guide": {"structure": "unknown"}})
    with pytest.raises(RunError, match="cannot be rebuilt"):
        cal.load(folder, model=f"{folder.parent}/noisy.py:Noisy")


def test_the_page_s_example_runs() -> None:
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(EXAMPLE, str(PAGE), "exec"), names)
    assert isinstance(names["guide"], cal.guides.PriorGuide)


def test_the_page_s_table_is_what_the_functions_return() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,/ ]+) \| ([−.\d/ ]+) \| ([−.\d/ ]+) \|$", PAGE.read_text(), flags=re.M)
    assert len(rows) == 4
    for dimension, kappas, *columns in rows:
        kappa = torch.tensor([float(k.replace(",", "")) for k in kappas.split(" / ")], dtype=torch.float64)
        p = int(dimension.replace(",", ""))
        functions = (cal.distributions.mean_cosine, cal.distributions.published_mean_cosine)
        for column, function in zip(columns, functions, strict=True):
            stated = [float(value.replace("−", "-")) for value in column.split(" / ")]
            np.testing.assert_allclose(function(p, kappa), stated, atol=6e-4)
