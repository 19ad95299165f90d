"""Habits of Pyro's users: the remedy that a refusal prints, followed to the letter, gives a right program that runs."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from idioms_allowed import HABITS
from idioms_data import IDIOMS as OF_DATA
from idioms_plates import IDIOMS as OF_PLATES
from idioms_weights import IDIOMS as OF_WEIGHTS
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from small_models import nuts

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.program import check_program, deterministic, log_density, sample_prior, trace

IDIOMS = {**OF_DATA, **OF_PLATES, **OF_WEIGHTS}


def simulated(program, size, covariates):
    """Draws of all sample sites, and the covariates, in float64."""
    recorded = deterministic(trace(program, size, covariates))
    drawn = sample_prior(program, size, covariates, seed=1)
    parts = {name: value for name, value in drawn.items() if name not in recorded}, covariates
    return [{name: v.double() if v.is_floating_point() else v for name, v in part.items()} for part in parts]


@pytest.mark.parametrize("idiom", IDIOMS.values(), ids=IDIOMS)
def test_refused_with_a_remedy(idiom):
    with pytest.raises(ProgramError) as caught:
        check_program(idiom.before(), idiom.observed, idiom.wrong)
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in idiom.words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


REMEDIES = {idiom.after: (name, idiom) for name, idiom in reversed(IDIOMS.items())}  # several refusals have the same
FOLLOWED = dict(REMEDIES.values())
PROGRAMS = {name: (i.after, i.truth, i.observed, i.covariates) for name, i in FOLLOWED.items()} | {
    name: (habit.build, habit.truth, habit.observed, habit.covariates) for name, habit in HABITS.items()
}


@pytest.mark.parametrize(("build", "truth", "observed", "covariates"), PROGRAMS.values(), ids=PROGRAMS)
def test_the_density_is_right(build, truth, observed, covariates):
    size = len(next(iter(observed.values())))
    values, covariates = simulated(build(), size, covariates or {})
    program = cal.program.in_double(build())
    with torch.no_grad(), cal.program.defaults(program, values, torch.float64):
        found = log_density(program, values, size, covariates, observed=observed).joint.sum()
        assert float(found) == pytest.approx(float(truth(values, covariates)), abs=1e-4)


@pytest.mark.parametrize(("build", "truth", "observed", "covariates"), PROGRAMS.values(), ids=PROGRAMS)
def test_it_runs(build, truth, observed, covariates):
    program = build()
    check_program(program, observed, covariates)
    guide = cal.guides.amortize(program, observed, covariates=covariates)
    held_out = cal.data.Data({**observed, **(covariates or {})})  # a single datum can't be split
    cal.inference.fit(program, guide, observed, epochs=1, covariates=covariates, validation=held_out)
    tree = cal.inference.posterior(program, guide, observed, draws=5, covariates=covariates)
    assert set(guide.order) <= set(tree["posterior"].data_vars)


REFERRED = {name: idiom for name, idiom in IDIOMS.items() if idiom.reference}


@pytest.mark.slow
@pytest.mark.parametrize("idiom", REFERRED.values(), ids=REFERRED)
def test_the_remedy_has_a_reference(idiom):
    tree = nuts(idiom.after(), idiom.observed, covariates=idiom.covariates)
    assert tree["convergence"]["is_reference"].all()


def test_a_reparameterized_program_has_the_posterior_of_the_program():
    """z ~ N(1, 2), x ~ N(z, 1/2): the latent is (z − 1)/2, and z is recorded with the draws."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(z, 0.5))

    decentred = poutine.reparam(program, config={"z": LocScaleReparam(0.0)})
    observed = {"x": torch.tensor([0.3, -1.2, 4.0])}
    tree = cal.inference.reference(decentred, observed, draws=1000)
    z = 1 + 2 * tree["posterior"]["z_decentered"]
    sd = (1 / 4 + 1 / 0.25) ** -0.5
    mean = (1 / 4 + observed["x"].numpy() / 0.25) * sd**2
    error = np.abs(z.mean(("chain", "draw")) - mean) / (sd / z[..., 0].size ** 0.5)
    assert (error < limit(3)).all()
    guided = cal.inference.posterior(decentred, cal.guides.amortize(decentred, observed), observed, draws=10)[
        "posterior"
    ]
    np.testing.assert_allclose(guided["z"], 1 + 2 * guided["z_decentered"], rtol=1e-5)
