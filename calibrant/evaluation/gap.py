"""What a guide's ELBO leaves of the log evidence, and why: its family, or its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from calibrant.binding import bind_fixed
from calibrant.data import Data
from calibrant.errors import InferenceError
from calibrant.guides import refine
from calibrant.inference.importance import importance
from calibrant.inference.posterior import posterior
from calibrant.inference.reference import exact_structure, log_evidence
from calibrant.inference.trees import model_sha256
from calibrant.program import Program, as_program, sites
from calibrant.progress import Progress, silent

Array = npt.NDArray[np.float64]


def gap(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    draws: int = 1000,
    steps: int = 500,
    lr: float = 0.05,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.Dataset:
    """Split log p(x) − ELBO of every datum into approximation and amortization gap.

    Cremer, Li & Duvenaud 2018, arXiv 1801.03558, equation 4: the approximation gap is what the best member of the
    family leaves, log p(x) − ELBO of the guide refined for this datum (`guides.refine`); the amortization gap is what
    one pass of the encoder leaves beyond that, ELBO refined − ELBO. A better encoder, more data or longer training help
    against the second alone, another family or structure against the first. Refining is an optimisation, so that the
    approximation gap is an upper bound and the amortization gap a lower one.

    Args:
        model: the program, in `eval()`.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`.
        covariates: keyword → tensor.
        draws: of both guides, a datum.
        steps: of `refine`.
        lr: of `refine`.
        seed: of the draws.
        progress: called with (stage, done, total, text).

    Returns:
        Dimension `data`, in nats, each with `…_se` (Monte Carlo standard error): `log_evidence`, `elbo`,
        `elbo_refined`, `gap` = `approximation_gap` + `amortization_gap`. The attribute `evidence` says whether the
        evidence is "exact" or by "importance" (of the refined guide's draws); then there is `pareto_k`, and where it is
        above the attribute `good_k`, the evidence and what is made of it can't be relied on (they tend to be too low).

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for a program with shared latents, whose ELBO is of all data together.
    """
    data, program = bind_fixed(model, observed, covariates), as_program(model)
    if shared := [n for n, site in sites(program, *data.batch(torch.arange(1))).items() if not site.local]:
        raise InferenceError(f"latents {shared} are shared: the ELBO and the evidence are of all data together")
    refined = refine(program, guide, data, steps=steps, lr=lr, seed=seed, progress=progress)
    # The same noise for both: what is common to them cancels in the difference.
    trees = [posterior(program, q, data, draws, seed=seed + 1, progress=progress) for q in (guide, refined)]
    amortized, best = (_log_weights(tree) for tree in trees)
    evidence, influence, extra = _evidence(program, data, trees[1], best)
    terms = {
        "log_evidence": evidence + influence,
        "elbo": amortized,
        "elbo_refined": best,
        "gap": evidence + influence - amortized,
        "approximation_gap": evidence + influence - best,
        "amortization_gap": best - amortized,
    }
    variables = {name: ("data", values.mean(1)) for name, values in terms.items()}
    variables |= {f"{n}_se": ("data", values.std(1, ddof=1) / np.sqrt(draws)) for n, values in terms.items()}
    attrs = {
        "evidence": "exact" if extra is None else "importance",
        "draws": draws,
        "steps": steps,
        "seed": seed,
        "model_sha256": model_sha256(program),
        **({} if extra is None else extra.attrs),
    }
    result = xr.Dataset(variables, coords={"data": data.labels()}, attrs=attrs)
    return result if extra is None else result.assign(pareto_k=extra["pareto_k"])


def _log_weights(tree: xr.DataTree) -> Array:
    """log p − log q, `(data, draw)`: their mean is the ELBO."""
    stats = tree["sample_stats"].dataset
    return (stats["log_p"] - stats["log_q"]).isel(chain=0).transpose("data", "draw").values


def _evidence(
    program: Program, data: Data, refined: xr.DataTree, log_weights: Array
) -> tuple[Array, Array, xr.Dataset | None]:
    """The log evidence `(data, 1)`, its influences `(data, draw)`, and k-hat where it is by importance sampling.

    An influence is what a draw adds to the estimate to first order: their mean is zero, and their spread the error,
    also of differences from what else is made of the same draws.
    """
    if exact_structure(program, data) is not None:
        return log_evidence(program, data).numpy()[:, None], np.zeros_like(log_weights), None
    found = importance(refined)["importance"].to_dataset()
    evidence = found["log_evidence"].values[:, None]
    return evidence, np.exp(log_weights - evidence) - 1, found
