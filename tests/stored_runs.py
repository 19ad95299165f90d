"""What the tests of run folders share: small modules with random weights, saved, and what they compute."""

from __future__ import annotations

import pyro
import torch

import calibrant as cal
from calibrant import store
from calibrant.inference.fitting.state import Fit

PIXELS = 6


def rows(count=64, seed=0):
    return {"x": torch.randn(count, PIXELS, generator=torch.Generator().manual_seed(seed))}


def modules(name="ppca", seed=0, structure="faithful", **arguments):
    """A model and its guide with random weights."""
    torch.manual_seed(seed)
    model = cal.models.create(name, **{"shape": (PIXELS,), "latents": 3, **arguments})
    guide = cal.guides.amortize(model, rows(), structure=structure, seed=seed)
    with torch.no_grad():
        for weight in (*model.parameters(), *guide.parameters()):
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval(), guide.eval()


def fitted():
    return Fit(
        history=[{"epoch": 1, "train": -1.5, "validation": 1 / 3, "lr": 2e-3}],
        elbo=1 / 3,
        elbo_se=float("nan"),
        epochs=1,
    )


def saved(folder, *pair):
    pair = pair or modules()
    store.save_run(folder, *pair, fitted(), settings={"seed": 0})
    return pair


def outputs(model, guide, dtype=torch.float32):
    """Everything that the pair computes for some data: guide draws, both log densities."""
    data = {"x": rows()["x"].to(dtype)}
    torch.manual_seed(3)
    with torch.no_grad(), pyro.get_param_store().scope():
        run = pyro.poutine.trace(guide).get_trace(data, 64)
        values = {n: s["value"] for n, s in run.nodes.items() if s["type"] == "sample" and n != "data"}
        density = cal.program.log_density(model, {**values, **data}, observed=["x"])
        log_q = cal.program.log_density(lambda size: guide(data, size), values, 64)
    return {**values, **{f"p {n}": v for n, v in density.items()}, **{f"q {n}": v for n, v in log_q.items()}}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])
