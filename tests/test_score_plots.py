"""Pictures of scores, label entropies and corruptions: what they draw and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation import corruption_figure, label_entropy_figure, score_figure

SETS = ("inside", "permuted", "$weak$")
SOURCES = ("exact", "amortized")


def scores() -> xr.Dataset:
    """A result with medians that are known: 0.2, 0.4, 0.6, and twice as much for the guide."""
    of_set = np.repeat(SETS, 21)
    score = np.repeat([0.2, 0.4, 0.6], 21) + np.tile(np.linspace(-0.05, 0.05, 21), 3)
    shown = np.broadcast_to(np.stack([score, 2 * score])[:, None], (2, 3, 63)).copy()
    shown[0, 1, :5] = np.nan
    ends = {f"auroc{end}": (("source", "matching", "set"), np.full((2, 3, 2), 0.5)) for end in ("", "_low", "_high")}
    return xr.Dataset(
        {"score": (("source", "matching", "image"), shown), **ends},
        coords={
            "source": list(SOURCES),
            "matching": ["as shown", "contrast", "power"],
            "set": list(SETS[1:]),
            "of_set": ("image", of_set),
        },
    )


def test_scores_have_a_violin_per_set_and_source_medians_and_the_prior():
    figure = score_figure({"vae": scores(), "ea-vae": scores()}, "contrast")
    assert [axes.get_title() for axes in figure.axes] == ["vae", "ea-vae"]
    axes = figure.axes[0]
    assert len(axes.collections) == 6
    lines = {str(line.get_label()): line for line in axes.lines}
    assert np.allclose(lines["guide (median)"].get_ydata(), [0.4, 0.8, 1.2])
    assert np.allclose(lines["exact posterior (median)"].get_ydata()[1:], [0.4, 0.6])
    assert np.allclose(lines["prior"].get_ydata(), 1.0)
    assert axes.get_ylabel() == "posterior sd / prior sd"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["inside", "permuted", r"\$weak\$"]
    assert sum("[0.50, 0.50]" in text.get_text() for text in axes.texts) == 2
    figure.canvas.draw()


def test_label_entropies_have_the_largest_one_as_a_line():
    result = scores().sel(matching="as shown")[["score"]].rename({"score": "entropy"})
    result = result.assign_coords(set=list(SETS))
    figure = label_entropy_figure({"ea-vae": result.assign_attrs(classes=10)})
    line = next(line for line in figure.axes[0].lines if line.get_label() == "log 10, the largest")
    assert np.allclose(line.get_ydata(), math.log(10))
    assert figure.axes[0].get_ylabel() == "label entropy (nats)"
    figure.canvas.draw()


def corruptions() -> xr.Dataset:
    kinds, dims = ["noise", "blur"], ("source", "corruption", "level")
    mean = np.arange(12.0).reshape(2, 2, 3) / 10
    names = ("posterior_sd_mean", "entropy_mean", "shift_mean", "coverage")
    curves = {f"{name}{end}": (dims, mean / (10 if end else 1)) for name in names for end in ("", "_se")}
    strength = (("corruption", "level"), np.array([[0.0, 0.125, 2.0]] * 2))
    coords = {"source": list(SOURCES), "corruption": kinds, "level": [0, 1, 5]}
    unit = ("corruption", ["contrasts of the images", "sides"])
    return xr.Dataset({**curves, "strength": strength, "unit": unit}, coords=coords, attrs={"prior_entropy": 7.0})


@pytest.mark.parametrize(
    ("statistic", "label", "line"),
    [
        ("posterior_sd", "posterior sd / prior sd", 1.0),
        ("entropy", "entropy (nats)", 7.0),
        ("shift", "shift of the mean (prior sd)", None),
        ("coverage", "coverage of 90% intervals", 0.9),
    ],
)
def test_corruptions_have_a_curve_per_source_and_the_prior(statistic, label, line):
    figure = corruption_figure({"vae": corruptions(), "ea-vae": corruptions()}, statistic)
    assert len(figure.axes) == 4
    axes = figure.axes[2]
    assert axes.get_ylabel() == f"ea-vae\n{label}"
    assert axes.get_xlabel() == "contrasts of the\nimages"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", ".125", "2"]
    curves = {str(container.get_label()): container[0].get_ydata() for container in axes.containers}
    assert np.allclose(curves["exact posterior"], [0.0, 0.1, 0.2])
    assert np.allclose(curves["guide"], [0.6, 0.7, 0.8])
    dashed = [float(drawn.get_ydata()[0]) for drawn in axes.lines if drawn.get_linestyle() == "--"]
    assert dashed == ([] if line is None else [line])
    figure.canvas.draw()


def test_refusals():
    with pytest.raises(InferenceError, match=r"matching='size' is not among \['as shown', 'contrast', 'power'\]"):
        score_figure({"vae": scores()}, "size")
    with pytest.raises(InferenceError, match="there is nothing to draw"):
        label_entropy_figure({})
    for results, statistic in (({}, "entropy"), ({"vae": corruptions()}, "sd")):
        with pytest.raises(InferenceError, match=f"there is no '{statistic}' to draw"):
            corruption_figure(results, statistic)
    with pytest.raises(InferenceError, match="'coverage' needs simulated="):
        corruption_figure({"vae": corruptions().drop_vars("coverage")}, "coverage")
