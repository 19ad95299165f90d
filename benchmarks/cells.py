"""The rows of `benchmarks.power`: which guide of which program, at which budget, and how many repetitions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.hierarchy import Hierarchy
from benchmarks.trained import TRAINED


@dataclass(frozen=True)
class Budget:
    """What a check may cost."""

    data: int = 128
    draws: int = 1000
    simulations: int = 2000
    reference: int = 1000  # draws of each of four chains
    ranked: int = 1000  # draws among which a simulated latent is ranked


BUDGET, SMALL = Budget(), Budget(data=20, draws=100, ranked=100)
# For many latents. What is saved is time: with fewer draws, power is lower if anything, and passes are rarer.
MANY = Budget(reference=500, ranked=250)
FAST = Budget(draws=300, reference=150, ranked=200)

STRONG = ("sd × 0.8", "mean + 0.3 sd", "correlation ignored", "prior as posterior")  # and the missing mode
WEAK = ("sd × 0.9", "sd × 1.1", "sd × 1.25", "mean + 0.1 sd", "low contrast", "tails lost")
OF_GSM = ("sd × 0.8", "sd × 1.25", "mean + 0.3 sd", "prior as posterior", "low contrast")
OF_PPCA = ("sd × 0.8", "one latent × 0.7", "tails lost")
HARMLESS = ("sd × 1.03", "sds 3% off")  # errors that do not matter: in all latents, but small
FALSE_ALARMS, POWER, HALF, SOME, FEW, RARE = 100, 100, 50, 40, 10, 5  # repetitions; 100 of 100 is a power above 96%
QUICK = 2


@dataclass(frozen=True)
class Cell:
    """A row to be made: a guide of a program, and how many repetitions; `epochs` cut a training short."""

    program: str
    guide: str
    repetitions: int
    budget: Budget = BUDGET
    epochs: int | None = None


def _cells(program: str, guides: Mapping[str, int], budget: Budget = BUDGET) -> list[Cell]:
    return [Cell(program, guide, repetitions, budget) for guide, repetitions in guides.items()]


DECIDED = Budget(draws=4000)  # what the advice names where single data are undecided: with 1,000 draws 1 in 6 are
SHARED = Budget(draws=20_000, reference=2000)  # what the advice for shared latents names
FOOLED: Mapping[str, list[Cell]] = {
    "one direction": [
        *_cells("one direction", {"prior as posterior": POWER}, FAST),
        *_cells("one direction", {"exact": FEW, "sd × 1.03": RARE, "sds 3% off": RARE}, MANY),
    ],
    "mean field": [
        *_cells("mean field", {"best mean field": POWER}, FAST),
        *_cells("mean field", {"exact": FEW}, MANY),
    ],
    "own directions": [
        *_cells("own directions", {"best mean field": POWER, "prior as posterior": FEW}, FAST),
        *_cells("own directions", {"exact": FEW}, MANY),
    ],
    "one pair": [
        *_cells("one pair", {"one correlation ignored": POWER}, FAST),
        *_cells("one pair", {"exact": FEW}, MANY),
    ],
    **{
        name: _cells(name, {"scale × 0.8": POWER, "median + 0.3": POWER, "exact": SOME})
        for name in ("Cauchy", "t, 2 degrees", "LogNormal 1.5")
    },
    "single data": _cells(
        "single data",
        {
            "one of 128: mean + 1 sd": POWER,
            "six of 128: sd × 0.68": POWER,
            "twelve of 128: sd × 0.78": POWER,
            "exact": SOME,
        },
    ),
    "pair, NUTS": _cells("pair, NUTS", {"exact": RARE, "correlation ignored": RARE}),
    "two modes, NUTS": _cells("two modes, NUTS", {"exact": RARE, "missing mode": RARE}),
    "unequal modes, NUTS": [
        *_cells("unequal modes, NUTS", {"exact": RARE}, DECIDED),
        *_cells("unequal modes, NUTS", {"masses 1:1": RARE}),
    ],
    "hierarchy": _cells("hierarchy", dict.fromkeys(Hierarchy.guides, FEW), SHARED),
    "hierarchy, 8 data": _cells("hierarchy, 8 data", dict.fromkeys(Hierarchy.guides, POWER), replace(SHARED, data=8)),
}

PARTS: Mapping[str, list[Cell]] = {
    "two modes": _cells("two modes", {"missing mode": POWER, "exact": FALSE_ALARMS}),
    "pair": _cells("pair", dict.fromkeys(STRONG, HALF) | dict.fromkeys(WEAK, FEW) | {"exact": FALSE_ALARMS}),
    "gsm": _cells("gsm", dict.fromkeys(OF_GSM, FEW) | {"exact": FEW}),
    "ppca": _cells("ppca", dict.fromkeys(OF_PPCA, FEW) | {"exact": FEW}),
    **FOOLED,
    "trained": [cell for program, guides in TRAINED.items() for cell in _cells(program, dict.fromkeys(guides, RARE))],
    "small": _cells("pair", {"sd × 0.9": FEW, "mean + 0.1 sd": FEW, "tails lost": FEW, "exact": SOME}, SMALL)
    + _cells("two modes", {"exact": SOME}, SMALL),
}
