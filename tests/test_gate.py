"""The convergence gate: a converged posterior passes, and each defect fails with its own reason."""

import numpy as np
import pytest
import xarray as xr
from arviz_stats.base import array_stats
from scipy.signal import lfilter

from calibrant.errors import InferenceError
from calibrant.inference.references.gate import convergence_of, exact_convergence, mcmc_convergence, require_passable

DIMS = ("chain", "draw", "data")
DATA = [10, 11, 12]


def groups(chains: int = 4, draws: int = 600, seed: int = 0) -> tuple[xr.Dataset, xr.Dataset]:
    """A converged posterior of three data with latents `scale` and `z[0..1]`, and its sample statistics."""
    rng = np.random.default_rng(seed)
    shape = (chains, draws, len(DATA))
    posterior = xr.Dataset(
        {"scale": (DIMS, rng.lognormal(size=shape)), "z": ((*DIMS, "z_dim_0"), rng.normal(size=(*shape, 2)))},
        coords={"data": DATA},
    )
    stats = xr.Dataset(
        {"diverging": (DIMS, np.zeros(shape, dtype=bool)), "energy": (DIMS, rng.normal(size=shape))},
        coords={"data": DATA},
    )
    return posterior, stats


def autocorrelated(rng: np.random.Generator, shape: tuple[int, ...], phi: float) -> np.ndarray:
    """Stationary AR(1) chains with standard normal marginal, draws along axis 1."""
    noise = rng.normal(size=shape)
    noise[:, 1:] *= np.sqrt(1.0 - phi**2)
    return lfilter([1.0], [1.0, -phi], noise, axis=1)


def only_middle_fails(result: xr.Dataset, *words: str) -> None:
    """The defect, planted in datum 11 alone, is found there alone and named."""
    assert result["is_reference"].values.tolist() == [True, False, True]
    assert result["reason"].values[[0, 2]].tolist() == ["", ""]
    for word in words:
        assert word in result["reason"].values[1]


def test_converged_posterior_passes() -> None:
    for seed in range(5):
        result = mcmc_convergence(*groups(seed=seed))
        assert result["is_reference"].all()
        assert (result["reason"] == "").all()
        assert result["data"].values.tolist() == DATA
        assert "not_recorded" not in result.attrs


def test_numbers_are_arviz_s_for_the_worst_latent() -> None:
    posterior, stats = groups()
    posterior["z"][:, :, 1, 1] = autocorrelated(np.random.default_rng(1), (4, 600), 0.6)
    result = mcmc_convergence(posterior, stats)
    for row in range(3):
        latents = [posterior["scale"].values[..., row], *np.moveaxis(posterior["z"].values[..., row, :], -1, 0)]
        rhat = max(float(array_stats.rhat(x)) for x in latents)
        bulk = min(float(array_stats.ess(x, method="bulk")) for x in latents)
        tail = min(float(array_stats.ess(x, method="tail", prob=(0.05, 0.95))) for x in latents)
        found = [float(result[name][row]) for name in ("rhat", "ess_bulk", "ess_tail")]
        np.testing.assert_allclose(found, [rhat, bulk, tail], rtol=1e-8)
    energy = np.moveaxis(stats["energy"].values, 2, 0)
    np.testing.assert_allclose(result["bfmi"], array_stats.bfmi(energy).min(1))


def test_ties_of_rejected_proposals_are_ranked_as_arviz_does() -> None:
    posterior, stats = groups()
    posterior["scale"][:] = np.repeat(posterior["scale"].values[:, ::4], 4, axis=1)
    result = mcmc_convergence(posterior[["scale"]], stats)
    np.testing.assert_allclose(result["rhat"][0], array_stats.rhat(posterior["scale"].values[..., 0]), rtol=1e-8)
    np.testing.assert_allclose(result["ess_bulk"][0], array_stats.ess(posterior["scale"].values[..., 0]), rtol=1e-8)


def test_shifted_chain_fails_by_rhat() -> None:
    posterior, stats = groups()
    posterior["z"][2, :, 1, 1] += 1.0
    only_middle_fails(mcmc_convergence(posterior, stats), "R-hat", "`z[1]`", "1.01")


def test_chain_of_other_width_fails_by_folded_rhat() -> None:
    posterior, stats = groups()
    posterior["z"][2, :, 1, 1] *= 3.0
    only_middle_fails(mcmc_convergence(posterior, stats), "R-hat", "`z[1]`")


def test_slow_chains_fail_by_ess() -> None:
    posterior, stats = groups(draws=1000)
    posterior["scale"][:, :, 1] = autocorrelated(np.random.default_rng(1), (4, 1000), 0.9)
    result = mcmc_convergence(posterior, stats)
    only_middle_fails(result, "bulk ESS", "`scale`", "400")
    assert result["ess_bulk"][1] < 400


def test_chains_sticking_in_the_tail_fail_by_tail_ess() -> None:
    """Each chain now and then stays in the upper tail: the bulk mixes well, the 95% quantile does not."""
    posterior, stats = groups(draws=1000)
    for chain in range(4):
        x = posterior["z"].values[chain, :, 1, 0]
        x[x > 1.6] = 0.0
        for start in (150, 550):
            x[start : start + 25] = 2.0 + 0.1 * np.random.default_rng(start).normal(size=25)
    only_middle_fails(mcmc_convergence(posterior, stats), "tail ESS", "`z[0]`", "400")


def test_stuck_chain_fails_as_constant() -> None:
    posterior, stats = groups()
    posterior["z"][3, :, 1, 0] = 0.25
    only_middle_fails(mcmc_convergence(posterior, stats), "constant chain", "`z[0]`")


def test_all_chains_constant_fails_as_constant() -> None:
    posterior, stats = groups()
    posterior["scale"][:, :, 1] = 1.0
    only_middle_fails(mcmc_convergence(posterior, stats), "constant chain", "`scale`")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_draw_that_is_not_finite_fails(value: float) -> None:
    posterior, stats = groups()
    posterior["z"][0, 17, 1, 1] = value
    only_middle_fails(mcmc_convergence(posterior, stats), "not finite", "`z[1]`")


def test_single_divergence_fails() -> None:
    posterior, stats = groups()
    stats["diverging"][1, 5, 1] = True
    result = mcmc_convergence(posterior, stats)
    only_middle_fails(result, "1 divergent transition")
    assert result["divergences"].values.tolist() == [0.0, 1.0, 0.0]


def test_low_energy_fraction_of_one_chain_fails() -> None:
    posterior, stats = groups()
    stats["energy"][1, :, 1] = autocorrelated(np.random.default_rng(1), (1, 600), 0.95)[0]
    result = mcmc_convergence(posterior, stats)
    only_middle_fails(result, "E-BFMI", "0.3")
    assert result["bfmi"][1] < 0.3


def test_energy_that_is_not_a_number_fails() -> None:
    posterior, stats = groups()
    stats["energy"][1, 3, 1] = np.nan
    only_middle_fails(mcmc_convergence(posterior, stats), "E-BFMI")


def test_several_reasons_are_all_given() -> None:
    posterior, stats = groups()
    posterior["z"][2, :, 1, 1] += 1.0
    stats["diverging"][1, 5:7, 1] = True
    only_middle_fails(mcmc_convergence(posterior, stats), "R-hat", "; ", "2 divergent transitions")


@pytest.mark.parametrize(
    ("chains", "draws", "reason"), [(3, 600, "3 chains"), (4, 499, "499 draws"), (1, 600, "1 chain")]
)
def test_short_runs_fail_whatever_they_hold(chains: int, draws: int, reason: str) -> None:
    result = mcmc_convergence(*groups(chains, draws))
    assert not result["is_reference"].any()
    assert all(reason in text for text in result["reason"].values)
    assert result["rhat"].isnull().all()


def test_entries_that_the_support_fixes_are_not_judged() -> None:
    """A Cholesky factor has zeros above its diagonal; a chain that stands still has them in one chain alone."""
    posterior, stats = groups()
    posterior["z"][..., 0] = 0.0
    result = mcmc_convergence(posterior, stats)
    assert result["is_reference"].all()
    assert np.isfinite(result["rhat"]).all()
    posterior["z"][1, :, 1, 0] = 0.5
    only_middle_fails(mcmc_convergence(posterior, stats), "constant chain in `z[0]`")
    posterior["z"][:, :, 1] = 0.0
    only_middle_fails(mcmc_convergence(posterior, stats), "constant chain in `z[0]` and")


def test_deterministics_are_not_judged() -> None:
    posterior, stats = groups()
    posterior["size"] = xr.zeros_like(posterior["scale"])
    assert not mcmc_convergence(posterior, stats)["is_reference"].any()
    posterior.attrs["latents"] = '["scale", "z"]'
    assert mcmc_convergence(posterior, stats)["is_reference"].all()


def test_latent_without_draws_is_refused() -> None:
    posterior, stats = groups()
    posterior.attrs["latents"] = '["scale", "z", "w"]'
    with pytest.raises(InferenceError, match="'w'"):
        mcmc_convergence(posterior, stats)


def test_shared_latent_and_joint_chain_count_for_every_datum() -> None:
    posterior, stats = groups()
    posterior["w"] = (("chain", "draw", "k"), np.random.default_rng(1).normal(size=(4, 600, 2)))
    joint = stats.isel(data=0, drop=True)
    assert mcmc_convergence(posterior, joint)["is_reference"].all()
    joint["diverging"][0, 0] = True
    assert (mcmc_convergence(posterior, joint)["divergences"] == 1).all()
    posterior["w"][0, :, 1] += 2.0
    result = mcmc_convergence(posterior, stats)
    assert not result["is_reference"].any()
    assert all("`w[1]`" in reason for reason in result["reason"].values)


def test_memory_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, stats = groups()
    whole = mcmc_convergence(posterior, stats)
    monkeypatch.setattr("calibrant.inference.trees._BLOCK_ELEMENTS", 1)
    xr.testing.assert_allclose(whole, mcmc_convergence(posterior, stats), rtol=1e-8)


def test_tree_with_the_group_keeps_it() -> None:
    posterior, stats = groups()
    gate = mcmc_convergence(posterior, stats).assign_attrs(mark=1)
    tree = xr.DataTree.from_dict({"posterior": posterior, "convergence": gate})
    assert convergence_of(tree).attrs["mark"] == 1


def test_foreign_tree_is_judged_by_its_draws() -> None:
    posterior, stats = groups()
    posterior["z"][2, :, 1, 1] += 1.0
    only_middle_fails(convergence_of(xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats})), "R-hat")
    bare = convergence_of(xr.DataTree.from_dict({"posterior": posterior}))
    only_middle_fails(bare, "R-hat")
    assert bare.attrs["not_recorded"] == "diverging, energy"
    assert bare["divergences"].isnull().all()
    assert bare["bfmi"].isnull().all()


def test_foreign_tree_of_shared_latents_takes_the_data_of_its_observations() -> None:
    posterior = xr.Dataset({"w": (("chain", "draw"), np.random.default_rng(0).normal(size=(4, 600)))})
    observed = xr.Dataset({"x": ("data", np.zeros(3))}, coords={"data": ["a", "b", "c"]})
    result = convergence_of(xr.DataTree.from_dict({"posterior": posterior, "observed_data": observed}))
    assert result["data"].values.tolist() == ["a", "b", "c"]
    assert result["is_reference"].all()


def test_foreign_tree_without_posterior_is_refused() -> None:
    with pytest.raises(InferenceError, match="no group `posterior`"):
        convergence_of(xr.DataTree.from_dict({"prior": groups()[0]}))


def test_exact_method_is_gated_by_its_grid_error() -> None:
    result = exact_convergence([0.001, 0.01, np.nan], [-3.0, -4.0, -5.0], DATA)
    assert result["is_reference"].values.tolist() == [True, False, False]
    assert result["reason"].values[0] == ""
    assert "0.01 sd" in result["reason"].values[1]
    assert result["log_evidence"].values.tolist() == [-3.0, -4.0, -5.0]
    assert all(result[name].isnull().all() for name in ("rhat", "ess_bulk", "ess_tail", "divergences", "bfmi"))


def test_settings_that_cannot_pass_are_refused() -> None:
    require_passable(4, 500)
    with pytest.raises(InferenceError, match="3 chains"):
        require_passable(3, 1000)
    with pytest.raises(InferenceError, match="499 draws"):
        require_passable(4, 499)
