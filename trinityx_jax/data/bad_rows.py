"""Rows that cannot be used: each is an error that names its place, or skipped and counted by kind."""

from __future__ import annotations

import logging
from collections import Counter

from trinityx_jax.errors import UserError

log = logging.getLogger(__name__)


class BadRow(UserError):
    """One row that cannot be used; ``kind`` is what it is counted as where rows are skipped."""

    def __init__(self, place: str, kind: str, message: str):
        super().__init__(f"{place}: {message}")
        self.place = place
        self.kind = kind


class BadRows:
    """What ``on_bad_row`` asks for: the first bad row raises, or all are left out and counted."""

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.kinds: Counter[str] = Counter()
        self.first: BadRow | None = None
        self.last: BadRow | None = None

    @property
    def count(self) -> int:
        """Rows left out so far."""
        return self.kinds.total()

    def add(self, row: BadRow) -> None:
        """Count a row, or raise it."""
        if not self.skip:
            raise UserError(f"{row} (data.NAME.on_bad_row: skip leaves such rows out)") from row
        self.kinds[row.kind] += 1
        self.first = self.first or row
        self.last = row

    def report(self, source: str, read: int) -> None:
        """One warning with the count of each kind, the first and the last place.

        Raises:
            UserError: no row is left.
        """
        if self.first is None or self.last is None:
            return
        if self.count == read:
            raise UserError(f"{source}: all {read:,} rows are bad; the first: {self.first}") from self.first
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        places = f"first: {self.first}" + ("" if self.first is self.last else f"; last: {self.last}")
        log.warning("%s: %s of %s rows are skipped (%s); %s", source, f"{self.count:,}", f"{read:,}", kinds, places)
