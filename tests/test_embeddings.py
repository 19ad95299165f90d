"""Networks of the models of representations: heads, modules of one's own, frozen or not, and what is read from them."""

import copy

import pytest
import torch
from torch import nn

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.models.parts.embeddings import Embedding, by_rows
from calibrant.program.environment import seeded

IMAGE = (1, 6, 6)
PROGRAMS = {
    "pair": {"widths": [8]},
    "hib": {"widths": [8]},
    "mcinfonce": {"widths": [8]},
    "infonce": {},
    "elk": {"widths": [8], "classes": 3},
    "nivmf": {"widths": [8], "classes": 3, "draws": 4},
    "het-xl": {"classes": 3},
    "classifier": {"classes": 3},
}


def backbone(seed=1):
    """A network with batch norm, whose statistics are not those of any batch here."""
    with seeded(seed):
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
        network.train()(torch.randn(64, *IMAGE))
    return network.eval()


def frozen(seed=1):
    return backbone(seed).requires_grad_(False)


def images(name, size=96):
    """Labelled images of three classes, as the program takes them."""
    with seeded(3):
        y = torch.arange(size) % 3
        x = torch.randn(3, *IMAGE)[y] + 0.5 * torch.randn(size, *IMAGE)
    data = cal.data.Data({"x": x}, {"y": y})
    if name in ("pair", "hib"):
        return cal.representations.pairs(data, size, seed=2)
    if name in ("mcinfonce", "infonce"):
        return cal.representations.candidates(data, size, candidates=4, seed=2)
    return cal.data.Data({"y": y}, {"x": x})


def trained(name, data, shape, encoder, epochs=3):
    with seeded(7):
        model = cal.models.create(name, shape=shape, latents=3, encoder=encoder, **PROGRAMS[name])
    guide = cal.guides.prior(model)
    averaged = {"objective": "iwae", "particles": 2} if model.loss_kind == "marginal" else {"objective": "stl"}
    plan = {**averaged, "epochs": epochs, "batch_size": 32, "lr": 3e-3, "seed": 1}
    cal.inference.fit(model, guide, data, validation=data, **plan)
    return model


def heads(model):
    return {name: weight for name, weight in model.named_parameters() if ".module." not in name}


def furthest(one, other):
    """The largest difference of weights, in units of the largest weight."""
    ours, theirs = ({n: w.detach() for n, w in heads(model).items()} for model in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / ours[n].abs().max().clamp_min(1e-2)) for n in ours)


@pytest.mark.parametrize("name", PROGRAMS)
def test_heads_on_cached_features_are_those_through_the_frozen_module(name):
    data, network = images(name), frozen()
    through = trained(name, data, IMAGE, network)
    observed, covariates = data.tensors()
    with torch.no_grad():
        cached = {n: network(v.flatten(0, v.dim() - 4)).reshape(*v.shape[:-3], -1) for n, v in covariates.items()}
    on_features = trained(name, cal.data.Data(observed, cached), (64,), "linear")
    assert furthest(through, on_features) < 1e-3
    assert furthest(through, trained(name, data, IMAGE, frozen(seed=2))) > 1e-2  # another network gives other heads
    torch.testing.assert_close(through.embed(covariates["x"]), on_features.embed(cached["x"]), atol=1e-3, rtol=1e-3)


def test_a_frozen_module_keeps_weights_and_statistics_and_another_is_fine_tuned():
    data = images("classifier")
    for network, moves in ((frozen(), False), (nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh()), True)):
        before = copy.deepcopy(network.state_dict())
        trained("classifier", data, IMAGE, network, epochs=2)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) != moves


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_read_needs_no_mode_and_no_gradient(name):
    with seeded(7):
        model = cal.models.create(name, shape=IMAGE, latents=3, encoder=backbone(), **PROGRAMS[name])
        x = torch.randn(2100, *IMAGE)
    model.train()
    model.embedding.eval() if hasattr(model, "embedding") else model.network.eval()
    modes = [part.training for part in model.modules()]
    embedded, uncertain = model.embed(x), model.uncertainty(x)
    assert [part.training for part in model.modules()] == modes
    assert embedded.shape == (2100, 3)
    assert uncertain.shape == (2100,)
    assert not embedded.requires_grad
    assert not uncertain.requires_grad
    torch.testing.assert_close(model.embed(x[1500:1600]), embedded[1500:1600])
    if name not in ("het-xl", "classifier"):
        torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2100))
    if hasattr(model, "class_probabilities"):
        torch.testing.assert_close(model.class_probabilities(x[:5]).sum(-1), torch.ones(5))


def test_uncertainty_is_one_over_the_concentration():
    with seeded(0):
        embedding = Embedding((4,), 3, "linear", start=5.0)
        x = torch.randn(7, 4)
    location, concentration = embedding(x)
    torch.testing.assert_close(concentration, torch.full((7,), 5.0))
    torch.testing.assert_close(location.norm(dim=-1), torch.ones(7))
    normal = Embedding((4,), 3, "linear", "normal", start=4.0)
    torch.testing.assert_close(normal.distribution(x).stddev, torch.full((7, 3), 0.5))
    assert not torch.allclose(normal(x)[0].norm(dim=-1), torch.ones(7))
    model = cal.models.create("pair", shape=[4], latents=3, encoder="linear", start=5.0)
    torch.testing.assert_close(model.uncertainty(x), torch.full((7,), 0.2))


def test_class_entropy_is_in_nats():
    model = cal.models.create("classifier", shape=[4], classes=6, encoder="linear")
    for weight in model.output.parameters():
        nn.init.zeros_(weight)
    torch.testing.assert_close(model.uncertainty(torch.randn(3, 4)), torch.full((3,), 6.0).log())


def test_the_networks_of_the_controlled_experiment_have_eight_linear_layers():
    encoder = {
        "direction": {"name": "deep", "width": 10},
        "concentration": {"name": "deep"},
    }
    model = cal.models.create("pair", shape=[10], latents=10, encoder=encoder)
    found = [part for part in model.modules() if isinstance(part, nn.Linear)]
    sizes = sorted((layer.in_features, layer.out_features) for layer in found)
    direction = [(10, 100), (100, 500), *[(500, 500)] * 4, (500, 100), (100, 10)]
    concentration = [(10, 10), (10, 50), *[(50, 50)] * 4, (50, 10), (10, 1)]
    assert sizes == sorted([*direction, *concentration])
    assert model.recipe is not None  # it can be rebuilt from a run folder
    x = torch.randn(6, 10, requires_grad=True)
    location, concentration = model.embedding(x)
    weights = [*model.embedding.own_network.parameters()]
    assert all(g is None for g in torch.autograd.grad(location.sum(), weights, allow_unused=True, retain_graph=True))


def test_candidates_are_embedded_one_by_one():
    with seeded(0):
        embedding, x = (
            Embedding(IMAGE, 3, {"name": "conv", "channels": 8, "hidden": 8}).eval(),
            torch.randn(5, 4, *IMAGE),
        )
    location, concentration = embedding(x)
    assert location.shape == (5, 4, 3)
    torch.testing.assert_close(location[2], embedding(x[2])[0])
    torch.testing.assert_close(concentration[2], embedding(x[2])[1])


def test_whole_numbers_are_grey_values():
    with seeded(0):
        embedding = Embedding(IMAGE, 3)
        x = torch.randint(0, 256, (5, *IMAGE), dtype=torch.uint8)
    torch.testing.assert_close(embedding(x)[0], embedding(x.float() / 255)[0])


def test_by_rows_restores_modes_when_the_function_fails():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with pytest.raises(ZeroDivisionError):
        by_rows(model, lambda rows: rows / (1 // 0), torch.zeros(3, 2))
    assert model[1].training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"encoder": "resnet"}, "unknown encoder 'resnet'"),
        ({"encoder": {"name": "mlp", "width": 3}}, "encoder 'mlp' has no argument 'width'"),
        ({"encoder": {"name": "mlp", "hidden": 0}}, "hidden=0"),
        ({"encoder": {"direction": "mlp"}}, "for one network, or"),
        ({"encoder": nn.Linear(3, 2)}, r"Linear takes no inputs \(n, 1, 6, 6\)"),
        ({"encoder": nn.Conv2d(1, 2, 3)}, r"returns \(2, 2, 4, 4\) for 2 inputs.*nn.Flatten"),
        ({"latents": 1}, "latents=1"),
        ({"start": 0.0}, "start=0.0"),
        ({"concentration": -1.0}, "concentration=-1.0"),
        ({"posterior": "laplace"}, "posterior='laplace'"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ProgramError, match=words):
        cal.models.create("pair", **{"shape": IMAGE, **arguments})


@pytest.mark.parametrize("name", ["mcinfonce", "infonce"])
def test_unknown_forms(name):
    with pytest.raises(ProgramError, match="form='original' is unknown"):
        cal.models.create(name, shape=IMAGE, form="original")
