"""Loss and one update, for both stages; pure. Gradients are taken over the trained leaves only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from trinityx_jax.backbone import BackboneConfig, Decoder
from trinityx_jax.experts.lora import Experts
from trinityx_jax.mocae import Router, hidden_states, losses, token_routing
from trinityx_jax.mocae.attention import grouped_attention, split_sites
from trinityx_jax.mocae.mixture import grouped_feed_forward
from trinityx_jax.training.loss import mean_by_group, supervised_nll
from trinityx_jax.training.optimizer import expert_norms

Arrays = Mapping[str, jax.Array]
Trained = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """What a step changes: the trained leaves, the optimizer's, the step, and pi_prev [L,E] in stage 2."""

    step: jax.Array
    params: Trained
    opt_state: Any
    previous: jax.Array


def trained_experts(experts: Experts) -> Trained:
    """The leaves of stage 1: a and b; the scale is a constant."""
    return {site: {"a": x["a"], "b": x["b"]} for site, x in experts.items()}


def with_trained(experts: Experts, trained: Trained) -> dict[str, dict[str, jax.Array]]:
    """The whole experts' tree around trained a and b."""
    return {site: {**trained[site], "scale": x["scale"]} for site, x in experts.items()}


def trained_router(router: Router) -> Trained:
    """The leaves of stage 2: kernel and bias; gamma and the output norm by switch."""
    out: Trained = {"kernel": router.kernel, "bias": router.bias}
    if router.config.train_gamma:
        out["gamma"] = router.gamma
    if router.config.train_norm:
        out["norm"] = router.norm
    return out


def expert_loss(
    trained: Trained,
    base: Mapping[str, Any],
    experts: Experts,
    config: BackboneConfig,
    batch: Arrays,
    *,
    dtype: Any = jnp.float32,
    dropout: float = 0.0,
    keys: jax.Array | None = None,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Sum over experts of each one's mean loss on its own rows, so experts do not influence each other.

    Args:
        batch: rows grouped by expert in the stacked order (see ``TrainingBatches``).
        keys: dropout keys [L,E]; None is evaluation.

    Returns:
        the sum, and the loss per expert [E].
    """
    whole = with_trained(experts, trained)
    count = next(iter(whole.values()))["a"].shape[1]
    own, attention = split_sites(whole)
    inputs: dict[str, Any] = {"experts": own, "attention": attention}
    if keys is not None:
        inputs["keys"] = keys
    project = grouped_attention(dropout) if attention else None
    decoder = Decoder(config, grouped_feed_forward(config, dropout), dtype, remat, project)
    hidden: Any = decoder.apply({"params": base}, batch["tokens"], batch["mask"], inputs)[0]
    nll = supervised_nll(base, config, hidden, batch["where"], batch["labels"])
    rows, length = batch["tokens"].shape
    group = batch["where"] // length // (rows // count)
    means, _ = mean_by_group(nll, batch["valid"], group, count)
    return jnp.sum(means), means


def router_loss(
    trained: Trained,
    base: Mapping[str, Any],
    experts: Experts,
    router: Router,
    previous: jax.Array,
    config: BackboneConfig,
    batch: Arrays,
    *,
    dtype: Any = jnp.float32,
    dropout: jax.Array | None = None,
    remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = L_task + lambda_entropy L_entropy + lambda_kl L_KL + lambda_gate L_gate (paper 3.2, METHOD 2).

    Returns:
        the loss, and its parts with ``gate_accuracy`` and the batch's mean routing [L,E].
    """
    router = dataclasses.replace(router, **trained)
    mocae = router.config
    hidden, aux, _ = hidden_states(
        base, config, batch["tokens"], batch["mask"], experts=experts, router=router, dtype=dtype,
        dropout=dropout, remat=remat,
    )  # fmt: skip
    nll = supervised_nll(base, config, hidden, batch["where"], batch["labels"])
    task, _ = mean_by_group(nll, batch["valid"], jnp.zeros_like(batch["where"]), 1)
    pi, mask = token_routing(aux), batch["mask"]
    mean = losses.mean_routing(pi, mask)
    parts = {
        "loss_task": task[0],
        "loss_entropy": losses.entropy_loss(pi, mask, mocae.entropy),
        "loss_kl": losses.kl_loss(mean, previous),
        "loss_gate": losses.gate_loss(pi, mask, batch["objective"]),
    }
    total = parts["loss_task"]
    for name, weight in (("entropy", mocae.lambda_entropy), ("kl", mocae.lambda_kl), ("gate", mocae.lambda_gate)):
        if weight:
            total = total + weight * parts[f"loss_{name}"]
    real = jnp.any(mask, axis=1)
    hit = (jnp.argmax(losses.row_routing(pi, mask), axis=-1) == batch["objective"]) & real
    parts["gate_accuracy"] = jnp.sum(hit) / jnp.maximum(jnp.sum(real), 1)
    return total, {**parts, "mean_routing": mean}


def expert_step(
    config: BackboneConfig, optimizer: optax.GradientTransformation, *, dtype: Any, dropout: float, remat: str
) -> Callable[..., tuple[TrainState, Arrays]]:
    """One stage 1 update: (state, base, experts, keys [E], batch) -> (state, metrics). Jit with state donated."""

    def step(state: TrainState, base: Any, experts: Experts, keys: jax.Array, batch: Arrays) -> Any:
        own = None
        if dropout > 0.0:  # a key per layer and expert, from the expert's own key and the step
            layers = jnp.arange(config.num_layers)
            own = jax.vmap(
                lambda layer: jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, state.step), layer))(keys)
            )(layers)
        (_, per_expert), grads = jax.value_and_grad(expert_loss, has_aux=True)(
            state.params, base, experts, config, batch, dtype=dtype, dropout=dropout, keys=own, remat=remat
        )
        metrics = {"loss": per_expert, "grad_norm": expert_norms(grads)}
        return _update(state, grads, optimizer, state.previous), metrics

    return step


def router_step(
    config: BackboneConfig, optimizer: optax.GradientTransformation, *, dtype: Any, remat: str
) -> Callable[..., tuple[TrainState, Arrays]]:
    """One stage 2 update: (state, base, experts, router, key, batch) -> (state, metrics)."""

    def step(state: TrainState, base: Any, experts: Experts, router: Router, key: jax.Array, batch: Arrays) -> Any:
        dropout = jax.random.fold_in(key, state.step) if router.config.dropout > 0.0 else None
        (loss, parts), grads = jax.value_and_grad(router_loss, has_aux=True)(
            state.params, base, experts, router, state.previous, config, batch,
            dtype=dtype, dropout=dropout, remat=remat,
        )  # fmt: skip
        mean = parts.pop("mean_routing")
        previous = losses.next_previous(mean, state.previous, router.config.kl)
        metrics = {"loss": loss, **parts, "grad_norm": optax.tree.norm(grads), "load": jnp.mean(mean, axis=0)}
        return _update(state, grads, optimizer, previous), metrics

    return step


def _update(state: TrainState, grads: Any, optimizer: optax.GradientTransformation, previous: jax.Array) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = dict(optax.apply_updates(state.params, updates))
    if "gamma" in params:  # stays a set of positive weights that sum to one
        positive = jnp.maximum(params["gamma"], 1e-4)
        params["gamma"] = positive / jnp.sum(positive)
    return TrainState(state.step + 1, params, opt_state, previous)
