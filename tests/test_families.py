"""Families of the guides: densities, draws and gradients against quadrature and SciPy, with planted defects.

m statistics are compared at the limit z = Φ⁻¹(1 − 1e-5/(2m)), or at the Kolmogorov–Smirnov distance that n true draws
exceed with probability 1e-6.
"""

import copy
from math import lgamma, log, pi

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from scipy import special, stats
from torch.fx.experimental.proxy_tensor import make_fx

from calibrant.distributions.directional import VonMises, VonMisesFisher, log_peak_density, mean_cosine
from calibrant.errors import ProgramError
from calibrant.guides.families.choosing import FAMILIES, choose_family
from calibrant.guides.families.heads import Head

DIMENSIONS = (2, 3, 10, 128, 512, 1000)
CONCENTRATIONS = (1e-3, 1.0, 30.0, 1000.0, 1e5)
SHAPES = ((), (3,), (2, 3))
PRIORS = {
    "normal": dist.Normal(3.0, 2.0),
    "studentt": dist.StudentT(3.0, 1.0, 2.0),
    "lognormal": dist.LogNormal(1.0, 2.0),
    "gamma": dist.Gamma(2.0, 1.0),
    "halfnormal": dist.HalfNormal(1.0),
    "beta": dist.Beta(2.0, 3.0),
    "uniform": dist.Uniform(100.0, 101.0),
    "vonmises": dist.VonMises(1.0, 2.0),
    "dirichlet": dist.Dirichlet(torch.tensor([0.3, 1.0, 5.0])),
    "sphere": dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0])),
    "lkj": dist.LKJCholesky(3, 1.0),
    "bernoulli": dist.Bernoulli(0.3),
    "categorical": dist.Categorical(torch.tensor([0.1, 0.2, 0.7])),
    "onehot": dist.OneHotCategorical(torch.tensor([0.1, 0.2, 0.7])),
}
BEST = {
    "halfnormal": "lognormal",
    "uniform": "transformed@interval[100.0, 101.0]",
    "sphere": "vmf",
    "lkj": "transformed@corr_cholesky",
    "categorical": "categorical[3]",
}
CASES = [
    *((name, "auto") for name in PRIORS),
    *(("normal", family) for family in ("laplace", "transformed", "dense", "low-rank", "flow")),
    *(("lognormal", family) for family in ("transformed", "dense", "low-rank", "flow")),
    *(("uniform", family) for family in ("dense", "flow")),
    *(("dirichlet", family) for family in ("transformed", "low-rank", "flow")),
]


def prior(name, shape, size=1000):
    return PRIORS[name].expand((size, *shape)).to_event(len(shape))


def make_head(name, asked, shape, features=16, parents=0, dtype=torch.float32, **kwargs):
    """A head with its prior set."""
    fn = prior(name, shape)
    head = Head(features, parents, fn.event_shape, choose_family("s", fn.support, fn, asked), **kwargs)
    head.set_prior(fn.sample())
    return head.to(dtype)


# -- von Mises–Fisher --------------------------------------------------------------------------------------------------


def bessel(order, k):
    """log I_order(k) − k and I_{order+1}/I_order by SciPy; None where its function underflows."""
    value = special.ive(order, k)
    return (np.log(value), special.ive(order + 1, k) / value) if value > 1e-280 else None


def grid():
    for p in DIMENSIONS:
        for k in CONCENTRATIONS:
            if p <= 512 and (found := bessel(p / 2 - 1, k)) is not None:
                yield p, k, (p / 2 - 1) * log(k) - p / 2 * log(2 * pi) - found[0], found[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_normalizer_and_its_gradient_are_those_of_bessel_functions(dtype, tolerance):
    """The derivative of log exp(κ)C(κ) is 1 − A(κ), the mean of 1 − cos, which must be right in relative terms."""
    cases = list(grid())
    assert len(cases) > 18
    for p, k, truth, ratio in cases:
        at = torch.tensor(k, dtype=dtype, requires_grad=True)
        found = log_peak_density(p, at)
        assert abs(found.item() - truth) < tolerance * max(1, abs(truth)), (p, k)
        slope = torch.autograd.grad(found, at)[0].item()
        # 1 − ratio loses digits in SciPy's numbers themselves where the ratio is near 1
        assert abs(slope - (1 - ratio)) < 10 * tolerance * (1 - ratio) + 1e-14, (p, k)
        assert abs(mean_cosine(p, at.detach()).item() - ratio) < 10 * tolerance, (p, k)


@pytest.mark.parametrize("p", [4, 1000])
def test_normalizer_obeys_the_recurrence_and_the_limits_of_bessel_functions(p):
    """I_{ν−1} − I_{ν+1} = 2ν/κ I_ν, also where SciPy's function underflows; at κ = 0 the area of the sphere."""
    k = torch.tensor([0.5, 10.0, 500.0, 1e5], dtype=torch.float64)
    logs = {
        q: (q / 2 - 1) * k.log() + k - q / 2 * log(2 * pi) - log_peak_density(q, k) for q in (p - 2, p, p + 2) if q > 1
    }
    order = p / 2 - 1
    difference = (logs[p - 2] - logs[p]).exp() - (logs[p + 2] - logs[p]).exp()
    assert torch.allclose(difference, 2 * order / k, rtol=1e-6, atol=1e-9)
    area = log(2) + p / 2 * log(pi) - lgamma(p / 2)
    assert abs(log_peak_density(p, torch.zeros((), dtype=torch.float64)).item() + area) < 1e-9


def test_densities_are_those_of_scipy():
    angle = torch.linspace(-3.1, 3.1, 50, dtype=torch.float64)
    found = VonMises(torch.tensor(0.7, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)).log_prob(angle)
    assert np.allclose(found, stats.vonmises(5.0, loc=0.7).logpdf(angle), rtol=0, atol=1e-10)
    for p, k in ((3, 4.0), (10, 100.0)):
        points = torch.nn.functional.normalize(torch.randn(20, p, dtype=torch.float64), dim=-1)
        found = VonMisesFisher(points[0], torch.tensor(k).double()).log_prob(points)
        truth = stats.vonmises_fisher(points[0].numpy(), k).logpdf(points.numpy())
        assert np.allclose(found, truth, rtol=0, atol=1e-9)


def drawn(p, k, n, dtype):
    """1 − cos of draws around a random direction, with its derivative in κ."""
    direction = torch.nn.functional.normalize(torch.randn(p, dtype=dtype), dim=-1)
    concentration = torch.full((n,), k, dtype=dtype, requires_grad=True)
    t = (VonMisesFisher(direction, concentration).rsample() - direction).square().sum(-1) / 2
    return t.detach().double(), torch.autograd.grad(t.sum(), concentration)[0].double()


@pytest.mark.parametrize(
    ("p", "dtype"),
    [
        *((p, dtype) for p in (2, 3) for dtype in (torch.float32, torch.float64)),
        (10, torch.float32),
        (128, torch.float64),
        (512, torch.float32),
        (1000, torch.float64),
    ],
)
def test_draws_and_their_gradient_have_the_exact_moments(p, dtype):
    """E t = 1 − A, Var t = dA/dκ, E dt/dκ = −dA/dκ; 85% of t, and a gradient at fixed proposals, are noticed."""
    n, m, scores, narrow, rough = 6000 if p < 100 else 1500, (p - 1) / 2, [], [], []
    for k in CONCENTRATIONS:
        at = torch.tensor(k, dtype=torch.float64, requires_grad=True)
        mean = torch.autograd.grad(log_peak_density(p, at), at, create_graph=True)[0]
        variance = -torch.autograd.grad(mean, at)[0]
        mean = mean.detach()
        t, slope = drawn(p, k, n, dtype)
        fixed = -t * (2 - t) / 2 / (k * k + m * m) ** 0.5  # of an accepted proposal, as if it stayed accepted
        z = lambda values, truth: float((values.mean() - truth).abs() / (values.std() / n**0.5))  # noqa: E731
        scores += [z(t, mean), z((t - mean).square(), variance), z(slope, -variance)]
        narrow.append(z(0.85 * t, mean))
        rough.append(z(fixed, -variance))
    assert max(scores) < limit(3 * len(CONCENTRATIONS)), scores
    assert min(narrow) > limit(3 * len(CONCENTRATIONS)), narrow
    assert p > 10 or max(rough) > limit(3 * len(CONCENTRATIONS)), rough  # in high dimension its bias is small


def test_gradient_in_the_direction_is_that_of_the_expectation():
    """E (aᵀx)² = A/κ |a|² + (1 − pA/κ) (aᵀμ)²; a gradient that leaves the turning out is noticed."""
    p, k, n = 4, 6.0, 40_000
    axis = torch.tensor([0.3, 1.0, -0.5, 0.2], dtype=torch.float64)
    direction = torch.eye(p, dtype=torch.float64)[0].expand(n, p).clone().requires_grad_()
    x = VonMisesFisher(direction, torch.full((n,), k, dtype=torch.float64)).rsample()
    slope = torch.autograd.grad((x @ axis).square().sum(), direction)[0][:, 1:]
    a = mean_cosine(p, torch.tensor(k, dtype=torch.float64))
    truth = 2 * (1 - p * a / k) * axis[0] * axis[1:]
    z = ((slope.mean(0) - truth).abs() / (slope.std(0) / n**0.5)).max()
    assert z < limit(3)
    straight = (2 * (x @ axis) * (x @ direction[0]))[:, None].detach() * axis[1:]  # x moves by dμ, off the sphere
    assert ((straight.mean(0) - truth).abs() / (straight.std(0) / n**0.5)).max() > limit(3)


def test_draws_can_be_recorded():
    direction = torch.eye(5)[0]
    graph = make_fx(lambda k: VonMisesFisher(direction, k, validate_args=False).rsample())(torch.ones(3))
    assert torch.allclose(graph(torch.ones(3)).norm(dim=-1), torch.ones(3))


# -- one entry, by quadrature ------------------------------------------------------------------------------------------

ONE_ENTRY = ("normal", "studentt", "lognormal", "gamma", "beta", "uniform", "vonmises")
ENTRIES = [*((n, f) for n, f in CASES if n in ONE_ENTRY), ("gamma", "gamma-fixed")]  # the last is wide at the start


def on_grid(head, raw):
    """Values of a site of one entry, the density there, and weights of the trapezoidal rule, for one datum."""
    if head.family.event_shape == () and head.width_on_line == 2:
        value = torch.linspace(-pi, pi, 4001, dtype=torch.float64)
    else:
        line = head.center + head.width * torch.linspace(-14, 14, 40_001, dtype=torch.float64)
        value = {"normal": line, "studentt": line, "lognormal": line.exp(), "gamma": line.exp()}.get(head.prior_name)
        value = line.sigmoid() + (100 if head.prior_name == "uniform" else 0) if value is None else value
        value = value[torch.cat([torch.tensor([True]), value.diff() > 0])]
    density = head.family.build(raw.expand(len(value), -1), head.center, head.width).log_prob(value).exp()
    weight = torch.zeros_like(value)
    weight[1:] += value.diff() / 2
    weight[:-1] += value.diff() / 2
    return value, density, weight


@pytest.fixture(params=ENTRIES, ids=lambda case: "-".join(case))
def entry(request):
    """A head in float64 for one entry with raw numbers away from the start."""
    name, asked = request.param
    head = make_head(name, asked, (), dtype=torch.float64)
    head.prior_name = name
    for parameter in head.family.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    raw = 0.5 * torch.randn(1, head.family.raw, dtype=torch.float64)
    return head, raw


def distance(draws, value, density, weight):
    """Kolmogorov–Smirnov distance of draws from a density on a grid."""
    cdf = np.interp(draws.sort().values, value, ((density * weight).cumsum(0) - density * weight / 2).detach())
    n = len(draws)
    return max(np.abs(cdf - np.arange(n) / n).max(), np.abs(cdf - np.arange(1, n + 1) / n).max())


def test_density_integrates_to_one_and_draws_follow_it(entry):
    """Draws that are 15% too near their median are noticed."""
    head, raw = entry
    value, density, weight = on_grid(head, raw)
    assert abs((density * weight).sum().item() - 1) < 1e-3  # heavy tails end at 14 prior scales
    n = 20_000
    with torch.no_grad():
        draws = head.family.build(raw.expand(n, -1), head.center, head.width).sample()
    bound = (log(2 / 1e-6) / (2 * n)) ** 0.5 + 1e-3
    assert distance(draws, value, density, weight) < bound
    middle = draws.median()
    assert distance(middle + 0.85 * (draws - middle), value, density, weight) > bound


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e[1] != "flow" or e[0] == "normal"], indirect=True, ids="-".join
)
def test_gradient_of_draws_is_that_of_the_expectation(entry):
    """Finite differences of the expectation by quadrature; a gradient that is a quarter too small is noticed."""
    head, raw = entry
    n, step = 20_000, 1e-4
    score = lambda v: torch.atan(head.to_line(v)).sum(-1)  # noqa: E731
    rows = raw.repeat(n, 1).requires_grad_()
    draws = head.family.build(rows, head.center, head.width).rsample()
    slopes = torch.autograd.grad(score(draws).sum(), rows)[0]

    def expectation(shift):
        value, density, weight = on_grid(head, raw + shift)
        return (density * weight * score(value)).sum() / (density * weight).sum()

    shifts = step * torch.eye(head.family.raw, dtype=torch.float64)
    with torch.no_grad():
        truth = torch.stack([(expectation(s) - expectation(-s)) / (2 * step) for s in shifts[:3]])
    slopes = slopes[:, : len(truth)]
    error = slopes.std(0) / n**0.5 + 1e-5
    assert ((slopes.mean(0) - truth).abs() / error).max() < limit(len(truth))
    assert ((0.75 * slopes.mean(0) - truth).abs() / error).max() > limit(len(truth))


@pytest.mark.parametrize("family", ["dense", "low-rank", "flow"])
def test_joint_families_integrate_to_one_and_draws_follow_them(family):
    head = make_head("normal", family, (2,), dtype=torch.float64)
    for parameter in head.family.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    raw = torch.randn(1, head.family.raw, dtype=torch.float64)
    n, steps = 10_000, 201
    with torch.no_grad():
        draws = head.family.build(raw.expand(n, -1), head.center, head.width).sample()
        low, high = draws.min(0).values - 1.0, draws.max(0).values + 1.0
        x, y = (torch.linspace(float(a), float(b), steps).double() for a, b in zip(low, high, strict=True))
        points = torch.cartesian_prod(x, y)
        density = head.family.build(raw.expand(len(points), -1), head.center, head.width).log_prob(points).exp()
    density = density.reshape(steps, steps) * (x[1] - x[0]) * (y[1] - y[0])
    assert abs(density.sum().item() - 1) < 1e-2
    bound = (log(2 / 1e-6) / (2 * n)) ** 0.5 + 1e-2
    for entry, (value, marginal) in enumerate(((x, density.sum(1)), (y, density.sum(0)))):
        ones = torch.ones_like(value)
        assert distance(draws[:, entry], value, marginal, ones) < bound
        middle = draws[:, entry].median()
        assert distance(middle + 0.7 * (draws[:, entry] - middle), value, marginal, ones) > bound
    correlation = np.corrcoef(draws.T)[0, 1]
    centred = (x - (x * density.sum(1)).sum())[:, None] * (y - (y * density.sum(0)).sum())
    exact = (density * centred).sum() / (draws.std(0).prod())
    assert abs(correlation - exact) < 0.05


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "shape"),
    [*((*case, (2, 3)) for case in CASES), *((name, "auto", shape) for name in PRIORS for shape in SHAPES[:2])],
)
def test_a_fresh_head_lies_within_the_prior(name, asked, shape):
    size = 400
    head, fn = make_head(name, asked, shape, parents=4), prior(name, shape)
    guide = head(torch.randn(size, 16), torch.randn(size, 4))
    draws = guide.rsample() if guide.has_rsample else guide.sample()
    assert guide.batch_shape == (size,)
    assert guide.event_shape == fn.event_shape
    assert fn.support.check(draws).all()
    assert guide.log_prob(draws).isfinite().all()
    assert fn.log_prob(draws[torch.arange(1000) % size]).isfinite().all() or name == "dirichlet"
    line, reference = head.to_line(draws), head.to_line(fn.sample())
    assert line.shape == (size, head.width_on_line)
    if guide.has_rsample:
        share = line.std(0).mean() / (reference - reference.median(0).values).abs().clamp_max(3).mean()
        assert 0.1 < share < 0.8, share
    else:
        assert (line.mean(0) - reference.mean(0)).abs().max() < 0.3


@pytest.mark.parametrize(
    ("name", "asked", "dtype"),
    [*((*case, torch.float32) for case in CASES), *((name, "auto", torch.float64) for name in PRIORS)],
)
def test_extreme_features_give_draws_inside_and_a_finite_density(name, asked, dtype):
    head, fn = make_head(name, asked, (2,), parents=4, dtype=dtype, regression=True), prior(name, (2,))
    for scale in (1.0, 1e3, 1e5):
        guide = head(scale * torch.randn(200, 16, dtype=dtype), torch.randn(200, 4, dtype=dtype))
        draws = guide.rsample() if guide.has_rsample else guide.sample()
        assert fn.support.check(draws).all(), scale
        assert guide.log_prob(draws).isfinite().all(), scale
        assert head.to_line(draws).isfinite().all(), scale
        assert draws.dtype == (torch.int64 if name == "categorical" else dtype)


@pytest.mark.parametrize("name", PRIORS)
def test_auto_takes_the_family_of_the_prior_or_of_the_support(name):
    fn = prior(name, (3,), size=8)
    assert choose_family("s", fn.support, fn) == BEST.get(name, name)


def test_bounds_of_each_entry_and_what_no_family_covers():
    fn = dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])).expand((8, 2)).to_event(1)
    family = choose_family("s", fn.support, fn)
    assert family == "transformed@interval[[0.0, 1.0], [1.0, 3.0]]"
    head = Head(4, 0, fn.event_shape, family).double()
    assert fn.support.check(head(torch.randn(8, 4).double(), None).sample()).all()
    wrong = [
        (dist.Normal(0.0, 1.0), "gamma", "does not cover"),
        (dist.Normal(0.0, 1.0), "cauchy", "unknown family"),
        (dist.VonMises(0.0, 1.0), "normal", "does not cover"),
        (dist.Poisson(1.0), "auto", "discrete"),
        (dist.Uniform(torch.zeros(8), torch.arange(1.0, 9.0)), "auto", "differs between data"),
        (dist.LKJ(3, torch.tensor(1.0)), "dirichlet", "does not cover"),
    ]
    for fn, asked, match in wrong:
        with pytest.raises(ProgramError, match=match):
            choose_family("s", fn.support, fn, asked)
    with pytest.raises(ProgramError, match="unknown family"):
        Head(4, 0, (), "cauchy")
    assert "flow" in FAMILIES


@pytest.mark.parametrize("family", ["flow", "dense"])
def test_heads_are_copied_and_rebuilt_from_their_state(family):
    head = make_head("lognormal", family, (3,))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    features, value = torch.randn(5, 16), torch.rand(5, 3)
    rebuilt = Head(16, 0, (3,), f"{family}@positive")
    rebuilt.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), rebuilt):
        torch.testing.assert_close(other(features, None).log_prob(value), head(features, None).log_prob(value))
    assert torch.allclose(
        head.double()(features.double(), None).log_prob(value.double()).float(),
        rebuilt(features, None).log_prob(value),
        atol=1e-3,
    )


def test_regression_makes_locations_linear_in_the_parents():
    head = make_head("normal", "dense", (2,), parents=3, regression=True)
    torch.nn.init.zeros_(head.modulation.network[-1].weight)
    torch.nn.init.zeros_(head.modulation.network[-1].bias)
    torch.nn.init.normal_(head.regression.slopes.weight)
    features, parents = torch.randn(4, 16), torch.randn(4, 3)
    shift = head(features, parents).loc - head(features, torch.zeros(4, 3)).loc
    assert torch.allclose(shift, head.width * (3**-0.5 * parents @ head.regression.slopes.weight.T), atol=1e-5)
