"""Held-out rows of a mix are its parts' rows, each in its own template."""

from __future__ import annotations

import types

from trinityx_jax.config import parse_config
from trinityx_jax.evaluation.held_rows import held_out_pairs, load_held_out

DATA = {
    "helpful": {"format": "alpaca", "source": "samples/helpful-train.jsonl", "test": "samples/helpful-test.jsonl"},
    "honest": {"format": "truthfulqa", "source": "samples/honest-train.csv", "test": "samples/honest-test.csv"},
    "joint": {"mix": ["helpful", "honest"]},
}


def test_a_mix(tiny_tokenizer) -> None:
    data = DATA | {"helpful": DATA["helpful"] | {"template": "alpaca", "test_limit": 3}}
    values = {"model": "m", "out": "o", "data": data, "experts": {"names": ["helpful", "joint"]}}
    config = parse_config(values | {"train": {"seq_len": 200}}, "test")
    found = held_out_pairs(config, "joint", 2)
    assert [(entry.format, len(pairs)) for entry, pairs in found] == [("alpaca", 2), ("truthfulqa", 2)]
    held = load_held_out(config, ["helpful", "joint"], types.SimpleNamespace(tokenizer=tiny_tokenizer))
    honest = len(held.pairs) - 6
    assert held.objective.tolist() == [0] * 3 + [1] * (3 + honest)
    texts = [tiny_tokenizer.decode(row.ids) for row in held.chosen]
    assert texts[:3] == texts[3:6]
    assert [text.startswith("Below is an instruction") for text in texts] == [True] * 6 + [False] * honest
