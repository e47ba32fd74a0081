"""Attention behind one signature; the implementation follows the platform."""

from __future__ import annotations

import jax


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with grouped key/value heads; the softmax is in float32.

    Args:
        q: [B,S,H,N]. k, v: [B,T,K,N] with K dividing H.
        mask: [B,S,T], True where a query may look. A query that may look nowhere gets finite values.

    Returns:
        [B,S,H,N] in q's dtype.

    XLA's implementation serves every platform. cuDNN's flash attention takes no arbitrary mask
    without materialising a bias, so it would bring nothing to this signature.
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
