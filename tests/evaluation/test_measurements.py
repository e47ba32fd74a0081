"""Measurements of several files in one table: seeds are joined, what does not belong together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trinityx_jax import cli
from trinityx_jax.evaluation.comparison import Columns, comparison
from trinityx_jax.evaluation.measurements import joined, load, save

FACTS = {"rows": "0a", "model": "1b", "objectives": ["kind", "true"]}


def columns(seed: int) -> Columns:
    """Of twelve rows; the tokens are the same for all."""
    rng = np.random.default_rng(seed)
    values = {
        "nll": rng.uniform(5, 20, 24).astype(np.float32).astype(float),
        "tokens": np.arange(3, 27),
        "objective": np.repeat([0, 1], 6),
        "row_pi": rng.dirichlet([1, 1], 12).astype(np.float32),
        "mc1": rng.random(5) < 0.5,
    }
    return Columns(values, {"forward": 1.0 + seed, "memory": 1.0, "bytes": 2**20})


def test_joined_files_are_one_comparison_over_all_seeds(tmp_path: Path, capsys: Any) -> None:
    parts = {"a": {str(s): columns(s) for s in range(3)}, "b": {str(s): columns(9 + s) for s in range(2)}}
    save(tmp_path / "x.npz", {"a": {"0": parts["a"]["0"]}}, FACTS)
    save(tmp_path / "y.npz", {"a": {s: parts["a"][s] for s in "12"}, "b": parts["b"]}, FACTS)
    found, facts = joined([tmp_path / "x.npz", tmp_path / "y.npz"])
    assert facts == FACTS
    expected = {label: list(seeds.values()) for label, seeds in parts.items()}
    assert comparison(found, ["kind", "true"], "a", 50) == comparison(expected, ["kind", "true"], "a", 50)
    again, _ = load(tmp_path / "y.npz")
    assert again["b"]["1"].values["mc1"].dtype == bool
    assert cli.main(["table", str(tmp_path / "x.npz"), str(tmp_path / "y.npz"), "--against", "b"]) == 0
    assert "Log perplexity less that of b" in capsys.readouterr().out


def test_bad_files_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    one = {"a": {"0": columns(0)}}
    save(tmp_path / "x.npz", one, FACTS)
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "empty.npz").write_text("")
    np.savez(tmp_path / "other.npz", key="k")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:600])
    for key, value in {"rows": "0b", "model": "2b", "objectives": ["kind", "good"]}.items():
        save(tmp_path / f"{key}.npz", {"a": {"1": columns(1)}}, FACTS | {key: value})
    cases = {
        "x.npz x.npz": "'a' of seed 0 is in",
        "none.npz": "none.npz: cannot be read (No such file or directory)",
        "x.npz rows.npz": "rows.npz: was measured with other test rows than",
        "x.npz model.npz": "model.npz: was measured with other base model than",
        "x.npz objectives.npz": "objectives.npz: was measured with other objectives than",
        "x.npz --against b": "--against: 'b' is not one of a",
        "x.npz --bootstrap 0": "--bootstrap: 0 is not 1 or more",
        "": "name the measurements.npz",
    } | {
        f"{name}.npz": f"{name}.npz: is not what trinityx compare writes" for name in ("text", "empty", "other", "cut")
    }
    for words, says in cases.items():
        own = [str(tmp_path / word) if word.endswith(".npz") else word for word in words.split()]
        assert cli.main(["table", *own, "--out", str(tmp_path / "out")]) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert not (tmp_path / "out").exists()
