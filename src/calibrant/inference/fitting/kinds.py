"""Which loss a program is made for, and which one an objective trains where the guide is the model's own prior."""

from __future__ import annotations

import torch
from pyro.nn import PyroModule

from calibrant.errors import warn
from calibrant.guides.from_prior import PriorGuide
from calibrant.inference.fitting.objectives import MULTI_SAMPLE
from calibrant.program.contract import Values
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import few
from calibrant.program.tracing import guide_trace, sampled

_LOSSES = {"marginal": "log E p(y | z)", "elbo": "E log p(y | z)", "normalised": "E log p(y | z)"}
_REMEDIES = {
    "marginal": "objective='iwae' with several particles",
    "elbo": "objective='stl'",
    "normalised": "objective='stl'",
}


def warn_of_other_loss(
    model: PyroModule, guide: PyroModule, objective: str, particles: int, observed: Values, covariates: Values
) -> None:
    """Warn if the objective trains another loss than the program says that it has, in its attribute `loss_kind`.

    A program whose loss is log E p(y | z), with z from its own prior ("marginal"), takes the bound of several draws;
    one whose loss is E log p(y | z) ("elbo"), or whose draws are averaged inside the program ("normalised"), takes one
    draw at a time. Programs without such an attribute, or without latents, and guides with weights of their own are not
    looked at.
    """
    kind = getattr(model, "loss_kind", None)
    if kind not in _LOSSES or not isinstance(guide, PriorGuide):
        return
    if not _has_latents(guide, observed, covariates):
        return
    averages_logs = objective not in MULTI_SAMPLE or particles == 1
    if averages_logs == (kind == "marginal"):
        trained = _LOSSES["elbo"] if averages_logs else _LOSSES["marginal"]
        warn(
            f"the loss of {type(model).__name__} is −{_LOSSES[kind]} (loss_kind={kind!r}), and objective={objective!r} "
            f"with particles={particles} trains −{trained}: give {_REMEDIES[kind]}, or leave it if you mean this loss",
            UserWarning,
        )


def _has_latents(guide: PyroModule, observed: Values, covariates: Values) -> bool:
    rows, cols = few(observed, 2), few(covariates, 2)
    with torch.no_grad(), seeded(0), defaults(guide, rows) as place:
        return bool(sampled(guide_trace(guide, cast(rows, *place), 2, cast(cols, *place))))
