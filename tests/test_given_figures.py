"""Bad and small input of the figures of representations."""

import numpy as np
import pytest

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import (
    certainty_figure,
    credible_figure,
    embedding_map_figure,
    learning_figure,
    match_calibration,
    match_figure,
    reject_curve,
    reject_figure,
    safe_retrieval_figure,
)

U = np.random.default_rng(0).random(40)
OTHER = reject_curve((U > 0.7).astype(float), np.sin(9 * U), resamples=100)
PAIRS = match_calibration(U, (U > 0.4).astype(int), resamples=100)
FIGURES = {
    "safe_retrieval": safe_retrieval_figure,
    "credible_retrieval": credible_figure,
    "active_learning": learning_figure,
    "reject_curve": reject_figure,
    "match_calibration": match_figure,
}


@pytest.mark.parametrize("function", FIGURES)
@pytest.mark.parametrize("given", ["another result", "a result without a name", "a list", "a number", "nothing"])
def test_figures_refuse_other_results(function, given):
    other = PAIRS if function == "reject_curve" else OTHER
    results = {
        "another result": {"a": other}, "a result without a name": other, "a list": [other], "a number": {"a": 1.0},
        "nothing": {},
    }  # fmt: skip
    with pytest.raises(InferenceError, match=rf"give .*{{name: result of {function}}}"):
        FIGURES[function](results[given])


@pytest.mark.parametrize("figure", [reject_figure({"a": OTHER}), match_figure({"a": PAIRS})], ids=["reject", "match"])
def test_the_legend_of_one_panel_lies_inside_the_figure(figure):
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y1 <= figure.bbox.y1


@pytest.mark.parametrize("method", ["pca", "t-sne"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (2, 2), (4, 1), (5, 4), (12, 2)])
def test_maps_of_few_images_or_one_feature(method, shape):
    embeddings = np.random.default_rng(0).normal(size=shape)
    labels = np.zeros(len(embeddings))
    if method == "t-sne" and len(embeddings) < 4:
        with pytest.raises(InferenceError, match='take method="pca"'):
            embedding_map_figure(embeddings, labels, embeddings[:, 0], method=method)
        return
    figure = embedding_map_figure(embeddings, labels, embeddings[:, 0], method=method)
    places = figure.axes[0].collections[0].get_offsets()
    assert places.shape == (len(embeddings), 2)
    assert np.isfinite(places).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0"]


def test_a_map_without_images_is_refused():
    with pytest.raises(InferenceError, match="images=0: give a whole number"):
        embedding_map_figure(np.ones((3, 2)), [0, 1, 1], [1.0, 2.0, 3.0], images=0)
    with pytest.raises(DataError, match=r"give .image, h, w"):
        certainty_figure(np.ones((0, 4, 4)), [], [])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_no_image_is_among_the_most_and_the_least_certain(size):
    grey = np.arange(1.0, 1 + size) / (2 * size)  # every image has a grey value of its own
    images = np.concatenate(
        [np.broadcast_to(grey[:, None, None], (size, 4, 4)), np.zeros((1, 4, 4)), np.ones((1, 4, 4))]
    )
    labels, scores = np.array([0.0] * size + [1.0, 1.0]), np.arange(size + 2)
    figure = certainty_figure(images, labels, scores, count=3)
    sides = [np.asarray(axes.images[0].get_array())[:5] for axes in figure.axes]  # the first row of tiles
    most, least = ({value for value in grey.tolist() if np.isclose(side, value).any()} for side in sides)
    assert not most & least
    assert len(most) == min(3, (size + 1) // 2)
    assert len(least) == min(3, size // 2)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1"]
