"""The check: what it says is what was found, for guides that are exact, wrong, or of unusual programs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.nn import PyroModule
from small_checks import SHAPE, build, checked, images, tree
from torch import Tensor

import calibrant as cal
from calibrant.errors import CalibrantError
from calibrant.evaluation import Check, check
from calibrant.evaluation.reporting.tables import evidence_gap

pytestmark = pytest.mark.usefixtures("small_check")


class ExactPPCA(PyroModule):
    """The exact posterior of probabilistic PCA."""

    def __init__(self, model: PyroModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        loading, noise = self.model.decoder.weight, self.model.likelihood.scale
        precision = torch.eye(3) + loading.T @ loading / noise**2
        mean = (observed["x"].flatten(1) - self.model.decoder.bias) / noise**2 @ loading @ torch.linalg.inv(precision)
        with pyro.plate("data", size):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision.expand(size, 3, 3)))


def check_of_an_exact_guide(**size: int) -> Check:
    """Statuses and evidence of a guide that is the posterior."""
    model = build("ppca", shape=[9])
    found = check(model, ExactPPCA(model), images(80, (9,)), chains=2, **size)
    evidence, bound, error = evidence_gap(found.result)
    assert bound == pytest.approx(evidence, abs=1e-9)
    assert error < 1e-9
    assert float(np.abs(found.result.gap["gap"]).max()) < 1e-5
    assert float(np.abs(found.result.gap["approximation"]).max()) < 0.05
    lines = str(found).splitlines()
    assert lines[0] == f"ppca: {found.conclusion}"
    assert len(lines) == 3 + len(found.verdicts)
    return found


def test_check_of_an_exact_guide_fails_nothing_and_leaves_no_gap():
    statuses = [verdict.status for verdict in check_of_an_exact_guide(draws=300, simulations=200).verdicts]
    assert "fail" not in statuses
    assert statuses.count("pass") > len(statuses) / 2


@pytest.mark.truth
def test_check_of_an_exact_guide_passes():
    found = check_of_an_exact_guide(draws=3000, simulations=1000)
    assert {verdict.status for verdict in found.verdicts} == {"pass"}
    assert found.conclusion.status == "pass"
    lines = str(found).splitlines()
    assert lines[0].startswith("ppca: You can trust the guide's uncertainty on the 80 data that were checked")
    assert lines[1].startswith("  pass  posterior sd of `z`: ")


def test_check_says_what_fails_and_saves_a_report(tmp_path, bare):
    found = checked(build("ea-vae"), images())
    assert found.conclusion.status == "fail"
    assert str(found.conclusion).startswith("Do not trust the guide's uncertainty as it is.")
    assert "fail" in found.summary()
    assert {"model", "guide"} <= {verdict.site for verdict in found.verdicts}
    saved = found.save(tmp_path / "check.html", "python check.py")
    assert "python check.py" in saved.read_text(encoding="utf-8")


def test_check_takes_a_reference_and_refuses_one_of_other_weights():
    model, data = build("ppca", shape=[9]), images(4, (9,))
    reference = cal.inference.reference(model, data, chains=2, draws=100)
    found = checked(model, data, reference=reference)
    assert found.result.reference is reference
    torch.manual_seed(5)
    other = cal.models.create("ppca", shape=[9], latents=3).eval()
    with pytest.raises(CalibrantError, match="different models"):
        checked(other, data, reference=reference)


class Pair(PyroModule):
    """Two vector latents, and an exact posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.likelihood = cal.models.Gaussian(0.5)

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            u, v = (pyro.sample(name, dist.Normal(0.0, 1.0).expand([5]).to_event(1)) for name in "uv")
            pyro.sample("x", self.likelihood((u[:, None, :, None] + v[:, None, None, :]).expand(size, *SHAPE)))


def test_check_leaves_out_a_contrast_experiment_that_has_no_single_latent_to_look_at():
    found = checked(Pair().eval(), images())
    assert found.result.reference["posterior"].attrs["method"] == "exact"
    assert found.result.contrast is None


def test_check_of_one_datum_and_of_a_plain_function():
    model = build("vae")
    found = check(model, cal.guides.amortize(model, images()).eval(), images(1), draws=100, chains=2)
    assert found.result.contrast is None

    def tiny(size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    data = {"x": torch.zeros(2)}
    exact = xr.DataTree.from_dict(tree(2, "by hand").to_dict())
    exact["posterior"] = xr.DataTree(
        exact["posterior"]
        .to_dataset()[["z"]]
        .isel(data=[0, 1])
        .assign_coords(data=[0, 1])
        .assign_attrs(latents='["z"]')
    )
    exact = xr.DataTree.from_dict({"/posterior": exact["posterior"].to_dataset()})
    found = check(tiny, cal.guides.amortize(tiny, data), data, exact, draws=100)
    assert found.result.name == "tiny"
