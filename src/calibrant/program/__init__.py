"""The contract of a model: what a generative Pyro program promises, and what follows from it.

A model is a `PyroModule`, a plain function, or a method of a module, called as `model(size, **covariates)`. It never
sees observations.

>>> import torch, pyro, pyro.distributions as dist
>>> import calibrant as cal
>>> def factor(size):
...     with pyro.plate("data", size):
...         z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
...         pyro.sample("x", dist.Normal(z.sum(-1), 0.5))

**Local** sites live in `pyro.plate("data", size)`, the batch dimension −1; everything else of a site is event. Their
log density has one entry per datum:

>>> values = {"z": torch.zeros(3, 2), "x": torch.zeros(3)}
>>> density = cal.program.log_density(factor, values, observed=["x"])
>>> {name: tuple(term.shape) for name, term in density.items()}
{'z': (3,), 'x': (3,)}
>>> bool(torch.equal(density.joint, density.latent + density.observed))
True

**Shared** sites live outside that plate, possibly in plates of their own; their log density is one number:

>>> def hierarchical(size):
...     centre = pyro.sample("centre", dist.Normal(0.0, 10.0))
...     with pyro.plate("data", size):
...         z = pyro.sample("z", dist.Normal(centre, 1.0))
...         pyro.sample("x", dist.Normal(z, 0.5))
>>> latents = cal.program.sites(hierarchical, {"x": torch.zeros(3)})
>>> {name: site.local for name, site in latents.items()}
{'centre': False, 'z': True}

**Dependencies** are read from the program, and confirmed by changing one latent at a time, since Pyro does not see
dependencies through in-place writes:

>>> def hidden(size):
...     with pyro.plate("data", size):
...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
...         mean = torch.zeros(size, 2)
...         mean[:, 0] = z
...         w = pyro.sample("w", dist.Normal(mean, 1.0).to_event(1))
...         pyro.sample("x", dist.Normal(w.sum(-1), 1.0))
>>> cal.program.sites(hidden, {"x": torch.zeros(3)})["w"].parents
('z',)

**Masks and scales** stand around observations alone. A mask says which entries are missing, and comes from a covariate
or a buffer; these entries hold any value inside the support, and add nothing to the density:

>>> def series(size, length):
...     with pyro.plate("data", size):
...         z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
...         seen = torch.arange(2) < length[:, None]
...         pyro.sample("x", dist.Normal(z, 0.5).mask(seen).to_event(1))
>>> given = {"z": torch.zeros(2, 2), "x": torch.zeros(2, 2)}
>>> density = cal.program.log_density(series, given, covariates={"length": torch.tensor([1, 2])}, observed=["x"])
>>> bool(density["x"][1] == 2 * density["x"][0])
True

A scale around an observation (`poutine.scale`) makes a weighted likelihood, whose posterior is right and which nothing
simulates. Around a latent, of the program or of a guide, both are refused, since draws of a latent do not follow a
masked or scaled density; a latent of which nothing is observed has its prior as posterior.

**Discrete** latents of a datum are summed out where they have finitely many values, at most 1,024 combinations
together. Longer chains of states are summed out by the observed site, with `pyro.distributions.DiscreteHMM`.

**Parameters** stay in their modules while calibrant runs a program, and Pyro's parameter store and settings are as you
left them before and after each call. A program that you call yourself follows Pyro's own rules:

>>> pyro.settings.get("module_local_params"), list(pyro.get_param_store().keys())
(False, [])

A program that breaks the contract is refused, with the name of the site and the remedy:

>>> def unfinished(size):
...     with pyro.plate("data", size):
...         pyro.sample("x", dist.Normal(torch.zeros(size, 2), 1.0))
>>> cal.program.check_program(unfinished, {"x": torch.zeros(3, 2)})
Traceback (most recent call last):
    ...
calibrant.errors.ProgramError: site 'x' has 2 entries in batch dimension -1 where the plate 'data' has 3: the \
dimensions beyond the data belong to the event, so end its distribution with .to_event(their number)

The docstring of `check_program` lists the other rules.
"""

from calibrant.calls import own_calls
from calibrant.program.contract import PLATE, Program, Values, as_program, covariate_names
from calibrant.program.density import LogDensity, density_of, log_density
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.latents import Site, sites
from calibrant.program.refusals import check_program
from calibrant.program.simulation import sample_prior
from calibrant.program.tracing import deterministic, factors, guide_trace, is_local, messages, sampled, trace

__all__ = [
    "PLATE",
    "LogDensity",
    "Program",
    "Site",
    "Values",
    "as_program",
    "cast",
    "check_program",
    "covariate_names",
    "defaults",
    "density_of",
    "deterministic",
    "factors",
    "guide_trace",
    "in_double",
    "is_local",
    "log_density",
    "messages",
    "sample_prior",
    "sampled",
    "seeded",
    "sites",
    "trace",
]

globals().update(own_calls(__name__, globals(), __all__, gradients=False))


def __dir__() -> list[str]:
    return sorted(__all__)
