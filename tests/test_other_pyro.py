"""Nothing outside our own calls changes: other people's Pyro code runs as if calibrant were not there."""

import contextlib
import inspect
import pickle
import subprocess
import sys
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import calibrant as cal
from calibrant.calls import own_call, parameters_in_modules

FACADES = ("data", "evaluation", "guides", "inference", "models", "program", "store")
X = {"x": torch.linspace(-1.0, 2.0, 40)}


class Model(PyroModule):
    """Has a parameter, a module with weights and a constrained parameter, which Pyro stores in three ways."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.net = nn.Linear(1, 1)
        self.noise = PyroParam(torch.tensor(0.5), dist.constraints.positive)

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.net(z[:, None])[:, 0] + self.shift, self.noise))


def small_model():
    torch.manual_seed(0)
    return Model()


def fitted(model=None, **options):
    model = model or small_model()
    options = {"epochs": 2, "batch_size": 10, **options}
    found = cal.inference.fit(model, cal.guides.amortize(model, X, encoder={"x": {"kind": "mlp"}}), X, **options)
    return found.elbo


def pooled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("d", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def by_hand(guide=AutoDiagonalNormal, steps=30):
    """What a Pyro script prints: losses, the location, and the names in Pyro's parameter store."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        pyro.set_rng_seed(0)
        fitted_guide = guide(pooled)
        svi = SVI(pooled, fitted_guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step(X["x"]) for _ in range(steps)]
        return losses, fitted_guide.median(X["x"])["mu"].item(), sorted(pyro.get_param_store().keys())


# -- the import --------------------------------------------------------------------------------------------------------

IMPORT = """
import sys
finders = list(sys.meta_path)
import calibrant as cal
assert sys.meta_path == finders and not {"pyro", "torch"} & set(sys.modules)
import pyro, pkgutil, inspect
assert not pyro.settings.get("module_local_params")
assert pkgutil.get_data("pyro", "__init__.py") and inspect.getsource(pyro)
from calibrant import data, evaluation, guides, inference, models, program, store
assert not pyro.settings.get("module_local_params") and sys.meta_path[-len(finders):] == finders
print("as before")
"""


def test_importing_changes_neither_loaders_nor_settings():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "as before\n", done.stderr


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal])
def test_a_pyro_script_before_and_after_our_calls(guide):
    before = by_hand(guide)
    fitted()
    assert by_hand(guide) == before
    assert before[2]


def test_pyro_s_parameter_store_is_set_aside_and_given_back():
    with pyro.get_param_store().scope():
        store = pyro.get_param_store()
        guide = AutoDiagonalNormal(pooled)
        svi = SVI(pooled, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        svi.step(X["x"])
        names, held = list(store.keys()), [id(store._params[name]) for name in store.keys()]  # noqa: SIM118
        fitted()
        assert list(store.keys()) == names
        assert [id(store._params[name]) for name in names] == held
        assert all(hasattr(store[name], "unconstrained") for name in names)
        svi.step(X["x"])


# -- every public function ---------------------------------------------------------------------------------------------

PUBLIC = [
    (facade, name)
    for facade in FACADES
    for name in getattr(cal, facade).__all__
    if inspect.isfunction(getattr(getattr(cal, facade), name))
]


@pytest.mark.parametrize(("facade", "name"), PUBLIC)
def test_every_public_function_is_a_call_of_our_own(facade, name):
    function = getattr(getattr(cal, facade), name)
    assert function.__module__ == f"calibrant.{facade}"
    assert function.__wrapped__.__name__ == name
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(("facade", "name"), PUBLIC)
def test_a_call_that_raises_leaves_everything_as_it_was(facade, name, global_state):
    function = getattr(getattr(cal, facade), name)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    given = [object() for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    with torch.no_grad(), torch.autocast("cpu"):
        before = global_state()
        with contextlib.suppress(Exception):  # most refuse a bare object; this is about what is left behind
            function(*given)
        assert global_state() == before
        assert torch.is_autocast_enabled("cpu")


def test_the_whole_package_loads_through_its_facades():
    assert cal.load is cal.store.load
    assert cal.guides.refine is cal.guides.refine


PYRO_MODULES = [
    (facade, name)
    for facade in FACADES
    for name in dir(getattr(cal, facade))
    if isinstance(found := getattr(getattr(cal, facade), name), type) and issubclass(found, PyroModule)
]


@pytest.mark.parametrize(("facade", "name"), PYRO_MODULES)
def test_every_public_class_is_built_and_run_without_a_trace(facade, name, global_state):
    """Modules of the package are Pyro's, and keep their parameters to themselves while a call of ours runs them."""
    cls = getattr(getattr(cal, facade), name)
    before = global_state()
    made = {
        "AmortizedGuide": lambda: cal.guides.amortize(Model(), X),
        "CollapsedGuide": lambda: cal.guides.amortize(small_gsm(), PATCHES, structure="collapsed"),
        "RefinedGuide": lambda: cal.guides.refine(Model(), cal.guides.amortize(Model(), X), X, steps=1),
        "EncoderGuide": lambda: cal.guides.from_encoder(nn.Linear(1, 2), "loc, log_variance"),
        "DecoderModel": lambda: cal.models.from_decoder(nn.Linear(2, 3), 2, "gaussian"),
        "PriorGuide": lambda: cal.guides.prior(Model()),
        "SharedNegatives": lambda: cal.models.SharedNegatives(case_of(cal.models.MCInfoNCE)),
    }.get(name, lambda: case_of(cls))()
    assert isinstance(made, cls)
    if facade == "models" and name != "SharedNegatives":  # which is a training loss and simulates nothing
        covariates = first_case(cls).covariates if name != "DecoderModel" else {}
        cal.program.sample_prior(made, 3, {key: make(3) for key, make in covariates.items()})
    assert global_state() == before


def small_gsm():
    return cal.models.create("gsm", latents=2, shape=[3])


PATCHES = {"x": torch.randn(20, 3, generator=torch.Generator().manual_seed(0))}


def card_of(cls):
    return next(card for name in cal.models.list_models() if (card := cal.models.card(name)).cls is cls)


def first_case(cls):
    return next(iter(card_of(cls).cases))


def case_of(cls):
    return cal.models.create(card_of(cls).name, **first_case(cls).arguments)


# -- a program runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_a_program_that_raises_leaves_everything_as_it_was(error, global_state):
    before = global_state()

    def program(size):
        assert pyro.settings.get("module_local_params")
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise error

    with pytest.raises(type(error)):
        cal.program.trace(program, 3)
    assert global_state() == before


def test_a_generator_that_is_left_half_way(global_state):
    before = global_state()

    def draws():
        while True:
            yield cal.program.sample_prior(Model(), 2)

    kept = draws()
    next(kept)
    assert global_state() == before
    by_hand(AutoNormal, 2)
    next(kept)
    kept.close()
    assert global_state() == before


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("user", [False, True])
def test_modules_built_under_either_setting_run_under_either(built, user):
    with pyro.settings.context(module_local_params=built):
        model = Model()
    with pyro.settings.context(module_local_params=user):
        found = fitted(model)
        assert pyro.settings.get("module_local_params") == user
    assert found == fitted()


def test_what_a_user_s_module_keeps_for_pyro_is_not_touched():
    with pyro.settings.context(module_local_params=True):
        model = Model()
        model._pyro_context.param_state["params"]["own"] = torch.zeros(())
    fitted(model)
    assert list(model._pyro_context.param_state["params"]) == ["own"]


def test_parameters_that_a_run_registers_are_told():
    with parameters_in_modules() as states, parameters_in_modules() as inner:
        assert states is inner
        program = cal.program.as_program(lambda size: pyro.param("p", torch.zeros(())))
        with contextlib.suppress(NotImplementedError):  # Pyro's own refusal
            cal.program.trace(program, 1)
        assert [list(state["params"]) for state in states.values()] == [["p"]]


# -- callbacks, threads and modes --------------------------------------------------------------------------------------


def test_a_callback_may_train_a_guide_of_its_own():
    expected, seen = by_hand(), []
    alone = fitted(small_model().double())
    assert fitted(small_model().double(), progress=lambda *_: seen.append(by_hand())) == alone
    assert len(seen) >= 2
    assert all(found == expected for found in seen)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "device meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("positional", [False, True])
def test_a_callback_runs_in_the_modes_of_the_caller(mode, positional, global_state):
    seen = []

    def function(data, progress):
        progress("stage", 0, 1, (global_state(), torch.is_autocast_enabled("cpu")))

    def report(stage, done, total, text):
        seen.append((*text, global_state(), torch.is_autocast_enabled("cpu")))

    call = own_call(function, "tests")
    with mode():
        outside = global_state(), torch.is_autocast_enabled("cpu")
        call(X, report) if positional else call(X, progress=report)
    inside, called_back = seen[0][:2], seen[0][2:]
    assert called_back == outside
    assert inside == (global_state(), False)


def test_two_fits_in_two_threads_give_what_one_gives():
    expected, models, found = fitted(), [small_model(), small_model()], {}
    threads = [threading.Thread(target=lambda at=at: found.update({at: fitted(models[at])})) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected, 1: expected}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_modes_of_the_caller_change_no_result(mode, global_state):
    model, expected = small_model(), fitted()
    guide = cal.guides.amortize(model, X)
    reference = cal.inference.reference(model, X, draws=10, chains=1)
    with mode():
        before = global_state()
        found = fitted(model)
        inside = cal.inference.reference(model, X, draws=10, chains=1)
        cal.inference.posterior(model, guide, X, draws=5)
        assert global_state() == before
    assert found == expected
    assert inside.posterior.sizes == reference.posterior.sizes
