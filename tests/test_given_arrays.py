"""Bad input of the evaluations of representations: one sentence that names the argument."""

import numpy as np
import pytest
import torch

from calibrant.data.dataset import as_data
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import (
    Embedded,
    active_learning,
    credible_retrieval,
    crop_shares,
    crop_test,
    cropped,
    feature_distance,
    few_shot,
    human_entropy,
    match_calibration,
    mixed_retrieval,
    nearest_neighbours,
    ood_auroc,
    reject_curve,
    representation_metrics,
    retrieval,
    retrieval_difference,
    safe_retrieval,
    second_view_experiment,
    uncertainty_pair,
)

N = 24
RNG = np.random.default_rng(0)
X, U = RNG.normal(size=(N, 3)), RNG.random(N)
Y = np.arange(N) % 4
V = X / np.linalg.norm(X, axis=1, keepdims=True)
RIGHT = (U < 0.5).astype(int)


def learned(labels=Y, **how):
    return active_learning(X, labels, U, X, **{"test_labels": Y, "start": 4, "batch": 2, "rounds": 1, **how})


def capped(**how):
    return credible_retrieval(V, 1 + U, V, **how)


CASES = {
    "probabilities as correct": (lambda: uncertainty_pair(U, U, U, (U, U)), DataError, "correct: .*neither 0 nor 1"),
    "names as correct": (lambda: uncertainty_pair(U, U, ["no"] * N, (U, U)), DataError, "correct: the type"),
    "NaN as correct": (lambda: uncertainty_pair(U, U, U * np.nan, (U, U)), DataError, "correct is NaN"),
    "held_out": (lambda: uncertainty_pair(U, U, RIGHT, (U, U), held_out=2), InferenceError, "held_out=.*between 0"),
    "NaN labels of the pool": (lambda: learned(Y * np.nan), DataError, "labels hold NaN"),
    "fractional labels": (lambda: learned(Y + 0.5), DataError, "labels: .*neither whole numbers nor names"),
    "fractional test labels": (lambda: learned(test_labels=U), DataError, "test_labels: .*neither whole"),
    "too few labels": (lambda: learned(Y[:20]), DataError, "20 of them for 24 images"),
    "too few labels in a list": (lambda: learned(list(Y[:20])), DataError, "20 of them for 24 images"),
    "names of the test": (lambda: learned(test_labels=Y.astype(str)), DataError, "one holds names"),
    "regularisation": (lambda: learned(regularisation=0), InferenceError, "regularisation=0: give .* above 0"),
    "rounds": (lambda: learned(rounds=1.5), InferenceError, "rounds=1.5: give a whole number"),
    "third views": (lambda: second_view_experiment((V, U), (V, U), 0 * V, 5.0), DataError, "third: 24 of them are"),
    "negative entropies": (lambda: human_entropy(U, -U), DataError, "or entropies from 0 up"),
    "human": (lambda: human_entropy(U, object()), DataError, "human: the type object"),
    "no features": (lambda: retrieval(np.empty((N, 0)), Y), DataError, "embeddings: .*give embeddings"),
    "complex": (lambda: retrieval(X, Y, U + 1j), DataError, "uncertainty: the type complex128"),
    "ragged": (lambda: retrieval([[1.0, 2.0], [1.0]], Y), DataError, "embeddings: this is no single array"),
    "strings": (lambda: reject_curve(["a"] * N, U), DataError, "errors: the type"),
    "objects as labels": (lambda: retrieval(X, [None] * N), DataError, "labels: .*nor names"),
    "names and numbers": (
        lambda: retrieval(X, Y, database=X, database_labels=Y.astype(str)), DataError, "one holds names",
    ),
    "shots": (lambda: few_shot(X, Y, U, [1.5]), InferenceError, r"shots=\[1.5\]: give a list of whole numbers"),
    "shots alone": (lambda: few_shot(X, Y, U, 1), InferenceError, "shots=1: give a list of whole numbers"),
    "repeats": (lambda: few_shot(X, Y, U, [1], repeats=True), InferenceError, "repeats=True: give a whole number"),
    "ks": (lambda: retrieval(X, Y, ks=[1.5]), InferenceError, r"ks=\[1.5\]: give a list"),
    "k": (lambda: nearest_neighbours(X, k=1.5), InferenceError, "k=1.5: give a whole number"),
    "resamples": (lambda: retrieval(X, Y, resamples=200.5), InferenceError, "resamples=200.5: give a whole number"),
    "seed": (lambda: retrieval(X, Y, seed=0.5), InferenceError, "seed=0.5: give a whole number"),
    "keep": (lambda: safe_retrieval(X, Y, U, keep=0.5), InferenceError, "keep=0.5: give a list of numbers"),
    "controls": (lambda: safe_retrieval(X, Y, U, controls=2.5), InferenceError, "controls=2.5: give a whole"),
    "most": (lambda: ood_auroc(U, U, most=2.5), InferenceError, "most=2.5: give a whole number"),
    "bins": (lambda: match_calibration(U, RIGHT, bins=2.5), InferenceError, "bins=2.5: give a whole number"),
    "own as floats": (lambda: nearest_neighbours(X, X, own=np.arange(N) + 0.0), InferenceError, "own: give a position"),
    "own of another length": (
        lambda: retrieval(X, Y, database=X, database_labels=Y, own=[0, 1]), InferenceError, "own: give a position",
    ),
    "own as a name": (
        lambda: retrieval(X, Y, database=X, database_labels=Y, own="self"), InferenceError, "own: give a position",
    ),
    "match as floats": (lambda: capped(match=np.arange(N) + 0.5), InferenceError, "match: give a position"),
    "labels alone": (lambda: capped(labels=Y), InferenceError, "labels: give two of them"),
    "levels": (lambda: capped(match=np.arange(N), levels=0.9), InferenceError, "levels=0.9: give a list"),
    "one feature": (
        lambda: credible_retrieval(V[:, :1], U, V[:, :1], match=np.arange(N)), DataError, "directions: they have one",
    ),
    "no crops": (lambda: crop_test([], []), DataError, "whole: there are no images"),
    "numbers of crops": (lambda: crop_shares(2.5), InferenceError, "count=2.5: give a whole number"),
    "crops of arrays": (lambda: cropped(np.ones((2, 1, 4, 4)), [0.5, 0.5]), DataError, "torch.from_numpy"),
    "one image per class": (
        lambda: feature_distance(X, X, method="mahalanobis", labels=np.arange(N)), InferenceError, "no class has two",
    ),
    "tuples": (lambda: retrieval_difference((X, Y, U), (X, Y, U)), DataError, r"tuple: give .*Embedded\("),
    "results": (lambda: retrieval_difference(*[retrieval(X, Y)] * 2), DataError, r"Dataset: give .*Embedded\("),
    "a tuple of a set": (lambda: mixed_retrieval(Embedded(X, Y, U), (X, Y, U)), DataError, r"tuple: give .*Embedded\("),
    "an empty set": (lambda: ood_auroc(U, []), DataError, "outside: there are no images"),
    "one scalar of other images": (lambda: uncertainty_pair(U, U, RIGHT, U), DataError, "outside: give two of them"),
    "k as text": (lambda: second_view_experiment((V, U), (V, U), V, "5"), InferenceError, "k='5': give a number"),
    "no shares": (lambda: reject_curve(U, U, shares=[]), InferenceError, "shares: give shares"),
    "no oracle": (lambda: learned(None), DataError, "labels: NoneType; give an array"),
    "a module": (
        lambda: representation_metrics(torch.nn.Linear(3, 2), {"x": X, "y": Y}), DataError, "Linear has no embed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_a_sentence(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_bfloat16_lists_and_arrays_are_taken():
    x = torch.from_numpy(X).bfloat16()
    found = retrieval(x, Y.tolist(), U.tolist(), resamples=100)
    again = retrieval(x.float(), Y, U, resamples=100)
    assert found.equals(again)
    safe_retrieval(X, Y, U, keep=np.array([0.5, 0.9]), resamples=100)
    capped(match=np.roll(np.arange(N), 1), levels=np.array([0.5, 0.9]))
    assert learned(Y.tolist(), repeats=2).equals(learned(Y, repeats=2))
    assert retrieval_difference(Embedded(x, Y, U), Embedded(x, Y, U), resamples=100)["r_at_1"].item() == 0


class Numpy:
    def embed(self, x):
        return x.numpy()

    def uncertainty(self, x):
        return x.numpy().std(1)


class Labels:
    probabilities = np.full((N, 4), 0.25)


def test_representations_may_return_arrays_and_people_may_be_an_object():
    data = as_data({"x": torch.from_numpy(X).float(), "y": torch.from_numpy(Y)})
    found = representation_metrics(Numpy(), data, human=Labels(), cluster="image", resamples=100)
    assert found["human_ambiguous"].item() == 1
