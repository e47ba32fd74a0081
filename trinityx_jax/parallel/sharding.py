"""Where every array lives: one table from logical axes to mesh axes."""

from __future__ import annotations

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from trinityx_jax.backbone import BackboneConfig, abstract_params

# Logical axis of a parameter -> mesh axis. An axis that the mesh lacks, or that does not divide the
# dimension, leaves it whole.
RULES: dict[str, str] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
}


def base_shardings(config: BackboneConfig, mesh: Mesh | None) -> dict[tuple[str, ...], Sharding]:
    """A sharding for every leaf of the base tree, by its path; without a mesh, the default device."""
    boxed = jax.tree_util.tree_flatten_with_path(
        abstract_params(config), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )[0]
    out: dict[tuple[str, ...], Sharding] = {}
    for path, leaf in boxed:
        key = tuple(part.key for part in path)
        if mesh is None:
            out[key] = SingleDeviceSharding(jax.devices()[0])
            continue
        axes = [RULES.get(name or "") for name in leaf.names]
        sizes = zip(axes, leaf.value.shape, strict=True)
        fits = [a if a in mesh.shape and n % mesh.shape[a] == 0 else None for a, n in sizes]
        out[key] = NamedSharding(mesh, PartitionSpec(*fits))
    return out
