"""The divergence guard: which losses are spikes, and the state that training goes back to when it diverges."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from trinityx_jax.sections import TrainConfig

WINDOW = 50  # steps that the usual loss is taken over, about
USUAL = 20  # losses that are seen before one can be a spike
SPIKES = 5  # in a row are a divergence
LEAST = 0.2  # of the usual loss: by so much a spike is above it at least


@flax.struct.dataclass
class Guard:
    """What is remembered of the router's training, or of each expert's (leaves as ``optimizer.expert_axes`` says)."""

    leaves: Any  # to go back to: all that an update changes
    taken: jax.Array  # the step that they are of
    moved: jax.Array  # updates since then
    mean: jax.Array  # of the losses that were no spikes, the older the less
    variance: jax.Array
    seen: jax.Array  # how many those are
    high: jax.Array  # spikes in a row until now
    returns: jax.Array  # times that it went back


def begin_guard(leaves: Any, shape: tuple[int, ...] = ()) -> Guard:
    """Before the first step; ``shape`` is [E] where each expert has its own."""
    whole, real = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
    copies = [jnp.copy(whole) for _ in range(4)]
    return Guard(jax.tree.map(jnp.copy, leaves), whole, copies[0], real, jnp.copy(real), *copies[1:])


@jax.named_scope("guard")
def watch(
    guard: Guard, train: TrainConfig, every: int, step: jax.Array, loss: jax.Array, streak: jax.Array, leaves: Any
) -> tuple[Any, Guard, jax.Array, dict[str, jax.Array]]:
    """After an update: (leaves, guard, streak, what happened), gone back to earlier leaves where it diverges.

    It diverges when ``SPIKES`` losses in a row are more than ``train.spike`` standard deviations above the usual one,
    or ``train.max_skipped`` were not finite; and goes back at most ``train.rollbacks`` times, to the leaves of a calm
    step, a multiple of ``every``. The step, and with it rows and learning rate, go on: the same rows would do the same.

    Args:
        step: steps done before this one. loss: this one's. streak: steps in a row, this one included, that were not
            finite and changed nothing.
        leaves: after this step's update.

    Returns:
        of what happened, ``back_to``: the step that was gone back to, or -1; ``diverged``: it did, and nothing is left
        to go back to, or it went back often enough.
    """
    fine = streak == 0
    above = jnp.maximum(train.spike * jnp.sqrt(guard.variance), LEAST * jnp.abs(guard.mean))
    spike = fine & (guard.seen >= USUAL) & (loss > guard.mean + above)
    high = jnp.where(spike, guard.high + 1, jnp.where(fine, 0, guard.high))
    moved = guard.moved + fine.astype(jnp.int32)
    diverges = (high >= SPIKES) | (streak >= train.max_skipped)
    back = diverges & (moved > 0) & (guard.returns < train.rollbacks)
    taking = ((step + 1) % every == 0) & (high == 0) & fine

    usual = fine & ~spike
    share = jnp.maximum(1.0 / (guard.seen + 1.0), 1.0 / WINDOW)
    apart = jnp.where(usual, loss - guard.mean, 0.0)
    after = dataclasses.replace(
        guard,
        leaves=_where(taking, leaves, guard.leaves),
        taken=jnp.where(taking, step + 1, guard.taken),
        moved=jnp.where(taking | back, 0, moved),
        mean=guard.mean + share * apart,
        variance=jnp.where(usual, (1.0 - share) * (guard.variance + share * apart**2), guard.variance),
        seen=guard.seen + usual.astype(jnp.int32),
        high=jnp.where(back, 0, high),
        returns=guard.returns + back.astype(jnp.int32),
    )
    happened = {"back_to": jnp.where(back, guard.taken, -1), "diverged": diverges & ~back}
    return _where(back, guard.leaves, leaves), after, jnp.where(back, 0, streak), happened


def _where(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)
