"""The structures from which users of Pyro and NumPyro start go all the way: check, guide, an epoch, a posterior."""

import pytest
from example_programs import EXAMPLES

import calibrant as cal
from calibrant.program import check_program


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_example_runs(example):
    program, given = example.build(), {"covariates": example.covariates}
    held_out = cal.data.Data({**example.observed, **(example.covariates or {})})
    check_program(program, example.observed, example.covariates)
    guide = cal.guides.amortize(program, example.observed, **given)
    result = cal.inference.fit(program, guide, example.observed, epochs=1, validation=held_out, **given)
    tree = cal.inference.posterior(program, guide, example.observed, draws=5, **given)
    assert result.epochs == 1
    for name, draws in tree["posterior"].data_vars.items():
        assert draws.notnull().all(), name
