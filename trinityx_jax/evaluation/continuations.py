"""Rows that begin alike, such as answers to choose from: what they share is run once, and their ends are packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from trinityx_jax.data.batching import Batch, bucket, filled, make_batch
from trinityx_jax.data.templates import Encoded


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """All but the last token of a prompt, which predicts each answer's first; the answers; the rows that have them."""

    stem: np.ndarray
    answers: list[Encoded]
    rows: list[list[int]]

    @property
    def tokens(self) -> int:
        """What its answers have together."""
        return sum(len(answer.ids) for answer in self.answers)


def batches(rows: Sequence[Encoded], size: int) -> tuple[np.ndarray, np.ndarray, list[tuple[Batch, Batch]]]:
    """What all rows begin with, then up to ``size`` prompts a batch, each with its answers packed after it.

    Returns:
        the tokens [P] that all share; where each of ``rows`` stands among the batches' results, one after another;
        batches (the rest of the prompts, the answers: their mask numbers them).
    """
    prompts = sorted(_prompts(rows), key=lambda prompt: prompt.tokens)
    shared = _alike([prompt.stem for prompt in prompts])
    length = bucket(max(len(prompt.stem) for prompt in prompts) - shared)
    chunks = [prompts[at : at + size] for at in range(0, len(prompts), size)]
    most = max(sum(len(prompt.answers) for prompt in chunk) for chunk in chunks)
    place, out = np.zeros(len(rows), int), []
    for index, chunk in enumerate(chunks):
        for number, same in enumerate(same for prompt in chunk for same in prompt.rows):
            place[same] = index * most + number
        blank = size - len(chunk)  # the last is filled up
        stems = [Encoded(prompt.stem[shared:], len(prompt.stem) - shared) for prompt in chunk]
        numbers = iter(range(1, most + 1))
        slots = [[(next(numbers), answer) for answer in prompt.answers] for prompt in chunk] + [[]] * blank
        answers = filled(slots, [0] * most, 0, bucket(chunk[-1].tokens))
        out.append((make_batch([*stems, *([None] * blank)], [0] * size, 0, length), answers))
    return rows[0].ids[:shared], place, out


def _prompts(rows: Sequence[Encoded]) -> list[_Prompt]:
    """Each prompt once, with each of its answers once."""
    places: dict[bytes, dict[bytes, list[int]]] = {}
    for i, row in enumerate(rows):
        prompt, answer = row.ids[: row.prompt_length], row.ids[row.prompt_length :]
        places.setdefault(prompt.tobytes(), {}).setdefault(answer.tobytes(), []).append(i)
    out = []
    for own in (list(answers.values()) for answers in places.values()):
        first = rows[own[0][0]]
        end = first.prompt_length - 1
        out.append(_Prompt(first.ids[:end], [Encoded(rows[i].ids[end:], 1) for i, *_ in own], own))
    return out


def _alike(rows: Sequence[np.ndarray]) -> int:
    """Of how many tokens the beginning is the same in all rows."""
    size = min(map(len, rows))
    same = np.all(np.stack([row[:size] for row in rows]) == rows[0][:size], axis=0)
    return size if same.all() else int(np.argmin(same))
