"""What a comparison measured, in one file: row by row, so that others' of the same rows can be put beside it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trinityx_jax.errors import UserError
from trinityx_jax.evaluation.comparison import Columns

BySeed = Mapping[str, Columns]
KINDS = {"rows": "test rows", "model": "base model", "objectives": "objectives"}  # what must be the same


def save(path: Path, systems: Mapping[str, BySeed], facts: Mapping[str, Any]) -> None:
    """Write every system's columns, by seed; ``facts`` say what they are of (the keys of ``KINDS``)."""
    order = [(label, seed) for label, seeds in systems.items() for seed in seeds]
    costs = [systems[label][seed].cost for label, seed in order]
    arrays: dict[str, Any] = {
        f"{place}/{name}": values
        for place, (label, seed) in enumerate(order)
        for name, values in systems[label][seed].values.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".partial.npz")
    np.savez_compressed(staging, about=json.dumps({"facts": facts, "order": order, "costs": costs}), **arrays)
    staging.replace(path)


def load(path: Path) -> tuple[dict[str, dict[str, Columns]], dict[str, Any]]:
    """The systems by label and seed, and the facts.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            about = json.loads(str(data["about"]))
            found: dict[str, dict[str, Columns]] = {}
            for place, (label, seed) in enumerate(about["order"]):
                start = f"{place}/"
                values = {name.removeprefix(start): data[name] for name in data.files if name.startswith(start)}
                found.setdefault(label, {})[seed] = Columns(values, about["costs"][place])
            return found, dict(about["facts"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is not what trinityx compare writes as measurements.npz") from error


def joined(paths: Sequence[Path]) -> tuple[dict[str, list[Columns]], dict[str, Any]]:
    """All files' systems, each with the seeds of every file; what the files have in common.

    Raises:
        UserError: a file cannot be read, was measured on something else than the first, or repeats a seed.
    """
    systems: dict[str, dict[str, Columns]] = {}
    origin: dict[tuple[str, str], Path] = {}
    first: dict[str, Any] | None = None
    for path in paths:
        found, facts = load(path)
        first = first or facts
        for key, what in KINDS.items():
            if facts[key] != first[key]:
                raise UserError(f"{path}: was measured with other {what} than {paths[0]}")
        for label, seeds in found.items():
            for seed, columns in seeds.items():
                if (other := origin.setdefault((label, seed), path)) is not path:
                    raise UserError(f"{path}: {label!r} of seed {seed} is in {other} too")
                systems.setdefault(label, {})[seed] = columns
    return {label: list(seeds.values()) for label, seeds in systems.items()}, first or {}
