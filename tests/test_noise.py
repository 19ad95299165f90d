"""The standard deviation of a model's noise is what its likelihood says, and is never guessed from a `scale`."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.noise import noise_equivalent_contrast, noise_sd

SHAPE = (1, 4, 4)


class Outliers(nn.Module):
    """A user's Student-t noise; its scale is no standard deviation."""

    scale = 0.5

    def forward(self, output):
        return dist.StudentT(4.0, output, self.scale).to_event(output.dim() - 1)


class TellsItsNoise(Outliers):
    def noise_sd(self, output):
        return torch.full_like(output, self.scale * 2**0.5)


class Rising(nn.Module):
    """Noise that depends on the decoder's output."""

    def forward(self, output):
        return dist.Normal(output, output.exp()).to_event(output.dim() - 1)

    def noise_sd(self, output):
        return output.exp()


class At(PyroModule):
    """Observations around a covariate."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood = likelihood

    def forward(self, size, level):
        with pyro.plate("data", size):
            pyro.sample("x", self.likelihood(level))


def vae(likelihood):
    return cal.models.create("vae", shape=SHAPE, latents=2, likelihood=likelihood)


def test_a_scale_is_not_taken_for_a_standard_deviation():
    assert noise_sd(vae(Outliers())) is None
    with pytest.raises(InferenceError, match=r"is not known.*Give noise="):
        noise_equivalent_contrast(vae(Outliers()))
    assert noise_equivalent_contrast(vae(TellsItsNoise())) == pytest.approx(0.5 * 2**0.5)
    assert noise_equivalent_contrast(vae({"name": "gaussian", "scale": 0.3})) == pytest.approx(0.3)
    assert noise_sd(vae("bernoulli")) is None


def test_noise_may_depend_on_the_output_and_the_covariates():
    level = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    torch.testing.assert_close(noise_sd(At(Rising()), {"level": level}), level.exp())
    wanted = float((2 * level).exp().mean().sqrt())
    assert noise_equivalent_contrast(At(Rising()), {"level": level}) == pytest.approx(wanted)


def test_programs_without_a_known_noise():
    class Flat(PyroModule):
        def __init__(self):
            super().__init__()
            self.likelihood = cal.models.Gaussian(0.5)

        def forward(self, size):
            with pyro.plate("data", size):
                z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
                pyro.sample("x", self.likelihood(z[:, None]))

    def plain(size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    assert noise_sd(Flat()) is None
    assert noise_sd(plain) is None


def test_nothing_is_left_behind():
    model, before = vae("gaussian"), torch.get_rng_state()
    noise_sd(model)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.likelihood._forward_pre_hooks
