"""Likelihoods of real numbers against closed forms: which entries share a scale, limits of scales, Student-t noise, one
noise variance for each image, and the losses of β-VAEs."""

import math
import re

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch.distributions import kl_divergence

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.inference.fitting.objectives import analytic_kl
from calibrant.models.parts.likelihoods.scales import bounded_scale
from calibrant.program import as_program, seeded
from calibrant.program.tracing import guide_trace, sampled

SHAPE = (3, 4, 2)
SHARED = {"all": (), "channel": (3, 1, 1), "position": (1, 4, 2), "entry": SHAPE}


def make(name, **arguments):
    return cal.models.make_likelihood({"name": name, **arguments}).double()


# -- which entries share a scale ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", SHARED)
@pytest.mark.parametrize(("name", "learn"), [("vae", True), ("vae", False), ("ea-vae", True)])
def test_entries_share_the_scale_that_is_asked_for(per, name, learn):
    noise = {"name": "gaussian", "per": per, "scale": 0.3, "learn": learn}
    model = cal.models.create(name, shape=SHAPE, latents=2, likelihood=noise)  # the model gives the shape
    likelihood = model.likelihood.double()
    assert likelihood.scale.shape == SHARED[per]
    assert bool(list(likelihood.parameters())) == learn
    likelihood.log_scale.data.add_(torch.rand_like(likelihood.log_scale))
    location, x = torch.randn(2, 5, *SHAPE, dtype=torch.float64)
    truth = stats.norm(location.numpy(), np.broadcast_to(likelihood.scale.detach(), (5, *SHAPE)))
    assert np.allclose(likelihood(location).log_prob(x).detach(), truth.logpdf(x).sum((1, 2, 3)))


@pytest.mark.parametrize("per", SHARED)
def test_a_decoder_returns_the_scales_that_are_asked_for(per):
    likelihood = make("gaussian-per-pixel", per=per)
    shapes = likelihood.outputs(SHAPE)
    assert shapes == {"location": SHAPE, "log_scale": SHARED[per] or (1, 1, 1)}
    location, log_scale = (torch.randn(5, *shape, dtype=torch.float64) for shape in shapes.values())
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    scale = -6 + np.logaddexp(0, log_scale.numpy() + 6)
    truth = stats.norm(location.numpy(), np.exp(np.broadcast_to(scale, x.shape)))
    assert np.allclose(likelihood((location, log_scale)).log_prob(x), truth.logpdf(x).sum((1, 2, 3)))


def test_a_shape_alone_means_a_scale_for_each_entry():
    assert cal.models.Gaussian(shape=(2, 3)).scale.shape == (2, 3)
    assert cal.models.Gaussian().scale.shape == cal.models.Gaussian(shape=(2, 3), per="all").scale.shape == ()


def test_scales_without_a_shape_or_channels_are_refused_and_the_remedies_work():
    noise = {"name": "gaussian", "per": "channel"}
    with pytest.raises(ProgramError, match='needs the event shape of the observations: give "shape" too'):
        cal.models.make_likelihood(noise)
    assert cal.models.make_likelihood({**noise, "shape": SHAPE}).scale.shape == (3, 1, 1)
    for name in ("gaussian", "gaussian-per-pixel"):
        with pytest.raises(ProgramError, match=re.escape('not (6,): use per="entry"')):
            cal.models.create("vae", shape=(6,), likelihood={"name": name, "per": "position"})
        cal.models.create("vae", shape=(6,), likelihood={"name": name, "per": "entry"})
        with pytest.raises(ProgramError, match=r"per='pixel' is given, wanted one of .*'entry'"):
            cal.models.create("vae", shape=SHAPE, likelihood={"name": name, "per": "pixel"})


def test_decoders_of_users_return_location_and_scale():
    class Decoder(torch.nn.Module):
        def forward(self, z):
            return z, 2 * z

    model = cal.models.from_decoder(Decoder(), prior=3, likelihood="gaussian-per-pixel")
    values = cal.program.sample_prior(model, 4, seed=0)
    density = cal.program.log_density(model, values, observed=["x"]).observed
    z, x = (values[name].double().numpy() for name in ("z", "x"))
    truth = stats.norm(z, np.exp(-6 + np.logaddexp(0, 2 * z + 6))).logpdf(x).sum(1)
    assert np.allclose(density, truth, atol=1e-4)


# -- the limit of scales -----------------------------------------------------------------------------------------------


def test_scales_are_clipped_softly():
    given, wanted = torch.tensor([-100.0, -6.0, -2.9, 0.0, 5.0]), torch.tensor([-6.0, -5.307, -2.856, 0.0025, 5.0])
    torch.testing.assert_close(bounded_scale(given, -6.0).log(), wanted, atol=5e-4, rtol=0)
    torch.testing.assert_close(bounded_scale(given[1:], None).log(), given[1:])


# -- Student-t noise ---------------------------------------------------------------------------------------------------


def test_student_t_noise_is_that_of_scipy():
    with seeded(0):
        parts = [4 * torch.randn(50, 1, dtype=torch.float64) for _ in range(3)]
    entries = make("student-t", lowest=None).marginals(tuple(parts))
    freedom = 10 * np.exp(2.3 * np.tanh(parts[2].numpy() / 2.3))
    truth = stats.t(freedom, parts[0], parts[1].exp())
    x, share = torch.randn(50, 1, dtype=torch.float64), torch.rand(50, 1, dtype=torch.float64)
    assert np.allclose(entries.log_prob(x), truth.logpdf(x))
    assert np.allclose(entries.cdf(x), truth.cdf(x))
    assert np.allclose(entries.icdf(share), truth.ppf(share))
    assert np.allclose(entries.mean, truth.mean())
    assert np.allclose(entries.stddev, truth.std())
    assert torch.equal(entries.stddev.isinf(), torch.as_tensor(freedom <= 2))
    assert 5 < entries.stddev.isinf().sum() < 45
    single = cal.models.make_likelihood("student-t").marginals(tuple(part.float() for part in parts))
    assert single.cdf(x.float()).dtype == single.icdf(share.float()).dtype == torch.float32


# -- one noise variance for each image ---------------------------------------------------------------------------------


def integrated(residual, a, b):
    """log ∫ N(residual; 0, v I) InverseGamma(v; a, b) dv by quadrature over log v."""
    squared, entries = float((residual**2).sum()), len(residual)
    mode = math.log((b + squared / 2) / (a + entries / 2))

    def integrand(t):
        noise = -0.5 * entries * (math.log(2 * math.pi) + t) - 0.5 * squared * math.exp(-t)
        return noise + stats.invgamma(a, scale=b).logpdf(math.exp(t)) + t

    top = integrand(mode)
    return top + math.log(quad(lambda t: math.exp(integrand(t) - top), mode - 20, mode + 40, epsabs=1e-12)[0])


@pytest.mark.parametrize("entries", [1, 2, 7])
def test_the_variance_of_an_image_is_integrated_out(entries):
    likelihood = make("student-t-radius", scale=0.7, freedom=3.0)
    a, b = 1.5, 1.5 * 0.7**2
    location, x = torch.randn(2, 4, entries, dtype=torch.float64)
    found = likelihood(location).log_prob(x).detach().numpy()
    wanted = [integrated(row, a, b) for row in (x - location).numpy()]
    assert np.allclose(found, wanted, atol=1e-6)
    root = 0.7 * torch.eye(entries, dtype=torch.float64)
    assert np.allclose(found, dist.MultivariateStudentT(3.0, location, root).log_prob(x))
    assert not np.allclose(found, likelihood.marginals(location).log_prob(x).sum(1).detach()) or entries == 1


def test_draws_have_one_radius_for_each_image():
    likelihood, size, entries = make("student-t-radius", scale=0.7, freedom=6.0), 4000, 20
    location = torch.zeros(size, entries, dtype=torch.float64)
    whole, entries_alone = likelihood(location), likelihood.marginals(location)
    with seeded(0), torch.no_grad():
        joint, apart = whole.sample(), entries_alone.sample()
    radii = ((x.square().sum(1) / (entries * 0.49)).numpy() for x in (joint, apart))
    right, wrong = (stats.kstest(radius, stats.f(entries, 6.0).cdf).pvalue for radius in radii)
    assert right > 1e-5 > wrong  # the defect: a variance for each entry
    assert stats.kstest(entries_alone.cdf(joint)[:, 3], "uniform").pvalue > 1e-5


@pytest.mark.parametrize("freedom", [1.0, 39.0, 41.0, 1e3, 1e5, 1e9])
def test_many_degrees_of_freedom_are_a_gaussian_in_float32_too(freedom):
    with seeded(0):
        location, x = torch.randn(2, 5, 700)
    likelihood = cal.models.make_likelihood({"name": "student-t-radius", "scale": 0.7, "freedom": freedom})
    single = likelihood(location).log_prob(x)
    weights = list(likelihood.parameters())
    slopes_of_single = torch.autograd.grad(single.sum(), weights)
    double = likelihood.double()(location.double()).log_prob(x.double())
    truth = stats.multivariate_t(np.zeros(700), 0.49, df=freedom).logpdf((x - location).numpy())
    assert np.allclose(single.detach(), double.detach(), atol=0.02)
    assert np.allclose(double.detach(), truth, atol=1e-3)
    slopes_of_double = torch.autograd.grad(double.sum(), list(likelihood.parameters()))
    assert np.allclose(slopes_of_single, slopes_of_double, rtol=1e-3, atol=0.05)
    gaussian = cal.models.make_likelihood({"name": "gaussian", "scale": 0.7}).double()(location.double())
    assert np.allclose(double.detach(), gaussian.log_prob(x.double()).detach(), atol=0.1) == (freedom == 1e9)


def test_moments_of_the_whole_image_are_those_of_its_entries():
    location = torch.randn(3, 2, 2, dtype=torch.float64)
    for freedom in (0.9, 1.5, 4.0):
        likelihood = make("student-t-radius", freedom=freedom)
        whole, entries = likelihood(location), likelihood.marginals(location)
        torch.testing.assert_close(whole.mean, entries.mean, equal_nan=True)
        if freedom > 1:  # torch calls a variance NaN where there is no mean
            torch.testing.assert_close(whole.variance, entries.variance)
        noise = likelihood.noise_sd(location)
        assert (noise is None) == (freedom <= 2)
        assert noise is None or torch.allclose(noise.expand(3, 2, 2), entries.stddev)


def test_arguments_that_are_not_positive_are_refused():
    for name, arguments in (
        ("student-t-radius", {"scale": 0.0}),
        ("student-t-radius", {"freedom": -1.0}),
        ("beta", {"beta": 0.0}),
        ("gaussian", {"scale": -1.0}),
    ):
        with pytest.raises(ProgramError, match="positive"):
            make(name, **arguments)
    with pytest.raises(ProgramError, match=r"error='mse' is given, wanted one of \('sse', 'half-sse'\)"):
        make("beta", error="mse")


# -- the β-VAE ---------------------------------------------------------------------------------------------------------


def published(model, guide, data, beta, weight):
    """The loss of β-VAEs: weight·SSE + β·KL, a mean over data."""
    sites = sampled(guide_trace(guide, data, 6, {}))
    z, q = sites["z"]["value"], sites["z"]["fn"]
    divergence = kl_divergence(q, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return (weight * (data["x"] - model.decoder(z)).square().sum((1, 2, 3)) + beta * divergence).mean()


def slopes(loss, *modules):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for m in modules for p in m.parameters()])])


@pytest.mark.parametrize(("error", "weight"), [("sse", 1.0), ("half-sse", 0.5)])
def test_the_elbo_times_beta_is_the_loss_of_a_beta_vae(error, weight):
    beta, losses = 0.3, []
    for seed in range(2):
        with seeded(seed):
            noise = {"name": "beta", "beta": beta, "error": error}
            model = cal.models.create("vae", shape=SHAPE, latents=2, decoder="mlp", likelihood=noise)
            data = {"x": torch.randn(6, *SHAPE)}
            guide = cal.guides.amortize(model, data, structure="mean-field", seed=seed)
        with seeded(9):
            ours = -beta * analytic_kl(as_program(model), guide, data, 6, {}).per_datum(6)
        with seeded(9):
            theirs = published(model, guide, data, beta, weight)
        with seeded(9):
            other = published(model, guide, data, beta, 1.5 - weight)
        found, wanted, wrong = (slopes(loss, model.decoder, guide) for loss in (ours, theirs, other))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (found - wrong).abs().max() > 0.01  # the defect: the variance of the other loss
        losses.append(float((ours - theirs).detach()))
    variance = {"sse": beta / 2, "half-sse": beta}[error]
    assert np.allclose(losses, beta * math.prod(SHAPE) / 2 * math.log(2 * math.pi * variance), atol=1e-4)
