"""What should not have been seen: questions that are trained on and tested, or trained on and calibrated with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from trinityx_jax.config import SCRATCH, RunConfig, load_config
from trinityx_jax.errors import UserError
from trinityx_jax.run_folder import run_of
from trinityx_jax.training.rows import USES, load_parts

log = logging.getLogger(__name__)


def warn_of_calibration(config: RunConfig) -> None:
    """Say where rows that are held out for the router are rows that its experts were trained on.

    Questions are held out by seed and share, so an expert whose run had others learned from some of them.
    """
    for name, (file, theirs) in _of_experts(config).items():
        for part, own in config.parts(name).items():
            rows = (own.source, own.format, own.split)
            for other in theirs.parts(name).values():
                known = theirs.seed == config.seed and other.calibration >= own.calibration
                if (other.source, other.format, other.split) == rows and not known:
                    log.warning(
                        "data.%s: %s held other rows out (seed %d, calibration %s; here seed %d, %s): expert %r was "
                        "trained on some of those that are to calibrate the router",
                        part, file.parent, theirs.seed, other.calibration, config.seed, own.calibration, name,
                    )  # fmt: skip


def warn_of_test(config: RunConfig, tests: Mapping[str, Iterable[str]]) -> None:
    """Say how many test questions stand in the rows that a router or its experts learn from.

    Args:
        tests: normalised questions (``Example.question``), by what they are.
    """
    seen: set[str] = set()
    for run in (config, *dict(_of_experts(config).values()).values()):
        try:
            with _quiet():  # what there is to say of these rows was said when they were trained on
                parts = load_parts(run).values()
        except UserError as error:
            log.warning("whether test questions were trained on is not known: %s", error)
        else:
            seen |= {e.question for part in parts for use in USES for e in getattr(part, use)}
    for what, questions in tests.items():
        asked = set(questions)
        if asked & seen:
            log.warning("%s of %s %s also stand in training rows", f"{len(asked & seen):,}", f"{len(asked):,}", what)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _of_experts(config: RunConfig) -> dict[str, tuple[Path, RunConfig]]:
    """By expert, the configuration of the run that trained it, and its file; those from elsewhere have none."""
    source = config.experts.source or config.out
    if source == SCRATCH:
        return {}
    paths = source if isinstance(source, dict) else dict.fromkeys(config.experts.names, source)
    files = {name: run_of(path) / "config-experts.yaml" for name, path in paths.items()}
    found = {file: load_config(file) for file in set(files.values()) if file.exists()}
    return {n: (file, found[file]) for n, file in files.items() if file in found and n in found[file].experts.names}
