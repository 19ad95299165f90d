"""Batches whose images are each other's negatives: what is estimated, against loops, and where it is refused."""

import numpy as np
import pytest
import torch

import calibrant as cal
from calibrant.errors import CalibrantError, DataError, ProgramError
from calibrant.models.parts.matching import of_tuple
from calibrant.program.environment import seeded

BATCH, DRAWS = 4, 5
MODELS = {
    "published": ("mcinfonce", {"form": "published"}),
    "categorical": ("mcinfonce", {"form": "categorical"}),
    "url": ("mcinfonce", {"form": "url"}),
    "pair": ("pair", {}),
    "hib": ("hib", {"slope": 3.0, "offset": -1.0}),
}


def labelled():
    with seeded(0):
        y = torch.arange(60) % 6
        x = torch.randn(6, 4)[y] + 0.3 * torch.randn(60, 4)
    return cal.data.Data({"x": x}, {"y": y}, name="images")


def model(kind):
    name, arguments = MODELS[kind]
    with seeded(1):
        return cal.models.create(name, shape=[4], latents=3, encoder="linear", widths=[8], **arguments)


def by_hand(kind, inner, z, z_other):
    """The loss of one batch from draws `(B, M, m)`, with loops."""
    total = 0.0
    for i in range(BATCH):
        others = [j for j in range(BATCH) if j != i]
        p = np.zeros((len(others) + 1, DRAWS))
        for m in range(DRAWS):
            products = [z[i, m] @ z_other[j, m] for j in (i, *others)]
            if kind in ("pair", "hib"):
                p[:, m] = [float(inner.log_odds(t).sigmoid()) for t in products]
            else:
                t = inner.k * torch.stack(products)[None]
                if kind == "categorical":
                    p[0, m] = float(t.softmax(-1)[0, 0])
                else:
                    p[0, m] = float(of_tuple(kind, t, True).log_prob(t.new_ones(1)).exp())
        total += np.log(p[0].mean())
        if kind in ("pair", "hib"):
            total += np.log((1 - p[1:]).mean(1)).mean()
    return total


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_of_a_batch_is_that_of_loops(kind):
    inner = model(kind).double()
    shared = cal.models.SharedNegatives(inner, draws=DRAWS)
    with seeded(3):
        z, z_other = torch.nn.functional.normalize(torch.randn(2, BATCH, DRAWS, 3).double(), dim=-1)
    with torch.no_grad():
        found = shared.of_images(torch.einsum("imf,jmf->mij", z, z_other)[None]).sum()
        assert float(found) == pytest.approx(by_hand(kind, inner, z, z_other), rel=1e-9)
        assert float(found) != pytest.approx(by_hand(kind, inner, z, z_other.flip(0)), rel=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_the_model_inside_and_is_refused_elsewhere(kind):
    data, inner = cal.representations.batches(labelled(), 40, size=BATCH, seed=1), model(kind)
    shared = cal.models.SharedNegatives(inner, draws=DRAWS)
    guide, before = cal.guides.prior(shared), inner.embedding.direction.weight.clone()
    fit = cal.inference.fit(shared, guide, data, objective="stl", epochs=4, batch_size=10, lr=1e-2, seed=1)
    assert fit.history[-1]["validation"] > fit.history[0]["validation"]
    assert not torch.equal(inner.embedding.direction.weight, before)
    for refused in (
        lambda: cal.inference.posterior(shared, guide, data, draws=2),
        lambda: cal.inference.reference(shared, data),
        lambda: cal.evaluation.check(shared, guide, data),
    ):
        with pytest.raises(CalibrantError, match=r"training loss and no density.*each other's negatives.*model inside"):
            refused()
    assert shared.model is inner
    if kind == "pair":  # what the refusal says to do
        pairs = cal.representations.pairs(labelled(), 20)
        tree = cal.inference.posterior(shared.model, cal.guides.prior(shared.model), pairs, draws=3)
        assert tree["posterior"]["z"].shape == (1, 3, 20, 3)


def test_batches_have_different_classes_and_a_match_for_each():
    data = labelled()
    tuples = cal.representations.batches(data, 200, size=5)
    rows = {name: tuples._source[name] for name in ("x", "other")}
    classes = {name: data.values("y").numpy()[index] for name, index in rows.items()}
    assert (classes["x"] == classes["other"]).all()
    assert not (rows["x"] == rows["other"]).any()
    assert all(len(set(row)) == 5 for row in classes["x"].tolist())
    assert tuples.batch([0, 1])[1]["x"].shape == (2, 5, 4)
    with pytest.raises(DataError, match=r"size=7.*give 2 to 6"):
        cal.representations.batches(data, 3, size=7)


def test_models_without_draws_are_refused():
    with pytest.raises(ProgramError, match="not InfoNCE"):
        cal.models.SharedNegatives(cal.models.create("infonce", shape=[4]))
    with pytest.raises(ProgramError, match="draws=0"):
        cal.models.SharedNegatives(model("pair"), draws=0)
