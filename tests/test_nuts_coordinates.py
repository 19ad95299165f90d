"""Coordinates of batched NUTS: the posterior is the same in all of them, and vectors move between them and back."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from small_models import MIXED, laplace_mixture, nuts, scale_mixture

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference import diagnostics
from calibrant.inference.references import adaptation, lanes
from calibrant.inference.references.coordinates import from_normal, to_normal
from calibrant.inference.references.lanes import NutsSettings, sample_nuts
from calibrant.inference.references.target import Target
from calibrant.program import as_program


def drawn_with(program, power):
    data = cal.data.Data(MIXED)
    powers = None if power is None else torch.full((3, 1), power, dtype=torch.float64)
    settings = NutsSettings(warmup=500, draws=2000, target_accept=0.95, powers=powers)
    return sample_nuts(as_program(program), data, settings, 0, cal.progress.silent)


def moments(draws):
    """Means of log s, its square, and (s·z)² with standard errors: `(statistic, data)` twice."""
    log_scale = draws.draws["scale"].double().log()
    signal = draws.draws["scale"][..., None] * draws.draws["z"]
    values = torch.stack([log_scale, log_scale**2, *signal.double().square().unbind(-1)]).numpy()
    ess = np.stack([diagnostics.ess(value) for value in values])
    return values.mean((1, 2)), values.std((1, 2)) / np.sqrt(ess), ess


@pytest.mark.slow
@pytest.mark.parametrize("program", [scale_mixture, laplace_mixture])
def test_all_coordinates_have_the_same_posterior(program):
    """κ = 0, ½, 1 and the chosen one, from blank to strong data, where one of them at least mixes well."""
    chosen, powers = drawn_with(program, None)
    means, errors, ess = moments(chosen)
    assert (ess > 400).all()
    assert float(powers[2].mean()) > float(powers[0].mean())  # strong data: s·z, blank ones: z
    for power in (0.0, 0.5, 1.0):
        other, other_errors, other_ess = moments(drawn_with(program, power)[0])
        enough = other_ess > 400
        score = np.abs(means - other) / np.hypot(errors, other_errors)
        assert enough.sum() > enough.size / 3
        assert (score[enough] < limit(3 * score.size)).all(), (power, score)


def test_the_best_diagonal_normal_decides():
    """s·z is known and z is not, or the other way round; log s has sd 1."""
    generator = torch.Generator().manual_seed(0)
    log_scale, known = torch.randn(4000, dtype=torch.float64, generator=generator), 1.0
    noise = torch.randn(4000, dtype=torch.float64, generator=generator)
    table = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    for signal, expected in ((known + 0.01 * noise, 2), (log_scale.exp() * noise, 0)):
        z = signal / log_scale.exp()
        candidates = torch.stack([z * (power * log_scale).exp() for power in table[0]])
        best = adaptation.choose(
            count=torch.tensor([4000.0]),
            variance=candidates.var(1)[None, :, None],
            slopes=table[None] * log_scale.mean(),
            table=table,
            pair_of=torch.tensor([0]),
            powers=table[:, :1],
        )
        assert int(best) == expected


def test_laplace_latents_as_normal_quantiles():
    loc, scale = torch.tensor([0.5], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    u = torch.linspace(-8, 8, 50, dtype=torch.float64, requires_grad=True)
    z, slope = from_normal(u, loc, scale)
    (gradient,) = torch.autograd.grad(z.sum(), u)
    torch.testing.assert_close(slope, gradient.log())
    torch.testing.assert_close(to_normal(z, loc, scale), u)
    levels = dist.Normal(0.0, 1.0).cdf(u), dist.Laplace(loc, scale).cdf(z)
    torch.testing.assert_close(*levels, rtol=1e-9, atol=1e-15)


def test_vectors_move_between_coordinates_and_back():
    target = Target(as_program(laplace_mixture), cal.program.sites(laplace_mixture, MIXED), MIXED, {})
    where = lanes.coordinates_of(target, torch.device("cpu"))
    q = torch.randn(3, 4, dtype=torch.float64)
    here, there = torch.zeros(3, 1), torch.tensor([[0.5], [1.0], [0.0]])
    moved = where.move(q, here, there)
    assert not torch.equal(moved[:2], q[:2])
    torch.testing.assert_close(where.move(moved, there, here), q)
    whole = where.in_all(q, q, here)[0][:, 0, 2]
    torch.testing.assert_close(whole, where.move(q, here, torch.ones(3, 1)), check_dtype=False)


def centred_on_a_constant(size):
    with pyro.plate("data", size):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(torch.tensor([3.0, -1.0]), scale[:, None].expand(-1, 2)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def centred_on_a_latent(size):
    with pyro.plate("data", size):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.StudentT(5.0, 2 + centre[:, None], scale[:, None].expand(-1, 2)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def hierarchy_of_schools(size):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    centre = pyro.sample("centre", dist.Normal(0.0, 5.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(centre, scale))
        pyro.sample("x", dist.Normal(z, 1.0))


@pytest.mark.parametrize("program", [centred_on_a_constant, centred_on_a_latent, hierarchy_of_schools])
def test_latents_are_held_relative_to_their_priors_location(program):
    observed = {"x": torch.zeros(4, dtype=torch.float64)}
    target = Target(as_program(program), cal.program.sites(program, observed), observed, {})
    where, q = lanes.coordinates_of(target, torch.device("cpu")), torch.randn(4, target.width, dtype=torch.float64)
    z, entries = target.blocks["z"], slice(target.blocks["z"].start, target.blocks["z"].stop)
    location = 0.0
    if program is centred_on_a_constant:
        location = torch.tensor([3.0, -1.0])
    elif "centre" in target.blocks:
        location = q[:, target.blocks["centre"].start, None] + (2.0 if program is centred_on_a_latent else 0.0)
    log_scale = q[:, target.blocks["scale"].start, None]
    plain = torch.zeros(4, 1, dtype=torch.float64)
    for power in (-0.5, -1.0):
        powers = torch.full_like(plain, power)
        moved = where.move(q, plain, powers)
        torch.testing.assert_close(moved[:, entries], (q[:, entries] - location) * (power * log_scale).exp())
        torch.testing.assert_close(where.move(moved, powers, plain), q)
        shrunk = target.log_density(moved, powers, {}, observed) + power * log_scale[:, 0] * z.shape.numel()
        torch.testing.assert_close(shrunk, target.log_density(q, plain, {}, observed))


@pytest.mark.parametrize("program", [laplace_mixture, centred_on_a_constant, centred_on_a_latent, hierarchy_of_schools])
def test_gradients_in_all_coordinates(program):
    """They are those of the density in these coordinates."""
    observed = {"x": torch.zeros(3, dtype=torch.float64)} if program is not laplace_mixture else MIXED
    target = Target(as_program(program), cal.program.sites(program, observed), observed, {})
    where = lanes.coordinates_of(target, torch.device("cpu"))
    q = torch.randn(3, target.width, dtype=torch.float64)

    def gradient(q, powers):
        q = q.detach().requires_grad_()
        return torch.autograd.grad(target.log_density(q, powers, {}, observed).sum(), q)[0]

    every = [powers.expand(3, -1) for powers in where.table.unbind(1)]
    for own in every:
        found = where.in_all(q, gradient(q, own), own)[0][:, 1]
        expected = [gradient(where.move(q, own, other), other) for other in every]
        torch.testing.assert_close(found, torch.stack(expected, 1), check_dtype=False)


def test_other_coordinates_are_neighbours_in_the_pairs_own_table():
    observed = {"x": torch.zeros(3, dtype=torch.float64)}
    for program, sign in ((scale_mixture, 1.0), (centred_on_a_constant, -1.0)):
        given = MIXED if program is scale_mixture else observed
        target = Target(as_program(program), cal.program.sites(program, given), given, {})
        where = lanes.coordinates_of(target, torch.device("cpu"))
        powers = sign * torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
        assert where.other(powers).tolist() == (sign * torch.tensor([[0.5], [1.0], [0.5]])).tolist()


def test_declared_coordinates():
    class Declared(pyro.nn.PyroModule):
        coordinates = {"z": "width"}

        def forward(self, size):
            scale_mixture(size)

    with pytest.raises(InferenceError, match="width"):
        nuts(Declared(), MIXED)
