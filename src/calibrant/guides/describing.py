"""Guides in a few words, for their `repr` and for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def facts_of_spec(spec: Mapping[str, Any], guide: nn.Module) -> dict[str, str]:
    """Structure, latents with their families and what they see, encoder and number of weights.

    Args:
        spec: specification of the guide, as `amortize` creates it.
        guide: the guide itself.
    """
    found = {"structure": spec["structure"]}
    for site in spec["sites"]:
        parents = f" given {', '.join(site['parents'])}" if site["parents"] else ""
        shared = "" if site["local"] else ", shared"
        found[f"`{site['name']}`{shape_text(site['event_shape'])}"] = f"{site['family']}{parents}{shared}"
    for name, shape in spec.get("block", {}).items():
        if name not in spec["inputs"]:
            found[f"`{name}`{shape_text(shape)}"] = "exact, by the model"
    if getattr(guide, "encoder", None) is not None:
        found["encoder"] = f"{_encoder(spec['encoder'], guide)} of {', '.join(spec['inputs'])}"
    if notes := getattr(guide, "notes", ()):
        found["chosen"] = "; ".join(notes)
    return found | weights_of(guide)


def weights_of(module: nn.Module) -> dict[str, str]:
    """The number of weights of a module, and whether they are fixed."""
    count = sum(weight.numel() for weight in module.parameters())
    is_fixed = count > 0 and not any(weight.requires_grad for weight in module.parameters())
    return {"weights": f"{count:,}{', fixed' if is_fixed else ''}"}


def shape_text(shape: Any) -> str:
    """An event shape behind the name of a site: nothing for a scalar."""
    return f" ({', '.join(map(str, shape))})" if len(shape) else ""


def _encoder(spec: Any, guide: nn.Module) -> str:
    if spec is None:
        return type(guide.encoder).__name__
    if isinstance(spec, str):
        return spec
    kinds = {key: kind["kind"] if isinstance(kind, Mapping) else str(kind) for key, kind in spec.items()}
    names = set(kinds.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{key}: {kind}" for key, kind in kinds.items())
