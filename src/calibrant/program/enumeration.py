"""All combinations of the values of finite discrete latents."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.program.latents import Site
from calibrant.program.supports import innermost

_MAX_COMBINATIONS = 1024  # of values per datum; each is a run of the program on one more row


def combinations(discrete: Mapping[str, Site]) -> dict[str, Tensor]:
    """Every combination of the values of the discrete latents of one datum: site → `(combinations, *event)`."""
    if not discrete:
        return {}
    values = {name: _values(name, site) for name, site in discrete.items()}
    count = 1
    for value in values.values():
        count *= len(value)
    if count > _MAX_COMBINATIONS:
        raise InferenceError(
            f"the discrete latents {list(values)} have {count} combinations of values per datum; at most "
            f"{_MAX_COMBINATIONS} are summed out: write independent ones as a mixture in the likelihood"
        )
    index = torch.cartesian_prod(*[torch.arange(len(value)) for value in values.values()]).reshape(-1, len(values))
    return {name: value[index[:, i]] for i, (name, value) in enumerate(values.items())}


def _values(name: str, site: Site) -> Tensor:
    """All values of one discrete latent of a datum, `(count, *event)`."""
    base = innermost(site.prior)
    if not site.local:
        raise InferenceError(f"latent {name!r} is discrete and shared: only local discrete latents are summed out")
    if not base.has_enumerate_support or base.event_shape:
        raise InferenceError(
            f"latent {name!r} has the discrete support {site.support}, which can't be summed out: only finite sets of "
            "numbers can; give it a continuous prior, an upper limit, or Categorical in place of OneHotCategorical"
        )
    try:
        single = base.enumerate_support(expand=False).flatten()
    except NotImplementedError as error:
        raise InferenceError(
            f"the discrete latent {name!r} has a support that differs between data, which can't be summed out: give "
            "all data the same upper limit, and probability zero to the values above a datum's own limit"
        ) from error
    entries = site.event_shape.numel()
    if len(single) ** entries > _MAX_COMBINATIONS:
        raise InferenceError(
            f"the discrete latent {name!r} has {len(single)}^{entries} values per datum; at most {_MAX_COMBINATIONS} "
            "are summed out"
        )
    product = torch.tensor(list(itertools.product(single.tolist(), repeat=entries)), device=single.device)
    return product.to(single.dtype).reshape(-1, *site.event_shape)
