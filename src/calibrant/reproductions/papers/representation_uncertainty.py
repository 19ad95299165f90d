"""Uncertainties of latent representations (Kirchhof's thesis, arXiv 2408.14281, with MCInfoNCE, URL and nivMF)."""

from __future__ import annotations

from calibrant.reproductions.registering import register_paper

PAPER = register_paper(
    "representation-uncertainty",
    title="Uncertainties of latent representations in computer vision",
    arxiv="2408.14281",
    sentence="An encoder can tell how uncertain the representation of an image is, beside the representation itself.",
).name
