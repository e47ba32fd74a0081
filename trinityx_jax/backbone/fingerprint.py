"""A digest that tells two base models apart, whatever dtype they are stored in."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from trinityx_jax.backbone.config import BackboneConfig
from trinityx_jax.backbone.model import Params

_BOOKKEEPING = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
SAMPLES = 4096  # values per leaf; a fine-tune moves nearly all of them


def fingerprint(config: BackboneConfig, params: Params) -> str:
    """SHA-256 of what is computed: the geometry, and evenly spaced values of every leaf, rounded to bfloat16."""
    geometry = {k: v for k, v in dataclasses.asdict(config).items() if k not in _BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        last = leaf.shape[-1]
        rows = leaf.size // last
        step = max(1, leaf.size // SAMPLES)
        flat = np.arange(0, leaf.size, step)
        index = np.unravel_index(flat // last, leaf.shape[:-1]) if rows > 1 else ()
        values = leaf[(*index, flat % last)] if rows > 1 else leaf.reshape(-1)[flat]
        digest.update(np.asarray(jnp.asarray(values).astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()
