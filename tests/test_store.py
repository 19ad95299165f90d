"""Run folders: what is saved comes back bit for bit, and what is damaged or foreign is refused."""

import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from stored_runs import PIXELS, cut, modules, outputs, rows, same, saved
from torch import nn

import calibrant as cal
from calibrant import store
from calibrant.errors import RunError
from calibrant.workflow import preparing

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


# -- load --------------------------------------------------------------------------------------------------------------

CASES = [(name, {}) for name in ("ea-vae", "gsm", "ppca", "vae")] + [  # test_models.py stores the cases of all cards
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


def test_the_comparison_of_outputs_notices_a_small_change(tmp_path):
    """A shift of every datum's mean by 1e-4 moves log densities by far more than their rounding, about 1e-6."""
    pair = saved(tmp_path)
    model, guide = cal.load(tmp_path)
    with torch.no_grad():
        model.decoder.bias[0] += 1e-4
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
    assert config["fit"] == {
        "elbo": 1 / 3,
        "elbo_se": None,
        "is_elbo": True,
        "kl_weights": {},
        "epochs": 1,
        "stopped": "finished",
    }
    assert config["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_numbers_that_json_lacks_are_unknown_when_they_are_read(tmp_path):
    saved(tmp_path)
    found = store.read_config(tmp_path)["fit"]
    assert math.isnan(found.pop("elbo_se"))
    assert found == {"elbo": 1 / 3, "is_elbo": True, "kl_weights": {}, "epochs": 1, "stopped": "finished"}


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
    """Change a configuration and its sha256, as a program would that knows it."""
    store.write_config(folder, {**json.loads((folder / "config.json").read_text()), **changes})


def without(folder, key):
    config = json.loads((folder / "config.json").read_text())
    store.write_config(folder, {k: v for k, v in config.items() if k != key})


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
    "unfinished": (lambda f: edit(f, fit=None), "no result yet: continue it with fit"),
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


@pytest.mark.parametrize("name", ["../other", "..", ".", "", "/tmp", "a/b"])
def test_clearing_stays_inside_the_folder(tmp_path, name):
    saved(tmp_path / "other")
    saved(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    edit(tmp_path / "run", runs=[name])
    for refuse in (store.clear_run, store.read_config, preparing.member_folders):
        with pytest.raises(RunError, match="no folder inside it"):
            refuse(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["member", "checkpoints", ".checking", "ppca/checkpoints"])
def test_clearing_follows_no_link(tmp_path, place):
    saved(tmp_path / "other")
    (tmp_path / "other" / "training.safetensors").write_text("mine")
    saved(tmp_path / "run")
    saved(tmp_path / "run" / "ppca")
    (tmp_path / "run" / place).symlink_to(tmp_path / "other")
    edit(tmp_path / "run", runs=["ppca", "member"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=f"{place} is a link: .*delete the link|member is a link: .*put the run itself"):
        store.clear_run(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "run" / place).unlink()
    store.clear_run(tmp_path / "run")  # the remedy
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [
        "config.json",
        "guide.safetensors",
        "history.csv",
        "model.safetensors",
        "training.safetensors",
    ]


def test_clearing_removes_what_a_killed_process_left(tmp_path):
    saved(tmp_path)
    (tmp_path / ".amortized.nc.123.new").write_text("half")
    (tmp_path / ".thesis.123.new").write_text("mine")
    store.clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".thesis.123.new"]
