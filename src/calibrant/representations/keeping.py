"""A trained representation as one file: weights as safetensors, and in its header JSON, what rebuilds the networks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from calibrant.errors import ProgramError, RunError
from calibrant.folders.configuration import finite
from calibrant.folders.files import new_file
from calibrant.folders.tensors import check_fits, digest_of_tensors, set_weights, tensors_of
from calibrant.representations.learners.learner import Learner
from calibrant.representations.learners.registry import METHODS, build
from calibrant.representations.learners.trunks import Inputs, check_backbone

_KEY, _FORMAT, _TUNED = "calibrant representation", 1, "trained"
_KINDS = {
    "format": int,
    "method": str,
    "shape": list,
    "classes": list,
    "common": dict,
    "arguments": dict,
    "history": list,
    "backbone": str,
}


def write(file: str | Path, learner: Learner, about: Mapping[str, Any], half: bool) -> Path:
    """Write a file.

    Args:
        file: its name.
        learner: the networks; its `inputs` are the arguments that all methods have.
        about: what else is kept: `method`, `classes` (a list), `arguments`, `history`.
        half: whether weights are stored as float16.

    Raises:
        RunError: for arguments of the method that have no JSON form, or weights that float16 cannot hold.
    """
    path, inputs = Path(file), learner.inputs
    tensors = tensors_of(learner)
    if half:
        tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        if wide := [name for name, value in tensors.items() if not value.isfinite().all()]:
            raise RunError(f"{path} cannot be written: {wide} are too large for float16; use half=False")
    common = {name: getattr(inputs, name) for name in ("trunk", "latents", "width")}
    facts = {
        **about,
        "format": _FORMAT,
        "shape": list(inputs.shape),
        "common": common,
        "backbone": backbone_digest(inputs),
    }
    try:
        text = json.dumps(finite(facts), sort_keys=True)
    except TypeError as error:
        raise RunError(f"{path} cannot be written: the arguments of the method are no JSON values ({error})") from error
    if path.is_dir():
        raise RunError(f"{path} is a folder: give the name of a file, such as {path / 'kept.safetensors'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(tensors, {_KEY: text, "sha256": digest_of_tensors(tensors, text)})
    with new_file(path) as new:
        new.write_bytes(content)
    return path


def backbone_digest(inputs: Inputs) -> str:
    """The sha256 of the weights of a frozen backbone; the weights of one that was trained are in the file itself."""
    if inputs.backbone is None:
        return ""
    return _TUNED if inputs.tunes else digest_of_tensors(tensors_of(inputs.backbone))


def read(file: str | Path, backbone: nn.Module | None) -> dict[str, Any]:
    """What a file holds: `learner`, `method`, `classes`, `arguments` and `history`; weights in float16 become float32.

    Raises:
        RunError: for a file that is missing, damaged, of another kind, or made with another backbone.
    """
    path = Path(file)
    check_backbone(backbone)
    facts, tensors = _content(path)
    try:
        inputs = Inputs(tuple(facts["shape"]), len(facts["classes"]), backbone=backbone, **facts["common"])
        _check_backbone(path, facts["backbone"], inputs)
        learner = build(METHODS[facts["method"]], inputs, facts["arguments"], seed=0)
    except (ProgramError, TypeError) as error:
        raise RunError(f"{path} cannot be rebuilt by this version of calibrant: {error}") from error
    tensors = {name: value.float() if value.dtype == torch.float16 else value for name, value in tensors.items()}
    check_fits(str(path), learner, tensors)
    set_weights(learner, tensors)
    return {"learner": learner.eval(), **{key: facts[key] for key in ("method", "classes", "arguments", "history")}}


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise RunError(f"there is no file {path}: Trained.save(FILE) writes one")
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
    except Exception as error:  # a file that is no safetensors raises errors of any kind
        raise RunError(f"{path} cannot be read as safetensors ({error}): copy the file again") from error
    text = header.get(_KEY)
    if text is None:
        raise RunError(f"{path} is no representation of calibrant: give a file that Trained.save wrote")
    if header.get("sha256") != digest_of_tensors(tensors, text):
        raise RunError(f"{path} is damaged: its content is not the one that was written; copy the file again")
    return _facts(path, text), tensors


def _facts(path: Path, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: its header is no JSON ({error}); copy the file again") from error
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise RunError(f"{path} was written by another version of calibrant: use that version, or train again")
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(facts.get(name), kind)]:
        raise RunError(f"{path} is damaged: {', '.join(wrong)} in its header cannot be used; copy the file again")
    return facts


def _check_backbone(path: Path, recorded: str, inputs: Inputs) -> None:
    if recorded and inputs.backbone is None:
        raise RunError(f"{path} was trained behind a backbone: give it, load_representation(file, backbone=…)")
    if not recorded and inputs.backbone is not None:
        raise RunError(f"{path} was trained on features, without a backbone: leave out backbone=")
    if (recorded == _TUNED) != inputs.tunes:
        was = "trained too" if recorded == _TUNED else "frozen"
        raise RunError(f"{path} has a backbone that was {was}: give it in the same state, with requires_grad_(…)")
    if backbone_digest(inputs) != recorded:
        raise RunError(
            f"{path} was trained behind a backbone with other weights: give the one that it was trained with"
        )
