"""Write the stored inputs and results of `tests/test_golden.py`, by implementations that are independent of ours.

Run by hand, from anywhere: `python make_golden.py [ranks|weights|c2st …]`; without arguments all three are written. It
imports nothing of calibrant.

- `weights.json` needs numpy, Pyro and arviz-stats: k-hat by Pyro's fit of the generalised Pareto distribution, by
  arviz-stats and, with smoothed weights, by the code below, written from the formulas of Vehtari, Simpson, Gelman, Yao
  & Gabry (2024, JMLR 25(72)) and Zhang & Stephens (2009, Technometrics 51(3)).
- `c2st.json` needs scikit-learn: cross-validated accuracies by its `KernelRidge` on features that the code below spells
  out, and a null distribution of permutations of its own.
- `ranks.json` needs sbi 0.27: ranks of its simulation-based calibration, and coverage of its TARP.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

Array = np.ndarray


def write(name: str, content: dict[str, Any]) -> None:
    path = Path(__file__).parent / f"{name}.json"
    path.write_text(json.dumps(content) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


# -- weights -----------------------------------------------------------------------------------------------------------


def weights() -> None:
    """Log weights of Normals whose sd is so many times the posterior's, of one with outliers, and of a uniform."""
    rng = np.random.default_rng(1)
    rows = [0.5 * (1.0 - sd**2) * rng.standard_normal(400) ** 2 for sd in (0.5, 0.7, 0.9, 1.2, 2.0)]
    rows.append(2.5 * rng.standard_exponential(400) - 700.0)
    rows.append(np.log(rng.random(400)) + 3.0)
    stored = np.round(rows, 5)
    found = [own_psis(row) for row in stored]
    write(
        "weights",
        {
            "log_weights": stored.tolist(),
            "khat_own": [khat for _, khat in found],
            "khat_pyro": [pyro_khat(row) for row in stored],
            "khat_arviz": [arviz_khat(row) for row in stored],
            "ess": [float(w.sum() ** 2 / (w**2).sum()) for w, _ in found],
        },
    )


def own_psis(log_weights: Array) -> tuple[Array, float]:
    """Smoothed weights, not normalised, and k-hat."""
    ratios = np.exp(log_weights - log_weights.max())
    size, order = len(ratios), np.argsort(ratios)
    tail = int(np.ceil(min(0.2 * size, 3.0 * size**0.5)))
    largest, threshold = ratios[order[-tail:]], ratios[order[-tail - 1]]
    khat, scale = fitted(largest - threshold)
    smoothed = ratios.copy()
    for place, index in enumerate(order[-tail:]):
        level = (place + 0.5) / tail
        quantile = threshold + scale / khat * ((1.0 - level) ** -khat - 1.0)
        smoothed[index] = min(quantile, ratios.max())
    return smoothed, khat


def fitted(exceedances: Array) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution; the shape is drawn to 1/2 by ten observations."""
    x = np.sort(exceedances)
    n = len(x)
    grid = 30 + int(n**0.5)
    quartile = x[int(n / 4 + 0.5) - 1]
    theta = [1.0 / x[-1] + (1.0 - (grid / (j - 0.5)) ** 0.5) / (3.0 * quartile) for j in range(1, grid + 1)]
    shapes = [np.mean(np.log1p(-t * x)) for t in theta]
    profile = [n * (np.log(-t / k) - k - 1.0) for t, k in zip(theta, shapes, strict=True)]
    chance = [1.0 / sum(np.exp(other - here) for other in profile) for here in profile]
    mean = sum(t * c for t, c in zip(theta, chance, strict=True))
    shape = float(np.mean(np.log1p(-mean * x)))
    return (n * shape + 10 * 0.5) / (n + 10), -shape / mean


def pyro_khat(log_weights: Array) -> float:
    import torch
    from pyro.ops.stats import fit_generalized_pareto

    ratios = np.sort(np.exp(log_weights - log_weights.max()))
    tail = int(np.ceil(min(0.2 * len(ratios), 3.0 * len(ratios) ** 0.5)))
    return float(fit_generalized_pareto(torch.as_tensor(ratios[-tail:] - ratios[-tail - 1]))[0])


def arviz_khat(log_weights: Array) -> float:
    from arviz_stats.base import array_stats

    return float(array_stats.psislw(-log_weights)[1])


# -- the classifier two-sample test ------------------------------------------------------------------------------------


def c2st() -> None:
    """Equal posteriors, a narrow guide, a bias, and a correlation ignored: three latents, 80 draws of each side."""
    rng = np.random.default_rng(2)
    post, ref = rng.standard_normal((2, 4, 80, 3))
    post[1] *= 0.5
    post[2] += np.array([0.8, 0.0, 0.0])
    ref[3, :, 1] = 0.9 * ref[3, :, 0] + np.sqrt(0.19) * ref[3, :, 1]
    ref[:, :, 2] = np.exp(ref[:, :, 2])
    post[:, :, 2] = np.exp(post[:, :, 2])
    post, ref = np.round(post, 4), np.round(ref, 4)
    cases = [classified(*pair, rng) for pair in zip(post, ref, strict=True)]
    results = {name: [case[name] for case in cases] for name in cases[0]}
    write("c2st", {"post": post.tolist(), "ref": ref.tolist(), "permutations": PERMUTATIONS, **results})


PERMUTATIONS = 2000


def classified(post: Array, ref: Array, rng: np.random.Generator) -> dict[str, float]:
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    similarity = features(np.vstack([post, ref]))
    side = np.array([1.0] * len(post) + [-1.0] * len(ref))
    folds = np.array([draw // (len(post) // 5) for draw in range(len(post))] * 2)
    permuted = np.empty((len(side), PERMUTATIONS))
    for column in range(PERMUTATIONS):
        for fold in range(5):
            permuted[folds == fold, column] = rng.permutation(side[folds == fold])
    labels = np.column_stack([side, permuted])
    classifier = KernelRidge(alpha=10.0, kernel="precomputed")
    scores = cross_val_predict(classifier, similarity, labels, cv=PredefinedSplit(folds))
    accuracy = (np.sign(scores) == labels).mean(0)
    statistic = np.array(
        [np.corrcoef(np.r_[s, -s], np.r_[y, -y])[0, 1] for s, y in zip(scores.T, labels.T, strict=True)]
    )
    return {
        "accuracy": float(accuracy[0]),
        "null": float(accuracy[1:].mean()),
        "null_sd": float(accuracy[1:].std(ddof=1)),
        "p": float((statistic[1:] >= statistic[0]).mean()),
    }


def features(draws: Array) -> Array:
    """Sums of products of explicit features, where there are finitely many."""
    from scipy.spatial.distance import pdist, squareform
    from scipy.stats import norm, rankdata
    from sklearn.covariance import LedoitWolf
    from sklearn.preprocessing import PolynomialFeatures

    scores = norm.ppf((rankdata(draws, axis=0) - 0.5) / len(draws))
    factors = [1.0, 2.0, 6.0, 24.0]
    hermite = [np.polynomial.hermite_e.hermeval(scores, [0.0] * n + [1.0]) / f**0.5 for n, f in enumerate(factors, 1)]
    covariance = LedoitWolf().fit(scores).covariance_
    white = scores @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    powers = PolynomialFeatures(2, include_bias=False).fit(white)
    quadratic = powers.transform(white) * np.where((powers.powers_ == 1).sum(1) == 2, 2.0**0.5, 1.0)
    quadratic = quadratic[:, powers.powers_.sum(1) == 2]
    distances = pdist(white, "sqeuclidean")
    gaussian = squareform(np.exp(-distances / np.median(distances))) + np.eye(len(draws))
    centre = np.eye(len(draws)) - 1.0 / len(draws)
    parts = [
        centre @ part @ centre
        for part in (np.hstack(hermite) @ np.hstack(hermite).T, quadratic @ quadratic.T, gaussian)
    ]
    return sum(part / part.trace() for part in parts) * len(draws) / 3.0


# -- ranks and TARP ----------------------------------------------------------------------------------------------------


def ranks() -> None:
    """Of 60 simulations with two latents, 30 draws each; the first guide of two sds is too narrow."""
    import torch
    from sbi.diagnostics.sbc import _run_sbc
    from sbi.diagnostics.tarp import _run_tarp

    rng = np.random.default_rng(3)
    truth = np.round(rng.standard_normal((60, 2)), 3)
    draws = np.round(rng.standard_normal((30, 60, 2)) * np.array([0.6, 1.0]), 3)
    draws[0, :5] = truth[:5]  # ties
    references = np.round(rng.uniform(-3.0, 3.0, (60, 2)), 3)
    scale = np.array([1.0, 2.5])
    tensors = [torch.as_tensor(values) for values in (truth, draws, references)]
    found = _run_sbc(tensors[0], tensors[0], tensors[1], show_progress_bar=False)
    coverage: list[torch.Tensor] = []
    histogram = torch.histogram

    def record(values: torch.Tensor, **options: Any) -> Any:
        coverage.append(values)
        return histogram(values, **options)

    scaled = [tensors[i] / torch.as_tensor(scale) for i in (1, 0, 2)]
    with mock.patch("torch.histogram", record):
        _run_tarp(*scaled)
    write(
        "ranks",
        {
            "truth": truth.tolist(),
            "draws": draws.tolist(),
            "references": references.tolist(),
            "scale": scale.tolist(),
            "sbc_ranks": found.int().tolist(),
            "tarp_coverage": coverage[0].tolist(),
        },
    )


if __name__ == "__main__":
    for part in sys.argv[1:] or ["weights", "c2st", "ranks"]:
        {"weights": weights, "c2st": c2st, "ranks": ranks}[part]()
