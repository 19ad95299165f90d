"""The example of docs/uncertainty.md runs as it stands."""

import re
from pathlib import Path

import pytest

import calibrant as cal

PAGE = Path(__file__).parents[1] / "docs/uncertainty.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
DRAWS = re.findall(r"```\n(reference = .*?|trees = .*?)```", TEXT, flags=re.DOTALL)


def run(block: str, names: dict) -> None:
    exec(compile(block, str(PAGE), "exec"), names)


def test_the_contrast_example_runs_with_a_short_training(capsys):
    block = EXAMPLES[0]
    for long, short in (
        ("epochs=10", "epochs=1, compile=False"),
        ('train, test = patches["train"]', 'train, test = patches["train"][:2000]'),
        ("images=24", "images=4, levels=[0.1, 1.0, 10.0], draws=50"),
        ("test[:500], train[:200], bins=21, draws=200", "test[:40], train[:20], bins=3, draws=50"),
        ("latents=36", "latents=6"),
    ):
        assert long in block
        block = block.replace(long, short)
    names: dict = {}
    run(block, names)
    printed = capsys.readouterr().out
    assert printed.count("model: ") == 1
    assert "Spearman: exact " in printed
    names["reference"] = names["cal"].inference.reference(names["model"], names["test"][:30], draws=50)
    names["test"] = names["test"][:30]
    run(DRAWS[1], names)
    assert names["curves"].sizes["contrast"] == 21


@pytest.mark.slow
def test_the_contrast_example(capsys):
    names: dict = {}
    run(EXAMPLES[0], names)
    assert names["contrast"].attrs["spearman_exact"] < -0.9
    assert names["bins"].attrs["spearman_exact"] < -0.9


def test_the_examples_of_corruption_and_of_other_sets_go_on_from_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    patches = cal.data.load("natural-patches", size=12)
    model = cal.models.create("ea-vae", shape=(1, 12, 12), latents=6).eval()
    guide = cal.guides.amortize(model, patches["train"]).eval()
    names = {"cal": cal, "model": model, "guide": guide, "test": patches["test"][:40]}
    for start in ("corrupted = ", "inside = "):
        (block,) = (block for block in EXAMPLES if f"\n{start}" in block)
        for long, short in (
            ("images=32, simulated=64", "images=8, simulated=8, draws=50"),
            (", sets)", ", sets, draws=50)"),
        ):
            block = block.replace(long, short)
        run(block, names)
    assert {path.name for path in tmp_path.glob("*.png")} == {"corruption.png", "coverage.png", "scores.png"}
    (block,) = re.findall(r"```\n(entropies = .*?)```", TEXT, flags=re.DOTALL)
    names |= {"train": patches["train"][:60], "train_labels": [0, 1] * 30}
    run(block, names)
    assert "auroc" in capsys.readouterr().out
