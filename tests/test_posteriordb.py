"""Batched NUTS on posteriordb: programs, their densities checked against independent ones, draws against its draws.

The database (Magnusson, Bürkner & Vehtari, https://github.com/stan-dev/posteriordb) is read from
`$CALIBRANT_DATA/posteriordb`, in the layout of its `posterior_database`; without the folder all of this is skipped.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import assert_agrees, from_draws
from pyro.distributions import constraints
from scipy import linalg, stats

import calibrant as cal

ROOT = Path(os.environ.get("CALIBRANT_DATA", "")) / "posteriordb"
pytestmark = pytest.mark.skipif(not (ROOT / "posteriors").is_dir(), reason="needs posteriordb in $CALIBRANT_DATA")

Draws = dict[str, np.ndarray]


@dataclass
class Posterior:
    """A posterior of the database as a program under the contract, and its density written a second time.

    `latents` computes the program's latents from one reference draw; `log_density` is its density on that space, up to
    a constant.
    """

    program: Callable[..., Any]
    observed: dict[str, torch.Tensor]
    latents: Callable[[Draws], Draws]
    log_density: Callable[[Draws], float]
    covariates: dict[str, torch.Tensor] = field(default_factory=dict)
    discrete: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def unzipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def given(name: str) -> dict[str, Any]:
    values = unzipped(ROOT / "data" / "data" / f"{name}.json.zip")
    return {key: np.array(value, dtype=float) if isinstance(value, list) else value for key, value in values.items()}


def reference_draws(name: str) -> Draws:
    """Draws `(chain, draw, …)` by parameter; those of vectors are gathered from `beta[1]`, `beta[2]`, ….

    Parameters of one posterior (and of every datum, where they are local) have no further dimension.
    """
    chains = unzipped(ROOT / "reference_posteriors" / "draws" / "draws" / f"{name}.json.zip")
    flat = {key: np.array([chain[key] for chain in chains]) for key in chains[0]}
    names = list(dict.fromkeys(key.partition("[")[0] for key in flat))
    found = {}
    for each in names:
        entries = [flat[key] for key in flat if key.partition("[")[0] == each]
        found[each] = entries[0] if each in flat else np.stack(entries, -1)
    return found


def tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def unchanged(draw: Draws) -> Draws:
    return draw


def flat(size: int) -> Any:
    """An improper flat prior of a shared vector."""
    return dist.ImproperUniform(constraints.independent(constraints.real, 1), (), (size,))


# -- regressions -------------------------------------------------------------------------------------------------------


def regression(y: np.ndarray, design: np.ndarray, beta: Any, sigma: Any, prior: Callable[[Draws], float]) -> Posterior:
    """Linear regression; `beta` and `sigma` are the priors, `prior` their log density."""

    def program(size, design):
        b = pyro.sample("beta", beta)
        s = pyro.sample("sigma", sigma)
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(design @ b, s))

    def log_density(draw: Draws) -> float:
        return prior(draw) + stats.norm(design @ draw["beta"], draw["sigma"]).logpdf(y).sum()

    return Posterior(program, {"y": tensor(y)}, unchanged, log_density, {"design": tensor(design)})


def flat_scale() -> Any:
    return dist.ImproperUniform(constraints.positive, (), ())


def columns(*values: Any) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*values), 1)


def no_prior(draw: Draws) -> float:
    return 0.0


def cauchy_scale(draw: Draws) -> float:
    return float(stats.cauchy(0, 2.5).logpdf(draw["sigma"]))


def earn_height() -> Posterior:
    d = given("earnings")
    return regression(d["earn"], columns(1.0, d["height"]), flat(2), flat_scale(), no_prior)


def kidscore_momiq() -> Posterior:
    d = given("kidiq")
    return regression(d["kid_score"], columns(1.0, d["mom_iq"]), flat(2), dist.HalfCauchy(2.5), cauchy_scale)


def kidscore_interaction() -> Posterior:
    d = given("kidiq")
    design = columns(1.0, d["mom_hs"], d["mom_iq"], d["mom_hs"] * d["mom_iq"])
    return regression(d["kid_score"], design, flat(4), dist.HalfCauchy(2.5), cauchy_scale)


def nes() -> Posterior:
    d = given("nes1996")
    ages = [d["age_discrete"] == group for group in (2, 3, 4)]
    design = columns(1.0, d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"])
    return regression(d["partyid7"], design, flat(9), flat_scale(), no_prior)


def blr() -> Posterior:
    d = given("sblrc")

    def prior(draw: Draws) -> float:
        return float(stats.norm(0, 10).logpdf(draw["beta"]).sum() + stats.norm(0, 10).logpdf(draw["sigma"]))

    return regression(d["y"], d["X"], dist.Normal(0.0, 10.0).expand([5]).to_event(1), dist.HalfNormal(10.0), prior)


def autoregression() -> Posterior:
    d = given("arK")
    y, order = d["y"], d["K"]
    lags = np.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], 1)

    def program(size, lags):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma))

    def log_density(draw: Draws) -> float:
        prior = stats.norm(0, 10).logpdf([draw["alpha"], *draw["beta"]]).sum() + cauchy_scale(draw)
        mean = [draw["alpha"] + sum(draw["beta"][k] * y[t - k - 1] for k in range(order)) for t in range(order, len(y))]
        return prior + stats.norm(mean, draw["sigma"]).logpdf(y[order:]).sum()

    return Posterior(program, {"y": tensor(y[order:])}, unchanged, log_density, {"lags": tensor(lags)})


# -- the others --------------------------------------------------------------------------------------------------------


def eight_schools(centred: bool) -> Posterior:
    d = given("eight_schools")

    def program(size, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", size):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = pyro.deterministic("theta", mu + tau * pyro.sample("z", dist.Normal(0.0, 1.0)))
            pyro.sample("y", dist.Normal(theta, sigma))

    def latents(draw: Draws) -> Draws:
        school = {"theta": draw["theta"]} if centred else {"z": (draw["theta"] - draw["mu"]) / draw["tau"]}
        return {"mu": draw["mu"], "tau": draw["tau"], **school}

    def log_density(draw: Draws) -> float:
        prior = stats.norm(0, 5).logpdf(draw["mu"]) + stats.cauchy(0, 5).logpdf(draw["tau"])
        school = stats.norm(draw["mu"], draw["tau"]).logpdf(draw["theta"]).sum()
        wider = 0.0 if centred else 8 * np.log(draw["tau"])  # density of z, not of theta
        return prior + school + wider + stats.norm(draw["theta"], d["sigma"]).logpdf(d["y"]).sum()

    return Posterior(program, {"y": tensor(d["y"])}, latents, log_density, {"sigma": tensor(d["sigma"])})


def garch() -> Posterior:
    """One datum, a series; α₁ + β₁ < 1 by β₁ = b (1 − α₁) with b in (0, 1)."""
    d = given("garch")
    y, first = d["y"], d["sigma1"]

    def program(size, past):
        with pyro.plate("data", size):
            mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (size,), ()))
            alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (size,), ()))
            alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
            share = pyro.sample("share", dist.Uniform(0.0, 1.0))
            pyro.factor("jacobian", (1 - alpha1).log())
            beta1 = pyro.deterministic("beta1", share * (1 - alpha1))
            variance = [torch.full_like(mu, first**2)]
            for value in past.unbind(1):
                variance.append(alpha0 + alpha1 * (value - mu) ** 2 + beta1 * variance[-1])
            pyro.sample("y", dist.Normal(mu[:, None], torch.stack(variance, 1).sqrt()).to_event(1))

    def latents(draw: Draws) -> Draws:
        alone = {name: draw[name] for name in ("mu", "alpha0", "alpha1")}
        return {**alone, "share": draw["beta1"] / (1 - draw["alpha1"])}

    def log_density(draw: Draws) -> float:
        sigma, total = first, 0.0
        for t, value in enumerate(y):
            if t:
                shock, before = draw["alpha1"] * (y[t - 1] - draw["mu"]) ** 2, draw["beta1"] * sigma**2
                sigma = np.sqrt(draw["alpha0"] + shock + before)
            total += stats.norm(draw["mu"], sigma).logpdf(value)
        return float(total + np.log(1 - draw["alpha1"]))

    return Posterior(program, {"y": tensor(y[None])}, latents, log_density, {"past": tensor(y[None, :-1])})


def gp_poisson() -> Posterior:
    """One datum: counts at eleven places under a Gaussian process with squared-exponential covariance."""
    d = given("gp_pois_regr")
    place, count = d["x"], d["k"]

    def program(size):
        with pyro.plate("data", size):
            rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
            alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
            unit = pyro.sample("unit", dist.Normal(0.0, 1.0).expand([11]).to_event(1))
            at = tensor(place)
            apart = (at[:, None] - at) / rho.double()[:, None, None]
            covariance = (alpha.double() ** 2)[:, None, None] * (-0.5 * apart**2).exp() + 1e-10 * torch.eye(11).double()
            f = (torch.linalg.cholesky(covariance) @ unit.double()[:, :, None])[..., 0].to(unit.dtype)
            pyro.sample("k", dist.Poisson(pyro.deterministic("f", f).exp()).to_event(1))

    def factor(draw: Draws) -> np.ndarray:
        shape = np.exp(-((place[:, None] - place) ** 2) / (2 * draw["rho"] ** 2))
        return np.linalg.cholesky(draw["alpha"] ** 2 * shape + 1e-10 * np.eye(11))

    def latents(draw: Draws) -> Draws:
        unit = linalg.solve_triangular(factor(draw), draw["f"], lower=True)
        return {"rho": draw["rho"], "alpha": draw["alpha"], "unit": unit}

    def log_density(draw: Draws) -> float:
        scales = stats.gamma(25, scale=1 / 4).logpdf(draw["rho"]) + stats.norm(0, 2).logpdf(draw["alpha"])
        unit = stats.norm.logpdf(latents(draw)["unit"]).sum()
        return float(scales + unit + stats.poisson(np.exp(draw["f"])).logpmf(count).sum())

    hard = {"dense": True, "target_accept": 0.99, "draws": 2000}  # where rho is small, longer steps diverge
    return Posterior(program, {"k": tensor(count[None])}, latents, log_density, settings=hard)


def gaussian_mixture() -> Posterior:
    """Two components in order; the component of each of 1,000 data is a latent that is summed out."""
    y = given("low_dim_gauss_mix")["y"]

    def program(size):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
        pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        with pyro.plate("data", size):
            component = pyro.sample("component", dist.Bernoulli(1 - theta))
            second = component > 0
            pyro.sample("y", dist.Normal(torch.where(second, mu[1], mu[0]), torch.where(second, sigma[1], sigma[0])))

    def log_density(draw: Draws) -> float:
        prior = stats.norm(0, 2).logpdf([*draw["mu"], *draw["sigma"]]).sum() + stats.beta(5, 5).logpdf(draw["theta"])
        parts = stats.norm(draw["mu"], draw["sigma"]).pdf(y[:, None]) @ [draw["theta"], 1 - draw["theta"]]
        return float(prior + np.log(parts).sum())

    return Posterior(program, {"y": tensor(y)}, unchanged, log_density, discrete=("component",))


POSTERIORS: dict[str, tuple[str, Callable[[], Posterior]]] = {
    "arK-arK": ("arK-arK", autoregression),
    "earnings-earn_height": ("earnings-earn_height", earn_height),
    "eight_schools-eight_schools_centered": (
        "eight_schools-eight_schools_noncentered",
        lambda: eight_schools(centred=True),
    ),
    "eight_schools-eight_schools_noncentered": (
        "eight_schools-eight_schools_noncentered",
        lambda: eight_schools(centred=False),
    ),
    "garch-garch11": ("garch-garch11", garch),
    "gp_pois_regr-gp_pois_regr": ("gp_pois_regr-gp_pois_regr", gp_poisson),
    "kidiq-kidscore_interaction": ("kidiq-kidscore_interaction", kidscore_interaction),
    "kidiq-kidscore_momiq": ("kidiq-kidscore_momiq", kidscore_momiq),
    "low_dim_gauss_mix-low_dim_gauss_mix": ("low_dim_gauss_mix-low_dim_gauss_mix", gaussian_mixture),
    "nes1996-nes": ("nes1996-nes", nes),
    "sblrc-blr": ("sblrc-blr", blr),
}


def test_every_posterior_of_the_database_is_here() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in (ROOT / "posteriors").glob("*.json")}
    wanted = {name: entry["reference_posterior_name"] for name, entry in found.items()}
    assert wanted == {name: draws for name, (draws, _) in POSTERIORS.items()}


def program_density(posterior: Posterior, draw: Draws) -> float:
    """Of the program, its discrete latents summed out; of a single datum, all latents are local."""
    size = len(next(iter(posterior.observed.values())))
    values = {name: tensor(value) for name, value in posterior.latents(draw).items()}
    values = {name: value[None] if size == 1 else value for name, value in values.items()}
    terms = []
    for setting in range(1 + len(posterior.discrete)):
        chosen = {name: torch.full((size,), setting, dtype=torch.float64) for name in posterior.discrete}
        held = {**values, **posterior.observed, **chosen}
        terms.append(cal.program.log_density(posterior.program, held, size, posterior.covariates))
    local = torch.logsumexp(torch.stack([term.local for term in terms]), 0)
    return float(terms[0].shared + local.sum())


@pytest.mark.parametrize("name", POSTERIORS)
def test_program_has_the_density_of_the_posterior(name: str) -> None:
    draws_name, make = POSTERIORS[name]
    posterior, draws = make(), reference_draws(draws_name)
    some = [{key: value[c, d] for key, value in draws.items()} for c, d in [(i, 37 * i + 5) for i in range(10)]]
    difference = [program_density(posterior, draw) - posterior.log_density(draw) for draw in some]
    spread = np.std([posterior.log_density(draw) for draw in some])
    np.testing.assert_allclose(difference, np.mean(difference), atol=1e-5 * spread)


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTERIORS)
def test_draws_agree_with_the_reference_draws(name: str) -> None:
    draws_name, make = POSTERIORS[name]
    posterior, draws = make(), reference_draws(draws_name)
    tree = cal.inference.reference(
        posterior.program,
        posterior.observed,
        method="nuts",
        covariates=posterior.covariates,
        seed=1,
        **posterior.settings,
    )
    assert bool(tree["convergence"]["is_reference"].all()), tree["convergence"]["reason"].values
    found = tree["posterior"].dataset
    one_datum = found.sizes.get("data") == 1
    values = {key: (found[key].squeeze("data") if one_datum else found[key]).values for key in draws}
    assert_agrees(values, {key: from_draws(value) for key, value in draws.items()})
