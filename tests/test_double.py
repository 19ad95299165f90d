"""Float64 copies of modules, the defaults that a program runs under, and random state."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from small_models import three_levels
from torch import Tensor, nn
from torch.distributions import constraints

from calibrant.errors import ProgramError
from calibrant.program import check_program, defaults, in_double, log_density, sample_prior, seeded, sites, trace

X = torch.tensor([0.3, -1.2, 0.8])

# -- float64 copies ----------------------------------------------------------------------------------------------------


class Tied(PyroModule):
    """One weight under two names, as in an autoencoder with transposed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 2), nn.Linear(2, 2)
        self.down.weight = self.up.weight

    def mean(self, z: Tensor) -> Tensor:
        return self.down(self.up(z).tanh())

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 1.0).to_event(1))


class Buffers(Tied):
    """Floating and integer buffers, one of them not saved, and a layer with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([0.3, 1.7]))
        self.register_buffer("order", torch.tensor([1, 0]), persistent=False)
        self.norm = nn.BatchNorm1d(2)

    def mean(self, z: Tensor) -> Tensor:
        return self.norm(super().mean(z))[:, self.order] * self.gain


class Constrained(Tied):
    """A `PyroParam`: a positive parameter, held as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = PyroParam(torch.tensor([0.3, 1.7]), constraints.positive)

    def mean(self, z: Tensor) -> Tensor:
        return super().mean(z) * self.gain


class Bayesian(Tied):
    """A `PyroSample` whose prior is built in `__init__`, in the dtype of that time, and one that depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 2)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
        self.layer.bias = PyroSample(lambda layer: dist.Normal(layer.weight.mean(-1), 1.0).to_event(1))

    def mean(self, z: Tensor) -> Tensor:
        return self.layer(super().mean(z))

    def forward(self, size):
        assert self.layer.bias.shape == (2,)
        super().forward(size)


class Recurrent(Tied):
    """cuDNN-style layers hold their weights in a second list."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.LSTM(1, 2, batch_first=True)

    def mean(self, z: Tensor) -> Tensor:
        return self.steps(super().mean(z)[..., None])[0][:, -1]


class Parametrized(Tied):
    """Weight normalisation computes a weight from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    def mean(self, z: Tensor) -> Tensor:
        return self.extra(super().mean(z))


class Flow(Tied):
    """A prior that holds a network, which its density runs through once more."""

    def __init__(self) -> None:
        super().__init__()
        self.coupling = dist.transforms.affine_coupling(2, hidden_dims=[4])

    def forward(self, size):
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.TransformedDistribution(base, [self.coupling]))
            pyro.sample("x", dist.Normal(self.mean(z), 1.0).to_event(1))


MODELS = (Flow, Tied, Buffers, Constrained, Bayesian, Recurrent, Parametrized)


@pytest.mark.parametrize("cls", MODELS)
def test_in_double_is_the_module_in_double(cls):
    model = cls().eval()
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    values = {name: value.double() for name, value in sample_prior(model, 4, seed=0).items()}
    twin = copy.deepcopy(model).double()
    with defaults(model, values, torch.float64):
        double, wanted = log_density(in_double(model), values, 4), log_density(twin, values, 4)
    assert set(double) == set(wanted)
    for name in wanted:
        assert double[name].dtype == torch.float64
        torch.testing.assert_close(double[name], wanted[name], rtol=1e-10, atol=1e-10)
    single = log_density(model, {name: value.float() for name, value in values.items()}, 4)
    torch.testing.assert_close(single.joint, double.joint.float(), rtol=1e-4, atol=1e-4)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == before[name].dtype for name in before)
    assert pyro.get_param_store().keys() == set()


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract_and_sites_in_either_dtype(cls, dtype):
    """Data come as float32 whatever the dtype of the weights."""
    model = cls().eval().to(dtype)
    observed = {"x": torch.randn(5, 2)}
    check_program(model, observed)
    latent = sites(model, observed)
    assert latent["z"].children == ("x",)
    if cls is Bayesian:
        assert latent["layer.bias"].parents == ("layer.weight",)
        assert set(latent["layer.weight"].children) == {"layer.bias", "x"}
        assert not latent["layer.weight"].local
    assert {value.dtype for value in sample_prior(model, 2).values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_double_shares_no_storage(dtype):
    """A layer that counts its calls in training mode would otherwise count in the user's module."""
    model = Buffers().to(dtype).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    double = in_double(model)
    with defaults(model, {}, torch.float64):
        trace(double, 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.up.weight.zero_()
    with defaults(model, {}, torch.float64), seeded(0):
        first = trace(double, 2).nodes["x"]["fn"].mean
        assert first.abs().sum() > 0  # it keeps the weights of the time that it was made


def test_in_double_lets_gradients_reach_values_but_not_weights():
    model = Tied()
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    values = {"z": z, "x": torch.zeros(3, 2, dtype=torch.float64)}
    with defaults(model, values, torch.float64):
        log_density(in_double(model), values).joint.sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in model.parameters())


# -- defaults and random state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "values", "asked", "wanted"),
    [
        (Tied(), {}, None, torch.float32),
        (Tied().double(), {}, None, torch.float64),
        (Tied().double(), {"x": torch.zeros(2)}, None, torch.float64),
        (Tied().half(), {}, None, torch.float16),
        (Tied(), {}, torch.float64, torch.float64),
        (three_levels, {"x": torch.zeros(2).double()}, None, torch.float64),
        (three_levels, {"k": torch.zeros(2).long(), "x": torch.zeros(2).double()}, None, torch.float64),
        (three_levels, {"k": torch.zeros(2).long()}, None, torch.float32),
        (three_levels, {}, None, torch.float32),
    ],
)
def test_default_dtype_comes_from_weights_then_values(model, values, asked, wanted):
    with defaults(model, values, asked) as (device, dtype):
        assert (device, dtype, torch.zeros(1).dtype) == (torch.device("cpu"), wanted, wanted)
    assert torch.get_default_dtype() == torch.float32


def test_defaults_are_restored_after_an_error(global_state):
    single, before = Tied(), global_state()

    def fails():
        with defaults(Tied().double(), {}):
            with defaults(single, {}):
                assert torch.zeros(1).dtype == torch.float32
            assert torch.zeros(1).dtype == torch.float64
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert global_state() == before


def test_nothing_is_left_behind_by_a_program_that_fails(global_state):
    def fails(size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            raise ZeroDivisionError

    before = global_state()
    for call in (
        lambda: sample_prior(fails, 2, seed=0),
        lambda: log_density(fails, {"z": torch.zeros(2).double()}),
        lambda: sites(fails, {"x": torch.zeros(2).double()}),
        lambda: check_program(fails, {"x": torch.zeros(2).double()}),
    ):
        with pytest.raises((ZeroDivisionError, ProgramError)):
            call()
        assert global_state() == before


def test_seeded_draws_repeat_and_leave_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.randn(4)
        with seeded(4):
            torch.randn(2)
        second = torch.randn(4)

    def fails():
        with seeded(3):
            torch.randn(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        torch.testing.assert_close(torch.randn(8), torch.cat([first, second]))
    with seeded(None):
        torch.randn(1)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda: check_program(three_levels, {"x": X}),
        lambda: sites(three_levels, {"x": X}),
        lambda: sample_prior(three_levels, 3, seed=1),
        lambda: log_density(three_levels, {"centre": torch.zeros(()), "z": X, "x": X}),
    ],
    ids=["check_program", "sites", "sample_prior", "log_density"],
)
def test_random_state_is_left_alone(call):
    before = torch.get_rng_state()
    call()
    assert torch.equal(torch.get_rng_state(), before)
