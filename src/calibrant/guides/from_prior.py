"""The guide that is the model's own prior: q = p(z | covariates), drawn by running the model itself.

It serves programs whose encoder is the prior, as representations with uncertainties have them: z is drawn from what
the network says about the image x, a covariate, and labels or matches y are observed. It serves programs without
latents as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.program.contract import Program, as_program
from calibrant.program.supports import is_improper
from calibrant.program.tracing import Hold, is_deterministic, is_factor
from calibrant.shown import Shown


class PriorGuide(Shown, PyroModule):
    """q(z) = p(z | covariates): latents are drawn by a run of the model, with the same modules and the same weights.

    Observed sites are held at their values and hidden, as are factors and recorded values; a latent whose distribution
    depends on an observed site is drawn given its value. The guide has no weights of its own: its state is empty, and
    it is stored as such. What is drawn is not the posterior given the observations; that is what importance weights,
    which are p(y | z) here, and chains are for.

    Args:
        model: the program.
    """

    spec = {"structure": "prior"}

    def __init__(self, model: Program) -> None:
        super().__init__()
        self.shared = nn.ModuleList([as_program(model)])  # Pyro would rename the sites of a module of its own
        self.register_load_state_dict_pre_hook(_keep_weights)

    def facts(self) -> dict[str, str]:
        target = _function(self.model)
        return {"": f"the prior of {getattr(target, '__name__', type(target).__name__)}"}

    @property
    def model(self) -> PyroModule:
        """The model whose prior the guide is."""
        program: Any = self.shared[0]
        return program

    def require_model(self, model: Program) -> None:
        """Refuse a model whose prior the guide is not.

        Raises:
            ProgramError: for another model than the one that the guide was made of.
        """
        if _function(self.model) != _function(as_program(model)):
            raise ProgramError("it is the prior of another model than this one: take calibrant.guides.prior(model)")

    def forward(self, observed: Mapping[str, Tensor], size: int, **covariates: Tensor) -> None:
        def is_hidden(site: Any) -> bool:
            if site["type"] != "sample" or site_is_subsample(site):
                return False
            if site["name"] not in observed and is_improper(site["fn"]):
                raise ProgramError(
                    f"latent {site['name']!r} has an improper prior, which cannot be drawn: give the latent a prior "
                    "with a density, or take calibrant.guides.amortize"
                )
            return site["name"] in observed or is_deterministic(site) or is_factor(site)

        with poutine.block(hide_fn=is_hidden), Hold(observed):
            self.model(size, **covariates)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """The empty state of the guide: its weights are those of the model, which is stored by itself."""
        return {} if destination is None else destination


def prior(model: Program) -> PriorGuide:
    """The model's own prior as its guide, for programs whose encoder is the prior.

    With `fit(model, guide, data, objective="iwae", particles=K)` the loss is −log mean p(y | z_k) of K draws of the
    prior, as MCInfoNCE and HIB have it; the other objectives train −E log p(y | z), without a divergence in either
    case. `posterior` gives draws of p(z | x), and `importance` and `reference` give p(z | x, y). `check` judges the
    predictions p(y | x) in place of the posterior.

    Args:
        model: the program. Its modules are shared with the guide, neither copied nor counted twice.

    Raises:
        ProgramError: for what is no program.
    """
    return PriorGuide(model)


def _keep_weights(guide: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state that is loaded leave the model as it is, since it holds nothing for the guide."""
    state.update({f"{prefix}{name}": tensor for name, tensor in nn.Module.state_dict(guide).items()})


def _function(model: PyroModule) -> Any:
    """The function that a program wraps, or the program itself: the same for two programs of one function."""
    return getattr(model, "function", model)
