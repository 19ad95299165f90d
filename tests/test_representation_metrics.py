"""All metrics of a representation in one call: those of the single functions, on images and on features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrant.data import Data
from calibrant.errors import DataError
from calibrant.evaluation import (
    Embedded,
    crop_shares,
    crop_test,
    cropped,
    human_entropy,
    match_calibration,
    mixed_retrieval,
    ood_auroc,
    reject_curve,
    representation_metrics,
    retrieval,
)
from calibrant.representations import Representation, train_representation

FEW = {"resamples": 100}


class Contrast:
    """Pixels as embeddings; less certain about images of low contrast."""

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def uncertainty(self, x: Tensor) -> Tensor:
        return -x.flatten(1).std(1)


def images(count: int = 80, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 8
    x = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))[y]
    return Data({"x": x + 3.0 * torch.rand(count, 1, 6, 6, generator=generator)}, {"y": y})


def test_everything_is_what_the_single_functions_say():
    data, outside = images(), images(60, seed=5)
    assert isinstance(Contrast(), Representation)
    rng = np.random.default_rng(0)
    human = rng.multinomial(20, np.full(8, 1 / 8), 80)
    p = rng.random(50)
    pairs = (p, (rng.random(50) < p).astype(float))
    found = representation_metrics(
        Contrast(), data, human=human, outside=outside, pairs=pairs, ks=(1, 4), cluster="class", **FEW
    )
    x, y = data.tensors()[0]["x"], data.tensors()[1]["y"]
    model, how = Contrast(), {"cluster": "class", **FEW}
    e, u = model.embed(x), model.uncertainty(x)
    wanted = retrieval(e, y, u, ks=(1, 4), **how)
    for name in wanted.data_vars:
        assert found[name].identical(wanted[name]), name
    reject = reject_curve(~wanted["correct"].values, u, y, **how)
    assert found["reject_normalised_area_low"].values == reject["normalised_area_low"].values
    shares = crop_shares(80)
    crops = crop_test(u, model.uncertainty(cropped(x, shares)), shares, y, **how)
    assert found["crop_less_certain_high"].values == crops["crop_less_certain_high"].values
    people = human_entropy(u, human, y, **how)
    assert found["human_spearman_within_se"].values == people["human_spearman_within_se"].values
    other = outside.tensors()[0]["x"]
    sets = [Embedded(model.embed(a), b, model.uncertainty(a)) for a, b in ((x, y), (other, outside.tensors()[1]["y"]))]
    ood = ood_auroc(sets[0].uncertainty, sets[1].uncertainty, y, sets[1].labels, **how)
    assert found["ood_auroc_low"].values == ood["ood_auroc_low"].values
    assert found["mixed_r_auroc"].values == mixed_retrieval(*sets, **how)["mixed_r_auroc"].values
    assert found["match_slope_se"].values == match_calibration(*pairs, **FEW)["slope_se"].values


def test_features_have_what_applies_and_crops_that_are_given():
    data = images()
    x, y = data.tensors()[0]["x"].flatten(1), data.tensors()[1]["y"]
    flat = Data({"x": x}, {"y": y})
    plain = representation_metrics(Contrast(), flat, singletons="left-out", **FEW)
    assert not [name for name in plain if str(name).startswith(("crop", "human", "ood", "mixed", "match"))]
    given = representation_metrics(Contrast(), flat, crops=(0.5 * x, np.full(80, 0.5)), **FEW)
    assert float(given["crop_less_certain"]) == 1.0
    with pytest.raises(DataError, match="crops: 3 inputs for 80 images"):
        representation_metrics(Contrast(), flat, crops=(x[:3], np.ones(3)), **FEW)
    with pytest.raises(DataError, match="the data have no y"):
        representation_metrics(Contrast(), {"x": x}, **FEW)


def test_a_trained_representation_is_judged():
    found = representation_metrics(
        train_representation("classifier", images(160), steps=20, batch_size=32), images(seed=7), **FEW
    )
    assert float(found["r_at_1_high"]) > 0.125
    assert "crop_spearman" in found
