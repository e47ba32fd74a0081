"""Stage 1 as a whole: experts together and alone, stopping early, training anew, steps that are not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinityx_jax import cli
from trinityx_jax.backbone import Backbone
from trinityx_jax.config import RunConfig, parse_config
from trinityx_jax.convert.load import load_backbone
from trinityx_jax.errors import UserError
from trinityx_jax.experts import TaskVector, init_expert
from trinityx_jax.runs import RunFolder, load_experts
from trinityx_jax.training import expert_stage
from trinityx_jax.training.expert_stage import pending, train_experts

NAMES = ("helpful", "harmless", "honest")
FORMATS = {
    "helpful": ("alpaca", "jsonl", 30),
    "harmless": ("beavertails", "jsonl", 18),
    "honest": ("truthfulqa", "csv", 44),
}


TWO = ("helpful", "honest")  # as good as three where programs are compiled for every set of experts


def configure(model: Path, out: Path, names: tuple[str, ...] = NAMES, **changes: dict[str, Any]) -> RunConfig:
    """Experts whose data sets, and so whose step counts, differ."""
    data = {
        name: {"source": f"samples/{name}-train.{end}", "format": kind, "limit": limit, "validation": 0.2}
        for name, (kind, end, limit) in FORMATS.items()
        if name in names
    }
    values: dict[str, Any] = {
        "model": str(model),
        "out": str(out),
        "data": data,
        "experts": {"names": list(names), "rank": 3, "alpha": 6, "dropout": 0.2},
        "train": {"epochs": 1, "batch_size": 4, "seq_len": 32, "learning_rate": 5e-3},
        "checkpoint": {"every": 3},
        "evaluate": {"batch_size": 4},
    }
    for section, own in changes.items():
        values[section] = {**values[section], **own}
    return parse_config(values, "test")


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(str(tiny_model))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def far(found: TaskVector, expected: TaskVector) -> float:
    """The largest difference of a leaf, as a share of its range."""
    shares = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))), found, expected)
    return max(jax.tree.leaves(shares))


@pytest.mark.parametrize(
    "train", [{}, {"packing": True, "accumulate": 2, "evaluate_every": 2, "patience": 1, "seq_len": 128}]
)
def test_experts_trained_together_are_the_experts_trained_alone(
    backbone: Backbone, tiny_model: Path, tmp_path: Path, train: dict[str, Any]
) -> None:
    together = train_experts(configure(tiny_model, tmp_path / "joint", TWO, train=train), backbone)
    single = configure(tiny_model, tmp_path / "single", TWO, train={**train, "mode": "single"})
    alone = train_experts(single, backbone)
    fresh = {name: init_expert(backbone.config, 3, 6.0, ("gate", "up", "down"), 0, name) for name in TWO}
    found = lines(tmp_path / "joint")
    counts = {n: sum(f"loss/{n}" in line for line in found) for n in TWO}
    if "patience" not in train:
        assert len(set(counts.values())) == 2  # they end one after another
    for name in TWO:
        assert counts[name] == sum(f"loss/{name}" in line for line in lines(tmp_path / "single"))
        assert far(together[name], alone[name]) <= 1e-5
        assert far(fresh[name], together[name]) > 1e-2


def test_early_stopping_keeps_the_best_of_each_expert(backbone: Backbone, tiny_model: Path, tmp_path: Path) -> None:
    train = {"steps": 24, "evaluate_every": 2, "patience": 2, "learning_rate": 0.1}
    config = configure(tiny_model, tmp_path / "run", TWO, train=train)
    kept = train_experts(config, backbone)
    found = lines(tmp_path / "run")
    for name in TWO:
        series = {line["step"]: line[f"validation/{name}"] for line in found if f"validation/{name}" in line}
        best = min(series, key=lambda step: series[step])
        last = max(line["step"] for line in found if f"loss/{name}" in line)
        assert last == max(series) == min(best + 4, 24)  # two measurements without a new lowest
        until = {**train, "steps": 24, "patience": None}
        if best < 24:  # the leaves of that step, which a run without early stopping passes through
            group = expert_stage._Group(
                configure(tiny_model, tmp_path / "x", TWO, train=until), backbone, rows_of(config, backbone), [name]
            )
            state = group.start()
            for step, batch in enumerate(group.serve(0, best, (name,))):
                assert int(state.step) == step
                state, _ = group.step(state, batch.arrays(), (name,))
            assert far(kept[name], group.vectors(state)[name]) <= 1e-5
    assert len({max(line["step"] for line in found if f"loss/{name}" in line) for name in TWO}) > 1


def rows_of(config: RunConfig, backbone: Backbone) -> Any:
    return expert_stage.load_training_rows(config, backbone)


def test_an_expert_can_be_trained_anew_and_the_others_stay(
    backbone: Backbone, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    first = configure(tiny_model, out)
    before = train_experts(first, backbone)
    assert pending(first) == []
    assert pending(configure(tiny_model, out, train={"mode": "single"})) == []  # how is not what
    files = {p: p.read_bytes() for p in (out / "experts").rglob("*") if p.is_file()}
    changed = configure(tiny_model, out, data={"honest": {**first.model_dump()["data"]["honest"], "limit": 20}})
    with pytest.raises(UserError, match=r"'honest' was begun with other settings \(data\).*--train.experts \[honest\]"):
        pending(changed)
    anew = changed.model_copy(update={"train": changed.train.model_copy(update={"experts": ["honest"]})})
    assert pending(anew) == ["honest"]
    after = train_experts(anew, backbone)
    assert list(after) == ["honest"]
    assert far(after["honest"], before["honest"]) > 1e-2
    for path, content in files.items():
        assert (path.read_bytes() == content) == ("honest" not in path.parts)
    assert RunFolder(out).done("experts")["names"] == list(NAMES)
    assert pending(anew) == pending(changed) == []
    alone = train_experts(configure(tiny_model, tmp_path / "alone", data=changed.model_dump()["data"]), backbone)
    assert far(after["honest"], alone["honest"]) <= 1e-5


def test_a_changed_file_is_seen_and_a_fourth_expert_joins(backbone: Backbone, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(12)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    extra = {"blunt": {"source": str(path), "format": "alpaca"}}
    values = configure(tiny_model, tmp_path / "run", train={"steps": 2}).model_dump(by_alias=True)
    train_experts(parse_config(values, "test"), backbone)
    values["data"] |= extra
    values["experts"]["names"] = [*NAMES, "blunt"]
    four = parse_config(values, "test")
    assert list(train_experts(four, backbone)) == ["blunt"]
    assert list(load_experts(tmp_path / "run")) == [*NAMES, "blunt"]
    path.write_text(json.dumps(rows[:10]))
    with pytest.raises(UserError, match=r"'blunt' was begun with other settings \(files\)"):
        pending(four)


def test_a_router_of_an_expert_that_is_trained_anew_is_trained_anew(
    capsys: Any, tiny_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    flags = ["--out", str(out), "--train.experts", "[honest]", "--train.steps", "2"]
    assert cli.main(["train-experts", str(tiny_config), *flags]) == 0
    assert RunFolder(out).done("router") is None
    assert cli.main(["generate", str(out), "--prompt", "x"]) == 2
    assert "has no router yet" in capsys.readouterr().err
    assert cli.main(["train-router", str(tiny_config.with_name("router.yaml")), "--out", str(out)]) == 0
    assert RunFolder(out).done("router") is not None


def test_steps_that_are_not_finite_change_nothing_and_many_stop_with_their_rows(
    backbone: Backbone, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base whose logits overflow for one token breaks the steps that hold it, and no others."""
    config = configure(tiny_model, tmp_path / "run", train={"steps": 4, "max_skipped": 2})
    rows = expert_stage.load_training_rows(config, backbone)
    poisoned = backbone.tokenizer.vocab_size - 1
    used = {int(t) for part in rows.train.values() for row in part for t in row.ids}
    assert poisoned not in used
    params = {
        **backbone.params,
        "embed": {"embedding": backbone.params["embed"]["embedding"].at[poisoned].set(jnp.nan)},
    }
    if "lm_head" in params:  # an input that is not finite, not an output for every row
        pass
    broken = Backbone(backbone.config, params, backbone.tokenizer, backbone.fingerprint)
    for row in rows.train["honest"]:
        row.ids[0] = poisoned
    group = expert_stage._Group(config, broken, rows, list(NAMES))
    with pytest.raises(UserError, match=r"2 steps in a row .* step 2 with the rows samples/honest-train.csv:\d+"):
        group.train(RunFolder(tmp_path / "run"))
    state = group.start()
    begun = jax.tree.map(np.asarray, state.params)
    for batch in group.serve(0, 2, NAMES):
        state, metrics = group.step(state, batch.arrays(), NAMES)
    assert metrics["streak"].tolist() == state.skipped.tolist() == [0, 0, 2]
    for site in begun:
        for leaf in ("a", "b"):
            moved = np.any(np.asarray(state.params[site][leaf]) != begun[site][leaf], axis=(0, 2, 3))
            assert moved.tolist() == [True, True, False] if leaf == "b" else not moved[2]
