"""Low-rank task vectors and their algebra."""

from trinityx_jax.experts.lora import SITES, init_expert, stack, unstack
from trinityx_jax.experts.merge import gamma, merge, naive_sum
from trinityx_jax.experts.task_vector import TaskVector

__all__ = ["SITES", "TaskVector", "gamma", "init_expert", "merge", "naive_sum", "stack", "unstack"]
