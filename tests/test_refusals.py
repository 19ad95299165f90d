"""Everything that breaks the contract is refused: by name, with the remedy, and before anything is computed with it.

The programs stand in the tables of `refused_sites`, `refused_modules`, `refused_data` and `allowed_programs`.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from allowed_programs import ALLOWED, improper, with_factors
from pyro.nn import PyroModule
from refused import (  # noqa
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
from refused_data import DATA, binary
from refused_modules import INDEPENDENCE, MODULES
from refused_sites import PLATES, SITES

import calibrant as cal
from calibrant.errors import CalibrantError, DataError, ProgramError
from calibrant.program import check_program, log_density, sample_prior, sites

CASES = {**PLATES, **SITES, **MODULES, **INDEPENDENCE, **DATA}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused_by_name_with_the_remedy(case):
    with pytest.raises(CalibrantError) as caught:
        check_program(case.build(), case.observed, case.covariates)
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in case.words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


def test_refused_whatever_the_users_validation_setting():
    """Pyro's own validation is often switched off for speed; the refusals must not go with it."""
    with pyro.validation_enabled(False):
        for name in ("grey values", "pyro.param in a module", "observation without to_event", "a bad scale"):
            with pytest.raises(CASES[name].error):
                check_program(CASES[name].build(), CASES[name].observed, CASES[name].covariates)


def test_a_refused_model_is_left_as_it_was():
    model = MODULES["BatchNorm in training mode"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ProgramError):
        check_program(model, X)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ALLOWED.values(), ids=ALLOWED)
def test_allowed(case):
    program = check_program(case.build(), case.observed, case.covariates)
    assert isinstance(program, PyroModule)
    latent = sites(program, case.observed, case.covariates)
    assert not set(latent) & set(case.observed)
    check_program(program, case.observed, case.covariates)  # the first check leaves nothing behind


# -- simulation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "name"), [(with_factors, "shared"), (improper, "w")])
def test_what_cannot_be_simulated_has_a_density_and_sites(program, name):
    values = {n: torch.ones(3) for n in ("z", "x")} | {"w": torch.ones(2 if program is improper else ())}
    density = log_density(program, values, observed=["x"])
    assert density.joint.isfinite().all()
    assert {"w", "z"} == set(sites(program, X))
    with pytest.raises(ProgramError, match=f"'{name}'.*can't be simulated"):
        sample_prior(program, 3)


@pytest.mark.parametrize("group", ["prior", "prior_predictive", "posterior_predictive"])
def test_a_factor_is_refused_by_every_group_that_simulates(group):
    def guide(observed, size):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 1.0))

    with pytest.raises(ProgramError, match=r"factor.*can't be simulated"):
        cal.inference.posterior(with_factors, guide, X, draws=2, groups=[group])
    assert "log_likelihood" in cal.inference.posterior(with_factors, guide, X, draws=2, groups=["log_likelihood"])


# -- values given to log_density ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"x": torch.zeros(3)}, ProgramError, r"\['z'\] are sampled by the program but have no value"),
        ({"x": torch.zeros(3), "z": torch.zeros(3), "y": torch.zeros(3)}, ProgramError, r"never samples \['y'\]"),
        ({"x": torch.zeros(3), "z": torch.zeros(2)}, ProgramError, "give size="),
        ({"x": torch.zeros(3, 1), "z": torch.zeros(3)}, DataError, r"'x' has a value of shape \(3, 1\), wanted \(3,\)"),
        ({"x": torch.zeros(3), "z": torch.zeros(())}, DataError, r"'z' has a value of shape \(\), wanted \(3,\)"),
    ],
)
def test_values_that_do_not_fit_are_named(values, error, match):
    with pytest.raises(error, match=match):
        log_density(conjugate, values)


def test_values_outside_the_support_are_named():
    with pytest.raises(DataError, match=r"'x': Bernoulli can't take this value"):
        log_density(binary, {"z": torch.zeros(3), "x": torch.full((3, 2), 0.5)})
