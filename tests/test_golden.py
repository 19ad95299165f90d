"""Stored inputs, on which other implementations gave the stored results: see `golden/make_golden.py`."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from agreement import limit

from calibrant.evaluation import c2st
from calibrant.evaluation.statistics.simulation_ranks import below, tarp_distance
from calibrant.inference.references.gate import exact_convergence
from calibrant.inference.reweighting import importance


def stored(name: str) -> dict[str, np.ndarray]:
    text = (Path(__file__).parent / "golden" / f"{name}.json").read_text()
    return {key: np.asarray(value) for key, value in json.loads(text).items()}


def tree(draws: np.ndarray, **groups: xr.Dataset) -> xr.DataTree:
    """A tree of independent draws `(draw, data, latent)`."""
    posterior = xr.Dataset(
        {"z": (("chain", "draw", "data", "z_dim_0"), draws[None])},
        coords={"data": np.arange(draws.shape[1])},
        attrs={"independent_draws": 1, "latents": '["z"]'},
    )
    return xr.DataTree.from_dict({"posterior": posterior, **groups})


def test_k_hat_and_ess() -> None:
    golden = stored("weights")
    log_weights = golden["log_weights"].T[None]
    dims = ("chain", "draw", "data")
    stats = xr.Dataset({"log_p": (dims, log_weights), "log_q": (dims, np.zeros_like(log_weights))})
    found = importance(tree(log_weights[0, ..., None], sample_stats=stats))["importance"]
    for name in ("own", "pyro", "arviz"):
        np.testing.assert_allclose(found["pareto_k"], golden[f"khat_{name}"], rtol=1e-9)
    np.testing.assert_allclose(found["ess"], golden["ess"], rtol=1e-9)
    assert golden["khat_own"].min() < -1.0
    assert golden["khat_own"].max() > 2.0


def test_c2st(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies are equal, but for a draw that lies on the boundary; the rest agrees within its noise.

    P-values and null distributions are of other permutations. Planted: a smaller penalty.
    """
    golden = stored("c2st")
    gate = exact_convergence(np.zeros(4), np.zeros(4), np.arange(4))
    post, ref = (golden[side].swapaxes(0, 1) for side in ("post", "ref"))
    count = int(golden["permutations"])
    found = c2st(tree(post), tree(ref, convergence=gate), permutations=count)
    a_draw = 0.5 / golden["post"].shape[1]  # rounding may move one across the boundary
    np.testing.assert_allclose(found["c2st"], golden["accuracy"], rtol=0, atol=1.01 * a_draw)
    noise = np.sqrt(2.0 / count)
    p = np.maximum(golden["p"], 1.0 / count)
    z = {
        "p": (found["c2st_p"] - golden["p"]) / (np.sqrt(p * (1.0 - p)) * noise),
        "null": (found["c2st_null"] - golden["null"]) / (golden["null_sd"] * noise),
        "null_sd": (found["c2st_null_sd"] / golden["null_sd"] - 1.0) / (np.sqrt(0.5) * noise),
    }
    assert max(float(abs(score).max()) for score in z.values()) < limit(12)
    assert found["c2st_p"].values == pytest.approx([0.9, 0.0, 0.0, 0.0], abs=0.1)
    monkeypatch.setattr(import_module("calibrant.evaluation.statistics.classifier"), "_PENALTY", 3.0)
    assert abs(c2st(tree(post), tree(ref, convergence=gate))["c2st"] - golden["accuracy"]).max() > 0.01


def test_ranks_and_tarp() -> None:
    """sbi's ranks are the draws below the truth; its TARP coverage, the share of draws nearer to the reference."""
    golden = stored("ranks")
    truth, draws, references, scale = (torch.as_tensor(golden[n]) for n in ("truth", "draws", "references", "scale"))
    less, equal = below(truth, draws)
    np.testing.assert_array_equal(less.numpy(), golden["sbc_ranks"])
    np.testing.assert_array_equal(equal.numpy(), (golden["draws"] == golden["truth"]).sum(0))
    assert (equal[:5] > 0).all()
    nearer, _ = below(tarp_distance(truth, references, scale), tarp_distance(draws, references, scale))
    np.testing.assert_allclose(nearer.numpy() / len(draws), golden["tarp_coverage"], atol=1e-6)
    unscaled, _ = below(*(tarp_distance(theta, references, torch.ones(2)) for theta in (truth, draws)))
    assert (unscaled != nearer).any()
