"""Every prior of the tables: what it is called, its density against SciPy or a change of variables, its draws."""

import numpy as np
import pytest
import torch
from agreement import limit
from scipy import stats

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.models.parts.priors import SCALE_PRIORS, VECTOR_PRIORS, named_scale_prior, vector_prior

# The same distributions in SciPy's words, at parameters away from the defaults.
SCIPY = {
    "lognormal": ({"loc": 0.3, "scale": 0.7}, lambda loc, scale: stats.lognorm(scale, scale=np.exp(loc))),
    "gamma": (
        {"concentration": 3.0, "rate": 0.5},
        lambda concentration, rate: stats.gamma(concentration, scale=1 / rate),
    ),
    "rayleigh": ({"scale": 2.0}, lambda scale: stats.rayleigh(scale=scale)),
}
DRAWS = 4000


@pytest.mark.parametrize("name", SCALE_PRIORS)
def test_scale_priors(name):
    defaults = SCALE_PRIORS[name][1]
    fn = named_scale_prior(name, tuple(SCALE_PRIORS))()
    assert (fn.batch_shape, fn.event_shape) == ((), ())
    x = fn.sample((DRAWS,))
    assert bool((x > 0).all())
    assert fn.log_prob(x).isfinite().all()
    other = {"name": name, **{parameter: value + 0.5 for parameter, value in defaults.items()}}
    assert not torch.allclose(named_scale_prior(other, tuple(SCALE_PRIORS))().log_prob(x), fn.log_prob(x))
    with pytest.raises(ProgramError, match="has no parameters"):
        named_scale_prior({"name": name, "nothing_of_the_kind": 1.0}, tuple(SCALE_PRIORS))
    with pytest.raises(ProgramError, match="unknown scale prior"):
        named_scale_prior(name, ())


@pytest.mark.parametrize("name", SCALE_PRIORS)
def test_densities_of_scales_integrate_to_one(name):
    u = torch.linspace(-30.0, 12.0, 20_001, dtype=torch.float64)  # of the logarithm
    parameters = {key: torch.tensor(value, dtype=torch.float64) for key, value in SCALE_PRIORS[name][1].items()}
    density = SCALE_PRIORS[name][0](**parameters).log_prob(u.exp()) + u
    assert abs(float(torch.trapezoid(density.exp(), u)) - 1) < 1e-4


@pytest.mark.parametrize("name", SCIPY)
def test_densities_and_draws_of_scales_are_those_of_scipy(name):
    parameters, make = SCIPY[name]
    fn, truth = named_scale_prior({"name": name, **parameters}, tuple(SCALE_PRIORS))(), make(**parameters)
    x = fn.sample((DRAWS,)).double()
    assert np.allclose(fn.log_prob(x.float()).double(), truth.logpdf(x), rtol=0, atol=1e-4)
    for q in (0.05, 0.5, 0.95):
        assert abs(float((x < truth.ppf(q)).double().mean()) - q) < limit(9) * (q * (1 - q) / DRAWS) ** 0.5


@pytest.mark.parametrize("name", VECTOR_PRIORS)
def test_vector_priors(name):
    fn = vector_prior(name, 3)()
    assert (fn.batch_shape, fn.event_shape) == ((), (3,))
    x = fn.sample((DRAWS,)).double()
    truth = getattr(stats, {"normal": "norm"}.get(name, name), None)
    assert truth is not None, f"name the distribution of SciPy that {name!r} is"
    assert np.allclose(fn.log_prob(x.float()).double(), truth.logpdf(x).sum(1), rtol=0, atol=1e-4)
    assert (x.median(0).values.abs() < 0.15).all()  # location 0
    with pytest.raises(ProgramError, match="at least one latent"):
        vector_prior(name, 0)
    with pytest.raises(ProgramError, match="unknown latent prior"):
        vector_prior(name + "x", 3)


def test_models_name_priors_of_the_tables():
    for name in ("gsm", "ea-vae"):
        with pytest.raises(ProgramError, match="unknown scale prior 'cauchy'"):
            cal.models.create(name, **{**cal.models.card(name).cases[0].arguments, "scale_prior": "cauchy"})
