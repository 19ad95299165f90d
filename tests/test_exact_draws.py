"""Draws of exact posteriors, and whether a structure is the program's."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from linear_gaussian_truth import (
    PRIORS,
    dense_posterior,
    each_prior,
    generator,
    gsm,
    normal,
    program_density,
)
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.inference.references import exact
from calibrant.inference.references.exact import ExactPosterior, solve
from calibrant.linear_gaussian.density import log_joint, verify
from calibrant.linear_gaussian.parameters import join

# Draws


def assert_draws_match(posterior: ExactPosterior, x: Tensor, draws: dict[str, Tensor]) -> None:
    """Mean and sd of every coordinate, and 5/50/95% quantiles of s, within Monte Carlo error; draws are i.i.d.

    With N draws it sees, with 95% power, a shift of about 6.6 / sqrt(N) posterior sd.
    """
    scores = []
    for site, values in draws.items():
        values = values.flatten(0, 1)
        count = len(values)
        scaled = (values - posterior.mean[site]) / posterior.sd[site]
        scores.append(scaled.mean(0).flatten() * math.sqrt(count))
        kurtosis = (scaled - scaled.mean(0)).pow(4).mean(0) / scaled.var(0) ** 2
        scores.append(((scaled.std(0) - 1) / (scaled.std(0) * ((kurtosis - 1) / (4 * count)).sqrt())).flatten())
    for datum, row in enumerate(x):
        s = draws["s"][:, :, datum].flatten()
        truth = dense_posterior(posterior.structure, row, low=-12.0, nodes=20001)
        for level in (0.05, 0.5, 0.95):
            quantile = float(np.interp(level, truth["cdf"].numpy(), truth["s"].numpy()))
            error = math.sqrt(level * (1 - level) / len(s))
            scores.append(((s < quantile).double().mean()[None] - level) / error)
    score = torch.cat(scores).abs()
    assert score.max() < limit(len(score)), f"{score.max():.1f} standard errors"


def drawn(count: int, data: int = 3, latents: int = 4) -> tuple[ExactPosterior, Tensor, dict[str, Tensor]]:
    structure = gsm(3, latents, PRIORS["lognormal"])
    x = torch.cat([structure.offset[None], 2 * normal(5, 3, seed=6)])[:data]
    posterior = solve(structure, x)
    return posterior, x, posterior.sample(4, count, 11)


def test_draws_agree_with_the_exact_posterior():
    posterior, x, draws = drawn(1000)
    assert draws["s"].shape == (4, 1000, 3)
    assert draws["z"].shape == (4, 1000, 3, 4)
    assert_draws_match(posterior, x, draws)
    centred = draws["z"][:, :, 1].flatten(0, 1) - posterior.mean["z"][1]
    covariance, sd = centred.T @ centred / 4000, posterior.sd["z"][1]
    assert ((covariance - posterior.covariance(1)) / sd / sd[:, None]).abs().max() < 5.5 * math.sqrt(2 / 4000) * 1.5


def test_narrow_draws_are_caught():
    posterior, x, draws = drawn(1000)
    narrow = draws | {"z": posterior.mean["z"] + 0.9 * (draws["z"] - posterior.mean["z"])}
    with pytest.raises(AssertionError, match="standard errors"):
        assert_draws_match(posterior, x, narrow)


def test_the_inverse_distribution_function_has_no_visible_error():
    """A million draws see .007 sd; half the resolution and a shift by one of its cells are caught."""
    posterior, x, draws = drawn(250_000, data=1, latents=1)
    assert_draws_match(posterior, x, draws)
    grid = posterior._grid
    step = 2 * grid.step
    shifted = grid._replace(step=step, start=grid.start + step, log_density=grid.log_density[:, ::2])
    with pytest.raises(AssertionError, match="standard errors"):
        assert_draws_match(posterior, x, replace(posterior, _grid=shifted).sample(4, 250_000, 11))


def test_draws_follow_the_seed_and_not_the_chunks(monkeypatch):
    posterior, _, draws = drawn(50)
    monkeypatch.setitem(exact._CHUNK_ELEMENTS, "cpu", 1)
    again, from_generator = posterior.sample(4, 50, 11), posterior.sample(4, 50, generator(11))
    for site, values in draws.items():
        torch.testing.assert_close(again[site], values, rtol=1e-8, atol=1e-8)
        assert torch.equal(from_generator[site], again[site])
        assert not torch.equal(posterior.sample(4, 50, 12)[site], again[site])


def test_draws_without_a_scale():
    structure = gsm(3, 2)
    posterior = solve(structure, normal(2, 3, seed=1))
    draws = posterior.sample(4, 2500, 0)
    assert set(draws) == set(posterior.mean) == {"z"}
    score = (draws["z"].mean((0, 1)) - posterior.mean["z"]) / posterior.sd["z"] * 100
    assert score.abs().max() < limit(4)
    error = (draws["z"].flatten(0, 1).std(0) / posterior.sd["z"] - 1) * math.sqrt(2 * 10_000)
    assert error.abs().max() < limit(4)


def test_several_sites_are_one_block():
    """Moments and draws of a scalar, a matrix and a vector are the parts of those of one vector."""
    whole = gsm(6, 8, PRIORS["lognormal"])
    parts = replace(whole, latents={"a": (), "b": (2, 2), "c": (3,)})
    x = normal(5, 6, seed=1)
    one, other = solve(whole, x), solve(parts, x)
    found = [other.mean, other.sd, other.sample(2, 7, 0)]
    for together, apart in zip([one.mean, one.sd, one.sample(2, 7, 0)], found, strict=True):
        assert list(apart) == ["a", "b", "c", "s"]
        lead = apart["s"].shape
        assert apart["b"].shape == (*lead, 2, 2)
        assert torch.equal(torch.cat([apart[name].reshape(*lead, -1) for name in "abc"], -1), together["z"])
    verify(parts, lambda values: program_density(whole, {**values, "z": join(values, parts.latents)}), x, generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    structure = gsm(16, 8, PRIORS["softplus-laplace"])
    x = 3 * normal(20, 16, seed=1)
    cpu, gpu = solve(structure, x), solve(structure, x.cuda())
    assert gpu.log_evidence.is_cuda
    torch.testing.assert_close(gpu.log_evidence.cpu(), cpu.log_evidence, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gpu.sd["z"].cpu(), cpu.sd["z"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gpu.sample(2, 5, 0)["s"].cpu(), cpu.sample(2, 5, 0)["s"], rtol=1e-5, atol=0)
    drawn_there = gpu.sample(4, 1000, torch.Generator("cuda").manual_seed(0))
    assert_draws_match(cpu, x, {site: values.cpu() for site, values in drawn_there.items()})
    verify(structure, partial(log_joint, structure), x.cuda(), generator())


# Whether a structure is the program's


@each_prior
def test_verify_accepts_the_programs_own_structure(prior):
    structure = gsm(4, 3, prior)
    state = torch.random.get_rng_state()
    verify(structure, partial(log_joint, structure), normal(2, 4), generator())
    assert torch.equal(torch.random.get_rng_state(), state)
    if not prior.batch_shape:
        verify(structure, partial(program_density, structure), normal(2, 2, 2), generator())


def test_verify_accepts_bounded_and_improper_scales_and_none():
    bounded = dist.Uniform(torch.tensor(0.5).double(), torch.tensor(2.0).double())
    improper = dist.ImproperUniform(torch.distributions.constraints.positive, (), ())
    for prior in (None, bounded, improper):
        structure = gsm(4, 3, prior)
        verify(structure, partial(program_density, structure), normal(2, 4), generator())


def nudged(value: Tensor) -> Tensor:
    """One entry changed by a thousandth."""
    change = torch.zeros_like(value)
    change.view(-1)[-1] = 1e-3
    return value + change


DEFECTS = {
    "noise": lambda structure: {"noise": structure.noise * 1.001},
    "one noise": lambda structure: {"noise": nudged(structure.noise)},
    "loading": lambda structure: {"loading": nudged(structure.loading)},
    "offset": lambda structure: {"offset": nudged(structure.offset)},
    "no shift": lambda structure: {"shift": None},
    "mean": lambda structure: {"mean": nudged(structure.mean)},
    "covariance": lambda structure: {"covariance": nudged(structure.covariance)},
    "prior": lambda structure: {"scale_prior": dist.LogNormal(0.0, torch.tensor(1.001).double())},
    "no prior": lambda structure: {"scale_prior": dist.HalfNormal(1.0)},
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_verify_refuses_another_structure(defect):
    structure = gsm(40, 20, PRIORS["lognormal"])
    wrong = replace(structure, **defect(structure))
    with pytest.raises(InferenceError, match=r"is not the program's.*differ by up to"):
        verify(wrong, partial(program_density, structure), 1e3 * normal(2, 40), generator())


def test_verify_refuses_densities_that_are_not_one_number_a_point():
    structure = gsm(4, 3, PRIORS["lognormal"])
    for density, message in [(torch.zeros(()), "shape"), (torch.full((64,), math.nan), "differ")]:
        with pytest.raises(InferenceError, match=message):
            verify(structure, lambda values, density=density: density, normal(2, 4), generator())
