"""Routing losses (paper 3.2, METHOD 2). All take pi [B,S,L,E] in float32 and a token mask [B,S]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TINY = 1e-20  # keeps log(0) of a top-k masked expert finite


def mean_routing(pi: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean pi per layer over the batch's real tokens: [L,E]."""
    weight = mask.astype(jnp.float32)
    return jnp.einsum("bsle,bs->le", pi, weight) / jnp.maximum(jnp.sum(weight), 1.0)


def row_routing(pi: jax.Array, mask: jax.Array) -> jax.Array:
    """pi of each row, averaged over its real tokens and all layers: [B,E]."""
    weight = mask.astype(jnp.float32)
    total = jnp.einsum("bsle,bs->be", pi, weight) / pi.shape[2]
    return total / jnp.maximum(jnp.sum(weight, axis=1), 1.0)[:, None]


def entropy_loss(pi: jax.Array, mask: jax.Array, kind: str) -> jax.Array:
    """``batch_diversity``: minus the entropy of the batch's mean pi, averaged over layers (balanced
    use, tokens free to be decisive). ``token_literal``: the paper's +H(pi), mean over tokens and layers.
    """
    if kind == "batch_diversity":
        mean = mean_routing(pi, mask)
        return jnp.mean(jnp.sum(mean * jnp.log(mean + TINY), axis=-1))
    per_token = -jnp.sum(pi * jnp.log(pi + TINY), axis=-1)  # [B,S,L]
    weight = mask.astype(jnp.float32)[..., None]
    return jnp.sum(per_token * weight) / jnp.maximum(jnp.sum(weight) * pi.shape[2], 1.0)


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis, q a constant: [...,E] -> [...]."""
    return jnp.sum(p * (jnp.log(p + TINY) - jnp.log(jax.lax.stop_gradient(q) + TINY)), axis=-1)


def kl_loss(pi: jax.Array, mask: jax.Array, previous: jax.Array, kind: str) -> jax.Array:
    """KL(pi || pi before), what "before" is being the reading (METHOD 2).

    ``step`` and ``ema``: the batch's mean per layer against ``previous`` [L,E]. ``token``: each token against
    the one before it in its row. ``layer``: each layer against the one below. Averaged over layers and tokens.
    """
    if kind in ("step", "ema"):
        return jnp.mean(divergence(mean_routing(pi, mask), previous))
    if kind == "token":
        change, real = divergence(pi[:, 1:], pi[:, :-1]), mask[:, 1:] & mask[:, :-1]  # [B,S-1,L]
    else:
        change, real = divergence(pi[:, :, 1:], pi[:, :, :-1]), mask  # [B,S,L-1]
    weight = real.astype(jnp.float32)[..., None]
    return jnp.sum(change * weight) / jnp.maximum(jnp.sum(weight) * change.shape[2], 1.0)


def next_previous(mean: jax.Array, previous: jax.Array, kind: str) -> jax.Array:
    """pi_prev for the next step: this batch's mean, or an exponential average (0.9) for ``ema``."""
    mean = jax.lax.stop_gradient(mean)
    return 0.9 * previous + 0.1 * mean if kind == "ema" else mean


def gate_loss(pi: jax.Array, mask: jax.Array, objective: jax.Array) -> jax.Array:
    """-log of the row's own objective under its mean routing; objective [B], rows without tokens skip."""
    own = jnp.take_along_axis(row_routing(pi, mask), objective[:, None], axis=1)[:, 0]
    real = jnp.any(mask, axis=1).astype(jnp.float32)
    return -jnp.sum(jnp.log(own + TINY) * real) / jnp.maximum(jnp.sum(real), 1.0)


def gate_hits(pi: jax.Array, mask: jax.Array, objective: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per row [B]: whether its mean pi is highest at its own objective; whether it holds a token at all."""
    real = jnp.any(mask, axis=1)
    return (jnp.argmax(row_routing(pi, mask), axis=-1) == objective) & real, real
