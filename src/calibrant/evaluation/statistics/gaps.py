"""The gap between log evidence and ELBO of a guide, split into the parts of its family and of its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.joining import check_same_problem
from calibrant.inference.bounds.evidence import Evidence, evidence
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan, reference_of
from calibrant.inference.refining import LR, refined_of
from calibrant.inference.reweighting import log_weights
from calibrant.inference.trees import data_labels, model_sha256
from calibrant.program.contract import Program
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

Array = npt.NDArray[np.float64]

MAX_SE = 0.1  # largest standard error of a log evidence that is reported, in nats


def gap(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    reference: xr.DataTree | None = None,
    *,
    covariates: Mapping[str, Any] | None = None,
    draws: int = 1000,
    steps: int = 500,
    lr: float = LR,
    max_se: float = MAX_SE,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Split log p(x) − ELBO of every datum into approximation and amortization gap.

    With q the guide, q* the guide refined for the datum (`guides.refine`) and ELBO(q) = E_q[log p(x, z) − log q(z | x)]
    (Cremer, Li & Duvenaud 2018, arXiv 1801.03558):

        gap           = log p(x) − ELBO(q)    = KL(q ‖ p)
        approximation = log p(x) − ELBO(q*)   = KL(q* ‖ p)
        amortization  = ELBO(q*) − ELBO(q)

    Another family or structure reduces the approximation gap; a larger encoder, more data or longer training reduces
    the amortization gap.

    q* is found by an optimisation over elementwise affine maps, on the line, of q's continuous latents. So, up to its
    error, `approximation` is an upper bound of the gap that the best of these maps would leave, and `amortization` a
    lower bound of the gain. If the maps reach the whole family, as for independent Normals, Laplaces and LogNormals,
    the bounds are about the best member of the family. Properties that no map changes stay as the encoder gave them and
    count as approximation: correlations, shapes, a flow's bends, angles, directions, probabilities of discrete latents.
    A map may also lead out of a family (Gamma, Beta), to a smaller gap than that of its best member.

    log p(x) is exact if the reference is (closed form or quadrature). Otherwise it is estimated by bridge sampling
    between draws of q* and of the reference (`inference.evidence.bridge`), or, if these are too far from each other,
    between a Normal fitted to half of the reference draws and the other half.

    Args:
        model: the program, in `eval()`, without shared latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`.
        reference: a tree of `inference.reference`, joined on the coordinate `data`; None to sample it.
        covariates: keyword → tensor.
        draws: number of draws per datum of the guide, and of the refined guide.
        steps: number of gradient steps of `refine`.
        lr: initial learning rate of `refine`.
        max_se: largest standard error, in nats, with which an estimated log evidence is reported; 0.1 corresponds to
            about a hundred effective draws, and with fewer the error itself is not known.
        seed: random seed for the refinement and the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimension `data` (the data that the reference has), in nats, each with `…_se` (Monte Carlo standard error, for
        differences that of paired draws): `log_evidence`, `elbo`, `elbo_refined`, `gap`, `approximation`,
        `amortization`. `method` is the method that gave log p(x): "exact", "bridge" or "normal bridge". If the
        reference fails the gate, or no bridge has an error below `max_se`, `method` is empty, `reason` says why, and
        all variables that need log p(x) are NaN. These data are not a random part: they tend to have large gaps.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract, and for a guide without a
            continuous local site, which can't be refined.
        InferenceError: for a program with shared latents; a reference of other data or weights.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed, covariates)
    return gap_of(problem, reference, draws, steps, lr, max_se, seed, progress)


def gap_of(
    problem: Problem,
    reference: xr.DataTree | None = None,
    draws: int = 1000,
    steps: int = 500,
    lr: float = LR,
    max_se: float = MAX_SE,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.Dataset:
    """Split the gap, like `gap`, for a problem that is already checked."""
    program, of = problem.program, partial(stream, seed, "gap")
    problem.require_local(
        "evidence and ELBO are those of all data together, so that no datum has its own gap",
        "to split the gap of the local latents",
    )
    if reference is None:
        reference = reference_of(program, problem.data, ReferencePlan(), seed=of("reference"), progress=progress)
    problem = problem.of_some(with_reference(problem.data, reference))
    data, noise = problem.data, of("posterior")
    tree = posterior_of(problem, draws, seed=noise, progress=progress)
    check_same_problem(tree, reference)
    refined = refined_of(problem, steps, lr, of("refine"), progress)
    # Both guides get the same noise, which cancels in their difference.
    other = posterior_of(problem.with_guide(refined), draws, seed=noise, progress=progress)
    amortized, best = log_weights(tree), log_weights(other)
    found = evidence(program, refined, data, reference, best, max_se, of("bridge"))
    progress("gap", len(data), len(data))
    attrs = {"draws": draws, "steps": steps, "seed": seed, "max_se": max_se, "model_sha256": model_sha256(program)}
    return _split(found, amortized, best).assign_coords(data=data.labels()).assign_attrs(attrs)


def with_reference(data: Data, reference: xr.DataTree) -> Data:
    kept = np.isin(data.labels(), data_labels(reference))
    if not kept.any():
        raise InferenceError(
            f"the reference has none of the data: `data` is {data.labels()[:3].tolist()}… here and "
            f"{data_labels(reference)[:3].tolist()}… in the reference; compute it for these data (or give `index=`)"
        )
    return data[kept]


def _split(found: Evidence, amortized: Array, best: Array) -> xr.Dataset:
    """Estimates, with standard errors from the influence of the guide's draws and of the reference draws."""
    known, elbo, refined = found.log_evidence, amortized.mean(1), best.mean(1)
    terms = {
        "log_evidence": (known, found.influence, found.variance),
        "elbo": (elbo, amortized, 0.0),
        "elbo_refined": (refined, best, 0.0),
        "gap": (known - elbo, found.influence - amortized, found.variance),
        "approximation": (known - refined, found.influence - best, found.variance),
        "amortization": (refined - elbo, best - amortized, 0.0),
    }
    variables: dict[str, Any] = {
        "method": ("data", found.method.astype(str)),
        "reason": ("data", found.reason.astype(str)),
    }
    with np.errstate(invalid="ignore"):  # the ELBO is −∞ if a guide leaves the support
        for name, (value, influence, rest) in terms.items():
            error = np.sqrt(influence.var(1, ddof=1) / influence.shape[1] + rest)
            variables[name] = ("data", value)
            variables[f"{name}_se"] = ("data", np.where(np.isnan(value), np.nan, error))
    return xr.Dataset(variables)
