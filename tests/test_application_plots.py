"""Pictures of applications: what they draw and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import (
    active_learning,
    certainty_figure,
    credible_figure,
    credible_retrieval,
    embedding_map_figure,
    learning_figure,
    safe_retrieval,
    safe_retrieval_figure,
)

RNG = np.random.default_rng(0)
LABELS = np.arange(60) % 3
EMBEDDINGS = np.eye(5)[LABELS] + 0.4 * RNG.normal(size=(60, 5))
UNCERTAINTY = RNG.random(60)


def test_safe_retrieval_has_a_row_per_result_and_says_what_needs_labels():
    results = {
        name: safe_retrieval(EMBEDDINGS, LABELS, UNCERTAINTY, keep=(0.6, 0.9), quantile=name, controls=1, resamples=100)
        for name in ("all", "true class")
    }
    figure = safe_retrieval_figure(results)
    assert [axes.get_title() for axes in figure.axes] == ["all", "", "true class (needs labels: not safe)", ""]
    left, right = figure.axes[:2]
    curves = {line.get_label(): line for line in left.get_lines()}
    assert curves["left out of both"].get_xdata() == pytest.approx([40.0, 10.0])
    recall = results["all"]["recall"].sel(dropped="both").values
    assert curves["left out of both"].get_ydata() == pytest.approx(recall)
    assert len(right.get_lines()) == 3
    assert len(figure.legends[0].get_texts()) == 5


def test_credible_caps_show_coverage_and_sizes():
    result = credible_retrieval(EMBEDDINGS, 10 + UNCERTAINTY, EMBEDDINGS, labels=(LABELS, LABELS), own=np.arange(60))
    figure = credible_figure({"vMF $\\kappa$": result, "other": result})
    left, right = figure.axes
    assert left.get_lines()[1].get_ydata() == pytest.approx(result["coverage"].values)
    assert left.get_lines()[1].get_label() == "vMF \\$\\kappa\\$"
    assert right.get_lines()[0].get_ydata() == pytest.approx(result["size_mean"].values)


def test_learning_curves_have_a_line_per_acquisition():
    result = active_learning(EMBEDDINGS, LABELS, UNCERTAINTY, EMBEDDINGS, LABELS, start=5, batch=5, rounds=2, repeats=2)
    figure = learning_figure({"1/κ": result})
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["random", "uncertainty", "entropy", "k-centre"]
    assert lines[1].get_ydata() == pytest.approx(result["accuracy"].sel(acquisition="uncertainty").values)
    assert len(figure.axes[0].collections) == 4


@pytest.mark.parametrize("make", [safe_retrieval_figure, credible_figure, learning_figure])
def test_nothing_to_draw_is_refused(make):
    with pytest.raises(InferenceError, match="there is nothing to draw"):
        make({})


def test_the_most_and_least_certain_images_are_where_they_belong():
    images = np.zeros((60, 4, 4))
    images += UNCERTAINTY[:, None, None]  # the grey value tells the uncertainty
    figure = certainty_figure(images, LABELS, UNCERTAINTY, count=3, names=["a", "b", "c"])
    scaled = (UNCERTAINTY - UNCERTAINTY.min()) / np.ptp(UNCERTAINTY)
    for axes, of_side in zip(figure.axes, (slice(None, 3), slice(-3, None)), strict=True):
        shown = np.asarray(axes.get_images()[0].get_array())[1::5, 1::5]
        assert shown == pytest.approx(np.stack([np.sort(scaled[c == LABELS])[of_side] for c in range(3)]))
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    colour = certainty_figure(torch.rand(60, 3, 4, 4), LABELS, UNCERTAINTY)
    assert colour.axes[0].get_images()[0].get_array().shape[2] == 3
    few = certainty_figure(images[:5], np.array([0, 0, 0, 0, 1]), UNCERTAINTY[:5], count=3)  # white where none is left
    assert few.axes[0].get_images()[0].get_array()[6, 8] == 1.0


@pytest.mark.parametrize("method", ["pca", "t-sne"])
def test_maps_have_larger_points_for_less_certain_images(method):
    figure = embedding_map_figure(EMBEDDINGS, LABELS, UNCERTAINTY, method=method, names=["a", "b", "$c$"])
    groups = figure.axes[0].collections
    sizes = np.sort(np.concatenate([group.get_sizes() for group in groups]))
    assert len(sizes) == 60
    for number, group in enumerate(groups):
        assert len(group.get_offsets()) == 20
        ranks = UNCERTAINTY.argsort().argsort()[number == LABELS]
        assert np.sort(group.get_sizes()) == pytest.approx(sizes[np.sort(ranks)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "\\$c\\$"]
    if method == "pca":
        points = np.concatenate([np.asarray(group.get_offsets()) for group in groups])
        values = np.linalg.svd(EMBEDDINGS - EMBEDDINGS.mean(0), compute_uv=False)[:2]
        assert points.std(0) * 60**0.5 == pytest.approx(values)


def test_many_classes_have_no_legend_and_refusals_say_what_to_do():
    many = embedding_map_figure(EMBEDDINGS, np.arange(60) % 30, UNCERTAINTY, images=40)
    assert not many.legends
    with pytest.raises(InferenceError, match='"pca" or "t-sne"'):
        embedding_map_figure(EMBEDDINGS, LABELS, UNCERTAINTY, method="umap")
    with pytest.raises(InferenceError, match="2 of them for 3 classes"):
        embedding_map_figure(EMBEDDINGS, LABELS, UNCERTAINTY, names=["a", "b"])
    with pytest.raises(DataError, match="give \\(image, h, w\\)"):
        certainty_figure(EMBEDDINGS, LABELS, UNCERTAINTY)
    with pytest.raises(InferenceError, match="1 or more"):
        certainty_figure(np.zeros((60, 4, 4)), LABELS, UNCERTAINTY, count=0)
