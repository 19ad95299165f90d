"""The vectorised diagnostics equal ArviZ's, scalar by scalar, on chains of every kind."""

from collections.abc import Callable

import numpy as np
import pytest
from arviz_stats.base import array_stats
from scipy.signal import lfilter

from calibrant.inference import diagnostics

Chains = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def independent(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def autoregressive(phi: float) -> Chains:
    """Stationary chains; a negative coefficient makes them antithetic."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return lfilter([1.0], [1.0, -phi], rng.normal(size=shape), axis=1)

    return draw


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_cauchy(size=shape)


def counts(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.poisson(1.0, size=shape).astype(float)


def rejected(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Every draw stands for a while, as after rejected proposals."""
    return np.take(autoregressive(0.5)(rng, shape), np.arange(shape[1]) // 3, axis=1)


def stored_in_single(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32).astype(float)


def far_apart(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape) + 5.0 * np.arange(shape[0])[:, None, None]


def trending(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape) + np.linspace(0.0, 8.0, shape[1])[:, None]


def rare(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly always zero, so that most quantiles coincide."""
    return np.where(rng.uniform(size=shape) < 0.02, rng.normal(size=shape), 0.0)


KINDS: dict[str, Chains] = {
    "independent": independent,
    "weakly autocorrelated": autoregressive(0.3),
    "autocorrelated": autoregressive(0.9),
    "hardly moving": autoregressive(0.999),
    "antithetic": autoregressive(-0.3),
    "strongly antithetic": autoregressive(-0.97),
    "heavy-tailed": heavy_tailed,
    "counts": counts,
    "rejected": rejected,
    "stored in float32": stored_in_single,
    "far apart": far_apart,
    "trending": trending,
    "rare": rare,
}


def arviz(draws: np.ndarray) -> dict[str, np.ndarray]:
    axes = {"chain_axis": 0, "draw_axis": 1}
    return {
        "rhat": array_stats.rhat(draws, **axes),
        "ess_bulk": array_stats.ess(draws, **axes, method="bulk"),
        "ess_tail": array_stats.ess(draws, **axes, method="tail", prob=(0.05, 0.95)),
    }


@pytest.mark.parametrize(
    ("chains", "length"), [(4, 500), (4, 501), (3, 37), (2, 1000), (1, 64), (4, 8), (2, 5), (2, 4)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_arviz_s(kind: str, chains: int, length: int) -> None:
    draws = KINDS[kind](np.random.default_rng(length), (chains, length, 6)).reshape(chains, length, 2, 3)
    with np.errstate(invalid="ignore", divide="ignore"):  # short chains of ties are constant
        wanted = arviz(draws) | {"ess": array_stats.ess(draws, chain_axis=0, draw_axis=1, method="mean")}
        if chains == 1:
            del wanted["rhat"]  # ArviZ gives none for one chain
    found = diagnostics.diagnose(draws) | {"ess": diagnostics.ess(draws)}
    for name, value in wanted.items():
        assert found[name].shape == (2, 3)
        np.testing.assert_allclose(found[name], value, rtol=1e-8, err_msg=name)


def test_constant_chains_are_arviz_s() -> None:
    draws = np.random.default_rng(0).normal(size=(4, 100, 3))
    draws[..., 0] = 0.1
    draws[2, :, 1] = 0.1
    draws[..., 2] = np.arange(4)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = arviz(draws)
    found = diagnostics.diagnose(draws)
    assert np.isnan(found["rhat"][0])
    assert found["ess_bulk"][0] == found["ess_tail"][0] == 400
    for name in ("ess_bulk", "ess_tail"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-8)
    np.testing.assert_allclose(found["rhat"][:2], wanted["rhat"][:2], rtol=1e-8)
    assert found["rhat"][2] > 1e6


@pytest.mark.parametrize("length", [3, 100])
def test_energy_fractions_are_arviz_s(length: int) -> None:
    energy = autoregressive(0.8)(np.random.default_rng(0), (4, length, 6)).reshape(4, length, 2, 3)
    wanted = array_stats.bfmi(np.moveaxis(energy, (0, 1), (2, 3)))
    np.testing.assert_allclose(np.moveaxis(diagnostics.bfmi(energy), 0, 2), wanted, rtol=1e-8)


def test_a_scalar_s_numbers_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone, in blocks of one, and among chains that need more lags, gives the same numbers."""
    rng = np.random.default_rng(0)
    draws = np.concatenate([KINDS[kind](rng, (4, 200, 2)) for kind in KINDS], axis=2)
    together = diagnostics.diagnose(draws)
    alone = [diagnostics.diagnose(draws[:, :, i]) for i in range(draws.shape[2])]
    monkeypatch.setattr(diagnostics, "_CACHED_ELEMENTS", 1)
    blocks = diagnostics.diagnose(draws)
    for name, values in together.items():
        np.testing.assert_allclose(values, blocks[name], rtol=1e-8)
        np.testing.assert_allclose(values, np.stack([each[name] for each in alone]), rtol=1e-8)


def test_draws_are_left_as_they_were() -> None:
    draws = np.random.default_rng(0).normal(size=(4, 100, 3))
    before = draws.copy()
    diagnostics.diagnose(draws), diagnostics.ess(draws), diagnostics.bfmi(draws)
    np.testing.assert_array_equal(draws, before)
