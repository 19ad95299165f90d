"""Pictures of representations: what they draw, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from calibrant.errors import InferenceError
from calibrant.evaluation import match_calibration, match_figure, reject_curve, reject_figure

FEW = {"resamples": 100}


def results(count: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    u = rng.normal(size=300)
    errors = rng.random(300) < expit(2 * u)
    return {f"${i}$": reject_curve(errors, u + i * rng.normal(size=300), **FEW) for i in range(count)}


def test_reject_curves_stand_beside_oracle_and_random_order():
    found = results(4)
    figure = reject_figure(found)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    lines = {str(line.get_label()): line for line in shown[0].lines}
    assert np.allclose(lines["by uncertainty"].get_ydata(), found["$0$"]["error"])
    assert np.allclose(lines["oracle"].get_ydata(), found["$0$"]["oracle"])
    assert np.allclose(lines["random order"].get_ydata(), found["$0$"]["area_random"])
    assert shown[1].get_title().startswith("\\$1\\$\narea 0.")
    figure.canvas.draw()


def test_results_of_all_metrics_are_drawn_too():
    plain = results(1)["$0$"]
    named = plain.rename({name: f"reject_{name}" for name in plain.data_vars})
    one, other = (reject_figure({"x": result}).axes[0].lines[0].get_ydata() for result in (plain, named))
    assert np.array_equal(one, other)


def test_reliability_has_a_point_with_interval_per_bin():
    rng = np.random.default_rng(0)
    p = expit(rng.normal(0, 1.5, 2000))
    y = (rng.random(2000) < p).astype(float)
    found = {"calibrated": match_calibration(p, y, **FEW), "too sure": match_calibration(expit(3 * logit(p)), y, **FEW)}
    found["equal width"] = match_calibration(p[p > 0.5], y[p > 0.5], spacing="equal-width", **FEW)
    figure = match_figure(found)
    points = figure.axes[0].containers[1].lines[0]
    assert np.allclose(points.get_ydata(), found["calibrated"]["observed"])
    assert "slope 0.3" in figure.axes[1].get_title()
    figure.canvas.draw()


def test_refusals():
    for draw in (reject_figure, match_figure):
        for wrong in ({}, {"x": match_calibration(np.array([0.1, 0.9]), np.array([0, 1]), **FEW)}):
            if wrong and draw is match_figure:
                wrong = results(1)
            with pytest.raises(InferenceError, match="name: result of"):
                draw(wrong)
