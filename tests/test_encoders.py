"""Encoders: any shape, masks, order, independence between data, statistics that are kept."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.guides.encoders.choosing import ENCODERS, default_encoder, make_encoder
from calibrant.guides.encoders.inputs import FusedEncoder

SIZE = 6
SET = {"x": (7, 3), "mask": (7,)}
CASES = {
    "mlp": ("mlp", {"x": (5,)}),
    "a scalar": ("mlp", {"x": ()}),
    "conv": ("conv", {"x": (3, 9, 6)}),
    "set": ("set", {"x": (7, 3)}),
    "sequence": ("sequence", {"x": (7, 3)}),
    "one element": ({"x": "sequence"}, {"x": (1, 2)}),
    "set of scalars": ({"x": "set"}, {"x": (7,)}),
    "masked set": ("set", SET),
    "masked sequence": ("sequence", SET),
    "masked entries": ({"x": {"kind": "set", "mask": "seen"}}, {"x": (7, 3), "seen": (7, 3)}),
    "masked vector": ({"x": {"kind": "mlp", "mask": "seen"}}, {"x": (7,), "seen": (7,)}),
    "masked image": ({"x": {"kind": "conv", "mask": "seen"}}, {"x": (2, 8, 5), "seen": (2, 8, 5)}),
    "by default": (None, {"x": (1, 40, 40), "y": (3, 4), "y_mask": (3,), "age": ()}),
    "classes": (
        {"label": {"kind": "classes", "count": 10}, "x": {"kind": "mlp", "hidden": 32}},
        {"x": (5,), "label": ()},
    ),
}
MASKS = ("mask", "seen", "y_mask")


def inputs_of(shapes, size=SIZE, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    values = {name: 3 + 2 * torch.randn(size, *shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}
    for name in set(values) & {*MASKS, "label"}:
        values[name] = torch.randint(2, values[name].shape, generator=draw)
    return values


def build(case, dtype=torch.float32):
    """An encoder with the statistics of 50 data, its specification through JSON."""
    spec, shapes = CASES[case]
    spec = default_encoder(shapes) if spec is None else spec
    torch.manual_seed(1)
    encoder = make_encoder(json.loads(json.dumps(spec)), shapes).to(dtype)
    if hasattr(encoder, "inputs"):
        encoder.inputs.set_statistics(inputs_of(shapes, 50, seed=9))
    return encoder, inputs_of(shapes, dtype=dtype)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_finite_and_carry_gradients(case, dtype):
    encoder, inputs = build(case, dtype)
    features = encoder(inputs)
    assert features.shape == (SIZE, encoder.features)
    assert features.dtype == dtype
    assert features.isfinite().all()
    assert 0.01 < features.std() < 10
    features.square().sum().backward()
    dead = [
        name for name, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert not dead


def test_all_parameters_exist_before_data(case):
    spec, shapes = CASES[case]
    encoder = make_encoder(default_encoder(shapes) if spec is None else spec, shapes)
    before = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    encoder(inputs_of(shapes))
    assert before == {name: tuple(value.shape) for name, value in encoder.state_dict().items()}


def test_a_datum_does_not_depend_on_others(case):
    encoder, inputs = build(case, torch.float64)
    other = inputs_of(CASES[case][1], dtype=torch.float64, seed=1)
    mixed = {name: torch.cat([value[:1], other[name][1:]]) for name, value in inputs.items()}
    features = encoder(inputs)
    torch.testing.assert_close(features[0], encoder(mixed)[0])
    assert (features[1] - encoder(mixed)[1]).abs().max() > 1e-3
    assert torch.allclose(features[:1], encoder({name: value[:1] for name, value in inputs.items()}))


def test_statistics_are_in_the_state(case):
    encoder, inputs = build(case)
    spec, shapes = CASES[case]
    fresh = make_encoder(default_encoder(shapes) if spec is None else spec, shapes)
    fresh.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(fresh(inputs), encoder(inputs))


def test_every_input_reaches_the_features(case):
    encoder, inputs = build(case, torch.float64)
    masks = [name for name in inputs if name in MASKS]
    inputs |= {name: torch.ones_like(inputs[name]) for name in masks}
    for name, value in inputs.items():
        changed = 1 - value if name in (*masks, "label") else value + 0.1
        assert (encoder(inputs) - encoder({**inputs, name: changed})).abs().max() > 1e-6, name


# -- standardisation ---------------------------------------------------------------------------------------------------


def test_units_of_the_data_do_not_matter(case):
    """After the statistics are taken, an input in other units gives the same features: each has its own scale."""
    spec, shapes = CASES[case]
    if spec == "mlp" and len(shapes) > 1:
        return
    features = []
    for factor in (1.0, 1000.0):
        torch.manual_seed(1)
        encoder = make_encoder(default_encoder(shapes) if spec is None else spec, shapes).double()
        values = inputs_of(shapes, 50, torch.float64)
        change = next(name for name in values if name not in (*MASKS, "label"))
        values[change] = factor * (values[change] + (factor > 1))
        encoder.inputs.set_statistics(values)
        features.append(encoder({name: value[:SIZE] for name, value in values.items()}))
    assert torch.allclose(*features, atol=1e-8)


@pytest.mark.parametrize("case", ["masked set", "masked sequence", "masked entries"])
def test_statistics_are_of_what_is_not_masked(case):
    shapes = CASES[case][1]
    encoder, _ = build(case)
    values = inputs_of(shapes, 200, torch.float64)
    mask = values[encoder.inputs.mask].bool()
    values["x"][~mask if mask.dim() == 3 else (~mask)[..., None].expand_as(values["x"])] = 1e6
    encoder.inputs.set_statistics(values)
    assert ((encoder.inputs.loc - 3).abs() < 0.5).all()
    assert ((encoder.inputs.scale - 2).abs() < 0.5).all()


def test_a_constant_entry_keeps_its_unit():
    """A column that never changes has no scale; rounding is not one."""
    encoder = make_encoder("set", {"x": (7, 3)})
    x = torch.randn(50, 7, 3)
    x[..., 1] = 0.1
    encoder.inputs.set_statistics({"x": x})
    assert encoder.inputs.scale[1] == 1
    assert encoder({"x": x}).abs().max() < 10


# -- images of any size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(1, 4, 4), (3, 5, 7), (1, 64, 1), (2, 1, 33), (1, 28, 28), (3, 32, 32), (1, 1, 1), (1, 97, 41), (3, 256, 256)],
)
def test_convolutions_take_any_size(shape):
    encoder = make_encoder("conv", {"x": shape})
    features = encoder({"x": torch.randn(2, *shape)})
    assert features.shape == (2, encoder.features)
    assert features.isfinite().all()
    assert sum(weight.numel() for weight in encoder.parameters()) < 6e6


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70))
def test_convolutions_take_any_size_at_random(channels, height, width):
    encoder = make_encoder("conv", {"x": (channels, height, width)})
    assert encoder({"x": torch.randn(2, channels, height, width)}).shape == (2, encoder.features)


def test_the_contrast_of_an_image_reaches_the_features_and_not_the_convolutions():
    encoder = make_encoder("conv", {"x": (1, 8, 8)}).double()
    image = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    maps = []
    encoder.convolutions.register_forward_hook(lambda module, args, output: maps.append(output))
    features = [encoder({"x": scale * image}) for scale in (1.0, 50.0)]
    assert torch.allclose(*maps, rtol=1e-4)
    assert (features[0] - features[1]).abs().max() > 1


# -- sets and sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["masked set", "masked sequence", "masked entries", "masked vector", "masked image"])
@pytest.mark.parametrize("hidden", [1e9, float("inf"), float("nan")])
def test_masked_entries_never_reach_the_features(case, hidden):
    """Whatever they hold; and a change of one that is not masked is seen."""
    encoder, inputs = build(case)
    mask = inputs[next(name for name in inputs if name in MASKS)].bool()
    mask[0] = False  # a datum that is masked altogether
    inputs = {name: mask if name in MASKS else value for name, value in inputs.items()}
    where = mask[..., None].expand_as(inputs["x"]) if mask.dim() < inputs["x"].dim() else mask
    features = encoder(inputs)
    assert features.isfinite().all()
    torch.testing.assert_close(features, encoder({**inputs, "x": torch.where(where, inputs["x"], hidden)}))
    changed = encoder({**inputs, "x": torch.where(where, inputs["x"] + 0.1, inputs["x"])})
    assert ((changed - features).abs().amax(1) > 1e-4).equal(where.flatten(1).any(1))


def test_a_set_has_no_order_and_a_sequence_has():
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    for case, same in (("set", True), ("masked set", True), ("sequence", False), ("masked sequence", False)):
        encoder, inputs = build(case, torch.float64)
        moved = {name: value[:, order] for name, value in inputs.items()}
        assert torch.allclose(encoder(inputs), encoder(moved), atol=1e-10) == same


def test_a_set_with_masked_elements_is_the_smaller_set():
    torch.manual_seed(0)
    large, small = (make_encoder("set", {"x": (n, 3), "mask": (n,)}).double() for n in (7, 4))
    small.load_state_dict(large.state_dict())
    x = torch.randn(SIZE, 7, 3, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1]).expand(SIZE, 7)
    alone = {"x": x[:, mask[0].bool()], "mask": torch.ones(SIZE, 4)}
    assert torch.allclose(large({"x": x, "mask": mask}), small(alone))


def test_every_time_of_a_long_sequence_is_seen():
    torch.manual_seed(0)
    encoder = make_encoder("sequence", {"x": (300, 1)}).double()
    x = torch.randn(1, 300, 1, dtype=torch.float64, requires_grad=True)
    encoder({"x": x}).square().sum().backward()
    assert (x.grad.abs() > 1e-8).all()


# -- specifications ----------------------------------------------------------------------------------------------------


def test_defaults_by_shape():
    assert default_encoder({"x": (1, 16, 16)}) == "mlp"
    assert default_encoder({"x": (3, 32, 32)}) == "conv"
    assert default_encoder({"x": (50, 4)}) == "mlp"
    assert default_encoder({"x": (50, 4), "mask": (50,)}) == {"x": {"kind": "sequence", "mask": "mask"}}
    assert default_encoder({"x": (9,), "x_mask": (9,)}) == {
        "x": {"kind": "mlp", "mask": "x_mask"},
        "x_mask": {"kind": "mlp"},
    }
    assert default_encoder({"x": (3, 32, 32), "y": ()}) == {"x": {"kind": "conv"}, "y": {"kind": "mlp"}}
    assert default_encoder({"x": (), "mask": ()}) == {"x": {"kind": "mlp"}, "mask": {"kind": "mlp"}}


def test_strings_name_the_inputs_of_their_dimensions():
    for name in ("conv", "set", "sequence"):
        shape = (1, 8, 8) if name == "conv" else (8, 2)
        assert not isinstance(ENCODERS[name]({"x": shape}), FusedEncoder)
        assert isinstance(ENCODERS[name]({"x": shape, "age": ()}), FusedEncoder)
    assert not isinstance(ENCODERS["mlp"]({"x": (3,), "age": ()}), FusedEncoder)


@pytest.mark.parametrize(
    ("spec", "shapes", "match"),
    [
        ("resnet", {"x": (4,)}, "unknown encoder"),
        ("conv", {"x": (4,)}, "no input"),
        ("set", {"x": (4,)}, "no input"),
        ("classes", {"x": ()}, "name the kind"),
        ({"x": "conv"}, {"x": (4,)}, "image"),
        ({"y": "mlp"}, {"x": (4,)}, "no inputs"),
        ({"x": "lstm"}, {"x": (4,)}, "unknown encoder"),
        ({"x": torch.nn.Identity()}, {"x": (4,)}, "unknown encoder"),
        ({"x": {"hidden": 3}}, {"x": (4,)}, "unknown encoder"),
        ({"x": {"kind": "mlp", "layers": 3}}, {"x": (4,)}, "layers"),
        ({"x": {"kind": "classes"}}, {"x": ()}, "count"),
        ({"x": {"kind": "conv", "channels": 12}}, {"x": (1, 4, 4)}, "multiple of 8"),
        ({"x": "set"}, {"x": ()}, "elements"),
        ({"x": {"kind": "set", "mask": "m"}}, {"x": (4, 2), "m": (3,)}, "wanted one of shape"),
        ({"x": {"kind": "mlp", "mask": "m"}}, {"x": (4, 2)}, "is no input"),
    ],
)
def test_what_no_encoder_can_be_made_of_is_refused(spec, shapes, match):
    with pytest.raises(ProgramError, match=match):
        make_encoder(spec, shapes)


# -- what they are for -------------------------------------------------------------------------------------------------


def means(size, mask):
    """A mean of up to 20 measurements, of which a mask tells the number."""
    with pyro.plate("data", size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        noise = dist.Normal(centre[:, None].expand(size, 20), 2.0).mask(mask != 0)
        pyro.sample("x", noise.to_event(1))


@pytest.mark.slow
def test_a_set_encoder_learns_how_a_posterior_narrows_with_the_number_of_elements():
    """centre | x ~ N(n x̄ / (n + 4), 4 / (n + 4)): the ELBO is within 0.02 nats of the exact evidence."""
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(20) < torch.randint(0, 21, (6000, 1), generator=draw)).long()
    x = cal.program.sample_prior(means, 6000, {"mask": mask}, seed=0)["x"]
    x[mask == 0] = 0.0
    shapes = {"x": (20,), "mask": (20,)}
    encoder = make_encoder({"x": {"kind": "set", "mask": "mask", "hidden": 64}}, shapes)
    guide = cal.guides.amortize(means, {"x": x}, covariates={"mask": mask}, encoder=encoder)
    encoder.inputs.set_statistics({"x": x, "mask": mask})
    cal.inference.fit(
        means, guide, {"x": x[:4000]}, covariates={"mask": mask[:4000]}, epochs=8, batch_size=100, lr=3e-3
    )
    test = {"x": x[4000:]}
    stats = cal.inference.posterior(means, guide, test, covariates={"mask": mask[4000:]}, draws=20)["sample_stats"]
    elbo = torch.as_tensor((stats["log_p"] - stats["log_q"]).mean(("chain", "draw")).values)
    seen, values = mask[4000:].double(), x[4000:].double()
    count, total = seen.sum(1), (seen * values).sum(1)
    evidence = (
        -0.5 * (count * torch.log(torch.tensor(8 * torch.pi)) + torch.log1p(count / 4))
        - (seen * values**2).sum(1) / 8
        + total**2 / (8 * (count + 4))
    )
    gap = evidence - elbo
    assert -5 * float(gap.std()) / 2000**0.5 < float(gap.mean()) < 0.02
