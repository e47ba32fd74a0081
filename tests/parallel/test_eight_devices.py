"""The tests of ``eight/``, in a process that has eight virtual devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_on_eight_virtual_devices(request: pytest.FixtureRequest) -> None:
    words = ["-p", "no:xdist", "-x", str(HERE / "eight"), *(["--slow"] * request.config.getoption("--slow"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=HERE.parents[1], text=True, capture_output=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
