"""A SIGTERM that is always heard."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that cleanups run.

    Python drops what is raised in a finalizer or a callback of the garbage collector, of which JAX has one, and in the
    hook that it tells of that: there the signal is sent again a moment later.
    """
    telling = False

    def again() -> None:
        main = threading.main_thread().ident
        threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGTERM)).start()

    def dropped(found: Any) -> None:
        nonlocal telling
        telling = True
        if issubclass(found.exc_type, KeyboardInterrupt):
            again()
        else:
            before(found)
        telling = False

    def stop(number: int, frame: Any) -> None:
        if telling:
            again()
        else:
            raise KeyboardInterrupt

    before, sys.unraisablehook = sys.unraisablehook, dropped
    with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        sys.unraisablehook = before
