"""The protocol of likelihoods: the distribution of an observation, given the output of a decoder."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Size, Tensor, nn
from torch.distributions import constraints

Shape = tuple[int, ...]
Shapes = Size | list[int] | tuple[int, ...]  # of samples, as torch types them
NO_SHAPE = Size()
Output = Any  # a tensor, or a tuple of tensors if a likelihood has several outputs


class Likelihood(nn.Module):
    """Base of the likelihoods: called on a decoder's output, it returns the distribution of the observations.

    A likelihood is built before the decoder, which is then built to return what `outputs` names: a tensor
    `(size, *shape)` for one output, a tuple of such tensors, in the same order, for several. The likelihood takes that
    and returns a Pyro distribution with batch shape `(size,)` and the event shape of the observations. If the entries
    of an observation are independent, `marginals` is all that has to be written.

    A decoder that is untrained or diverges may return anything, and data may lie far out. `log_prob` and its gradients
    are finite, in float32 and float64, for outputs and observations between −1e6 and 1e6 (observations inside the
    support).

    Any other module that maps a decoder's output to such a distribution can stand in for a likelihood. The decoder then
    returns one tensor with the shape of the observations, and the noise is unknown unless the module has a method
    `noise_sd` with the signature given here.

    A noise scale that is computed from data is set by `fit`, which calls these methods of any module of the model that
    has them and whose result is the distribution of an observed site. Their argument has the event shape of the site,
    in squared data units:

    - `start_noise(mean_squares)`, before the first step, with the variance of every entry of the training data, if the
      module has an attribute `is_started` that is False;
    - `settle_noise(mean_squares)`, before every held-out ELBO, with the mean squared error of every entry of the whole
      training set around the mean of the distribution, with draws of the guide. In `train()`, such a module may compute
      the density of a minibatch from all its data; in `eval()`, a datum's density depends on that datum alone.

    Attributes:
        support: the values that an entry of an observation may have.
        is_density: False for a training loss in the place of a log likelihood. Its distribution has the same attribute,
            and `instead`, a sentence that names a likelihood with a density. Such a model can be trained; all that
            needs draws of the data, a posterior or the evidence is refused.
        is_started: False while a noise scale waits for `start_noise`, in a new model; weights that are loaded bring
            their scale.
    """

    support: Any = constraints.real
    is_density: bool = True
    is_started: bool = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_started = True

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        """Names and event shapes of the outputs that the decoder must return, for observations of an event shape.

        The first output is the one that a model's scale may multiply. It is called `logits` if it holds log odds: a
        scale of 0 then means that every value is equally probable.
        """
        raise NotImplementedError

    def marginals(self, output: Output) -> dist.TorchDistribution:
        """The distribution of every entry on its own, batch shape `(size, *event shape)`.

        It has `log_prob`, `sample`, `mean`, `stddev` (infinite where there is none), `cdf` and, for quantiles, `icdf`:
        the smallest value whose `cdf` is at least the probability that is given.
        """
        raise NotImplementedError

    def forward(self, output: Output) -> dist.TorchDistribution:
        """The distribution of the observations."""
        entries = self.marginals(output)
        return entries.to_event(len(entries.batch_shape) - 1)

    def noise_sd(self, output: Output) -> Tensor | None:
        """Standard deviation of an observation around its mean, in data units, in a shape that broadcasts to it.

        None if it is infinite, or if an observation is not a signal plus noise.
        """
        return None


def outputs_of(likelihood: nn.Module, shape: Shape) -> dict[str, Shape]:
    """Names and event shapes of the outputs that a decoder returns for a likelihood, or for a user's own module."""
    return likelihood.outputs(shape) if isinstance(likelihood, Likelihood) else {"output": shape}


def takes_logits(likelihood: nn.Module, shape: Shape) -> bool:
    """Whether the first output of a likelihood holds log odds."""
    return next(iter(outputs_of(likelihood, shape))) == "logits"
