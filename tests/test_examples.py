"""Every program under `examples/` keeps to the contract and trains; the command makes its comparison (slow)."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import calibrant as cal
from calibrant import store
from calibrant.cli import app
from calibrant.userfile import load_object

FOLDER = Path(__file__).parents[1] / "examples"
LATENTS = {
    "conditional_vae": {"z": True},
    "hierarchical_logistic": {"centre": False, "spread": False, "slope": False, "intercept": True},
    "item_response": {"difficulty": False, "discrimination": False, "ability": True},
    "mixture_of_factor_analysers": {"component": True, "z": True},
    "occlusion_mask": {"hidden": True, "z": True},
    "poisson_factor": {"amount": True},
    "robust_regression": {"intercept": False, "slopes": False, "scale": False, "freedom": False},
    "sparse_coding": {"z": True},
}


def test_every_example_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"figures"} == set(LATENTS)


def _few(name):
    """The model of an example and 60 of its training data."""
    model = load_object(f"{FOLDER / name}.py:Model")[0]()
    given = load_object(f"{FOLDER / name}.py:data")[0]()
    if isinstance(given, dict) and set(given) == {"train", "validation", "test"}:
        given = given["train"]
    return model, (given if isinstance(given, cal.data.Data) else cal.data.Data(given))[:60]


@pytest.mark.parametrize("name", sorted(LATENTS))
def test_an_example_builds_and_trains(name):
    model, data = _few(name)
    found = cal.program.sites(model, *data.batch(slice(0, 8)))
    assert {site: latent.local for site, latent in found.items()} == LATENTS[name]
    guide = cal.guides.amortize(model, data)
    fit = cal.inference.fit(model, guide, data, epochs=1, batch_size=30)
    assert torch.isfinite(torch.tensor(fit.elbo))
    post = cal.inference.posterior(model, guide, data[:4], draws=20)
    assert set(LATENTS[name]) <= set(post["posterior"].data_vars)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LATENTS))
def test_an_example_runs_from_the_command_line(name, tmp_path):
    file = FOLDER / f"{name}.py"
    arguments = ["run", f"{file}:Model", "--data", f"{file}:data", "--out", str(tmp_path / "run"), "--quiet"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    comparison = store.load_result(tmp_path / "run", model=f"{file}:Model").comparison
    assert comparison.attrs["share_left_out"] < 0.05, comparison["reason"].values
