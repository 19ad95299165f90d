"""Properties of distributions and supports, whatever they are wrapped in (`expand`, `to_event`, `mask`, mixtures,
transforms).

This is the only module of the package that unwraps distributions and constraints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, Multinomial, biject_to
from torch.distributions.transforms import IndependentTransform, StickBreakingTransform, Transform
from torch.nn.functional import logsigmoid, pad

from calibrant.errors import ProgramError

_CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises)
_OF_A_TOTAL = (Multinomial, dist.DirichletMultinomial)
_EXTENDED = (dist.ExtendedBinomial, dist.ExtendedBetaBinomial)
_BOUNDS = ("lower_bound", "upper_bound")
_DRESS = (Independent, dist.ExpandedDistribution, dist.MaskedDistribution)  # change shapes and weights, not values

# -- distributions -----------------------------------------------------------------------------------------------------


def layers(fn: Any) -> Iterator[Any]:
    """A distribution and the distributions that it wraps, from the outermost to the innermost."""
    yield fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        yield fn


def innermost(fn: Any) -> Any:
    """The distribution under all wrappers and transforms; for a LogNormal, this is a Normal."""
    *_, last = layers(fn)
    return last


def single_entry(fn: Any) -> Any:
    """The distribution of single entries: the one under all wrappers; of a mixture, that of its components."""
    last = innermost(fn)
    return single_entry(last.component_distribution) if isinstance(last, MixtureSameFamily) else last


def undressed(fn: Any) -> Any:
    """A distribution without the `expand`, `to_event` and `mask` around it; its values are the same."""
    return next(layer for layer in layers(fn) if not isinstance(layer, _DRESS))


def is_improper(fn: Any) -> bool:
    """Whether a distribution is an `ImproperUniform`."""
    return isinstance(innermost(fn), dist.ImproperUniform)


def _all_layers(fn: Any) -> Iterator[Any]:
    """The layers of a distribution, and those of the components of its mixtures."""
    for layer in layers(fn):
        yield layer
        if isinstance(layer, MixtureSameFamily):
            yield from _all_layers(layer.component_distribution)


def masks(fn: Any) -> Iterator[tuple[Any, torch.Size]]:
    """The masks in a distribution, in its components too, each with the batch shape of the layer that holds it."""
    for layer in _all_layers(fn):
        if isinstance(layer, dist.MaskedDistribution):
            yield layer._mask, layer.batch_shape


def has_fixed_total(fn: Any) -> bool:
    """Whether the counts of every draw add up to a total that is a number of the distribution."""
    return any(isinstance(layer, _OF_A_TOTAL) for layer in _all_layers(fn))


def training_loss(fn: Any) -> Any | None:
    """The distribution in a site's distribution that says that it is no density (`is_density = False`)."""
    return next((layer for layer in _all_layers(fn) if getattr(layer, "is_density", True) is False), None)


def is_masked(fn: Any) -> bool:
    """Whether some entries of a distribution are masked, so that they do not contribute to its density."""
    return any(True for _ in masks(fn))


def is_mixture(fn: Any) -> bool:
    """Whether a distribution is a mixture whose components are summed out, or is made from one."""
    return any(isinstance(layer, MixtureSameFamily) for layer in layers(fn))


def is_circular(fn: Any) -> bool:
    """Whether the entries of a site are angles, whose support torch calls the real line."""
    plain = undressed(fn)
    if isinstance(plain, MixtureSameFamily):
        return is_circular(plain.component_distribution)
    return isinstance(plain, _CIRCULAR)


def is_made_from_angles(fn: Any) -> bool:
    """Whether a site transforms angles, so that its density is not normalised on the support that it declares."""
    return not is_circular(fn) and any(is_circular(layer) for layer in layers(fn))


def is_direction(fn: Any) -> bool:
    """Whether the values of a site are points of a circle or a sphere."""
    return is_circular(fn) or is_sphere(base_support(fn.support))


def is_sphere(support: Any) -> bool:
    """Whether a support is the unit sphere."""
    return isinstance(support, type(constraints.sphere))


def bounds(support: Any) -> list[Tensor]:
    """The bounds of a support as far as it has any, the lower one first."""
    base = base_support(support)
    return [torch.as_tensor(getattr(base, name)) for name in _BOUNDS if hasattr(base, name)]


# -- supports ----------------------------------------------------------------------------------------------------------


def base_support(support: Any) -> Any:
    """The support of single entries: a support without `independent` and mixtures around it."""
    while isinstance(support, constraints.independent) or _is_of_mixture(support):
        support = support.base_constraint
    return support


def usual_support(support: Any) -> Any:
    """The same support as a constraint that torch can map: a mixture has the support of its components."""
    if _is_of_mixture(support):
        return usual_support(_of_all_components(support.base_constraint))
    if isinstance(support, constraints.independent):
        base = usual_support(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    return support


def _of_all_components(support: Any) -> Any:
    """The support of the components of a mixture, without the dimension of the components."""
    if isinstance(support, constraints.independent):
        base = _of_all_components(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    found = [getattr(support, name) for name in _BOUNDS if hasattr(support, name)]
    if not any(isinstance(bound, Tensor) and bound.dim() for bound in found):
        return support
    values = [torch.as_tensor(bound).unique() for bound in found]
    if any(len(value) > 1 for value in values):
        raise ProgramError(
            f"a mixture has components with different supports ({support}): give all components the same bounds, or "
            "sample the component k from a Categorical (it is summed out) and a number u on one support, and compute "
            "the value from both: low[k] + (high[k] - low[k]) * u"
        )
    return type(support)(*(float(value) for value in values))


def _is_of_mixture(support: Any) -> bool:
    return type(support).__name__ == "MixtureSameFamilyConstraint"  # not every version of torch exports the class


def is_real(fn: Any) -> bool:
    """Whether all entries of a site are unconstrained; angles are not."""
    return isinstance(base_support(fn.support), type(constraints.real)) and not is_circular(fn)


def is_positive(support: Any) -> bool:
    """Whether a support is the positive half-line, which `from_line` maps by the exponential function."""
    base = base_support(support)
    bound = getattr(base, "lower_bound", None)
    half_line = isinstance(base, constraints.greater_than | constraints.greater_than_eq) or base is constraints.positive
    return half_line and not isinstance(bound, Tensor) and bound == 0


def is_on_a_line(support: Any, distribution: Any) -> bool:
    """Whether a site has unconstrained coordinates, one for each degree of freedom: not on circles and spheres."""
    if support.is_discrete or is_circular(distribution):
        return False
    try:
        return bool(from_line(support).bijective)
    except NotImplementedError:  # directions
        return False


def from_line(support: Any) -> Transform:
    """The map from unconstrained numbers to a support.

    Raises:
        NotImplementedError: for a support for which torch has no such map.
    """
    return _accurate(biject_to(usual_support(support)))


def _accurate(transform: Transform) -> Transform:
    if isinstance(transform, IndependentTransform):
        return IndependentTransform(_accurate(transform.base_transform), transform.reinterpreted_batch_ndims)
    return _StickBreaking() if isinstance(transform, StickBreakingTransform) else transform


class _StickBreaking(StickBreakingTransform):
    """The map of torch to a simplex, for corners too.

    torch subtracts shares from 1, which leaves no share below 1e-16 after a share of nearly 1. On a logarithmic scale
    all shares down to 1e-308 are right.
    """

    def _call(self, x: Tensor) -> Tensor:
        x = x - self._offset(x)
        log_rest = pad(logsigmoid(-x).cumsum(-1), (1, 0))
        numbers = torch.finfo(x.dtype)
        return (pad(logsigmoid(x), (0, 1)) + log_rest).exp().clamp(numbers.tiny, 1 - numbers.eps)

    def _inverse(self, y: Tensor) -> Tensor:
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        x = y[..., :-1].log() - rest.log()
        return x + self._offset(x)

    @staticmethod
    def _offset(x: Tensor) -> Tensor:
        return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


def anywhere(fn: Any) -> Tensor | None:
    """A random value, U(−2, 2) in unconstrained space; None for a support that has no map from there."""
    try:
        transform = from_line(fn.support)
    except NotImplementedError:
        return None
    return transform(torch.empty(transform.inverse_shape(fn.shape())).uniform_(-2.0, 2.0))


def inside(fn: Any, value: Tensor) -> Tensor:
    """Whether a value lies in the support of a distribution, for each entry that the support checks."""
    if isinstance(plain := undressed(fn), _EXTENDED):  # their support is declared to be all integers
        return (value >= 0) & (value <= plain.total_count) & (value == value.floor())
    try:
        return fn.support.check(value if value.is_floating_point() else value.double())
    except NotImplementedError:  # torch cannot check this support
        return torch.ones(value.shape[:1], dtype=torch.bool, device=value.device)
