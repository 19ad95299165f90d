"""Guides and posteriors that a reviewer would try: wrong ones that must not pass, exact ones that must not fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from calibrant.evaluation import compare, conclude, verdicts
from calibrant.inference.references.gate import exact_convergence

DATA, LATENTS = 64, 8


def tree(z: np.ndarray, shared: np.ndarray | None = None, **attrs: float) -> xr.DataTree:
    """A tree of draws `(chain, draw, data, latent)`, with shared ones `(chain, draw, latent)`."""
    names = ["z"] if shared is None else ["z", "w"]
    values = {"z": (("chain", "draw", "data", "z_dim_0"), z)}
    if shared is not None:
        values["w"] = (("chain", "draw", "w_dim_0"), shared)
    labels = np.arange(z.shape[2])
    posterior = xr.Dataset(values, {"data": labels}, {"latents": json.dumps(names), "independent_draws": 1})
    gate = exact_convergence(np.zeros(len(labels)), np.zeros(len(labels)), labels).drop_vars("log_evidence")
    return xr.DataTree.from_dict({"/posterior": posterior, "/convergence": gate.assign_attrs(attrs)})


def answer(post: xr.DataTree, ref: xr.DataTree, informed: xr.Dataset | None = None) -> tuple[str, set[str]]:
    """The conclusion, and what failed."""
    result = compare(post, ref, informed=informed)
    found = verdicts(result)
    return conclude(found, result).status, {verdict.quantity for verdict in found if verdict.status == "fail"}


def normal(rng: np.random.Generator, chains: int, draws: int, latents: int = LATENTS) -> np.ndarray:
    return rng.normal(size=(chains, draws, DATA, latents))


def along(z: np.ndarray, v: np.ndarray, factor: float) -> np.ndarray:
    """Draws stretched by a factor along a direction `(data, latent)` of each datum."""
    return z + (factor - 1) * (z * v).sum(-1, keepdims=True) * v


def directions(rng: np.random.Generator) -> np.ndarray:
    v = rng.normal(size=(DATA, LATENTS))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def test_one_datum_without_an_informed_direction_hides_nothing():
    rng = np.random.default_rng(0)
    v = directions(rng)
    known = v.copy()
    known[3] = np.nan
    labels = [f"z[{i}]" for i in range(LATENTS)]
    dimensions = ("data", np.ones(DATA))
    informed = xr.Dataset(
        {"direction": (("data", "latent"), known), "dimensions": dimensions},
        {"data": np.arange(DATA), "latent": labels},
    )
    status, failed = answer(tree(along(normal(rng, 1, 1000), v, 0.6)), tree(normal(rng, 4, 1000)), informed)
    assert status == "fail"
    assert "direction" in failed


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_guide_off_along_a_direction_of_each_datum_fails(factor):
    rng = np.random.default_rng(1)
    v = directions(rng)
    guide = tree(along(normal(rng, 1, 1000), v, factor))
    status, failed = answer(guide, tree(normal(rng, 4, 1000)))
    assert status == "fail"
    assert "direction" in failed


def test_heavy_tails_of_the_guide_alone_do_not_pass():
    rng = np.random.default_rng(2)
    z = normal(rng, 1, 1000, 1)
    far = rng.random(z.shape) < 0.015
    z[far] = rng.lognormal(2.0, 1.5, int(far.sum()))
    assert answer(tree(z), tree(normal(rng, 4, 1000, 1)))[0] != "pass"


def test_heavy_tails_in_some_of_the_data_do_not_fail():
    rng = np.random.default_rng(3)

    def draws(chains: int, count: int) -> np.ndarray:
        z = normal(rng, chains, count, 2)
        z[:, :, ::3] = rng.standard_t(2, size=z[:, :, ::3].shape)
        return z

    assert [answer(tree(draws(1, 1000)), tree(draws(4, 1000)))[0] for _ in range(4)].count("fail") == 0


def test_an_atom_does_not_fail():
    rng = np.random.default_rng(4)

    def draws(chains: int, count: int) -> np.ndarray:
        z = normal(rng, chains, count, 1) + 1.0
        z[rng.random(z.shape) < 0.3] = 0.0
        return z

    assert answer(tree(draws(1, 1000)), tree(draws(4, 1000)))[1] == set()


def test_correlations_of_shared_latents_with_each_other_and_with_local_ones_are_asked():
    rng = np.random.default_rng(5)

    def draws(chains: int, count: int, between: float, across: float) -> tuple[np.ndarray, np.ndarray]:
        w = rng.normal(size=(chains, count, 2))
        w[..., 1] = between * w[..., 0] + np.sqrt(1 - between**2) * w[..., 1]
        z = rng.normal(size=(chains, count, 8, 1))
        z[..., 0] = across * w[:, :, :1] + np.sqrt(1 - across**2) * z[..., 0]
        return z, w

    exact = tree(*draws(4, 2000, 0.0, 0.0))
    assert "correlation" in answer(tree(*draws(1, 20_000, 0.45, 0.0)), exact)[1]
    assert "correlation" in answer(tree(*draws(1, 20_000, 0.0, 0.0)), tree(*draws(4, 2000, 0.0, 0.9)))[1]
    status, failed = answer(tree(*draws(1, 20_000, 0.3, 0.5)), tree(*draws(4, 2000, 0.3, 0.5)))
    assert failed == set()
    assert status != "fail"


def test_positivity_is_looked_for_in_all_data():
    rng = np.random.default_rng(6)

    def draws(chains: int, count: int) -> np.ndarray:
        z = np.exp(1.5 * normal(rng, chains, count, 1))
        z[:, :, 1::2] -= 1.0
        return z

    assert answer(tree(draws(1, 1000)), tree(draws(4, 1000)))[1] == set()


def test_many_chains_of_one_draw_are_compared():
    rng = np.random.default_rng(7)
    result = compare(tree(normal(rng, 400, 1, 2)), tree(normal(rng, 4, 500, 2)))
    assert np.isfinite(result["half_sd_ratio"]).all()


def test_the_expected_number_of_missed_modes_comes_from_the_reference():
    rng = np.random.default_rng(8)
    ref = tree(normal(rng, 4, 500, 1), expected_wrong=0.7)
    assert compare(tree(normal(rng, 1, 500, 1)), ref).attrs["expected_wrong"] == 0.7
