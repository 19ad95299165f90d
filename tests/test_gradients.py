"""A density that moves with a latent while its gradient is zero is refused; no kink, dead unit or saturation is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.program import check_program

X = {"x": torch.linspace(-1.0, 1.0, 6)}


def local(mean, prior=lambda: dist.Normal(0.0, 1.0)):
    """A local latent, and an observation whose mean is a function of it."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(mean(z), 1.0))

    return program


def shared(mean, prior=lambda: dist.Normal(0.0, 1.0)):
    def program(size):
        z = pyro.sample("z", prior())
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(mean(z), 1.0))

    return program


def simulator(z):
    """The time at which a sum that grows with z reaches 2."""
    time, level = torch.zeros(()), torch.zeros(())
    while level.item() < 2.0:
        level, time = level + (0.1 + z) * 0.1, time + 0.1
    return time


def smooth_simulator(z):
    return 2.0 / (0.1 + z)


def branch(z):
    return torch.tensor(1.0) if z > 0 else torch.tensor(-1.0)


def without_grad(z):
    with torch.no_grad():
        return z.exp()


def uniform():
    return dist.Uniform(0.0, 0.5)


def pair():
    return dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def shares():
    return dist.Dirichlet(torch.ones(3))


def of_two(size):
    """The first of two latents has a gradient, the second has none."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(a + torch.round(2 * z), 1.0))


def prior_of_another(size):
    """The density of another latent moves with it."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        w = pyro.sample("w", dist.Normal(0.0, 1.0 if z > 0 else 5.0))
        pyro.sample("x", dist.Normal(w, 1.0))


def moving_factor(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", (z > 0).to(z.dtype))
        pyro.sample("x", dist.Normal(0.0, 1.0))


STUCK = {
    "a loop whose length depends on it": shared(simulator, uniform),
    "a branch": shared(branch),
    "a detached tensor": local(lambda z: z.detach().exp()),
    "a number": shared(lambda z: torch.tensor(2 * z.item())),
    "no_grad": local(without_grad),
    "a comparison": local(lambda z: (z > 0.3).to(z.dtype)),
    "torch.where": local(lambda z: torch.where(z > 0, 1.0, -1.0)),
    "rounding": local(lambda z: (3 * z).round()),
    "a sign": shared(lambda z: z.sign()),
    "numpy": local(lambda z: torch.from_numpy(z.detach().numpy() ** 2)),
    "one entry of two": local(lambda z: z[:, 0] + (z[:, 1] > 0).to(z.dtype), pair),
    "the largest share": local(lambda z: z.argmax(-1).to(z.dtype), shares),
    "one latent of two": of_two,
    "the prior of another latent": prior_of_another,
    "a factor": moving_factor,
    "a rare step": local(lambda z: (z > 1.5).to(z.dtype)),
}


@pytest.mark.parametrize("program", STUCK.values(), ids=STUCK)
def test_a_density_that_moves_without_a_gradient_is_refused(program):
    with pytest.raises(ProgramError, match=r"the density moves with latent 'z', but its gradient does not.*compute"):
        check_program(program, X)


def partly_detached(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))
        pyro.sample("x", dist.Normal(3 * z.detach(), (0.1 * z).exp()))


def partly_a_number(size):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(float(z), nn.functional.softplus(z) + 0.1))


@pytest.mark.parametrize("program", [partly_detached, partly_a_number])
def test_a_gradient_that_is_not_the_slope_is_refused(program):
    with pytest.raises(ProgramError, match=r"gradient of the density by latent 'z' is not the slope.*compute"):
        check_program(program, X)


def test_it_is_refused_before_anything_is_trained():
    for entry in (cal.guides.amortize, cal.inference.reference):
        with pytest.raises(ProgramError, match=r"'z'.*gradient does not"):
            entry(STUCK["a loop whose length depends on it"], X)


def test_the_remedy_runs():
    check_program(shared(smooth_simulator, uniform), {"x": 10 + torch.randn(6)})

    def program(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * k - 1, 1.0))

    check_program(program, X)


class Decoder(nn.Module):
    """Units of which most are dead: their offset is far below their input."""

    def __init__(self, offset):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(1, 8).double(), nn.Linear(8, 1).double()
        with torch.no_grad():
            self.first.bias -= offset

    def forward(self, z):
        return self.last(self.first(z.double()[..., None]).relu())[..., 0].to(z.dtype)


def decoded(offset):
    decoder = Decoder(offset).requires_grad_(False)

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, size):
            with pyro.plate("data", size):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0))

    return Model()


def angle():
    return dist.VonMises(0.0, 1.0)


def weak(size):
    """A latent on which nothing depends, and one with a part of its range that nothing depends on."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Laplace(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal((z - 2.0).relu() + 0 * w, 1.0))


def change_point(size):
    """A smooth switch between two levels that saturates nearly everywhere."""
    z = pyro.sample("z", dist.Uniform(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(torch.sigmoid(1e6 * (z - 0.5)), 1.0))


def flat_prior(size):
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(z, 1.0))


LEGAL = {
    "a kink": local(lambda z: z.abs(), lambda: dist.Laplace(0.0, 1.0)),
    "a dead unit": local(lambda z: (z - 1.5).relu()),
    "a dead unit, shared": shared(lambda z: (z - 1.5).relu()),
    "units that are nearly all dead": decoded(2.5),
    "units that are all dead": decoded(9.0),
    "clamped": local(lambda z: (20 * z).clamp(-1.0, 1.0)),
    "clamped, shared": shared(lambda z: (1e4 * z).clamp(-1.0, 1.0)),
    "a saturated switch": change_point,
    "a saturated tanh": shared(lambda z: torch.tanh(1e5 * z)),
    "a maximum": local(lambda z: z.max(-1).values, pair),
    "an unused latent": weak,
    "a branch with a gradient": shared(lambda z: z if z > 0 else -3 * z),
    "torch.where with a gradient": local(lambda z: torch.where(z > 0, z, 0.1 * z)),
    "an angle": local(lambda z: z.cos(), angle),
    "a share": local(lambda z: z[:, 0], shares),
    "an improper prior": flat_prior,
    "a flat density at the data": local(lambda z: z.square()),
    "a product with zero": local(lambda z: 0 * z),
}


@pytest.mark.parametrize("program", LEGAL.values(), ids=LEGAL)
def test_what_has_a_gradient_somewhere_is_allowed(program):
    check_program(program, X)
