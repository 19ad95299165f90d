"""Calibration of local latents given the guide's draws of shared ones: uniform if q(z | x, shared) is exact."""

from __future__ import annotations

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError
from calibrant.evaluation import calibration, check, uniformity, verdicts
from calibrant.evaluation.statistics.simulated_data import simulated_data
from calibrant.inference import posterior
from calibrant.inference.problem import Problem
from calibrant.program import sample_prior, sites

X = {"x": 0.5 + torch.randn(40, generator=torch.Generator().manual_seed(0))}
QUANTITIES = ["z", "log_likelihood", "log_joint", "hpd", "tarp"]


def model(size: int) -> None:
    """Given m, the posterior of z is N((m + x)/2, ½)."""
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def bumps(loc: Tensor, scale: float, count: int) -> dist.Distribution:
    """A mixture of equally high bumps, with the mean and sd that are given."""
    places = torch.linspace(-1.0, 1.0, count)
    places = places * math.sqrt((1 - 0.35**2) / float(places.var(unbiased=False)))
    parts = dist.Normal(loc[:, None] + scale * places, 0.35 * scale)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(loc), count)), parts, validate_args=False)


def guide(shape: str = "normal", sd: float = 1.0, ignores: bool = False):
    """Wide draws of m, and the exact posterior of z given m, or one with a defect: a wrong shape of the right mean and
    sd, a wrong sd, or a z that ignores m."""

    def run(observed: dict[str, Tensor], size: int) -> None:
        m = pyro.sample("m", dist.Normal(torch.tensor(0.5), 1.0))
        loc, scale = ((0.5 if ignores else m) + observed["x"]) / 2, math.sqrt(0.5) * sd
        half = math.sqrt(3) * scale
        shapes = {
            "normal": lambda: dist.Normal(loc, scale),
            "two bumps": lambda: bumps(loc, scale, 2),
            "three bumps": lambda: bumps(loc, scale, 3),
            "uniform": lambda: dist.Uniform(loc - half, loc + half, validate_args=False),
        }
        with pyro.plate("data", size):
            pyro.sample("z", shapes[shape]())

    return run


def test_exact_conditional_is_uniform_and_passes():
    """However wide the draws of the shared latent are, which are not judged."""
    tree = calibration(model, guide(), X, simulations=2000, draws=100)
    table = uniformity(tree)
    assert table["quantity"].values.tolist() == QUANTITIES
    assert float(table["p_value"].min()) * len(QUANTITIES) > 1e-5
    assert float(table["ecdf_difference"].max()) < 0.05
    assert {verdict.status for verdict in verdicts(None, calibration=tree)} == {"pass"}
    attrs = tree["prior_sbc"].attrs
    assert json.loads(attrs["shared_held"]) == ["m"]
    assert (attrs["latents"], attrs["guide_draws"]) == (1, 100)
    assert tree["recovery"]["latent"].values.tolist() == ["z"]


@pytest.mark.parametrize(
    ("defect", "distance"),
    [
        ({"shape": "two bumps"}, 0.29),
        ({"shape": "three bumps"}, 0.14),
        ({"shape": "uniform"}, 0.12),
        ({"sd": 0.8}, 0.11),
        ({"ignores": True}, 0.08),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the program could not be recorded")
def test_planted_defects_are_seen(defect, distance):
    """In the log joint; the distance is that of 4,000 simulations with 500 draws."""
    row = uniformity(calibration(model, guide(**defect), X, simulations=1000, draws=50)).sel(quantity="log_joint")
    assert float(row["p_value"]) < 1e-5
    assert float(row["ecdf_difference"]) == pytest.approx(distance, abs=0.06)


@pytest.mark.truth
def test_distances_at_a_large_budget():
    far = {}
    for shape in ("normal", "three bumps", "uniform"):
        table = uniformity(calibration(model, guide(shape), X, simulations=4000, draws=500))
        far[shape] = float(table.sel(quantity="log_joint")["ecdf_difference"])
    assert far["normal"] < 0.03
    assert far["three bumps"] == pytest.approx(0.14, abs=0.02)
    assert far["uniform"] == pytest.approx(0.12, abs=0.02)


def test_quantities_see_the_shared_latent_that_was_drawn_at_the_data():
    """Also where the guide's density of it depends on all data; every batch has another draw."""
    seen, data = [], {"x": X["x"] + 100.0}

    def reads_all(observed, size):
        x = observed["x"]
        m = pyro.sample("m", dist.Normal(x.mean(), 0.1))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal((m + x) / 2, math.sqrt(0.5)))

    def level(latents, observed):
        seen.append(float(latents["m"][0]))
        return latents["z"] - latents["m"]

    tree = calibration(model, reads_all, data, 100, 50, quantities={"level": level})
    assert len(set(seen)) == 13, "8 simulations to a draw"
    assert abs(np.mean(seen) - float(data["x"].mean())) < 0.2
    assert float(uniformity(tree).sel(quantity="level")["p_value"]) > 1e-5


def test_data_are_simulated_given_the_same_draws():
    problem = Problem.of(model, guide(), X)
    made = simulated_data(problem, sites(model, X), 1600, 8, seed=0)
    m = made.shared["m"].repeat_interleave(8)
    assert made.shared["m"].shape == (200,)
    for values in (made.values["z"], made.points["z"]):
        assert float((values - m).std()) == pytest.approx(1.0, abs=0.08)
        assert float((values - m).mean()) == pytest.approx(0.0, abs=0.11)
    assert float((made.values["x"] - made.values["z"]).std()) == pytest.approx(1.0, abs=0.08)
    assert abs(np.corrcoef((made.values["z"] - m).numpy(), (made.points["z"] - m).numpy())[0, 1]) < 0.11


def test_values_that_are_given_are_kept_in_a_simulation():
    drawn = sample_prior(model, 500, seed=0, values={"m": torch.tensor(50.0)})
    assert float(drawn["m"]) == 50.0
    assert float(drawn["x"].mean()) == pytest.approx(50.0, abs=0.4)


def vectors(size: int, dose: Tensor) -> None:
    """Two shared latents, one of them without a proper prior; local ones that are a vector and a coin; a covariate."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    level = pyro.sample("level", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0).to_event(1))
        side = pyro.sample("side", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z + (level + dose + side)[:, None], 1.0).to_event(1))


@pytest.mark.parametrize("structure", ["full", "program"])
def test_amortized_guides_of_any_structure(structure):
    data = {"x": torch.randn(12, 3), "dose": torch.rand(12)}
    torch.manual_seed(0)
    fresh = cal.guides.amortize(vectors, data, structure=structure).eval()
    group = calibration(vectors, fresh, data, 101, 50, seed=2)["prior_sbc"].dataset
    assert list(group.data_vars) == ["z", "side", *QUANTITIES[1:]]
    assert group["z"].shape == (1, 101, 3)
    assert json.loads(group.attrs["shared_held"]) == ["w", "level"]
    assert group.attrs["latents"] == 4


def test_the_seed_decides():
    first, again, other = (calibration(model, guide(), X, 100, 50, seed=seed)["prior_sbc"]["z"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def only_shared(size: int) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(m, 1.0))


def test_refusals():
    def mixes(observed, size):
        m = pyro.sample("m", dist.Normal(torch.tensor(0.5), 1.0))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal((m + observed["x"].mean()) / 2 * torch.ones(size), 1.0))

    with pytest.raises(ProgramError, match="given its shared latents: site 'z' changes on"):
        calibration(model, mixes, X)
    with pytest.raises(InferenceError, match=r"\['m'\], are shared.*posterior_calibration"):
        calibration(only_shared, cal.guides.amortize(only_shared, X), X)


def test_a_check_calibrates_programs_with_shared_latents():
    reference = posterior(model, guide(), X, draws=100, seed=5)
    found = check(model, guide(), X, reference, draws=100, simulations=100, remedies=False)
    assert found.result.calibration is not None
    assert "log joint" in {verdict.quantity for verdict in found.verdicts}
    notes = " ".join(found.result.config["notes"])
    assert "no calibration by simulation" not in notes
    alone = cal.guides.amortize(only_shared, X).eval()
    found = check(only_shared, alone, X, posterior(only_shared, alone, X, draws=100), draws=100, remedies=False)
    assert "no calibration by simulation: all latents, ['m'], are shared" in " ".join(found.result.config["notes"])
