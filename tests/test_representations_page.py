"""The examples of docs/representations.md run as they stand, on fewer data."""

import re
from pathlib import Path

import calibrant as cal

PAGE = (Path(__file__).parents[1] / "docs/representations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SHORTER = {
    "20_000": "2_000",
    "epochs=20, batch_size=256": "epochs=5, batch_size=128, lr=3e-3",
    "particles=8": "particles=4",
    "2_000, size": "40, size",
    "epochs=5, batch_size=8": "epochs=1, batch_size=8",
    "draws=16": "draws=4",
    "latents=8)": "latents=8, encoder={'name': 'mlp', 'hidden': 64}, widths=[16])",
}


def test_the_examples_run_and_the_first_one_learns_to_match():
    names = {}
    for block in BLOCKS:
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(compile(block, "representations.md", "exec"), names)
    test = cal.data.load("digits")["test"]
    directions, classes = names["directions"], test.values("y")
    assert names["uncertainty"].shape == (len(test),)
    products = (directions @ directions.T).fill_diagonal_(-2)
    found = float((classes[products.argmax(1)] == classes).float().mean())
    assert found > 0.7  # 0.1 by chance


def test_every_shortening_is_of_the_page():
    assert all(any(long in block for block in BLOCKS) for long in SHORTER)


def test_the_table_has_every_program_and_its_kind_of_loss():
    rows = re.findall(r"^\| `([a-z-]+)` \| .*? \| ([a-z]+)", PAGE, re.M)
    kinds = {name: cal.models.card(name).cls.loss_kind for name, _ in rows}
    programs = {name for name in cal.models.list_models() if hasattr(cal.models.card(name).cls, "loss_kind")}
    assert {name for name, _ in rows} == programs
    assert all(kinds[name] == kind for name, kind in rows)
