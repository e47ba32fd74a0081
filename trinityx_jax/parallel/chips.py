"""Published rates of accelerators, for estimates and for the share of them that a step uses (MFU)."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: dense bfloat16 FLOP/s, main memory in bytes, its bytes/s, and the bytes/s that all links send."""

    name: str
    flops: float
    memory: int
    bandwidth: float
    links: float


# cloud.google.com/tpu/docs: v5e, v5p, v6e; of links both directions are given there, one of them here
TPUS = {
    "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1640e9, 400e9),
}
