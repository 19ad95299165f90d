"""The exact evidence of models with two latents, to .002 nats: the program's own density, summed over a grid."""

import numpy as np
import pytest
import torch
from small_models import build

import calibrant as cal

LINEAR = [
    ("ppca", {}),
    ("ppca", {"noise": "diagonal"}),
    ("vae", {}),
    ("gsm", {"scale_prior": "lognormal"}),
    ("gsm", {"scale_prior": "gamma"}),
    ("gsm", {"scale_prior": "rayleigh"}),
    ("ea-vae", {"scale_prior": "lognormal"}),
    ("ea-vae", {"scale_prior": "gamma", "multiplies": "output"}),
    ("ea-vae", {"scale_prior": "softplus-laplace"}),
]
NAMES = ["-".join([name, *map(str, options.values())]) for name, options in LINEAR]


def brute_force_evidence(model, x, latent, with_scale):
    """log p(x) of one datum from the program's density on a grid over two latents (and the log scale)."""
    z = torch.linspace(-6, 6, 121, dtype=torch.float64)
    log_scale = torch.linspace(-12, 4, 97, dtype=torch.float64) if with_scale else torch.zeros(1, dtype=torch.float64)
    step = float(z[1] - z[0]) ** 2 * (float(log_scale[1] - log_scale[0]) if with_scale else 1.0)
    plane = torch.stack(torch.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
    double, terms = cal.program.in_double(model), []
    with torch.no_grad(), cal.program.defaults(model, {"x": x}, torch.float64):
        for t in log_scale:
            values = {latent: plane, "x": x.double().expand(len(plane), -1)}
            if with_scale:
                values["scale"] = t.exp().expand(len(plane))
            terms.append(torch.logsumexp(cal.program.log_density(double, values).joint, 0) + (t if with_scale else 0.0))
    return float(torch.logsumexp(torch.stack(terms), 0) + np.log(step))


@pytest.mark.parametrize(("name", "options"), LINEAR, ids=NAMES)
def test_evidence_against_brute_force(name, options):
    model, observed = build(name, latents=2, **options)
    latents = list(cal.program.sites(model, observed))
    exact = cal.inference.log_evidence(model, observed)
    for datum in range(2):
        brute = brute_force_evidence(model, observed["x"][datum : datum + 1], latents[-1], "scale" in latents)
        assert abs(float(exact[datum]) - brute) < 2e-3, (datum, float(exact[datum]), brute)
