"""The classifier two-sample test on draws whose distributions are known."""

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import xarray as xr
from agreement import limit
from scipy.signal import lfilter
from scipy.stats import chi2, norm

from calibrant.errors import InferenceError
from calibrant.evaluation import c2st
from calibrant.evaluation.statistics.classifier import held_out, kernel
from calibrant.inference.references.gate import exact_convergence

Array = np.ndarray


def tree(draws: Array, independent: bool = True, failing: tuple[int, ...] = (), **attrs: str) -> xr.DataTree:
    """A tree of draws `(chain, draw, data, latent)` of the site `z`; data are labelled 100, 101, …"""
    labels = 100 + np.arange(draws.shape[2])
    posterior = xr.Dataset(
        {"z": (("chain", "draw", "data", "z_dim_0"), draws)},
        coords={"data": labels},
        attrs={"independent_draws": int(independent), "latents": '["z"]', **attrs},
    )
    gate = exact_convergence(np.isin(labels, failing).astype(float), np.zeros(len(labels)), labels)
    return xr.DataTree.from_dict({"posterior": posterior, "convergence": gate})


def normal(seed: int, draws: int, data: int, latents: int) -> Array:
    return np.random.default_rng(seed).standard_normal((1, draws, data, latents))


def chains(seed: int, draws: int, data: int, latents: int, phi: float) -> Array:
    """Four chains of standard Normals with autocorrelation phi."""
    x = np.random.default_rng(seed).standard_normal((4, draws, data, latents))
    x[:, 1:] *= np.sqrt(1.0 - phi**2)
    return np.asarray(lfilter([1.0], [1.0, -phi], x, axis=1))


# -- the p-value -------------------------------------------------------------------------------------------------------

REPETITIONS = 200


def not_uniform(p: Array) -> float:
    """How far p-values are from uniform in mean, spread and the share below .05, in units of the limit.

    A mean off by .13, a mean square deviation from ½ off by .033, and a share of 16% instead of 5%, are seen with 95%
    power.
    """
    statistics = ((p - 0.5) * np.sqrt(12.0), ((p - 0.5) ** 2 - 1.0 / 12.0) * np.sqrt(180.0))
    below = ((p <= 0.05).mean() - 0.05) / np.sqrt(0.05 * 0.95 / len(p))
    return max(*(abs(s.mean()) * np.sqrt(len(p)) for s in statistics), abs(below)) / limit(3)


def test_p_values_are_uniform_for_equal_posteriors() -> None:
    draws = normal(0, 160, REPETITIONS, 2)
    skewed = np.exp(draws @ np.array([[1.0, 0.6], [0.0, 0.8]]))
    result = c2st(tree(skewed[:, :80]), tree(skewed[:, 80:]), permutations=99)
    assert not_uniform(result["c2st_p"].values) < 1
    z = (result["c2st"] - result["c2st_null"]) / result["c2st_null_sd"]
    assert abs(float(z.mean())) < limit(1) / np.sqrt(REPETITIONS)
    assert (result["c2st_draws"] == 80).all()
    assert not result["c2st_flagged"].any()


def test_p_values_are_uniform_for_a_markov_chain_after_thinning() -> None:
    """Planted: slower chains, as if they were independent."""
    ref, post = chains(1, 500, REPETITIONS, 2, 0.9), tree(normal(2, 100, REPETITIONS, 2))
    thinned = c2st(post, tree(ref, independent=False), permutations=99)
    assert not_uniform(thinned["c2st_p"].values) < 1
    assert 20 < thinned["c2st_draws"].mean() < 100
    ref, post = chains(1, 500, 100, 2, 0.99), tree(normal(2, 100, 100, 2))
    assert not_uniform(c2st(post, tree(ref), permutations=99)["c2st_p"].values) > 1


def test_thinning_follows_the_slowest_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each latent has the draws' full effective size; their spread, or their common part, is slow."""
    rng = np.random.default_rng(0)
    slow = chains(3, 1000, 1, 1, 0.95)[:, :, 0]
    effective = import_module("calibrant.evaluation.statistics.classifier")._effective
    signs = rng.choice([-1.0, 1.0], slow.shape)
    assert effective(np.exp(0.7 * slow) * signs) < 300
    noise = rng.standard_normal((4, 1000, 6))
    assert effective(0.8 * slow + 2.0 * noise) < 600
    assert 2000 < effective(noise) <= 4000


# -- power -------------------------------------------------------------------------------------------------------------


def narrow(draws: Array) -> tuple[Array, float]:
    """An sd of 0.8; the densities cross at ±c."""
    c = np.sqrt(np.log(0.8**-2) / (0.8**-2 - 1.0))
    return 0.8 * draws, 0.5 + norm.cdf(c / 0.8) - norm.cdf(c)


def uncorrelated(draws: Array) -> tuple[Array, float]:
    """Without the correlation of .8, whose log density ratio has opposite signs along the two diagonals."""
    white = draws @ np.linalg.inv([[1.0, 0.8], [0.0, 0.6]])
    grid = np.stack(np.meshgrid(*[np.linspace(-8, 8, 801)] * 2), -1).reshape(-1, 2)
    ours = norm.pdf(grid).prod(1)
    theirs = norm.pdf(grid[:, 0]) * norm.pdf(grid[:, 1], 0.8 * grid[:, 0], 0.6)
    return white, 0.5 * float(np.maximum(ours, theirs).sum() / 50.0**2)


def one_mode(draws: Array) -> tuple[Array, float]:
    """Of two modes far apart only one."""
    return np.abs(draws), 0.75


def uniform(draws: Array) -> tuple[Array, float]:
    """Standard Normals made uniform, of the same mean and standard deviation."""
    grid = np.linspace(-8.0, 8.0, 100_001)
    box = (np.abs(grid) < np.sqrt(3.0)) / np.sqrt(12.0)
    return np.sqrt(12.0) * (norm.cdf(draws) - 0.5), 0.5 * float(np.maximum(box, norm.pdf(grid)).mean() * 16.0)


def references(defect: Callable[[Array], tuple[Array, float]], seed: int, count: int, data: int) -> Array:
    """Draws of the posterior in which the defect is one."""
    draws = normal(seed, count, data, 2 if defect is uncorrelated else 1)
    if defect is uncorrelated:
        return draws @ np.array([[1.0, 0.8], [0.0, 0.6]])
    return 2.0 * np.sign(draws) + 0.3 * normal(seed + 1, count, data, 1) if defect is one_mode else draws


@pytest.mark.parametrize(
    ("defect", "count", "share"),
    [(narrow, 500, 0.6), (uncorrelated, 250, 0.7), (one_mode, 250, 0.8), (uniform, 500, 0.4)],
)
def test_defects_are_found(defect: Callable[[Array], tuple[Array, float]], count: int, share: float) -> None:
    """Accuracies lie between `share` of the way from 1/2 to the best classifier's and that; p-values are small.

    A single datum is seen at 5% with a power of 95% or more: 5 of 7 are missed less than once in 100,000.
    """
    wrong, best = defect(references(defect, 1, count, 7))
    result = c2st(tree(wrong), tree(references(defect, 9, count, 7)), permutations=99)
    assert (result["c2st_p"] <= 0.05).sum() > 2
    mean, se = float(result["c2st"].mean()), float(result["c2st"].std(ddof=1)) / np.sqrt(7.0)
    assert 0.5 + share * (best - 0.5) - limit(2) * se < mean < best + limit(2) * se


def test_accuracy_is_that_of_the_best_classifier() -> None:
    """Normals at a distance of d: Φ(d / 2), which ridge regression comes within .015 of; .045 are seen."""
    post, ref = normal(1, 200, 40, 1), normal(2, 200, 40, 1)
    for distance in (1.0, 2.0):
        found = c2st(tree(post + distance), tree(ref), permutations=20)["c2st"]
        se = float(found.std(ddof=1)) / np.sqrt(40.0)
        assert se < 0.005
        off = float(found.mean()) - norm.cdf(distance / 2.0)
        assert -0.015 - limit(2) * se < off < limit(2) * se


def test_one_wrong_datum_is_flagged_among_many() -> None:
    """200 permutations alone could not: 1/201 is beyond the first step of Benjamini and Hochberg, .1/60."""
    post, ref = normal(1, 100, 60, 2), normal(2, 100, 60, 2)
    post[:, :, 7] += 1.5
    result = c2st(tree(post), tree(ref), seed=1)
    assert result["data"].values[result["c2st_flagged"].values].tolist() == [107]
    assert float(result["c2st_p"].sel(data=107)) == pytest.approx(1 / 601)


def test_a_narrow_direction_is_seen() -> None:
    """Two latents that are nearly one, and a bias of a tenth of their sd across."""
    mix = np.array([[1.0, 1.0], [0.1, -0.1]])
    post, ref = normal(1, 200, 4, 2) @ mix, normal(2, 200, 4, 2) @ mix
    assert (c2st(tree(post + np.array([0.05, -0.05])), tree(ref), permutations=99)["c2st_p"] < 0.05).all()


# -- the classifier ----------------------------------------------------------------------------------------------------


def test_held_out_scores_are_those_of_fits_without_the_fold() -> None:
    draws, side, fold = normal(0, 80, 1, 3)[0, :, 0], np.repeat([1.0, -1.0], 40), np.tile(np.arange(40) // 8, 2)
    similarity = kernel(draws).astype(np.float64)
    similarity = (similarity + similarity.T) / 2.0  # its rounding errors are not symmetric
    scores = held_out(similarity, fold) @ side
    for part in range(5):
        test, train = fold == part, fold != part
        weights = np.linalg.solve(similarity[np.ix_(train, train)] + 10.0 * np.eye(train.sum()), side[train])
        np.testing.assert_allclose(scores[test], similarity[np.ix_(test, train)] @ weights, atol=1e-9)


def test_single_precision_loses_nothing() -> None:
    """Of 50 latents on 1,000 draws, the weights of the scores in float64 agree to 1e-5 of the largest."""
    draws, fold = normal(0, 1000, 1, 50)[0, :, 0], np.tile(np.arange(500) // 100, 2)
    similarity = kernel(draws)
    exact = held_out(similarity.astype(np.float64), fold)
    assert similarity.dtype == held_out(similarity, fold).dtype == np.float32
    assert abs(held_out(similarity, fold) - exact).max() < 1e-5 * abs(exact).max()


def test_permuted_labels_are_uniform_within_folds() -> None:
    """All 20 ways to label 6 draws, 3 on each side, are equally likely, in each fold by itself."""
    permuted = import_module("calibrant.evaluation.statistics.classifier")._permuted
    side, fold = np.repeat(np.array([1.0, -1.0], dtype=np.float32), 6), np.tile([0, 0, 0, 1, 1, 1], 2)
    labels = permuted(side, fold, 20_000, np.random.default_rng(0))
    assert set(np.unique(labels)) == {-1.0, 1.0}
    bits = 1 << np.arange(6)
    first, second = (bits @ (labels[fold == part] > 0) for part in range(2))
    for codes in (first, second):
        found, counts = np.unique(codes, return_counts=True)
        assert len(found) == 20
        assert ((counts - 1000.0) ** 2 / 1000.0).sum() < chi2.ppf(1.0 - 1e-5 / 3, 19)
    _, both = np.unique(64 * first + second, return_counts=True)
    assert ((both - 50.0) ** 2 / 50.0).sum() < chi2.ppf(1.0 - 1e-5 / 3, 399)
    assert len(both) == 400


def test_only_ranks_count_and_no_side_is_preferred() -> None:
    post, ref = normal(1, 100, 3, 2) * 0.7, normal(2, 100, 3, 2)
    result, swapped = c2st(tree(post), tree(ref)), c2st(tree(ref), tree(post))
    stretched = c2st(tree(np.exp(3.0 * post)), tree(np.exp(3.0 * ref)))
    np.testing.assert_array_equal(result["c2st"], swapped["c2st"])
    xr.testing.assert_identical(result, stretched)
    xr.testing.assert_identical(result, c2st(tree(post), tree(ref)))
    assert not result.equals(c2st(tree(post), tree(ref), seed=1))


# -- trees -------------------------------------------------------------------------------------------------------------


def test_data_are_joined_and_those_without_reference_left_out() -> None:
    post, ref = normal(1, 100, 6, 2), normal(2, 100, 6, 2)
    ref[:, 3, 2] = np.nan
    result = c2st(tree(post).isel(data=[4, 3, 2, 1]), tree(ref, failing=(103,)))
    assert result["data"].values.tolist() == [104, 101]
    assert (result["c2st_draws"] == 100).all()
    none = c2st(tree(post), tree(ref, failing=tuple(range(100, 106))))
    assert none.sizes["data"] == 0


def test_too_few_independent_draws_are_not_tested() -> None:
    """Draws resampled by importance, nearly all of them copies of one."""
    post, ref = normal(1, 400, 2, 1), normal(2, 400, 2, 1)
    post[:, :, 0] = post[:, np.arange(400) // 50, 0]
    result = c2st(tree(post, independent=False), tree(ref))
    assert result["c2st_draws"].values[0] < 20 < result["c2st_draws"].values[1]
    assert np.isnan(result["c2st"].values).tolist() == [True, False]
    assert not result["c2st_flagged"].values[0]


def test_discrete_and_shared_latents_are_left_out() -> None:
    def with_others(draws: Array, seed: int) -> xr.DataTree:
        result = tree(draws, latents='["k", "w", "z"]')
        rng = np.random.default_rng(seed)
        dims = ("chain", "draw", "data")
        k = (dims, rng.integers(0, 1 + 4 * seed, draws.shape[:3]))
        result["posterior"] = xr.DataTree(
            result["posterior"].to_dataset().assign(k=k, w=(dims[:2], seed + rng.random(draws.shape[:2])))
        )
        return result

    post, ref = normal(1, 100, 3, 2), normal(2, 100, 3, 2)
    xr.testing.assert_identical(c2st(with_others(post, 0), with_others(ref, 1)), c2st(tree(post), tree(ref)))


def test_bad_input_is_refused() -> None:
    post, ref = normal(1, 100, 3, 2), normal(2, 100, 3, 2)
    with pytest.raises(InferenceError, match="different models"):
        c2st(tree(post, model_sha256="a"), tree(ref, model_sha256="b"))
    for options in ({"folds": 1}, {"permutations": 3}, {"fdr": 0.0}):
        with pytest.raises(InferenceError, match=next(iter(options))):
            c2st(tree(post), tree(ref), **options)
    with pytest.raises(InferenceError, match="none is local and continuous"):
        c2st(tree(np.rint(post)), tree(np.rint(ref)))
    post[0, 5, 1, 1] = np.nan
    with pytest.raises(InferenceError, match=r"not finite in `z\[1\]` for datum 101$"):
        c2st(tree(post), tree(ref))


def test_entries_that_the_support_fixes_are_left_out() -> None:
    """The upper triangle of a Cholesky factor is the same in all draws; planted: another sd of one free entry."""
    free = normal(11, 400, 4, 3)
    fixed = np.concatenate((free, np.zeros_like(free[..., :1])), axis=-1)
    fair = c2st(tree(fixed[:, :200]), tree(fixed[:, 200:]), permutations=99)
    assert fair.identical(c2st(tree(free[:, :200]), tree(free[:, 200:]), permutations=99))
    assert fair.sizes["data"] == 4
    assert not fair["c2st_flagged"].any()
    assert c2st(tree(fixed[:, :200] * [1, 1, 3, 1]), tree(fixed[:, 200:]), permutations=99)["c2st_flagged"].all()
