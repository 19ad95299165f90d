"""Random streams: every purpose has one of its own, and neighbouring seeds share none."""

import sys
from collections import defaultdict

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import calibrant as cal
from calibrant.evaluation.remedying import richer
from calibrant.streams import stream

PROBES = {0, 1, 7_040_021}  # of runs that look at a program or a guide; none of their draws is part of a result
DATA = 1_234_567  # seed of the data
HELPERS = ("seeded", "sample_prior")  # they seed for whoever calls them


def test_a_stream_depends_on_the_seed_and_on_every_name():
    keys = [(s, *names) for s in range(20) for names in [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", "1")]]
    found = [stream(*key) for key in keys]
    assert len(set(found)) == len(keys)
    assert found == [stream(*key) for key in keys]


def test_a_stream_is_the_same_on_every_machine():
    assert stream(0, "fit", "draws", 3) == 2045847623107416212


def test_a_stream_seeds_every_generator():
    seeds = [stream(seed, "draws") for seed in range(500)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    drawn = {float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(drawn) == len({np.random.default_rng(seed).random() for seed in seeds}) == 500


def test_a_numpy_integer_is_the_same_seed():
    assert stream(np.int64(3), "draws") == stream(3, "draws")


def two_latents(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(z * scale[..., None], 0.5).to_event(1))


@pytest.fixture
def used(monkeypatch):
    """Seed → the lines of the package that seeded a generator with it."""
    found = defaultdict(set)

    def recording(function, place):
        def record(*args, **kwargs):
            frame = sys._getframe(1)
            while frame.f_code.co_name in HELPERS or frame.f_code.co_filename.endswith("contextlib.py"):
                frame = frame.f_back
            if "/calibrant/" in frame.f_code.co_filename and "/linear_gaussian/" not in frame.f_code.co_filename:
                found[int(args[place])].add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            return function(*args, **kwargs)

        return record

    monkeypatch.setattr(torch, "manual_seed", recording(torch.manual_seed, 0))
    monkeypatch.setattr(np.random, "default_rng", recording(np.random.default_rng, 0))

    class Generator(torch.Generator):
        manual_seed = recording(torch.Generator.manual_seed, 1)

    monkeypatch.setattr(torch, "Generator", Generator)
    return found


def _run(seed, tried):
    """Everything that takes a seed, with the same one; remedies, which train several guides, where they are tried."""
    x = cal.program.sample_prior(two_latents, 6, seed=DATA)["x"]
    guide = cal.guides.amortize(two_latents, {"x": x}, seed=seed)
    cal.inference.fit(two_latents, guide, {"x": x}, epochs=2, batch_size=2, validation=0.3, seed=seed)
    tree = cal.inference.posterior(two_latents, guide, {"x": x}, 100, groups=cal.inference.GROUPS, seed=seed)
    cal.inference.importance(tree, seed=seed)
    if tried:
        cal.evaluation.remedies(two_latents, guide, {"x": x}, draws=100, steps=1, refine_steps=3, seed=seed)
    check = cal.evaluation.check(two_latents, guide, {"x": x}, draws=100, simulations=100, seed=seed)
    assert check.result.gap is not None
    assert check.result.calibration is not None
    cal.evaluation.pit(check.result.amortized, check.result.reference, draws=20, seed=seed)


@pytest.mark.parametrize("tried", [False, pytest.param(True, marks=pytest.mark.truth)])
def test_no_two_purposes_and_no_two_seeds_share_a_stream(used, monkeypatch, short_gap, tried):
    """The same seed for guide, training and check; then its neighbour for all of them."""
    monkeypatch.setattr(richer, "_SIMULATED", 300)  # training data of the remedies
    streams = []
    for seed in (3, 4):
        used.clear()
        _run(seed, tried)
        own = {key: lines for key, lines in used.items() if key not in {*PROBES, DATA}}
        assert {key: lines for key, lines in own.items() if len(lines) > 1} == {}
        assert len(own) > 20
        streams.append(set(own))
    assert not streams[0] & streams[1]
    assert not {3, 4} & (streams[0] | streams[1]), "the user's seed is divided wherever it is used"
