"""Likelihoods of the grey values k/255: probabilities that sum to one, exact at both ends, finite everywhere; the data
that they take; and the way of such data through training, reference and check. And the density on [0, 1]."""

import math

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import parameters

import calibrant as cal
from calibrant.errors import DataError, ProgramError
from calibrant.evaluation.statistics.predictive_tests import predictive_check
from calibrant.models.parts.likelihoods.discretised import RoundedGaussian, RoundedLogistic
from calibrant.models.parts.likelihoods.grey import grey_values
from calibrant.program.environment import seeded

CARDS = [card for card in cal.models.list_likelihoods() if card.cls.support is grey_values]
SINGLE = parameters([(c.name, case, (c.name, case)) for c in CARDS for case in c.cases if case.observed == {"x": (1,)}])
VALUES = torch.arange(256) / torch.tensor(255.0)


def build(name, arguments, dtype):
    with seeded(0):
        return cal.models.make_likelihood({"name": name, **arguments}).to(dtype)


def run(likelihood, output):
    """The distribution of one entry, given a function from a shape to an output of the decoder."""
    parts = tuple(output(torch.Size((1, *shape))) for shape in likelihood.outputs((1,)).values())
    return likelihood(parts[0] if len(parts) == 1 else parts)


def draw(seed, spread, dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: spread * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# -- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("named", SINGLE)
def test_probabilities_of_all_values_sum_to_one(named, dtype, error):
    name, case = named
    likelihood = build(name, case.arguments, dtype)
    for seed, spread in enumerate((0.0, 0.3, 1.0, 3.0, 100.0, 1000.0)):
        found = run(likelihood, draw(seed, spread, dtype)).log_prob(VALUES.to(dtype)[:, None, None])
        assert abs(found.detach().double().exp().sum() - 1) < error, spread


@pytest.mark.parametrize("named", SINGLE)
def test_distribution_functions_add_up_the_probabilities(named):
    name, case = named
    with torch.no_grad():
        entries = run(build(name, case.arguments, torch.float64), draw(1, 1.0, torch.float64)).base_dist
    values = VALUES.double()[:, None, None]
    steps = entries.log_prob(values).exp()
    shares = steps.cumsum(0)
    for x in (values, values + 0.4 / 255):
        torch.testing.assert_close(entries.cdf(x), shares)
    assert float(entries.cdf(torch.tensor([[-0.001]]).double())) == 0.0
    assert float(entries.cdf(torch.tensor([[1.0]]).double())) == 1.0
    quantiles = entries.icdf(shares - 0.5 * steps)
    torch.testing.assert_close(quantiles[steps > 1e-9], values[steps > 1e-9])


def log_mass(noise, level, location, scale):
    """The log mass of a grey level, with 60 digits."""
    with mpmath.workdps(60):
        shares = {"gaussian": mpmath.ncdf, "logistic": lambda x: 1 / (1 + mpmath.exp(-x))}[noise]
        low, high = (((level + half) / mpmath.mpf(255) - location) / scale for half in (mpmath.mpf(-0.5), 0.5))
        if level == 0:
            return mpmath.log(shares(high))
        if level == 255:
            return mpmath.log(shares(-low))
        low, high = (low, high) if low + high < 0 else (-high, -low)
        return mpmath.log(shares(high) - shares(low))


@pytest.mark.parametrize("noise", ["gaussian", "logistic"])
@pytest.mark.parametrize("scale", [1e-4, 0.004, 0.0158, 0.1, 1.0, 30.0])
def test_rounded_noise_is_exact_at_0_and_255_and_between(noise, scale):
    """Values, and slopes by location and scale, at bins in the bulk and far out in the tails."""
    kind = {"gaussian": RoundedGaussian, "logistic": RoundedLogistic}[noise]
    for location in (-2.0, 0.0, 0.4, 0.9999, 1.5):
        for level in (0, 1, 102, 254, 255):
            at = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (location, scale)]
            found = kind(*at).log_prob(torch.tensor(level / 255, dtype=torch.float64))
            slopes = torch.autograd.grad(found, at)
            wanted = log_mass(noise, level, location, scale)
            assert abs(found.item() - wanted) < 1e-11 * max(1, abs(wanted))
            for slope, order in zip(slopes, ((1, 0), (0, 1)), strict=True):
                with mpmath.workdps(40):
                    numbers = mpmath.mpf(location), mpmath.mpf(scale)
                    true = mpmath.diff(lambda m, s, k=level: log_mass(noise, k, m, s), numbers, order)
                assert abs(slope.item() - true) < 1e-8 * max(1 / scale, abs(true)), (location, level, order)


def test_mixtures_and_bits_are_what_they_are_called():
    """Each against a computation of its own."""
    level = torch.tensor([0.0, 1.0, 77.0, 128.0, 255.0], dtype=torch.float64)
    x = (level / 255)[:, None, None]
    mixture = build("logistic-mixture", {"components": 3}, torch.float64)
    entries = run(mixture, draw(3, 1.0, torch.float64)).base_dist
    parts = zip(entries.log_weights.exp()[0, 0], entries.locations[0, 0] / 255, entries.scales[0, 0] / 255, strict=True)
    wanted = sum(weight * RoundedLogistic(location, scale).log_prob(x).exp() for weight, location, scale in parts)
    torch.testing.assert_close(entries.log_prob(x).exp(), wanted)
    logits = torch.randn(1, 8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bits = torch.as_tensor(np.unpackbits(level.numpy().astype(np.uint8)[:, None], axis=1)).double()
    wanted = dist.Bernoulli(logits=logits[0, :, 0]).log_prob(bits).sum(1)
    torch.testing.assert_close(build("bitwise", {}, torch.float64)(logits).log_prob(x).flatten(), wanted)
    logits = torch.randn(1, 256, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = dist.Categorical(logits=logits[0, :, 0]).log_prob(level)
    torch.testing.assert_close(build("categorical", {}, torch.float64)(logits).log_prob(x).flatten(), wanted)


def test_a_pixel_head_gives_each_channel_its_own_logits():
    likelihood = build("categorical", {"head": "pixel", "features": 3, "channels": 2}, torch.float64)
    features = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    logits = likelihood.marginals(features).logits
    assert logits.shape == (5, 2, 4, 4, 256)
    for channel in range(2):
        wanted = likelihood.logits(features[1, :, 2, 3])[256 * channel : 256 * (channel + 1)]
        torch.testing.assert_close(logits[1, channel, 2, 3], wanted)


EXTREMES = [
    *parameters([(c.name, case, (c.name, case.arguments)) for c in CARDS for case in c.cases if not case.name]),
    *[
        pytest.param((f"discretised-{noise}", {"scale": scale}), id=f"{noise}-{scale}")
        for noise in ("gaussian", "logistic")
        for scale in (1e-6, 1e6)
    ],
    pytest.param(("continuous-bernoulli", {}), id="continuous-bernoulli"),
]


@pytest.mark.parametrize("named", EXTREMES)
def test_extreme_outputs_have_finite_densities_and_gradients(named):
    likelihood = build(*named, torch.float32)
    for signs in ((1, 1, 1), (-1, -1, -1), (1, -1, 1), (-1, 1, -1)):
        numbers = iter(signs)
        parts = []

        def extreme(shape, numbers=numbers, parts=parts):
            sign = next(numbers) * torch.ones(shape)
            sign[:, 1::2] *= -1  # the outputs of an entry have both signs
            parts.append((1000.0 * sign).requires_grad_())
            return parts[-1]

        found = run(likelihood, extreme).log_prob(VALUES[:, None, None])
        assert found.isfinite().all()
        gradients = torch.autograd.grad(found.sum(), [*parts, *likelihood.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)


# -- the density on [0, 1] ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-800.0, -3.0, -0.499, -1e-9, 0.0, 1e-5, 0.501, 2.0, 40.0])
def test_the_continuous_bernoulli_is_exact_in_every_limit(logit):
    def log_density(x, eta):
        return x * eta - (mpmath.log(mpmath.expm1(eta) / eta) if eta else 0)

    eta = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    fn = build("continuous-bernoulli", {}, torch.float64)(eta)
    entry = fn.base_dist
    with mpmath.workdps(60):
        e = mpmath.mpf(logit)
        mean = mpmath.diff(lambda t: mpmath.log(mpmath.expm1(t) / t), e) if e else mpmath.mpf(0.5)
        variance = 1 / e**2 - 1 / (2 * mpmath.sinh(e / 2)) ** 2 if e else mpmath.mpf(1) / 12
        for x in (0.0, 0.3, 1.0):
            found = fn.log_prob(torch.tensor([[x]], dtype=torch.float64))
            assert abs(found.item() - log_density(mpmath.mpf(x), e)) < 1e-12 * max(1, abs(logit))
            (slope,) = torch.autograd.grad(found, eta)
            assert abs(slope.item() - (mpmath.mpf(x) - mean)) < 1e-13
            share = mpmath.expm1(e * mpmath.mpf(x)) / mpmath.expm1(e) if e else mpmath.mpf(x)
            assert abs(entry.cdf(torch.tensor(x, dtype=torch.float64)).item() - share) < 1e-13
        assert abs(entry.mean.item() - mean) < 1e-13
        assert abs(entry.variance.item() / variance - 1) < 1e-11


def test_densities_of_dequantised_data_bound_probabilities():
    """−log p((k + u)/256) + ln 256, on average over u, is at least −log of the mass of [k/256, (k + 1)/256]."""
    level = torch.arange(256, dtype=torch.float64)[:, None, None]
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for logit, gap in ((0.0, 0.0), (40.0, 1e-4)):
        fn = build("continuous-bernoulli", {}, torch.float64)(torch.tensor([[logit]], dtype=torch.float64))
        bound = math.log(256) - fn.log_prob((level + u[:, None, None, None]) / 256).mean(0)
        exact = -(fn.base_dist.cdf((level + 1) / 256) - fn.base_dist.cdf(level / 256)).log()[..., 0]
        assert (bound - exact).min() >= gap - 1e-9
    uniform = build("categorical", {}, torch.float64)(torch.zeros(1, 256, 1, dtype=torch.float64))
    flat = build("continuous-bernoulli", {}, torch.float64)(torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(uniform.log_prob(level / 255), flat.log_prob(level / 256) - math.log(256))


# -- data --------------------------------------------------------------------------------------------------------------


def test_values_on_the_grid_are_those_of_both_dtypes():
    levels = torch.arange(256)
    for on_grid in (levels.float() / 255, levels.double() / 255, (levels.float() / 255).double(), levels * (1 / 255)):
        assert grey_values.check(on_grid).all()
    for off in ((levels + 0.5) / 256, levels / 255 + 1e-4, levels[2:].float(), levels[1:] / -255.0):
        assert not grey_values.check(off).any()
    assert not grey_values.check(torch.tensor([math.nan, math.inf, -math.inf, 256 / 255])).any()


@pytest.mark.parametrize("name", [card.name for card in CARDS])
def test_other_floats_are_refused_and_the_printed_remedies_work(name):
    with seeded(0):
        model = cal.models.create("vae", shape=(1, 8, 8), latents=2, likelihood=name)
    images = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = torch.nn.functional.avg_pool2d(images / 255, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)  # resized
    printed = r"k/255, k = 0, …, 255: give 8-bit images divided by 255.*\(255 \* x\).round\(\) / 255"
    for wrong in (x, images, (images + torch.rand(images.shape)) / 256):
        with pytest.raises(DataError, match=printed):
            cal.program.check_program(model, {"x": wrong})
    for right in ((255 * x).round() / 255, images / 255):
        cal.program.check_program(model, {"x": right})


def test_wrong_arguments_are_refused():
    for arguments, said in (
        ({"name": "categorical", "head": "half"}, "known: .'full', 'pixel'"),
        ({"name": "categorical", "head": "pixel", "features": 0}, "must be positive"),
        ({"name": "discretised-logistic", "scale": 0.0}, "give a positive number"),
        ({"name": "logistic-mixture", "components": 0}, "one or more"),
    ):
        with pytest.raises(ProgramError, match=said):
            cal.models.make_likelihood(arguments)


def shades(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        fn = RoundedLogistic(0.5 + 0.0 * z.expand(size, 16), torch.tensor(0.005).to(z))
        pyro.sample("x", fn.to_event(1))


def shades_guide(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))


def test_predictive_checks_know_ties_of_values_on_the_grid():
    """k/255 in float32 ties with k/255 in float64; of few grey values, most draws are ties."""
    x = cal.program.sample_prior(shades, 300, seed=3)["x"]
    assert len(x.unique()) < 40
    exact = (255 * x).round().double() / 255
    one, other = (predictive_check(shades, shades_guide, {"x": data}, draws=50, seed=1) for data in (x, exact))
    assert one["statistic"].values.tolist() == ["mean", "contrast", "minimum", "maximum", "kurtosis"]
    for name in ("pit_ecdf", "coverage", "tail_probability"):
        np.testing.assert_array_equal(one[name], other[name])
    off = (one["pit_ecdf"] - one["u"]).isel(observed=0)
    assert float(abs(off / one["pit_ecdf_se"].isel(observed=0).clip(1e-3)).max()) < 5


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitwise", "discretised-logistic", "categorical"])
def test_digits_on_the_grid_are_fitted_sampled_and_checked(name, tmp_path):
    data = cal.data.load("digits")["train"][:300]
    x = (255 * data.tensors()[0]["x"]).round() / 255
    with seeded(0):
        model = cal.models.create("vae", shape=(1, 8, 8), latents=2, likelihood=name)
        guide = cal.guides.amortize(model, {"x": x})
    fit = cal.inference.fit(model, guide, {"x": x}, epochs=4, batch_size=50)
    assert fit.history[-1]["validation"] > fit.history[0]["validation"]
    tree = cal.inference.posterior(model, guide, {"x": x[:4]}, draws=50)
    assert np.isfinite(tree.posterior["z"].values).all()
    few = {"x": x[:2]}
    found = cal.inference.reference(model, few, chains=4, warmup=300, draws=500, init=guide, seed=0)
    assert int(found["convergence"]["is_reference"].sum()) >= 1
    check = cal.evaluation.check(model, guide, few, found, draws=500, simulations=100, remedies=False)
    assert "predictive" in check.save(tmp_path / "report.html").read_text()
