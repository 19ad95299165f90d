"""What is recorded gives what the program gives, and stops where the program changes."""

import copy
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from cases import ModelCase, model_cases
from pyro.nn import PyroModule
from torch import nn

import calibrant as cal
from calibrant.errors import CalibrantError
from calibrant.inference import drawing
from calibrant.inference.fitting import loop, state
from calibrant.inference.fitting.objectives import OBJECTIVES, check_objective
from calibrant.program.environment import defaults

DATA = {"x": torch.randn(200, 3, generator=torch.Generator().manual_seed(0))}


class Model(PyroModule):
    """Two latents under three numbers; `beta` is what users anneal."""

    def __init__(self, decoder=None):
        super().__init__()
        self.decoder = decoder or nn.Linear(2, 3)
        self.beta = 1.0

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, self.beta).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1))


class Guide(PyroModule):
    def __init__(self, *layers):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), *layers, nn.Linear(8, 4))

    def forward(self, observed, size):
        loc, raw = self.encoder(observed["x"]).chunk(2, -1)
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.fixture
def recorded(monkeypatch):
    """Steps and draws are recorded however few there are, and compared in every epoch."""
    for module, name in ((state, "RECORDED_FROM"), (loop, "RECORDED_FROM"), (drawing, "_RECORDED_FROM")):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(loop, "_VERIFIED", 1)


def fitted(compile, model=None, guide=None, **options):
    """The history and the weights of a short training from the same start."""
    torch.manual_seed(1)
    model, guide = (model or Model)(), (guide or Guide)()
    pair = nn.ModuleList([model, guide])
    torch.manual_seed(2)
    options = {"epochs": 3, "batch_size": 32, "lr": 1e-2, **options}
    found = cal.inference.fit(model, guide, DATA, compile=compile, **options)
    return [row["train"] for row in found.history], pair.state_dict()


def assert_same(ours, theirs, **tolerance):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], **tolerance or {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("objective", ["stl", "kl", "iwae", "dreg"])
def test_a_recorded_training_is_the_same(objective, recorded):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ours = fitted("auto", objective=objective)
    assert_same(ours, fitted(False, objective=objective))


@pytest.mark.slow
def test_a_compiled_training_is_the_same():
    assert_same(fitted(True), fitted(False), rtol=1e-3, atol=1e-4)


def test_steps_are_run_from_the_graph(recorded):
    """Else the tests beside this one would compare the program with itself."""
    runs = []

    class Counted(Model):
        def forward(self, size):
            runs.append(size)
            super().forward(size)

    fitted("auto", Counted)
    few = runs.count(32)
    runs.clear()
    fitted(False, Counted)
    before = 5  # runs that compare the scale of the data with that of simulations
    assert few - before < (runs.count(32) - before) / 2


def test_a_program_that_changes_in_python_is_run(recorded):
    """A width of the prior that falls from epoch to epoch."""

    def annealed(compile):
        model = Model()

        def anneal(*_):
            model.beta *= 0.9

        return fitted(compile, lambda: model, progress=anneal)

    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="does not do the same each time"):
        ours = annealed("auto")
    torch.manual_seed(1)
    assert_same(ours, annealed(False))


class Shifted(nn.Linear):
    """A layer of the guide that looks at the data through numpy, which no graph sees."""

    def forward(self, x):
        return super().forward(x) + torch.as_tensor(np.tanh(x.detach().numpy()).mean(1, keepdims=True))


def test_what_a_graph_would_freeze_is_noticed_on_other_data(recorded):
    with pytest.warns(RuntimeWarning, match="does not do the same"):
        ours = fitted("auto", guide=lambda: Guide(Shifted(8, 8)))
    assert_same(ours, fitted(False, guide=lambda: Guide(Shifted(8, 8))))


def test_statistics_of_minibatches_go_on(recorded):
    """Batch normalisation writes what it has seen; a graph that is recorded and thrown away leaves no trace."""
    ours, theirs = (fitted(compile, guide=lambda: Guide(nn.BatchNorm1d(8))) for compile in ("auto", False))
    assert int(ours[1]["1.encoder.2.num_batches_tracked"]) > 0
    assert_same(ours, theirs)


class Strided(PyroModule):
    """A decoder whose weight lies transposed in memory, and one whose gradient does."""

    def __init__(self):
        super().__init__()
        self.across = nn.Parameter(torch.randn(2, 3).t())
        self.along = nn.Parameter(torch.randn(3, 2))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mean = torch.einsum("di,ni->nd", self.along, z.tanh()) + z @ self.across.t()
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1))


class Along(Strided):
    """Without the strided weight, so that one kernel takes the step."""

    def __init__(self):
        super().__init__()
        self.across.data = self.across.data.contiguous()


@pytest.mark.parametrize(("model", "compile"), [(Strided, "auto"), (Along, "auto"), (Strided, False)])
def test_the_layout_of_weights_and_gradients_is_no_matter(model, compile, recorded, monkeypatch):
    """Torch's fused Adam reads memory in order, whatever the strides."""
    ours = fitted(compile, model)
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **options: adam(*args, **{**options, "fused": False}))
    assert_same(ours, fitted(False, model))


def assert_same_gradients(case, objective, structure="faithful"):
    """Objective, ELBO, norm and gradients of a minibatch that the graph was not recorded on."""
    model = case.build()
    data = case.data(model, 12)
    try:
        guide = cal.guides.amortize(model, data, structure)
        check_objective(objective, model, guide, *data.batch(range(6)))
    except CalibrantError as refusal:  # discrete latents, shared ones, no closed form, …
        pytest.skip(f"this model does not take this objective or structure: {refusal}")
    modules = state.Modules(model, guide)
    plan = state.Plan(objective, 3, 10, 6, 1e-3, 10.0, 5, "auto", 0)
    training = state.initial_state(modules, plan, data, data)
    found = []
    with defaults(modules, data.batch([0])[0]), pyro.validation_enabled(False):
        for is_graph in (False, True):
            if is_graph:
                loop._record(training, plan, data, data)
            assert training.gradient.is_graph == is_graph
            modules.train()
            torch.manual_seed(5)
            found.append(training.gradient(*data.batch(range(3, 9)), {}))
    largest = max(float(one.abs().max()) for one in found[0])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("case", model_cases(first=True))
def test_the_gradient_of_every_model_is_that_of_the_program(case):
    assert_same_gradients(case, "stl")


@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"stl"}))
def test_the_gradient_of_every_objective_is_that_of_the_program(objective):
    arguments = {"shape": (1, 8, 8), "latents": 3}
    assert_same_gradients(ModelCase("ea-vae", cal.registries.Case(arguments, {"x": (1, 8, 8)})), objective)


@pytest.mark.parametrize("structure", ["mean-field", "full", "program", "collapsed"])
def test_the_gradient_of_every_structure_is_that_of_the_program(structure):
    arguments = {"shape": (1, 8, 8), "latents": 3}
    assert_same_gradients(ModelCase("ea-vae", cal.registries.Case(arguments, {"x": (1, 8, 8)})), "stl", structure)


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("case", model_cases())
def test_all_gradients_are_those_of_the_program(case, objective):
    assert_same_gradients(case, objective)


class Shared(PyroModule):
    """A centre that all data share; `runs` counts what Python runs."""

    runs = 0

    def forward(self, size):
        Shared.runs += 1
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(-1, 3), 0.5).to_event(1))


@pytest.fixture
def pair():
    return Shared(), cal.guides.amortize(Shared(), DATA)


def test_a_recorded_held_out_elbo_is_the_same(recorded, pair):
    histories, runs = [], []
    for compile in ("auto", False):
        Shared.runs = 0
        model, guide = copy.deepcopy(pair)
        histories.append(cal.inference.fit(model, guide, DATA, epochs=40, batch_size=80, compile=compile).history)
        runs.append(Shared.runs)
    assert runs[0] < 0.6 * runs[1]  # all are compared with Python once an epoch
    for name in ("train", "validation"):
        ours, theirs = ([row[name] for row in history] for history in histories)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_recorded_draws_are_the_same(monkeypatch, pair, recorded):
    Shared.runs = 0
    ours = cal.inference.posterior(*pair, DATA, draws=100)
    assert Shared.runs < 50
    monkeypatch.setattr(drawing, "_RECORDED_FROM", 1000)
    theirs = cal.inference.posterior(*pair, DATA, draws=100)
    assert Shared.runs > 130
    for group in ("posterior", "sample_stats"):
        xr.testing.assert_allclose(ours[group].dataset, theirs[group].dataset, rtol=1e-6)


def test_draws_that_a_graph_would_freeze_are_noticed(recorded, pair):
    """A guide with random numbers of numpy's."""
    model, guide = pair
    noise = np.random.default_rng(0)
    forward = guide.forward

    def shaken(observed, size):
        forward({"x": observed["x"] + noise.normal()}, size)

    guide.forward = shaken
    with pytest.warns(RuntimeWarning, match="does not do the same"):
        found = cal.inference.posterior(model, guide, DATA, draws=30)
    assert len(np.unique(found["posterior"]["z"].values[0, :, 0])) == 30


def test_what_is_computed_from_a_draw_is_no_constant(recorded):
    """The graph is compared at other draws than it was recorded at."""

    class Numpy(PyroModule):
        def forward(self, size):
            centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
            value = torch.as_tensor(np.tanh(centre.detach().numpy()))
            bent = pyro.deterministic("bent", value + (1 - value**2) * (centre - centre.detach()))
            with pyro.plate("data", size):
                z = pyro.sample("z", dist.Normal(bent, 1.0))
                pyro.sample("x", dist.Normal(z[:, None].expand(-1, 3), 0.5).to_event(1))

    with pytest.warns(RuntimeWarning, match="does not do the same"):
        found = cal.inference.posterior(Numpy(), cal.guides.amortize(Numpy(), DATA), DATA, draws=30)
    assert len(np.unique(found["posterior"]["bent"].values)) == 30


def test_what_can_not_be_recorded_is_told_once(recorded):
    class Branching(Shared):
        def forward(self, size):
            super().forward(size)
            float(torch.zeros(()).add(pyro.sample("w", dist.Normal(0.0, 1.0))))

    with pytest.warns(RuntimeWarning, match="could not be recorded") as told:
        cal.inference.fit(Branching(), cal.guides.amortize(Branching(), DATA), DATA, epochs=2, batch_size=80)
    assert len([w for w in told if "could not be recorded" in str(w.message)]) == 1


def test_a_training_of_short_epochs_resumes_between_checkpoints(tmp_path, recorded):
    """Two steps an epoch: a checkpoint every five epochs, so that two of the seven are done again.

    Both parts are run from a graph, and together are a training without one.
    """

    start = Model(), Guide()

    def train(folder, progress=lambda *_: None, **options):
        model, guide = copy.deepcopy(start)
        options = {"epochs": 12, "batch_size": 80, "run_dir": folder, "progress": progress, **options}
        found = cal.inference.fit(model, guide, DATA, **options)
        return [row["train"] for row in found.history], nn.ModuleList([model, guide]).state_dict()

    def stop(_stage, done, *_):
        if done == 7:
            raise KeyboardInterrupt

    whole = train(tmp_path / "whole", compile=False)
    broken, _ = train(tmp_path / "broken", stop)
    assert len(broken) == 7
    resumed = train(tmp_path / "broken", resume=True)
    assert len(resumed[0]) == 12
    assert_same(resumed, whole)
