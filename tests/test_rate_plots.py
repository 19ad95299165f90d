"""The picture of rate and distortion: points, names, ceilings, and models without a split."""

import numpy as np
import pytest
import xarray as xr

import calibrant as cal
from calibrant.errors import InferenceError

CURVE = {"0.1": (40.0, -300.0), "1": (15.0, -200.0), "10": (3.0, 50.0)}
OTHERS = {"shared σ": (30.0, -320.0)}


def split(information, kl, known=True, ceiling=7.6):
    names = {"mutual_information": information, "marginal_kl": kl, "classifier_kl": 0.3 * kl}
    numbers = {name: value if known or name == "classifier_kl" else np.nan for name, value in names.items()}
    numbers |= {f"{name}_se": 0.2 for name in names}
    return xr.Dataset({**numbers, "split_known": known, "ceiling": ceiling})


SPLITS = {
    "0.1": split(8.0, 20.0, known=False),
    "1": split(6.0, 2.0),
    "10": split(2.5, 0.5),
    "shared σ": split(6.4, 3.0),
}


def texts(figure):
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_a_curve_and_other_models_are_drawn_with_their_names():
    figure = cal.evaluation.rate_distortion_figure(CURVE, OTHERS)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == list(CURVE)
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), list(CURVE.values()))
    assert texts(figure) == {"β", "shared σ"}


def test_ceilings_are_drawn_and_a_model_without_a_split_gets_an_arrow():
    figure = cal.evaluation.rate_distortion_figure(CURVE, OTHERS, SPLITS)
    left, right = figure.axes
    assert any(np.all(np.asarray(line.get_xdata()) == 7.6) for line in left.lines)
    assert any(np.all(np.asarray(line.get_ydata()) == 7.6) for line in right.lines)
    assert [label.get_text() for label in right.get_xticklabels()] == [*CURVE, "shared σ"]
    assert len(right.texts) == 1
    assert {"log N", "mutual information", "marginal KL", "classifier's bound"} < texts(figure)


def test_nothing_to_draw_and_splits_without_points_are_refused():
    with pytest.raises(InferenceError, match="nothing to draw"):
        cal.evaluation.rate_distortion_figure({})
    with pytest.raises(InferenceError, match=r"\['2'\] have no point"):
        cal.evaluation.rate_distortion_figure(CURVE, splits={"2": split(1.0, 1.0)})
