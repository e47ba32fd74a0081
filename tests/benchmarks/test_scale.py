"""``benchmarks/scale.py`` runs, and what it prints grows as it must."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def printed(*words: str) -> list[list[float]]:
    """The numbers of every table row: first of each cell."""
    command = [sys.executable, "benchmarks/scale.py", *words, "--width", "64", "--rank", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| ").split("|") for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    return [[float(re.findall(r"[\d.]+", cell)[0]) for cell in row] for row in rows]


@pytest.mark.slow
def test_memory_falls_with_devices_and_compile_time_is_flat_in_depth() -> None:
    for stage in ("experts", "router"):
        rows = printed("memory", "--stages", stage)
        assert [row[0] for row in rows] == [1, 2, 4, 8]
        assert all(later[3] < 0.75 * before[3] for before, later in itertools.pairwise(rows))
        rows = printed("step", "--stages", stage, "--axes", "layers", "--rounds", "2")
        assert [row[0] for row in rows] == [4, 2, 8, 16, 32]
        assert rows[-1][2] > 6  # operations of 32 layers beside those of 4
        assert rows[-1][3] < 1.5 * rows[1][3]  # seconds to compile 32 layers and 2
