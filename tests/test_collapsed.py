"""Collapsed guides against dense algebra: the conditional is exact under any scale, and so are ELBO and gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import assert_agrees, known, limit
from gaussian_programs import SOLVED, Truth, hierarchical, hierarchical_scaled, simulate
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError
from calibrant.guides import CollapsedGuide, amortize, collapsed
from calibrant.guides.many_draws import encoded_once
from calibrant.inference import fit, log_evidence, posterior, reference
from calibrant.inference.fitting.objectives import path_derivative
from calibrant.inference.references.exact import solve
from calibrant.linear_gaussian.detection import detect
from calibrant.program import defaults, in_double, log_density
from calibrant.program.density import density_of
from calibrant.program.environment import cast
from calibrant.program.tracing import guide_trace, sampled

PROGRAMS = [
    "noise of each pixel",
    "multivariate",
    "two sites",
    "hierarchical",
    "random walk",
    "matrices",
    "scalars",
    "gamma scale of the output",
    "half-normal scale, offset",
    "scale, prior mean",
    "scale, hierarchical",
]
DEFECTS = ["ignores the scale", "noise 20% too large"]


def plant(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    read, sample = collapsed.read, collapsed._Conditional.sample
    if defect == "ignores the scale":
        blind = lambda self, x, scale, repeats: sample(self, x, None, repeats)  # noqa: E731
        monkeypatch.setattr(collapsed._Conditional, "sample", blind)
    else:
        wrong = lambda *args: (lambda found: replace(found, noise=1.2 * found.noise))(read(*args))  # noqa: E731
        monkeypatch.setattr(collapsed, "read", wrong)


def wide(latents: int = 9) -> tuple[Any, Truth]:
    """More latents than pixels."""
    loading = torch.randn(4, latents, generator=torch.Generator().manual_seed(0)).double()
    prior = dist.LogNormal(0.0, 1.0)

    def program(size: int) -> None:
        with pyro.plate("data", size):
            s = pyro.sample("s", prior)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([latents]).to_event(1))
            mean = s[:, None] * (z @ loading.T.to(torch.get_default_dtype()))
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1))

    return program, Truth(0.0, 0.0, loading @ loading.T, scale=prior)


# -- the conditional ---------------------------------------------------------------------------------------------------


def marginal_error(
    program: Any, truth: Truth, guide: CollapsedGuide, observed: dict[str, Tensor], draws: int = 1
) -> float:
    """How far log p(x, z, s) − log q(z | s, x) is from log p(x, s), at `draws` draws of the guide, in nats."""
    with torch.no_grad(), defaults(guide, observed, torch.float64) as place:
        rows = {name: value.repeat_interleave(draws, 0) for name, value in cast(observed, *place).items()}
        size = len(rows["x"])
        with encoded_once(guide, draws):
            run = guide_trace(in_double(guide), rows, size, {})
        values = {name: site["value"] for name, site in sampled(run).items()}
        log_q = density_of(run, size, values).without(guide.order)
        log_p = log_density(in_double(program), {**rows, **values}, size, observed=["x"])
    s = values.get("s", torch.ones(size).double())
    exact = torch.stack([truth.given(x.flatten(), s[i : i + 1])[0] for i, x in enumerate(rows["x"])])
    exact = exact + (0.0 if truth.scale is None else truth.scale.log_prob(s))
    return float((log_p.joint - log_q.joint - exact).abs().max())


@pytest.mark.parametrize("name", [*PROGRAMS, "more latents than pixels"])
def test_the_conditional_is_exact_under_any_scale(name):
    """Whatever the scale, log p(x, z, s) − log q(z | s, x) is log p(x, s), for every draw of z."""
    program, truth = SOLVED[name] if name in SOLVED else wide()
    observed = simulate(program, 50)
    guide = amortize(program, observed, structure="collapsed")
    assert marginal_error(program, truth, guide, observed) < 1e-5  # priors are written in float32
    few = {site: value[:10] for site, value in observed.items()}
    assert marginal_error(program, truth, guide, few, draws=5) < 1e-5


def test_the_conditional_stays_finite_under_the_scales_of_an_early_guide():
    """A scale of 1e25 has no square in float32."""
    _model, guide, observed = made("gsm")
    held = pyro.condition(guide, data={"scale": torch.full((20,), 1e25)})
    with torch.no_grad():
        run = guide_trace(held, observed, 20, {})
    density = density_of(run, 20, {name: site["value"] for name, site in sampled(run).items()})
    assert density.without(["scale"]).joint.isfinite().all()


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_of_the_conditional_are_seen(defect, monkeypatch):
    program, truth = SOLVED["scale, hierarchical"]
    observed = simulate(program, 50)
    guide = amortize(program, observed, structure="collapsed")
    plant(monkeypatch, defect)
    assert marginal_error(program, truth, guide, observed) > 0.1


def exact_moments(program: Any, observed: dict[str, Tensor]) -> dict[str, Any]:
    structure = detect(program, observed, {})
    assert structure is not None
    solution = solve(structure, observed["x"])
    return {name: known(solution.mean[name].numpy(), solution.sd[name].numpy()) for name in solution.structure.latents}


def test_draws_of_several_sites_are_those_of_the_exact_posterior():
    observed = simulate(hierarchical, 3)
    guide = amortize(hierarchical, observed, structure="collapsed")
    drawn = posterior(hierarchical, guide, observed, draws=4000)["posterior"].dataset
    drawn = {name: value.values.reshape(4, 1000, *value.shape[2:]) for name, value in drawn.data_vars.items()}
    assert_agrees(drawn, exact_moments(hierarchical, observed))


def draws_under_exact_scales(guide: CollapsedGuide, observed: dict[str, Tensor]) -> dict[str, Any]:
    """Draws (4, 1000, data, …) of the block, the scale held at exact draws of its posterior."""
    scales = reference(hierarchical_scaled, observed, chains=4, draws=1000)["posterior"]["s"].values
    size = len(observed["x"])
    held = torch.as_tensor(scales).reshape(-1)
    rows = {"x": observed["x"].repeat(len(held) // size, *[1] * (observed["x"].dim() - 1))}
    with torch.no_grad(), defaults(guide, rows, torch.float64) as place:
        conditioned = pyro.condition(in_double(guide), data={"s": held.double()})
        run = pyro.poutine.trace(conditioned).get_trace(cast(rows, *place), len(held))
    sites = {name: run.nodes[name]["value"] for name in guide.block}
    return {name: value.reshape(4, 1000, size, *value.shape[1:]).numpy() for name, value in sites.items()}


def test_draws_under_a_scale_are_those_of_the_exact_posterior(monkeypatch):
    observed = simulate(hierarchical_scaled, 3)
    guide = amortize(hierarchical_scaled, observed, structure="collapsed")
    truth = exact_moments(hierarchical_scaled, observed)
    assert_agrees(draws_under_exact_scales(guide, observed), truth)
    for defect in DEFECTS:
        with monkeypatch.context() as patch:
            plant(patch, defect)
            wrong = draws_under_exact_scales(guide, observed)
        with pytest.raises(AssertionError, match="beyond"):
            assert_agrees(wrong, truth)


# -- the ELBO ----------------------------------------------------------------------------------------------------------


def bound(model: Any, guide: Any, observed: dict[str, Tensor], draws: int) -> Tensor:
    """The ELBO of every datum, in nats."""
    stats = posterior(model, guide, observed, draws=draws)["sample_stats"]
    return torch.as_tensor((stats["log_p"] - stats["log_q"]).mean(("chain", "draw")).values)


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_without_a_scale_the_elbo_is_the_evidence_and_follows_the_model(noise):
    model = cal.models.create("ppca", shape=(2, 6), latents=4, noise=noise)
    observed = {"x": cal.program.sample_prior(model, 200, seed=1)["x"]}
    guide = amortize(model, observed, structure="collapsed")
    assert not list(guide.parameters())
    for _ in range(2):
        torch.testing.assert_close(bound(model, guide, observed, 2), log_evidence(model, observed), rtol=0, atol=1e-9)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.3 * torch.randn_like(weight))


@pytest.fixture(scope="module", params=["short", pytest.param("long", marks=pytest.mark.truth)])
def trained(request):
    """A scale mixture and its guide, trained together from the start, and data whose contrasts training has seen often,
    with the error of the ELBO that this training leaves.

    So short a training is tens of nats off at single data of the largest contrasts.
    """
    *sizes, error = (4000, 1000, 0.06) if request.param == "short" else (10_000, 4001, 0.03)
    torch.manual_seed(1)
    truth = cal.models.create("gsm", shape=(16,), latents=4)
    train, test = ({"x": cal.program.sample_prior(truth, n, seed=n)["x"]} for n in sizes)
    model = cal.models.create("gsm", shape=(16,), latents=4)
    guide = amortize(model, train, structure="collapsed")
    fit(model, guide, train, epochs=3, batch_size=128, lr=1e-2, validation=0.02)
    low, high = train["x"].norm(dim=1).quantile(torch.tensor([0.002, 0.998]))
    norm = test["x"].norm(dim=1)
    return model, guide, {"x": test["x"][(low < norm) & (norm < high)]}, error


def test_with_a_scale_the_trained_elbo_reaches_the_evidence(trained):
    """After few steps: within 0.06 nats a datum; under the mark truth, within 0.03."""
    model, guide, observed, error = trained
    gap = log_evidence(model, observed) - bound(model, guide, observed, 10)
    se = float(gap.std() / len(gap) ** 0.5)
    assert se < error / 10
    assert -limit(1) * se < float(gap.mean()) < error


@pytest.mark.slow
def test_with_a_scale_the_trained_guide_is_the_posterior(monkeypatch):
    """Within 0.01 nats a datum of the evidence, with the scale's mean and sd; a planted defect costs more.

    By the flow of the scale: p(s | x) of four latents is skewed, LogNormals alone leave 0.02 nats.
    """
    model = cal.models.create("gsm", shape=(16,), latents=4).requires_grad_(False)
    train, test = ({"x": cal.program.sample_prior(model, n, seed=n)["x"]} for n in (60_000, 4000))
    guide = amortize(model, train, structure="collapsed")
    fit(model, guide, train, epochs=20, batch_size=512, lr=3e-3, validation=0.02)
    gap = log_evidence(model, test) - bound(model, guide, test, 20)
    se = float(gap.std() / len(gap) ** 0.5)
    assert se < 0.001
    assert -limit(1) * se < float(gap.mean()) < 0.01
    few = {"x": test["x"][:200]}
    ours, exact = (
        tree["posterior"]["scale"].stack(all=("chain", "draw"))
        for tree in (posterior(model, guide, few, draws=4000), reference(model, few, chains=4, draws=1000))
    )
    # The Monte Carlo error of a mean is 0.02 sd in both, of an sd 1%.
    assert abs((ours.mean("all") - exact.mean("all")) / exact.std("all")).mean() < 0.1
    assert abs(ours.std("all") / exact.std("all") - 1).mean() < 0.05
    for defect in DEFECTS:
        with monkeypatch.context() as patch:
            plant(patch, defect)
            assert float((log_evidence(model, few) - bound(model, guide, few, 20)).mean()) > 0.05, defect


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_cost_the_trained_elbo_more(trained, defect, monkeypatch):
    model, guide, observed, _ = trained
    few = {"x": observed["x"][:1000]}
    right = bound(model, guide, few, 10).mean()
    plant(monkeypatch, defect)
    assert bound(model, guide, few, 10).mean() < right - 0.05


# -- gradients ---------------------------------------------------------------------------------------------------------


def log_marginal(model: Any, x: Tensor, s: Tensor) -> Tensor:
    """log p(x, s) of a linear EA-VAE, by dense algebra."""
    weight, noise = model.decoder.weight, model.likelihood.scale
    covariance = s[:, None, None] ** 2 * (weight @ weight.T) + noise**2 * torch.eye(x.shape[1])
    offset = model.decoder.bias
    return MultivariateNormal(offset, covariance).log_prob(x) + model.prior_of_scale().log_prob(s)


@pytest.fixture
def in_float64():
    """A linear EA-VAE and its guide in float64, with 8 data."""
    model = cal.models.create("ea-vae", shape=(6,), latents=3)
    observed = {"x": cal.program.sample_prior(model, 8, seed=1)["x"].double()}
    with torch.no_grad():
        model.decoder.bias.normal_()
    guide = amortize(model, observed, structure="collapsed", family={"scale": "lognormal"})
    torch.set_default_dtype(torch.float64)
    yield model.double(), guide.double(), observed
    torch.set_default_dtype(torch.float32)


def weight_gradients(model: Any, guide: Any, observed: dict[str, Tensor], s: Tensor) -> Tensor:
    """Gradients (50, weights) of the ELBO with respect to the model, under the scales s, each of 80 draws of z."""
    rows, values = [], {"x": observed["x"].repeat(80, 1), "scale": s.repeat(80)}
    held = pyro.condition(guide, data={"scale": values["scale"]})
    for _ in range(50):
        with torch.no_grad():
            z = guide_trace(held, values, len(values["x"]), {}).nodes["z"]["value"]
        joint = log_density(model, {**values, "z": z}, observed=["x"]).joint.sum() / 80
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(joint, list(model.parameters()))]))
    return torch.stack(rows)


def test_gradients_of_the_model_are_those_of_the_collapsed_bound(in_float64, monkeypatch):
    """Over 4,000 draws of z, in standard errors; and not those under another conditional."""
    model, guide, observed = in_float64
    s = torch.linspace(0.3, 3.0, 8)
    exact = torch.autograd.grad(log_marginal(model, observed["x"], s).sum(), list(model.parameters()))
    wanted = torch.cat([g.flatten() for g in exact])

    def worst() -> float:
        found = weight_gradients(model, guide, observed, s)
        return float(((found.mean(0) - wanted) / (found.std(0) / 50**0.5)).abs().max())

    assert worst() < limit(len(wanted))
    for defect in DEFECTS:
        with monkeypatch.context() as patch:
            plant(patch, defect)
            assert worst() > limit(len(wanted)), defect


def test_the_objective_gives_these_gradients_and_none_through_the_reading(in_float64):
    """One step of the objective: gradients of the model are those of log p at the draws; the guide's are, draw for
    draw, those of the collapsed bound, without the noise of z."""
    model, guide, observed = in_float64
    torch.manual_seed(3)
    path_derivative(model, guide, observed, 8, {}).local.sum().backward()
    torch.manual_seed(3)
    run = guide_trace(guide, observed, 8, {})
    s, q = run.nodes["scale"]["value"], run.nodes["scale"]["fn"]
    at_draws = log_density(
        model, {**observed, "scale": s.detach(), "z": run.nodes["z"]["value"].detach()}, observed=["x"]
    )
    for weight, wanted in zip(
        model.parameters(), torch.autograd.grad(at_draws.joint.sum(), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(weight.grad, wanted)
    frozen = dist.LogNormal(q.base_dist.loc.detach(), q.base_dist.scale.detach())
    collapsed_bound = (log_marginal(model, observed["x"], s) - frozen.log_prob(s)).sum()
    used = [weight for weight in guide.parameters() if weight.grad is not None]
    for weight, wanted in zip(used, torch.autograd.grad(collapsed_bound, used), strict=True):
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-8, atol=1e-10)
    assert len(used) == len(list(guide.parameters()))


# -- the model of a guide ----------------------------------------------------------------------------------------------


def densities(guide: Any, observed: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad(), defaults(guide, observed):
        run = guide_trace(guide, observed, len(observed["x"]), {})
        return density_of(run, len(observed["x"]), {n: s["value"] for n, s in sampled(run).items()}).joint


def made(name: str = "gsm") -> tuple[Any, CollapsedGuide, dict[str, Tensor]]:
    model = cal.models.create(name, shape=(6,), latents=3)
    observed = {"x": cal.program.sample_prior(model, 20, seed=1)["x"]}
    return model.eval(), amortize(model, observed, structure="collapsed").eval(), observed


@pytest.mark.parametrize("name", ["gsm", "ppca"])
def test_saved_and_loaded(name, tmp_path):
    model, guide, observed = made(name)
    with torch.no_grad():
        for weight in (*model.parameters(), *guide.parameters()):
            weight.add_(0.05 * torch.randn_like(weight))
    cal.store.save_run(tmp_path, model, guide, cal.inference.Fit())
    loaded_model, loaded = cal.load(tmp_path)
    assert isinstance(loaded, CollapsedGuide)
    assert loaded.model is loaded_model
    torch.testing.assert_close(densities(loaded, observed), densities(guide, observed), rtol=1e-5, atol=1e-4)
    posterior(loaded_model, loaded, observed, draws=2)


def test_the_model_is_no_part_of_the_guide():
    model, guide, observed = made()
    assert not {id(w) for w in guide.parameters()} & {id(w) for w in model.parameters()}
    assert {name.partition(".")[0] for name in guide.state_dict()} == {"encoder", "heads"}
    twin = copy.deepcopy(guide)
    assert twin.model is model
    torch.testing.assert_close(densities(twin, observed), densities(guide, observed), rtol=1e-5, atol=1e-4)
    both = copy.deepcopy(nn.ModuleList([model, guide]))
    assert both[1].model is both[0]
    posterior(*both, observed, draws=2)


def test_a_guide_without_its_model_says_so():
    model, guide, observed = made()
    alone = CollapsedGuide(guide.spec)
    with pytest.raises(ProgramError, match=r"guide\.attach\(model\)"):
        alone(observed, 20)
    with pytest.raises(ProgramError, match="another model than this one"):
        posterior(copy.deepcopy(model), guide, observed, draws=2)
    with pytest.raises(ProgramError, match="attach the model that the guide was made for"):
        alone.attach(made("ppca")[0]).forward(observed, 20)
    posterior(model, alone.attach(model), observed, draws=2)


def test_a_model_that_lost_the_structure_says_so():
    model, guide, observed = made()
    with torch.no_grad():
        model.likelihood.log_scale.fill_(torch.nan)
    with pytest.raises(InferenceError, match="no longer linear and Gaussian"), pyro.get_param_store().scope():
        guide(observed, 20)


def test_a_plain_function_is_the_same_model_each_time():
    observed = simulate(hierarchical, 4)
    guide = amortize(hierarchical, observed, structure="collapsed")
    posterior(hierarchical, guide, observed, draws=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_dtype_of_the_call(dtype, global_state):
    model, guide, observed = made()
    model, guide = model.to(dtype), guide.to(dtype)
    before = global_state()
    with defaults(guide, {}), pyro.get_param_store().scope():
        run = pyro.poutine.trace(guide).get_trace({"x": observed["x"].to(dtype)}, 20)
    assert {run.nodes[name]["value"].dtype for name in ("scale", "y")} == {dtype}
    assert set(sampled(run)) == {"scale", "y"}  # reading the model leaves no trace of it
    assert global_state() == before


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("ea-vae", {"prior": "laplace"}), ("vae", {"decoder": "mlp"}), ("vae", {"likelihood": "bernoulli"})],
)
def test_other_programs_are_refused_with_the_alternatives(name, options):
    model = cal.models.create(name, shape=(6,), latents=3, **options)
    observed = {"x": cal.program.sample_prior(model, 20, seed=1)["x"]}
    with pytest.raises(ProgramError, match='structure="faithful"'):
        amortize(model, observed, structure="collapsed")


def test_batch_normalisation_is_refused():
    """Affine in eval(), but not in training."""
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    model = cal.models.create("vae", shape=(6,), latents=3, decoder=decoder).eval()
    with pytest.raises(ProgramError, match="batch normalisation"):
        amortize(model, {"x": torch.randn(20, 6)}, structure="collapsed")


def test_a_family_is_for_the_scale_alone():
    model, _, observed = made()
    guide = amortize(model, observed, structure="collapsed", family={"scale": "gamma"})
    assert guide.spec["sites"][0]["family"] == "gamma"
    with pytest.raises(ProgramError, match=r"\['scale'\]"):
        amortize(model, observed, structure="collapsed", family={"y": "normal"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    model, guide, observed = made("ppca")
    wanted = log_evidence(model, observed)
    model.cuda(), guide.cuda()
    torch.testing.assert_close(bound(model, guide, {"x": observed["x"].cuda()}, 2).cpu(), wanted, rtol=0, atol=1e-8)
