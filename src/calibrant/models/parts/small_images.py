"""Arguments and covariates of the example constructions of representation models: vectors of four numbers as images."""

from __future__ import annotations

from typing import Any

import torch

NETWORK: dict[str, Any] = {"shape": (4,), "latents": 3, "encoder": {"name": "mlp", "hidden": 8}}
UNCERTAIN: dict[str, Any] = {**NETWORK, "widths": (8,)}
ONE = {"x": lambda size: torch.randn(size, 4)}
TWO = {**ONE, "other": lambda size: torch.randn(size, 4)}
TUPLE = {**ONE, "candidates": lambda size: torch.randn(size, 5, 4)}
