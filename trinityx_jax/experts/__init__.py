"""Low-rank task vectors and their algebra."""

from trinityx_jax.experts.lora import ATTENTION, FEED_FORWARD, SITES, init_expert, stack, unstack
from trinityx_jax.experts.merge import gamma, merge, naive_sum
from trinityx_jax.experts.task_vector import TaskVector

__all__ = [
    "ATTENTION",
    "FEED_FORWARD",
    "SITES",
    "TaskVector",
    "gamma",
    "init_expert",
    "merge",
    "naive_sum",
    "stack",
    "unstack",
]
