"""Training state through Orbax: never the base, newest kept, resumable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from trinityx_jax.data.readers import first_line
from trinityx_jax.errors import UserError
from trinityx_jax.files import disk_full
from trinityx_jax.sections import CheckpointConfig
from trinityx_jax.training.state import TrainState


class Checkpoints:
    """Saves and restores one stage's ``TrainState``."""

    def __init__(self, folder: Path, settings: CheckpointConfig):
        self.folder = folder
        self.every = settings.every
        options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def restore(self, state: TrainState) -> TrainState:
        """The newest saved state, or ``state`` where none is saved.

        Raises:
            UserError: the saved state does not fit this configuration, or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return state
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and its storage raise many kinds; each means that it cannot be had
            problem = f"does not fit the configuration, or is damaged ({first_line(error)})"
            raise UserError(f"{self.folder / str(step)}: this checkpoint {problem}") from error

    def save(self, state: TrainState, wait: bool = False) -> None:
        """Write the state under its step, in the background unless ``wait``.

        Raises:
            UserError: it cannot be written.
        """
        with self._writing():
            if self._manager.latest_step() != int(state.step):
                self._manager.save(int(state.step), args=ocp.args.StandardSave(state), force=True)
            if wait:
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for writes under way; raises as ``save``."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = "No space left on device" if disk_full(error) else first_line(error)
            raise UserError(f"{self.folder}: a checkpoint cannot be written ({reason})") from error
