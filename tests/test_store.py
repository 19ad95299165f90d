"""Run folders: what is saved comes back bit for bit, what is damaged is refused, and trainings go on as if whole."""

import json
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import nn

import calibrant as cal
from calibrant import store
from calibrant.errors import NonFiniteLoss, RunError
from calibrant.evaluation.compare import compare
from calibrant.evaluation.verdicts import verdicts
from calibrant.inference.fit import Fit

training = sys.modules["calibrant.inference.fit"]  # the function of that name hides the module

PIXELS = 6
USER_MODEL = '''
"""A user's model; its import leaves a trace."""
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

Path(__file__).with_suffix(".imported").touch()


class Mine(PyroModule):
    def __init__(self, shape, latents=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(latents, *shape))  # fails for a list
        self.shape = shape + ()

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(self.weight)]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 0.5).to_event(1))
'''


def rows(count=64, seed=0):
    return {"x": torch.randn(count, PIXELS, generator=torch.Generator().manual_seed(seed))}


def modules(name="ppca", seed=0, structure="faithful", **arguments):
    """A model and its guide with random weights."""
    torch.manual_seed(seed)
    model = cal.models.create(name, **{"shape": (PIXELS,), "latents": 3, **arguments})
    guide = cal.guides.amortize(model, rows(), structure=structure, seed=seed)
    with torch.no_grad():
        for weight in (*model.parameters(), *guide.parameters()):
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval(), guide.eval()


def fitted():
    return Fit(
        history=[{"epoch": 1, "train": -1.5, "validation": 1 / 3, "lr": 2e-3}],
        elbo=1 / 3,
        elbo_se=float("nan"),
        epochs=1,
    )


def saved(folder, *pair):
    pair = pair or modules()
    store.save_run(folder, *pair, fitted(), settings={"seed": 0})
    return pair


def outputs(model, guide, dtype=torch.float32):
    """Everything that the pair computes for some data: guide draws, both log densities."""
    data = {"x": rows()["x"].to(dtype)}
    torch.manual_seed(3)
    with torch.no_grad():
        run = pyro.poutine.trace(guide).get_trace(data, 64)
        values = {n: s["value"] for n, s in run.nodes.items() if s["type"] == "sample" and n != "data"}
        density = cal.program.log_density(model, {**values, **data}, observed=["x"])
        log_q = cal.program.log_density(lambda size: guide(data, size), values, 64)
    return {**values, **{f"p {n}": v for n, v in density.items()}, **{f"q {n}": v for n, v in log_q.items()}}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- load --------------------------------------------------------------------------------------------------------------

CASES = [(name, {}) for name in cal.models.list_models()] + [
    ("ea-vae", {"prior": "laplace", "decoder": "mlp", "scale_prior": {"name": "gamma", "rate": 0.7}}),
    ("ea-vae", {"likelihood": {"name": "gaussian", "scale": 0.3, "learn": False}}),
    ("gsm", {"dictionary": torch.randn(PIXELS, 4), "covariance": torch.eye(4) + 0.1}),
    ("ppca", {"noise": "diagonal"}),
]


@pytest.mark.parametrize("structure", ["faithful", "mean-field"])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_load_gives_bit_equal_outputs(tmp_path, name, arguments, structure):
    pair = saved(tmp_path, *modules(name, structure=structure, **arguments))
    loaded = cal.load(tmp_path)
    for ours, theirs in zip(pair, loaded, strict=True):
        assert same(ours.state_dict(), theirs.state_dict())
        assert not theirs.training
    assert same(outputs(*pair), outputs(*loaded))
    assert loaded[0].recipe == pair[0].recipe


def test_the_comparison_of_outputs_notices_the_last_bit(tmp_path):
    pair = saved(tmp_path)
    model, guide = cal.load(tmp_path)
    with torch.no_grad():
        model.decoder.bias[0] = torch.nextafter(model.decoder.bias[0], torch.tensor(9.0))
    assert not same(outputs(*pair), outputs(model, guide))


def test_load_keeps_the_precision_and_the_random_state(tmp_path):
    pair = tuple(module.double() for module in modules())
    saved(tmp_path, *pair)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = cal.load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert {w.dtype for module in loaded for w in module.parameters()} == {torch.float64}
    assert same(outputs(*pair, torch.float64), outputs(*loaded, torch.float64))


def test_a_loaded_run_can_be_saved_again(tmp_path):
    pair = saved(tmp_path / "first")
    saved(tmp_path / "second", *cal.load(tmp_path / "first"))
    assert same(outputs(*pair), outputs(*cal.load(tmp_path / "second")))


def test_only_plain_formats_are_written(tmp_path):
    saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "guide.safetensors",
        "history.csv",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["fit"] == {"elbo": 1 / 3, "elbo_se": None, "epochs": 1, "stopped": "finished"}
    assert config["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_numbers_that_json_lacks_are_unknown_when_they_are_read(tmp_path):
    saved(tmp_path)
    found = store.read_config(tmp_path)["fit"]
    assert np.isnan(found.pop("elbo_se"))
    assert found == {"elbo": 1 / 3, "epochs": 1, "stopped": "finished"}


# -- a user's own code -------------------------------------------------------------------------------------------------


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_MODEL)
    return path


@pytest.fixture
def user_run(tmp_path, user_file):
    spec = f"{user_file}:Mine"
    pair = saved(tmp_path / "run", *modules(spec))
    user_file.with_suffix(".imported").unlink()
    return tmp_path / "run", spec, pair


def test_a_users_file_is_not_imported_because_a_folder_names_it(user_run, user_file):
    folder, _, _ = user_run
    with pytest.raises(RunError, match=r'pass load\(run, model="FILE.py:Class"\)'):
        cal.load(folder)
    assert not user_file.with_suffix(".imported").exists()


@pytest.mark.parametrize("form", ["string", "class", "instance"])
@pytest.mark.filterwarnings("error")
def test_a_users_model_is_loaded_from_what_the_caller_gives(user_run, form):
    folder, spec, pair = user_run
    built = cal.models.create(spec, shape=(PIXELS,), latents=3)
    loaded = cal.load(folder, model={"string": spec, "class": type(built), "instance": built}[form])
    assert same(outputs(*pair), outputs(*loaded))


@pytest.mark.parametrize("form", ["string", "instance"])
def test_another_file_is_told(user_run, user_file, form):
    folder, spec, pair = user_run
    user_file.write_text(USER_MODEL + "\n# changed\n")
    given = spec if form == "string" else cal.models.create(spec, shape=(PIXELS,), latents=3)
    with pytest.warns(UserWarning, match="another sha256"):
        loaded = cal.load(folder, model=given)
    assert same(outputs(*pair), outputs(*loaded))


def test_a_model_built_from_modules_is_given_again(tmp_path):
    def build(hidden=5):
        return cal.models.create(
            "vae", shape=(PIXELS,), latents=3, decoder=nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, PIXELS))
        )

    model = build()
    pair = saved(tmp_path, model, cal.guides.amortize(model, rows()))
    with pytest.raises(RunError, match="built from modules"):
        cal.load(tmp_path)
    with pytest.raises(RunError, match="built from modules"):
        cal.load(tmp_path, model="vae")
    assert same(outputs(*pair), outputs(*cal.load(tmp_path, model=build())))
    other = build(hidden=7)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RunError, match=r"decoder.0.weight has shape \(5, 3\) there and shape \(7, 3\) here"):
        cal.load(tmp_path, model=other)
    assert same(before, other.state_dict())


class Encoder(nn.Module):
    features = 4

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(PIXELS, 4)

    def forward(self, inputs):
        return self.linear(inputs["x"])


class ByHand(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(PIXELS, 3)

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(self.linear(observed["x"]), 1.0).to_event(1))


def test_an_encoder_and_a_guide_of_ones_own_are_given_again(tmp_path):
    model, _ = modules()
    pair = saved(tmp_path / "encoder", model, cal.guides.amortize(model, rows(), encoder=Encoder()))
    with pytest.raises(RunError, match="encoder="):
        cal.load(tmp_path / "encoder")
    assert same(outputs(*pair), outputs(*cal.load(tmp_path / "encoder", encoder=Encoder())))
    pair = saved(tmp_path / "guide", model, ByHand())
    with pytest.raises(RunError, match=r"guide=\.\.\."):
        cal.load(tmp_path / "guide")
    assert same(outputs(*pair), outputs(*cal.load(tmp_path / "guide", guide=ByHand())))


def test_a_function_is_a_model_without_weights(tmp_path):
    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(size, PIXELS), 1.0).to_event(1))

    pair = saved(tmp_path, model, cal.guides.amortize(model, rows()))
    assert same(outputs(*pair), outputs(*cal.load(tmp_path, model=model)))


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(ByHand):
        def get_extra_state(self):
            return {"secret": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(RunError, match="get_extra_state"):
        saved(tmp_path, modules()[0], Odd())


# -- folders that are refused ------------------------------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def without(folder, key):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "no run folder of calibrant"),
    "cut config": (lambda f: cut(f / "config.json"), "config.json cannot be read"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json cannot be read"),
    "no dict": (lambda f: (f / "config.json").write_text("[1]"), "another program"),
    "foreign": (lambda f: (f / "config.json").write_text('{"format": 3, "model": "x"}'), "another program"),
    "other format": (lambda f: edit(f, format="calibrant/99"), "format calibrant/99"),
    "missing key": (lambda f: without(f, "guide"), "lacks .'guide'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut weights": (lambda f: cut(f / "guide.safetensors"), "sha256"),
    "flipped bit": (lambda f: flip(f / "model.safetensors"), "sha256"),
    "other weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "guide.safetensors").read_bytes()),
        "sha256",
    ),
    "other shape": (
        lambda f: edit(f, model={"name": "ppca", "arguments": {"shape": [PIXELS], "latents": 5}, "sha256": ""}),
        r"does not fit PPCA: decoder.directions has shape \(6, 3\) there",
    ),
    "unknown model": (
        lambda f: edit(f, model={"name": "ppcb", "arguments": {}, "sha256": ""}),
        "cannot be rebuilt: unknown model 'ppcb'",
    ),
    "odd guide": (lambda f: edit(f, guide={"structure": "faithful"}), "guide .* cannot be rebuilt"),
    "unfinished": (lambda f: edit(f, fit=None), "--resume"),
    "several": (lambda f: edit(f, runs=["a", "b"]), "several runs"),
    "gone": (lambda f: f.rename(f.with_name("elsewhere")), "no run in"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_folder_is_refused(tmp_path, damage):
    folder = tmp_path / "run"
    saved(folder)
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(RunError, match=message):
        cal.load(folder)


def test_another_registered_model_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(RunError, match="is ppca, not vae"):
        cal.load(tmp_path, model="vae")


def test_values_without_json_form_are_refused(tmp_path):
    with pytest.raises(RunError, match="JSON values"):
        store.save_run(tmp_path, *modules(), settings={"path": Path("x")})


def test_clearing_leaves_what_calibrant_did_not_write(tmp_path):
    saved(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    for name in ("notes.txt", "checkpoints/notes.txt", "amortized.nc"):
        (tmp_path / "run" / name).write_text("mine")
    store.clear_run(tmp_path / "run")
    assert sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*")) == [
        "checkpoints",
        "checkpoints/notes.txt",
        "notes.txt",
    ]
    with pytest.raises(RunError, match="no run folder"):
        store.clear_run(tmp_path / "run")


def test_clearing_stays_inside_the_folder(tmp_path):
    saved(tmp_path / "other")
    saved(tmp_path / "run")
    edit(tmp_path / "run", runs=["../other"])
    store.clear_run(tmp_path / "run")
    assert (tmp_path / "other" / "config.json").is_file()


# -- results -----------------------------------------------------------------------------------------------------------


def assert_same(first: xr.Dataset, second: xr.Dataset):
    xr.testing.assert_identical(first, second)
    for name, variable in first.variables.items():
        kinds = [np.dtype(str) if d.kind == "U" else d for d in (variable.dtype, second[name].dtype)]  # of any width
        assert kinds[0] == kinds[1], name
        assert variable.attrs == second[name].attrs, name
    assert {k: (v, type(v)) for k, v in first.attrs.items()} == {k: (v, type(v)) for k, v in second.attrs.items()}


def odd_dataset() -> xr.Dataset:
    return xr.Dataset(
        {
            "flag": ("data", [True, False, True]),
            "flags": (("data", "k"), np.eye(3, 2, dtype=bool)),
            "reason": ("data", np.array(["", "R-hat is 1.2 – ünïcode", " "])),
            "float": ("data", np.array([np.nan, np.inf, -0.0], np.float32)),
            "double": ("data", np.array([1e-310, 1 / 3, -np.inf])),
            "byte": ("data", np.array([0, 255, 7], np.uint8)),
            "integer": ("data", np.array([-(2**31), 0, 2**31 - 1], np.int32)),
            "long": ("data", np.array([-(2**63), 0, 2**63 - 1])),
            "number": ((), 0.1),
            "word": ((), "text"),
            "none": ("empty", np.array([], dtype=bool)),
            "nothing": ("empty", np.array([], dtype=str)),
        },
        coords={
            "data": np.array(["a", "bb", "c/d"]),
            "label": ("data", np.array([2**62, 5, 1])),
            "empty": np.array([], dtype=np.int64),
        },
        attrs={"text": "ü\n", "empty": "", "json": '{"a": [1]}', "integer": 2**40, "number": 0.1, "nan": float("inf")},
    )


def test_datasets_and_trees_come_back_exactly(tmp_path):
    dataset = odd_dataset()
    store.save_dataset(dataset, tmp_path / "set.nc")
    assert_same(dataset, store.load_dataset(tmp_path / "set.nc"))
    tree = xr.DataTree.from_dict({"/posterior": dataset, "/empty": xr.Dataset(), "/": xr.Dataset(attrs={"a": 1})})
    store.save_tree(tree, tmp_path / "tree.nc")
    loaded = store.load_tree(tmp_path / "tree.nc")
    assert [node.path for node in tree.subtree] == [node.path for node in loaded.subtree]
    for node in tree.subtree:
        assert_same(node.to_dataset(), loaded[node.path].to_dataset())
    store.save_tree(loaded, tmp_path / "again.nc")
    assert_same(dataset, store.load_tree(tmp_path / "again.nc")["posterior"].to_dataset())


@pytest.fixture(scope="module")
def results():
    model, guide = modules("ea-vae")
    data = cal.data.Data(rows(8), coords={"data": [f"image {i}" for i in range(8)]})
    post = cal.inference.posterior(model, guide, data, draws=100)
    return model, guide, post, cal.inference.reference(model, data, chains=4, draws=30, seed=1)


def test_results_come_back_exactly(tmp_path, results):
    _, _, *trees = results
    for number, tree in enumerate(trees):
        store.save_tree(tree, tmp_path / f"{number}.nc")
    loaded = [store.load_tree(tmp_path / f"{number}.nc") for number in (0, 1)]
    for tree, again in zip(trees, loaded, strict=True):
        for node in tree.subtree:
            assert_same(node.to_dataset(), again[node.path].to_dataset())
    assert loaded[1]["convergence"]["is_reference"].dtype == bool
    comparison = compare(*trees)
    assert_same(comparison, compare(*loaded))
    store.save_dataset(comparison, tmp_path / "comparison.nc")
    assert verdicts(store.load_dataset(tmp_path / "comparison.nc")) == verdicts(comparison)


def test_load_result_reads_a_whole_run(tmp_path, results):
    model, guide, post, ref = results
    saved(tmp_path, model, guide)
    with pytest.raises(RunError, match="calibrant check"):
        store.load_result(tmp_path)
    store.save_tree(post, tmp_path / store.AMORTIZED)
    bare = store.load_result(tmp_path)
    assert (bare.reference, bare.comparison, bare.contrast, bare.gap) == (None, None, None, None)
    store.save_tree(ref, tmp_path / store.REFERENCE)
    store.save_dataset(compare(post, ref), tmp_path / store.COMPARISON)
    split = xr.Dataset({"gap": ("data", [0.5]), "reason": ("data", np.array([""]))}, {"data": [3]})
    store.save_dataset(split, tmp_path / store.GAP)
    result = store.load_result(tmp_path)
    assert result.gap.identical(split)
    assert result.name == "ea-vae"
    assert result.history == fitted().history
    assert same(model.state_dict(), result.model.state_dict())
    assert_same(post["posterior"].to_dataset(), result.amortized["posterior"].to_dataset())
    assert_same(compare(post, ref), result.comparison)
    cut(tmp_path / store.REFERENCE)
    with pytest.raises(RunError, match=r"reference\.nc is damaged"):
        store.load_result(tmp_path)
    (tmp_path / store.HISTORY).write_text("epoch,train\none,two\n")
    (tmp_path / store.REFERENCE).unlink()
    with pytest.raises(RunError, match=r"history\.csv"):
        store.load_result(tmp_path)


@pytest.mark.parametrize("value", [True, None, [1, 2], {"a": 1}, np.array([1])])
@pytest.mark.parametrize("where", ["group", "variable"])
def test_attributes_that_netcdf_would_change_are_refused(tmp_path, value, where):
    dataset = xr.Dataset({"a": ("data", [1.0])})
    (dataset if where == "group" else dataset["a"]).attrs["odd"] = value
    with pytest.raises(RunError, match="attribute 'odd'"):
        store.save_tree(xr.DataTree.from_dict({"/posterior": dataset}), tmp_path / "tree.nc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no NetCDF at all", b"\x89HDF\r\n\x1a\n and nothing more"])
def test_an_unreadable_netcdf_file_is_refused(tmp_path, content):
    path = tmp_path / "tree.nc"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"tree\.nc is damaged"):
        store.load_tree(path)
    with pytest.raises(RunError, match="there is no file"):
        store.load_dataset(tmp_path / "absent.nc")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "set.nc"
    store.save_dataset(odd_dataset(), path)

    def broken(self, target, **options):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.Dataset, "to_netcdf", broken)
    with pytest.raises(KeyboardInterrupt):
        store.save_dataset(odd_dataset(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["set.nc"]
    assert_same(odd_dataset(), store.load_dataset(path))


# -- checkpoints -------------------------------------------------------------------------------------------------------

EPOCHS = 3


def train(folder=None, resume=False, name="ea-vae", **options):
    model, guide = modules(name)
    options = {"epochs": EPOCHS, "batch_size": 32, "validation": {"x": rows(40, 2)["x"]}, "lr": 5e-3, **options}
    options["validation"] = cal.data.Data(options["validation"])
    fit = cal.inference.fit(model, guide, rows(200, 1), run_dir=folder, resume=resume, **options)
    return fit, {**model.state_dict(), **{f"guide.{n}": v for n, v in guide.state_dict().items()}}


def interrupt_at(monkeypatch, step, error=KeyboardInterrupt):
    """Raise in the given step of training (6 steps are an epoch here)."""
    original, count = training._step, iter(range(10_000))

    def stepped(*args):
        if next(count) == step:
            raise error
        return original(*args)

    monkeypatch.setattr(training, "_step", stepped)


@pytest.fixture(scope="module")
def uninterrupted():
    return train()


@pytest.mark.parametrize("step", [0, 6, 15])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, uninterrupted, step):
    whole, weights = uninterrupted
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        part, _ = train(tmp_path)
    assert part.stopped == "interrupted"
    assert part.epochs == step // 6
    for _ in "12":  # the second time there is nothing left to do
        resumed, again = train(tmp_path, resume=True)
        assert resumed == whole
        assert resumed.stopped == "finished"
        assert same(weights, again)


@pytest.mark.parametrize("lost", ["moments", "counts"])
def test_the_test_of_resuming_notices_what_a_checkpoint_lost(tmp_path, monkeypatch, lost):
    _, weights = train()
    with monkeypatch.context() as patched:
        interrupt_at(patched, 9)
        train(tmp_path, clip=0.5)
    if lost == "moments":
        monkeypatch.setattr(store, "_moments", lambda adam: {})
    else:
        original = store._read_checkpoint

        def without_counts(path):
            tensors, stored = original(path)
            return tensors, {**stored, "counts": {}}

        monkeypatch.setattr(store, "_read_checkpoint", without_counts)
    _, again = train(tmp_path, resume=True, clip=0.5)
    assert not same(weights, again)


def test_early_stopping_counts_on(tmp_path, monkeypatch):
    first = [weight.clone() for module in modules("ea-vae") for weight in module.parameters()]

    def worse_every_epoch(state, held, plan, total, draws=1, stream=0):
        now = state.modules.parameters()
        elbo = -sum(float((a - b).norm().detach()) for a, b in zip(now, first, strict=True))
        return elbo, 0.0, elbo

    monkeypatch.setattr(training, "_held_out_elbo", worse_every_epoch)
    options = {"lr": 0.01, "patience": 2, "epochs": 6}
    whole, weights = train(**options)
    assert (whole.stopped, whole.epochs) == ("early", 3)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6 * (whole.epochs - 1) + 2)
        train(tmp_path, **options)
    resumed, again = train(tmp_path, resume=True, **options)
    assert resumed == whole
    assert same(weights, again)


def test_a_loss_that_is_not_finite_leaves_the_best_weights(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 12, NonFiniteLoss("not finite", []))
    model, guide = modules("ea-vae")
    with pytest.raises(NonFiniteLoss):
        cal.inference.fit(model, guide, rows(200, 1), epochs=EPOCHS, batch_size=32, run_dir=tmp_path)
    tensors, stored = store._read_checkpoint(tmp_path / "checkpoints" / "training.safetensors")
    assert stored["fit"]["epochs"] >= 2
    assert not model.training
    assert all(torch.equal(value, tensors[f"best.model.{name}"]) for name, value in model.state_dict().items())


def test_trainings_that_cannot_go_on_are_refused(tmp_path):
    with pytest.raises(RunError, match="no checkpoint"):
        train(tmp_path / "empty", resume=True)
    with pytest.raises(RunError, match="run_dir="):
        train(resume=True)
    train(tmp_path, epochs=1)
    with pytest.raises(RunError, match="resume=True"):
        train(tmp_path, epochs=1)
    with pytest.raises(RunError, match=r"epochs was 1, is 2; .*lr was 0.005, is 0.1"):
        train(tmp_path, resume=True, epochs=2, lr=0.1)
    with pytest.raises(RunError, match="held-out data was 40, is 30"):
        train(tmp_path, resume=True, epochs=1, validation=rows(30))
    with pytest.raises(RunError, match="does not fit"):
        train(tmp_path, resume=True, epochs=1, name="ppca")


@pytest.mark.parametrize("damage", ["cut", "text", "no training"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    train(tmp_path, epochs=1)
    path = tmp_path / "checkpoints" / "training.safetensors"
    if damage == "cut":
        cut(path)
    elif damage == "text":
        path.write_text("no tensors")
    else:
        path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(RunError, match="damaged"):
        train(tmp_path, resume=True, epochs=1)


def test_labels_of_any_kind_survive_training():
    model, guide = modules()
    data = cal.data.Data(rows(40), coords={"data": [f"image {i}" for i in range(40)]})
    fit = cal.inference.fit(model, guide, data, epochs=1, batch_size=8)
    assert len(fit.held_out) == 4
    assert all(label.startswith("image ") for label in fit.held_out)
