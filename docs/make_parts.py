"""Writes docs/parts.md from the cards of the registered models, likelihoods and data sets: `make parts`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import calibrant as cal

PAGE = Path(__file__).with_name("parts.md")
HEAD = """# Models, likelihoods and data sets

`make parts` writes this page from the cards of what is registered; `calibrant list` prints the same in a terminal. A
new part is one new file: [a model](how-to/add-a-model.md), [a likelihood](how-to/add-a-likelihood.md),
[a data set](how-to/add-a-data-set.md), [a method](how-to/add-a-method.md). [Which likelihood](likelihoods.md) compares
the likelihoods, and [the models of a paper](presets.md) says what presets are.
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def text() -> str:
    """The page."""
    cards = [cal.models.card(name) for name in cal.models.list_models()]
    models = table(
        ["model", "equations", "source", "licence"],
        [[f"`{card.name}`", card.equations, card.paper, card.licence] for card in cards],
    )
    presets = table(
        ["model", "preset", "what it is", "trainings"],
        [
            [f"`{card.name}`", f"`{name}`", preset.about, ", ".join(preset.trainings)]
            for card in cards
            for name, preset in card.presets.items()
        ],
    )
    likelihoods = table(
        ["likelihood", "density", "of"],
        [[f"`{card.name}`", card.equations, card.density_of] for card in cal.models.list_likelihoods()],
    )
    data = table(
        ["data set", "what it is", "source", "licence"],
        [[f"`{card.name}`", card.description, card.source, card.licence] for card in cal.data.list_data()],
    )
    people = table(
        ["labels", "of", "what they are", "source", "licence"],
        [
            [card.name, f"`{card.data}`, {card.split}", card.description, card.source, card.licence]
            for card in cal.data.list_human_labels()
        ],
    )
    methods = table(
        ["method", "what is trained", "its uncertainty", "source"],
        [
            [f"`{card.name}`", card.about, card.unit, card.paper]
            for card in map(cal.representations.method_card, cal.representations.methods())
        ],
    )
    parts = {
        "Models": models,
        "Presets": presets,
        "Likelihoods": likelihoods,
        "Data sets": data,
        "Human labels of data sets": people,
        "Methods of representations": methods,
    }
    return "\n".join([HEAD, *(f"## {heading}\n\n{body}\n" for heading, body in parts.items())])


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
