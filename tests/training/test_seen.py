"""Questions that both train and test, or train and calibrate, are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trinityx_jax.config import load_config
from trinityx_jax.training.rows import load_parts
from trinityx_jax.training.seen import warn_of_calibration, warn_of_test

NAMES = ("helpful", "harmless", "honest")


def _config(tiny_config: Path, tiny_run: Path, *flags: str) -> Any:
    given = flags if "--experts.from" in flags else ("--experts.from", str(tiny_run), *flags)
    return load_config(tiny_config.with_name("router.yaml"), given, "router")


@pytest.mark.parametrize(
    ("flags", "trained_on"),
    [
        ((), False),
        (("--seed", "1"), True),
        (("--data.honest.calibration", "0.4"), True),
        (("--data.honest.calibration", "0.1"), False),
        (("--train.steps", "2"), False),
    ],
)
def test_calibration_rows_that_an_expert_was_trained_on(
    tiny_config: Path, tiny_run: Path, caplog: pytest.LogCaptureFixture, flags: tuple[str, ...], trained_on: bool
) -> None:
    config = _config(tiny_config, tiny_run, *flags)
    learned = load_parts(load_config(tiny_run / "config-experts.yaml"))["honest"].train
    held = load_parts(config)["honest"].calibration
    assert bool({e.question for e in learned} & {e.question for e in held}) == trained_on
    caplog.clear()
    warn_of_calibration(config)
    said = [record.getMessage() for record in caplog.records]
    assert any("data.honest" in line and "expert 'honest' was trained on some" in line for line in said) == trained_on
    caplog.clear()
    folders = {name: str(tiny_run / "experts" / name) for name in NAMES}
    warn_of_calibration(_config(tiny_config, tiny_run, *flags, "--experts.from", json.dumps(folders)))
    assert [record.getMessage() for record in caplog.records] == said


def test_test_questions_that_were_trained_on(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_config(tiny_run / "config-experts.yaml")
    part = load_parts(run)["helpful"]
    asked = [part.train[0].question, part.calibration[0].question, *sorted(part.tests)]
    rows = tmp_path / "rows.jsonl"  # the router's own; what is asked stands in the experts' alone
    rows.write_text(
        "\n".join(json.dumps({"instruction": f"Say {i}.", "input": "", "output": "So."}) for i in range(40))
    )
    flags = [part for n in NAMES for part in (f"--data.{n}.source", str(rows), f"--data.{n}.format", "alpaca")]
    tested = [p for n in NAMES for p in (f"--data.{n}.test_format", run.data[n].format or "")]
    caplog.clear()
    warn_of_test(_config(tiny_config, tiny_run, *flags, *tested), {"questions": asked, "others": ["say nothing"]})
    (record,) = caplog.records
    assert record.getMessage() == f"2 of {len(asked)} questions also stand in training rows"
    caplog.clear()
    warn_of_test(_config(tiny_config, tiny_run, "--data.honest.source", "gone.csv"), {"questions": asked})
    assert "is not known: gone.csv" in caplog.records[0].getMessage()
    assert "2 of" in caplog.records[1].getMessage()
