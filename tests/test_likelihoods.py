"""Every registered likelihood, on the cases of its card: its density, its draws, its support, its noise, and what it
asks of a decoder. A new likelihood is tested by existing."""

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

ALL = parameters(
    [(card.name, case, (card.name, case)) for card in cal.models.list_likelihoods() for case in card.cases]
)
SINGLE = [p for p in ALL if torch.Size(next(iter(p.values[0][1].observed.values()))).numel() == 1]
PROBES = (-1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 7.0, 255.0, 256.0)
DRAWS = 4000


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
    parts = output if isinstance(output, tuple) else (output,)
    x = likelihood(output).sample()

    def log_prob(*parts):
        return likelihood(parts if len(parts) > 1 else parts[0]).log_prob(x)

    assert torch.autograd.gradcheck(log_prob, parts)
    log_prob(*parts).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in likelihood.parameters())


# -- the density -------------------------------------------------------------------------------------------------------


def mass(likelihood, fn, low=-np.inf, high=np.inf):
    """The probability that a single entry lies in (low, high], by a sum or by quadrature of the density."""
    support, shape = likelihood.support, fn.event_shape

    def density(x):
        return fn.log_prob(torch.tensor(x, dtype=torch.float64).reshape(1, *shape)).exp().item()

    lower = max(low, float(getattr(support, "lower_bound", 0.0 if support.is_discrete else -np.inf)))
    upper = min(high, float(getattr(support, "upper_bound", 1000.0 if support.is_discrete else np.inf)))
    if support.is_discrete:
        grid = np.arange(np.ceil(lower), np.floor(upper) + 1)
        inside = [x for x in grid if x > low and bool(support.check(torch.tensor(x)))]
        return sum(density(x) for x in inside)
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
    fn, other = (likelihood(some_output(likelihood, shape_of(named[1]), 1, s, torch.float64)) for s in (0, 1))
    with seeded(1):
        draws, wrong = (one.expand([DRAWS]).sample().flatten().numpy() for one in (fn, other))
    assert counts_agree(likelihood, fn, draws)
    assert not counts_agree(likelihood, fn, wrong)  # the defect: draws for another output


def test_noise_sd_is_the_sd_of_draws(part):
    likelihood, shape = part
    output = some_output(likelihood, shape, 2)
    said = likelihood.noise_sd(output)
    if said is None:
        return
    sd = said.detach().expand(2, *shape).double()
    with torch.no_grad():
        draws = torch.stack([likelihood(output).sample() for _ in range(DRAWS)]).double()
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
        entries = likelihood.double().marginals(some_output(likelihood, shape, 3, dtype=torch.float64))
        draws = entries.sample((DRAWS,))
    known = entries.stddev.isfinite().all()
    if known:
        error = entries.stddev / DRAWS**0.5
        assert float(((draws.mean(0) - entries.mean) / error).abs().max()) < limit(error.numel())
        squares = (draws - entries.mean) ** 2
        error = squares.std(0) / DRAWS**0.5
        assert float(((squares.mean(0) - entries.variance) / error).abs().max()) < limit(error.numel())
        assert float(((squares.mean(0) - 1.3 * entries.variance) / error).abs().max()) > limit(error.numel())


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
    images = all(len(event) >= 3 and event[-2] % 4 == event[-1] % 4 == 0 for event in outputs.values())
    if decoder == "conv" and not images:
        with pytest.raises(ProgramError, match="convolutional decoder"):
            make_decoder(decoder, 3, outputs)
        return
    output = make_decoder(decoder, 3, outputs)(torch.randn(5, 3))
    found = output if isinstance(output, tuple) else (output,)
    assert [value.shape for value in found] == [(5, *event) for event in outputs.values()]
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
    plain, scaled = (value if isinstance(value, tuple) else (value,) for value in (plain, scaled))
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
