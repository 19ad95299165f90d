"""p(y | x) of the models of representations, by quadrature over circle and sphere: the densities of the programs, the
importance weights of their prior guides, the gradients of both, and what is simulated from them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from agreement import limit
from scipy.integrate import quad
from scipy.special import expit
from spheres import log_c, masses, nodes, normal_masses, softmax

import calibrant as cal
from calibrant.distributions import match_constant
from calibrant.errors import CalibrantError
from calibrant.inference.fitting.objectives import importance_weighted
from calibrant.models.parts.matching import of_tuple
from calibrant.program.environment import seeded

CIRCLE, SPHERE = 48, 20  # angles of a quadrature


def vectors(size, seed=0):
    with seeded(seed):
        return torch.randn(size, 4, dtype=torch.float64)


def small(name, latents, **arguments):
    """A model in float64 with concentrations that depend on x."""
    with seeded(5):
        model = cal.models.create(name, shape=[4], latents=latents, encoder="linear", **arguments).double()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim():
                    weight.add_(0.3 * torch.randn_like(weight))
    return model


def grid(latents):
    return nodes(latents, CIRCLE if latents == 2 else SPHERE)


def mass(embedding, x, points, weights):
    """Probabilities of the nodes under p(z | x) of one input."""
    direction, concentration = (part[0].detach().numpy() for part in embedding(x[None]))
    return masses(direction, float(concentration), points, weights)


# -- the truth, y given x, for every value of y that is asked ----------------------------------------------------------


def of_pair(model, x, other, slope, offset):
    points, weights = grid(model.embedding.direction.out_features)
    both = mass(model.embedding, x, points, weights)[:, None] * mass(model.embedding, other, points, weights)
    one = float((both * expit(slope * points @ points.T + offset)).sum())
    return np.array([1 - one, one])


def pair_truth(model, x, other):
    latents = model.embedding.direction.out_features
    return of_pair(model, x, other, model.k, float(log_c(latents, model.k) - log_c(latents, 0.0)))


def normal_pair_truth(model, x, other):
    """With z and z′ from Normals in the plane."""
    location, concentration = model.embedding(torch.stack([x, other]))
    (z, p), (z_other, p_other) = (
        normal_masses(mean.numpy(), np.eye(2) * float(kappa) ** -0.5, 16)
        for mean, kappa in zip(location, concentration, strict=True)
    )
    offset = float(log_c(2, model.k) - log_c(2, 0.0))
    one = float(p @ expit(model.k * z @ z_other.T + offset) @ p_other)
    return np.array([1 - one, one])


def hib_truth(model, x, other):
    return of_pair(model, x, other, float(model.slope), float(model.offset))


def tuple_truth(model, x, candidates):
    """Of three candidates on the circle, or two on the sphere."""
    points, weights = nodes(model.embedding.direction.out_features, 32 if len(candidates) == 3 else 16)
    reference = mass(model.embedding, x, points, weights)
    each = [mass(model.embedding, one, points, weights) for one in candidates]
    total, letters = 0.0, "abc"[: len(candidates)]
    for point, share in zip(points, reference, strict=True):
        t = model.k * points @ point
        stacked = np.stack(np.meshgrid(*[t] * len(candidates), indexing="ij"), -1)
        if model.form == "categorical":
            p = softmax(stacked)
        else:
            one = expit(stacked[..., 0] - np.log(np.exp(stacked[..., 1:]).mean(-1)))
            p = np.stack([1 - one, one], -1)
        total = total + share * np.einsum(f"{','.join(letters)},{letters}y->y", *each, p)
    return total


def elk_truth(model, x):
    points, weights = grid(model.embedding.direction.out_features)
    p = mass(model.embedding, x, points, weights)
    vectors_, concentrations = (part.detach().numpy() for part in model.of_classes())
    f = [
        (p * np.exp(log_c(len(mu), k) + k * points @ mu)).sum()
        for mu, k in zip(vectors_, concentrations[:, 0], strict=True)
    ]
    return np.array(f) / np.sum(f)


def nivmf_densities(model, points):
    directions, concentrations = (part.detach().numpy() for part in model.of_classes())
    r = concentrations * directions
    c = np.linalg.norm(r, axis=-1)
    return np.exp(log_c(r.shape[1], c) + points @ r.T + np.log(concentrations).sum(-1) - 2 * np.log(c))


def nivmf_truth(model, x):
    """Of two draws."""
    points, weights = grid(model.embedding.direction.out_features)
    p, f = mass(model.embedding, x, points, weights), nivmf_densities(model, points)
    both = f[:, None] + f[None]
    return np.einsum("a,b,aby->y", p, p, both / both.sum(-1, keepdims=True))


def het_xl_truth(model, x):
    normal = model.noisy(x[None])
    covariance = normal.covariance_matrix[0].detach().numpy()
    points, p = normal_masses(normal.loc[0].detach().numpy(), np.linalg.cholesky(covariance), 24)
    weight, bias = model.output.weight.detach().numpy(), model.output.bias.detach().numpy()
    return p @ softmax((points @ weight.T + bias) / math.exp(float(model.log_temperature)))


def classifier_truth(model, x):
    hidden = model.embedding(x[None]).detach().numpy()
    return softmax(hidden @ model.output.weight.detach().numpy().T + model.output.bias.detach().numpy())[0]


def infonce_truth(model, x, candidates):
    e = model.embedding(torch.cat([x[None], candidates])).detach().numpy()
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    p = softmax(model.k * e[1:] @ e[0])
    return p if model.form == "categorical" else np.array([1 - p[0], p[0]])


@dataclass(frozen=True)
class Known:
    """A model whose p(y | x) is known for every y."""

    name: str
    latents: int
    truth: Any
    arguments: dict[str, Any]
    candidates: int = 0

    def build(self):
        return small(self.name, self.latents, **self.arguments)

    def covariates(self, size, seed=0):
        """Keyword tensors of so many data."""
        x = vectors(size, seed)
        near = x + 0.2 * vectors(size, seed + 100)
        if self.name in ("pair", "hib"):
            return {"x": x, "other": near}
        if self.candidates:
            rest = [vectors(size, seed + 100 + one) - x for one in range(1, self.candidates)]
            return {"x": x, "candidates": torch.stack([near, *rest], 1)}
        return {"x": x}

    def outcomes(self, model):
        """Every value of y, and its probability, for one datum."""
        with torch.no_grad():
            p = self.truth(model, **{name: value[0] for name, value in self.covariates(1).items()})
        values = torch.arange(len(p), dtype=torch.float64)
        return (torch.eye(len(p), dtype=torch.float64) if self.arguments.get("form") == "categorical" else values), p


UNCERTAIN = {"start": 4.0, "widths": [8]}
MODELS = [
    *(Known("pair", m, pair_truth, {**UNCERTAIN, "concentration": 3.0}) for m in (2, 3)),
    Known("pair", 2, pair_truth, {**UNCERTAIN, "concentration": 3.0, "draws": 4}),
    Known("pair", 2, normal_pair_truth, {**UNCERTAIN, "concentration": 1.0, "posterior": "normal"}),
    *(Known("hib", m, hib_truth, {**UNCERTAIN, "slope": 4.0, "offset": -1.0}) for m in (2, 3)),
    Known("mcinfonce", 2, tuple_truth, {**UNCERTAIN, "start": 3.0, "concentration": 3.0}, 3),
    Known("mcinfonce", 2, tuple_truth, {**UNCERTAIN, "start": 3.0, "concentration": 3.0, "form": "categorical"}, 3),
    Known("mcinfonce", 3, tuple_truth, {**UNCERTAIN, "start": 2.0, "concentration": 2.0, "form": "categorical"}, 2),
    *(Known("elk", m, elk_truth, {**UNCERTAIN, "classes": 3}) for m in (2, 3)),
    *(Known("nivmf", m, nivmf_truth, {**UNCERTAIN, "classes": 3, "draws": 2}) for m in (2, 3)),
    Known("het-xl", 2, het_xl_truth, {"classes": 3, "rank": 1, "noise": 0.5}),
    Known("het-xl", 3, het_xl_truth, {"classes": 3, "rank": 2, "noise": 0.5}),
    Known("classifier", 3, classifier_truth, {"classes": 3}),
    Known("infonce", 3, infonce_truth, {"concentration": 3.0}, 3),
    Known("infonce", 3, infonce_truth, {"concentration": 3.0, "form": "categorical"}, 3),
]


def label(known):
    words = (known.arguments.get(word) for word in ("form", "posterior", "draws"))
    return "-".join(map(str, (known.name, known.latents, *filter(None, words))))


IDS = [label(known) for known in MODELS]
LATENT = [known for known in MODELS if known.name not in ("elk", "classifier", "infonce")]
LATENT_IDS = [name for known, name in zip(MODELS, IDS, strict=True) if known in LATENT]


def average(model, known, y, blocks=60, draws=100, of="bound"):
    """Means of p(y | z) over blocks of draws of z, `(block,)`: exp of the loss that is trained, with gradients."""
    covariates = {n: v.expand(blocks, *v.shape[1:]) for n, v in known.covariates(1).items()}
    observed = {"y": y.expand(blocks, *y.shape)}
    with cal.program.defaults(model, observed, torch.float64), seeded(11):
        terms = importance_weighted(model, cal.guides.prior(model), observed, blocks, covariates, draws)
    return getattr(terms, of).exp()


def assert_marginal(model, known, of="bound"):
    """The means agree with the truth, for all values of y."""
    values, p = known.outcomes(known.build())
    with torch.no_grad():
        for y, wanted in zip(values, p, strict=True):
            if known not in LATENT:
                assert float(average(model, known, y, 1, 1, "local")) == pytest.approx(wanted, rel=1e-6)
                continue
            found = average(model, known, y, of=of).numpy()
            error = found.std(ddof=1) / len(found) ** 0.5
            assert abs(found.mean() - wanted) < limit(len(p)) * error + 1e-6, (found.mean(), wanted, error)


@pytest.mark.parametrize("known", MODELS, ids=IDS)
def test_the_marginal_likelihood_is_that_of_quadrature(known):
    model = known.build()
    assert_marginal(model, known)
    assert known.outcomes(model)[1].sum() == pytest.approx(1, abs=1e-6)


DEFECTS = [
    pytest.param(known, defect, id=f"{name}-{defect}")
    for known, name in zip(MODELS, IDS, strict=True)
    if known.name in ("pair", "mcinfonce")
    for defect in ("k doubled", "constant of ten dimensions", "mean of logs")
    if known.name == "pair" or defect != "constant of ten dimensions"
]


@pytest.mark.parametrize(("known", "defect"), DEFECTS)
def test_a_planted_defect_is_caught(known, defect):
    model = known.build()
    if defect == "k doubled":
        model.k *= 2
    if defect == "constant of ten dimensions":
        model.latents = 10
    with pytest.raises(AssertionError):
        assert_marginal(model, known, "local" if defect == "mean of logs" else "bound")


# -- gradients ---------------------------------------------------------------------------------------------------------


def entries(known):
    """Weights by which p is differentiated: names, and which entry of each."""
    found = {"pair": ["embedding.direction.bias", "embedding.concentration.2.bias"]}
    found["mcinfonce"] = found["pair"]
    found["hib"] = [*found["pair"], "slope", "offset"]
    found["nivmf"] = [*found["pair"], "of_classes.directions", "of_classes.log_concentration"]
    found["het-xl"] = ["location.bias", "factor.bias", "diagonal.bias", "output.weight", "log_temperature"]
    return found[known.name]


def slope(known, y, name, step=1e-4):
    """The derivative of the true p(y | x) by the first entry of a weight, by central differences."""
    ends = []
    for sign in (1, -1):
        model = known.build()
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[0] += sign * step
        ends.append(known.outcomes(model)[1][y])
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("known", [one for one in LATENT if one.latents == 2], ids=lambda one: one.name)
def test_gradients_are_those_of_quadrature(known):
    model, names = known.build(), entries(known)
    weights = [dict(model.named_parameters())[name] for name in names]
    y = len(known.outcomes(model)[1]) - 1
    p = average(model, known, known.outcomes(model)[0][y])
    rows = [[g.reshape(-1)[0] for g in torch.autograd.grad(one, weights, retain_graph=True)] for one in p]
    found = torch.tensor(rows).numpy()
    error = found.std(0, ddof=1) / len(found) ** 0.5
    wanted = np.array([slope(known, y, name) for name in names])
    z = (found.mean(0) - wanted) / error
    assert (np.abs(z) < limit(len(names))).all(), (names, found.mean(0), wanted, z)
    assert (np.abs(wanted) > 3 * error).sum() >= len(names) / 2  # the test would see a missing term


# -- what is known in closed form --------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 10, 128])
@pytest.mark.parametrize("k", [0.5, 5.0, 20.0])
def test_the_constant_is_the_mean_over_uniform_directions(m, k):
    """E exp(k zᵀz′) over uniform z′ = C(0)/C(k), from the density of the cosine w, (1 − w²)^((m − 3)/2)."""
    top, rest = (
        quad(lambda a, t=t: math.sin(a) ** (m - 2) * math.exp(t * (math.cos(a) - 1)), 0, math.pi, epsabs=1e-14)[0]
        for t in (k, 0.0)
    )
    mean = top / rest * math.exp(k)
    assert -match_constant(m, k) == pytest.approx(math.log(mean), abs=1e-8)
    assert -match_constant(m + 1, k) != pytest.approx(math.log(mean), abs=1e-6)


def at_concentration(log_start):
    model = MODELS[1].build()
    with torch.no_grad():
        model.embedding.log_start.fill_(log_start)
        model.embedding.concentration[2].weight.zero_()
    return model


def test_a_pair_of_known_directions_matches_with_the_odds_of_two_von_mises_fisher_densities():
    model, known = at_concentration(25.0), MODELS[1]
    x, other = known.covariates(1).values()
    with torch.no_grad():
        cosine = float((model.embedding(x)[0] * model.embedding(other)[0]).sum())
        p = average(model, known, torch.tensor(1.0).double(), 1, 10)
    odds = np.exp(log_c(3, 3.0) + 3.0 * cosine - log_c(3, 0.0))
    assert float(p) == pytest.approx(odds / (1 + odds), abs=1e-4)


def test_a_pair_without_directions_matches_with_a_probability_in_closed_form():
    """On the sphere the cosine of uniform directions is uniform on [−1, 1]."""
    model, known = at_concentration(-25.0), MODELS[1]
    k, c = 3.0, float(log_c(3, 3.0) - log_c(3, 0.0))
    wanted = (np.logaddexp(0, k + c) - np.logaddexp(0, c - k)) / (2 * k)
    with torch.no_grad():
        found = average(model, known, torch.tensor(1.0).double()).numpy()
    error = found.std(ddof=1) / len(found) ** 0.5
    assert abs(found.mean() - wanted) < limit(1) * error
    assert abs(found.mean() - expit(c)) > limit(1) * error


# -- simulation --------------------------------------------------------------------------------------------------------

SIMULATED = [pair for pair in zip(MODELS, IDS, strict=True) if pair[0].name in ("pair", "mcinfonce", "elk")]


@pytest.mark.parametrize("known", [known for known, _ in SIMULATED], ids=[name for _, name in SIMULATED])
def test_simulated_data_follow_the_truth(known):
    size, model = 4000, known.build()
    covariates = {name: value.expand(size, *value.shape[1:]) for name, value in known.covariates(1).items()}
    values, p = known.outcomes(model)
    y = cal.program.sample_prior(model, size, covariates, seed=2)["y"]
    for one, wanted in zip(values, p, strict=True):
        share = float((y == one).reshape(size, -1).all(1).double().mean())
        assert abs(share - wanted) < limit(len(p)) * (wanted * (1 - wanted) / size) ** 0.5


def test_the_elbo_of_nivmf_is_the_mean_log_probability_given_its_draws():
    known = next(one for one in MODELS if one.name == "nivmf" and one.latents == 2)
    model, points_and_weights = known.build(), grid(2)
    with torch.no_grad():
        p = mass(model.embedding, known.covariates(1)["x"][0], *points_and_weights)
        f = nivmf_densities(model, points_and_weights[0])
        both = f[:, None] + f[None]
        wanted = np.einsum("a,b,aby->y", p, p, np.log(both / both.sum(-1, keepdims=True)))
        ys = [torch.tensor(float(y)).double() for y in range(3)]
        found = np.stack([average(model, known, y, of="local").log().numpy() for y in ys])
        error = found.std(1, ddof=1) / found.shape[1] ** 0.5
        assert (np.abs(found.mean(1) - wanted) < limit(3) * error).all()
        assert (np.abs(found.mean(1) - np.log(known.outcomes(model)[1])) > limit(3) * error).any()  # not log E p


@pytest.mark.parametrize("name", ["nivmf", "het-xl"])
def test_class_probabilities_average_many_draws(name):
    known = next(one for one in MODELS if one.name == name and one.latents == 2)
    model, x = known.build(), known.covariates(1)["x"]
    points, weights = grid(2)
    with torch.no_grad():
        f = mass(model.embedding, x[0], points, weights) @ nivmf_densities(model, points) if name == "nivmf" else 0
        wanted = f / f.sum() if name == "nivmf" else known.outcomes(model)[1]
    found = np.stack([model.class_probabilities(x, draws=2000, seed=seed)[0].numpy() for seed in range(12)])
    error = found.std(0, ddof=1) / len(found) ** 0.5
    assert (np.abs(found.mean(0) - wanted) < 7 * error + 1e-4).all()  # Student's t with 11 degrees of freedom


# -- forms that are no density -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["url", "url-with-ones"])
@pytest.mark.parametrize("name", ["mcinfonce", "infonce"])
def test_the_loss_of_url_is_trained_and_refused_elsewhere(name, form):
    known = next(one for one in MODELS if one.name == name)
    model = small(name, 2, form=form, concentration=3.0)
    data = cal.data.Data({"y": torch.ones(40)}, {n: v.float() for n, v in known.covariates(40).items()})
    model = model.float()
    guide = cal.guides.prior(model)
    assert model.loss_kind == "none"
    cal.inference.fit(model, guide, data, objective="iwae", particles=2, epochs=1, batch_size=20)
    for refused in (
        lambda: cal.inference.posterior(model, guide, data, draws=2),
        lambda: cal.inference.reference(model, data),
        lambda: cal.evaluation.check(model, guide, data),
    ):
        with pytest.raises(CalibrantError, match=r"training loss and no density.*choose form='published'"):
            refused()


def test_the_loss_of_url_by_hand():
    t, one = torch.tensor([[1.0, 0.5, -0.5]]), torch.ones(1)
    first, rest = math.e, math.e**0.5 + math.e**-0.5
    for form, mean, y, wanted in (
        ("url", True, one, first / rest),
        ("url-with-ones", True, one, (first + 1) / (rest + 1)),
        ("published", True, one, first / (first + rest / 2)),
        ("published", False, one, first / (first + rest)),
        ("categorical", True, torch.eye(3)[:1], first / (first + rest)),
    ):
        assert float(of_tuple(form, t, mean).log_prob(y)) == pytest.approx(math.log(wanted))
