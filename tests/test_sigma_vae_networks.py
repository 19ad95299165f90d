"""The small network of the σ-VAE (arXiv 2006.13202): the decoder and the guide are those of a plain module."""

import json

import pyro
import pytest
import torch
from torch import nn

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.guides.encoders.choosing import make_encoder
from calibrant.guides.families.heads import Head
from calibrant.models.parts.decoders import make_decoder
from calibrant.program.environment import seeded

LATENTS = 20


class Published(nn.Module):
    """The network as the paper writes it: mean and log variance of q, and the mean of an image."""

    def __init__(self, channels: int, height: int, width: int, filters: int, latents: int = LATENTS) -> None:
        super().__init__()
        f, flat = filters, 4 * filters * (height // 4) * (width // 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, f, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(f, 2 * f, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * f, 4 * f, 5, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.mean, self.log_variance = nn.Linear(flat, latents), nn.Linear(flat, latents)
        self.decoder = nn.Sequential(
            nn.Linear(latents, flat),
            nn.Unflatten(1, (4 * f, height // 4, width // 4)),
            nn.ConvTranspose2d(4 * f, 2 * f, 6, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * f, f, 6, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(f, channels, 5, 1, 2),
            nn.Sigmoid(),
        )


def parameters_by_hand(channels: int, height: int, width: int, f: int, latents: int = LATENTS) -> tuple[int, int]:
    """The numbers of parameters of q and of the decoder, layer by layer: weights, then biases."""
    flat = 4 * f * (height // 4) * (width // 4)
    encoder = 9 * channels * f + f + 16 * f * 2 * f + 2 * f + 25 * 2 * f * 4 * f + 4 * f
    heads = 2 * (flat * latents + latents)
    decoder = latents * flat + flat + 36 * 4 * f * 2 * f + 2 * f + 36 * 2 * f * f + f + 25 * f * channels + channels
    return encoder + heads, decoder


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def vae_and_guide(shape, width, likelihood="gaussian", **options):
    """A VAE with the published networks, and images for it."""
    with seeded(0):
        named = {"name": "sigma-vae", "width": width}
        model = cal.models.create("vae", shape=shape, latents=LATENTS, decoder=named, likelihood=likelihood)
        x = torch.rand(12, *shape)
        guide = cal.guides.amortize(model, {"x": x}, encoder=json.loads(json.dumps(named)), **options)
    return model, guide, x


@pytest.mark.parametrize(("shape", "width"), [((3, 28, 28), 32), ((1, 28, 20), 4), ((3, 32, 32), 8)])
def test_the_numbers_of_parameters_are_those_of_the_paper(shape, width):
    model, guide, _ = vae_and_guide(shape, width)
    wanted = parameters_by_hand(*shape, width)
    assert (count(guide), count(model.decoder)) == wanted
    assert sum(wanted) == count(Published(*shape, width))
    if (shape, width) == ((3, 28, 28), 32):
        assert wanted == (489_576, 502_851)


@pytest.mark.parametrize(("shape", "width"), [((1, 28, 20), 4), ((3, 28, 28), 8)])
def test_with_the_weights_of_a_plain_module_the_guide_and_the_decoder_are_that_module(shape, width):
    model, guide, x = vae_and_guide(shape, width)
    with seeded(1):
        plain = Published(*shape, width)
    guide.encoder.network.load_state_dict(plain.encoder.state_dict())
    (head,) = guide.heads
    for name in ("weight", "bias"):
        both = [getattr(plain.mean, name), getattr(plain.log_variance, name)]
        getattr(head.out, name).data.copy_(torch.cat(both))
    model.decoder.network.load_state_dict(plain.decoder.state_dict())
    with torch.no_grad(), pyro.get_param_store().scope():
        q = pyro.poutine.trace(guide).get_trace({"x": x}, len(x)).nodes["z"]["fn"].base_dist
        features = plain.encoder(x)
        torch.testing.assert_close(q.mean, plain.mean(features))
        torch.testing.assert_close(q.variance, plain.log_variance(features).exp())
        z = torch.randn(5, LATENTS)
        torch.testing.assert_close(model.decoder(z), plain.decoder(z))


def test_the_initial_weights_are_those_of_torch():
    """Of every layer, weights are uniform within 1/√(inputs): standard deviation 1/√(3 inputs)."""
    _, guide, _ = vae_and_guide((1, 28, 20), 8)
    plain = Published(1, 28, 20, 8)
    ours = {**dict(guide.encoder.network.named_parameters()), "head": guide.heads[0].out.weight}
    theirs = {**dict(plain.encoder.named_parameters()), "head": plain.mean.weight}
    for name, weight in ours.items():
        if weight.numel() > 200:
            assert abs(weight.std() / theirs[name].std() - 1) < 0.2, name
    assert guide.heads[0].out.bias.abs().max() > 0


def test_one_seed_gives_one_guide_and_its_specification_rebuilds_it():
    _, guide, x = vae_and_guide((1, 28, 20), 4)
    _, again, _ = vae_and_guide((1, 28, 20), 4)
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), again.parameters(), strict=True))
    assert guide.spec["encoder"] == {"x": {"kind": "sigma-vae", "width": 4}}
    assert guide.spec["sites"][0]["family"] == "log-variance"
    rebuilt = type(guide)(json.loads(json.dumps(guide.spec)))
    rebuilt.load_state_dict(guide.state_dict())
    torch.testing.assert_close(rebuilt.encoder({"x": x}), guide.encoder({"x": x}))


def test_a_family_that_is_asked_for_is_kept():
    _, guide, _ = vae_and_guide((1, 8, 8), 2, family="laplace")
    assert guide.spec["sites"][0]["family"] == "laplace"
    _, full, _ = vae_and_guide((1, 8, 8), 2, structure="full")
    assert full.spec["sites"][0]["family"] == "dense"


def test_a_scale_keeps_its_family_and_is_seen_by_the_latents():
    with seeded(0):
        model = cal.models.create("ea-vae", shape=(1, 8, 8), latents=3, decoder={"name": "sigma-vae", "width": 2})
        x = torch.rand(64, 1, 8, 8)
    guide = cal.guides.amortize(model, {"x": x}, encoder="sigma-vae")
    families = {site["name"]: site["family"] for site in guide.spec["sites"]}
    assert families == {"scale": "lognormal", "z": "log-variance"}
    few = cal.inference.posterior(model, guide, {"x": x[:4]}, draws=50)["sample_stats"]
    once = cal.inference.posterior(model, guide, {"x": x[:4]}, draws=1)["sample_stats"]
    assert few["log_q"].shape == (1, 50, 4)
    assert bool(few["log_q"].notnull().all() & once["log_q"].notnull().all())


def test_many_draws_of_a_scale_give_the_distributions_of_single_draws():
    with seeded(0):
        head = Head(6, 2, torch.Size([3]), "log-variance")
        features, parents = torch.randn(4, 6), torch.randn(20, 2)
    together = head(features, parents, 20).base_dist
    alone = head(features.repeat_interleave(5, 0), parents).base_dist
    torch.testing.assert_close(together.loc, alone.loc)
    torch.testing.assert_close(together.scale, alone.scale)


# -- training ----------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_weight_and_training_improves_the_elbo():
    model, guide, x = vae_and_guide((1, 8, 8), 4)
    data = {"x": (x.repeat(20, 1, 1, 1) + 0.1 * torch.randn(240, 1, 8, 8)).clamp(0, 1)}
    before = {name: w.clone() for part in (model, guide) for name, w in part.named_parameters()}
    stats = cal.inference.posterior(model, guide, data, draws=5)["sample_stats"]
    start = float((stats["log_p"] - stats["log_q"]).mean())
    found = cal.inference.fit(model, guide, data, epochs=25, batch_size=60, lr=1e-2)
    assert found.elbo > start + 5
    after = {name: w for part in (model, guide) for name, w in part.named_parameters()}
    assert [name for name in before if torch.equal(before[name], after[name])] == []


# -- outputs -----------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "one": {"location": (1, 8, 12)},
    "two": {"location": (3, 8, 8), "log_scale": (3, 8, 8)},
    "three": {"log_scale": (3, 8, 8), "location": (3, 8, 8), "log_freedom": (1, 8, 8)},
    "logits of grey values": {"logits": (256, 3, 8, 8)},
    "a user's own": {"output": (2, 4, 4)},
}


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_the_sigmoid_acts_on_locations_alone(outputs):
    with seeded(0):
        decoder = make_decoder({"name": "sigma-vae", "width": 2}, 3, outputs)
        z = 1000 * torch.randn(6, 3)
    found = decoder(z)
    found = found if isinstance(found, tuple) else (found,)
    for (name, shape), part in zip(outputs.items(), found, strict=True):
        assert part.shape == (6, *shape)
        inside = bool(((part >= 0) & (part <= 1)).all())
        assert inside == (name == "location"), name


@pytest.mark.parametrize(
    ("decoder", "size"),
    [
        ({"name": "mlp", "hidden": 7}, 3 * 7 + 7 + 49 + 7 + 7 * 64 + 64),
        ({"name": "conv", "channels": 3}, 3 * 6 * 4 + 24 + 16 * 6 * 3 + 3 + 16 * 3 + 1),
        ({"name": "linear", "bias": False}, 3 * 64),
        ("linear", 3 * 64 + 64),
    ],
)
def test_decoders_take_arguments(decoder, size):
    assert count(make_decoder(decoder, 3, {"location": (1, 8, 8)})) == size
    model = cal.models.create("vae", shape=(1, 8, 8), latents=3, decoder=decoder)
    assert model.recipe.arguments["decoder"] == decoder


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"hidden": 3}, "lacks the name"),
        ("convolutional", "unknown decoder 'convolutional'; known: "),
        ({"name": ["mlp"]}, "unknown decoder"),
        ({"name": "mlp", "width": 3}, "no argument 'width'; its arguments are: hidden. Give them beside the name"),
        ({"name": "sigma-vae", "latents": 3}, "no argument 'latents'; its arguments are: width"),
        ({"name": "mlp", "hidden": 0}, "hidden=0 is given, wanted a whole number above 0"),
        ({"name": "sigma-vae", "width": "4"}, "width='4' is given, wanted a whole number above 0"),
    ],
)
def test_decoders_that_cannot_be_made_are_refused(decoder, message):
    with pytest.raises(ProgramError, match=message):
        cal.models.create("vae", shape=(1, 8, 8), decoder=decoder)


@pytest.mark.parametrize("shape", [(1, 8, 6), (64,)])
def test_decoders_of_other_shapes_are_refused(shape):
    with pytest.raises(ProgramError, match="convolutional decoder"):
        cal.models.create("vae", shape=shape, decoder="sigma-vae")


# -- encoders by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 9, 6), (2, 2, 3), (1, 31, 5)])
def test_features_of_images_of_any_size(shape):
    encoder = make_encoder({"name": "sigma-vae", "width": 3}, {"x": shape})
    assert encoder({"x": torch.rand(2, *shape)}).shape == (2, encoder.features)


def test_a_name_with_options_is_the_kind_of_every_input_that_fits():
    image, vector = {"x": (1, 8, 8)}, {"x": (5,)}
    for spec, shapes in (
        ({"name": "conv", "channels": 8, "hidden": 16}, image),
        ({"name": "mlp", "hidden": 16}, vector),
        ({"name": "set", "hidden": 16}, {"x": (7, 3)}),
    ):
        assert make_encoder(spec, shapes).features == make_encoder({"x": {**_kind(spec)}}, shapes).features
    fused = make_encoder({"name": "sigma-vae", "width": 2}, {"x": (1, 8, 8), "age": ()})
    assert fused({"x": torch.rand(2, 1, 8, 8), "age": torch.rand(2)}).shape == (2, fused.features)
    assert make_encoder({"name": "mlp"}, {"name": (3,)}).features == 512  # an input that is called "name"


def _kind(spec):
    return {"kind" if key == "name" else key: value for key, value in spec.items()}


@pytest.mark.parametrize(
    ("spec", "shapes", "message"),
    [
        ("sigma-vae", {"x": (4,)}, "finds no input that fits"),
        ({"name": "sigma-vae", "width": 0}, {"x": (1, 8, 8)}, "width=0 of the encoder 'sigma-vae': give a whole"),
        ({"name": "sigma-vae", "depth": 1}, {"x": (1, 8, 8)}, "depth"),
        ({"name": "vae"}, {"x": (1, 8, 8)}, "unknown encoder 'vae'"),
        ("sigma-vae", {"x": (1, 1, 8)}, "at least 2×2 pixels"),
    ],
)
def test_encoders_that_cannot_be_made_are_refused(spec, shapes, message):
    with pytest.raises(ProgramError, match=message):
        make_encoder(spec, shapes)
