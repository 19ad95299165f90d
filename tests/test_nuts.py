"""What batched NUTS promises beside its draws' distribution: lanes that don't depend on each other, coordinates that
don't matter, repairs, interruptions, refusals. `test_nuts_truth` and `test_nuts_calibration` test the distribution."""

import json
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from calibrant.inference.draws import McmcDraws
from calibrant.inference.lanes import NutsSettings, sample_nuts
from calibrant.inference.target import Target, from_normal, to_normal

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference import adaptation, counter, diagnostics, gate, lanes, repair
from calibrant.program import as_program

SHORT = {"warmup": 200, "draws": 500, "compile": False}


def elementwise(size):
    """No matrix product: a lane's arithmetic is the same wherever it stands."""
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate))


def scale_mixture(size, prior=dist.Normal):
    with pyro.plate("data", size):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", prior(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(scale[:, None] * z, 0.5).to_event(1))


def laplace_mixture(size):
    scale_mixture(size, dist.Laplace)


def reference(program, observed, **options):
    return cal.inference.reference(program, observed, method="nuts", **{**SHORT, "seed": 1, **options})


@pytest.fixture
def one_look(monkeypatch):
    monkeypatch.setattr(repair, "_LOOKS", 1)


COUNTS = {"x": torch.tensor([0.0, 2.0, 7.0, 1.0, 4.0, 30.0])}


@pytest.fixture(scope="module")
def counts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "_LOOKS", 1)
        return reference(elementwise, COUNTS)


def test_same_seed_same_draws(counts, one_look):
    again = reference(elementwise, COUNTS)
    np.testing.assert_array_equal(again["posterior"]["rate"], counts["posterior"]["rate"])
    other = reference(elementwise, COUNTS, seed=2)
    assert not np.array_equal(other["posterior"]["rate"], counts["posterior"]["rate"])


def test_draws_do_not_depend_on_the_place_in_the_batch(counts, one_look):
    order = torch.tensor([5, 0, 3])
    moved = reference(elementwise, cal.data.Data(COUNTS).subset(order))
    np.testing.assert_array_equal(moved["posterior"]["rate"], counts["posterior"]["rate"].isel(data=order.tolist()))


def test_few_lanes_at_a_time(counts, one_look, monkeypatch):
    """Two data at a time, lanes handed on from one to the next."""
    monkeypatch.setattr(lanes, "_LANES", {"cpu": 8})
    few = reference(elementwise, COUNTS)
    np.testing.assert_array_equal(few["posterior"]["rate"], counts["posterior"]["rate"])


def test_lanes_are_dropped(counts, one_look, monkeypatch):
    """Lanes that are over leave the batch."""
    monkeypatch.setattr(lanes, "_FEW_LANES", 0)
    monkeypatch.setattr(lanes._Run, "_worth_dropping", lambda self, left, slots: left < slots)
    fewer = reference(elementwise, COUNTS)
    np.testing.assert_array_equal(fewer["posterior"]["rate"], counts["posterior"]["rate"])


class Poisoned(pyro.nn.PyroModule):
    """A density that is infinite, or whose gradient is NaN, for data that say so."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, size, poison):
        with pyro.plate("data", size):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate))
            bad = torch.where(poison > 0, torch.ones_like(rate), torch.zeros_like(rate))
            if self.how == "infinite density":
                pyro.factor("term", torch.where(bad > 0, torch.inf, 0.0))
            elif self.how == "no density":
                pyro.factor("term", torch.where(bad > 0, -torch.inf, 0.0))
            else:  # the square root's slope at zero is infinite, and zero times that is NaN
                pyro.factor("term", 0.0 * (rate * (1 - bad)).sqrt())


@pytest.mark.parametrize("how", ["infinite density", "no density", "NaN gradient"])
def test_a_poisoned_datum_is_reported_and_changes_no_other(how, one_look):
    poison = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    clean = reference(Poisoned(how), COUNTS, covariates={"poison": torch.zeros(6)})
    tree = reference(Poisoned(how), COUNTS, covariates={"poison": poison})
    convergence = tree["convergence"].dataset
    assert not bool(convergence["is_reference"][2])
    assert "no finite log density" in str(convergence["reason"].values[2])
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(
        tree["posterior"]["rate"].isel(data=others), clean["posterior"]["rate"].isel(data=others)
    )


@pytest.mark.gpu
def test_on_a_gpu(one_look):
    """Another device, another stream: the posterior is the same."""

    class Program(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, size):
            with pyro.plate("data", size):
                rate = pyro.sample("rate", dist.Gamma(2.0, self.rate))
                pyro.sample("x", dist.Poisson(rate))

    tree = reference(Program().cuda(), COUNTS)
    assert bool(tree["convergence"]["is_reference"].all())
    truth = dist.Gamma(2.0 + COUNTS["x"], torch.tensor(2.0))
    ess = tree["convergence"]["ess_bulk"].values
    error = tree["posterior"]["rate"].mean(("chain", "draw")).values - truth.mean.numpy()
    assert (np.abs(error) < limit(len(error)) * truth.stddev.numpy() / ess**0.5).all()


# -- coordinates -------------------------------------------------------------------------------------------------------

MIXED = {"x": torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.2, 0.4], [6.0, -4.0, 8.0]])}


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
    where = lanes._coordinates(target, torch.device("cpu"))
    q = torch.randn(3, 4, dtype=torch.float64)
    here, there = torch.zeros(3, 1), torch.tensor([[0.5], [1.0], [0.0]])
    moved = where.move(q, here, there)
    assert not torch.equal(moved[:2], q[:2])
    torch.testing.assert_close(where.move(moved, there, here), q)
    torch.testing.assert_close(where.in_all(q, here)[0][:, 2], where.move(q, here, torch.ones(3, 1)), check_dtype=False)


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
    where, q = lanes._coordinates(target, torch.device("cpu")), torch.randn(4, target.width, dtype=torch.float64)
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


def test_other_coordinates_are_neighbours_in_the_pairs_own_table():
    observed = {"x": torch.zeros(3, dtype=torch.float64)}
    for program, sign in ((scale_mixture, 1.0), (centred_on_a_constant, -1.0)):
        given = MIXED if program is scale_mixture else observed
        target = Target(as_program(program), cal.program.sites(program, given), given, {})
        where = lanes._coordinates(target, torch.device("cpu"))
        powers = sign * torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
        assert where.other(powers).tolist() == (sign * torch.tensor([[0.5], [1.0], [0.5]])).tolist()


def test_a_discrete_latent_may_be_certain():
    def two_groups(size):
        with pyro.plate("data", size):
            group = pyro.sample("group", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(20 * group, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    tree = reference(two_groups, {"x": torch.tensor([0.0, 20.0])})
    assert tree["convergence"]["is_reference"].values.all()
    assert tree["posterior"]["group"].mean(("chain", "draw")).values.tolist() == [0.0, 1.0]
    assert json.loads(tree["posterior"].attrs["latents"]) == ["group", "z"]


def test_a_discrete_support_is_that_of_all_data():
    def coins(size, n):
        with pyro.plate("data", size):
            p = pyro.sample("p", dist.Beta(2.0, 2.0))
            heads = pyro.sample("heads", dist.Binomial(n, p))
            pyro.sample("x", dist.Normal(heads, 1.0))

    n = torch.tensor([2.0] * 8 + [5.0])
    with pytest.raises(InferenceError, match="other values for some data"):
        reference(coins, {"x": torch.ones(9)}, covariates={"n": n})


def test_an_interrupt_of_a_later_look_keeps_the_earlier_one(monkeypatch):
    looks = []
    sample = lanes.sample_nuts

    def interrupted(model, data, settings, *rest):
        drawn, powers = sample(model, data, settings, *rest)
        looks.append(len(data))
        if len(looks) == 1:
            drawn.stats["diverging"][0, 0] = True
            return drawn, powers
        some = McmcDraws(
            {name: value[:, :, :1] for name, value in drawn.draws.items()},
            {name: value[:, :, :1] for name, value in drawn.stats.items()},
            drawn.latents,
            drawn.local,
            drawn.data[:1],
            drawn.lost[:1],
            drawn.moved[:1],
        )
        return some, powers[:1]

    monkeypatch.setattr(sys.modules["calibrant.inference.reference"], "sample_nuts", interrupted)
    tree = reference(scale_mixture, MIXED)
    assert looks == [3, 3]
    assert tree["convergence"]["look"].values.tolist() == [1, 1, 1]
    first = tree["posterior"]["z"].values
    assert not (first[:, :, 0] == first[:, :, 1]).any()


def test_declared_coordinates():
    class Declared(pyro.nn.PyroModule):
        coordinates = {"z": "width"}

        def forward(self, size):
            scale_mixture(size)

    with pytest.raises(InferenceError, match="width"):
        reference(Declared(), MIXED)


# -- metric and schedule -----------------------------------------------------------------------------------------------


def test_windows_are_stans():
    plan = adaptation.schedule(1000)
    ends = plan.closes.nonzero()[:, 0] + 1
    assert ends.tolist() == [100, 150, 250, 450, 950]
    assert (plan.window[:75] == -1).all()
    assert (plan.window[950:] == -1).all()


@pytest.mark.parametrize("dense", [False, True])
def test_chains_of_a_datum_pool_what_they_know(dense):
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(4, 30, 3, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 2.0, 5.0]) + 1e6
    state = adaptation.start(torch.zeros(4, 3, dtype=torch.float64), 2, 1, 0, dense)
    for step in range(30):
        some = torch.arange(4)[: 4 if step < 20 else 2]  # two chains stop early
        window = torch.ones(len(some), dtype=torch.int64)
        adaptation.contribute(state, some, window, draws[some, step, None], torch.zeros(len(some), 0, 1), some.double())
    count, variance, _ = adaptation.pooled(state, torch.arange(4)[None], torch.tensor([1]))
    together = torch.cat([draws[:, :20].reshape(-1, 3), draws[:2, 20:].reshape(-1, 3)])
    expected = together.T.cov() if dense else together.var(0)
    assert int(count) == len(together) == 100
    torch.testing.assert_close(variance[0, 0], expected, rtol=1e-6, atol=1e-6)


def two_places(nats):
    """z is near −20, or near 20 where the density is lower by so many nats."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(-30.0, 30.0))  # one start in six is on the wrong side
            near, far = -(z + 20).square() / 2, -(z - 20).square() / 2 - nats
            pyro.factor("place", torch.logaddexp(near, far))
            pyro.sample("x", dist.Normal(torch.zeros(size), 1.0))

    return program


@pytest.mark.parametrize("slack", [None, torch.inf], ids=["as it is", "without the move"])
def test_chains_leave_places_without_mass(monkeypatch, one_look, slack):
    if slack is not None:
        monkeypatch.setattr(adaptation, "_SLACK", slack)
    tree = reference(two_places(200.0), {"x": torch.zeros(12)})
    found, mean = tree["convergence"], tree["posterior"]["z"].mean(("chain", "draw")).values
    assert bool(found["is_reference"].all()) == (slack is None), found["reason"].values
    if slack is None:
        assert found["moved"].values.max() in (1, 2)
        exact, sd = (-20 * 900 - 30) / 901, (900 / 901) ** 0.5
        assert (abs(mean - exact) < limit(12) * sd / found["ess_bulk"].values ** 0.5).all()


def test_chains_stay_where_another_mode_has_mass(one_look):
    found = reference(two_places(2.0), {"x": torch.zeros(12)})["convergence"]
    assert (found["moved"] == 0).all()
    assert not found["is_reference"].all()


def test_a_chain_is_astray_far_below_the_median_of_the_others():
    state = adaptation.start(torch.zeros(8, 3, dtype=torch.float64), 1, 1, 0, False)
    state.draws[:] = 30.0
    state.density[:, 0] = 30 * torch.tensor([0.0, -49.0, -51.0, 1000.0, 0.0, -51.0, -300.0, 0.0]).double()
    state.draws[4], state.draws[7] = 5.0, 0.0  # of these nothing is known
    lane = torch.arange(8)
    chains = torch.arange(4) + lane[:, None] // 4 * 4
    astray, other = adaptation.stray(state, lane, chains, torch.zeros(8, dtype=torch.int64))
    assert astray.tolist() == [False, False, True, False] + 4 * [False]
    assert int(other[2]) == 0
    adaptation.forget(state, torch.tensor([2]), torch.tensor([0]))
    assert state.draws[:4, 0].tolist() == [30.0, 30.0, 0.0, 30.0]
    assert float(state.density[2, 0]) == 0.0


@pytest.mark.slow
def test_a_dense_metric_shortens_the_trajectories_of_correlated_latents(one_look):
    def program(size):
        near = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), near))
            pyro.sample("x", dist.Normal(z.sum(-1), 100.0))

    observed = {"x": torch.zeros(2)}
    plain, dense = (reference(program, observed, dense=dense, compile=False) for dense in (False, True))
    lengths = [float(tree["sample_stats"]["n_steps"].mean()) for tree in (plain, dense)]
    assert lengths[1] < 0.5 * lengths[0], lengths
    z = dense["posterior"]["z"].values.reshape(-1, 2, 2)
    assert bool(dense["convergence"]["is_reference"].all())
    np.testing.assert_allclose([np.corrcoef(z[:, i].T)[0, 1] for i in range(2)], 0.99, atol=0.005)


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_counter_based_numbers_are_uniform_and_independent():
    keys = counter.fold(counter.mix(torch.tensor([5])), torch.arange(200))
    numbers = counter.to_uniform(counter.stream(keys[:, None], torch.arange(500)))
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    largest = limit(1)
    centred = (numbers - 0.5) * 12**0.5
    for product in (centred, centred**2 - 1, centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(product.mean()) / float(product.std()) * product.numel() ** 0.5) < largest
    assert len(torch.unique(numbers)) == numbers.numel()
    noise = counter.normal(keys, 500)
    assert abs(float((noise**4).mean()) - 3) < largest * (96 / noise.numel()) ** 0.5


# -- the gate and its repair -------------------------------------------------------------------------------------------


def two_modes(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.3))


class OneMode(pyro.nn.PyroModule):
    """A guide that knows the positive mode alone, and knows it well."""

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 0.3))


def test_a_missing_mode_fails_the_gate_or_the_comparison():
    observed = {"x": torch.tensor([4.0, 5.0])}
    guide = OneMode()
    tree = reference(two_modes, observed, init=guide)
    amortized = cal.inference.posterior(two_modes, guide, observed, draws=1000)
    if bool(tree["convergence"]["is_reference"].any()):
        result = cal.evaluation.compare(amortized, tree)
        assert (np.abs(result["mean_error"]) > 5 * result["mean_error_se"]).all()
    else:
        assert all("R-hat" in str(reason) for reason in tree["convergence"]["reason"].values)


def test_failures_are_treated_by_their_cause():
    first, none, few, many = repair.Treatment(), 0.0, 0.001, 0.05
    assert first.after(1, none, 1.2) == repair.Treatment(longer=2)
    for lacking in (3.0, np.nan):
        assert first.after(1, none, lacking) == repair.Treatment(longer=4)
    assert first.after(1, few, 1.2) == repair.Treatment(target_accept=0.95)
    assert first.after(1, many, 1.2) == repair.Treatment(target_accept=0.95, other_powers=True)
    assert first.after(1, many, 1.2).after(2, few, 1.2) == repair.Treatment(target_accept=0.99, dense=True)
    assert first.after(1, none, 1.2).after(2, none, 1.2) == repair.Treatment(longer=4, dense=True)
    assert first.after(1, many, 3.0).after(2, none, 3.0) == repair.Treatment(longer=4, target_accept=0.95, dense=True)
    assert repair.Treatment(longer=4, dense=True).text == "4 times longer, dense metric"


def test_longer_chains_are_thinned_and_judged_at_full_length(counts, monkeypatch):
    """With a gate that 4 × 500 draws can't pass."""
    monkeypatch.setattr(gate, "ESS_LIMIT", 1500)
    tree = reference(elementwise, COUNTS)
    convergence = tree["convergence"].dataset
    assert bool(convergence["is_reference"].all()), convergence["reason"].values
    assert (convergence["look"] == 2).all()
    assert (convergence["treatment"] == "4 times longer").all()
    assert (convergence["ess_bulk"] > counts["convergence"]["ess_bulk"]).all()
    assert tree["posterior"].sizes["draw"] == 500 == tree["sample_stats"].sizes["draw"]
    truth = dist.Gamma(2.0 + COUNTS["x"], torch.tensor(2.0))
    error = tree["posterior"]["rate"].mean(("chain", "draw")).values - truth.mean.numpy()
    assert (np.abs(error) < 5 * truth.stddev.numpy() / 1500**0.5).all()


def test_what_still_fails_keeps_its_reason(monkeypatch):
    monkeypatch.setattr(gate, "ESS_LIMIT", 1e9)
    monkeypatch.setattr(repair, "_LONGER", 1)
    tree = reference(elementwise, {"x": torch.tensor([3.0])})
    assert not bool(tree["convergence"]["is_reference"].any())
    assert "ESS" in str(tree["convergence"]["reason"].values[0])
    assert int(tree["convergence"]["look"].values[0]) == 3


def test_an_interrupt_returns_what_is_complete(monkeypatch):
    monkeypatch.setattr(lanes, "_LANES", {"cpu": 8})

    def stop(stage, done, total, text=""):
        if done >= 2:
            raise KeyboardInterrupt

    tree = reference(elementwise, COUNTS, progress=stop)
    labels = tree["posterior"]["data"].values
    assert 2 <= len(labels) < 6
    assert np.isfinite(tree["posterior"]["rate"]).all()
    np.testing.assert_array_equal(tree["observed_data"]["x"], COUNTS["x"].numpy()[labels])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_infinite_discrete_latents_are_refused_by_name():
    def program(size):
        with pyro.plate("data", size):
            n = pyro.sample("n", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(n, 1.0))

    with pytest.raises(InferenceError, match=r"'n'.*finite"):
        reference(program, {"x": torch.zeros(2)})


def test_shared_discrete_latents_are_refused_by_name():
    def program(size):
        which = pyro.sample("which", dist.Bernoulli(0.5))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(which, 1.0))

    with pytest.raises(InferenceError, match=r"'which'.*shared"):
        reference(program, {"x": torch.zeros(2)})


def test_too_many_combinations_are_refused():
    def program(size):
        with pyro.plate("data", size):
            on = pyro.sample("on", dist.Bernoulli(0.5).expand([12]).to_event(1))
            pyro.sample("x", dist.Normal(on.sum(-1), 1.0))

    with pytest.raises(InferenceError, match=r"'on'.*2\^12"):
        reference(program, {"x": torch.zeros(2)})
