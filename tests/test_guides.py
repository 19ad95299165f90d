"""Guides against known posteriors: where the family contains the truth, the ELBO must reach the exact evidence."""

from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pytest
import torch

import calibrant as cal
from calibrant.errors import ProgramError

HELD_OUT = 4000


def limit(count: int) -> float:
    """z of a simultaneous test of `count` statistics with a false-alarm rate of 1e-5."""
    return NormalDist().inv_cdf(1 - 1e-5 / (2 * count))


def diagonal_ppca(pixels=8, latents=4):
    """A ppca with orthogonal columns: its posterior covariance is diagonal."""
    model = cal.models.create("ppca", shape=(pixels,), latents=latents)
    basis, _ = torch.linalg.qr(torch.randn(pixels, latents, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.decoder.directions.copy_(basis * torch.tensor([2.0, 1.0, 0.7, 0.3]))
        model.decoder.bias.copy_(torch.linspace(-1, 1, pixels))
        model.likelihood.log_scale.fill_(torch.tensor(0.5).log())
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=["stl", "kl"])
def trained(request):
    model = diagonal_ppca()
    train = {"x": cal.program.sample_prior(model, 12_000, seed=1)["x"]}
    guide = cal.guides.amortize(model, train, structure="mean-field")
    cal.inference.fit(model, guide, train, epochs=12, lr=3e-3, batch_size=256, objective=request.param)
    return model, guide, {"x": cal.program.sample_prior(model, HELD_OUT, seed=2)["x"]}


def test_elbo_reaches_the_exact_evidence(trained):
    """Gap below 0.01 nats with a standard error below 0.002, over 4,000 held-out data."""
    model, guide, observed = trained
    stats = cal.inference.posterior(model, guide, observed, draws=20)["sample_stats"]
    elbo = torch.as_tensor((stats["log_p"] - stats["log_q"]).mean(("chain", "draw")).values)
    gap = cal.inference.log_evidence(model, observed) - elbo
    se = float(gap.std() / HELD_OUT**0.5)
    assert se < 0.002
    assert -limit(1) * se < float(gap.mean()) < 0.01


def test_mean_and_sd_are_those_of_the_exact_posterior(trained):
    model, guide, observed = trained
    few = {"x": observed["x"][:200]}
    post = cal.inference.posterior(model, guide, few, draws=1000)
    result = cal.evaluation.compare(post, cal.inference.reference(model, few))
    assert all(v.status == "pass" for v in cal.evaluation.verdicts(result)), cal.evaluation.verdicts(result)


@pytest.mark.parametrize(("sd", "shift", "quantity"), [(0.8, 0.0, "sd"), (1.0, 0.3, "mean")])
def test_planted_defects_are_flagged(trained, sd, shift, quantity):
    model, guide, observed = trained
    few = {"x": observed["x"][:200]}
    post = cal.inference.posterior(model, guide, few, draws=1000)
    ref = cal.inference.reference(model, few)
    z, exact = post["posterior"]["z"], ref["posterior"]["z"].std(("chain", "draw"))
    mean = z.mean(("chain", "draw"))
    post["posterior"]["z"] = mean + sd * (z - mean) + shift * exact
    found = {v.quantity: v for v in cal.evaluation.verdicts(cal.evaluation.compare(post, ref)) if v.site == "z"}
    assert found[quantity].status == "fail", found


def test_an_exact_sampler_is_not_flagged(trained):
    model, _, observed = trained
    few = {"x": observed["x"][:200]}
    first, second = (cal.inference.reference(model, few, seed=seed) for seed in (1, 2))
    assert all(v.status != "fail" for v in cal.evaluation.verdicts(cal.evaluation.compare(first, second)))


def gamma_program(size):
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Poisson(rate[:, None].expand(-1, 5)).to_event(1))


def test_gamma_head_learns_its_shape_on_gamma_poisson():
    """Gamma–Poisson is conjugate: the posterior is Gamma(3 + Σx, 2 + 5), so its shape changes with the datum."""
    train = {"x": cal.program.sample_prior(gamma_program, 8000, seed=1)["x"]}
    guide = cal.guides.amortize(gamma_program, train)
    assert guide.spec["sites"][0]["family"] == "gamma"
    cal.inference.fit(gamma_program, guide, train, epochs=12, lr=3e-3, batch_size=128)
    test = {"x": cal.program.sample_prior(gamma_program, 2000, seed=2)["x"]}
    stats = cal.inference.posterior(gamma_program, guide, test, draws=50)["sample_stats"]
    elbo = torch.as_tensor((stats["log_p"] - stats["log_q"]).mean(("chain", "draw")).values)
    total = test["x"].double().sum(1)
    shape, rate = 3 + total, torch.tensor(7.0, dtype=torch.float64)
    evidence = (
        3 * torch.tensor(2.0).double().log()
        - torch.lgamma(torch.tensor(3.0).double())
        + torch.lgamma(shape)
        - shape * rate.log()
        - torch.lgamma(test["x"].double() + 1).sum(1)
    )
    gap = evidence - elbo
    assert float(gap.std() / 2000**0.5) < 0.002
    assert -limit(1) * float(gap.std() / 2000**0.5) < float(gap.mean()) < 0.01


def test_faithful_guide_sees_earlier_latents_and_mean_field_does_not():
    model = cal.models.create("ea-vae", shape=(6,), latents=2)
    observed = {"x": cal.program.sample_prior(model, 64, seed=0)["x"]}
    for structure, depends in (("faithful", True), ("mean-field", False)):
        guide = cal.guides.amortize(model, observed, structure=structure)
        torch.manual_seed(0)
        for parameter in guide.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        spread = []
        for value in (0.5, 5.0):
            held = pyro.condition(guide, data={"scale": torch.full((64,), value)})
            run = pyro.poutine.trace(held).get_trace(observed, 64)
            spread.append(run.nodes["z"]["fn"].base_dist.scale)
        assert bool((spread[0] != spread[1]).any()) == depends


@pytest.mark.parametrize(
    ("program", "match"),
    [
        ("shared", "shared"),
        ("discrete", "discrete"),
        ("bounded", "support"),
    ],
)
def test_latents_that_no_head_covers_are_named(program, match):
    def shared(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(centre, 1.0))

    def discrete(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0))

    def bounded(size):
        with pyro.plate("data", size):
            p = pyro.sample("p", dist.Beta(2.0, 2.0))
            pyro.sample("x", dist.Normal(p, 1.0))

    with pytest.raises(ProgramError, match=match):
        cal.guides.amortize(
            {"shared": shared, "discrete": discrete, "bounded": bounded}[program], {"x": torch.zeros(8)}
        )


def test_options_are_checked():
    model = cal.models.create("vae", shape=(4,), latents=2)
    observed = {"x": torch.randn(32, 4)}
    for wrong in (
        {"structure": "full"},
        {"encoder": "resnet"},
        {"encoder": "conv"},
        {"family": {"z": "gamma"}},
        {"family": {"z": "flow"}},
        {"family": {"y": "normal"}},
        {"encoder": torch.nn.Identity()},
    ):
        with pytest.raises(ProgramError):
            cal.guides.amortize(model, observed, **wrong)


def test_own_encoder_and_covariates():
    class Encoder(torch.nn.Module):
        features = 16

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 16)

        def forward(self, inputs):
            return self.layer(torch.cat([inputs["x"], inputs["offset"]], -1))

    def program(size, offset):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z + offset, 1.0).to_event(1))

    offset = torch.randn(64, 3)
    observed = {"x": cal.program.sample_prior(program, 64, {"offset": offset}, seed=0)["x"]}
    for encoder in (Encoder(), "mlp"):
        guide = cal.guides.amortize(program, observed, covariates={"offset": offset}, encoder=encoder)
        fit = cal.inference.fit(program, guide, observed, covariates={"offset": offset}, epochs=1, batch_size=16)
        assert fit.epochs == 1


def test_one_datum_is_enough_to_make_a_guide():
    model = cal.models.create("ea-vae", shape=(6,), latents=2)
    observed = {"x": torch.ones(1, 6)}
    guide = cal.guides.amortize(model, observed)
    stats = cal.inference.posterior(model, guide, observed, draws=5)["sample_stats"]
    assert bool(stats["log_q"].notnull().all())
