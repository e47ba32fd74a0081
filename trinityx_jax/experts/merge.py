"""Task vectors into a dense tree, and the static weights gamma of a set of experts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trinityx_jax.errors import UserError
from trinityx_jax.experts.task_vector import TaskVector

log = logging.getLogger(__name__)
SIMILARITIES = ("cosine", "inner", "uniform")


def merge(params: Mapping[str, Any], vector: TaskVector) -> dict[str, Any]:
    """theta_0 + delta: a new base tree in the base's dtype; the sum is made in float32."""
    blocks = dict(params["blocks"])
    for site in vector.sites:
        kernel = blocks[site]["kernel"]
        delta = vector.dense(site)
        if kernel.shape != delta.shape:
            raise UserError(f"task vector: {site} has shape {delta.shape}, the base {kernel.shape}")
        blocks[site] = {**blocks[site], "kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}
    return {**params, "blocks": blocks}


def naive_sum(vectors: Sequence[TaskVector]) -> TaskVector:
    """The paper's merge: the plain sum of all task vectors (section 3.1).

    Raises:
        UserError: there is none.
    """
    if not vectors:
        raise UserError("naive sum: at least one task vector is needed")
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


def mean_reference(vectors: Sequence[TaskVector]) -> TaskVector:
    """Mean of the experts, each first scaled to unit norm (METHOD 1, gamma)."""
    return naive_sum([v / jnp.maximum(v.norm(), 1e-30) for v in vectors]) / float(len(vectors))


def gamma(
    vectors: Mapping[str, TaskVector], reference: TaskVector | None = None, similarity: str = "cosine"
) -> jax.Array:
    """Normalised static weights gamma~ [E], in the mapping's order, summing to 1 (paper 3.1, METHOD 1).

    Args:
        reference: None is the mean of the experts; for ``cosine`` of the experts scaled to unit norm.
        similarity: ``cosine``, the paper's ``inner``, or ``uniform``: 1/E each.

    Raises:
        UserError: a similarity is negative, or its name is unknown; there is no expert, or one is not finite.
    """
    if similarity not in SIMILARITIES:
        raise UserError(f"gamma: similarity {similarity!r} is not one of {', '.join(SIMILARITIES)}")
    names, experts = list(vectors), list(vectors.values())
    if not experts:
        raise UserError("gamma: at least one expert is needed")
    norms = {name: float(v.norm()) for name, v in vectors.items()}
    zero = [name for name, norm in norms.items() if norm == 0.0]
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise UserError(f"gamma: expert {name!r} holds values that are not finite")
    uniform = jnp.full((len(experts),), 1.0 / len(experts), jnp.float32)
    if similarity == "uniform":
        return uniform
    if zero:
        log.warning("gamma: expert %s is zero: gamma is uniform", ", ".join(zero))
        return uniform
    if reference is None:
        reference = mean_reference(experts) if similarity == "cosine" else naive_sum(experts) / float(len(experts))
    measure = TaskVector.cosine if similarity == "cosine" else TaskVector.inner
    raw = jnp.stack([measure(v, reference) for v in experts])
    for name, value in zip(names, raw.tolist(), strict=True):
        if value < 0:
            raise UserError(
                f"gamma: expert {name!r} has similarity {value:.3g} with the reference; "
                "negate the vector, or choose gamma: uniform"
            )
    total = jnp.sum(raw)
    if float(total) <= 0.0:
        log.warning("gamma: every similarity is zero: gamma is uniform")
        return uniform
    return raw / total
