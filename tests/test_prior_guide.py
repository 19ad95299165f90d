"""Prior guides: the model's own prior as q, whose loss is a mean over draws of the prior and nothing else."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

import calibrant as cal
from calibrant.errors import CalibrantError, InferenceError, ProgramError
from calibrant.inference.fitting.objectives import OBJECTIVES, ElboTerms
from calibrant.inference.fitting.state import Modules
from calibrant.inference.graphs.of_modules import Gradient

FEATURES, CLASSES = 3, 3


class Noisy(PyroModule):
    """z ~ Normal(mean(x), scale(x)), y ~ Categorical(W z): a classifier with a Normal embedding."""

    def __init__(self, latents: int = 2) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(FEATURES, latents), nn.Linear(FEATURES, latents)
        self.out = nn.Linear(latents, CLASSES)

    def scale(self, x: Tensor) -> Tensor:
        return softplus(self.spread(x)) + 0.1

    def forward(self, size: int, x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.mean(x), self.scale(x)).to_event(1))
            pyro.sample("y", dist.Categorical(logits=self.out(z)))


class Directed(PyroModule):
    """z ~ vMF(direction(x), concentration(x)), y ~ Bernoulli(logits = 3 zᵀ direction(x) − 1)."""

    def __init__(self, latents: int = 3) -> None:
        super().__init__()
        self.direction, self.concentration = nn.Linear(FEATURES, latents), nn.Linear(FEATURES, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.direction(x), dim=-1), 2 + softplus(self.concentration(x))[:, 0]

    def forward(self, size: int, x: Tensor) -> None:
        direction, concentration = self.moments(x)
        with pyro.plate("data", size):
            z = pyro.sample("z", cal.distributions.VonMisesFisher(direction, concentration))
            pyro.sample("y", dist.Bernoulli(logits=3 * (z * direction.detach()).sum(-1) - 1))


class Plain(PyroModule):
    """y ~ Categorical(W x): no latents."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES)

    def forward(self, size: int, x: Tensor) -> None:
        with pyro.plate("data", size):
            pyro.sample("y", dist.Categorical(logits=self.net(x)))


class Loss(dist.Bernoulli):
    """A training loss that is no density of any y."""

    is_density = False


class Trained(Noisy):
    """As `Noisy`, with a training loss in the place of the labels' density."""

    def forward(self, size: int, x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.mean(x), self.scale(x)).to_event(1))
            pyro.sample("y", Loss(logits=self.out(z)[:, 0]))


Given = tuple[Noisy, Tensor, Tensor]


@pytest.fixture
def given() -> Given:
    torch.manual_seed(3)
    model = Noisy().double()
    return model, torch.randn(5, FEATURES).double(), torch.randint(0, CLASSES, (5,))


def labelled(count: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(count, FEATURES), torch.randint(0, classes, (count,))


def terms_of(
    objective: str, model: PyroModule, x: Tensor, y: Tensor, seed: int = 0, guide: PyroModule | None = None, **more: int
) -> ElboTerms:
    q = guide or cal.guides.prior(model)
    with cal.program.defaults(model, {"x": x}), cal.program.seeded(seed):
        return OBJECTIVES[objective](model, q, {"y": y}, len(x), {"x": x}, **more)


def by_hand(model: Noisy, x: Tensor, y: Tensor, particles: int) -> Tensor:
    """log mean p(y | z_k) of each datum, from the noise that the current random state gives."""
    noise = torch.randn(len(x) * particles, 2, dtype=x.dtype)
    z = model.mean(x).repeat_interleave(particles, 0) + model.scale(x).repeat_interleave(particles, 0) * noise
    logs = model.out(z).log_softmax(-1).gather(1, y.repeat_interleave(particles)[:, None])
    return logs.reshape(len(x), particles).exp().mean(1).log()


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "particles"), [("iwae", 7), ("stl", 1), ("kl", 1)])
def test_value_and_gradient_are_those_of_the_loss_written_by_hand(given: Given, objective: str, particles: int) -> None:
    model, x, y = given
    weights = list(model.parameters())
    terms = terms_of(objective, model, x, y, **({"particles": particles} if particles > 1 else {}))
    torch.manual_seed(0)
    wanted = by_hand(model, x, y, particles)
    found = terms.local if terms.bound is None else terms.bound
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(value.mean(), weights) for value in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_a_guide_with_the_same_encoder_keeps_the_score_of_the_prior(given: Given) -> None:
    """The planted defect: log q has detached weights and log p has not, so that noise is left in the gradient."""
    model, x, y = given

    class SameEncoder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([model])

        def forward(self, observed: dict[str, Tensor], size: int, x: Tensor) -> None:
            with pyro.plate("data", size):
                pyro.sample("z", dist.Normal(model.mean(x), model.scale(x)).to_event(1))

    def slope(guide: PyroModule | None) -> Tensor:
        return torch.autograd.grad(terms_of("stl", model, x, y, guide=guide).local.mean(), model.mean.weight)[0]

    assert not torch.allclose(slope(None), slope(SameEncoder()), rtol=0.1)


def grid(model: Noisy, x: Tensor, y: Tensor, nodes: int = 60) -> Tensor:
    """log p(y | x) of two latents by Gauss–Hermite quadrature, `(data,)`."""
    places, weights = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    noise = torch.cartesian_prod(places, places)
    weight = torch.cartesian_prod(weights, weights).prod(1) / weights.sum() ** 2
    z = model.mean(x)[:, None] + model.scale(x)[:, None] * noise
    picked = model.out(z).log_softmax(-1)[torch.arange(len(x)), :, y]
    return (picked + weight.log()).logsumexp(1)


def test_bound_and_gradient_of_many_draws_are_those_of_quadrature(given: Given) -> None:
    model, x, y = given
    weights, runs = list(model.parameters()), 40
    exact = grid(model, x, y).mean()
    wanted = [exact.detach(), *torch.autograd.grad(exact, weights)]
    found = []
    for run in range(runs):
        bound = terms_of("iwae", model, x, y, run, particles=1000).maximised(1)
        found.append([bound.detach(), *torch.autograd.grad(bound, weights)])
    z = []
    for place, true in enumerate(wanted):
        drawn = torch.stack([one[place] for one in found])
        z.append(((drawn.mean(0) - true) / (drawn.std(0) + 1e-12) * runs**0.5).abs().flatten())
    assert float(torch.cat(z).max()) < 1.5 * limit(sum(len(part) for part in z))  # 40 runs: tails of Student's t
    wrong = grid(model, x, (y + 1) % CLASSES).mean().detach()  # planted: other labels
    assert abs(float(wrong - wanted[0])) > 10 * float(torch.stack([one[0] for one in found]).std())


def test_gradients_on_the_circle_are_the_finite_differences_of_quadrature() -> None:
    torch.manual_seed(2)
    model, x, y = Directed(2).double(), torch.randn(4, FEATURES).double(), torch.tensor([0.0, 1.0, 1.0, 0.0]).double()
    angles = torch.arange(400, dtype=torch.float64) * (2 * torch.pi / 400)
    fixed = model.moments(x)[0].detach()

    def exact() -> Tensor:
        direction, concentration = model.moments(x)
        z = torch.stack([angles.cos(), angles.sin()], 1)
        prior = (concentration[:, None] * (direction @ z.T)).log_softmax(1)
        logits = 3 * fixed @ z.T - 1
        return (prior + dist.Bernoulli(logits=logits).log_prob(y[:, None].expand(-1, 400))).logsumexp(1).mean()

    runs, step, weight = 60, 1e-5, model.concentration.bias
    with torch.no_grad():
        ends = []
        for side in (1, -1):
            weight += side * step
            ends.append(float(exact()))
            weight -= side * step
    slope = (ends[0] - ends[1]) / (2 * step)
    drawn = torch.cat(
        [
            torch.autograd.grad(terms_of("iwae", model, x, y, run, particles=400).maximised(1), weight)[0]
            for run in range(runs)
        ]
    )
    z = float((drawn.mean() - slope) / drawn.std() * runs**0.5)
    assert abs(z) < 1.3 * limit(1)
    assert abs(slope) > 3 * limit(1) * float(drawn.std()) / runs**0.5  # zero would be told apart


def test_an_encoder_that_sees_the_data_alone_runs_once_per_datum(given: Given) -> None:
    model, x, y = given
    rows: list[int] = []
    model.mean.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    slow = terms_of("iwae", model, x, y, particles=6).maximised(1)
    model.mean.per_datum = True
    fast = terms_of("iwae", model, x, y, particles=6).maximised(1)
    assert rows == [30, 5]
    torch.testing.assert_close(*(torch.autograd.grad(b, list(model.parameters())) for b in (slow, fast)))


# -- training and storing ----------------------------------------------------------------------------------------------


def test_weights_are_counted_once_and_stored_with_the_model(tmp_path: Path) -> None:
    model, (x, y) = Noisy(), labelled(60)
    guide = cal.guides.prior(model)
    gradient = Gradient(Modules(model, guide), lambda *_: (torch.zeros(()),))
    assert len(gradient.weights) == len(list(model.parameters()))
    fit = cal.inference.fit(
        model, guide, {"y": y}, covariates={"x": x}, objective="iwae", particles=3, epochs=3, batch_size=20
    )
    assert guide.state_dict() == {}
    cal.store.save_run(tmp_path, model, guide, fit)
    assert (tmp_path / "guide.safetensors").stat().st_size < 100
    again, prior = cal.load(tmp_path, model=Noisy())
    assert prior.model is again
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


def test_a_recorded_step_is_that_of_the_program() -> None:
    model, (x, y) = Noisy(), labelled(40)
    modules = Modules(model, cal.guides.prior(model))

    def objective(observed: dict[str, Tensor], covariates: dict[str, Tensor]) -> tuple[Tensor, ...]:
        terms = OBJECTIVES["iwae"](model, modules.guide, observed, 20, covariates, particles=3)
        return terms.maximised(1), terms.per_datum(1)

    gradient = Gradient(modules, objective)
    first, other = (({"y": y[part]}, {"x": x[part]}) for part in (slice(20), slice(20, 40)))
    with cal.program.defaults(model, {}):
        with cal.program.seeded(1):
            wanted = gradient(*other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient.record(first, other)
        assert gradient.is_graph
        with cal.program.seeded(1):
            torch.testing.assert_close(gradient(*other), wanted)


def test_training_without_latents_is_maximum_likelihood() -> None:
    x, _ = labelled(2000)
    truth = torch.tensor([[2.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]])
    y = dist.Categorical(logits=x @ truth.T).sample()
    model = Plain()
    cal.inference.fit(model, cal.guides.prior(model), {"y": y}, covariates={"x": x}, epochs=40, lr=0.02, batch_size=200)
    evidence = cal.inference.log_evidence(model, {"y": y}, covariates={"x": x})
    logits = model.double().net(x.double())
    torch.testing.assert_close(evidence, -nn.functional.cross_entropy(logits, y, reduction="none"))
    best = nn.functional.cross_entropy(x @ truth.T, y)
    assert float(-evidence.mean()) < float(best) + 0.01


def test_a_copy_of_model_and_guide_is_a_guide_of_the_copy() -> None:
    model = Noisy()
    again, guide = copy.deepcopy((model, cal.guides.prior(model)))
    assert guide.model is again
    x, y = labelled(4)
    cal.inference.posterior(again, guide, {"y": y}, 5, covariates={"x": x})


# -- draws and references ----------------------------------------------------------------------------------------------


def test_posterior_gives_the_prior_and_importance_the_posterior_on_the_sphere() -> None:
    """The cosine t of z to its mean direction has the density exp(κ t) on [−1, 1], times that of y."""
    torch.manual_seed(0)
    model, x = Directed().eval(), torch.randn(4, FEATURES)
    y = torch.tensor([0.0, 1.0, 0.0, 1.0])
    direction, concentration = (part.detach().double() for part in model.moments(x))
    t = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    prior = (concentration[:, None] * t).softmax(1)
    posterior = prior * dist.Bernoulli(logits=3 * t - 1).log_prob(y.double()[:, None].expand(-1, len(t))).exp()
    evidence = posterior.sum(1)
    posterior = posterior / evidence[:, None]
    guide = cal.guides.prior(model)
    drawn = cal.inference.posterior(model, guide, {"y": y}, 4000, covariates={"x": x})
    kept = cal.inference.importance(drawn)
    reference = cal.inference.reference(
        model, {"y": y}, "importance-only", init=guide, covariates={"x": x}, draws=500, pool=10_000
    )
    assert reference["convergence"]["is_reference"].values.all()
    for tree, weights in ((drawn, prior), (kept, posterior), (reference, posterior)):
        cosine = (tree["posterior"]["z"].transpose("chain", "draw", "data", ...).values * direction.numpy()).sum(-1)
        mean = (weights * t).sum(1)
        sd = ((weights * t.square()).sum(1) - mean.square()).sqrt()
        z = (cosine.reshape(-1, 4).mean(0) - mean.numpy()) / (sd.numpy() / 1000**0.5)  # 1,000 draws' worth at least
        assert np.abs(z).max() < limit(4)
    found = kept["importance"]
    errors = np.abs(np.exp(found["log_evidence"].values) / evidence.numpy() - 1) / found["log_evidence_se"].values
    assert errors.max() < limit(4)
    assert (
        float(((prior - posterior) * t).sum(1).abs().min()) > 0.02
    )  # prior and posterior differ: the guide is no posterior


@pytest.mark.slow
@pytest.mark.parametrize("program", [lambda: Noisy(1), Directed])
def test_chains_that_start_at_a_prior_guide_agree_with_importance(program: Callable[[], PyroModule]) -> None:
    torch.manual_seed(0)
    model, (x, y) = program().eval(), labelled(3, 2)
    given = {"y": y.float() if isinstance(model, Directed) else y}
    guide = cal.guides.prior(model)
    chains = cal.inference.reference(
        model, given, "nuts", init=guide, covariates={"x": x}, warmup=300, draws=500, compile=False
    )
    assert chains["convergence"]["is_reference"].values.all()
    drawn = cal.inference.importance(cal.inference.posterior(model, guide, given, 4000, covariates={"x": x}))
    means = [tree["posterior"]["z"].mean(("chain", "draw")).values for tree in (chains, drawn)]
    assert np.abs(means[0] - means[1]).max() < 1.5 * limit(9) * chains["posterior"]["z"].values.std() / 400**0.5


def test_a_refined_prior_guide_is_nearer_to_the_posterior() -> None:
    torch.manual_seed(0)
    model, (x, y) = Noisy().eval(), labelled(20)
    model.out.weight.data *= 4
    guide, given = cal.guides.prior(model), {"covariates": {"x": x}}
    refined = cal.guides.refine(model, guide, {"y": y}, steps=60, **given)
    spread = []
    for q in (guide, refined):
        stats = cal.inference.posterior(model, q, {"y": y}, 300, **given)["sample_stats"]
        spread.append(float((stats["log_p"] - stats["log_q"]).mean()))
    assert spread[1] > spread[0] + 0.05
    assert all(weight.requires_grad for weight in model.parameters())


def test_functions_and_methods_have_prior_guides_too() -> None:
    model, (x, y) = Noisy(), labelled(4)

    def function(size: int, x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Categorical(logits=z))

    for program in (function, model.forward):
        post = cal.inference.posterior(program, cal.guides.prior(program), {"y": y}, 10, covariates={"x": x})
        assert post["posterior"]["z"].shape[:3] == (1, 10, 4)


def test_a_latent_behind_an_observed_site_is_drawn_given_its_value() -> None:
    def program(size: int) -> None:
        with pyro.plate("data", size):
            y = pyro.sample("y", dist.Categorical(torch.ones(CLASSES)))
            z = pyro.sample("z", dist.Normal(10.0 * y, 0.1))
            pyro.sample("x", dist.Normal(z, 1.0))

    y = torch.tensor([0, 1, 2])
    post = cal.inference.posterior(program, cal.guides.prior(program), {"y": y, "x": 10.0 * y}, 20)
    np.testing.assert_allclose(post["posterior"]["z"].mean(("chain", "draw")), [0, 10, 20], atol=0.2)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_programs_without_latents_have_no_posterior() -> None:
    model, (x, y) = Plain().eval(), labelled(4)
    for refused in (
        lambda: cal.inference.posterior(model, cal.guides.prior(model), {"y": y}, covariates={"x": x}),
        lambda: cal.inference.reference(model, {"y": y}, covariates={"x": x}),
        lambda: cal.inference.reference(
            model, {"y": y}, "importance", init=cal.guides.prior(model), covariates={"x": x}
        ),
    ):
        with pytest.raises(InferenceError, match=r"has no latents.*log_evidence"):
            refused()


def test_a_training_loss_has_no_posterior_under_a_prior_guide_either() -> None:
    model, (x, y) = Trained().eval(), labelled(30, 2)
    guide, given = cal.guides.prior(model), {"y": y.float()}
    fit = cal.inference.fit(model, guide, given, covariates={"x": x}, objective="iwae", epochs=2, batch_size=10)
    assert not fit.is_elbo
    for refused in (
        lambda: cal.inference.posterior(model, guide, given, covariates={"x": x}),
        lambda: cal.inference.reference(model, given, "importance", init=guide, covariates={"x": x}),
        lambda: cal.inference.reference(model, given, covariates={"x": x}),
        lambda: cal.inference.log_evidence(model, given, covariates={"x": x}),
        lambda: cal.inference.iwae_bound(model, guide, given, covariates={"x": x}),
        lambda: cal.evaluation.predicted_probabilities(model, guide, given, covariates={"x": x}),
        lambda: cal.evaluation.check(model, guide, given, covariates={"x": x}),
    ):
        with pytest.raises(ProgramError, match=r"site 'y' \(Loss\) is a training loss"):
            refused()


def test_what_a_prior_guide_is_not_for() -> None:
    model, (x, y) = Noisy(), labelled(30)
    guide, given = cal.guides.prior(model), {"covariates": {"x": x}}

    def improper(size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(z, 1.0))

    def shared(size: int) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(m, 1.0))

    def discrete(size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z, 1.0))

    reals = {"y": torch.randn(30)}
    refusals = {
        "prior of another model": lambda: cal.inference.posterior(Noisy(), guide, {"y": y}, **given),
        "improper prior": lambda: cal.inference.posterior(improper, cal.guides.prior(improper), reals),
        "objective='dreg' is for a guide": lambda: cal.inference.fit(model, guide, {"y": y}, objective="dreg", **given),
        "all divergences are zero": lambda: cal.inference.fit(model, guide, {"y": y}, kl_weights={"z": 2.0}, **given),
        "are shared": lambda: cal.inference.fit(shared, cal.guides.prior(shared), reals, objective="iwae"),
    }
    for words, refused in refusals.items():
        with pytest.raises(CalibrantError, match=words):
            refused()
    with pytest.raises(ProgramError, match="carry no gradient"):
        OBJECTIVES["stl"](discrete, cal.guides.prior(discrete), reals, 30, {})


@pytest.mark.parametrize(
    ("kind", "objective", "particles", "words"),
    [
        ("marginal", "stl", 8, "objective='iwae' with several particles"),
        ("marginal", "iwae", 1, "objective='iwae' with several particles"),
        ("elbo", "iwae", 8, "give objective='stl'"),
        ("normalised", "iwae", 8, "give objective='stl'"),
        ("marginal", "iwae", 2, ""),
        ("elbo", "stl", 8, ""),
        ("exact", "stl", 8, ""),
        (None, "stl", 8, ""),
    ],
)
def test_another_loss_than_that_of_the_program_gets_a_warning(
    kind: str | None, objective: str, particles: int, words: str
) -> None:
    model, (x, y) = Noisy(), labelled(30)
    if kind is not None:
        model.loss_kind = kind
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cal.inference.fit(
            model,
            cal.guides.prior(model),
            {"y": y},
            covariates={"x": x},
            objective=objective,
            particles=particles,
            epochs=1,
            batch_size=20,
        )
    found = [str(one.message) for one in caught if "loss_kind" in str(one.message)]
    assert len(found) == bool(words)
    assert all(words in message for message in found)
