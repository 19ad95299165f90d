"""The contract at work on known programs: the log density, and simulation."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from small_models import three_levels
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.program import as_program, check_program, covariate_names, log_density, sample_prior, sites, trace
from calibrant.program.tracing import deterministic

X = torch.tensor([0.3, -1.2, 0.8])

# -- log density -------------------------------------------------------------------------------------------------------


def test_sums_and_shapes():
    values = {"centre": torch.tensor(0.4), "z": torch.tensor([0.1, 0.2, -0.3]), "x": X}
    density = log_density(three_levels, values, observed=["x"])
    normal = torch.distributions.Normal
    prior, local = normal(0.0, 2.0).log_prob(values["centre"]), normal(0.4, 1.0).log_prob(values["z"])
    likelihood = normal(values["z"], 0.5).log_prob(X)
    assert (list(density), len(density), density.size) == (["centre", "z", "x"], 3, 3)
    for found, wanted in (
        (density["centre"], prior),
        (density["z"], local),
        (density.shared, prior),
        (density.local, local + likelihood),
        (density.latent, prior + local.sum()),
        (density.observed, likelihood),
        (density.joint, prior + (local + likelihood).sum()),
        (density.without(["centre"]).joint, local + likelihood),
        (density.without(["centre", "z", "x"]).joint, torch.zeros(3)),
        (density.without(["z", "x"]).local, torch.zeros(3)),
    ):
        torch.testing.assert_close(found, wanted)
        assert found.shape == wanted.shape


def test_mask_scale_factor_and_deterministic():
    seen = torch.tensor([True, False, True])

    def program(size):
        pyro.factor("shared", torch.tensor(0.25))
        with pyro.plate("data", size), poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            double = pyro.deterministic("double", 2 * z)
            with poutine.scale(scale=0.1):
                pyro.sample("x", dist.Normal(double, 0.5))
            pyro.factor("each", -z)

    z = torch.tensor([0.1, 0.2, -0.3])
    density = log_density(program, {"z": z, "x": X}, observed=["x"])
    normal = torch.distributions.Normal
    torch.testing.assert_close(density["z"], normal(0.0, 1.0).log_prob(z) * seen)
    torch.testing.assert_close(density["x"], 0.1 * normal(2 * z, 0.5).log_prob(X) * seen)
    torch.testing.assert_close(density["each"], -z * seen)
    torch.testing.assert_close(density["shared"], torch.tensor(0.25))
    assert set(density) == {"shared", "z", "x", "each"}
    assert density.observed_sites == {"shared", "x", "each"}


def test_deterministic_is_never_conditioned():
    """Prior draws hold deterministic sites too; were one held while its latent moves, the likelihood would be stale."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = pyro.deterministic("mean", 3 * z)
            pyro.sample("x", dist.Normal(mean, 1.0))

    values = sample_prior(program, 3, seed=0)
    assert torch.equal(values["mean"], 3 * values["z"])
    moved = {**values, "z": values["z"] + 1}
    density = log_density(program, moved)
    torch.testing.assert_close(density["x"], torch.distributions.Normal(3 * moved["z"], 1.0).log_prob(values["x"]))
    assert torch.equal(deterministic(trace(program, 3, {}, moved))["mean"]["value"], 3 * moved["z"])


INTEGERS: dict[str, Callable[[Tensor], dist.Distribution]] = {
    "normal": lambda z: dist.Normal(z, 1.0),
    "poisson": lambda z: dist.Poisson(z.exp()),
    "bernoulli": lambda z: dist.Bernoulli(logits=z),
    "geometric": lambda z: dist.Geometric(logits=z),
    "negative-binomial": lambda z: dist.NegativeBinomial(300.0, logits=z),
    "binomial": lambda z: dist.Binomial(255.0, logits=z),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.uint8) for name in INTEGERS), *(("poisson", t) for t in (torch.int16, torch.int64, torch.bool))],
)
def test_integers_have_the_density_of_their_floats(name, dtype):
    """255 + 1 is 0 in uint8: without a cast, lgamma(x + 1) of a count would be infinite."""
    likelihood = INTEGERS[name]

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z))

    binary = dtype is torch.bool or name == "bernoulli"
    x = torch.tensor([0, 1, 1 if binary else 255]).to(dtype)
    z = torch.zeros(3)
    wanted = likelihood(z).log_prob(x.float())
    assert wanted.isfinite().all()
    torch.testing.assert_close(log_density(program, {"z": z, "x": x})["x"], wanted)
    check_program(program, {"x": x})


def test_classes_stay_integers():
    def program(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 1.0])[k], 1.0))

    for k in (torch.tensor([0, 2, 1]), torch.tensor([0.0, 2.0, 1.0])):
        density = log_density(program, {"k": k, "x": X})
        torch.testing.assert_close(density["k"], torch.tensor([0.2, 0.5, 0.3]).log())
        torch.testing.assert_close(density["x"], torch.distributions.Normal(k.float() - 1, 1.0).log_prob(X))


def test_density_carries_gradients_and_runs_under_vmap():
    """Chains of programs with shared latents are batched by vmap."""
    z = torch.zeros(3, requires_grad=True)
    values = {"centre": torch.tensor(0.5, requires_grad=True), "z": z, "x": X}
    log_density(three_levels, values).joint.backward()
    torch.testing.assert_close(z.grad, X / 0.25 + 0.5)

    def joint(centre: Tensor, z: Tensor) -> Tensor:
        return log_density(three_levels, {"centre": centre, "z": z, "x": X}, 3).joint

    centres, zs = torch.randn(5), torch.randn(5, 3)
    with pyro.validation_enabled(False):  # torch's own checks branch on values, which vmap can't
        batched = torch.func.vmap(joint)(centres, zs)
    torch.testing.assert_close(batched, torch.stack([joint(c, z) for c, z in zip(centres, zs, strict=True)]))


def test_a_run_leaves_the_given_values_alone():
    values = {"centre": torch.tensor(0.4), "z": torch.zeros(3), "x": X.clone()}
    before = {name: value.clone() for name, value in values.items()}
    log_density(three_levels, values)
    sites(three_levels, {"x": values["x"]})
    check_program(three_levels, {"x": values["x"]})
    assert all(torch.equal(values[name], before[name]) for name in values)


# -- simulation --------------------------------------------------------------------------------------------------------


def test_prior_draws_follow_the_program():
    """Means and variances of 20,000 draws of centre + z + x, and their seed."""
    draws = [sample_prior(three_levels, 1, seed=i) for i in range(3)]
    assert draws[0]["x"] != draws[1]["x"]
    assert {name: value.shape for name, value in draws[0].items()} == {"centre": (), "z": (1,), "x": (1,)}
    many = sample_prior(three_levels, 20_000, seed=0)
    again = sample_prior(three_levels, 20_000, seed=0)
    assert all(torch.equal(many[name], again[name]) for name in many)
    for residual, sd in ((many["z"] - many["centre"], 1.0), (many["x"] - many["z"], 0.5)):
        # Four statistics: z = 4.85. A mean off by 0.046 sd, or a variance by 6.5%, is seen with 95% power.
        limit = 4.85
        assert abs(float(residual.mean())) < limit * sd / math.sqrt(20_000)
        assert abs(float(residual.var()) / sd**2 - 1) < limit * math.sqrt(2 / 20_000)


def test_covariates_reach_the_program():
    def program(size, dose, label=None):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(dose, 1e-3))

    assert covariate_names(program) == ("dose", "label")
    dose = torch.tensor([1.0, 5.0])
    assert torch.allclose(sample_prior(program, 2, {"dose": dose}, seed=0)["x"], dose, atol=0.01)


def test_as_program():
    model = PyroModule()
    assert as_program(model) is model
    layer = nn.Linear(1, 1)
    assert dict(as_program(layer).named_parameters()).keys() == {"function.weight", "function.bias"}
    with pytest.raises(ProgramError, match="not int"):
        as_program(3)
