"""A run folder of version 0.1.0, before files moved and random streams were named, is read as it was written.

`tests/golden/run-0.1.0` holds a scale mixture with two latents, for 64 simulated data of three entries; its checkpoint
and report were left out.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrant as cal
from calibrant import store, workflow
from calibrant.program.density import density_of
from calibrant.program.tracing import guide_trace
from calibrant.settings import Request

FOLDER = Path(__file__).parent / "golden" / "run-0.1.0"


def log_densities(guide: torch.nn.Module, tree) -> np.ndarray:
    """log q of the stored draws, `(draw, data)`."""
    posterior, x = tree["posterior"].dataset, torch.as_tensor(tree["observed_data"]["x"].values)
    names, found = json.loads(posterior.attrs["latents"]), []
    for draw in range(posterior.sizes["draw"]):
        values = {name: torch.as_tensor(posterior[name].values[0, draw]) for name in names}
        with torch.no_grad():
            run = guide_trace(guide, {"x": x}, len(x), {}, values)
        found.append(density_of(run, len(x), values).joint.numpy())
    return np.stack(found)


def test_model_and_guide_have_the_densities_that_were_stored():
    model, guide = cal.load(FOLDER)
    tree = store.load_tree(FOLDER / store.AMORTIZED)
    stored = tree["sample_stats"].dataset
    found = log_densities(guide, tree)
    np.testing.assert_allclose(found, stored["log_q"].values[0], rtol=1e-3, atol=2e-3)
    x = torch.as_tensor(tree["observed_data"]["x"].values)
    evidence = cal.inference.log_evidence(model, {"x": x}).numpy()
    known = store.load_tree(FOLDER / store.REFERENCE)["convergence"]["log_evidence"].values
    np.testing.assert_allclose(evidence, known, rtol=1e-6)
    with torch.no_grad():
        next(guide.parameters()).mul_(1.1)
    assert np.abs(log_densities(guide, tree) - stored["log_q"].values[0]).max() > 0.01  # a changed guide is seen


def test_its_results_are_read_and_reported(tmp_path, bare):
    shutil.copytree(FOLDER, tmp_path / "run")
    outcome = workflow.report_run(Request(out=tmp_path / "run"))
    assert outcome.report is not None
    assert outcome.report.is_file()
    (result,) = outcome.results
    assert result.config["fit"]["epochs"] == 2
    summary = workflow.summarise(result)
    assert summary.gap == pytest.approx(summary.evidence - result_elbo(result), abs=1e-6)


def result_elbo(result) -> float:
    stats = result.amortized["sample_stats"].dataset
    return float((stats["log_p"] - stats["log_q"]).mean())
