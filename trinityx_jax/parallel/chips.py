"""Published rates of accelerators, for estimates and for the share of them that a step uses (MFU)."""

from __future__ import annotations

import dataclasses
import resource
import sys
from pathlib import Path
from typing import Any

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

# nvidia.com data sheets, dense; of a GPU that comes with several memories, the flops are the same
GPUS = {
    "B200": Chip("B200", 2250e12, 180 * GIB, 8000e9, 900e9),
    "H200": Chip("H200", 989e12, 141 * GIB, 4800e9, 450e9),
    "H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GIB, 2000e9, 300e9),
    "H100": Chip("H100", 989e12, 80 * GIB, 3350e9, 450e9),
    "A100": Chip("A100", 312e12, 80 * GIB, 2039e9, 300e9),
    "L40S": Chip("L40S", 362e12, 48 * GIB, 864e9, 32e9),
    "L4": Chip("L4", 121e12, 24 * GIB, 300e9, 32e9),
    "A10G": Chip("A10G", 70e12, 24 * GIB, 600e9, 32e9),
}
_TPU_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device; None where its rates are not known."""
    kind = str(device.device_kind)
    if device.platform == "tpu":
        name = _TPU_KINDS.get(kind.removeprefix("TPU").strip())
        return None if name is None else TPUS[name]
    words = kind.replace("-", " ").split()
    return next((chip for name, chip in GPUS.items() if set(name.split()) <= set(words)), None)


def memory_in_use(device: Any) -> int:
    """The most bytes of a device that were in use so far; of a CPU, those of this process."""
    stats = device.memory_stats() or {}
    return int(stats["peak_bytes_in_use"]) if "peak_bytes_in_use" in stats else process_memory()


def process_memory() -> int:
    """The most bytes that this process had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss begins at that of the process which started this one
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
