"""Trees of correlated Normal posteriors with planted defects, for comparisons."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.signal import lfilter

from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.inference.references.gate import exact_convergence

LATENTS = 5  # `scale` and `z[0..3]`, in this order, in arrays over latents


def tree(
    rng: np.random.Generator,
    data: Sequence[Any] | int = 32,
    draws: int = 1000,
    chains: int = 1,
    *,
    phi: float = 0.0,
    rho: float = 0.4,
    skewed: bool = False,
    factor: Any = 1.0,
    shift: Any = 0.0,
    failing: Sequence[Any] | None = (),
    latents: int = LATENTS,
) -> xr.DataTree:
    """Draws of a correlated normal posterior for each datum, independent or (phi > 0) AR(1).

    `factor` and `shift` (in posterior sd) are defects, broadcast to `(data, latent)`. Posteriors and observations
    depend on the label alone. `failing` data fail the gate; None leaves the group `convergence` out.
    """
    labels = list(range(data)) if isinstance(data, int) else list(data)
    order = np.array([int(str(label).strip("d")) for label in labels], dtype=float)[:, None]
    x = rng.normal(size=(chains, draws, len(labels), latents))
    if phi:
        x[:, 1:] *= np.sqrt(1.0 - phi**2)
        x = lfilter([1.0], [1.0, -phi], x, axis=1)
    x = x @ np.linalg.cholesky((1.0 - rho) * np.eye(latents) + rho).T
    x = np.exp(0.5 * x) - np.exp(0.125) if skewed else x
    x = 10.0 * np.sin(order) + np.exp(np.cos(order)) * (shift + factor * x)
    dims = ("chain", "draw", "data")
    attrs = {
        "model_sha256": "ab" * 32,
        "method": "test",
        "independent_draws": int(not phi),
        "latents": '["scale", "z"]',
    }
    posterior = xr.Dataset(
        {"z": ((*dims, "z_dim_0"), x[..., 1:].astype("float32")), "scale": (dims, x[..., 0].astype("float32"))},
        coords={"data": labels},
        attrs=attrs,
    )
    observed = xr.Dataset({"x": (("data", "x_dim_0"), np.hstack([order, order + 1]))}, coords={"data": labels})
    groups = {"posterior": posterior, "observed_data": observed}
    if failing is not None:
        errors = [0.5 if label in failing else 0.0 for label in labels]
        groups["convergence"] = exact_convergence(errors, np.zeros(len(labels)), labels)
    return xr.DataTree.from_dict(groups)


def found(result: xr.Dataset, site: str, quantity: str) -> Verdict:
    (verdict,) = [v for v in verdicts(result) if (v.site, v.quantity) == (site, quantity)]
    return verdict
