"""Stage 1 trains the experts, stage 2 the router, both in terms of one loop."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trinityx_jax.backbone import Backbone
from trinityx_jax.config import RunConfig, TrainConfig, save_config
from trinityx_jax.data.batching import TrainingBatches, evaluation_batches
from trinityx_jax.data.templates import Encoded
from trinityx_jax.errors import UserError
from trinityx_jax.experts import ATTENTION, TaskVector, gamma, init_expert, stack, unstack
from trinityx_jax.mocae import Router, hidden_states, init_router, token_routing
from trinityx_jax.mocae.attention import check_policy
from trinityx_jax.mocae.calibration import calibrated_temperature, selected
from trinityx_jax.runs import RunFolder, save_router
from trinityx_jax.training.checkpoint import Checkpoints
from trinityx_jax.training.loop import run_steps
from trinityx_jax.training.optimizer import make_optimizer
from trinityx_jax.training.rows import load_training_rows
from trinityx_jax.training.step import (
    TrainState,
    expert_step,
    router_step,
    trained_experts,
    trained_router,
    with_trained,
)

log = logging.getLogger(__name__)
UNREPEATED = {"out", "evaluate", "checkpoint"}  # sections that do not change what a stage computes


def settings(config: RunConfig) -> dict[str, Any]:
    """What of the configuration decides a stage's result."""
    values = config.model_dump(mode="json", by_alias=True)
    return {key: value for key, value in values.items() if key not in UNREPEATED}


def train_experts(config: RunConfig, backbone: Backbone) -> dict[str, TaskVector]:
    """Stage 1: each expert on its own rows, the base frozen. Goes on where an earlier call stopped.

    Writes ``experts/NAME``, ``metrics.jsonl`` and ``config-experts.yaml`` in the run folder.

    Raises:
        UserError: the rows or the configuration are wrong, or the run folder holds another run.
        Stopped: a signal asked for it; state was saved.
    """
    rows = load_training_rows(config, backbone).train
    run = RunFolder(config.out)
    run.open(backbone, config.model)
    run.begin("experts", settings(config))
    save_config(config, run.path / "config-experts.yaml", "experts")
    names = config.experts.names
    groups = [names] if config.train.mode == "joint" else [[name] for name in names]
    vectors: dict[str, TaskVector] = {}
    for group in groups:
        stage = "experts" if len(groups) == 1 else f"experts/{group[0]}"
        vectors |= _train_group(config, backbone, run, stage, {name: rows[name] for name in group})
    run.save_experts(vectors)
    run.finish("experts", names=names, rows={n: len(r) for n, r in rows.items()})
    return vectors


def _train_group(
    config: RunConfig, backbone: Backbone, run: RunFolder, stage: str, rows: dict[str, list[Encoded]]
) -> dict[str, TaskVector]:
    """Train the experts of one group in one compiled step."""
    e, train, names = config.experts, config.train, list(rows)
    experts = stack([init_expert(backbone.config, e.rank, e.alpha, e.sites, config.seed, n) for n in names])
    batches = TrainingBatches(rows, train.batch_size, _pad_id(backbone), config.seed)
    total = total_steps(train, batches)
    optimizer = make_optimizer(train, total, per_expert=True)
    dtype = jnp.dtype(config.dtype)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(config.seed + 1), zlib.crc32(n.encode())) for n in names])
    update = expert_step(backbone.config, optimizer, dtype=dtype, dropout=e.dropout, remat=train.remat)
    compiled = jax.jit(update, donate_argnums=0)
    trained = jax.tree.map(jnp.copy, trained_experts(experts))
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), jnp.zeros(()))

    def describe(metrics: Any) -> dict[str, float]:
        out = {"loss": float(metrics["loss"].mean())}
        for index, name in enumerate(names):
            out[f"loss/{name}"] = float(metrics["loss"][index])
            out[f"grad_norm/{name}"] = float(metrics["grad_norm"][index])
        return out

    checkpoints = Checkpoints(run.path / "checkpoints" / stage, config.checkpoint)
    state = run_steps(
        state, lambda s, b: compiled(s, backbone.params, experts, keys, b), batches, total,
        stage=stage, metrics_path=run.metrics_path, checkpoints=checkpoints, describe=describe,
    )  # fmt: skip
    checkpoints.close()
    origin = {"base": backbone.fingerprint, "rank": e.rank, "alpha": e.alpha, "steps": total}
    done = with_trained(experts, state.params)
    return {n: TaskVector(v.sites, {**origin, "objective": n}) for n, v in zip(names, unstack(done), strict=True)}


def total_steps(train: TrainConfig, batches: TrainingBatches) -> int:
    """Steps of a stage: ``train.steps``, or ``train.epochs`` of the largest objective (the others repeat)."""
    if train.steps is not None:
        return train.steps
    total = max(1, round(train.epochs * batches.steps_per_epoch))
    seen = {name: total / order.batches_per_epoch for name, order in batches.orders.items()}
    if max(seen.values()) > 1.5 * min(seen.values()):
        log.warning("train.epochs: %s", ", ".join(f"{name} is seen {times:.1f} times" for name, times in seen.items()))
    return total


def train_router(config: RunConfig, backbone: Backbone, vectors: Mapping[str, TaskVector]) -> Router:
    """Stage 2: gamma~, then the router on the objectives' rows in equal share, then its temperature.

    Writes ``router/``, ``metrics.jsonl`` and ``config-router.yaml`` in the run folder.

    Raises:
        UserError: as ``train_experts``; the experts' names differ from the configuration's, or they hold
            attention deltas and it does not say what for.
        Stopped: a signal asked for it; state was saved.
    """
    names = config.experts.names
    if set(vectors) != set(names):
        raise UserError(f"experts: the configuration names {', '.join(names)}, found {', '.join(vectors)}")
    vectors = {name: vectors[name] for name in names}
    sites = {site: None for vector in vectors.values() for site in vector.sites}
    check_policy(config.mocae_config(), sites)
    if config.mocae_config().attention_deltas is not None and not set(sites) & set(ATTENTION):
        raise UserError("mocae.attention_deltas: no expert holds attention deltas; remove the key")
    rows = load_training_rows(config, backbone)
    run = RunFolder(config.out)
    run.open(backbone, config.model)
    run.begin("router", settings(config))
    _own_experts(config, run, vectors)
    save_config(config, run.path / "config-router.yaml", "router")
    mocae = config.mocae_config()
    static = gamma(vectors, similarity=mocae.gamma_similarity)
    router = init_router(backbone.config, names, static, mocae, config.seed)
    experts = stack(list(vectors.values()))
    router = _train_router(config, backbone, run, rows.train, experts, router)
    before = float(router.temperature)
    router = calibrate(config, backbone, experts, router, rows.calibration)
    save_router(router, run.path / "router", backbone.fingerprint)
    facts = {
        "temperature_before": before,
        "temperature": float(router.temperature),
        "gamma": dict(zip(names, np.asarray(router.gamma).tolist(), strict=True)),
        "rows": {n: [len(rows.train[n]), len(rows.calibration[n])] for n in names},
    }
    run.finish("router", **facts)
    return router


def _own_experts(config: RunConfig, run: RunFolder, vectors: Mapping[str, TaskVector]) -> None:
    """Copy experts that come from elsewhere into the run, so that it is self-contained."""
    done, source = run.done("experts"), config.experts.source
    if source is None:
        return
    if done is not None and done.get("source") != source:
        raise UserError(f"{run.path}: holds experts of its own; remove experts.from, or choose another --out")
    run.save_experts(vectors)
    run.begin("experts", {})
    run.finish("experts", names=list(vectors), source=source)


def _train_router(
    config: RunConfig, backbone: Backbone, run: RunFolder, rows: dict[str, list[Encoded]], experts: Any, router: Router
) -> Router:
    train = config.train
    batches = TrainingBatches(rows, train.batch_size, _pad_id(backbone), config.seed + 1)
    total = total_steps(train, batches)
    optimizer = make_optimizer(train, total, per_expert=False)
    update = router_step(backbone.config, optimizer, dtype=jnp.dtype(config.dtype), remat=train.remat)
    compiled = jax.jit(update, donate_argnums=0)
    key = jax.random.key(config.seed + 2)
    trained = jax.tree.map(jnp.copy, trained_router(router))
    count = len(router.names)
    previous = jnp.full((backbone.config.num_layers, count), 1.0 / count)
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), previous)

    def describe(metrics: Any) -> dict[str, float]:
        out = {k: float(v) for k, v in metrics.items() if k != "load"}
        return out | {f"load/{n}": float(x) for n, x in zip(router.names, metrics["load"], strict=True)}

    checkpoints = Checkpoints(run.path / "checkpoints" / "router", config.checkpoint)
    state = run_steps(
        state, lambda s, b: compiled(s, backbone.params, experts, router, key, b), batches, total,
        stage="router", metrics_path=run.metrics_path, checkpoints=checkpoints, describe=describe,
    )  # fmt: skip
    checkpoints.close()
    return dataclasses.replace(router, **state.params)


def calibrate(
    config: RunConfig, backbone: Backbone, experts: Any, router: Router, rows: dict[str, list[Encoded]]
) -> Router:
    """The router with the temperature that fits the objective id on held-out rows (METHOD 4)."""
    flat = [e for part in rows.values() for e in part]
    labels = np.repeat(np.arange(len(rows)), [len(part) for part in rows.values()])

    @jax.jit
    def router_logits(base: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        _, aux, _ = hidden_states(
            base, backbone.config, tokens, mask, experts=experts, router=router, dtype=jnp.dtype(config.dtype)
        )
        return token_routing(aux, "z")

    z: dict[int, np.ndarray] = {}
    for index, batch in evaluation_batches(flat, labels.tolist(), config.evaluate.batch_size, _pad_id(backbone)):
        found = np.asarray(router_logits(backbone.params, batch.tokens, batch.mask))
        for row, i in enumerate(index):
            z[int(i)] = selected(found[row][batch.mask[row]], router.config.top_k)
    temperature = calibrated_temperature([z[i] for i in range(len(flat))], labels, float(router.temperature))
    return dataclasses.replace(router, temperature=jnp.asarray(temperature, jnp.float32))


def _pad_id(backbone: Backbone) -> int:
    """Any id serves: padding is masked by position."""
    pad = backbone.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)
