"""Splitting rows by question, so that no question stands on both sides."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from trinityx_jax.data.formats import Example


def split_by_question(examples: Sequence[Example], shares: Sequence[float], seed: int = 0) -> list[list[Example]]:
    """[kept, held out, held out, ...]: of the questions, about each share is held out, chosen by their hash.

    Of few questions a share is at least one, where that leaves one to keep.
    """
    questions = sorted({e.question for e in examples}, key=lambda q: (zlib.crc32(f"{seed}/{q}".encode()), q))
    part: dict[str, int] = {}
    begin = 0
    sizes = [max(1, round(share * len(questions))) if share else 0 for share in shares]
    if sum(sizes) >= len(questions):
        sizes = [round(share * len(questions)) for share in shares]
    for index, size in enumerate(sizes, 1):
        end = min(len(questions), begin + size)
        part |= dict.fromkeys(questions[begin:end], index)
        begin = end
    out: list[list[Example]] = [[] for _ in range(len(shares) + 1)]
    for example in examples:
        out[part.get(example.question, 0)].append(example)
    return out


def overlap(train: Sequence[Example], test: Sequence[Example]) -> set[str]:
    """Normalised prompts that stand in both."""
    return {e.question for e in train} & {e.question for e in test}
