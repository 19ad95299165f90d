"""Every registered likelihood, on the cases of its card: its density, its draws, its support, its noise, and what it
asks of a decoder. A new likelihood is tested by existing."""

import copy
from itertools import pairwise

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from cases import parameters
from scipy.integrate import quad

import calibrant as cal
from calibrant.errors import DataError, ProgramError
from calibrant.models.parts.decoders import DECODERS, make_decoder
from calibrant.models.parts.likelihoods.protocol import Likelihood, outputs_of, takes_logits
from calibrant.program.environment import seeded

CARDS = [card for card in cal.models.list_likelihoods() if card.cls.is_density]  # others: test_training_losses.py
ALL = parameters([(card.name, case, (card.name, case)) for card in CARDS for case in card.cases])
SINGLE = [p for p in ALL if torch.Size(next(iter(p.values[0][1].observed.values()))).numel() == 1]
PROBES = (-1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 7.0, 255.0, 256.0)
DRAWS = 4000
ROWS = 10  # of outputs of a decoder, for which draws are compared with the density
EXTREMES = torch.tensor([0.0, -5.0, 5.0, -13.0, 13.0, -1e3, 1e3, -1e6, 1e6])  # outputs of a decoder that diverges


def shape_of(case):
    return next(iter(case.observed.values()))


def build(name, case):
    with seeded(0):
        return cal.models.make_likelihood({"name": name, **case.arguments})


def some_output(likelihood, shape, size, seed=0, dtype=torch.float32):
    """What a decoder might return: standard Normal draws."""
    draw = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(size, *event, generator=draw, dtype=torch.float64).to(dtype)
        for event in likelihood.outputs(shape).values()
    ]
    return parts[0] if len(parts) == 1 else tuple(parts)


def each(function, output):
    return tuple(map(function, output)) if isinstance(output, tuple) else function(output)


def parts_of(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.fixture(params=ALL)
def part(request):
    """A likelihood, and the event shape of its observations."""
    name, case = request.param
    return build(name, case), shape_of(case)


@pytest.mark.parametrize("card", cal.models.list_likelihoods(), ids=lambda card: card.name)
def test_a_card_says_what_the_likelihood_is_and_has_cases(card):
    assert all((card.name, card.density_of, card.equations, card.cls.__doc__))
    assert issubclass(card.cls, Likelihood)
    assert any(torch.Size(shape_of(case)).numel() == 1 for case in card.cases), "a case with a single entry is needed"
    assert len({case.name or str(case) for case in card.cases}) == len(card.cases)


# -- shapes and dtypes -------------------------------------------------------------------------------------------------


def test_batch_is_the_data_and_event_is_the_observation(part):
    likelihood, shape = part
    for size in (1, 2, 5):
        fn = likelihood(some_output(likelihood, shape, size))
        assert (fn.batch_shape, fn.event_shape) == ((size,), shape)
        assert fn.sample().shape == (size, *shape)


def test_a_datum_does_not_depend_on_others(part):
    likelihood, shape = part
    output = some_output(likelihood, shape, 5)
    x = likelihood(output).sample()
    alone = likelihood(each(lambda value: value[2:3], output)).log_prob(x[2:3])
    torch.testing.assert_close(likelihood(output).log_prob(x)[2:3], alone)


def test_float64_is_computed_in_float64(part):
    likelihood, shape = part
    output = some_output(likelihood, shape, 5)
    x = likelihood(output).sample()
    wide = likelihood.double()(each(torch.Tensor.double, output)).log_prob(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(likelihood.float()(output).log_prob(x).double(), wide, rtol=1e-4, atol=1e-3)


def test_gradients_are_finite_and_those_of_differences(part):
    likelihood, shape = part
    likelihood.double()
    output = each(lambda v: v.requires_grad_(), some_output(likelihood, shape, 3, dtype=torch.float64))
    parts, weights = parts_of(output), dict(likelihood.named_parameters())
    x = likelihood(output).sample()

    def log_prob(*values):
        given, others = values[: len(parts)], dict(zip(weights, values[len(parts) :], strict=True))
        fn = torch.func.functional_call(likelihood, others, (given if len(parts) > 1 else given[0],))
        return fn.log_prob(x)

    values = *parts, *weights.values()
    assert torch.autograd.gradcheck(log_prob, values, fast_mode=sum(value.numel() for value in values) > 500)


def not_finite(likelihood, shape, dtype):
    """The observations of which density or gradient are not finite, for outputs of a decoder that diverges."""
    likelihood.to(dtype)
    draw, found = torch.Generator().manual_seed(0), []
    for value in (value for value in (*PROBES, -1e6, 1e6) if bool(likelihood.support.check(torch.tensor(value)))):
        output = each(
            lambda part: EXTREMES[torch.randint(len(EXTREMES), part.shape, generator=draw)].to(dtype).requires_grad_(),
            some_output(likelihood, shape, 128),
        )
        density = likelihood(output).log_prob(torch.full((128, *shape), value, dtype=dtype))
        gradients = torch.autograd.grad(density.sum(), [*parts_of(output), *likelihood.parameters()])
        if not all(part.isfinite().all() for part in (density, *gradients)):
            found.append(value)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_outputs_and_observations_have_finite_densities_and_gradients(part, dtype):
    assert not_finite(*part, dtype) == []


class Unbounded(Likelihood):
    """The defect: scales that underflow and overflow."""

    def outputs(self, shape):
        return {"location": shape, "log_scale": shape}

    def marginals(self, output):
        return dist.Normal(output[0], output[1].exp(), validate_args=False)


def test_scales_that_overflow_are_seen():
    assert {0.0, 1e6} <= set(not_finite(Unbounded(), (1,), torch.float64))


# -- the density -------------------------------------------------------------------------------------------------------


def values_of(support):
    """The values of a discrete support, of those on the grid k/255 and the whole numbers up to 1000."""
    values = torch.cat([torch.arange(256) / torch.tensor(255.0).double(), torch.arange(2, 1001).double()])
    return values[support.check(values)]


def mass(likelihood, fn, low=-np.inf, high=np.inf):
    """The probability that a single entry lies in (low, high], by a sum or by quadrature of the density."""
    support, shape = likelihood.support, fn.event_shape

    def density(x):
        return fn.log_prob(torch.tensor(x, dtype=torch.float64).reshape(1, *shape)).exp().item()

    lower = max(low, float(getattr(support, "lower_bound", -np.inf)))
    upper = min(high, float(getattr(support, "upper_bound", np.inf)))
    if support.is_discrete:
        values = values_of(support)
        masses = fn.log_prob(values.reshape(-1, 1, *shape)).exp().flatten().detach()
        return float(masses[(low < values) & (values <= high)].sum())
    with seeded(0):
        middle = np.unique(fn.expand([201]).sample().flatten().quantile(torch.linspace(0, 1, 11).double()).numpy())
    cuts = [lower, *(m for m in middle if lower < m < upper), upper]
    return sum(quad(density, a, b, epsabs=1e-9)[0] for a, b in pairwise(cuts))


@pytest.mark.parametrize("named", SINGLE)
def test_density_integrates_to_one(named):
    likelihood = build(*named).double()
    for seed in range(3):
        fn = likelihood(some_output(likelihood, shape_of(named[1]), 1, seed, torch.float64))
        assert abs(mass(likelihood, fn) - 1) < 1e-5


def counts_agree(likelihood, fn, draws):
    """Whether the shares of draws in five intervals are the density's masses there; the intervals come from others."""
    with seeded(5):
        others = fn.expand([DRAWS]).sample().flatten().numpy()
    edges = np.unique(np.quantile(others, [0.1, 0.3, 0.5, 0.7, 0.9]))
    expected = np.array([mass(likelihood, fn, high=edge) for edge in edges])
    found = np.array([(draws <= edge).mean() for edge in edges])
    error = np.sqrt(np.maximum(expected * (1 - expected), 1e-6) / len(draws))
    return bool((np.abs(found - expected) / error < limit(len(edges))).all())


@pytest.mark.parametrize("named", SINGLE)
def test_draws_are_those_of_the_density(named):
    likelihood = build(*named).double()
    fns = [likelihood(some_output(likelihood, shape_of(named[1]), 1, s, torch.float64)) for s in range(4)]
    with seeded(1):
        draws = [fn.expand([DRAWS]).sample().flatten().numpy() for fn in fns]
    assert all(counts_agree(likelihood, fn, x) for fn, x in zip(fns, draws, strict=True))
    wrong = [np.where(np.arange(DRAWS) < DRAWS // 5, x.min(), x) for x in draws]  # the defect: a fifth is lost
    assert not all(counts_agree(likelihood, fn, x) for fn, x in zip(fns, wrong, strict=True))


def scores(likelihood, output, x, towards, blocks=100):
    """Standardised means of the density's slopes at draws `(draw, size, *shape)`, along outputs and along weights.

    The slopes are those along the differences `towards` other outputs and weights, and along random directions: a
    single output may be one whose slope is seldom far from zero.
    """

    def slopes(x, *weights):
        many = each(lambda v: v.expand(len(x), *v.shape).flatten(0, 1).clone().requires_grad_(), output)
        over = weights or parts_of(many)
        return torch.autograd.grad(likelihood(many).log_prob(x.flatten(0, 1)).sum(), over)

    tables, weights = [torch.cat([slope.reshape(len(x), -1) for slope in slopes(x)], 1)], list(likelihood.parameters())
    if weights:
        rows = [slopes(block, *weights) for block in x.chunk(blocks)]
        tables.append(torch.stack([torch.cat([slope.flatten() for slope in row]) for row in rows]))
    found = [table @ directions(way) for table, way in zip(tables, towards, strict=False)]
    return torch.cat([means.mean(0) / means.std(0) * len(means) ** 0.5 for means in found]).nan_to_num(0.0).abs()


def directions(way):
    """A direction and a few random ones, in columns."""
    draw = torch.Generator().manual_seed(0)
    return torch.cat([way[:, None], torch.randn(len(way), 9, generator=draw, dtype=way.dtype)], 1)


def flat(parts):
    return torch.cat([part.detach().flatten() for part in parts]) if parts else torch.zeros(0)


def test_slopes_of_the_density_vanish_on_average_over_its_draws(part):
    likelihood, shape = part
    likelihood.double()
    output, other = (some_output(likelihood, shape, ROWS, seed, torch.float64) for seed in (0, 1))
    changed = copy.deepcopy(likelihood)
    with seeded(1), torch.no_grad():
        for weight in changed.parameters():
            weight.add_(0.3 * torch.randn_like(weight).sign())
        fns = {"right": likelihood(output), "other output": likelihood(other), "other weights": changed(output)}
        size = max(100, DRAWS // (ROWS * torch.Size(shape).numel()))
        draws = {name: fn.sample((size,)) for name, fn in fns.items()}
    weights = [list(module.parameters()) for module in (likelihood, changed)]
    towards = flat(parts_of(other)) - flat(parts_of(output)), flat(weights[1]) - flat(weights[0])
    found = {name: scores(likelihood, output, x, towards) for name, x in draws.items()}
    largest = limit(len(found["right"]))
    assert found["right"].max() < largest
    assert found["other output"].max() > largest
    assert found["other weights"].max() > largest or not weights[0]


def test_noise_sd_is_the_sd_of_draws(part):
    likelihood, shape = part
    output = some_output(likelihood, shape, 2)
    said = likelihood.noise_sd(output)
    if said is None:
        return
    sd = said.detach().expand(2, *shape).double()
    with torch.no_grad():
        draws = likelihood(output).sample((DRAWS,)).double()
    squares = (draws - draws.mean(0)) ** 2
    error = squares.std(0) / DRAWS**0.5
    assert ((squares.mean(0) - sd**2).abs() / error).max() < limit(sd.numel())
    assert ((squares.mean(0) - (1.15 * sd) ** 2).abs() / error).max() > limit(sd.numel())


# -- entries -----------------------------------------------------------------------------------------------------------


def test_entries_are_those_of_the_observation(part):
    likelihood, shape = part
    likelihood.double()
    output = some_output(likelihood, shape, 3, dtype=torch.float64)
    entries = likelihood.marginals(output)
    assert (entries.batch_shape, entries.event_shape) == ((3, *shape), ())
    if len(shape) == 1 and shape[0] == 1:
        x = likelihood(output).sample()
        torch.testing.assert_close(entries.log_prob(x).flatten(1).sum(1), likelihood(output).log_prob(x))


def test_distribution_function_and_quantiles_invert_each_other(part):
    likelihood, shape = part
    likelihood.double()
    entries = likelihood.marginals(some_output(likelihood, shape, 3, dtype=torch.float64))
    share = torch.linspace(0.02, 0.98, 25).double().reshape(-1, *[1] * len(entries.batch_shape))
    values = entries.icdf(share.expand(25, *entries.batch_shape))
    assert bool(likelihood.support.check(values).all())
    if not likelihood.support.is_discrete:
        torch.testing.assert_close(entries.cdf(values), share.expand_as(values), atol=1e-6, rtol=0)
        return
    below = entries.cdf(values) - entries.log_prob(values).exp()
    assert bool((below < share + 1e-9).all() and (entries.cdf(values) >= share - 1e-9).all())


def test_means_and_standard_deviations_are_those_of_the_draws(part):
    likelihood, shape = part
    with seeded(3), torch.no_grad():
        entries = likelihood.double().marginals(some_output(likelihood, shape, ROWS, dtype=torch.float64))
        draws = entries.sample((DRAWS,))
    far = torch.stack([entries.icdf(torch.full_like(entries.mean, share)) for share in (1e-6, 1 - 1e-6)])
    tame = ((far - entries.mean).abs() < 12 * entries.stddev).all(0) & entries.stddev.isfinite()  # else too few draws
    tame &= (draws != draws.mode(0).values).double().mean(0) > 0.1
    mean, variance, draws = entries.mean[tame], entries.variance[tame], draws[:, tame]
    error, largest = variance.sqrt() / DRAWS**0.5, limit(max(mean.numel(), 1))
    squares = (draws - mean) ** 2
    error_of_squares = squares.std(0) / DRAWS**0.5
    assert (((draws.mean(0) - mean) / error).abs() < largest).all()
    assert (((squares.mean(0) - variance) / error_of_squares).abs() < largest).all()
    if len(mean):
        assert (((draws.mean(0) - mean - 0.2 * variance.sqrt()) / error).abs() > largest).any()
        assert (((squares.mean(0) - 1.5 * variance) / error_of_squares).abs() > largest).any()


# -- the support -------------------------------------------------------------------------------------------------------


def test_support_is_that_of_the_distribution(part):
    likelihood, shape = part
    fn = likelihood(some_output(likelihood, shape, 1))
    assert bool(likelihood.support.check(fn.expand([100]).sample()).all())
    for probe in PROBES:
        x = fn.sample().float()
        x.view(-1)[0] = probe
        assert bool(likelihood.support.check(x).all()) == bool(fn.support.check(x).all()), probe


def test_data_outside_the_support_are_refused(part):
    likelihood, shape = part
    outside = [probe for probe in PROBES if not bool(likelihood.support.check(torch.tensor(probe)))]
    model = cal.models.create("vae", shape=shape, latents=2, likelihood=likelihood)
    x = cal.program.sample_prior(model, 4, seed=0)["x"]
    cal.program.check_program(model, {"x": x})
    for probe in outside:
        wrong = x.float()  # integers would cut the probe off
        wrong.view(4, -1)[2, 0] = probe
        with pytest.raises(DataError, match=r"outside the support.*datum 2"):
            cal.program.check_program(model, {"x": wrong})


# -- the decoder, and the models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_return_what_is_asked(part, decoder):
    likelihood, shape = part
    outputs = likelihood.outputs(shape)
    large = [event for event in outputs.values() if event[-2:] != (1, 1)]  # not one entry for all positions
    factor = {"conv": 4, "sigma-vae": 4, "ea-vae-conv": 8}.get(decoder, 1)
    images = bool(large) and all(len(event) >= 3 and event[-2] % factor == event[-1] % factor == 0 for event in large)
    if factor > 1 and not images:
        with pytest.raises(ProgramError, match="convolutional decoder"):
            make_decoder(decoder, 3, outputs)
        return
    output = make_decoder(decoder, 3, outputs)(torch.randn(5, 3))
    assert [value.shape for value in parts_of(output)] == [(5, *event) for event in outputs.values()]
    assert likelihood(output).event_shape == shape


@pytest.mark.parametrize("named", ALL)
def test_models_take_it_by_name_and_are_rebuilt(named, tmp_path):
    name, case = named
    model = cal.models.create("vae", shape=shape_of(case), latents=2, likelihood={"name": name, **case.arguments})
    data = {"x": cal.program.sample_prior(model, 64, seed=0)["x"]}
    guide = cal.guides.amortize(model, data)
    fit = cal.inference.fit(model, guide, data, epochs=1, batch_size=32)
    cal.store.save_run(tmp_path / "run", model, guide, fit)
    loaded, _ = cal.load(tmp_path / "run")
    values = cal.program.sample_prior(model, 4, seed=1)
    first, second = (cal.program.log_density(m, values, observed=["x"]).joint for m in (model, loaded))
    assert first.isfinite().all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("named", SINGLE)
def test_a_scale_multiplies_the_first_output(named):
    name, case = named
    likelihood, shape = build(name, case), shape_of(case)
    right = "logits" if takes_logits(likelihood, shape) else "output"
    wrong = {"logits": "output", "output": "logits"}[right]
    given = {"shape": shape, "latents": 2, "likelihood": {"name": name, **case.arguments}}
    with pytest.raises(ProgramError, match="does not fit"):
        cal.models.create("ea-vae", multiplies=wrong, **given)
    model = cal.models.create("ea-vae", multiplies=right, **given)
    z, scale = torch.randn(3, 2), torch.tensor([0.5, 1.0, 2.0])
    plain, scaled = model.decoder(z), model.scaled(scale, z)
    plain, scaled = parts_of(plain), parts_of(scaled)
    torch.testing.assert_close(scaled[0], scale.reshape(3, *[1] * (plain[0].dim() - 1)) * plain[0])
    assert all(torch.equal(one, other) for one, other in zip(plain[1:], scaled[1:], strict=True))


# -- likelihoods of users ----------------------------------------------------------------------------------------------


class Mine(torch.nn.Module):
    """A user's module: no `outputs`, no `noise_sd`."""

    def forward(self, output):
        return dist.Laplace(output, 1.0).to_event(output.dim() - 1)


def test_a_module_of_a_users_own_is_taken_as_it_is():
    mine = Mine()
    assert cal.models.make_likelihood(mine) is mine
    assert outputs_of(mine, (2, 3)) == {"output": (2, 3)}
    assert not takes_logits(mine, (2, 3))
    model = cal.models.create("vae", shape=(2, 3), latents=2, likelihood=mine)
    assert cal.program.sample_prior(model, 4, seed=0)["x"].shape == (4, 2, 3)


def test_a_name_is_registered_once_and_unknown_ones_are_told():
    about = {"density_of": "real numbers", "equations": "none"}
    with pytest.raises(ProgramError, match="'gaussian' is given to two"):
        cal.models.register_likelihood("gaussian", **about)(Mine)
    with pytest.raises(ProgramError, match="unknown likelihood 'gausian'; did you mean gaussian"):
        cal.models.make_likelihood("gausian")
    with pytest.raises(ProgramError, match="sigma"):
        cal.models.make_likelihood({"name": "gaussian", "sigma": 1.0})
