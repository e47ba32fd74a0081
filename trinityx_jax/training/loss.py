"""Next-token loss at supervised positions only: no other position is projected to the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trinityx_jax.backbone import BackboneConfig, unembed
from trinityx_jax.backbone.model import unembed_transposed

CHUNK = 256  # positions whose logits [CHUNK,V] are in memory at once


def supervised_nll(
    base: Mapping[str, Any], config: BackboneConfig, hidden: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """Negative log-likelihood [N] of a batch's labels under hidden [B,S,D], 0 where they are not valid.

    Only the chunks that hold valid positions, which come first, are computed. The base is frozen: it gets no
    gradient.
    """
    picked = hidden.reshape(-1, hidden.shape[-1])[batch["where"]]
    nll = _nll(config, jax.lax.stop_gradient(base), picked, batch["labels"], jnp.sum(batch["valid"]))
    return jnp.where(batch["valid"], nll, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(
    config: BackboneConfig, base: Mapping[str, Any], picked: jax.Array, labels: jax.Array, count: jax.Array
) -> jax.Array:
    return chunked(lambda h, own: _chunk(config, base, h, own)[:1], picked, labels, count)[0]


def _chunk(config: BackboneConfig, base: Mapping[str, Any], h: jax.Array, labels: jax.Array) -> tuple:
    """Of some positions: the loss, the logits and their log-sum-exp."""
    logits = unembed(base, config, h)
    norm = jax.nn.logsumexp(logits, axis=-1)
    return norm - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0], logits, norm


def _forward(
    config: BackboneConfig, base: Any, picked: jax.Array, labels: jax.Array, count: jax.Array
) -> tuple[jax.Array, tuple[jax.Array]]:
    """Loss and slope of a chunk at once, so that no logits are kept and none are made twice."""

    def both(h: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll, logits, norm = _chunk(config, base, h, own)
        slope = jnp.exp(logits - norm[:, None]) - jax.nn.one_hot(own, logits.shape[-1])
        return nll, unembed_transposed(base, config, slope, h.dtype)

    nll, slope = chunked(both, picked, labels, count)
    return nll, (slope,)


def _backward(config: BackboneConfig, kept: tuple[jax.Array], g: jax.Array) -> tuple:
    (slope,) = kept
    return None, (g[:, None] * slope).astype(slope.dtype), None, None


_nll.defvjp(_forward, _backward)


def chunked(function: Any, picked: jax.Array, labels: jax.Array, count: jax.Array) -> Any:
    """``function`` of picked [N,D] and labels [N] in chunks, of the first ``count`` positions; 0 in later chunks."""
    size = min(CHUNK, labels.shape[0])
    whole = -(-labels.shape[0] // size) * size
    picked = jnp.pad(picked, ((0, whole - labels.shape[0]), (0, 0)))
    own = jnp.pad(labels, (0, whole - labels.shape[0]))

    def slices(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, size) for x in (picked, own))  # type: ignore[return-value]

    def body(index: jax.Array, out: Any) -> Any:
        found = function(*slices(index * size))
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, y: put(x, y, index * size, axis=0), out, found)

    shapes = jax.eval_shape(function, *slices(jnp.zeros((), jnp.int32)))
    out = jax.tree.map(lambda x: jnp.zeros((whole, *x.shape[1:]), x.dtype), shapes)
    out = jax.lax.fori_loop(0, -(-count // size), body, out)
    return jax.tree.map(lambda x: x[: labels.shape[0]], out)


def sum_by_group(values: jax.Array, valid: jax.Array, group: jax.Array, groups: int) -> jax.Array:
    """Sum over supervised positions of each group [G]."""
    return jax.ops.segment_sum(values * valid.astype(jnp.float32), group, groups)
