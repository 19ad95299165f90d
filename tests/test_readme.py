"""The README's examples run as they stand."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import calibrant as cal
from calibrant.inference.references import repair

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def shortened(block, shorter):
    for long, short in shorter:
        assert long in block
        block = block.replace(long, short)
    return block


@pytest.fixture
def ungated(monkeypatch):
    """Chains may be too short to judge anything."""
    monkeypatch.setattr(
        import_module("calibrant.inference.references.sampling"), "require_passable", lambda *numbers: None
    )
    monkeypatch.setattr(repair, "_LOOKS", 1)


def write_your_own_model(block, folder, capsys):
    assert len(block.splitlines()) < 35
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert "gain" in capsys.readouterr().out
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.truth
def test_write_your_own_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_your_own_model(BLOCKS[0], tmp_path, capsys)


def test_write_your_own_model_with_short_chains(tmp_path, monkeypatch, capsys, ungated, short_gap):
    monkeypatch.chdir(tmp_path)
    shorter = (
        ("2000, seed=0", "200, seed=0"),
        ("epochs=20", "epochs=1"),
        ("[:128]", "[:6]"),
        ("warmup=300, draws=500", "warmup=10, draws=100, simulations=100"),
    )
    write_your_own_model(shortened(BLOCKS[0], shorter), tmp_path, capsys)


def the_model_you_have(**shorter):
    """Runs the three blocks of "Check the model you already have" in one namespace, and returns it."""
    names = {}
    for block in BLOCKS[1:4]:
        for long, short in shorter.values():
            assert any(long in other for other in BLOCKS[1:4])
            block = block.replace(long, short)
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_check_the_model_you_already_have(capsys, ungated):
    """With chains that are too short to judge anything: the slow test takes the real ones."""
    assert len(BLOCKS[2].strip().splitlines()) <= 10
    names = the_model_you_have(
        training=("range(1000)", "range(50)"),
        chains=("warmup=300, draws=500", "warmup=10, draws=30"),
        data=("x[1500:1532]", "x[1500:1508]"),
        pool=("draws=10_000), draws=1000", "draws=200), draws=100"),
        refining=("guide, few)  #", "guide, few, steps=20)  #"),
    )
    assert "`z" in capsys.readouterr().out
    assert cal.inference.posterior(names["model"], names["richer"], names["few"], draws=2)
    fit = cal.inference.fit(
        names["model"].requires_grad_(False), names["richer"], names["few"], epochs=1, objective="dreg"
    )
    assert fit.epochs == 1


@pytest.mark.slow
def test_what_helps_a_guide_that_fails(capsys):
    names = the_model_you_have()
    assert "too narrow" in capsys.readouterr().out
    model, few, ref = (names[name] for name in ("model", "few", "ref"))
    assert int(ref["convergence"]["is_reference"].sum()) > 28

    def errors(post):
        """Root-mean-square errors of the means, in reference sds, and of the sd ratios."""
        result = cal.evaluation.compare(post, ref)
        return [float((error**2).mean() ** 0.5) for error in (result["mean_error"], result["sd_ratio"] - 1)]

    mean, sd = errors(names["post"])
    assert errors(cal.inference.posterior(model, names["refined"], few))[0] < 0.5 * mean  # the encoder's fault
    weighed = errors(names["weighed"])
    assert weighed[0] < 0.5 * mean
    assert weighed[1] < 0.6 * sd  # the family's


@pytest.mark.slow
def test_use_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[4], "README.md", "exec"), {"__name__": "readme"})
    assert "scale" in capsys.readouterr().out
