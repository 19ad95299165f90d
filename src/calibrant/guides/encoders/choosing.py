"""The choice of an encoder, by the shapes of the inputs or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

from torch import nn

from calibrant.errors import ProgramError
from calibrant.guides.encoders.collections import SequenceEncoder, SetEncoder
from calibrant.guides.encoders.ea_vae import EAVAEConvEncoder, EAVAEMLPEncoder
from calibrant.guides.encoders.images import ConvEncoder, MLPEncoder, SigmaVAEEncoder
from calibrant.guides.encoders.inputs import ClassEncoder, Filled, FusedEncoder
from calibrant.guides.encoders.layers import Shapes


def encoder_of(spec: Mapping[str, Any]) -> nn.Module:
    """A new encoder, as the specification of a guide describes it."""
    if spec["encoder"] is None:
        raise ProgramError("this guide was made with an encoder of your own: give it again, encoder=")
    return make_encoder(spec["encoder"], {name: tuple(shape) for name, shape in spec["inputs"].items()})


KINDS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPEncoder,
    "conv": ConvEncoder,
    "set": SetEncoder,
    "sequence": SequenceEncoder,
    "classes": ClassEncoder,
    "sigma-vae": SigmaVAEEncoder,
    "ea-vae-mlp": EAVAEMLPEncoder,
    "ea-vae-conv": EAVAEConvEncoder,
}
_IMAGE_SIDE = 8  # pixels of a side from which an input with three dimensions is called an image
_SETS, _IMAGES, _ANY = ("set", "sequence"), ("conv", "sigma-vae", "ea-vae-conv"), ("mlp", "ea-vae-mlp")
_PUBLISHED = ("sigma-vae", "ea-vae-mlp", "ea-vae-conv")
_OF_ONE_WIDTH = ("classes", *_PUBLISHED)  # kinds that are no narrower beside other inputs


def default_encoder(shapes: Shapes) -> str | dict[str, Any]:
    """The default encoder for inputs of these shapes, as a specification for `make_encoder`.

    It is "conv" for an image of more than 1,024 entries, "sequence" for an input (times, entries) with a mask, and
    "mlp" for all other inputs. A mask is an input called "mask" or "NAME_mask" that has the shape of the input NAME, or
    of the elements of NAME.
    """
    kinds = _by_input({}, shapes)
    return kinds[next(iter(shapes))]["kind"] if len(shapes) == 1 else kinds


def choice_told(shapes: Shapes) -> tuple[str, ...]:
    """What `default_encoder` has chosen for images, and the alternative, in a phrase; nothing without images."""
    words = {"conv": ("convolutions", "'mlp' is faster"), "mlp": ("an MLP", "'conv' has convolutions, and is slower")}
    return tuple(
        f"{words[kind['kind']][0]} for the image `{name}`, by its size (the encoder {words[kind['kind']][1]})"
        for name, kind in _by_input({}, shapes).items()
        if len(shapes[name]) == 3 and min(shapes[name][1:]) >= _IMAGE_SIDE and kind["kind"] in words
    )


def make_encoder(spec: str | Mapping[str, Any], shapes: Shapes) -> nn.Module:
    """Build an encoder, `dict of inputs → (size, features)`, from its specification (JSON values), without data.

    Args:
        spec: "mlp" for all inputs joined to one vector; "ea-vae-mlp" for every input; "conv", "sigma-vae" or
            "ea-vae-conv" (the published networks of the σ-VAE and the EA-VAE) for all inputs with three dimensions,
            "set" or "sequence" for all with two, with the encoders of `default_encoder` for the remaining inputs;
            `{"name": name, **options}` for one of these with options of its class (`hidden`, `width`, …); or input →
            kind. A kind is one of these names, "classes", or `{"kind": name, **options}`, with `mask` for the name of
            the input that masks this one. Masked entries never affect the features.
        shapes: input → event shape, of observations and covariates.

    Raises:
        ProgramError: for an unknown kind, input or option, and for a shape that a kind does not take.
    """
    if spec == "mlp":
        return MLPEncoder(shapes)
    kinds = kinds_of(spec, shapes)
    parts = [_make_part(name, kind, shapes, alone=len(kinds) == 1) for name, kind in kinds.items()]
    return parts[0] if len(parts) == 1 else FusedEncoder(parts)


def encoder_of_a_scale(spec: str | Mapping[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The specification of an encoder for the scale that multiplies an input: no feature is linear in the input itself.

    Data of a Gaussian scale mixture include images with fifty times the usual contrast. For these, a log scale that is
    linear in the image is far off, although theirs are the scales that the data determine best.
    """
    kinds = _by_input({name: spec}, {name: shape}) if isinstance(spec, str) else kinds_of(spec, {name: shape})
    options = {"mlp": {"vector": False}, "conv": {"vector": False}}
    return {name: {**options.get(kind["kind"], {}), **kind} for name, kind in kinds.items()}


ENCODERS: dict[str, Callable[[Shapes], nn.Module]] = {
    name: partial(make_encoder, name) for name in ("mlp", "conv", *_SETS)
}


def kinds_of(spec: str | Mapping[str, Any], shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Input → `{"kind": name, **options}` for a specification that `make_encoder` takes, other than a lone "mlp".

    Raises:
        ProgramError: for an unknown kind or input.
    """
    if not isinstance(spec, Mapping):
        return _by_input(_by_dimensions(spec, shapes), shapes)
    if "name" in spec and "name" not in shapes:
        options = {key: value for key, value in spec.items() if key != "name"}
        names = _by_dimensions(spec["name"], shapes)
        return _by_input({name: {"kind": kind, **options} for name, kind in names.items()}, shapes)
    return _by_input(spec, shapes)


def is_published(spec: str | Mapping[str, Any] | None) -> bool:
    """Whether an encoder is a published network, whose features go to linear layers for means and log variances.

    Args:
        spec: specification of an encoder, such as "sigma-vae" or input → `{"kind": name, …}`; None for a module.
    """
    if isinstance(spec, Mapping):
        kinds = [kind.get("kind") if isinstance(kind, Mapping) else kind for kind in spec.values()]
        return len(kinds) == 1 and kinds[0] in _PUBLISHED
    return spec in _PUBLISHED


def _by_dimensions(kind: str, shapes: Shapes) -> dict[str, str]:
    if _known(kind) in _ANY:
        return dict.fromkeys(shapes, kind)
    wanted = 3 if kind in _IMAGES else 2
    masks = {_mask_of(name, shapes) for name in shapes}
    found = {name: kind for name, shape in shapes.items() if len(shape) == wanted and name not in masks}
    if not found or kind == "classes":
        raise ProgramError(
            f"encoder={kind!r} finds no input that fits it among {dict(shapes)}: name the kind of each, "
            'encoder={"NAME": "KIND"}, or use encoder="mlp"'
        )
    return found


def _by_input(spec: Mapping[str, Any], shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Input → kind with options, for all inputs except those that only mask a set or sequence."""
    if unknown := set(spec) - set(shapes):
        raise ProgramError(f"encoder= names {sorted(unknown)}, which are no inputs; those are {sorted(shapes)}")
    kinds = {name: _kind(name, spec.get(name), shapes) for name in shapes}
    masks = {kind.get("mask") for kind in kinds.values() if kind["kind"] in _SETS}
    return {name: kind for name, kind in kinds.items() if name in spec or name not in masks}


def _kind(name: str, asked: Any, shapes: Shapes) -> dict[str, Any]:
    """The kind of one input with its options, including its mask if it has one."""
    shape, mask = shapes[name], _mask_of(name, shapes)
    if asked is None:
        asked = "sequence" if mask and len(shape) == 2 else "conv" if len(shape) == 3 and prod(shape) > 1024 else "mlp"
    kind = {"kind": asked} if not isinstance(asked, Mapping) else dict(asked)
    if _known(kind.get("kind")) != "classes" and mask:
        kind = {"mask": mask, **kind}
    if (mask := kind.get("mask")) is None:
        return {key: value for key, value in kind.items() if key != "mask"}
    if mask not in shapes or shapes[mask] not in (shape, shape[:1]):
        found = f"has shape {shapes[mask]}" if mask in shapes else "is no input"
        raise ProgramError(f"the mask {mask!r} of {name!r} {found}, wanted one of shape {shape} or {shape[:1]}")
    return kind


def _known(kind: Any) -> str:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ProgramError(f"unknown encoder {kind!r}; known: {sorted(KINDS)}, or a module of your own for all inputs")
    return kind


def _make_part(name: str, kind: Mapping[str, Any], shapes: Shapes, alone: bool) -> nn.Module:
    """The encoder of one input; if there are other inputs too, it is half as wide as usual."""
    options, mask = {key: value for key, value in kind.items() if key not in ("kind", "mask")}, kind.get("mask")
    if not alone and kind["kind"] not in _OF_ONE_WIDTH:
        options = {"hidden": 128, **options}
    own = {name: shapes[name]}
    try:
        if kind["kind"] in _SETS:
            return KINDS[kind["kind"]](own if mask is None else {**own, mask: shapes[mask]}, mask=mask, **options)
        part = KINDS[kind["kind"]](own, **options)
    except TypeError as error:
        raise ProgramError(f"encoder={{{name!r}: {dict(kind)}}}: {error}") from error
    return part if mask is None else Filled(part, name, mask, shapes[name])


def _mask_of(name: str, shapes: Shapes) -> str | None:
    """The name of the mask of an input: "NAME_mask" or "mask", with the shape of the input or of its elements."""
    shape = shapes[name]
    allowed = [shape, shape[:1]] if len(shape) == 2 else [shape]
    if not shape or name.endswith("mask"):
        return None
    return next((mask for mask in (f"{name}_mask", "mask") if mask in shapes and shapes[mask] in allowed), None)
