"""What a training step changes, and the one place where it changes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from trinityx_jax.sections import TrainConfig
from trinityx_jax.training.optimizer import expert_axes, init_per_expert, learning_rate

Trained = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """The trained leaves, the optimizer's, the step, and what else has to survive a restart.

    In stage 1 all but ``step`` has an axis of experts (see ``expert_axes``): each expert counts, stops and
    keeps its best on its own. ``previous`` is pi_prev [L,E] of stage 2, which stage 1 has none of.
    """

    step: jax.Array
    params: Trained
    opt_state: Any
    previous: Any
    skipped: jax.Array  # steps whose loss or gradient was not finite
    streak: jax.Array  # of those, how many in a row until now
    best: Trained | None = None  # the leaves at the lowest validation loss
    best_loss: jax.Array | None = None
    best_step: jax.Array | None = None  # the step that has it
    waited: jax.Array | None = None  # validations since then


def expert_state(params: Trained, optimizer: optax.GradientTransformation, keep_best: bool) -> TrainState:
    """Stage 1 before its first step; leaves are [L,E,...]."""
    count = jax.tree.leaves(params)[0].shape[1]
    zeros = jnp.zeros((count,), jnp.int32)
    opt_state = init_per_expert(optimizer, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, None, zeros, jnp.copy(zeros))
    if not keep_best:
        return state
    return dataclasses.replace(
        state,
        best=jax.tree.map(jnp.copy, params),
        best_loss=jnp.full((count,), jnp.inf),
        best_step=jnp.copy(zeros),
        waited=jnp.copy(zeros),
    )


def router_state(params: Trained, optimizer: optax.GradientTransformation, previous: jax.Array) -> TrainState:
    """Stage 2 before its first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), previous, jnp.copy(zero), jnp.copy(zero))


def guarded(
    train: TrainConfig,
    optimizer: optax.GradientTransformation,
    params: Trained,
    opt_state: Any,
    grads: Trained,
    loss: jax.Array,
    step: jax.Array,
    total: jax.Array | int,
) -> tuple[Trained, Any, jax.Array]:
    """(params, optimizer state, whether it was done): one AdamW update, or nothing where a value is not finite."""
    direction, after = optimizer.update(grads, opt_state, params)
    rate = learning_rate(train, step, total)
    moved = jax.tree.map(lambda p, d: p - (rate * d).astype(p.dtype), params, direction)
    fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads)) & jnp.isfinite(optax.tree.norm(moved))
    keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(fine, x, y), new, old)  # noqa: E731
    return keep(moved, params), keep(after, opt_state), fine


def update_experts(
    train: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Trained,
    losses: jax.Array,
    totals: jax.Array,
    active: tuple[int, ...],
) -> TrainState:
    """One step of the ``active`` experts, each by itself; grads are theirs alone, losses and totals [len(active)]."""
    every = len(active) == state.skipped.shape[0]
    index = jnp.asarray(active)

    def take(tree: Any) -> Any:
        return tree if every else jax.tree.map(lambda x, axis: jnp.take(x, index, axis), tree, expert_axes(tree))

    def put(whole: Any, part: Any) -> Any:
        def one(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
            return x.at[:, index].set(y) if axis else x.at[index].set(y)

        return part if every else jax.tree.map(one, whole, part, expert_axes(whole))

    params, opt_state = take(state.params), take(state.opt_state)
    axes = (expert_axes(params), expert_axes(opt_state), expert_axes(grads), 0, None, 0)

    def single(p: Trained, o: Any, g: Trained, loss: jax.Array, step: jax.Array, total: jax.Array) -> Any:
        return guarded(train, optimizer, p, o, g, loss, step, total)

    new_params, new_opt, fine = jax.vmap(single, in_axes=axes, out_axes=(axes[0], axes[1], 0))(
        params, opt_state, grads, losses, state.step, totals
    )
    skipped = state.skipped.at[index].add(jnp.where(fine, 0, 1))
    streak = state.streak.at[index].set(jnp.where(fine, 0, state.streak[index] + 1))
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=put(state.params, new_params),
        opt_state=put(state.opt_state, new_opt),
        skipped=skipped,
        streak=streak,
    )


def update_router(
    train: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Trained,
    loss: jax.Array,
    total: int,
    previous: jax.Array,
) -> TrainState:
    """One step of stage 2; gamma stays a set of positive weights that sum to one."""
    params, opt_state, fine = guarded(
        train, optimizer, state.params, state.opt_state, grads, loss, state.step, total
    )  # fmt: skip
    if "gamma" in params:
        positive = jnp.maximum(params["gamma"], 1e-4)
        params["gamma"] = jnp.where(fine, positive / jnp.sum(positive), params["gamma"])
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        previous=jnp.where(fine, previous, state.previous),
        skipped=state.skipped + jnp.where(fine, 0, 1),
        streak=jnp.where(fine, 0, state.streak + 1),
    )


def after_validation(state: TrainState, losses: jax.Array, active: jax.Array) -> TrainState:
    """Keep the leaves of each active expert whose validation loss [E] is its lowest so far."""
    assert state.best is not None and state.best_loss is not None and state.best_step is not None
    assert state.waited is not None
    better = active & (losses < state.best_loss)

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(1, -1, *[1] * (new.ndim - 2)), new, old)

    return dataclasses.replace(
        state,
        best=jax.tree.map(pick, state.params, state.best),
        best_loss=jnp.where(better, losses, state.best_loss),
        best_step=jnp.where(better, state.step, state.best_step),
        waited=jnp.where(better, 0, state.waited + active.astype(jnp.int32)),
    )
