"""A digest that tells two base models apart, whatever dtype they are stored in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trinityx_jax.backbone.config import BackboneConfig
from trinityx_jax.backbone.model import Params

_BOOKKEEPING = {"family", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
SAMPLES = 4096  # values per leaf; a fine-tune moves nearly all of them


def fingerprint(config: BackboneConfig, params: Params) -> str:
    """SHA-256 of what is computed: the geometry, and evenly spaced values of every leaf, rounded to bfloat16."""
    values = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        index = np.unravel_index(positions(leaf.shape), leaf.shape)
        values[tuple(key.key for key in path)] = np.asarray(_picked(leaf, tuple(index)))
    return digest(config, values)


def _picked(leaf: jax.Array, index: tuple[np.ndarray, ...]) -> jax.Array:
    """Some values of a leaf, where every host can read them."""
    if leaf.is_fully_addressable or not isinstance(leaf.sharding, NamedSharding):
        return leaf[index]
    whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.jit(lambda x: x[index], out_shardings=whole)(leaf)


def positions(shape: tuple[int, ...]) -> np.ndarray:
    """Flat indices of the values of a leaf that its fingerprint is made of."""
    size = int(np.prod(shape))
    return np.arange(0, size, max(1, size // SAMPLES))


def digest(config: BackboneConfig, values: Mapping[tuple[str, ...], np.ndarray]) -> str:
    """The fingerprint from every leaf's values at ``positions``."""
    fields = dataclasses.fields(config)
    geometry = {f.name: getattr(config, f.name) for f in fields if f.name not in _BOOKKEEPING}
    # a field at its default is left out, so that one that comes later changes no fingerprint
    geometry = {f.name: geometry[f.name] for f in fields if f.name in geometry and geometry[f.name] != f.default}
    out = hashlib.sha256(json.dumps(geometry, sort_keys=True, default=dataclasses.asdict).encode())
    for path in sorted(values):
        out.update("/".join(path).encode())
        out.update(values[path].astype(jnp.bfloat16).tobytes())
    return out.hexdigest()
