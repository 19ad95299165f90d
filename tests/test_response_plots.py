"""Figures of interpolation, divisive normalisation, bow ties and fields, and the example of their page."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from contrast_models import ExactGuide, PlainGuide, flat, images, model

import calibrant as cal
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import (
    bow_tie,
    bow_tie_figure,
    class_pairs,
    divisive_figure,
    divisive_normalisation,
    fields_figure,
    interpolation_experiment,
    interpolation_figure,
    label_read_out,
)

PAGE = Path(__file__).parents[1] / "docs/uncertainty.md"


def labels_of(figure):
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


@pytest.fixture(scope="module")
def between():
    target, x = model("ea-vae"), images(8)["x"]
    options = {"steps": 5, "reference_steps": 5, "reference_pairs": 2, "draws": 50, "chains": 1}
    return interpolation_experiment(target, ExactGuide(target), {"x": x[:4]}, {"x": x[4:]}, **options)


def test_interpolation_has_the_prior_as_a_line_and_units(between):
    figure = interpolation_figure({"EA-VAE": between, "costs $": between})
    left, right = figure.axes
    assert any(line.get_label() == "prior" and set(line.get_ydata()) == {1.0} for line in left.lines)
    assert left.get_ylabel() == "posterior sd / prior sd, mean over pairs"
    shown = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    assert list(shown) == ["EA-VAE, guide", r"costs \$, guide", "prior", "EA-VAE, exact", r"costs \$, exact"]
    drawn = between["posterior_sd"].sel(source="amortized").mean("pair").values
    assert shown["EA-VAE, guide"].get_ydata() == pytest.approx(drawn)
    assert right.get_xlabel() == "vertex in ½ ± t"
    entropy = between.assign(label_entropy=between["posterior_sd"])
    assert labels_of(interpolation_figure({"EA-VAE": entropy}))[2][1] == "entropy of the labels (nats)"
    with pytest.raises(InferenceError, match="nothing to draw"):
        interpolation_figure({})


def test_divisive_normalisation_and_bow_ties():
    generator = np.random.default_rng(0)
    linear = np.exp(generator.normal(size=(300, 1))) * generator.normal(size=(300, 4))
    fit = divisive_normalisation(linear, linear / np.sqrt(1 + (linear**2).mean(1, keepdims=True)), folds=2, epochs=10)
    figure = divisive_figure({"exact": fit, "guide": fit})
    assert labels_of(figure)[0][1] == "held-out explained variance"
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["exact", "guide"]
    ties = bow_tie_figure({"drives": bow_tie(linear), "means": bow_tie(linear)})
    assert ties.axes[0].get_title().startswith("drives\nflare ")
    for draw in (divisive_figure, bow_tie_figure):
        with pytest.raises(InferenceError, match="nothing to draw"):
            draw({})


def test_grids_of_fields_have_one_order():
    fields = np.zeros((5, 1, 4, 4))
    fields[3, 0, 0, 0] = 2.0  # the largest comes first
    fields[1, 0, 1, 1] = -1.0
    grid = xr.DataArray(fields, dims=("latent", "axis_0", "axis_1", "axis_2"))
    figure = fields_figure({"exact": grid, "guide": -0.1 * grid})
    ours, theirs = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert (ours[0, 0], ours[1, 6]) == (1.0, 0.0)
    assert (theirs[0, 0], theirs[1, 6]) == (0.0, 1.0)
    with pytest.raises(InferenceError, match="all of the same latents"):
        fields_figure({"exact": grid, "guide": grid[:3]})


def test_pairs_of_classes():
    labels = np.arange(40) % 4
    first, second = class_pairs(labels, each=3, seed=1)
    pairs = list(zip(labels[first].tolist(), labels[second].tolist(), strict=True))
    assert pairs == [(a, b) for a in range(4) for b in range(a + 1, 4) for _ in range(3)]
    assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == len(first)
    assert not np.array_equal(first, class_pairs(labels, each=3, seed=2)[0])
    with pytest.raises(InferenceError, match="two classes or more"):
        class_pairs(np.zeros(5))


def test_a_read_out_sees_what_latents_hold():
    """Images of two classes far apart in one latent: a guide that sees them is read, a blind one is not."""
    target, generator = model("vae"), torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    z = torch.randn(60, 5, generator=generator)
    z[:, 0] = 3.0 * labels - 1.5
    x = {"x": (z @ target.decoder.weight.detach().T).reshape(60, 1, 4, 4)}
    seeing = label_read_out(target, ExactGuide(target), x, labels, passes=40)
    assert seeing.right.mean() > 0.9
    blind = label_read_out(target, PlainGuide(flat(1.0), scale=False), x, labels, passes=10)
    assert blind.right.mean() < 0.8
    assert seeing.probabilities(np.zeros((2, 3, 5))).shape == (2, 3, 2)
    with pytest.raises(DataError, match="one whole number for each"):
        label_read_out(target, ExactGuide(target), x, labels[:9])


SHORTER = {
    "2000": "240",
    "[:500]": "[:40]",
    "draws=100": "draws=10",
    "fields(model, guide, test)": "fields(model, guide, test, draws=5)",
    "[20:40]})": "[20:40]}, steps=11, draws=50)",
    "experiment(model, guide, test)": "experiment(model, guide, test, draws=50)",
}


@pytest.mark.slow
def test_the_example_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = (block for block in blocks if "interpolation_experiment" in block)
    target = model("ea-vae")
    simulated = {"x": cal.program.sample_prior(target, 450, seed=2)["x"]}
    for long, short in SHORTER.items():
        assert long in block
        block = block.replace(long, short)
    names = {"cal": cal, "model": target, "guide": ExactGuide(target), "test": cal.data.Data(simulated)}
    exec(compile(block, str(PAGE), "exec"), names)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "between.png",
        "divisive.png",
        "bow_ties.png",
        "fields.png",
    }
    assert capsys.readouterr().out.count("more than a linear filter") == 2
    assert float(names["fits"]["exact"]["gain"]) > 0
