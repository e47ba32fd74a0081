"""Held-out losses of the experts, for early stopping and the dynamic gamma."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from trinityx_jax.backbone import BackboneConfig
from trinityx_jax.data.batching import Batch, Split
from trinityx_jax.parallel.sharding import on_mesh, put_batch, replicated
from trinityx_jax.training.step import expert_sums, supervised_counts

Sums = Callable[..., tuple[jax.Array, jax.Array]]


def held_out_sums(config: BackboneConfig, dtype: Any, mesh: Mesh, split: Split) -> Sums:
    """Compiled (trained, base, experts, batch) -> each expert's summed loss [E] and supervised tokens [E]."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sums(trained: Any, base: Any, experts: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        count = jax.tree.leaves(trained)[0].shape[1]
        groups = split.groups(count)
        found = expert_sums(trained, base, experts, config, batch, dtype=dtype, groups=groups)
        return found, supervised_counts(batch, count, groups)

    return sums


def mean_losses(
    sums: Sums, arguments: tuple[Any, Any, Any], batches: Iterable[Batch], mesh: Mesh, split: Split
) -> np.ndarray:
    """Each expert's mean loss [E] over all batches, by tokens."""
    with on_mesh(mesh):
        found = [jax.device_get(sums(*arguments, put_batch(batch.arrays(), mesh, split))) for batch in batches]
    total = np.sum(np.asarray(found, np.float64), axis=0)
    return total[0] / total[1]
