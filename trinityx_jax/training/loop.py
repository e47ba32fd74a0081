"""Drives steps: resume, log, checkpoint, stop on a signal."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trinityx_jax.data.batching import Batch, TrainingBatches
from trinityx_jax.errors import UserError
from trinityx_jax.files import write_text
from trinityx_jax.progress import progress
from trinityx_jax.training.checkpoint import Checkpoints
from trinityx_jax.training.step import TrainState


class Stopped(Exception):
    """A signal arrived; the state is saved. The command line exits with 75."""


class MetricsLog:
    """``metrics.jsonl``: one flushed line a step; on resume, lines past the restored step go."""

    def __init__(self, path: Path, stage: str, restored: int):
        self.stage = stage
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if self._keep(line, restored)]
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._last = time.monotonic()
        self._file = path.open("a", encoding="utf-8")

    def _keep(self, line: str, restored: int) -> bool:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line being written when the process died
            return False
        return entry["stage"] != self.stage or entry["step"] <= restored

    def write(self, step: int, values: Mapping[str, Any], tokens: int) -> None:
        """Append one line; tokens per second are over the time since the line before."""
        now = time.monotonic()
        speed = round(tokens / (now - self._last), 1)
        self._last = now
        entry = {"stage": self.stage, "step": step, **values, "tokens": tokens, "tokens_per_second": speed}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that a SIGTERM or SIGINT appends to, instead of killing the process mid-step."""
    received: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, lambda n, _: received.append(n))
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_steps(
    state: TrainState,
    step: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Any]],
    batches: TrainingBatches,
    total: int,
    *,
    stage: str,
    metrics_path: Path,
    checkpoints: Checkpoints,
    describe: Callable[[Any], dict[str, float]],
) -> TrainState:
    """Run until step ``total``, from wherever the newest checkpoint stands.

    Args:
        describe: metrics of one step, on the host, as named numbers; must hold ``loss``.

    Raises:
        UserError: the loss is not finite.
        Stopped: a signal asked for it; the state was saved first.
    """
    state = checkpoints.restore(state)
    start = int(state.step)
    log = MetricsLog(metrics_path, stage, start)
    pending: tuple[int, Any, Batch] | None = None
    try:
        with progress(stage, total, start) as bar, stop_on_signals() as signals:
            for index in range(start, total):
                batch = batches[index]
                state, metrics = step(state, batch.arrays())
                if pending is not None:  # one step behind, so the device never waits for the log
                    bar.advance(_record(log, pending, describe, stage))
                pending = (index + 1, metrics, batch)
                if signals or (index + 1) % checkpoints.every == 0 or index + 1 == total:
                    bar.advance(_record(log, pending, describe, stage))
                    pending = None
                    checkpoints.save(state, wait=bool(signals))
                if signals:
                    raise Stopped(f"{stage}: stopped by signal {signals[0]} after step {index + 1}; run again to go on")
    finally:
        log.close()
    return state


def _record(log: MetricsLog, pending: tuple[int, Any, Batch], describe: Callable, stage: str) -> str:
    step, metrics, batch = pending
    values = describe(jax.tree.map(np.asarray, metrics))
    if not math.isfinite(values["loss"]):
        hint = "lower train.learning_rate and choose another --out"
        raise UserError(f"{stage}: the loss is {values['loss']} at step {step}; {hint}")
    log.write(step, values, batch.token_count)
    return f"loss {values['loss']:.3f}"
