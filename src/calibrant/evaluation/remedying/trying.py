"""Remedies that could make a guide better, tried on the data of a check and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.evaluation.remedying.measuring import GUIDE, REFINED, RESAMPLED, Bench, Tried, results_table
from calibrant.evaluation.remedying.richer import TrainingData, encoder_kind, richer_guides, trained_guide
from calibrant.evaluation.statistics.gaps import with_reference
from calibrant.inference.problem import Problem
from calibrant.inference.refining import LR, refined_of
from calibrant.inference.trees import model_sha256
from calibrant.program.contract import Program
from calibrant.program.latents import sites
from calibrant.progress import Progress, prefixed, reporting, silent
from calibrant.streams import stream


def remedies(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    reference: xr.DataTree | None = None,
    *,
    train: Mapping[str, Any] | Data | None = None,
    covariates: Mapping[str, Any] | None = None,
    draws: int = 1000,
    steps: int = 2000,
    refine_steps: int = 500,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Try what could make a guide better, and measure by how much.

    The remedies: "refined", separate variational parameters for each datum (`guides.refine`); "resampled",
    Pareto-smoothed importance resampling from ten times as many draws of the guide; and each structure or family richer
    than the guide's that the program allows ("faithful", "full", "full, flow", "collapsed"), newly trained for the
    unchanged model. A user's own guide is treated as the poorest, since its structure cannot be inferred.

    All are judged on `observed`. Gap = log p(x) − ELBO. log p(x) is exact if the program or the reference gives it;
    otherwise it is estimated by bridge sampling between the reference and the remedy with the largest ELBO. If more
    than 5% of the data have neither, it is replaced by the best importance bound of any remedy: gaps are then too small
    and shares too large, and the share of resampling, whose bound it may be, is not given. Resampled draws have no
    ELBO; their gap is log p(x) minus the importance bound of the pool. This is no less than the divergence of a draw
    from the posterior (before smoothing: Domke & Sheldon 2018, arXiv 1808.09034), so that the share that resampling
    recovers is a lower bound.

    Args:
        model: the program, in `eval()`; neither it nor the guide is changed.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`: two data or more, which are neither in the training data of the guide nor
            in `train`.
        reference: a reference tree, joined on the coordinate `data`; without one, posteriors are not compared.
        train: data on which richer guides are trained; None for data simulated from the model. If real data have
            another distribution, simulated data show a smaller gain of richer guides than real data would.
        covariates: keyword → tensor, for `observed`.
        draws: number of draws per datum for each remedy.
        steps: number of training steps of each richer guide, rounded up to whole epochs.
        refine_steps: number of steps of `guides.refine`.
        seed: random seed for draws, trainings and simulated data.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimension `remedy`, the unchanged guide ("guide") first. In nats per datum: `elbo`; `gain`, by how much the gap
        is smaller than the guide's; `gap`. `recovered`: gain over the guide's gap. Against the reference: `sd_error`
        (root mean square log sd ratio) and `mean_error` (root mean square, in reference sd), both without the
        contribution of Monte Carlo noise; `coverage`; `fails` and `unclear`, the numbers of verdicts that are "fail"
        and "cannot tell". Each `…_se` is a standard error over the data, which includes the Monte Carlo error of each
        datum. `khat_good`: share of the data whose k-hat can be relied on (for resampling, the k-hat of the pool).
        `seconds`: time that the remedy took. `reason`: why a remedy could not be tried; else empty.
        Attributes: `data`, the number of data that were judged; `left_out`, the number of data without log p(x);
        `evidence` ("exact", "bridge" or "bound"); `trained_on` ("given", "simulated" or "nothing"); `training_data`,
        their number; `checks`, the number of verdicts; `comparison`, why there is none; the settings; `model_sha256`.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for a reference of other data or weights.
    """
    progress = reporting(progress)
    problem, size = Problem.of(model, guide, observed, covariates), RemedyPlan(draws, steps, refine_steps)
    return remedies_of(problem, reference, size, train, seed, progress)


@dataclass(frozen=True)
class RemedyPlan:
    """The budget for trying remedies: `draws`, `steps` and `refine_steps` of `remedies`."""

    draws: int = 1000
    steps: int = 2000
    refine_steps: int = 500


def remedies_of(
    problem: Problem,
    reference: xr.DataTree | None,
    plan: RemedyPlan,
    train: Mapping[str, Any] | Data | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.Dataset:
    """Try remedies, like `remedies`, for a problem that is already checked."""
    of = partial(stream, seed, "remedies")
    if reference is not None:
        problem = problem.of_some(with_reference(problem.data, reference))
    program, guide, data = problem.program, problem.guide, problem.data
    richer = richer_guides(program, guide, data, of("structures"))
    bench = Bench(problem, reference, plan.draws, of("draws"), 3 + len(richer), progress)
    settings = {**asdict(plan), "seed": seed, "model_sha256": model_sha256(program)}
    shared = [name for name, site in sites(program, *data.batch(torch.arange(1))).items() if not site.local]
    if shared:
        why = f"latents {shared} are shared: evidence and ELBO are of all data together, not of a datum"
        rows = [Tried(name, why) for name in (GUIDE, REFINED, RESAMPLED, *richer)]
        return results_table(rows, np.full(len(data), np.nan), "").assign_attrs({**bench.notes, **settings})
    progress("remedies", 0, bench.total)
    rows = [bench.judge(GUIDE, lambda: guide, timed=False)]
    rows.append(bench.judge(REFINED, lambda: refined_of(problem, plan.refine_steps, LR, of(REFINED), progress)))
    rows.append(bench.resample())
    if richer:
        training = TrainingData.of(program, data, train, of("training data"))
        bench.notes |= {"trained_on": training.source, "training_data": len(training.data or ())}
        for name, kind in richer.items():
            encoder, telling = encoder_kind(guide), prefixed(progress, name)
            make = partial(trained_guide, program, training, *kind, encoder, plan.steps, of(name), telling)
            rows.append(bench.judge(name, make))
    known, method = bench.evidence(rows)
    return results_table(rows, known, method).assign_attrs({**bench.notes, **settings})
