"""Drives steps: resume, log, checkpoint, stop on a signal."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np
from jax.sharding import Mesh

from trinityx_jax.data.batching import Batch, Split
from trinityx_jax.errors import UserError
from trinityx_jax.files import write_text
from trinityx_jax.parallel.multihost import is_first, stop_is_agreed
from trinityx_jax.parallel.sharding import on_mesh, put_batch
from trinityx_jax.progress import Progress, progress
from trinityx_jax.training.checkpoint import Checkpoints
from trinityx_jax.training.state import TrainState


class Stopped(Exception):
    """A signal arrived; the state is saved. The command line exits with 75."""


class MetricsLog:
    """``metrics.jsonl``: one flushed line a step, by the first host; on resume, lines past the restored step go."""

    def __init__(self, path: Path, stage: str, restored: int, names: Iterable[str]):
        self.stage, self.names = stage, set(names)
        self._last = time.monotonic()
        self._file: TextIO | None = None
        if not is_first():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_bytes().decode("utf-8", "replace").splitlines()
            kept = [line for line in lines if self._keep(line, restored)]
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def _keep(self, line: str, restored: int) -> bool:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line being written when the process died
            return False
        if not isinstance(entry, dict):
            return False
        others = {key.removeprefix("loss/") for key in entry if key.startswith("loss/")} - self.names
        return entry.get("stage") != self.stage or entry.get("step", 0) <= restored or bool(others)

    def write(self, step: int, values: Mapping[str, Any], tokens: int) -> None:
        """Append one line; tokens per second are over the time since the line before."""
        now = time.monotonic()
        speed = round(tokens / (now - self._last), 1)
        self._last = now
        entry = {"stage": self.stage, "step": step, **values, "tokens": tokens, "tokens_per_second": speed}
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done meanwhile does not count as a step's time."""
        began = time.monotonic()
        yield
        self._last += time.monotonic() - began

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that a SIGTERM or SIGINT appends to, instead of killing the process mid-step."""
    received: list[int] = []
    previous = {}
    # of several hosts each hears of any one's SIGTERM from the others (multihost.stop_is_agreed)
    numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    try:
        for number in numbers:
            previous[number] = signal.signal(number, lambda n, _: received.append(n))
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Work(Protocol):
    """What a stage does in a step."""

    @property
    def names(self) -> Sequence[str]:
        """The objectives it has, served or not."""

    def active(self, state: TrainState) -> tuple[str, ...]:
        """The objectives that are served from this state on; none ends the stage."""

    def until(self, step: int) -> int:
        """The next step after which ``validate`` is asked, or who is active may change."""

    def serve(self, start: int, stop: int, names: tuple[str, ...]) -> Iterator[Batch]:
        """The batches of those steps."""

    def step(self, state: TrainState, batch: Mapping[str, Any], names: tuple[str, ...]) -> tuple[TrainState, Any]:
        """One compiled update, and its metrics: ``streak`` [E] or [] among them."""

    def describe(self, metrics: Any, names: tuple[str, ...]) -> dict[str, float]:
        """Metrics of one step, on the host, as named numbers; must hold ``loss``."""

    def validate(self, state: TrainState, names: tuple[str, ...]) -> tuple[TrainState, dict[str, float]]:
        """What is measured between steps, if anything, and the state after it."""

    def places(self, step: int, bad: np.ndarray, names: tuple[str, ...]) -> list[str]:
        """Where the rows stand that a step had of the objectives marked ``bad``."""


def run_steps(
    state: TrainState,
    work: Work,
    total: int,
    *,
    stage: str,
    metrics_path: Path,
    checkpoints: Checkpoints,
    max_skipped: int,
    mesh: Mesh,
    split: Split,
) -> TrainState:
    """Run until step ``total``, or until nothing is active, from wherever the newest checkpoint stands.

    Raises:
        UserError: ``max_skipped`` steps in a row had a loss or gradient that is not finite.
        Stopped: a signal asked for it; the state was saved first.
    """
    state = checkpoints.restore(state)
    index = int(state.step)
    recorder = _Recorder(MetricsLog(metrics_path, stage, index, work.names), work, stage, max_skipped)
    try:
        with progress(stage, total, index, quiet=not is_first()) as bar, stop_on_signals() as signals, on_mesh(mesh):
            while index < total and (names := work.active(state)):
                stop = min(work.until(index), total)
                for batch, arrays in _placed_ahead(work.serve(index, stop, names), mesh, split):
                    state, metrics = work.step(state, arrays, names)
                    index += 1
                    recorder.flush(bar)  # one step behind, so the device never waits for the log
                    recorder.pending = (index, metrics, batch, names)
                    values: dict[str, float] = {}
                    if index == stop:
                        jax.block_until_ready(metrics)
                        with recorder.log.pause():
                            state, values = work.validate(state, names)
                    stopping = stop_is_agreed(index, bool(signals))  # once: what comes later is for the next step
                    saving = stopping or index % checkpoints.every == 0 or index == total
                    if saving or values:
                        recorder.flush(bar, values)
                    if saving:
                        checkpoints.save(state, wait=stopping)
                    if stopping:
                        by = f"signal {signals[0]}" if signals else "a signal"
                        raise Stopped(f"{stage}: stopped by {by} after step {index}; run again to go on")
            recorder.flush(bar)
            checkpoints.save(state)  # early stopping ends between checkpoints
    finally:
        recorder.log.close()
    return state


def _placed_ahead(batches: Iterator[Batch], mesh: Mesh, split: Split) -> Iterator[tuple[Batch, dict[str, jax.Array]]]:
    """Each batch with its arrays on the devices, which the next one's are on their way to meanwhile."""
    before = None
    for batch in batches:
        after = (batch, put_batch(batch.arrays(), mesh, split))
        if before is not None:
            yield before
        before = after
    if before is not None:
        yield before


class _Recorder:
    """Writes the step before the one that runs."""

    def __init__(self, log: MetricsLog, work: Work, stage: str, max_skipped: int):
        self.log, self.work, self.stage, self.max_skipped = log, work, stage, max_skipped
        self.pending: tuple[int, Any, Batch, tuple[str, ...]] | None = None

    def flush(self, bar: Progress, values: Mapping[str, float] | None = None) -> None:
        """Log the pending step, if there is one, with what was measured after it."""
        if self.pending is None:
            return
        step, metrics, batch, names = self.pending
        self.pending = None
        metrics = jax.device_get(metrics)
        found = {**self.work.describe(metrics, names), **(values or {})}
        self.log.write(step, {k: v if math.isfinite(v) else None for k, v in found.items()}, batch.token_count)
        bar.advance(f"loss {found['loss']:.3f}")
        streak = np.atleast_1d(metrics["streak"])
        if streak.max() >= self.max_skipped:
            rows = self.work.places(step - 1, streak >= self.max_skipped, names)
            shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            raise UserError(
                f"{self.stage}: {streak.max()} steps in a row had a loss or a gradient that is not finite, the last is "
                f"step {step} with the rows {shown}; lower train.learning_rate, or mend the rows"
            )
