"""What would make a guide better: remedies, tried on the data of the check and measured, not guessed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from pyro.nn import PyroModule
from scipy.stats import t as student

from calibrant.binding import bind, bind_fixed
from calibrant.data import Data
from calibrant.errors import CalibrantError, InferenceError, NonFiniteLoss, ProgramError
from calibrant.evaluation.compare import LEFT_OUT_LIMIT, check_same_problem, compare
from calibrant.evaluation.gap import MAX_SE, with_reference
from calibrant.evaluation.verdicts import verdicts
from calibrant.guides import AmortizedGuide, CollapsedGuide, amortize, refine
from calibrant.guides.families import choose_family
from calibrant.inference.evidence import evidence
from calibrant.inference.fit import fit
from calibrant.inference.importance import importance, log_mean, log_weights, reliable, weights
from calibrant.inference.posterior import posterior
from calibrant.inference.reference import log_evidence
from calibrant.inference.trees import model_sha256
from calibrant.program import Program, as_program, check_program, sample_prior, sites
from calibrant.progress import Progress, prefixed, silent

Array = npt.NDArray[np.float64]
Family = dict[str, str]

GUIDE, REFINED, RESAMPLED = "guide", "refined", "resampled"
FALSE_ALARM = 0.01  # of the sentences, over all remedies together
LEAST = 0.01  # of the gap: less is no remedy, however well it is known

_POOL = 10  # draws of the guide for each that is kept
_POOL_ROWS = 500_000  # of a pool at once
_SIMULATED = 5_000  # training data
_BATCH, _LR, _LOWER_LR = 256, 5e-3, 1e-3  # of a training; the lower one where gradients overflow
_RANKS = {"mean-field": 0, "faithful": 1, "program": 1, "full": 2, "collapsed": 3}
_SMALL = 8  # entries of a site
_FLEXIBLE = ("dense", "low-rank", "flow")  # families that "auto" may be poorer than
_STATISTICS = (
    *(name + end for name in ("elbo", "gain", "gap", "recovered", "sd_error", "mean_error") for end in ("", "_se")),
    *("coverage", "fails", "unclear", "khat_good", "seconds"),
)


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
    progress: Progress = silent,
) -> xr.Dataset:
    """Try what could make a guide better, and measure by how much.

    The remedies: "refined", variational parameters of each datum's own (`guides.refine`); "resampled", Pareto-smoothed
    importance resampling from ten times as many draws of the guide; and each structure or family richer than the
    guide's that the program allows ("faithful", "full", "full, flow", "collapsed"), trained afresh for the model as it
    is. A guide of the user's own is taken for the poorest, since its structure can't be read.

    All are judged on `observed`. Gap = log p(x) − ELBO. log p(x) is exact where the program or the reference knows it,
    else it is bridged to the reference from the remedy with the largest ELBO. Where more than 5% of the data have
    neither, it is replaced by the best importance bound of any remedy: gaps are then too small and shares too large,
    and that of resampling, whose bound it may be, is not given. Resampled draws have no ELBO; their gap is log p(x)
    less the importance bound of the pool, which is no less than the divergence of a draw from the posterior (before
    smoothing: Domke & Sheldon 2018, arXiv 1808.09034), so that what they recover is a lower bound.

    Args:
        model: the program, in `eval()`; neither it nor the guide is changed.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`: two data or more, which neither the guide nor `train` has.
        reference: a reference tree, joined on the coordinate `data`; without one, posteriors are not compared.
        train: data to train richer guides on; None for data simulated from the model, which show less than real data
            of another distribution would let a richer guide gain.
        covariates: keyword → tensor, of `observed`.
        draws: of each remedy, a datum.
        steps: of the training of each richer guide, rounded up to whole epochs.
        refine_steps: of `guides.refine`.
        seed: of draws, trainings and simulated data.
        progress: called with (stage, done, total, text).

    Returns:
        Dimension `remedy`, the guide as it is ("guide") first. In nats a datum: `elbo`; `gain`, by how much the gap is
        smaller than the guide's; `gap`. `recovered`: gain over the guide's gap. Against the reference: `sd_error` (root
        mean square log sd ratio) and `mean_error` (root mean square, in reference sd), both without the part of Monte
        Carlo noise; `coverage`; `fails` and `unclear`, how many verdicts are "fail" and "cannot tell". Each `…_se` is a
        standard error over the data, which holds the Monte Carlo error of each. `khat_good`: share of the data whose
        k-hat can be relied on (of the pool, for resampling). `seconds` that the remedy took. `reason`: why a remedy
        could not be tried; else empty.
        Attributes: `data`, how many were judged; `left_out`, how many were not, for want of log p(x); `evidence`
        ("exact", "bridge" or "bound"); `trained_on` ("given", "simulated" or "nothing"); `training_data`;
        `checks`, how many verdicts there are; `comparison`, why there is none; the settings; `model_sha256`.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for a reference of other data or weights.
    """
    data, program, guided = bind_fixed(model, observed, covariates), as_program(model), as_program(guide)
    check_program(program, *data.tensors())
    data = data if reference is None else with_reference(data, reference)
    richer = _richer(program, guided, data, seed)
    bench = _Bench(program, data, reference, draws, seed, 3 + len(richer), progress)
    settings = {
        "draws": draws,
        "steps": steps,
        "refine_steps": refine_steps,
        "seed": seed,
        "model_sha256": model_sha256(program),
    }
    shared = [name for name, site in sites(program, *data.batch(torch.arange(1))).items() if not site.local]
    if shared:
        why = f"latents {shared} are shared: evidence and ELBO are of all data together, not of a datum"
        rows = [_Tried(name, why) for name in (GUIDE, REFINED, RESAMPLED, *richer)]
        return _table(rows, np.full(len(data), np.nan), "").assign_attrs({**bench.notes, **settings})
    rows = [bench.judge(GUIDE, lambda: guided, timed=False)]
    rows.append(
        bench.judge(REFINED, lambda: refine(program, guided, data, steps=refine_steps, seed=seed, progress=progress))
    )
    rows.append(bench.resample(guided))
    if richer:
        training = _TrainingData.of(program, data, train, seed)
        bench.notes |= {"trained_on": training.source, "training_data": len(training.data or ())}
        for name, kind in richer.items():
            make = partial(_trained, program, training, *kind, _encoder(guided), steps, seed, prefixed(progress, name))
            rows.append(bench.judge(name, make))
    known, method = bench.evidence(rows)
    return _table(rows, known, method).assign_attrs({**bench.notes, **settings})


# -- the remedies ------------------------------------------------------------------------------------------------------


def _richer(program: PyroModule, guide: PyroModule, data: Data, seed: int) -> dict[str, tuple[str, Family]]:
    """Name → structure and families of every guide that is richer than this one and that the program allows."""
    is_ours = isinstance(guide, (AmortizedGuide, CollapsedGuide))
    spec: dict[str, Any] = guide.spec if is_ours else {"structure": "mean-field"}
    few = data[: min(len(data), 64)]
    own = {site["name"]: site["family"].partition("@")[0] for site in spec.get("sites", [])}
    flows = {name: family for name, family in own.items() if family == "flow"}
    asked: dict[str, tuple[str, Family]] = {
        "faithful": ("faithful", {name: family for name, family in own.items() if family in _FLEXIBLE}),
        "full": ("full", flows),
        "full, flow": ("full", {**_flows(program, few), **flows}),
        "collapsed": ("collapsed", {}),
    }
    found: dict[str, tuple[str, Family]] = {}
    seen = [_sites_of(spec)]
    for name, (structure, family) in asked.items():
        if _RANKS[structure] < _RANKS[spec["structure"]]:
            continue
        with suppress(ProgramError):  # the program has no such guide
            made = _sites_of(amortize(program, few, structure, family, seed=seed).spec)
            if made not in seen:
                found[name] = (structure, family)
                seen.append(made)
    return found


def _flows(program: PyroModule, data: Data) -> Family:
    """A flow for every small latent, such as a scale, or for all where none is small; classes and directions have none.

    A flow of many entries takes some ten times as long as a dense Normal, which is what the others are given.
    """
    found = {}
    for name, site in sites(program, *data.tensors()).items():
        with suppress(ProgramError):
            choose_family(name, site.support, site.prior, "flow")
            found[name] = site.event_shape.numel()
    small = [name for name, entries in found.items() if entries <= _SMALL]
    return dict.fromkeys(small or found, "flow")


def _sites_of(spec: Mapping[str, Any]) -> Any:
    """What makes two guides the same but for their encoders."""
    parts = sorted((site["name"], tuple(site["parents"]), site["family"]) for site in spec.get("sites", []))
    return parts, sorted(spec.get("block", {}))


def _encoder(guide: PyroModule) -> Any:
    """The kind of encoder that a guide has, for the richer ones to differ by nothing else."""
    return guide.spec["encoder"] if isinstance(guide, (AmortizedGuide, CollapsedGuide)) else None


@dataclass(frozen=True)
class _TrainingData:
    """Data to train on, where they are from ("given", "simulated" or "nothing"), and why there are none."""

    data: Data | None
    source: str
    reason: str = ""

    @classmethod
    def of(cls, program: PyroModule, judged: Data, train: Mapping[str, Any] | Data | None, seed: int) -> _TrainingData:
        """Those that are given; else simulated, with the covariates of judged data drawn with replacement."""
        if train is not None:
            return cls(bind(program, train), "given")
        rows = np.random.default_rng(seed).integers(len(judged), size=_SIMULATED)
        covariates = judged.batch(rows)[1] if judged.covariate_names else {}
        try:
            simulated = sample_prior(program, _SIMULATED, covariates, seed)
        except ProgramError as error:
            return cls(None, "nothing", f"no data to train on were given, and none can be simulated: {error}")
        return cls(Data({name: simulated[name].cpu() for name in judged.observed_names}, covariates), "simulated")


def _trained(
    program: PyroModule,
    training: _TrainingData,
    structure: str,
    family: Family,
    encoder: Any,
    steps: int,
    seed: int,
    progress: Progress,
) -> PyroModule:
    """A new guide, trained for a copy of the program that nothing changes."""
    data = training.data
    if data is None:
        raise InferenceError(training.reason)
    frozen = copy.deepcopy(program).requires_grad_(False).eval()
    frozen.train = lambda mode=True: frozen  # type: ignore[method-assign]  # no dropout and no new batch statistics
    epochs = math.ceil(steps / max(1, int(0.9 * len(data)) // _BATCH))
    options: dict[str, Any] = {"epochs": epochs, "batch_size": _BATCH, "patience": epochs, "seed": seed}

    def fitted(lr: float) -> PyroModule:
        guide = amortize(frozen, data, structure, family, encoder, seed=seed)
        if _has_weights(guide):
            fit(frozen, guide, data, lr=lr, **options, progress=progress)
        return guide

    try:
        guide = fitted(_LR)
    except NonFiniteLoss:
        guide = fitted(_LOWER_LR)
    return guide.attach(program) if isinstance(guide, CollapsedGuide) else guide


def _has_weights(guide: PyroModule) -> bool:
    """A collapsed guide without a scale is exact as it is."""
    return any(weight.requires_grad for weight in guide.parameters())


# -- what they are worth -----------------------------------------------------------------------------------------------


@dataclass
class _Tried:
    """A remedy, and what is known of it datum by datum.

    Attributes:
        reason: why it could not be tried, or "".
        weights: log p − log q at its draws, `(data, draw)`; None for resampling.
        bound: `(data,)`, the log of the mean weight: in expectation no more than log p(x).
        numbers: statistics of the row.
    """

    name: str
    reason: str = ""
    guide: PyroModule | None = None
    weights: Array | None = None
    bound: Array | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> Array | None:
        """`(data,)`: the ELBO, or what stands for it."""
        return self.bound if self.weights is None else self.weights.mean(1)


_NOTES = {"checks": 0, "comparison": "no reference given", "trained_on": "nothing", "training_data": 0}


@dataclass
class _Bench:
    """The data and the reference that all remedies are judged by."""

    program: PyroModule
    data: Data
    reference: xr.DataTree | None
    draws: int
    seed: int
    total: int
    progress: Progress
    done: int = 0
    notes: dict[str, Any] = field(default_factory=lambda: dict(_NOTES))

    def advance(self, name: str) -> None:
        """One remedy more is measured."""
        self.done += 1
        self.progress("remedies", self.done, self.total, name)

    def judge(self, name: str, make: Callable[[], PyroModule], timed: bool = True) -> _Tried:
        """A guide, once it is made."""
        begun = time.perf_counter()
        try:
            guide = make()
            seconds = time.perf_counter() - begun if timed else 0.0
            # The same noise for all: what is common to guide and refined guide cancels in the difference.
            tree = posterior(self.program, guide, self.data, self.draws, seed=self.seed + 1)
        except CalibrantError as error:
            if name == GUIDE:
                raise
            return _Tried(name, str(error))
        logs = log_weights(tree)
        row = _Tried(name, "", guide, logs, log_mean(logs)[0], {"seconds": seconds, **self.compared(tree)})
        with suppress(InferenceError):  # few draws, or a datum outside the support
            row.numbers["khat_good"] = float(reliable(weights(tree)).mean())
        self.advance(name)
        return row

    def resample(self, guide: PyroModule) -> _Tried:
        """The guide's draws, resampled; the pool is made and left part by part."""
        begun, pool = time.perf_counter(), _POOL * self.draws
        parts = np.array_split(np.arange(len(self.data)), math.ceil(len(self.data) * pool / _POOL_ROWS))
        trees = []
        try:
            for number, index in enumerate(part for part in parts if len(part)):
                seed = self.seed + 2 + number
                drawn = posterior(self.program, guide, self.data[index], pool, seed=seed)
                trees.append(importance(drawn, self.draws, seed))
        except CalibrantError as error:
            return _Tried(RESAMPLED, str(error))
        tree = _joined(trees)
        numbers = {
            "seconds": time.perf_counter() - begun,
            "khat_good": float(reliable(tree["importance"].dataset).mean()),
            **self.compared(tree),
        }
        self.advance(RESAMPLED)
        return _Tried(RESAMPLED, "", None, None, tree["importance"].dataset["log_evidence"].values, numbers)

    def compared(self, tree: xr.DataTree) -> dict[str, float]:
        """Statistics against the reference, where it can be compared with."""
        if self.reference is None:
            return {}
        check_same_problem(tree, self.reference)
        try:
            comparison = compare(tree, self.reference)
        except InferenceError as error:  # all latents discrete, few draws
            self.notes["comparison"] = str(error)
            return {}
        if not comparison.sizes["data"]:
            self.notes["comparison"] = "no datum has a reference posterior"
            return {}
        found = [verdict.status for verdict in verdicts(comparison)]
        self.notes |= {"checks": len(found), "comparison": ""}
        ratio, ratio_se = (comparison[name].values for name in ("sd_ratio", "sd_ratio_se"))
        sd, sd_se = _root(np.log(ratio), ratio_se / ratio)
        mean, mean_se = _root(comparison["mean_error"].values, comparison["mean_error_se"].values)
        return {
            "sd_error": sd,
            "sd_error_se": sd_se,
            "mean_error": mean,
            "mean_error_se": mean_se,
            "coverage": float(comparison["coverage"].mean()),
            "fails": found.count("fail"),
            "unclear": found.count("cannot tell"),
        }

    def evidence(self, rows: list[_Tried]) -> tuple[Array, str]:
        """log p(x) of the data that are judged, NaN for the others, and how it is known."""
        guides = [(row.guide, row.weights) for row in rows if row.guide is not None and row.weights is not None]
        guides = [(guide, weights) for guide, weights in guides if np.isfinite(weights).all()]
        known, method = np.full(len(self.data), np.nan), "exact"
        if self.reference is None:
            with suppress(InferenceError):
                known = log_evidence(self.program, self.data).cpu().numpy()
        elif guides:
            best, weights = max(guides, key=lambda one: float(one[1].mean()))
            found = evidence(self.program, best, self.data, self.reference, weights, MAX_SE, self.seed + 1_000)
            known, method = found.log_evidence, "exact" if "exact" in found.method else "bridge"
        if np.isfinite(known).mean() >= 1 - LEFT_OUT_LIMIT:
            return known, method
        bounds = [row.bound for row in rows if row.bound is not None and np.isfinite(row.bound).all()]
        return max(bounds, key=lambda bound: float(bound.mean()), default=known), "bound"


def _joined(trees: list[xr.DataTree]) -> xr.DataTree:
    """Trees of parts of the data as one."""

    def whole(name: str) -> xr.Dataset:
        parts = [tree[name].to_dataset() for tree in trees]
        if len(parts) == 1 or "data" not in parts[0].dims:
            return parts[0]
        return xr.concat(parts, "data", data_vars="minimal", coords="minimal", compat="override", join="override")

    return xr.DataTree.from_dict({f"/{name}": whole(name) for name in trees[0].children})


def _mean(values: Array) -> tuple[float, float]:
    """Over data, with its standard error, which a single datum does not tell."""
    se = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se


def _root(errors: Array, noise: Array) -> tuple[float, float]:
    """Root mean square of errors `(data, latent)` without the part of their noise, and its standard error."""
    square, se = _mean((errors**2 - noise**2).mean(1))
    root = math.sqrt(max(square, 0.0))
    return root, math.sqrt(square + se) - root if square > 0 else math.sqrt(max(se, 0.0))


def _table(rows: list[_Tried], known: Array, method: str) -> xr.Dataset:
    kept = np.isfinite(known)
    with np.errstate(invalid="ignore"):  # −∞ where a guide leaves the support
        for row in rows:
            row.numbers |= _worth(row, rows[0], known, kept, method)
    names = [row.name for row in rows]
    variables: dict[str, Any] = {
        name: ("remedy", np.array([row.numbers.get(name, math.nan) for row in rows])) for name in _STATISTICS
    }
    variables["reason"] = ("remedy", np.array([row.reason for row in rows], dtype=str))
    attrs = {"data": int(kept.sum()), "left_out": int((~kept).sum()), "evidence": method}
    return xr.Dataset(variables, coords={"remedy": names}, attrs=attrs)


def _worth(row: _Tried, guide: _Tried, known: Array, kept: npt.NDArray[np.bool_], method: str) -> dict[str, float]:
    """ELBO, gap and what is recovered, over the same data for all."""
    if row.reached is None or guide.reached is None or not kept.any():
        return {}
    numbers = {}
    if row.weights is not None:
        numbers["elbo"], numbers["elbo_se"] = _mean(row.reached[kept])
    elif method == "bound":  # which may be its own
        return {}
    gap, first = known[kept] - row.reached[kept], known[kept] - guide.reached[kept]
    numbers["gap"], numbers["gap_se"] = _mean(gap)
    if row is guide:
        return numbers
    gain = row.reached[kept] - guide.reached[kept]
    numbers["gain"], numbers["gain_se"] = _mean(gain)
    share = gain.mean() / first.mean()
    numbers["recovered"], numbers["recovered_se"] = float(share), _mean((gain - share * first) / first.mean())[1]
    return numbers


# -- in words ----------------------------------------------------------------------------------------------------------

_PHRASES = {
    REFINED: "refining every datum",
    RESAMPLED: "resampling by importance",
    "faithful": "a faithful structure",
    "full": "a full structure",
    "full, flow": "a full structure with flows",
    "collapsed": "a collapsed guide",
}


def remedy_sentences(result: xr.Dataset) -> list[str]:
    """What `remedies` found, in plain language: what helps, the best first, then what does not.

    A remedy helps, or harms, if its gain differs from zero at a level at which no remedy does so by chance in 99% of
    all checks (Student's t over the data, Bonferroni over the remedies), and by 1% of the gap at least. "±" is one
    standard error.
    """
    rows = {str(name): result.sel(remedy=name) for name in result["remedy"].values}
    guide = rows.pop(GUIDE)
    tried = {name: row for name, row in rows.items() if not str(row["reason"].values)}
    measured = {name: row for name, row in tried.items() if math.isfinite(_of(row, "gain_se"))}
    limit = _limit(result, len(measured))
    helps = [name for name, row in measured.items() if _differs(row, guide, limit, 1)]
    harms = [name for name, row in measured.items() if _differs(row, guide, limit, -1)]
    helps.sort(key=lambda name: -_of(measured[name], "gain"))
    rest = [name for name in measured if name not in (*helps, *harms)]
    found = [_help(result, guide, name, measured[name]) for name in helps]
    if measured and not helps:
        gap = f"{_nats(guide, 'gap')} nats{_to(result)}"
        others = ", ".join(f"{_phrase(result, name)} {_nats(measured[name], 'gain', '+')} nats" for name in measured)
        found.append(f"no remedy tried helps: the guide leaves a gap of {gap}; {others}")
    elif rest:
        others = ", ".join(f"{_phrase(result, name)} ({_nats(measured[name], 'gain', '+')} nats)" for name in rest)
        found.append(f"no gain beyond its error or 1% of the gap: {others}")
    for name in harms if helps else []:
        row = measured[name]
        found.append(f"{_phrase(result, name)} is worse than the guide: {_nats(row, 'gain', '+')} nats")
    found.extend(_unmeasured(result, guide, name, row) for name, row in tried.items() if name not in measured)
    reasons = {name: str(row["reason"].values) for name, row in rows.items() if name not in tried}
    for reason in dict.fromkeys(reasons.values()):
        names = ", ".join(_PHRASES[name] for name in reasons if reasons[name] == reason)
        found.append(f"could not be tried: {names}: {reason}")
    return found


def _of(row: xr.Dataset, name: str) -> float:
    return float(row[name])


def _limit(result: xr.Dataset, count: int) -> float:
    freedom = int(result.attrs["data"]) - 1
    return float(student.ppf(1 - FALSE_ALARM / (2 * max(count, 1)), freedom)) if freedom > 0 else math.inf


def _differs(row: xr.Dataset, guide: xr.Dataset, limit: float, sign: int) -> bool:
    gain = sign * _of(row, "gain")
    return gain > limit * _of(row, "gain_se") and gain > LEAST * abs(_of(guide, "gap"))


def _help(result: xr.Dataset, guide: xr.Dataset, name: str, row: xr.Dataset) -> str:
    gain, gap, share = _of(row, "gain"), _of(guide, "gap"), _of(row, "recovered")
    digits = _digits(gap)
    least = "at least " if name == RESAMPLED else ""
    took = f"in {_duration(_of(row, 'seconds'))}"
    if gap > _limit(result, 1) * _of(guide, "gap_se"):
        se = 100 * _of(row, "recovered_se")
        places = 1 if 100 * abs(1 - share) < 1 or se < 0.5 else 0
        amount = f"{100 * share:.{places}f}% ± {se:.{places}f}%"
        size = f"{gain:.{digits}f} of {gap:.{digits}f} nats"
        head = f"{_phrase(result, name)} recovers {least}{amount} of the gap{_to(result)} ({size}) {took}"
    else:
        head = f"{_phrase(result, name)} gains {least}{_nats(row, 'gain')} nats {took}"
    return head + _khat(name, row) + _afterwards(result, guide, row) + _sds(guide, row, _limit(result, 1))


def _unmeasured(result: xr.Dataset, guide: xr.Dataset, name: str, row: xr.Dataset) -> str:
    why = "its gain is not known"
    if result.attrs["evidence"] == "bound" and name == RESAMPLED:
        why = "its gain is not known, since log p(x) is not"
    elif not math.isfinite(_of(guide, "elbo")):
        why = "its gain is not known, since the guide's ELBO is not finite"
    return f"{_phrase(result, name)}: {why}{_khat(name, row)}{_afterwards(result, guide, row)}"


def _phrase(result: xr.Dataset, name: str) -> str:
    phrase = _PHRASES[name]
    is_simulated = name not in (REFINED, RESAMPLED) and result.attrs["trained_on"] == "simulated"
    return f"{phrase}, made for data simulated from the model," if is_simulated else phrase


def _to(result: xr.Dataset) -> str:
    return " to the best bound of log p(x)" if result.attrs["evidence"] == "bound" else ""


def _khat(name: str, row: xr.Dataset) -> str:
    good = _of(row, "khat_good")
    if name != RESAMPLED or not good < 1:
        return ""
    return f", but k-hat is too large to rely on it for {max(1 - good, 0.01):.0%} of the data"


def _afterwards(result: xr.Dataset, guide: xr.Dataset, row: xr.Dataset) -> str:
    """The verdicts of a remedy beside those of the guide."""
    fails, unclear, before, checks = _of(row, "fails"), _of(row, "unclear"), _of(guide, "fails"), result.attrs["checks"]
    if not math.isfinite(fails):
        return ""
    against = "against the reference"
    if fails:
        verb = "fails" if fails == 1 else "fail"
        return f"; afterwards {fails:.0f} of {checks} checks {against} {verb} ({before:.0f} before)"
    if unclear:
        return (
            f"; afterwards no check {against} fails, but {unclear:.0f} of {checks} cannot tell ({before:.0f} failed "
            "before)"
        )
    return f"; afterwards every check {against} passes ({before:.0f} of {checks} failed before)"


def _sds(guide: xr.Dataset, row: xr.Dataset, limit: float) -> str:
    """Where the gap became smaller and the sds worse: the best of a family in KL(q ‖ p) is often too narrow."""
    before, after = _of(guide, "sd_error"), _of(row, "sd_error")
    if not after - before > limit * math.hypot(_of(guide, "sd_error_se"), _of(row, "sd_error_se")):
        return ""
    return f"; but sds are further off, by {math.expm1(after):.0%} (root mean square), {math.expm1(before):.0%} before"


def _digits(value: float) -> int:
    return int(np.clip(1 - math.floor(math.log10(value)), 2, 4)) if math.isfinite(value) and value > 0 else 2


def _nats(row: xr.Dataset, name: str, sign: str = "") -> str:
    """With as many digits as the standard error has one of, two to four."""
    value, se = _of(row, name), _of(row, f"{name}_se")
    digits = int(np.clip(-math.floor(math.log10(se)), 2, 4)) if math.isfinite(se) and se > 0 else 2
    return f"{value:{sign}.{digits}f} ± {se:.{digits}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
