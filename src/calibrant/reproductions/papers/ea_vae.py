"""Explaining-away variational autoencoders (Catoni, Martos, …, Orbán & Echeveste, arXiv 2404.15390)."""

from __future__ import annotations

from collections.abc import Mapping

from calibrant.reproductions.registering import register_paper

PAPER = register_paper(
    "ea-vae",
    title="Uncertainty in latent representations of variational autoencoders optimized for visual tasks",
    arxiv="2404.15390",
    sentence="With a latent that scales all others, the posterior of a VAE is less certain where an image says less.",
).name

SOURCES = {"exact": "exact", "guide": "amortized"}  # the end of a number's name → the source in a dataset


def of_both(numbers: Mapping[str, str]) -> dict[str, str]:
    """Numbers of both sources with their units, from those of one: "slope" is "slope, exact" and "slope, guide"."""
    return {f"{number}, {source}": unit for number, unit in numbers.items() for source in SOURCES}
