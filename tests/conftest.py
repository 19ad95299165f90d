"""Every test starts from the same seed, and fails when it leaves global state changed."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro.poutine import runtime

import calibrant  # noqa: F401  (it makes Pyro keep parameters in their modules)

torch.set_num_threads(1)


def _state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "Pyro's settings": pyro.settings.get(),
        "Pyro's parameters": sorted(pyro.get_param_store().keys()),
        "Pyro's handlers": len(runtime._PYRO_STACK),
        "Pyro's plates": list(runtime._DIM_ALLOCATOR._stack),
    }


@pytest.fixture
def global_state() -> Callable[[], dict[str, Any]]:
    """A function that reads all global state that a library could leave changed; random state is free to change."""
    return _state


@pytest.fixture(autouse=True)
def same_global_state() -> Iterator[None]:
    """Seeds the test, and compares global state before and after it."""
    pyro.set_rng_seed(0)
    before = _state()
    yield
    after = _state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"global state changed (before, after): {changed}"
    assert not after["Pyro's parameters"], "parameters in Pyro's global store"
