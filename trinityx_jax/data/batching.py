"""Encoded rows to fixed-shape batches, planned up front so that batch k of seed s is always the same."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import grain
import numpy as np

from trinityx_jax.data.templates import Encoded
from trinityx_jax.errors import UserError

MULTIPLE = 32  # batch lengths are rounded up to this, so that few shapes are compiled
TARGET_PARTS = 4  # supervised positions are rounded up to quarters of the batch, likewise


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of one batch: B rows, S positions, N supervised positions (padded; ``valid`` says which).

    ``where`` are flat indices row * S + t of the hidden state that predicts ``labels``; supervised
    positions are chosen by place in the row, never by token id.
    """

    tokens: np.ndarray  # [B,S] int32
    mask: np.ndarray  # [B,S] bool
    where: np.ndarray  # [N] int32
    labels: np.ndarray  # [N] int32
    valid: np.ndarray  # [N] bool
    objective: np.ndarray  # [B] int32

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields as a dict, which is what a compiled step takes."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def token_count(self) -> int:
        """Real tokens, padding apart."""
        return int(self.mask.sum())


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is at least ``value``."""
    return -(-value // multiple) * multiple


def make_batch(
    rows: Sequence[Encoded | None], objective: Sequence[int], pad_id: int, length: int | None = None
) -> Batch:
    """Right-pad rows to one length. None is an empty row: no token, nothing learned."""
    longest = max((len(r.ids) for r in rows if r is not None), default=1)
    size = length or round_up(longest, MULTIPLE)
    tokens = np.full((len(rows), size), pad_id, np.int32)
    mask = np.zeros((len(rows), size), bool)
    where: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for index, row in enumerate(rows):
        if row is None:
            continue
        count = len(row.ids)
        tokens[index, :count] = row.ids
        mask[index, :count] = True
        where.append(index * size + np.arange(row.prompt_length - 1, count - 1))
        labels.append(row.ids[row.prompt_length :])
    flat = np.concatenate(where) if where else np.zeros(0, int)
    capacity = round_up(max(len(flat), 1), -(-tokens.size // TARGET_PARTS))
    out_where, out_labels, valid = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32), np.zeros(capacity, bool)
    out_where[: len(flat)] = flat
    if where:
        out_labels[: len(flat)] = np.concatenate(labels)
    valid[: len(flat)] = True
    return Batch(tokens, mask, out_where, out_labels, valid, np.asarray(objective, np.int32))


class RowOrder:
    """Which rows step k of one objective takes, for any k: shuffled anew each epoch, by name and seed.

    Rows of like length go together (a shuffle, then a sort within windows of 8 batches), so padding
    stays small. Epochs do not straddle a batch; a short last batch is filled with empty rows.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, name: str):
        if not len(lengths):
            raise UserError(f"data {name!r}: the data set is empty")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
        self.batches_per_epoch = -(-len(self.lengths) // batch_size)
        self._plans: dict[int, list[np.ndarray]] = {}

    def rows(self, step: int) -> np.ndarray:
        """Row indices of a step; fewer than ``batch_size`` at an epoch's end."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch not in self._plans:
            self._plans = {epoch: self._plan(epoch)}
        return self._plans[epoch][index]

    def _plan(self, epoch: int) -> list[np.ndarray]:
        shuffled = grain.MapDataset.range(len(self.lengths)).shuffle(seed=(self.seed + epoch) & 0x7FFFFFFF)
        order = np.asarray([shuffled[i] for i in range(len(self.lengths))])
        window = 8 * self.batch_size
        sorted_windows = [
            part[np.argsort(self.lengths[part], kind="stable")]
            for part in (order[i : i + window] for i in range(0, len(order), window))
        ]
        flat = np.concatenate(sorted_windows)
        batches = [flat[i : i + self.batch_size] for i in range(0, len(flat), self.batch_size)]
        generator = np.random.default_rng((self.seed, epoch))
        return [batches[i] for i in generator.permutation(len(batches))]


class TrainingBatches:
    """Batch k: ``batch_size`` rows of every objective, grouped in the objectives' order."""

    def __init__(self, rows: dict[str, list[Encoded]], batch_size: int, pad_id: int, seed: int):
        self.rows = rows
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.orders = {n: RowOrder([len(e.ids) for e in r], batch_size, seed, n) for n, r in rows.items()}

    def __getitem__(self, step: int) -> Batch:
        picked: list[Encoded | None] = []
        for name, order in self.orders.items():
            own: list[Encoded | None] = [self.rows[name][i] for i in order.rows(step)]
            picked += own + [None] * (self.batch_size - len(own))
        objective = np.repeat(np.arange(len(self.rows)), self.batch_size)
        return make_batch(picked, objective.tolist(), self.pad_id)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the largest objective has been seen once."""
        return max(order.batches_per_epoch for order in self.orders.values())


def evaluation_batches(
    rows: Sequence[Encoded], objective: Sequence[int], batch_size: int, pad_id: int
) -> list[tuple[np.ndarray, Batch]]:
    """(row indices, batch) pairs that cover all rows once, sorted by length; the last is filled up."""
    order = np.argsort([len(r.ids) for r in rows], kind="stable")
    out = []
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        blank = batch_size - len(index)
        chosen = [*(rows[i] for i in index), *([None] * blank)]
        out.append((index, make_batch(chosen, [*(objective[i] for i in index), *([0] * blank)], pad_id)))
    return out
