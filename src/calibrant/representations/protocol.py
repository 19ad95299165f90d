"""The protocol of representations: an embedding of an input, and how uncertain it is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Representation(Protocol):
    """Anything that embeds inputs and says how uncertain each embedding is.

    Both methods take inputs `(n, *shape)`, images or features. They run without gradient and in eval mode, in blocks of
    rows, and the result of a row depends on that row alone.
    """

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings `(n, m)`: unit vectors where the method has directions, else plain features."""
        ...

    def uncertainty(self, x: Tensor) -> Tensor:
        """Uncertainty of each embedding, `(n,)`, larger where it is less certain.

        The docstring of the method says its unit, such as 1/κ, or nats of class entropy.
        """
        ...
