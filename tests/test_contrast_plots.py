"""Pictures of contrast: what they show, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation import bins_figure, contrast_figure

LEVELS = np.array([0.1, 1.0, 10.0])


def result(names: tuple[str, ...], **attributes: object) -> xr.Dataset:
    """A dataset with a curve for every statistic, of both sources."""
    curve = np.array([[0.9, 0.5, 0.1], [0.8, 0.6, 0.2]])
    variables = {f"{name}{end}": (("source", "contrast"), curve) for name in names for end in ("", "_se")}
    return xr.Dataset(variables, {"source": ["exact", "amortized"], "contrast": LEVELS}, attributes)


def curves(about: str = "mean") -> xr.Dataset:
    names = ("posterior_sd", "mean_norm", "signal_variance", "scale_cv")
    return result(names, about=about, prior_sd=0.5, reference_method="exact")


def test_the_curves_are_those_of_the_result_in_units_of_the_prior():
    figure = contrast_figure({"EA-VAE": curves()})
    first = figure.axes[0]
    exact = next(line for line in first.get_lines() if line.get_label() == "exact, EA-VAE")
    assert exact.get_xdata() == pytest.approx(LEVELS)
    assert exact.get_ydata() == pytest.approx([1.8, 1.0, 0.2])
    assert first.get_xscale() == "log"
    assert "noise-equivalent" in first.get_xlabel()
    assert {container.get_label() for container in first.containers} == {"guide, EA-VAE"}


def test_digits_that_fade_have_a_share_of_contrast_and_no_noise():
    figure = contrast_figure({"VAE": curves("black"), "EA-VAE": curves("black")})
    assert figure.axes[0].get_xscale() == "linear"
    assert figure.axes[0].get_xlabel() == "share of contrast"


def test_bins_without_images_are_left_out():
    binned = result(("noise_variance", "signal_mean", "signal_variance", "scale_mean"))
    binned["noise_variance"][:, 1] = np.nan
    figure = bins_figure({"EA-VAE": binned})
    exact = next(line for line in figure.axes[0].get_lines() if line.get_label() == "exact, EA-VAE")
    assert exact.get_xdata() == pytest.approx([0.1, 10.0])
    assert len(figure.axes) == 4


@pytest.mark.parametrize("results", [{}, {"a": curves(), "b": curves("black")}], ids=["none", "two greys"])
def test_results_that_do_not_belong_together_are_refused(results):
    with pytest.raises(InferenceError, match="give those about one grey value"):
        contrast_figure(results)
