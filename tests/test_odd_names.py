"""Sites whose names hold brackets and other signs appear under their own names in every table, picture and file."""

from __future__ import annotations

import json

import pyro
import pyro.distributions as dist
import pytest
import torch

import calibrant as cal
from calibrant import store
from calibrant.evaluation.reporting.run_plots import scalar_draws

NAMES = [("beta[0]", "beta[1]", "z[0]"), ("beta[0][1]", "b[x]", "z["), ("$a_1$", "%s {0}", "[red]z[red]")]


def model_with(first: str, second: str, vector: str):
    def model(size: int) -> None:
        with pyro.plate("data", size):
            a = pyro.sample(first, dist.Normal(0.0, 1.0))
            b = pyro.sample(second, dist.Normal(a, 1.0))
            z = pyro.sample(vector, dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x[0]", dist.Normal(torch.stack([a + z[..., 0], b, z[..., 1]], -1), 0.5).to_event(1))

    return model


def check_of(names: tuple[str, str, str], count: int = 12) -> cal.evaluation.Check:
    model, data = model_with(*names), cal.data.Data({"x[0]": torch.randn(count, 3)})
    guide = cal.guides.amortize(model, data).eval()
    return cal.evaluation.check(model, guide, data, draws=100, simulations=100)


@pytest.mark.parametrize("names", NAMES)
def test_sites_keep_their_names(tmp_path, small_check, names):
    found = check_of(names)
    labels = [*names[:2], f"{names[2]}[0]", f"{names[2]}[1]"]
    assert set(found.result.comparison["latent"].values.tolist()) == set(labels)
    assert all(f"`{name}`" in found.summary() for name in names)
    for field, file in {"amortized": "a.nc", "reference": "r.nc"}.items():
        store.save_tree(getattr(found.result, field), tmp_path / file)
        tree = store.load_tree(tmp_path / file)
        assert json.loads(tree["posterior"].attrs["latents"]) == list(names)
        draws = scalar_draws(tree, tree["posterior"]["data"].values[3], labels)
        assert draws[labels[3]].values == pytest.approx(tree["posterior"][names[2]].values[:, :, 3, 1])
        assert draws[labels[0]].values == pytest.approx(tree["posterior"][names[0]].values[:, :, 3])


@pytest.mark.slow
@pytest.mark.parametrize("names", NAMES)
def test_reports_with_all_pictures_are_written(tmp_path, small_check, names):
    saved = check_of(names).save(tmp_path / "report.html").read_text()
    assert saved.count("<img") > 3
