"""Arrays kept in a file under a digest of what they were made of, so that others are never taken for them."""

from __future__ import annotations

import io
import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from trinityx_jax.files import write_bytes

log = logging.getLogger(__name__)
# What numpy raises on an archive that is cut or changed (RuntimeError: zipfile, of flags such as that of a password).
DAMAGED = (ValueError, LookupError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def load(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """What was saved under this digest; None where nothing was, or it is damaged and has to be made again."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            if str(data["key"]) != key:
                return None
            return {name: data[name] for name in data.files if name != "key"}
    except DAMAGED:
        log.warning("%s: is damaged; what it held is computed again", path)
        return None


def save(path: Path, key: str, **values: Any) -> None:
    """Write arrays under the digest of what they were made of; the file is whole or not there."""
    out = io.BytesIO()
    np.savez(out, key=key, **values)
    write_bytes(path, out.getvalue())
