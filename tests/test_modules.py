"""Modules of torch and Pyro that keep tensors of their own, modules reached by several names, and dtypes of weights."""

import copy

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations

import calibrant as cal
from calibrant.errors import DataError, ProgramError
from calibrant.program.modules import copied

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
X = {"x": (torch.rand(24, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()}


class Own(nn.Linear):
    """A user's subclass, which the norms are applied to as well."""


class Norm(nn.Module):
    """A layer that is normalised inside a module of the user."""

    def __init__(self, norm, cls=nn.Linear):
        super().__init__()
        self.first, self.last = norm(cls(2, 8)), nn.Linear(8, 6)

    def forward(self, z):
        return self.last(torch.tanh(self.first(z)))


NORMS = {
    "weight_norm": lambda: Norm(utils.weight_norm),
    "weight_norm of a subclass": lambda: Norm(utils.weight_norm, Own),
    "weight_norm of the bias": lambda: Norm(lambda layer: utils.weight_norm(layer, "weight", None)),
    "spectral_norm": lambda: Norm(utils.spectral_norm),
    "weight_norm, parametrized": lambda: Norm(parametrizations.weight_norm),
    "spectral_norm, parametrized": lambda: Norm(parametrizations.spectral_norm),
}


def model_of(decoder):
    return cal.models.from_decoder(decoder.eval(), prior=2, likelihood="bernoulli")


def plain(decoder):
    """The same decoder with ordinary weights."""
    with torch.no_grad():
        decoder(torch.zeros(1, 2))  # computes the weight
        twin = Norm(lambda layer: layer)
        twin.load_state_dict({f"{part}.{n}": getattr(getattr(decoder, part), n).detach()
                              for part in ("first", "last") for n in ("weight", "bias")})  # fmt: skip
    return twin


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_normalised_decoder_has_the_density_of_its_plain_twin_in_float64(make):
    decoder = make().eval()
    twin, model = model_of(plain(decoder)), model_of(decoder)
    values = {**X, "z": torch.randn(24, 2)}
    with cal.program.defaults(model, values, torch.float64) as place:
        held = cal.program.cast(values, *place)
        mine, its = (cal.program.log_density(cal.program.in_double(m), held, 24)["x"] for m in (model, twin))
    torch.testing.assert_close(mine, its, atol=2e-5, rtol=0)  # the twin's weights are rounded to float32
    assert mine.dtype == torch.float64
    rounded = cal.program.log_density(model, values, 24)["x"]
    assert (rounded.double() - mine).abs().max() > 0
    torch.testing.assert_close(rounded.double(), mine, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_normalised_decoder_is_trained_refined_and_saved(make, tmp_path):
    model = model_of(make())
    guide = cal.guides.amortize(model, X)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fitted = cal.inference.fit(model, guide, X, epochs=2, batch_size=8, validation=cal.data.Data(X))
    assert all(not torch.equal(before[name], weight) for name, weight in model.named_parameters() if weight.numel() > 8)
    cal.guides.refine(model, guide, X, steps=2)
    tree = cal.inference.posterior(model, guide, X, draws=5)
    cal.store.save_run(tmp_path / "run", model, guide, fitted, settings={"seed": 0})
    again = cal.load(tmp_path / "run", model=model_of(make()))
    redrawn = cal.inference.posterior(*again[:2], X, draws=5)
    assert redrawn.sample_stats.log_p.equals(tree.sample_stats.log_p)


class FlowPrior(PyroModule):
    def __init__(self, flow):
        super().__init__()
        self.flow, self.decoder = flow, nn.Linear(2, 6)
        self.register_buffer("zero", torch.zeros(2))

    def forward(self, size):
        with pyro.plate("data", size):
            base = dist.Normal(self.zero, 1.0).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [self.flow]).expand([size]))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1))


FLOWS = {
    "affine autoregressive": lambda: T.affine_autoregressive(2, hidden_dims=[8]),
    "affine coupling": lambda: T.affine_coupling(2, hidden_dims=[8]),
    "spline coupling": lambda: T.spline_coupling(2, count_bins=4),
    "spline autoregressive": lambda: T.spline_autoregressive(2, hidden_dims=[8], count_bins=4),
}


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_flows_of_pyro_are_priors(make):
    model = FlowPrior(make())
    assert cal.program.check_program(model, X) is model
    values = cal.program.sample_prior(model, 24, seed=0)
    density = cal.program.log_density(model, values, observed=["x"])
    torch.manual_seed(0)
    x, flow = torch.randn(24, 2), copied(model.flow)
    z = flow(x)
    wanted = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - flow.log_abs_det_jacobian(x, z)
    torch.testing.assert_close(density["z"].shape, wanted.shape)
    found = cal.program.log_density(model, {"z": z.detach(), **X}, observed=["x"])
    torch.testing.assert_close(found["z"], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_a_density_is_that_of_the_current_weights(make):
    """Pyro's flows remember the last tensor that they have mapped, whatever their weights were then."""
    model = FlowPrior(make())
    values = cal.program.sample_prior(model, 24, seed=0)
    with torch.no_grad():
        before = cal.program.log_density(model, values, observed=["x"])["z"]
        for weight in model.flow.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    after = cal.program.log_density(model, values, observed=["x"])["z"]
    again = cal.program.log_density(model, {name: value.clone() for name, value in values.items()}, observed=["x"])["z"]
    torch.testing.assert_close(after, again)
    assert after.requires_grad
    assert not torch.allclose(before, after)


class Shared(nn.Module):
    """One layer that is reached by two names, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.tied = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again, self.tied.weight = nn.Sequential(self.first), self.last.weight

    def forward(self, z):
        return self.tied(self.last(self.first(z) + self.again(z)))


def test_a_module_reached_by_two_names_keeps_its_weights():
    decoder = Shared().eval()
    model, before = model_of(decoder), copy.deepcopy(decoder.state_dict())
    cal.program.check_program(model, X)
    double = cal.program.in_double(model)
    z = torch.randn(24, 2, dtype=torch.float64)
    with cal.program.defaults(model, X, torch.float64):
        found = cal.program.log_density(double, {"z": z, "x": X["x"].double()}, 24)["x"]
    logits = copy.deepcopy(decoder).double()(z)
    torch.testing.assert_close(found, dist.Bernoulli(logits=logits).log_prob(X["x"].double()).sum(-1))
    guide = cal.guides.amortize(model, X)
    cal.inference.posterior(model, guide, X, draws=2)
    cal.guides.refine(model, guide, X, steps=2)
    after = decoder.state_dict()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    weights = dict(decoder.named_parameters())
    cal.inference.fit(model, guide, X, epochs=1, batch_size=8)
    assert all(weight is weights[name] and weight.dtype == torch.float32 for name, weight in decoder.named_parameters())


# -- dtypes ------------------------------------------------------------------------------------------------------------


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 6)

    def forward(self, z):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(z).float()


class Cast(Autocast):
    def forward(self, z):
        return self.inner(z.to(torch.bfloat16).to(z.dtype))


def mixed():
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 6))
    decoder[1].double()
    return decoder


DTYPES = {
    "half": (lambda: nn.Linear(2, 6).half(), "float16, in which no density is accurate: call .float()"),
    "bfloat16": (lambda: nn.Linear(2, 6).bfloat16(), "bfloat16, in which no density is accurate: call .float()"),
    "autocast": (Autocast, "computes in torch.bfloat16 inside"),
    "cast": (Cast, "computes in torch.bfloat16 inside"),
    "mixed": (mixed, r"'decoder.0.weight' has the dtype float32 and 'decoder.1.weight' has the dtype float64"),
}


@pytest.mark.parametrize(("make", "words"), DTYPES.values(), ids=DTYPES)
def test_parts_in_low_or_mixed_precision_are_refused_in_one_line(make, words):
    with pytest.raises(ProgramError, match=words) as refusal:
        cal.inference.posterior(model_of(make()), cal.guides.from_encoder(nn.Linear(6, 4)), X, draws=2)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 6).half(), mixed], ids=["half", "mixed"])
def test_the_remedy_for_dtypes(make):
    model = model_of(make().float())
    guide = cal.guides.from_encoder(nn.Linear(6, 4), "loc, log_scale")
    cal.inference.posterior(model, guide, X, draws=2)
    with pytest.raises(ProgramError, match=r"the guide: .* float32, and those of the model float64: call \.double\(\)"):
        cal.inference.posterior(model.double(), guide, X, draws=2)
    cal.inference.posterior(model, guide.double(), X, draws=2)


def test_data_without_values():
    model, data = model_of(nn.Linear(2, 6)), {"x": torch.zeros(4, 6, device="meta")}
    for call in (cal.program.check_program, cal.guides.amortize):
        with pytest.raises(DataError, match="'x' is on the device 'meta'"):
            call(model, data)


def test_weights_without_values():
    with torch.device("meta"):
        decoder = nn.Linear(2, 6)
    with pytest.raises(ProgramError, match=r"'decoder\.weight' is on the device 'meta'"):
        model_of(decoder)
    with torch.inference_mode():
        decoder = nn.Linear(2, 6)
    with pytest.raises(ProgramError, match=r"'decoder.weight' was made inside torch.inference_mode\(\)"):
        model_of(decoder)
