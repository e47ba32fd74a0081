"""Next-token loss at supervised positions only: no other position is projected to the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trinityx_jax.backbone import BackboneConfig, unembed

CHUNK = 1024  # positions whose logits [CHUNK,V] are in memory at once


def supervised_nll(
    base: Mapping[str, Any], config: BackboneConfig, hidden: jax.Array, where: jax.Array, labels: jax.Array
) -> jax.Array:
    """Negative log-likelihood [N] of ``labels`` [N] at flat positions ``where`` of hidden [B,S,D]."""
    picked = hidden.reshape(-1, hidden.shape[-1])[where]

    def nll(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = unembed(base, config, part[0])
        own = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - own

    count = where.shape[0]
    chunks = -(-count // CHUNK)
    if chunks == 1:
        return nll((picked, labels))
    size = -(-count // chunks)
    grow = chunks * size - count
    picked = jnp.pad(picked, ((0, grow), (0, 0))).reshape(chunks, size, -1)
    labels = jnp.pad(labels, (0, grow)).reshape(chunks, size)
    return jax.lax.map(jax.checkpoint(nll), (picked, labels)).reshape(-1)[:count]


def sum_by_group(values: jax.Array, valid: jax.Array, group: jax.Array, groups: int) -> jax.Array:
    """Sum over supervised positions of each group [G]."""
    return jax.ops.segment_sum(values * valid.astype(jnp.float32), group, groups)
