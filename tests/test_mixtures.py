"""Mixtures as priors and likelihoods: where they are admitted, their posterior is right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import assert_agrees, from_grid
from torch.distributions import biject_to, constraints

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.inference.references.sampling import exact_structure
from calibrant.inference.references.target import target_of
from calibrant.program import as_program
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


def test_the_remedy_for_components_with_different_supports_runs_and_is_right():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])

    def program(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            u = pyro.sample("u", dist.Uniform(0.0, 1.0))
            z = pyro.deterministic("z", low[k] + (high[k] - low[k]) * u)
            pyro.sample("x", dist.Normal(z, 0.5))

    x = {"x": torch.tensor([0.2, 1.1, 2.0])}
    many = {"x": cal.program.sample_prior(program, 20, seed=0)["x"]}
    assert math.isfinite(cal.inference.fit(program, cal.guides.amortize(program, many), many, epochs=1).elbo)
    grid = torch.linspace(0, 3, 30_001, dtype=torch.float64)[:-1] + 5e-5
    prior = torch.where(grid < 1, 0.5, 0.25).log()
    evidence = (prior + dist.Normal(grid, 0.5).log_prob(x["x"].double()[:, None])).logsumexp(1) + math.log(1e-4)
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    with target_of(as_program(program), cal.data.Data(x)) as target:
        found = [target.log_density(torch.logit(one).expand(3, 1), u.new_zeros(3, 0), {}, target.observed) for one in u]
    found = (torch.stack(found) - (u * (1 - u)).log()[:, None]).logsumexp(0) - math.log(200)
    torch.testing.assert_close(found, evidence, rtol=0, atol=1e-4)


PRIORS = {
    "normals": lambda: dist.Normal(torch.tensor([-2.0, 2.0]), 1.0),
    "vectors": lambda: dist.Normal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 1.0).to_event(1),
    "dense": lambda: dist.MultivariateNormal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.eye(2)),
    "student": lambda: dist.StudentT(torch.tensor([3.0, 5.0]), torch.tensor([-2.0, 2.0]), 1.0),
    "laplace": lambda: dist.Laplace(torch.tensor([-2.0, 2.0]), 1.0),
    "positive": lambda: dist.Gamma(torch.tensor([2.0, 9.0]), 1.0),
    "unit interval": lambda: dist.Beta(torch.tensor([2.0, 9.0]), torch.tensor([9.0, 2.0])),
    "simplex": lambda: dist.Dirichlet(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])),
    "circle": lambda: dist.VonMises(torch.tensor([-2.0, 2.0]), 4.0),
}
WHOLE = {
    "several": lambda: dist.MixtureSameFamily(HALVES, PRIORS["normals"]()).expand([3]).to_event(1),
    "of pyro": lambda: dist.MixtureOfDiagNormals(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.ones(2, 2), torch.zeros(2)
    ),
    "one covariance": lambda: dist.MixtureOfDiagNormalsSharedCovariance(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.ones(2), torch.zeros(2)
    ),
    "transformed": lambda: dist.TransformedDistribution(
        dist.MixtureSameFamily(HALVES, PRIORS["normals"]()), dist.transforms.ExpTransform()
    ),
    **{name: lambda parts=parts: dist.MixtureSameFamily(HALVES, parts()) for name, parts in PRIORS.items()},
}


@pytest.mark.parametrize("structure", ["faithful", "full"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_mixture_goes_through_guide_training_and_chains(name, structure):
    """The density of the chains is that of the program, computed from the components."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", WHOLE[name]())
            pyro.sample("x", dist.Normal(z.reshape(size, -1), 0.5).to_event(1))

    x = {"x": cal.program.sample_prior(program, 16, seed=0)["x"]}
    guide = cal.guides.amortize(program, x, structure=structure)
    assert math.isfinite(cal.inference.fit(program, guide, x, epochs=1).elbo)
    with target_of(as_program(program), cal.data.Data(x)) as target:
        q = torch.randn(16, target.width)
        found = target.log_density(q, q.new_zeros(16, 0), {}, target.observed)
        assert found.isfinite().all()
        if name in ("normals", "vectors"):
            parts = PRIORS[name]()
            z = q[:, 0] if name == "normals" else q
            wanted = parts.log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(2)
            wanted = wanted + dist.Normal(q, 0.5).log_prob(target.observed["x"]).sum(1)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_reference_under_a_mixture_of_normals_is_a_mixture_of_normals():
    """Of two components at ±2: given x, the variance is 1/5 in each, and Bayes' rule gives their weights."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", WHOLE["vectors"]())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))

    x = torch.tensor([[0.1, 0.3], [1.0, -0.5], [-0.3, 0.0]])
    tree = cal.inference.reference(program, {"x": x}, warmup=300, draws=1000)
    assert tree["convergence"]["is_reference"].values.all(), tree["convergence"]["reason"].values
    centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    log_weight = dist.Normal(centres, 1.25**0.5).log_prob(x[:, None]).sum(-1)
    means = (centres + 4 * x[:, None]) / 5
    for axis in range(2):
        values = torch.linspace(-4, 4, 4001, dtype=torch.float64)
        log_w = log_weight.log_softmax(1)[..., None] + dist.Normal(means[..., axis, None], 0.2**0.5).log_prob(values)
        truth = from_grid(values.numpy(), log_w.logsumexp(1).numpy())
        assert_agrees({"z": tree["posterior"]["z"].values[..., axis]}, {"z": truth})


def test_transformed_angles_are_refused():
    def program(size):
        with pyro.plate("data", size):
            turned = dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [dist.transforms.AffineTransform(3.0, 1.0)])
            z = pyro.sample("z", turned)
            pyro.sample("x", dist.Normal(z.cos(), 1.0))

    with pytest.raises(ProgramError, match="sample the angle, and transform its value"):
        cal.program.check_program(program, {"x": torch.zeros(3)})
