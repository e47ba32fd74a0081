"""Encoded rows to fixed-shape batches, planned up front so that batch k of seed s is always the same."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grain
import numpy as np

from trinityx_jax.data.templates import Encoded
from trinityx_jax.errors import UserError

SHORTEST = 32  # a batch's length, at least
WINDOW = 16  # batches whose rows are sorted by length
PREFETCH = 4  # batches made ahead
Slot = Sequence[Encoded]  # what stands in one row of a batch: nothing, one row of data, or several packed


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of one batch: B slots, S positions, N = B S places for supervised positions (``valid`` ones first).

    ``where`` are flat indices slot * S + t of the hidden state that predicts ``labels``; supervised
    positions are chosen by place in the row, never by token id. Where gradients are accumulated, every
    field has an axis of parts first.

    A slot holds one row, several of its objective, or (``joined``) of any: then mask numbers the batch's rows, and
    objective [R] is theirs.
    """

    tokens: np.ndarray  # [B,S] int32
    mask: np.ndarray  # [B,S] bool; of packed rows int32: 0 at padding, 1, 2, ... in each packed example
    where: np.ndarray  # [N] int32
    labels: np.ndarray  # [N] int32
    valid: np.ndarray  # [N] bool
    objective: np.ndarray  # [B] int32; [R] of joined rows

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields as a dict, which is what a compiled step takes."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def token_count(self) -> int:
        """Real tokens, padding apart."""
        return int((self.mask > 0).sum())


def bucket(length: int) -> int:
    """A length rounded up to a quarter of the next power of two, so that few shapes are compiled."""
    step = max(SHORTEST, 2 ** max(length - 1, 1).bit_length() // 4)
    return -(-max(length, 1) // step) * step


def make_batch(
    rows: Sequence[Encoded | Slot | None],
    objective: Sequence[int],
    pad_id: int,
    length: int | None = None,
    packed: bool = False,
) -> Batch:
    """Right-pad rows to one length. None is an empty row: no token, nothing learned.

    Args:
        rows: an example each; with ``packed``, several to be put one after another.
    """
    slots: list[Slot] = [() if r is None else (r,) if isinstance(r, Encoded) else r for r in rows]
    size = length or bucket(max((_tokens(slot) for slot in slots), default=0))
    batch = filled([list(enumerate(slot, 1)) for slot in slots], objective, pad_id, size)
    return batch if packed else dataclasses.replace(batch, mask=batch.mask > 0)


def joined(rows: Sequence[Encoded | None], objective: Sequence[int], pad_id: int, longest: int) -> Batch:
    """The rows [R] in about as few positions as hold them, whatever their objectives: what a batch's losses see is the
    same, and short rows are not padded to the length of long ones.

    Args:
        longest: of all batches' rows: slots have that length unless shorter ones save a third, so that few shapes are
            compiled.
    """
    assert len(rows) == len(objective)
    lengths = np.asarray([0 if row is None else len(row.ids) for row in rows])
    order = [int(i) for i in np.argsort(-lengths, kind="stable") if lengths[i]]
    plans = {size: best_fit(lengths, order, size) for size in (bucket(longest), bucket(int(lengths.max())))}
    slots = {size: min(_few(len(plan)), len(rows)) for size, plan in plans.items()}
    least = min(size * count for size, count in slots.items())
    size = next(size for size, count in slots.items() if size * count <= 1.5 * least)
    plan = [[(i + 1, rows[i]) for i in slot] for slot in plans[size]]
    return filled(plan + [[]] * (slots[size] - len(plan)), objective, pad_id, size)


def _few(count: int) -> int:
    """A count rounded up to a quarter of the next power of two."""
    step = max(1, 2 ** max(count - 1, 1).bit_length() // 4)
    return -(-count // step) * step


def filled(slots: Sequence[Sequence[tuple[int, Encoded]]], objective: Sequence[int], pad_id: int, size: int) -> Batch:
    """Slots of numbered rows, one after another: the mask holds the numbers."""
    tokens = np.full((len(slots), size), pad_id, np.int32)
    segments = np.zeros((len(slots), size), np.int32)
    where: list[np.ndarray] = [np.zeros(0, int)]
    labels: list[np.ndarray] = [np.zeros(0, np.int32)]
    for index, slot in enumerate(slots):
        start = 0
        for number, row in slot:
            end = start + len(row.ids)
            tokens[index, start:end], segments[index, start:end] = row.ids, number
            where.append(index * size + np.arange(start + row.prompt_length - 1, end - 1))
            labels.append(row.ids[row.prompt_length :])
            start = end
    flat = np.concatenate(where)
    out_where, out_labels = np.zeros(tokens.size, np.int32), np.zeros(tokens.size, np.int32)
    valid = np.zeros(tokens.size, bool)
    out_where[: len(flat)], out_labels[: len(flat)], valid[: len(flat)] = flat, np.concatenate(labels), True
    return Batch(tokens, segments, out_where, out_labels, valid, np.asarray(objective, np.int32))


def _tokens(slot: Slot) -> int:
    return sum(len(row.ids) for row in slot)


def best_fit(lengths: np.ndarray, order: Iterable[int], capacity: int) -> list[np.ndarray]:
    """Rows packed in an order: each into the slot that it leaves least room in, else into a new one."""
    slots: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, slot), sorted
    for row in order:
        length = int(lengths[row])
        at = bisect.bisect_left(room, (length, -1))
        left, slot = room.pop(at) if at < len(room) else (capacity, len(slots))
        if slot == len(slots):
            slots.append([])
        slots[slot].append(row)
        bisect.insort(room, (left - length, slot))
    return [np.asarray(slot) for slot in slots]


class RowOrder:
    """Which rows step k of one objective takes, for any k: planned anew each epoch, by name and seed.

    Rows of like length go together (a shuffle, then a sort within windows of 16 batches), so padding
    stays small; or shuffled rows are packed, each into the slot that it fills best. Epochs do not straddle
    a batch; a short last batch is filled with empty rows.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, name: str, capacity: int | None = None):
        if not len(lengths):
            raise UserError(f"data {name!r}: the data set is empty")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.capacity = batch_size, capacity
        self.seed = zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
        self._ends: list[int] = []  # steps by the end of each epoch
        self._planned: tuple[int, list[list[np.ndarray]]] = (-1, [])

    def slots(self, step: int) -> list[np.ndarray]:
        """Row indices of each slot of a step; fewer than ``batch_size`` slots at an epoch's end."""
        while not self._ends or self._ends[-1] <= step:
            self._plan(len(self._ends))
        epoch = bisect.bisect_right(self._ends, step)
        return self._plan(epoch)[step - (self._ends[epoch - 1] if epoch else 0)]

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs, at least one."""
        whole = int(epochs)
        for epoch in range(len(self._ends), whole + 1):
            self._plan(epoch)
        before = self._ends[whole - 1] if whole else 0
        return max(1, before + round((epochs - whole) * (self._ends[whole] - before)))

    def _plan(self, epoch: int) -> list[list[np.ndarray]]:
        if self._planned[0] != epoch:
            shuffled = grain.MapDataset.range(len(self.lengths)).shuffle(seed=(self.seed + epoch) & 0x7FFFFFFF)
            order = np.asarray([shuffled[i] for i in range(len(self.lengths))])
            slots = (
                self._sorted(order) if self.capacity is None else best_fit(self.lengths, order.tolist(), self.capacity)
            )
            batches = [slots[i : i + self.batch_size] for i in range(0, len(slots), self.batch_size)]
            generator = np.random.default_rng((self.seed, epoch))
            self._planned = (epoch, [batches[i] for i in generator.permutation(len(batches))])
            if epoch == len(self._ends):
                self._ends.append((self._ends[-1] if epoch else 0) + len(batches))
        return self._planned[1]

    def _sorted(self, order: np.ndarray) -> list[np.ndarray]:
        window = WINDOW * self.batch_size
        parts = (order[i : i + window] for i in range(0, len(order), window))
        flat = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        return [flat[i : i + 1] for i in range(len(flat))]


class TrainingBatches:
    """Batch k: ``batch_size`` slots of every objective, grouped in the objectives' order.

    Args:
        accumulate: parts that a batch is served in, each with its share of every objective's slots.
        pack: tokens of a slot that several rows are packed into; None: a row each, lengths by bucket.
        join: whether the rows of all objectives share slots (``joined``), which leaves nothing to pack and is in one
            part.
    """

    def __init__(
        self,
        rows: Mapping[str, list[Encoded]],
        batch_size: int,
        pad_id: int,
        seed: int,
        accumulate: int = 1,
        pack: int | None = None,
        join: bool = False,
    ):
        assert not join or (accumulate == 1 and pack is None)
        self.rows, self.pad_id, self.batch_size = dict(rows), pad_id, batch_size
        self.accumulate, self.pack = accumulate, pack
        self.longest = max((len(e.ids) for own in rows.values() for e in own), default=0) if join else None
        self.orders = {
            name: RowOrder([len(e.ids) for e in own], batch_size, seed, name, pack) for name, own in rows.items()
        }

    def __getitem__(self, step: int) -> Batch:
        return self.batch(step, tuple(self.rows))

    def batch(self, step: int, names: tuple[str, ...]) -> Batch:
        """Batch ``step`` of some of the objectives; what one is served does not depend on the others."""
        served = {name: self.slots(step, name) for name in names}
        share = self.batch_size // self.accumulate
        index = {name: i for i, name in enumerate(self.rows)}
        objective = [index[name] for name in names for _ in range(share)]
        if self.longest is not None:
            rows = [slot[0] if slot else None for own in served.values() for slot in own]
            return joined(rows, objective, self.pad_id, self.longest)
        length = self.pack or bucket(max(_tokens(s) for own in served.values() for s in own))
        parts = [
            make_batch(
                [s for own in served.values() for s in own[k * share : (k + 1) * share]],
                objective, self.pad_id, length, self.pack is not None,
            )
            for k in range(self.accumulate)
        ]  # fmt: skip
        return parts[0] if self.accumulate == 1 else _stacked(parts)

    def slots(self, step: int, name: str) -> list[Slot]:
        """What one objective is served in a step."""
        found: list[Slot] = [[self.rows[name][i] for i in slot] for slot in self.orders[name].slots(step)]
        return found + [()] * (self.batch_size - len(found))

    def serve(self, start: int, stop: int, names: tuple[str, ...]) -> Iterator[Batch]:
        """Batches ``start`` to ``stop`` in order, made ahead in a thread."""
        if start >= stop:
            return iter(())
        steps = grain.MapDataset.range(stop).map(functools.partial(self.batch, names=names))[start:]
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)))


def _stacked(parts: Sequence[Batch]) -> Batch:
    """Batches of one shape with a new axis first."""
    return Batch(**{name: np.stack([getattr(part, name) for part in parts]) for name in parts[0].arrays()})


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


def validation_batches(rows: Mapping[str, list[Encoded]], batch_size: int, pad_id: int) -> list[Batch]:
    """Batches that cover every objective's rows once, grouped as in training, each objective sorted by length."""
    ordered = {name: sorted(own, key=lambda e: len(e.ids)) for name, own in rows.items()}
    objective = [index for index in range(len(rows)) for _ in range(batch_size)]
    out = []
    for start in range(0, max(map(len, ordered.values())), batch_size):
        own = [part[start : start + batch_size] for part in ordered.values()]
        picked = [row for part in own for row in [*part, *([None] * (batch_size - len(part)))]]
        out.append(make_batch(picked, objective, pad_id))
    return out
