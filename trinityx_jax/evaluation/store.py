"""Arrays kept in a file under a digest of what they were made of, so that others are never taken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def load(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """What was saved under this digest; None where nothing was."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as data:
        if str(data["key"]) != key:
            return None
        return {name: data[name] for name in data.files if name != "key"}


def save(path: Path, key: str, **values: Any) -> None:
    """Write arrays under the digest of what they were made of; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".partial.npz")
    np.savez(staging, key=key, **values)
    staging.replace(path)
