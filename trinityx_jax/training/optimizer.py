"""AdamW with warm-up and cosine decay, and clipping that treats every expert on its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from trinityx_jax.config import TrainConfig


def schedule(train: TrainConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over a share of the steps, then cosine decay to a tenth."""
    warmup = min(round(train.warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else train.learning_rate,
        peak_value=train.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=0.1 * train.learning_rate,
    )


def make_optimizer(train: TrainConfig, steps: int, per_expert: bool) -> optax.GradientTransformation:
    """The optimizer of a stage. ``per_expert``: leaves are [L,E,...] and E is clipped one by one."""
    clip = clip_per_expert(train.clip) if per_expert else optax.clip_by_global_norm(train.clip)
    return optax.chain(clip, optax.adamw(schedule(train, steps), weight_decay=train.weight_decay))


def clip_per_expert(limit: float) -> optax.GradientTransformation:
    """Scale each expert's whole gradient to at most ``limit`` in norm; leaves are [L,E,...]."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, limit / jnp.maximum(expert_norms(grads), 1e-12))
        return jax.tree.map(lambda g: g * scale.reshape(1, -1, *([1] * (g.ndim - 2))), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def expert_norms(tree: Any) -> jax.Array:
    """Global norm of each expert's leaves [E]."""
    squares = [jnp.sum(jnp.square(x), axis=(0, *range(2, x.ndim))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))
