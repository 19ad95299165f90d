"""Mixtures as priors and likelihoods: where they are admitted, their posterior is right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.inference.references.sampling import exact_structure
from calibrant.program.supports import from_line

HALVES = dist.Categorical(torch.tensor([0.5, 0.5]))


def angles(size):
    """z is a mixture of two angles, and its cosine is seen."""
    parts = dist.VonMises(torch.tensor([-0.5, 0.5]), 1.0)
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.MixtureSameFamily(HALVES, parts))
        pyro.sample("x", dist.Normal(z.cos(), 2.0))


def test_a_mixture_of_angles_is_a_circle_and_not_a_line():
    x = {"x": cal.program.sample_prior(angles, 200, seed=0)["x"]}
    guide = cal.guides.amortize(angles, x)
    assert guide.spec["sites"][0]["family"] == "vonmises"
    fit = cal.inference.fit(angles, guide, x, epochs=20, batch_size=32, lr=1e-2)
    z = torch.linspace(-math.pi, math.pi, 2001, dtype=torch.float64)[:-1]
    prior = (0.5 * torch.stack([dist.VonMises(m, 1.0).log_prob(z).exp() for m in (-0.5, 0.5)])).sum(0)
    likelihood = dist.Normal(z.cos(), 2.0).log_prob(x["x"].double()[:, None]).exp()
    evidence = float((prior * likelihood).mean(1).mul(2 * math.pi).log().mean())
    assert fit.elbo < evidence + 0.15  # of other data; on an improper line it grows without bound


def spiked(size, width=1e-4):
    """The scale is near exp(−2), within a narrow spike, or near exp(2)."""
    parts = dist.LogNormal(torch.tensor([-2.0, 2.0]), torch.tensor([width, 0.5]))
    with pyro.plate("data", size):
        s = pyro.sample("s", dist.MixtureSameFamily(HALVES, parts))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(s[:, None] * z, 0.5).to_event(1))


def test_a_scale_that_is_a_mixture_is_left_to_chains():
    """A grid over the scale may miss a narrow component and not know it."""
    assert exact_structure(spiked, {"x": torch.randn(4, 2)}) is None


LIKELIHOODS = {
    "binomial": lambda z: dist.Binomial(10, logits=torch.stack([z, -z], -1)),
    "pareto": lambda z: dist.Pareto(torch.tensor([1.0, 2.0]).expand(*z.shape, 2), z.exp()[..., None] + 1),
}


@pytest.mark.parametrize("parts", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_observed_mixtures_with_bounds_of_each_component_are_taken(parts):
    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(size, 2)), parts(z)))

    x = {"x": cal.program.sample_prior(program, 5, seed=0)["x"].clamp_min(2.5)}
    cal.program.check_program(program, x)


def of_uniforms(highs):
    def program(size):
        with pyro.plate("data", size):
            parts = dist.Uniform(torch.zeros(2), torch.tensor(highs))
            z = pyro.sample("z", dist.MixtureSameFamily(HALVES, parts))
            pyro.sample("x", dist.Normal(z, 0.5))

    return program


def test_latent_mixtures_need_components_with_the_same_support():
    x, line = {"x": torch.tensor([0.5, 2.0, 3.5])}, torch.randn(3, dtype=torch.float64)
    prior = cal.program.trace(of_uniforms([4.0, 4.0]), 3).nodes["z"]["fn"]
    assert torch.equal(from_line(prior.support)(line), biject_to(constraints.interval(0.0, 4.0))(line))
    assert (
        cal.guides.amortize(of_uniforms([4.0, 4.0]), x).spec["sites"][0]["family"] == "transformed@interval[0.0, 4.0]"
    )
    with pytest.raises(ProgramError, match="components with different supports"):
        cal.guides.amortize(of_uniforms([2.0, 4.0]), x)


def test_transformed_angles_are_refused():
    def program(size):
        with pyro.plate("data", size):
            turned = dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [dist.transforms.AffineTransform(3.0, 1.0)])
            z = pyro.sample("z", turned)
            pyro.sample("x", dist.Normal(z.cos(), 1.0))

    with pytest.raises(ProgramError, match="sample the angle, and transform its value"):
        cal.program.check_program(program, {"x": torch.zeros(3)})
