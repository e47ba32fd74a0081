"""Who may work in a run folder: one command at a time, whose hosts were all given the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trinityx_jax.errors import UserError
from trinityx_jax.files import alone_in
from trinityx_jax.parallel.multihost import first_text, on_all, on_first
from trinityx_jax.run_folder import difference


@contextlib.contextmanager
def alone(folder: Path | str) -> Iterator[None]:
    """``files.alone_in`` by the first host, for all of them; raises as that does."""
    with contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(alone_in(Path(folder))))
        yield


def check_alike(value: Mapping[str, Any]) -> None:
    """That all hosts were given the same; each must ask.

    Raises:
        UserError: one of them was not, which says there of what.
    """
    own = json.loads(json.dumps(value))
    key = difference(json.loads(first_text(json.dumps(own))), own)
    if not on_all(key is None):
        raise UserError(
            "another host was given other words, files or settings than the first" if key is None else
            f"{key}: is not what the first host was given"
        )  # fmt: skip
