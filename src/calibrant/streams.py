"""Named random streams: one seed of the user's gives every purpose a seed of its own.

Offsets such as `seed + 1` would make parts of neighbouring seeds the same: repetitions with the seeds 0, 1, 2 would
share draws. A name has no neighbours.
"""

from __future__ import annotations

import hashlib
import json


def stream(seed: int, *names: str | int) -> int:
    """The seed of one purpose, below 2⁶³: that many bits of the SHA-256 digest of `seed` and `names`.

    It is the same on every machine. Different seeds or names give different streams: two of them are equal by chance
    alone. `torch.manual_seed`, `torch.Generator.manual_seed` and `numpy.random.default_rng` take it; torch's generator
    on the CPU keeps its lower 32 bits, so that of 1,000 streams two share their draws with a probability of 1 in 8,600.

    Args:
        seed: the user's seed, or a stream, which is divided further.
        names: what the draws are for: first the function that takes them, then the part.
    """
    digest = hashlib.sha256(json.dumps([int(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
