"""What the tables of the σ-VAE say in sentences: numbers with their errors, and nothing that was not computed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

import calibrant as cal
from calibrant.reproductions.cells import EACH, Cell
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary, table
from calibrant.reproductions.papers.sigma_vae import BETAS, BOUND
from calibrant.reproductions.registering import experiment
from calibrant.reproductions.sigma_courses import sigma_of

FAILED = Cell("", failed="NonFiniteLoss: planted")
RNG = np.random.default_rng(0)
HARD = RNG.normal(0, 30, 200)  # how hard each test image is for every row


def cell(bound: float, arrays: Mapping[str, Any] | None = None, **numbers: float) -> Cell:
    each = bound + HARD + RNG.normal(0, 1, 200)
    found = {BOUND: float(each.mean()), "rate": 10.0, "distortion": bound - 10.0, "σ": 0.1, "Fréchet": 1.0}
    return Cell("", {**found, **numbers}, {BOUND: stats.sem(each)}, arrays={BOUND + EACH: each, **(arrays or {})})


def found_in(name: str, cells: Mapping[str, Cell]) -> Found:
    card = experiment("sigma-vae", name)
    return Found(card, {(row, 0): each for row, each in cells.items()}, (0,), True, {})


def sweep(failed: tuple[float, ...] = (), **numbers: float) -> Summary:
    ceilings = {"ceiling": np.array([5.3]), "classifier ceiling": np.array([3.3])}
    cells = {
        f"β = {beta:g}": FAILED
        if beta in failed
        else cell(100 + beta, ceilings, **{"negative validation ELBO": 100 + beta, **numbers})
        for beta in BETAS
    }
    found = found_in("beta-sweep", {**cells, "shared σ": cell(90.0), "optimal σ": FAILED})
    assert table(found, found.card.summarise(found))
    return found.card.summarise(found)


def test_the_best_beta_is_one_that_did_not_fail():
    first = sweep(failed=(0.001, 0.01)).sentences[0]
    assert "finds β = 0.1 best on validation data" in first
    # the error of the difference image by image; those of the two means are 2 nats
    assert re.search(r"that of the learned σ by 10\.\d+ ± 0\.[01]\d* nats", first)


def test_the_split_is_called_unknown_only_where_it_is():
    unknown = sweep(failed=(10.0,)).sentences[2]
    assert "for 0 of 4 values of β; the others" in unknown
    assert "(log N, 5.3 nats here)" in unknown
    assert "ceiling too, 3.3 nats here) finds" in unknown
    known = sweep(**{"mutual information": 3.0, "marginal KL": 7.0}).sentences[2]
    assert "for 5 of 5 values of β. A classifier" in known
    assert "others" not in known


def test_the_best_decoder_is_one_with_a_bound_and_is_compared_with_the_next():
    card = experiment("sigma-vae", "decoders")
    every = dict.fromkeys(card.rows, FAILED)
    nothing = found_in("decoders", every)
    assert not any("the best bound" in sentence for sentence in card.summarise(nothing).sentences)
    two = {
        row: cell(value, **{"of grey values": value})
        for row, value in (("bitwise categorical", 3.0), ("shared σ", 2.0))
    }
    sentences = card.summarise(found_in("decoders", {**every, **two})).sentences
    assert sum("best bound is that of shared σ, 2 nats" in sentence for sentence in sentences) == 1
    assert sum("the next one, bitwise categorical" in sentence for sentence in sentences) == 1


def test_numbers_are_judged_for_images_of_the_size_that_they_fit_alone():
    """The paper's unit Gaussian has 726 nats; 28×28 values cannot have less than 720, and 28×20 not less than 515."""
    card = experiment("sigma-vae", "decoders")
    assert all(needs.options["size"] == 28 for needs in card.needs)
    cells = {("Gaussian, σ = 1", 0): cell(722.0)}
    rows = [table(Found(card, cells, (0,), quick, {}), Summary()) for quick in (False, True)]
    full, quick = (next(row for row in found if row["paper"] == 726.4) for found in rows)
    assert (full["answer"], full["not_reproduced_because"]) == ("reached", "")
    assert (quick["answer"], quick["not_reproduced_because"]) == ("", "this is a quick run")


@pytest.mark.parametrize(("name", "sds"), [("discretised-gaussian", 1.0), ("discretised-logistic", math.pi / 3**0.5)])
def test_the_noise_of_all_decoders_is_a_standard_deviation(name, sds):
    model = cal.models.create("vae", shape=(1, 4, 4), latents=2, likelihood={"name": name, "scale": 0.1})
    assert sigma_of(model)["σ"] == pytest.approx(0.1 * sds)


def test_contrast_is_followed_in_the_exact_posterior_of_a_linear_model(tmp_path):
    card = experiment("sigma-vae", "contrast")
    splits = cal.data.load("natural-patches", size=12)
    few = {
        name: part.select(["x"])[np.arange(count)]
        for (name, part), count in zip(splits.items(), (300, 40, 40), strict=True)
    }
    settings = {**card.settings, "epochs": 1, "images": 2}
    row = "VAE, learned σ"
    context = Context(card, row, 0, {"natural-patches": few}, {}, settings, True, "cpu", tmp_path)
    numbers = card.cell(context, row, 0)
    assert numbers["sd at high contrast"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["decoders", "beta-sweep", "sharing", "sigma-over-steps", "cifar10"])
def test_every_row_has_a_model_with_the_papers_network(name):
    """A likelihood may need an output that the convolutional decoder cannot return."""
    shape = (3 if name == "cifar10" else 1, 8, 8)
    for given in experiment("sigma-vae", name).rows.values():
        options = {"likelihood": given["likelihood"]} if "likelihood" in given else {}
        network = {"name": "sigma-vae", "width": 1}
        cal.models.create(given.get("model", "vae"), shape=shape, latents=2, decoder=network, **options)
