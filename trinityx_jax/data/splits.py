"""Splitting rows by question, so that no question stands on both sides."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from trinityx_jax.data.objectives import Example


def split_by_question(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(kept, held out): about ``share`` of the questions are held out, chosen by their hash."""
    questions = sorted({e.question for e in examples}, key=lambda q: zlib.crc32(f"{seed}/{q}".encode()))
    held = set(questions[: round(share * len(questions))])
    return [e for e in examples if e.question not in held], [e for e in examples if e.question in held]


def overlap(train: Sequence[Example], test: Sequence[Example]) -> set[str]:
    """Normalised prompts that stand in both."""
    return {e.question for e in train} & {e.question for e in test}
