"""The guard of the tests themselves: it sees global state that a test leaves changed."""

import pyro
import pytest
import torch
from pyro import poutine


@pytest.mark.parametrize(
    ("change", "restore"),
    [
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
        (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
        (lambda: pyro.enable_validation(False), lambda: pyro.enable_validation(True)),
        (lambda: pyro.settings.set(module_local_params=True), lambda: pyro.settings.set(module_local_params=False)),
        (lambda: pyro.param("p", torch.zeros(())), pyro.clear_param_store),
        (lambda: pyro.plate("data", 2).__enter__(), poutine.runtime.NonlocalExit({}).reset_stack),
    ],
    ids=["dtype", "device", "grad", "validation", "settings", "parameter", "plate"],
)
def test_guard_sees_changed_global_state(global_state, change, restore):
    before = global_state()
    change()
    assert global_state() != before
    restore()
    poutine.runtime._PYRO_STACK.clear()
    assert global_state() == before
