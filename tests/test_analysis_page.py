"""The example of docs/analysis.md runs as it stands, and all analyses take registered models of every kind."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrant as cal

PAGE = Path(__file__).parents[1] / "docs/analysis.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def run_example(block, folder, capsys):
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert {path.name for path in folder.glob("*.png")} == {"pixels.png", "rates.png"}
    printed = capsys.readouterr().out
    assert "nats per image" in printed
    assert "pixels: " in printed
    return names


def test_the_example_runs_with_a_short_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = EXAMPLE
    for long, short in (("epochs=100", "epochs=2"), ("points=1000", "points=100, prior_draws=1000")):
        assert long in block
        block = block.replace(long, short)
    run_example(block, tmp_path, capsys)


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_example(EXAMPLE, tmp_path, capsys)
    assert int(names["units"]["active_units"]) == 4
    assert float(names["bound"]["average_bound"]) > float(names["rates"]["average_elbo"])


MODELS = {
    "ppca": {},
    "ea-vae": {},
    "vae": {"decoder": "mlp"},
    "vae, bernoulli": {"decoder": "mlp", "likelihood": "bernoulli"},
}
STRUCTURES = {"ppca": "full"}


@pytest.mark.parametrize("name", MODELS)
def test_registered_models_have_all_analyses(name):
    torch.manual_seed(0)
    model = cal.models.create(name.partition(",")[0], shape=(1, 4, 4), latents=2, **MODELS[name]).eval()
    data = {"x": cal.program.sample_prior(model, 24, seed=1)["x"].detach()}
    guide = cal.guides.amortize(model, data, structure=STRUCTURES.get(name, "faithful")).eval()
    rates = cal.evaluation.rate_distortion(model, guide, data, draws=40)
    np.testing.assert_allclose(
        rates["elbo"], cal.inference.iwae_bound(model, guide, data, 20, seed=1)["elbo"], rtol=0.3
    )
    split = cal.evaluation.information(model, guide, data, points=48, prior_draws=1000)
    assert abs(float(split["rate"] - rates["average_rate"])) < 6 * float(split["rate_se"])
    latents = cal.inference.posterior(model, guide, data, draws=2)["posterior"].dataset
    assert cal.evaluation.active_units(model, guide, data, draws=4).sizes["latent"] == 2 + ("scale" in latents)
    pixels = cal.evaluation.pixel_calibration(model, guide, data, draws=5)
    assert np.isfinite(pixels["coverage"]).all()
