"""What the contract allows."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import SoftplusTransform
from pyro.nn import PyroParam
from refused import (
    IMAGES,
    Case,
    X,
    conjugate,
    decoder_of,
    in_eval,
    module,
    plain,
    random_weight,
    tensor_attribute,
    through_decoder,
    weight,
)
from refused_data import LABEL, binary, images, labelled
from torch import nn
from torch.distributions import constraints


def mixture_of_classes(size):
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 1.0])[k], 1.0))


def semi_supervised(size):
    with pyro.plate("data", size):
        k = pyro.sample("x", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(torch.tensor([-1.0, 0.0, 1.0])[k], 1.0))


def shared_plates(size):
    with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(w.sum(), 1.0))


def masked_by_covariate(size, seen):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(z, 1.0))


def masked_entries(size, seen):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([size, 2]).mask(seen).to_event(1))


def nested_events(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)).expand([2]).to_event(1))
        cov = torch.eye(3) / 2 + 0.5
        pyro.sample("x", dist.MultivariateNormal(z, cov).to_event(1))


def improper(size):
    w = pyro.sample("w", dist.ImproperUniform(constraints.positive, (), (2,)))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z + w.sum(), 1.0))


def with_factors(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.factor("shared", -w.square())
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.factor("each", -z.square())
        pyro.sample("x", dist.Normal(z, 1.0))


def bounded_by_covariate(size, top):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))
        pyro.sample("x", dist.Normal(z, 1.0))


def softplus_of_laplace(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.TransformedDistribution(dist.Laplace(0.0, 1.0), [SoftplusTransform()]))
        pyro.sample("x", dist.Normal(z, 1.0))


def observed_angle(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.VonMises(z, 1.0))


def angle(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.VonMises(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.cos(), 1.0))


def time_series(size):
    """Data that do not factorise are one datum: the steps are event."""
    zero, one = torch.zeros(1), torch.eye(1)
    noise = dist.Normal(zero, 1.0).to_event(1)
    with pyro.plate("data", size):
        pyro.sample("x", dist.GaussianHMM(noise, one, noise, one, noise, duration=5))


def cholesky_factor(size):
    root = pyro.sample("root", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=root))


def direction(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.ProjectedNormal(torch.ones(2)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def no_latents(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def recorded(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * w)
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.deterministic("pair", torch.stack([z, -z], -1), event_dim=1)
        pyro.sample("x", dist.Normal(z, 1.0))


SEEN = torch.tensor([True, False, True, True, False, True])
ALLOWED = {
    "a scalar site": Case(plain(conjugate), ()),
    "no latents": Case(plain(no_latents), ()),
    "an observed angle": Case(plain(observed_angle), ()),
    "a latent angle": Case(plain(angle), ()),
    "a time series": Case(plain(time_series), (), observed={"x": torch.randn(2, 5, 1)}),
    "a transformed prior": Case(plain(softplus_of_laplace), ()),
    "a Cholesky factor": Case(plain(cholesky_factor), (), observed={"x": torch.zeros(4, 3)}),
    "a support without a transform": Case(plain(direction), ()),
    "a discrete latent as an index": Case(plain(mixture_of_classes), ()),
    "an observed class as an index": Case(
        plain(semi_supervised), (), observed={"x": torch.tensor([0.0, 2.0, 1.0]), "y": torch.zeros(3)}
    ),
    "an integer class as an index": Case(
        plain(semi_supervised), (), observed={"x": torch.tensor([0, 2, 1]), "y": torch.zeros(3)}
    ),
    "only one of two observations": Case(plain(semi_supervised), (), observed={"y": torch.zeros(3)}),
    "plates of shared latents": Case(plain(shared_plates), ()),
    "masked data": Case(plain(masked_by_covariate), (), covariates={"seen": SEEN}),
    "masked entries": Case(
        plain(masked_entries), (), observed=IMAGES, covariates={"seen": torch.stack([SEEN, ~SEEN], 1)}
    ),
    "nested events": Case(plain(nested_events), (), observed={"x": torch.zeros(4, 2, 3)}),
    "improper priors": Case(plain(improper), ()),
    "factors": Case(plain(with_factors), ()),
    "bounds from a covariate": Case(plain(bounded_by_covariate), (), covariates={"top": torch.arange(1.0, 7.0)}),
    "integer images": Case(plain(images), (), observed={"x": torch.arange(24, dtype=torch.uint8).reshape(6, 2, 2)}),
    "boolean images": Case(plain(binary), (), observed={"x": torch.eye(2, dtype=torch.bool)}),
    "PyroSample before the plate": Case(module(weight, random_weight), ()),
    "PyroParam": Case(
        module(lambda: {"centre": PyroParam(torch.ones(()), constraints.positive)}, tensor_attribute), ()
    ),
    "BatchNorm in eval()": Case(in_eval(module(decoder_of(lambda: nn.BatchNorm1d(3)), through_decoder)), ()),
    "dropout in eval()": Case(in_eval(module(decoder_of(lambda: nn.Dropout(0.5)), through_decoder)), ()),
    "layer norm in training mode": Case(module(decoder_of(lambda: nn.LayerNorm(3)), through_decoder), ()),
    "one datum": Case(plain(conjugate), (), observed={"x": torch.zeros(1)}),
    "an optional covariate": Case(plain(labelled), (), covariates=LABEL),
    "a class that is no PyroModule": Case(
        lambda: type("M", (nn.Module,), {"forward": lambda self, n: conjugate(n)})(), ()
    ),
    "what is recorded": Case(plain(recorded), ()),
    "float64 data": Case(plain(conjugate), (), observed={"x": X["x"].double()}),
}
