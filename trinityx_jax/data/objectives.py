"""Rows of the published schemas to (prompt, response) examples and preference pairs."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from trinityx_jax.data.sources import Row, load_rows
from trinityx_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Example:
    """One completion to learn. ``input`` is Alpaca's second field, empty elsewhere."""

    instruction: str
    response: str
    place: str
    input: str = ""

    @property
    def prompt(self) -> str:
        """The user's message: the instruction, then the input below it."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    @property
    def question(self) -> str:
        """The normalised prompt, by which splits are kept apart."""
        return re.sub(r"[^0-9a-z]+", " ", self.prompt.lower()).strip()


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt with an answer to prefer and one to reject."""

    chosen: Example
    rejected: Example


Rows = Sequence[tuple[str, Row]]


@dataclasses.dataclass(frozen=True)
class Format:
    """How a schema is read: what is learned, what is compared, and a line that says what the pair is."""

    examples: Callable[[Rows], list[Example]]
    pairs: Callable[[Rows], list[Pair]]
    pair_kind: str


def load_examples(
    source: str, format_name: str, split: str = "train", limit: int | None = None, skip_bad: bool = False
) -> list[Example]:
    """The rows to learn from.

    Args:
        skip_bad: leave out rows that lack a field, and count them in a warning, instead of raising.

    Raises:
        UserError: a row lacks a field, or nothing is left.
    """
    examples = get_format(format_name).examples(_rows(source, format_name, split, skip_bad))
    if not examples:
        raise UserError(f"{source}: no row can be learned from as {format_name!r}")
    return examples[:limit]


def load_pairs(
    source: str, format_name: str, split: str = "test", limit: int | None = None, skip_bad: bool = False
) -> list[Pair]:
    """The held-out prompts, each with an answer to prefer and one to reject, one pair a question.

    Arguments and errors are those of ``load_examples``.
    """
    pairs = get_format(format_name).pairs(_rows(source, format_name, split, skip_bad))
    if not pairs:
        raise UserError(f"{source}: no preference pair can be made of it as {format_name!r}")
    return pairs[:limit]


def _rows(source: str, format_name: str, split: str, skip_bad: bool) -> Rows:
    rows = load_rows(source, split)
    if not skip_bad:
        return rows
    kind, good, last = get_format(format_name), [], ""
    for row in rows:
        try:
            kind.examples([row])
            kind.pairs([row])
            good.append(row)
        except UserError as error:
            last = str(error)
    if len(good) < len(rows):
        log.warning("%s: %d of %d rows are skipped; the last: %s", source, len(rows) - len(good), len(rows), last)
    return good


def get_format(name: str) -> Format:
    """A schema by name.

    Raises:
        UserError: there is no such schema.
    """
    if name not in FORMATS:
        raise UserError(f"data format {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]


def text(row: Row, field: str, place: str, may_be_empty: bool = False) -> str:
    """A row's field as stripped text.

    Raises:
        UserError: the field is missing, not text, or empty.
    """
    if field not in row:
        raise UserError(f"{place}: the row has no field {field!r} (it has {', '.join(map(str, row))})")
    value: Any = row[field]
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} is {type(value).__name__}, not text")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{place}: field {field!r} is empty")
    return value.strip()


def _alpaca(rows: Rows) -> list[Example]:
    return [
        Example(text(r, "instruction", p), text(r, "output", p), p, text(r, "input", p, may_be_empty=True))
        for p, r in rows
    ]


def _alpaca_pairs(rows: Rows) -> list[Pair]:
    """The schema has no rejected answer: the next row's answer stands in, so this measures relevance."""
    examples = _alpaca(rows)
    if len(examples) < 2:
        return []
    others = [*examples[1:], examples[0]]
    return [
        Pair(e, dataclasses.replace(e, response=o.response))
        for e, o in zip(examples, others, strict=True)
        if o.response != e.response
    ]


def _is_safe(row: Row, place: str) -> bool:
    if "is_safe" not in row:
        raise UserError(f"{place}: the row has no field 'is_safe' (it has {', '.join(map(str, row))})")
    if not isinstance(row["is_safe"], bool):
        raise UserError(f"{place}: field 'is_safe' is {row['is_safe']!r}, not true or false")
    return row["is_safe"]


def _beavertails_split(rows: Rows) -> tuple[list[Example], list[Example]]:
    """Safe and unsafe examples, from (prompt, response, is_safe) or (prompt, safe, unsafe) rows."""
    safe, unsafe = [], []
    for place, row in rows:
        prompt = text(row, "prompt", place)
        if "safe" in row and "unsafe" in row:
            safe.append(Example(prompt, text(row, "safe", place), place))
            unsafe.append(Example(prompt, text(row, "unsafe", place), place))
        else:
            kept = safe if _is_safe(row, place) else unsafe
            kept.append(Example(prompt, text(row, "response", place), place))
    return safe, unsafe


def _beavertails(rows: Rows) -> list[Example]:
    return _beavertails_split(rows)[0]  # safe rows only (METHOD 5)


def _beavertails_pairs(rows: Rows) -> list[Pair]:
    safe, unsafe = _beavertails_split(rows)
    rejected: dict[str, Example] = {}
    for example in unsafe:
        rejected.setdefault(example.question, example)
    chosen: dict[str, Example] = {}
    for example in safe:
        chosen.setdefault(example.question, example)
    return [Pair(e, rejected[q]) for q, e in chosen.items() if q in rejected]


def _answers(row: Row, field: str, place: str) -> list[str]:
    found = [part.strip() for part in text(row, field, place).split(";")]
    return [part for part in found if part]


def _truthfulqa(rows: Rows) -> list[Example]:
    return [
        Example(text(row, "Question", place), answer, place)
        for place, row in rows
        for answer in _answers(row, "Correct Answers", place)
    ]


def _truthfulqa_pairs(rows: Rows) -> list[Pair]:
    pairs = []
    for place, row in rows:
        question = text(row, "Question", place)
        best = Example(question, text(row, "Best Answer", place), place)
        wrong = _answers(row, "Incorrect Answers", place)
        if not wrong:
            raise UserError(f"{place}: field 'Incorrect Answers' holds no answer")
        pairs.append(Pair(best, Example(question, wrong[0], place)))
    return pairs


FORMATS: dict[str, Format] = {
    "alpaca": Format(_alpaca, _alpaca_pairs, "the row's own answer against another row's"),
    "beavertails": Format(_beavertails, _beavertails_pairs, "the safe answer against the unsafe one"),
    "truthfulqa": Format(_truthfulqa, _truthfulqa_pairs, "the best answer against the first incorrect one"),
}
