"""Recorded and compiled functions give what the function gives, and fall back to it."""

import os
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from calibrant.inference.graphs.recording import compiled, record
from calibrant.program import trace
from calibrant.program.density import density_of


def program(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Laplace(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(torch.tanh(z), 0.5).to_event(1))


def value_and_slope(z, x):
    z = z.detach().requires_grad_()
    held = {"z": z, "x": x}
    density = density_of(trace(program, len(x), values=held), len(x), held).joint
    return density.detach(), *torch.autograd.grad(density.sum(), z)


@pytest.fixture
def inputs():
    return torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def test_recorded(inputs):
    graph = record(value_and_slope, *inputs)
    assert graph is not value_and_slope
    other = inputs[1], inputs[0]  # what is recorded is the function, not its value
    for ours, theirs in zip(graph(*other), value_and_slope(*other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled(inputs):
    fast = compiled(value_and_slope, *inputs)
    other = inputs[1], inputs[0]
    for ours, theirs in zip(fast(*other), value_and_slope(*other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [record, compiled])
def test_what_cannot_be_recorded_runs_as_it_is(make, inputs):
    def branches(z, x):
        return ((z if z.sum() > 0 else -z) + x,)

    with pytest.warns(RuntimeWarning, match="could not be recorded") as caught:
        function = make(branches, *inputs)
    assert function is branches
    assert len(caught) == 1


def test_what_cannot_be_compiled_runs_as_recorded(inputs, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    with pytest.warns(RuntimeWarning, match="could not be compiled.*no compiler here"):
        function = compiled(value_and_slope, *inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(function(*inputs)[0], value_and_slope(*inputs)[0])


IN_A_PROCESS = """
import torch
from torch._dynamo.utils import counters
from calibrant.inference.graphs.recording import compiled

torch.manual_seed({seed})
network, scale = torch.nn.Linear(3, 3), torch.rand(())
x = torch.randn(5, 3)
function = lambda x: ((torch.tanh(network(x)) * scale).sum(1),)
torch.testing.assert_close(compiled(function, x)(-x), function(-x))
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_another_process_finds_the_compiled_graph_for_other_weights(tmp_path):
    hits = []
    for seed in range(2):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS.format(seed=seed)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        hits.append(int(done.stdout))
    assert hits == [0, 1]
