"""All combinations of the values of finite discrete latents."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.program.contract import Program, Values
from calibrant.program.environment import seeded
from calibrant.program.latents import Site
from calibrant.program.supports import single_entry
from calibrant.program.tracing import sampled, trace

ROWS = 65_536  # largest number of rows of a run in which discrete latents are summed out
_MAX_COMBINATIONS = 1024  # of values per datum; each is a run of the program on one more row


def combinations(discrete: Mapping[str, Site]) -> dict[str, Tensor]:
    """Every combination of the values of the discrete latents of one datum: site → `(combinations, *event)`.

    Raises:
        InferenceError: for a latent that is shared or has infinitely many values, and for too many combinations.
    """
    if not discrete:
        return {}
    values = {name: _values(name, site) for name, site in discrete.items()}
    count = 1
    for value in values.values():
        count *= len(value)
    if count > _MAX_COMBINATIONS:
        raise InferenceError(
            f"the discrete latents {list(values)} have {count} combinations of values per datum; at most "
            f"{_MAX_COMBINATIONS} are summed out: {_SUMMED_OUT_THERE}"
        )
    index = torch.cartesian_prod(*[torch.arange(len(value)) for value in values.values()]).reshape(-1, len(values))
    return {name: value[index[:, i]] for i, (name, value) in enumerate(values.items())}


_SUMMED_OUT_THERE = (
    "let the observed site sum them out, a chain of states by pyro.distributions.DiscreteHMM, independent ones by "
    "MixtureSameFamily"
)


def with_all_priors(
    discrete: Mapping[str, Site], program: Program, observed: Values, covariates: Values
) -> dict[str, Site]:
    """Discrete latents with the priors of all data, whose supports may depend on covariates.

    Args:
        discrete: discrete latents of the program, by name.
        program: the program.
        observed, covariates: all data.
    """
    if not discrete:
        return {}
    with torch.no_grad(), seeded(0):
        run = sampled(trace(program, len(next(iter(observed.values()))), covariates, observed))
    return {name: replace(site, prior=run[name]["fn"]) for name, site in discrete.items()}


def _values(name: str, site: Site) -> Tensor:
    """All values of one discrete latent of a datum, `(count, *event)`."""
    base = single_entry(site.prior)
    if not site.local:
        raise InferenceError(f"latent {name!r} is discrete and shared: only local discrete latents are summed out")
    if not base.has_enumerate_support:
        raise InferenceError(
            f"latent {name!r} has infinitely many values, or none that {type(base).__name__} can list, and can't be "
            "summed out: give it a Categorical prior over the values that matter, or a continuous prior"
        )
    try:
        single = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise InferenceError(
            f"the discrete latent {name!r} has a support that differs between data, which can't be summed out: give "
            "all data the same upper limit, and probability zero to the values above a datum's own limit"
        ) from error
    single = single.reshape(-1, *base.event_shape)
    entries = site.event_shape[: len(site.event_shape) - len(base.event_shape)].numel()
    if len(single) ** entries > _MAX_COMBINATIONS:
        raise InferenceError(
            f"the discrete latent {name!r} has {len(single)}^{entries} values per datum; at most {_MAX_COMBINATIONS} "
            f"are summed out: {_SUMMED_OUT_THERE}"
        )
    index = torch.tensor(list(itertools.product(range(len(single)), repeat=entries)), device=single.device)
    return single[index.reshape(-1, entries)].reshape(-1, *site.event_shape)
