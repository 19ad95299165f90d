"""Examples of pages that have no test of their own, run with less: few data, few steps, stand-ins for large files."""

import re
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal
from calibrant.evaluation.statistics import posterior_ranks
from calibrant.inference.speed import measuring

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str, names: dict[str, Any], *shorter: tuple[str, str]) -> dict[str, Any]:
    """Runs the one Python block of a page, shortened, and returns its names."""
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)
    indent = re.match(r" *", block)[0]
    block = "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True))
    for long, short in shorter:
        assert long in block
        block = block.replace(long, short)
    exec(compile(block, page, "exec"), names)
    return names


class Centred(PyroModule):
    """Data around a shared mean."""

    def forward(self, size: int) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(m, 1.0))


def test_the_program_of_design_md_keeps_to_the_contract():
    names = run("design.md", {"pyro": pyro, "dist": dist, "PyroModule": PyroModule})
    model = names["EAVAE"]()
    model.latents, model.decoder = 3, torch.nn.Linear(3, 5)
    model.likelihood = lambda mean: dist.Normal(mean, 0.1).to_event(1)
    data = {"x": torch.zeros(4, 5)}
    assert set(cal.program.sites(model, data)) == {"scale", "z"}
    cal.program.check_program(model, data)


def test_speed_is_measured_as_speed_md_says(capsys, monkeypatch):
    monkeypatch.setattr(measuring, "_training", lambda *given: [])
    names = {"cal": cal, "model": cal.models.create("ppca", shape=(6,), latents=2), "data": {"x": torch.randn(20, 6)}}
    names["guide"] = cal.guides.amortize(names["model"], names["data"])
    run("speed.md", names, ("model, guide, data", "model, guide, data, seconds=0.02"))
    assert "reference: seconds per datum" in capsys.readouterr().out


def test_a_procedure_is_calibrated_as_checks_md_says(capsys, monkeypatch):
    monkeypatch.setattr(posterior_ranks, "LEAST_SIMULATIONS", 3)
    names = {"cal": cal, "model": Centred(), "observed": {"x": torch.randn(20)}}
    run(
        "checks.md",
        names,
        ("validation=data, seed", "validation=data, epochs=1, seed"),
        ("posterior(model, guide, data, seed", "posterior(model, guide, data, 100, seed"),
        ("Data(observed)", "Data(observed), 3, 20"),
    )
    printed = capsys.readouterr().out
    assert "log_joint" in printed
    assert " m " in printed or "\nm " in printed


def test_a_method_is_trained_as_representation_methods_md_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(
        "representation-methods.md",
        {},
        ('data.load("caltech-101")', 'data.load("digits", levels=256)'),
        ('backbone("efficientnet-lite0")', 'small_network(photographs["train"], size=16, features=8, steps=5)'),
        ("train, seed=0", "train, seed=0, steps=5"),
    )
    assert names["trained"].uncertainty(names["x"]).shape == (len(names["x"]),)
    assert (tmp_path / "kept.safetensors").is_file()


def test_the_file_of_coming_from_elsewhere_md_gives_a_program_and_its_data():
    text = (DOCS / "coming-from-elsewhere.md").read_text(encoding="utf-8")
    script, *_ = re.findall(r"```{code-cell} ipython3\n(.*?)```", text, re.DOTALL)
    names = {"cal": cal, "__name__": "sites"}
    exec(compile(script, "coming-from-elsewhere.md", "exec"), names)
    run("coming-from-elsewhere.md", names)
    assert names["program"]().plate == "sites"
    assert len(names["load"]()) == len(names["counts"]) == 400
