"""Where rows come from: shipped samples, a local file, or a hub data set."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from trinityx_jax.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv")


def load_rows(source: str, split: str = "train") -> list[tuple[str, Row]]:
    """(place, row) pairs; the place names file and line, or data set and index, for error messages.

    Args:
        source: a ``.json``, ``.jsonl`` or ``.csv`` file, ``samples/NAME`` for a shipped file, or a
            hub data set id (``owner/name`` or ``owner/name:config``).
        split: of a hub data set; a file is one split.

    Raises:
        UserError: nothing is there, it cannot be parsed, or it is empty.
    """
    path = Path(source)
    if not path.exists() and source.startswith("samples/"):
        path = Path(str(resources.files("trinityx_jax").joinpath("data", source)))
    if path.suffix in SUFFIXES:
        rows = list(_read_file(path))
    elif path.exists():
        raise UserError(f"{source}: not a data file (expected {', '.join(SUFFIXES)}, or a hub id)")
    else:
        rows = _load_hub(source, split)
    if not rows:
        raise UserError(f"{source}: the data set is empty")
    return rows


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some published files begin with a byte-order mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{number}: not UTF-8") from None
    if path.suffix == ".csv":
        yield from _read_csv(path, text)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _mapping(_parse(line, f"{path}:{number}"), f"{path}:{number}")
    else:
        value = _parse(text, str(path)) if text.strip() else []
        if not isinstance(value, list):
            raise UserError(f"{path}: expected a JSON list of rows, found {type(value).__name__}")
        for index, item in enumerate(value):
            yield f"{path}[{index}]", _mapping(item, f"{path}[{index}]")


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: the row has not as many columns as the header")
            yield place, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" at line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{place}: not JSON{line} ({error.msg})") from None


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, found {type(row).__name__}")
    return row


def _load_hub(source: str, split: str) -> list[tuple[str, Row]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises many kinds; each means the rows cannot be had
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source}: no such file here, and the hub did not give it ({first})") from error
    return [(f"{source}/{split}[{index}]", dict(row)) for index, row in enumerate(loaded)]
