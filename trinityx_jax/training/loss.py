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
    base: Mapping[str, Any], config: BackboneConfig, hidden: jax.Array, where: jax.Array, labels: jax.Array
) -> jax.Array:
    """Negative log-likelihood [N] of ``labels`` [N] at flat positions ``where`` of hidden [B,S,D].

    The base is frozen: it gets no gradient.
    """
    picked = hidden.reshape(-1, hidden.shape[-1])[where]
    return _nll(config, jax.lax.stop_gradient(base), picked, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(config: BackboneConfig, base: Mapping[str, Any], picked: jax.Array, labels: jax.Array) -> jax.Array:
    return _chunked(lambda h, own: _chunk(config, base, h, own)[0], picked, labels)


def _chunk(config: BackboneConfig, base: Mapping[str, Any], h: jax.Array, labels: jax.Array) -> tuple:
    """Of some positions: the loss, the logits and their log-sum-exp."""
    logits = unembed(base, config, h)
    norm = jax.nn.logsumexp(logits, axis=-1)
    return norm - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0], logits, norm


def _forward(config: BackboneConfig, base: Any, picked: jax.Array, labels: jax.Array) -> tuple[jax.Array, tuple]:
    """Loss and slope of a chunk at once, so that no logits are kept and none are made twice."""

    def both(h: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll, logits, norm = _chunk(config, base, h, own)
        slope = jnp.exp(logits - norm[:, None]) - jax.nn.one_hot(own, logits.shape[-1])
        return nll, unembed_transposed(base, config, slope, h.dtype)

    nll, slope = _chunked(both, picked, labels)
    return nll, (slope,)


def _backward(config: BackboneConfig, kept: tuple[jax.Array], g: jax.Array) -> tuple:
    (slope,) = kept
    return None, (g[:, None] * slope).astype(slope.dtype), None


_nll.defvjp(_forward, _backward)


def _chunked(function: Any, picked: jax.Array, labels: jax.Array) -> Any:
    """``function`` of picked [N,D] and labels [N], of at most CHUNK positions at a time."""
    count = labels.shape[0]
    chunks = -(-count // CHUNK)
    if chunks == 1:
        return function(picked, labels)
    size = -(-count // chunks)
    grow = chunks * size - count
    picked = jnp.pad(picked, ((0, grow), (0, 0))).reshape(chunks, size, -1)
    labels = jnp.pad(labels, (0, grow)).reshape(chunks, size)
    found = jax.lax.map(lambda part: function(*part), (picked, labels))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def sum_by_group(values: jax.Array, valid: jax.Array, group: jax.Array, groups: int) -> jax.Array:
    """Sum over supervised positions of each group [G]."""
    return jax.ops.segment_sum(values * valid.astype(jnp.float32), group, groups)
