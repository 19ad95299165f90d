"""Explaining-away variational autoencoders (Catoni, Martos, …, Orbán & Echeveste, arXiv 2404.15390)."""

from calibrant.reproductions.registering import register_paper

PAPER = register_paper(
    "ea-vae",
    title="Uncertainty in latent representations of variational autoencoders optimized for visual tasks",
    arxiv="2404.15390",
    sentence="With a latent that scales all others, the posterior of a VAE is less certain where an image says less.",
).name
