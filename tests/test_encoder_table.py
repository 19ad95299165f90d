"""Every kind of encoder in the table, by existing: which inputs it takes, and what it gives for them."""

import pytest
import torch

from calibrant.errors import ProgramError
from calibrant.guides.encoders.choosing import KINDS, make_encoder

SHAPES = {"scalar": (), "vector": (5,), "elements": (7, 3), "image": (3, 9, 12)}
OPTIONS = {"classes": {"count": 4}}
SIZE = 6


def build(kind, shape):
    """The encoder of an input with this kind; None where it does not take the shape."""
    torch.manual_seed(1)
    try:
        return make_encoder({"x": {"kind": kind, **OPTIONS.get(kind, {})}}, {"x": shape})
    except ProgramError:
        return None


CASES = [(kind, words) for kind in KINDS for words, shape in SHAPES.items() if build(kind, shape) is not None]


def test_every_kind_takes_an_input():
    assert {kind for kind, _ in CASES} == set(KINDS)


@pytest.mark.parametrize(("kind", "words"), CASES)
def test_features_are_finite_differ_between_data_and_belong_to_one_datum(kind, words):
    encoder, draw = build(kind, SHAPES[words]), torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, *SHAPES[words], generator=draw)
    other = torch.randn(SIZE, *SHAPES[words], generator=draw)
    if kind == "classes":
        x = (torch.arange(SIZE).reshape(SIZE, *[1] * (x.dim() - 1)) + torch.zeros(x.shape)).long() % 4
        other = (x + 1) % 4
    features = encoder({"x": x})
    assert features.shape == (SIZE, encoder.features)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[1])
    mixed = encoder({"x": torch.cat([x[:1], other[1:]])})
    torch.testing.assert_close(features[0], mixed[0])
    assert not torch.allclose(features[1], mixed[1])
    features.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in encoder.parameters())
