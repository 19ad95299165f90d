"""Posterior trees against closed forms: hand-written guides, shared latents, groups, the ELBO, and Pyro's NUTS."""

import importlib
import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from arviz_stats.base import array_stats
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import Normal, constraints

import calibrant as cal
from calibrant.errors import DataError, InferenceError, ProgramError
from calibrant.inference import posterior, reference
from calibrant.inference.objectives import analytic_kl, elbo_terms, guide_trace, path_derivative
from calibrant.inference.pyro_nuts import sample_pyro_nuts
from calibrant.program import LogDensity, as_program, sample_prior, seeded
from calibrant.progress import silent

X = {"x": torch.tensor([0.3, -1.2, 0.8, 2.5])}
NOISE = 0.01


def hierarchical(size):
    centre = pyro.sample("centre", dist.Normal(3.0, 0.5))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(centre, 1.0))
        pyro.deterministic("double", 2 * z)
        pyro.sample("x", dist.Normal(z, 0.5))
    pyro.deterministic("square", centre.square())


def aligned_guide(observed, size):
    """z is the shared draw with a little noise, so that draws of the two that do not belong together are seen."""
    centre = pyro.sample("centre", dist.Normal(1.0, 2.0))
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(centre + observed["x"], NOISE))


def vector(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("mean", z.mean(-1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5))
    pyro.deterministic("noise", torch.tensor(0.5))


def vector_guide(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"][:, None].expand(-1, 2) / 3, 0.6).to_event(1))


# -- draws and their densities -----------------------------------------------------------------------------------------


def misalignment(tree: xr.DataTree) -> float:
    """The largest distance of z from what its own shared draw makes of it, in standard deviations of the noise."""
    group = tree["posterior"].dataset
    wanted = group["centre"] + xr.DataArray(X["x"].numpy(), dims="data")
    return float(abs(group["z"] - wanted).max()) / NOISE


def test_shared_and_local_draws_belong_together():
    tree = posterior(hierarchical, aligned_guide, X, draws=50, seed=3)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data")
    assert tree["posterior"]["centre"].dims == ("chain", "draw")
    assert float(tree["posterior"]["centre"].std()) > 1
    assert misalignment(tree) < limit(200)
    tree["posterior"]["centre"] = tree["posterior"]["centre"].roll(draw=1)
    assert misalignment(tree) > limit(200)


def test_densities_are_those_of_the_draws():
    """Draws are stored in float32, densities of the float64 draws: hence the tolerance for q, whose scale is 0.01."""
    tree = posterior(hierarchical, aligned_guide, X, draws=20)
    stats = tree["sample_stats"].dataset
    assert stats["log_p"].dims == stats["log_q"].dims == ("chain", "draw", "data")
    assert stats["log_p_shared"].dims == stats["log_q_shared"].dims == ("chain", "draw")
    assert stats["log_p"].dtype == np.float64
    centre, z, x = (
        torch.tensor(tree["posterior"][name].values[0]).double() if name != "x" else X["x"].double()
        for name in ("centre", "z", "x")
    )
    wanted = {
        "log_p": Normal(centre[:, None], 1.0).log_prob(z) + Normal(z, 0.5).log_prob(x),
        "log_q": Normal(centre[:, None] + x, NOISE).log_prob(z),
        "log_p_shared": Normal(3.0, 0.5).log_prob(centre),
        "log_q_shared": Normal(1.0, 2.0).log_prob(centre),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(torch.tensor(stats[name].values[0]), value, rtol=1e-5, atol=5e-4)


def test_deterministic_sites_follow_their_draws():
    group = posterior(hierarchical, aligned_guide, X, draws=20)["posterior"].dataset
    assert json.loads(group.attrs["latents"]) == ["centre", "z"]
    assert group["double"].dims == ("chain", "draw", "data")
    assert group["square"].dims == ("chain", "draw")
    np.testing.assert_allclose(group["double"], 2 * group["z"], rtol=1e-5)
    np.testing.assert_allclose(group["square"], group["centre"] ** 2, rtol=1e-5)


def test_local_draws_are_those_of_each_datum():
    tree = posterior(vector, vector_guide, X, draws=4000)
    group, stats = tree["posterior"].dataset, tree["sample_stats"].dataset
    assert dict(group["z"].sizes) == {"chain": 1, "draw": 4000, "data": 4, "z_dim_0": 2}
    assert set(stats.data_vars) == {"log_p", "log_q"}
    z = torch.tensor(group["z"].values[0]).double()
    x = X["x"].double()
    log_p = Normal(0.0, 1.0).log_prob(z).sum(-1) + Normal(z.sum(-1), 0.5).log_prob(x)
    log_q = Normal(x[:, None] / 3, 0.6).log_prob(z).sum(-1)
    torch.testing.assert_close(torch.tensor(stats["log_p"].values[0]), log_p, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.tensor(stats["log_q"].values[0]), log_q, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(group["mean"], group["z"].mean("z_dim_0"), atol=1e-6)
    assert group["noise"].dims == ("chain", "draw")
    assert float(group["noise"].min()) == float(group["noise"].max()) == 0.5
    # Eight means and eight variances: a shift of 0.10 sd, or a variance 15% off, is seen with 95% power.
    error = (z.mean(0) - x[:, None] / 3).abs() / 0.6 * math.sqrt(4000)
    ratio = (z.var(0) / 0.36 - 1).abs() * math.sqrt(4000 / 2)
    assert float(error.max()) < limit(16)
    assert float(ratio.max()) < limit(16)
    draws = z.reshape(4000, -1)
    assert abs(torch.corrcoef(draws.T) - torch.eye(8)).max() < limit(28) / math.sqrt(4000)


def test_blocks_of_data_join_in_order(monkeypatch):
    module = __import__("calibrant.inference.posterior", fromlist=["posterior"])
    monkeypatch.setattr(module, "_ROWS", 20)  # two data a block
    data = cal.data.Data(X, coords={"data": ["a", "b", "c", "d"]})
    seen = []
    tree = posterior(vector, vector_guide, data, draws=10, progress=lambda *step: seen.append(step[1:3]))
    assert seen == [(2, 4), (4, 4)]
    assert tree["posterior"]["data"].values.tolist() == ["a", "b", "c", "d"]
    z = tree["posterior"]["z"]
    assert float(abs(z.mean(("chain", "draw", "z_dim_0")) - X["x"].numpy() / 3).max()) < 0.6 * 5 / math.sqrt(20)
    assert len(np.unique(z.values)) == z.size


def test_seed_decides_the_draws():
    first, again, other = (
        posterior(vector, vector_guide, X, draws=3, seed=seed)["posterior"].dataset for seed in (1, 1, 2)
    )
    assert first.identical(again)
    assert not first["z"].equals(other["z"])


def test_integer_covariates_stay_integers():
    def model(size, label):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[label], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5))

    def guide(observed, size, label):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(torch.tensor([-5.0, 5.0])[label], 0.1))

    label = torch.tensor([0, 1, 1, 0])
    tree = posterior(model, guide, X, draws=5, covariates={"label": label}, groups=["prior", "log_likelihood"])
    assert torch.equal(torch.tensor(tree["posterior"]["z"].values[0] > 0), (label > 0).expand(5, 4))
    assert tree["constant_data"]["label"].values.tolist() == label.tolist()


def test_discrete_latents_of_a_guide():
    def model(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("k", dist.Categorical(logits=torch.stack([-observed["x"], observed["x"]], -1)))

    tree = posterior(model, guide, X, draws=100, groups=["log_likelihood", "posterior_predictive"])
    stats, k = tree["sample_stats"].dataset, tree["posterior"]["k"].values
    assert set(np.unique(k)) == {0.0, 1.0}
    # This guide is the exact posterior, so that log p − log q is the log evidence at every draw.
    evidence = (Normal(-1.0, 1.0).log_prob(X["x"]).exp() / 2 + Normal(1.0, 1.0).log_prob(X["x"]).exp() / 2).log()
    np.testing.assert_allclose((stats["log_p"] - stats["log_q"]).values[0], evidence.expand(100, 4), atol=1e-5)
    mean = Normal(torch.tensor(2 * k - 1), 1.0).log_prob(X["x"])
    np.testing.assert_allclose(tree["log_likelihood"]["x"], mean, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_either_dtype_take_float32_data(dtype):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(2, 1)

        def forward(self, size, dose):
            with pyro.plate("data", size):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z * dose[:, None]).squeeze(-1), 1.0))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 4)

        def forward(self, observed, size, dose):
            loc, raw = self.encoder(torch.stack([observed["x"], dose], -1)).chunk(2, -1)
            with pyro.plate("data", size):
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    model, guide, data = Model().to(dtype), Guide().to(dtype), {**X, "dose": torch.arange(4.0)}
    before = [weight.clone() for weight in (*model.parameters(), *guide.parameters())]
    tree = posterior(model, guide, data, draws=3, groups=["prior", "posterior_predictive", "log_likelihood"])
    assert np.isfinite(tree["sample_stats"]["log_p"]).all()
    after = [*model.parameters(), *guide.parameters()]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
    fit = cal.inference.fit(model, guide, data, validation=0.25, epochs=1, batch_size=2)
    assert math.isfinite(fit.elbo)


def add_noise(batch):
    return {**batch, "x": batch["x"] + torch.randn(batch["x"].shape)}


def centre(batch):
    return {**batch, "x": batch["x"] - batch["x"].mean()}


@pytest.mark.parametrize("transform", [add_noise, centre])
@pytest.mark.parametrize(
    "call", [lambda d: posterior(vector, vector_guide, d, draws=2), lambda d: reference(vector, d)]
)
def test_data_that_change_between_looks_are_refused(transform, call):
    """Posterior and reference read the data on their own, in batches of their own: they would be of other data."""
    with pytest.raises(DataError, match=r"transform.*'x'.*posterior is of fixed data"):
        call(cal.data.Data(X, transform=transform))
    scaled = cal.data.Data(X, transform=lambda batch: {"x": batch["x"] / 2})
    tree = posterior(vector, vector_guide, scaled, draws=2)
    np.testing.assert_array_equal(tree["observed_data"]["x"], X["x"] / 2)


# -- groups ------------------------------------------------------------------------------------------------------------


def test_groups_of_a_program_with_shared_latents():
    groups = ["prior", "prior_predictive", "posterior_predictive", "log_likelihood"]
    tree = posterior(hierarchical, aligned_guide, X, draws=200, groups=groups)
    assert {*groups, "posterior", "sample_stats", "observed_data", "constant_data"} == set(tree.children)
    prior = tree["prior"].dataset
    assert set(prior.data_vars) == {"centre", "z", "double", "square"}
    assert prior["double"].dims == prior["z"].dims == ("chain", "draw", "data")
    assert prior["centre"].dims == prior["square"].dims == ("chain", "draw")
    np.testing.assert_allclose(prior["double"], 2 * prior["z"], rtol=1e-6)
    # Moments of 200 draws: centre, z − centre, x − z of the prior; x − z of the posterior (4 × 200).
    replicated = tree["posterior_predictive"]["x"] - tree["posterior"]["z"]
    checks = [
        (prior["centre"] - 3, 0.5, 200),
        (prior["z"] - prior["centre"], 1.0, 800),
        (tree["prior_predictive"]["x"] - prior["z"], 0.5, 800),
        (replicated, 0.5, 800),
    ]
    for value, sd, count in checks:  # a mean off by 0.47 sd, or a variance by 66%, is seen with 95% power
        assert abs(float(value.mean())) / sd * math.sqrt(count) < limit(8)
        assert abs(float(value.var()) / sd**2 - 1) * math.sqrt(count / 2) < limit(8)
    z = torch.tensor(tree["posterior"]["z"].values)
    np.testing.assert_allclose(tree["log_likelihood"]["x"], Normal(z, 0.5).log_prob(X["x"]), rtol=1e-4, atol=1e-4)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")


def test_log_likelihood_is_summed_over_the_event():
    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None, None], 1.0).expand([size, 2, 3]).to_event(2))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"].mean((-1, -2)), 0.3))

    x = torch.randn(5, 2, 3)
    tree = posterior(model, guide, {"x": x}, draws=4, groups=["log_likelihood", "posterior_predictive"])
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "x_dim_0", "x_dim_1")
    z = torch.tensor(tree["posterior"]["z"].values)[..., None, None]
    np.testing.assert_allclose(tree["log_likelihood"]["x"], Normal(z, 1.0).log_prob(x).sum((-1, -2)), rtol=1e-5)


def test_unknown_group_and_too_much_memory_are_refused():
    with pytest.raises(InferenceError, match=r"unknown groups \['loglik'\]"):
        posterior(vector, vector_guide, X, draws=2, groups=["loglik"])
    with pytest.raises(InferenceError, match="reduce draws"):
        posterior(vector, vector_guide, X, draws=10**9)


def test_dimensions_and_coordinates_that_the_model_names():
    class Named(PyroModule):
        dims = {"z": ["feature"]}
        coords = {"feature": ["left", "right"]}

        def forward(self, size):
            vector(size)

    tree = posterior(Named(), vector_guide, X, draws=2, groups=["prior"])
    for group in ("posterior", "prior"):
        assert tree[group]["z"].dims == ("chain", "draw", "data", "feature")
        assert tree[group]["feature"].values.tolist() == ["left", "right"]


# -- the ELBO ----------------------------------------------------------------------------------------------------------


class Guide(PyroModule):
    """A Normal guide of one latent, with free location and scale, linear in the observation."""

    def __init__(self, slope: float = 0.5, sd: float = 0.7) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.sd = PyroParam(torch.tensor(sd), constraints.positive)

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(self.slope * observed["x"], self.sd))


def conjugate(size):
    """Posterior Normal(0.8 x, √0.2), evidence Normal(0, √1.25)."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


@pytest.mark.parametrize("objective", [path_derivative, elbo_terms])
def test_elbo_of_the_exact_posterior_is_the_evidence_at_every_draw(objective):
    terms = objective(as_program(conjugate), Guide(0.8, math.sqrt(0.2)), X, 4, {})
    torch.testing.assert_close(
        terms.local.detach(), Normal(0.0, math.sqrt(1.25)).log_prob(X["x"]), rtol=1e-5, atol=1e-5
    )
    assert float(terms.shared) == 0


def gradient(objective, guide: PyroModule, model=conjugate) -> Tensor:
    guide.zero_grad()
    (-objective(as_program(model), guide, X, 4, {}).per_datum(4)).backward()
    return torch.stack([weight.grad for weight in guide.parameters()])


def test_path_derivative_has_no_noise_at_the_optimum_and_the_same_mean_elsewhere():
    optimum = Guide(0.8, math.sqrt(0.2))
    assert gradient(path_derivative, optimum).abs().max() < 1e-5
    assert gradient(analytic_kl, optimum).abs().max() > 1e-3
    away = Guide(0.3, 0.9)
    paths, kls = (torch.stack([gradient(o, away) for _ in range(200)]) for o in (path_derivative, analytic_kl))
    error = (paths.mean(0) - kls.mean(0)) / ((paths.var(0) + kls.var(0)) / 200).sqrt()
    assert error.abs().max() < limit(2)


class Stretch(dist.TransformModule):
    """A flow in small: z = sd·u, with a weight of its own."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, sd: float) -> None:
        super().__init__(cache_size=0)
        self.log_sd = nn.Parameter(torch.tensor(math.log(sd)))

    def _call(self, u: Tensor) -> Tensor:
        return u * self.log_sd.exp()

    def _inverse(self, z: Tensor) -> Tensor:
        return z / self.log_sd.exp()

    def log_abs_det_jacobian(self, u: Tensor, z: Tensor) -> Tensor:
        return self.log_sd.expand(u.shape)


class FlowGuide(PyroModule):
    """The same guide as a distribution that looks its weight up whenever it is scored."""

    def __init__(self, slope: float = 0.5, sd: float = 0.7) -> None:
        super().__init__()
        self.slope, self.stretch = nn.Parameter(torch.tensor(slope / sd)), Stretch(sd)

    def forward(self, observed, size):
        with pyro.plate("data", size):
            base = dist.Normal(self.slope * observed["x"], 1.0)
            pyro.sample("z", dist.TransformedDistribution(base, [self.stretch]))


def test_flows_are_scored_with_the_weights_of_the_run():
    """A distribution that holds a module must not be scored after the weights of a functional call are gone."""
    assert gradient(path_derivative, FlowGuide(0.8, math.sqrt(0.2))).abs().max() < 1e-5
    stats = posterior(conjugate, FlowGuide(0.8, math.sqrt(0.2)), X, draws=5)["sample_stats"].dataset
    evidence = Normal(0.0, math.sqrt(1.25)).log_prob(X["x"])
    np.testing.assert_allclose((stats["log_p"] - stats["log_q"]).values[0], evidence.expand(5, 4), atol=1e-6)


def test_objectives_agree_on_the_elbo():
    guide = Guide(0.3, 0.9)
    x = X["x"]
    loc, sd = 0.3 * x, 0.9
    prior = -0.5 * (loc**2 + sd**2 - 1) + math.log(sd)  # −KL(q, prior)
    exact = float((prior + Normal(loc, 0.5).log_prob(x) - 0.5 * sd**2 / 0.25).mean())
    for objective in (path_derivative, analytic_kl, elbo_terms):
        with torch.no_grad():
            draws = torch.stack([objective(as_program(conjugate), guide, X, 4, {}).per_datum(4) for _ in range(200)])
        assert abs(float(draws.mean()) - exact) < limit(3) * float(draws.std()) / math.sqrt(200)


def test_minibatches_add_up_to_the_whole():
    """The mean over minibatches of the ELBO per datum is that of all data: local terms count N/B-fold, shared once."""

    class Point(PyroModule):
        def forward(self, observed, size):
            pyro.sample("centre", dist.Delta(torch.tensor(2.0)))
            with pyro.plate("data", size):
                pyro.sample("z", dist.Delta(observed["x"]))

    def elbo(x):
        return float(path_derivative(as_program(hierarchical), Point(), {"x": x}, len(x), {}).per_datum(4))

    whole = elbo(X["x"])
    assert math.isclose(whole, (elbo(X["x"][:2]) + elbo(X["x"][2:])) / 2, rel_tol=1e-6)
    assert math.isclose(whole, sum(elbo(x[None]) for x in X["x"]) / 4, rel_tol=1e-6)


@pytest.mark.parametrize(
    "handler", [poutine.mask(mask=torch.tensor([True, False, True, True])), poutine.scale(scale=0.5)]
)
def test_closed_form_kl_refuses_masks_and_scales(handler):
    def model(size):
        with handler:
            conjugate(size)

    with pytest.raises(ProgramError, match=r"'z' is masked or scaled.*stl"):
        analytic_kl(as_program(model), Guide(), X, 4, {})
    assert path_derivative(as_program(model), Guide(), X, 4, {}).local.isfinite().all()


def test_closed_form_kl_refuses_another_order_and_unknown_pairs():
    def model(size):
        with pyro.plate("data", size):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.StudentT(4.0, a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0))

    def guide(order):
        def run(observed, size):
            with pyro.plate("data", size):
                for name in order:
                    pyro.sample(name, dist.Normal(observed["x"], 1.0))

        return as_program(run)

    with pytest.raises(ProgramError, match="model's order"):
        analytic_kl(as_program(model), guide("ba"), X, 4, {})
    with pytest.raises(ProgramError, match=r"'b': no closed form.*stl"):
        analytic_kl(as_program(model), guide("ab"), X, 4, {})


@pytest.mark.parametrize("objective", ["kl", "iwae", "dreg"])
def test_draws_without_gradient_are_refused_in_training(objective):
    """A score-function gradient is not what these objectives compute: q would never be trained."""

    def model(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0))

    class Discrete(PyroModule):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(()))

        def forward(self, observed, size):
            with pyro.plate("data", size):
                pyro.sample("k", dist.Bernoulli(logits=self.logits))

    with pytest.raises(ProgramError, match=r"\['k'\] carry no gradient"):
        cal.inference.fit(model, Discrete(), X, validation=0.25, epochs=1, objective=objective)
    assert "k" in posterior(model, Discrete(), X, draws=2)["posterior"]


def test_grey_values_are_refused_wherever_they_are():
    """Training runs without Pyro's validation, and Bernoulli gives grey values a density that means nothing."""

    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z))

    for row in (0, 57, 99):
        x = torch.zeros(100)
        x[row] = 0.5
        data = cal.data.Data({"x": x}, coords={"data": np.arange(1000, 1100)})
        with pytest.raises(DataError, match=f"'x'.*Bernoulli.*datum {row if row < 16 else 1000 + row}"):
            cal.inference.fit(model, Guide(), data, epochs=1, batch_size=10)
        for call in (lambda d: posterior(model, Guide(), d, draws=2), lambda d: reference(model, d)):
            with pytest.raises(DataError, match=f"'x'.*Bernoulli.*datum {row}"):
                call({"x": x})


def test_guide_trace_and_seed():
    with seeded(1):
        first = guide_trace(Guide(), X, 4, {}).nodes["z"]["value"]
    with seeded(1):
        assert torch.equal(first, guide_trace(Guide(), X, 4, {}).nodes["z"]["value"])


# -- Pyro's NUTS -------------------------------------------------------------------------------------------------------


def scores(draws: np.ndarray, mean: np.ndarray, sd: np.ndarray, least: int = 400) -> np.ndarray:
    """Errors of means and sds in Monte Carlo standard errors, `(2, latent)`, after a gate on the effective sample size.

    Args:
        draws: (chain, draw, latent).
        mean: exact posterior means.
        sd: exact posterior standard deviations.
        least: the smallest effective sample size that the gate accepts.
    """
    axes = {"chain_axis": 0, "draw_axis": 1}
    assert array_stats.ess(draws, **axes, method="bulk").min() > least
    errors = draws.mean((0, 1)) - mean, draws.std((0, 1)) - sd
    return np.stack(
        [e / array_stats.mcse(draws, **axes, method=m) for e, m in zip(errors, ("mean", "sd"), strict=True)]
    )


def exact_hierarchical(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of (centre, z…): a Gaussian with this precision."""
    size = len(x)
    precision = np.zeros((size + 1, size + 1))
    precision[0, 0] = 1 / 0.25 + size
    precision[0, 1:] = precision[1:, 0] = -1.0
    precision[1:, 1:] = np.diag(np.full(size, 1.0 + 4.0))
    covariance = np.linalg.inv(precision)
    return covariance @ np.concatenate([[3.0 / 0.25], 4 * x]), np.sqrt(np.diag(covariance))


def run_hierarchical() -> xr.DataTree:
    return reference(hierarchical, {"x": X["x"][:2]}, "pyro-nuts", warmup=200, draws=500)


def hierarchical_scores(tree: xr.DataTree) -> np.ndarray:
    group = tree["posterior"].dataset
    draws = np.concatenate([group["centre"].values[..., None], group["z"].values], -1)
    return scores(draws, *exact_hierarchical(X["x"][:2].numpy()))


@pytest.mark.slow
def test_nuts_with_a_shared_latent():
    """Six statistics of a Gaussian posterior: a mean off by 0.25 sd is seen with 95% power at ESS 600."""
    tree = run_hierarchical()
    assert np.abs(hierarchical_scores(tree)).max() < limit(6)
    group, stats = tree["posterior"].dataset, tree["sample_stats"].dataset
    assert group["centre"].dims == group["square"].dims == ("chain", "draw")
    np.testing.assert_allclose(group["square"], group["centre"] ** 2, rtol=1e-5)
    np.testing.assert_allclose(group["double"], 2 * group["z"], rtol=1e-5)
    assert group.attrs["independent_draws"] == 0
    # The correlation of shared and local latents shows that their draws belong together.
    covariance = np.cov(group["centre"].values.ravel(), group["z"].values[..., 0].ravel())
    assert covariance[0, 1] > 0.5 * np.linalg.inv(np.array([[6.0, -1, -1], [-1, 5, 0], [-1, 0, 5]]))[0, 1]
    assert_statistics_are_sane(stats, dimension=3)
    assert bool(tree["convergence"]["is_reference"].all())


def assert_statistics_are_sane(stats: xr.Dataset, dimension: int) -> None:
    assert set(stats.data_vars) == {
        "lp",
        "energy",
        "acceptance_rate",
        "step_size",
        "tree_depth",
        "n_steps",
        "diverging",
    }
    assert all(stats[name].dims == ("chain", "draw", "data") for name in stats.data_vars)
    # H = −lp + kinetic energy at the start of the transition, and the kinetic energy is χ²(dimension) / 2.
    kinetic = stats["energy"].values[:, 1:] + stats["lp"].values[:, :-1]
    assert kinetic.min() >= 0
    error = (kinetic.mean() - dimension / 2) / math.sqrt(dimension / 2 / kinetic[..., 0].size)
    assert abs(error) < limit(1)
    steps, depth = stats["n_steps"].values, stats["tree_depth"].values
    assert steps.min() >= 1
    np.testing.assert_array_equal(depth, np.ceil(np.log2(steps + 1)))
    assert depth.max() <= 10
    assert ((stats["acceptance_rate"] > 0) & (stats["acceptance_rate"] <= 1)).all()
    assert 0.6 < float(stats["acceptance_rate"].mean()) < 0.99
    assert np.ptp(stats["step_size"].values, 1).max() == 0  # adaptation has ended
    assert int(stats["diverging"].sum()) == 0


@pytest.mark.slow
def test_a_lost_prior_is_seen(monkeypatch):
    """Without the shared terms the posterior of `centre` is improper or far off: the same statistics must show it."""
    shared = LogDensity.shared
    monkeypatch.setattr(LogDensity, "shared", property(lambda self: shared.fget(self) * 0.7))
    assert np.abs(hierarchical_scores(run_hierarchical())).max() > limit(6)


def improper(size):
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("x", dist.Exponential(rate[:, None].expand(-1, 3)).to_event(1))


WAITS = {"x": torch.tensor([[4.0, 2.0, 3.0]])}


def improper_scores(tree: xr.DataTree, least: int = 400) -> np.ndarray:
    """Flat prior, three waiting times: the posterior is Gamma(4, Σx)."""
    total = WAITS["x"].sum(-1).double().numpy()
    return scores(tree["posterior"]["rate"].values, 4 / total, 2 / total, least)


def run_improper() -> xr.DataTree:
    return reference(improper, WAITS, "pyro-nuts", warmup=100, draws=500)


def test_nuts_with_an_improper_prior(monkeypatch):
    """Fewer draws than could pass the gate, whose density is known: lp does without statistics."""
    monkeypatch.setattr(importlib.import_module("calibrant.inference.reference"), "require_passable", lambda *_: None)
    tree = reference(improper, WAITS, "pyro-nuts", chains=2, warmup=60, draws=100)
    assert np.abs(improper_scores(tree, least=20)).max() < limit(2)
    assert not tree["convergence"]["is_reference"].any()
    stats = tree["sample_stats"].dataset
    assert_statistics_are_sane(stats, dimension=1)
    # lp is the log density on the unconstrained line, log rate: 3 log rate − rate Σx, + log rate of the Jacobian.
    rate = tree["posterior"]["rate"].values.astype(float)
    wanted = 4 * np.log(rate) - rate * WAITS["x"].sum(-1).double().numpy()
    np.testing.assert_allclose(stats["lp"], wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ProgramError, match="improper"):
        sample_prior(improper, 2)


@pytest.mark.truth
def test_draws_with_an_improper_prior():
    """Two statistics of a Gamma posterior: a mean off by 0.25 sd is seen with 95% power at ESS 600."""
    tree = run_improper()
    assert np.abs(improper_scores(tree)).max() < limit(2)
    assert_statistics_are_sane(tree["sample_stats"].dataset, dimension=1)


@pytest.mark.truth
def test_a_lost_jacobian_is_seen(monkeypatch):
    transform = torch.distributions.transforms.ExpTransform
    monkeypatch.setattr(transform, "log_abs_det_jacobian", lambda self, x, y: 0 * x)
    assert np.abs(improper_scores(run_improper())).max() > limit(2)


def test_nuts_records_constants_once():
    def model(size):
        pyro.deterministic("sd", torch.tensor(0.5))
        conjugate(size)

    data = cal.data.Data({"x": X["x"][:2]})
    with torch.no_grad():  # gradients are the library's own affair
        result = sample_pyro_nuts(as_program(model), data, chains=2, warmup=5, draws=7, seed=0, progress=silent)
    assert result.local == ["z"]
    assert {name: tuple(value.shape) for name, value in result.draws.items()} == {"z": (2, 7, 2), "sd": (2, 7)}
    assert result.draws["sd"].unique().tolist() == [0.5]


def test_nuts_refuses_discrete_latents_and_densities_without_a_start():
    def discrete(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0))

    def impossible(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("never", torch.full_like(z, -torch.inf))
            pyro.sample("x", dist.Normal(z, 1.0))

    def angle(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.cos(), 1.0))

    with pytest.raises(InferenceError, match=r"\['k'\] are discrete"):
        reference(discrete, X, "pyro-nuts")
    with pytest.raises(InferenceError, match=r"\['z'\] are angles"):
        reference(angle, X, "pyro-nuts")
    with pytest.raises(InferenceError, match="no finite log density"):
        reference(impossible, X, "pyro-nuts")


@pytest.mark.slow
def test_nuts_of_a_support_that_follows_a_covariate():
    """Each datum has its own transform: a likelihood that says nothing leaves Uniform(0, top)."""

    def model(size, top):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0))

    top = torch.tensor([0.5, 20.0])
    data = {"x": torch.zeros(2)}
    tree = reference(model, data, "pyro-nuts", warmup=200, draws=500, covariates={"top": top})
    z = tree["posterior"]["z"].values
    assert z.min() > 0
    assert (z.max((0, 1)) < top.numpy()).all()
    assert np.abs(scores(z, top.numpy() / 2, top.numpy() / math.sqrt(12))).max() < limit(4)


@pytest.mark.slow
def test_divergences_are_counted():
    """Neal's funnel: no step size suits both its mouth and its neck."""

    def funnel(size):
        with pyro.plate("data", size):
            width = pyro.sample("width", dist.Normal(0.0, 3.0))
            z = pyro.sample("z", dist.Normal(0.0, (width / 2).exp()[:, None]).expand([size, 4]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1000.0))

    data = cal.data.Data({"x": torch.zeros(1)})
    result = sample_pyro_nuts(as_program(funnel), data, chains=2, warmup=100, draws=150, seed=0, progress=silent)
    assert int(result.stats["diverging"].sum()) > 0
    assert result.stats["diverging"].shape == (2, 150, 1)
