"""Collapsed guides: a learned distribution of the scale, and the exact Gaussian conditional of all other latents.

They exist for programs x = offset + s·(shift + A z) + ε, which `calibrant.linear_gaussian` detects, and have the form
q(s, z | x) = q(s | x) p(z | s, x). The ELBO of such a guide equals the ELBO of q(s | x) for the program with z
integrated out; without a scale, it is the log evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import ReshapeTransform
from torch.nn.modules.batchnorm import _BatchNorm

from calibrant.errors import ProgramError
from calibrant.guides.describing import facts_of_spec
from calibrant.guides.encoders.choosing import encoder_of
from calibrant.guides.encoders.inputs import InRange
from calibrant.guides.families.heads import Head
from calibrant.linear_gaussian.density import bounds, log_prior, prior_of_scale, unchecked
from calibrant.linear_gaussian.detection import Probe, detect, probe, read, require_sound
from calibrant.linear_gaussian.parameters import LinearGaussian
from calibrant.linear_gaussian.spectrum import project, spectrum_of, weighted_scales
from calibrant.program.contract import PLATE, Program, Values, as_program
from calibrant.program.environment import is_recording
from calibrant.shown import Shown


class CollapsedGuide(Shown, PyroModule):
    """q(s | x) from an encoder and a head, and the exact p(z | s, x) under the current weights of the model.

    The model is not a submodule of the guide: its weights are neither saved, moved nor trained with the guide, and a
    copy of the guide refers to the same model. No gradient flows through the conditional to the weights of the model,
    and none is needed: the gradient of E[log p(x, z, s)] alone is that of the bound with z integrated out (Fisher's
    identity).

    Args:
        spec: specification from which the guide can be rebuilt without data (JSON values); `amortize` creates it. A
            guide from a specification needs its model: see `attach`.
        encoder: a module `dict of inputs → (size, features)` with an attribute `features`, used instead of the encoder
            that the specification names.
    """

    encoder: Any
    heads: Any

    def __init__(self, spec: dict[str, Any], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.block = {name: tuple(shape) for name, shape in spec["block"].items()}
        shapes = {name: tuple(shape) for name, shape in spec["inputs"].items()}
        [(self.observed, event_shape)] = shapes.items()
        self.event_shape = torch.Size(event_shape)
        self.order = [site["name"] for site in spec["sites"]]
        if self.order and encoder is None:
            encoder = encoder_of(spec)
        self.is_centred = spec.get("centred", False)  # guides of earlier versions are not
        if encoder is not None and self.is_centred:
            encoder = InRange(encoder, self.observed, self.event_shape)
        self.encoder = encoder if self.order else None
        self.heads = nn.ModuleList(Head(self.encoder.features, 0, (), site["family"]) for site in spec["sites"])
        for head in self.heads if self.is_centred else ():
            nn.init.zeros_(head.out.weight)  # what is known is right to begin with
        self._model = _Reference()
        self._probe: Probe | None = None
        self._fixed: _Conditional | None = None

    def facts(self) -> dict[str, str]:
        return facts_of_spec(self.spec, self)

    def attach(self, model: Program) -> CollapsedGuide:
        """Use the conditional of this model from now on; returns the guide."""
        self._model, self._probe = _Reference(as_program(model)), None
        return self

    @property
    def model(self) -> PyroModule:
        """The model whose conditional the guide uses.

        Raises:
            ProgramError: if no model is attached.
        """
        if self._model.module is None:
            raise ProgramError("a collapsed guide takes its conditional from the model: guide.attach(model) first")
        return self._model.module

    def require_model(self, model: Program) -> None:
        """Refuse a guide to which no model, or another model, is attached.

        Raises:
            ProgramError: if no model, or another model, is attached.
        """
        if _function(self.model) is not _function(model):
            raise ProgramError("its conditional is that of another model than this one: guide.attach(model) first")

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        conditional, scale, repeats = self._fixed or _Conditional(self._read()), None, 1
        with pyro.plate(PLATE, size):
            for name, head in zip(self.order, self.heads, strict=True):
                features = self.encoder({self.observed: observed[self.observed]})
                repeats = size // len(features)  # the rows of a datum are consecutive
                scale = pyro.sample(name, self._scale(head, features, observed[self.observed], conditional))
            conditional.sample(observed[self.observed], scale, repeats)

    def _scale(self, head: Head, features: Tensor, x: Tensor, conditional: _Conditional) -> dist.TorchDistribution:
        """q(s | x) of all rows; with fewer rows of features, the rows of a datum are consecutive."""
        if not self.is_centred:
            return head(features, None, len(x))
        repeats = len(x) // len(features)
        log_scale, weights = conditional.scales(x, repeats)
        family: Any = head.family  # one on the line, since a scale is positive
        line = family.to_line(log_scale.exp())
        centre = (weights * line).sum(1)
        resolved = (line[:, -1] - line[:, 0]) / (2 * len(line[0]))
        width = torch.maximum((weights * (line - centre[:, None]).square()).sum(1).sqrt(), resolved)
        return head.around(features, centre.to(features.dtype), width.to(features.dtype), len(x))

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Read the conditional once for all runs inside; the weights of the model must not change there."""
        self._fixed = _Conditional(self._read())
        try:
            yield
        finally:
            self._fixed = None

    def _read(self) -> LinearGaussian:
        weight = next(self.model.parameters(), None)
        if self._probe is None or (weight is not None and self._probe.centre.device.type != weight.device.type):
            self._probe = probe(self.model, self.observed, self.event_shape)
        found = read(self.model, self._probe)
        if dict(found.latents) != self.block or [found.scale] != (self.order or [None]):
            raise ProgramError(
                f"the guide has the Gaussian latents {self.block} and the scale {self.order}, the model has "
                f"{dict(found.latents)} and {found.scale!r}: attach the model that the guide was made for"
            )
        if not is_recording():
            require_sound(self.model, found)
        return found


class _Reference:
    """A reference to the model of a guide that is not a submodule of the guide.

    A copy refers to the copy of the model if both are copied together, model first; otherwise to the same model.
    """

    def __init__(self, module: PyroModule | None = None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return _Reference(memo.get(id(self.module), self.module))


def _function(model: Program) -> Any:
    """The function that a program wraps, or the program itself: the same for two programs of one function."""
    return getattr(model, "function", model)


def gaussian_block(program: PyroModule, observed: Values, covariates: Values) -> dict[str, list[int]]:
    """The sites of a program that are jointly Gaussian given all other sites, with their event shapes (JSON values).

    Raises:
        ProgramError: for a program without this structure; the message names the alternatives.
    """
    found = detect(program, observed, covariates)
    if found is None or any(isinstance(module, _BatchNorm) for module in program.modules()):
        raise ProgramError(
            f'{type(program).__name__} is not what structure="collapsed" is for, x = offset + s·(shift + A z) + ε with '
            "jointly Gaussian z, independent Gaussian noise and at most one positive scalar s (no Laplace prior, no "
            'covariates, shared or discrete latents, no batch normalisation): take structure="faithful", or "full" for '
            "one family over all latents of a datum"
        )
    return {name: list(shape) for name, shape in found.latents.items()}


# -- p(z | s, x) -------------------------------------------------------------------------------------------------------


class _Site(NamedTuple):
    """A site of the Gaussian block given the earlier sites of the block.

    With w the white coordinates from the start of this site on, image = s·columns w + …, and columns = left gain rightᵀ
    is a singular value decomposition.
    """

    name: str
    shape: tuple[int, ...]
    here: slice
    left: Tensor  # (pixels, r)
    gain: Tensor  # (r,)
    right: Tensor  # (k − start, r)


class _Conditional:
    """p(z | s, x) for any number of data, one site after another, in float64.

    With z = mean + root w, w ~ N(0, I), and pixels in units of the noise: image = s·(shift + columns w) + N(0, I). The
    matrices, which all data share, are factorised once; in the basis of the singular vectors, a datum costs O(k).
    """

    def __init__(self, found: LinearGaussian) -> None:
        loading, self.noise, self.offset, shift, self.mean, covariance = unchecked(found, found.loading.device)
        self.root, _ = torch.linalg.cholesky_ex(covariance)
        self.columns = loading @ self.root / self.noise[:, None]
        self.shift = (shift + loading @ self.mean) / self.noise
        self.prior: Any = None if found.scale is None else prior_of_scale(found, loading.device)
        self.sites, start = [], 0
        for name, shape in found.latents.items():
            here = slice(start, start + prod(shape))
            left, gain, right = torch.linalg.svd(self.columns[:, start:], full_matrices=False)
            self.sites.append(_Site(name, shape, here, left, gain, right.T))
            start = here.stop
        self.spectrum = spectrum_of(self.sites[0].left, self.sites[0].gain, self.shift)
        self._seen: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def scales(self, x: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
        """Nodes of log s and their posterior weights, `(data, nodes)` each; every datum has so many equal rows of x.

        They are computed once for runs with the same data, which are the draws and their density.
        """
        if self._seen is None or self._seen[0] is not x:
            images = project(self.spectrum, self._white(x[::repeats]))
            found = weighted_scales(self.spectrum, images, partial(log_prior, self.prior), bounds(self.prior))
            self._seen = x, found
        return self._seen[1]

    def _white(self, x: Tensor) -> Tensor:
        return (x.reshape(len(x), -1).double() - self.offset) / self.noise

    def sample(self, x: Tensor, scale: Tensor | None, repeats: int) -> None:
        """Sample all sites of the block for data x (size, *event) given their scales (size,), inside the data plate.

        Every datum has so many equal rows of x, one after another: its image is projected once for all of them.
        """
        image, size = self._white(x[::repeats]), len(x)
        s = image.new_ones(size, 1) if scale is None else scale.double()[:, None]
        centre, known = self.mean.expand(size, -1), image.new_zeros(size, 0)  # mean of z, and w, given earlier sites
        for site in self.sites:
            shown = (image @ site.left).repeat_interleave(repeats, 0)
            explained = self.shift @ site.left + known @ (self.columns[:, : site.here.start].T @ site.left)
            value = pyro.sample(site.name, self._given(site, shown - s * explained, s, centre[:, site.here]))
            if site is not self.sites[-1]:
                z = value.reshape(size, -1).double()
                w = _solve(self.root[site.here, site.here], z - centre[:, site.here])
                centre, known = centre + w @ self.root[:, site.here].T, torch.cat([known, w], 1)

    def _given(self, site: _Site, rest: Tensor, s: Tensor, centre: Tensor) -> dist.TorchDistribution:
        """p(z of this site | earlier sites, s, x), with later sites integrated out.

        `rest` is what earlier sites leave of the image, `(size, r)` in the singular directions of this one.
        """
        gain, count = s * site.gain, centre.shape[1]
        mean = (gain * rest / (1 + gain.square())) @ site.right.T
        root, right, stretch = self.root[site.here, site.here], site.right, (1 + gain.square()).sqrt()
        if site is not self.sites[-1]:
            right, stretch = right[:count], stretch[:, :0]
            unseen = torch.eye(count, dtype=right.dtype, device=right.device) - right @ right.T
            within = unseen + (right / (1 + gain.square())[:, None]) @ right.T
            root, right = root @ torch.linalg.cholesky(within), right[:, :0]
        loc = centre + mean[:, :count] @ self.root[site.here, site.here].T
        return _gaussian(loc, root, right, stretch, site.shape)


def _gaussian(
    loc: Tensor, root: Tensor, directions: Tensor, stretch: Tensor, shape: tuple[int, ...]
) -> dist.TorchDistribution:
    """The Normal distribution that `_Coloured` describes, with the given event shape, in the default dtype."""
    dtype = torch.get_default_dtype()
    coloured = _Coloured(*(part.to(dtype) for part in (loc, root, directions, stretch)))
    white = dist.Normal(torch.zeros_like(coloured.loc), 1.0).to_event(1)
    return dist.TransformedDistribution(white, [coloured, ReshapeTransform(loc.shape[1:], torch.Size(shape))])


class _Coloured(Transform):
    """Maps white noise to z = loc + root w, where w has sd 1 / stretch along the directions and sd 1 across them.

    Stretch is used instead of its square, a precision, which would overflow in float32 for scales above 1e19; guides
    draw such scales early in training.

    Args:
        loc: `(size, k)`.
        root: lower triangular, `(k, k)` or `(size, k, k)`.
        directions: orthonormal columns, `(k, r)`.
        stretch: `(size, r)`.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, root: Tensor, directions: Tensor, stretch: Tensor) -> None:
        super().__init__()
        self.loc, self.root, self.directions, self.stretch = loc, root, directions, stretch

    def _call(self, x: Tensor) -> Tensor:
        w = self._along(x, self.stretch.reciprocal())
        return self.loc + torch.einsum("...ij,...j->...i", self.root, w)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._along(_solve(self.root, y - self.loc), self.stretch)

    def _along(self, w: Tensor, factor: Tensor) -> Tensor:
        across = self.directions.shape[0] - self.directions.shape[1]
        if across:
            return w + (w @ self.directions * (factor - 1)) @ self.directions.T
        return (w @ self.directions * factor) @ self.directions.T  # loses no digits where the factors are small

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - self.stretch.log().sum(-1)


def _solve(root: Tensor, value: Tensor) -> Tensor:
    """root⁻¹ value, (size, k), without copies of a root that all data share."""
    if root.dim() == 2:
        return torch.linalg.solve_triangular(root.mT, value, upper=True, left=False)
    return torch.linalg.solve_triangular(root, value[..., None], upper=False)[..., 0]
