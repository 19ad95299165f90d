"""What the posterior family of the scale costs in the van Hateren model of the EA-VAE paper (arXiv 2404.15390).

    python -m benchmarks.van_hateren [--quick] [--data natural-patches van-hateren] [--training frozen joint]
        [--families …] [--structures …] [--json FILE]

The authors' guide gives the scale a Gamma of shape 2, the prior's, whatever the image, and is mean-field: here the
family `gamma-fixed`, beside a Gamma whose shape is learned and a LogNormal, each in guides of three structures.
"frozen" trains all guides for one model, which was trained with the collapsed guide; "joint" trains model and guide
together, as the authors do, so that every row has an evidence of its own.

Theirs: 40×40 patches of van Hateren's images, 1799 latents, Laplace prior, linear decoder with a bias, the scale
(Gamma, shape 2, mean 1.41) multiplies its output, noise 0.46 where the sd of all pixels is 0.886, loss with weights on
the KL terms that are 1 for the latents and 2 for the scale in those units. Here: as many latents per pixel, noise per
pixel sd, prior of the scale and decoder; but 16×16 patches; a Normal prior of the latents, with which evidence and
posterior are exact; columns of fixed norm in the decoder; the plain ELBO; and encoders of this library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.nn import PyroModule

import calibrant as cal
from benchmarks.structure import QUICK, Bench, Plan, Row, parser, show, write

FAMILIES = ("gamma-fixed", "gamma", "lognormal")
STRUCTURES = ("mean-field", "faithful", "collapsed")
LATENTS_PER_PIXEL = 1799 / 1600
NOISE = 0.4603 / 0.88586  # in standard deviations of all pixels


def arguments(size: int) -> Mapping[str, Any]:
    """The model's, for patches of size × size pixels with standard deviation 1."""
    return {
        "latents": int(LATENTS_PER_PIXEL * size**2),
        "prior": "normal",
        "scale_prior": "gamma",
        "multiplies": "output",
        "likelihood": {"name": "gaussian", "scale": NOISE, "learn": False},
    }


def joint_row(bench: Bench, structure: str, family: str) -> Row:
    """Model and guide trained together, as long as the frozen model."""
    size, settings = bench.plan.size, arguments(bench.plan.size)

    def make() -> PyroModule:
        torch.manual_seed(bench.plan.seed)
        return cal.models.create("ea-vae", shape=(1, size, size), **settings)

    return bench.joint_row("joint", f"{structure}, {family}", make, structure, {"scale": family})


def main() -> None:
    """Train, judge and print."""
    options = parser(__doc__, "runs/van-hateren")
    options.add_argument("--data", default="natural-patches", choices=["natural-patches", "van-hateren"])
    options.add_argument("--size", type=int, default=16, help="side of a patch")
    options.add_argument("--training", nargs="+", default=["frozen"], choices=["frozen", "joint"])
    options.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    options.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=STRUCTURES)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    plan = Plan(data=asked.data, size=asked.size, guide_epochs=10, guide_lr=3e-3, judged=1_000, compared=64, draws=500)
    plan = replace(plan, **(QUICK if asked.quick else {}))
    bench, rows = Bench(plan, asked.work), []
    for training in asked.training:
        model = bench.model("ea-vae", arguments(plan.size)) if training == "frozen" else None
        for structure in asked.structures:
            for family in asked.families:
                if model is not None:
                    label = f"{structure}, {family}"
                    rows.append(bench.row("frozen", label, model, structure, {"scale": family}))
                else:
                    rows.append(joint_row(bench, structure, family))
                show(rows[-1:])
    print()
    show(rows)
    write(rows, asked.json)


if __name__ == "__main__":
    main()
