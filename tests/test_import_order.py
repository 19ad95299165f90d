"""Modules are refused that were built before calibrant was imported; after it, Pyro keeps weights in modules."""

import subprocess
import sys

import pytest

PYRO_FIRST = """
import pyro
from pyro.nn import PyroModule, PyroSample
import pyro.distributions as dist, torch

class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
    def forward(self, size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(self.w, 1.0))

early = Model()
import calibrant as cal
late = Model()
cal.program.check_program(late, {"x": torch.zeros(2)})
try:
    cal.program.check_program(early, {"x": torch.zeros(2)})
except cal.errors.ProgramError as error:
    print(error)
assert not pyro.get_param_store().keys()
"""

CALIBRANT_FIRST = """
import sys
import calibrant as cal
assert "pyro" not in sys.modules and "torch" not in sys.modules
import pyro
from pyro.nn import PyroModule
import pyro.distributions as dist, torch
assert pyro.settings.get("module_local_params")

class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
    def forward(self, size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(self.w, 1.0))

cal.program.check_program(Model(), {"x": torch.zeros(2)})
assert pyro.__spec__.name == "pyro" and pyro.__file__
print("built")
"""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (PYRO_FIRST, ("Model was built before `import calibrant`", "import calibrant first")),
        (CALIBRANT_FIRST, ("built",)),
    ],
    ids=["pyro first", "calibrant first"],
)
def test_order_of_imports(script, words):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout
