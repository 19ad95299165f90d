"""What programs, guides, decoders and encoders may return, and what to write in place of the rest."""

import dataclasses
from collections import OrderedDict, namedtuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import calibrant as cal
from calibrant.errors import ProgramError

Y = {"x": torch.linspace(-1.0, 1.0, 12)}
X = {"x": torch.randn(6, 12, generator=torch.Generator().manual_seed(0))}
Pair = namedtuple("Pair", "loc scale")


@dataclasses.dataclass
class Moments:
    loc: torch.Tensor
    scale: torch.Tensor


class Output(OrderedDict):
    """Keys are attributes too, as in common libraries."""

    def __getattr__(self, name):
        return self[name]


RETURNS = {
    "nothing": lambda loc, scale: None,
    "pair": lambda loc, scale: (loc, scale),
    "list": lambda loc, scale: [loc, scale],
    "namedtuple": Pair,
    "dataclass": Moments,
    "dict": lambda loc, scale: {"loc": loc, "scale": scale},
    "output": lambda loc, scale: Output(loc=loc, scale=scale),
    "distribution": lambda loc, scale: dist.Normal(loc, scale),
    "triple": lambda loc, scale: (loc + scale, loc, scale),
}


@pytest.mark.parametrize("made", RETURNS.values(), ids=RETURNS)
def test_what_programs_and_guides_return_does_not_matter(made):
    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = pyro.sample("x", dist.Normal(z, 1.0))
        return made(x, z.exp())

    def guide(observed, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(observed["x"] / 2, 0.5**0.5))
        return made(z, z.exp())

    tree = cal.inference.posterior(model, guide, Y, draws=20)
    weights = tree.sample_stats.log_p - tree.sample_stats.log_q
    evidence = dist.Normal(0.0, 2**0.5).log_prob(Y["x"].double())
    np.testing.assert_allclose(weights.mean(["chain", "draw"]), evidence, atol=1e-6)
    amortized = cal.guides.amortize(model, Y)
    cal.inference.fit(model, amortized, Y, epochs=1, batch_size=4)


class Part(nn.Module):
    """A decoder or encoder that returns location and scale in some form."""

    def __init__(self, entries, made):
        super().__init__()
        self.linear, self.made = nn.Linear(*entries), made

    def forward(self, x):
        loc, raw = self.linear(x).chunk(2, 1)
        return self.made(loc, raw.exp())


READ = {
    "pair": lambda out: out,
    "namedtuple": lambda out: (out.loc, out.scale),
    "dataclass": lambda out: (out.loc, out.scale),
    "dict": lambda out: (out["loc"], out["scale"]),
    "output": lambda out: (out.loc, out.scale),
    "distribution": lambda out: (out.mean, out.stddev),
}


@pytest.mark.parametrize("kind", READ)
def test_a_decoder_returns_anything_that_its_likelihood_reads(kind):
    def likelihood(out):
        loc, scale = READ[kind](out)
        return dist.Normal(loc, scale).to_event(1)

    torch.manual_seed(0)
    model = cal.models.from_decoder(Part((2, 24), RETURNS[kind]).eval(), 2, likelihood)
    z = torch.randn(6, 2)
    density = cal.program.log_density(model, {**X, "z": z}, observed=["x"])["x"]
    loc, raw = model.decoder.linear(z).chunk(2, 1)
    torch.testing.assert_close(density, dist.Normal(loc, raw.exp()).log_prob(X["x"]).sum(-1))
    if kind != "pair":
        with pytest.raises(ProgramError, match="give a function of this output that returns a distribution"):
            cal.models.from_decoder(model.decoder, 2, "gaussian")


class Around(nn.Module):
    """The module that the refusal of an encoder asks for, with the body that it prints."""

    def __init__(self, encoder, body):
        super().__init__()
        self.encoder, self.body = encoder, body

    def forward(self, x):
        found = {"self": self, "x": x}
        statement, _, value = self.body.partition("; return ")
        exec(statement, found)
        return eval(value, found)


@pytest.mark.parametrize("kind", ["pair", "list", "namedtuple"])
def test_encoders_that_are_taken(kind):
    model = cal.models.from_decoder(nn.Linear(2, 12).eval(), 2, "gaussian")
    guide = cal.guides.from_encoder(Part((12, 4), RETURNS[kind]).eval())
    assert cal.inference.posterior(model, guide, X, draws=5).posterior.sizes["draw"] == 5


@pytest.mark.parametrize("kind", ["dataclass", "dict", "output", "distribution", "triple"])
def test_encoders_that_are_refused_with_what_to_write(kind):
    model = cal.models.from_decoder(nn.Linear(2, 12).eval(), 2, "gaussian")
    encoder = Part((12, 4), RETURNS[kind]).eval()
    with pytest.raises(ProgramError, match="the guide: the encoder returns") as refusal:
        cal.inference.posterior(model, cal.guides.from_encoder(encoder), X, draws=5)
    body = str(refusal.value).partition("does: ")[2].partition(", with output=")[0]
    around = Around(encoder, body)
    loc, raw = encoder.linear(X["x"]).chunk(2, 1)
    for found, wanted in zip(around(X["x"]), (loc, raw.exp()), strict=True):
        torch.testing.assert_close(found, wanted)
    cal.inference.posterior(model, cal.guides.from_encoder(around), X, draws=5)


# -- arguments of models -----------------------------------------------------------------------------------------------

ARGUMENTS = {
    "latents='abc'": ({"latents": "abc"}, 'latents="abc" is given, wanted a whole number above 0'),
    "latents=2.5": ({"latents": 2.5}, "latents=2.5 is given, wanted a whole number above 0"),
    "latents=0": ({"latents": 0}, "latents=0 is given, wanted a whole number above 0"),
    "latents=-2": ({"latents": -2}, "latents=-2 is given, wanted a whole number above 0"),
    "latents=null": ({"latents": None}, "latents=null is given, wanted a whole number"),
    "latents=true": ({"latents": True}, "latents=true is given, wanted a whole number"),
    "shape=5": ({"shape": 5}, r"shape=5 is given, wanted a list of whole numbers above 0, such as \[1, 8, 8\]"),
    "shape='ab'": ({"shape": "ab"}, 'shape="ab" is given, wanted a list'),
    "shape=[5.5]": ({"shape": [5.5]}, r"shape=\[5.5\] is given, wanted a list"),
    "shape=[0]": ({"shape": [0]}, r"shape=\[0\] is given, wanted a list"),
    "shape=[[1]]": ({"shape": [[1]]}, r"shape=\[\[1\]\] is given, wanted a list"),
}


@pytest.mark.parametrize("name", cal.models.list_models())
@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_the_wrong_type_are_named(name, arguments, words):
    with pytest.raises(ProgramError, match=f"^{name}: {words}") as refusal:
        cal.models.create(name, **{"shape": [5], **arguments})
    assert "\n" not in str(refusal.value)


FILE = """
from typing import Any, Protocol
from pyro.nn import PyroModule
class Sized(Protocol):
    def __len__(self): ...
class Mine(PyroModule):
    def __init__(self, a: Any, b: Sized, c: "unknown to Python" = 1, d: list[int] | None = None, e: int = 0, f=None):
        super().__init__()
"""


def test_annotations_that_are_no_types_refuse_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    arguments = {"a": "x", "b": [1], "d": [2], "e": -1, "f": 3.5}
    assert cal.models.create(f"{tmp_path}/mine.py:Mine", **arguments).recipe.arguments == arguments
    (tmp_path / "other.py").write_text(FILE.replace(', c: "unknown to Python" = 1', ""))
    assert cal.models.create(f"{tmp_path}/other.py:Mine", **arguments).recipe.arguments == arguments
    with pytest.raises(ProgramError, match=r'e="x" is given, wanted a whole number$'):
        cal.models.create(f"{tmp_path}/other.py:Mine", **{**arguments, "e": "x"})


@pytest.mark.parametrize("count", [3, np.int64(3), torch.tensor(3)], ids=["int", "numpy", "torch"])
def test_numbers_of_other_libraries_are_numbers(count):
    assert cal.models.create("ppca", shape=torch.Size([5]), latents=count).latents == 3
