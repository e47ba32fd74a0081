"""Stage 2: gamma~, the router on the objectives' rows in equal share, then its temperature."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trinityx_jax.backbone import Backbone
from trinityx_jax.backbone.products import packed
from trinityx_jax.config import SCRATCH, RunConfig, save_config
from trinityx_jax.data.batching import Batch, Split, TrainingBatches, evaluation_batches, validation_batches
from trinityx_jax.data.templates import Encoded
from trinityx_jax.errors import UserError
from trinityx_jax.experts import ATTENTION, TaskVector, gamma, init_expert, stack, unstack
from trinityx_jax.mocae import Router, init_router
from trinityx_jax.mocae.attention import check_policy
from trinityx_jax.mocae.model import prepared
from trinityx_jax.mocae.router import extended
from trinityx_jax.parallel.multihost import agreed, on_first
from trinityx_jax.parallel.sharding import batch_shards, mesh_of, on_this_host, put, put_trained, replicated, split_of
from trinityx_jax.run_folder import UNCALIBRATED, RunFolder
from trinityx_jax.runs import (
    expert_digests,
    forget_router,
    gamma_reference,
    load_experts,
    load_trained_router,
    router_digest,
    save_experts,
    save_router,
)
from trinityx_jax.training.calibration import RoutingReader, calibrate
from trinityx_jax.training.checkpoint import check_about, under_way
from trinityx_jax.training.flops import router_flops
from trinityx_jax.training.loggers import check_loggers
from trinityx_jax.training.loop import run_steps
from trinityx_jax.training.programs import RouterProgram, router_start
from trinityx_jax.training.rows import Rows, load_training_rows, pad_id
from trinityx_jax.training.seen import warn_of_calibration
from trinityx_jax.training.settings import MAY_CHANGE, data_settings, guard_of
from trinityx_jax.training.state import TrainState, after_validation
from trinityx_jax.training.step import after_stage_2, trained_experts
from trinityx_jax.training.validation import gammas, held_out_sums, mean_losses, mixture_sums

log = logging.getLogger(__name__)
UNREPEATED = {
    "out",
    "evaluate",
    "checkpoint",
    "data",
    "system",
    "mesh",
    "logging",
    "profile",
}  # sections that do not change what the stage computes
TOLD = ("streak", "skipped", "back_to", "diverged")  # metrics that are told apart


def router_settings(config: RunConfig) -> dict[str, Any]:
    """What of the configuration decides the router that comes out."""
    values = config.model_dump(mode="json", by_alias=True, exclude={"train": {*MAY_CHANGE, "anew"}})
    kept = {key: value for key, value in values.items() if key not in UNREPEATED}
    kept["weights"] = _digests(config)
    kept["mocae"] = dataclasses.asdict(config.mocae_config())
    del kept["router"]
    if config.router.source is not None:
        kept["router"] = {"from": config.router.source, "weights": router_digest(config.router.source)}
    return kept | data_settings(config, config.data)


def _digests(config: RunConfig) -> dict[str, str | None] | None:
    """Of the weights of the experts that it begins with, and of gamma's reference; None where they are new."""
    source, reference = config.experts.source or config.out, config.mocae_config().gamma_reference
    if source == SCRATCH:
        return None
    names = [*config.experts.names, *([] if reference is None else [reference])]
    found = expert_digests(source, names)
    if reference is not None and found[reference] is None:  # a path
        found |= expert_digests({reference: reference}, [reference])
    return found


def router_done(config: RunConfig) -> bool:
    """Whether the run has this configuration's router.

    Raises:
        UserError: it has another one, and ``train.anew`` is not set.
    """
    run = RunFolder(config.out)
    changed = run.changed("router", router_settings(config))
    saved = run.done("router") is not None or under_way(_checkpoints(run)) is not None
    if changed is not None and not config.train.anew and saved:
        raise UserError(
            f"{run.path}: its router was begun with other settings ({changed}); train it anew with --train.anew true, "
            "or choose another --out"
        )
    return changed is None and run.done("router") is not None


def stage_experts(config: RunConfig, backbone: Backbone) -> dict[str, TaskVector]:
    """The experts that stage 2 begins with: the run's own, those of ``experts.from``, or new ones."""
    e = config.experts
    if e.source == SCRATCH:
        return {n: init_expert(backbone.config, e.rank, e.alpha, e.sites, config.seed, n) for n in e.names}
    return load_experts(e.source or config.out, backbone.fingerprint, backbone.config)


def train_router(config: RunConfig, backbone: Backbone, vectors: Mapping[str, TaskVector]) -> Router:
    """Train the router over experts by name; others than the configuration's serve as gamma's reference at most.

    Writes ``router/``, ``metrics.jsonl`` and ``config-router.yaml`` in the run folder, and ``experts/`` where they
    come from elsewhere or are trained too.

    Raises:
        UserError: the rows or the configuration are wrong, or the run folder holds another run; an expert is
            missing, or they hold attention deltas and the configuration does not say what for.
        Stopped: a signal asked for it; state was saved.
    """
    mocae, run = config.mocae_config(), RunFolder(config.out)
    check_router(config)
    check_loggers(config.logging)
    own = _own(config, vectors)
    start = agreed(_start(config, backbone, own, vectors))  # gamma is computed by each host
    rows = None
    if mocae.routing != "uniform":
        rows = load_training_rows(config, backbone, together=True)
        warn_of_calibration(config)
    elif config.model_fields_set & {"train", "checkpoint", "logging", "profile"}:
        log.warning(
            "%s: routing is uniform: nothing is trained; only seq_len of train, and nothing of checkpoint, logging and "
            "profile, matters",
            run.path,
        )
    if rows is not None and run.changed("router", router_settings(config)) is None:  # or it begins anew
        check_about(_checkpoints(run), _about(config, backbone, own))
    on_first(_open, config, backbone, run, own, rows is None)
    counts, steps = {name: [0, 0] for name in own}, 0
    router = start
    if rows is not None:
        router, tuned, steps = _Stage(config, backbone, rows, own, start).train(run)
        if mocae.train_experts:
            on_first(save_experts, _trained(own, tuned, backbone), run)
        on_first(save_router, router, run.path / UNCALIBRATED, backbone.fingerprint)
        router = agreed(calibrated_on(config, backbone, tuned, router, rows.calibration))
        counts = {n: [len(rows.train[n]), len(rows.calibration[n])] for n in own}
    on_first(_keep, config, backbone, run, router, rows=counts, steps=steps)
    return router


def _open(
    config: RunConfig, backbone: Backbone, run: RunFolder, own: Mapping[str, TaskVector], untrained: bool
) -> None:
    """Begin the stage in the run folder."""
    run.open(backbone, config.model)
    settings = router_settings(config)
    if run.changed("router", settings) is not None:  # it is to be trained anew, or nothing of it was saved
        forget_router(run)
    run.begin("router", settings)
    if untrained:  # as training left it, of a router that was here before
        shutil.rmtree(run.path / UNCALIBRATED, ignore_errors=True)
    _own_experts(config, run, own)
    save_config(config.model_copy(update={"profile": None}), run.path / "config-router.yaml", "router")


def _keep(config: RunConfig, backbone: Backbone, run: RunFolder, router: Router, **facts: Any) -> None:
    """Write the router, and what later readers want to know of it."""
    save_router(router, run.path / "router", backbone.fingerprint)
    run.finish(
        "router",
        **facts,
        temperature_trained=config.mocae_config().temperature,
        temperature=np.asarray(router.temperature).tolist(),
        calibration=router.config.calibration,
        gamma=dict(zip(router.names, np.asarray(router.gamma).tolist(), strict=True)),
    )


def _checkpoints(run: RunFolder) -> Path:
    """Where the stage's state is saved."""
    return run.path / "checkpoints" / "router"


def _about(config: RunConfig, backbone: Backbone, experts: Mapping[str, TaskVector]) -> dict[str, Any]:
    """What a checkpoint of the stage is of."""
    stacked = jax.eval_shape(lambda: stack(list(experts.values())))
    rank = next(iter(stacked.values()))["a"].shape[-1]
    about = {"base": backbone.fingerprint, "experts": list(experts), "rank": rank, "sites": list(stacked)}
    return about | {"guard": guard_of(config)}


def check_router(config: RunConfig) -> None:
    """Raise UserError where the run, or another of its keys, does not allow what the configuration asks for."""
    mocae, source = config.mocae_config(), config.experts.source
    if mocae.gamma_dynamic and config.train.evaluate_every is None:
        raise UserError("mocae.gamma_dynamic: train.evaluate_every is needed, gamma moves after each evaluation")
    done = RunFolder(config.out).done("experts")
    if source is not None and done is not None and done.get("source") != source:
        if done.get("source") is not None:
            raise UserError(f"{config.out}: its experts were copied from {done['source']}; choose another --out")
        raise UserError(f"{config.out}: holds experts of its own; remove experts.from, or choose another --out")
    if mocae.train_experts and source in (None, config.out):
        raise UserError(
            "mocae.train_experts: would replace the experts that this run holds; choose another --out, and name "
            "their run in experts.from"
        )
    if config.router.source is not None:
        if mocae.routing == "uniform":
            raise UserError("router.from: has no effect where mocae.routing is uniform; remove it")
        begun = Path(config.router.source).resolve()
        if Path(config.out).resolve() in (begun, *begun.parents):
            raise UserError(f"router.from: {begun} is this run's own, which it replaces; choose another --out")


def _own(config: RunConfig, vectors: Mapping[str, TaskVector]) -> dict[str, TaskVector]:
    """The configuration's experts; raises where one is missing, or they do not allow what it asks for."""
    names, mocae = config.experts.names, config.mocae_config()
    missing = [name for name in names if name not in vectors]
    if missing:
        raise UserError(f"experts: the configuration names {missing[0]!r}, found {', '.join(vectors)}")
    own = {name: vectors[name] for name in names}
    sites = {site: None for vector in own.values() for site in vector.sites}
    check_policy(mocae, sites)
    if mocae.attention_deltas is not None and not set(sites) & set(ATTENTION):
        raise UserError("mocae.attention_deltas: no expert holds attention deltas; remove the key")
    return own


def _start(
    config: RunConfig, backbone: Backbone, own: Mapping[str, TaskVector], vectors: Mapping[str, TaskVector]
) -> Router:
    """The router before its first step, with its gamma."""
    mocae = config.mocae_config()
    against = gamma_reference(mocae, vectors, backbone)
    static = gamma(own, against, mocae.gamma_similarity, mocae.gamma_floor)
    if mocae.weight == "convex" and mocae.top_k is not None and not np.all(np.asarray(static) > 0):
        raise UserError("mocae.top_k: could select experts whose gamma is 0 alone; set a mocae.gamma_floor above 0")
    router = init_router(backbone.config, list(own), static, mocae, config.seed)
    if config.router.source is None:
        return router
    return extended(router, load_trained_router(config.router.source, backbone.fingerprint))


def _trained(own: Mapping[str, TaskVector], tuned: Any, backbone: Backbone) -> dict[str, TaskVector]:
    """The experts as the stage left them, which are of this base now, and no adapters that came from elsewhere."""
    kept = {n: {key: value for key, value in v.origin.items() if key != "peft"} for n, v in own.items()}
    base = {"base": backbone.fingerprint}
    return {n: TaskVector(v.sites, kept[n] | base) for n, v in zip(own, unstack(tuned), strict=True)}


def _own_experts(config: RunConfig, run: RunFolder, vectors: Mapping[str, TaskVector]) -> None:
    """Copy experts that come from elsewhere into the run, so that it is self-contained."""
    if config.experts.source is None:
        return
    save_experts(vectors, run)
    run.finish("experts", names=list(vectors), source=config.experts.source)
    for folder in (run.path / "experts").iterdir():  # copies for a router that this one replaces
        if folder.is_dir() and folder.name not in vectors:
            shutil.rmtree(folder)


class _Stage:
    """The router's training (``loop.Work``)."""

    def __init__(
        self, config: RunConfig, backbone: Backbone, rows: Rows, vectors: Mapping[str, TaskVector], router: Router
    ):
        train = config.train
        self.config, self.backbone, self.rows, self.router = config, backbone, rows, router
        self.names = tuple(rows.train)
        self.mesh = mesh_of(backbone.params)
        self._constants = put(router, replicated(self.mesh))
        self.experts = put_trained(stack(list(vectors.values())), self.mesh)
        self._about = _about(config, backbone, vectors)
        self.base, split = packed(backbone.params), split_of(self.mesh)
        self.batches = TrainingBatches(
            rows.train, train.batch_size, pad_id(backbone), config.seed + 1, join=True, split=split
        )
        self.total = train.steps or _steps_of_epochs(self.batches, train.epochs)
        shapes = jax.eval_shape(self._start)
        self.program = RouterProgram(config, backbone.config, self.total, self.mesh, shapes)
        key = functools.partial(jax.random.key, config.seed + 2)
        self.key = jax.jit(key, out_shardings=replicated(self.mesh))()
        self._held = self._held_out() if train.evaluate_every is not None else []
        self._sums = mixture_sums(backbone.config, self.program.dtype, self.mesh)
        self._after = jax.jit(after_validation, donate_argnums=0, out_shardings=self.program.shardings)
        self._gamma = self._gammas() if router.config.gamma_dynamic else {}
        once = not router.config.train_experts and router.config.mixing != "full"  # which would be E bases
        self._served = self.experts
        if once:  # cast and laid out
            self._served = put_trained(jax.jit(prepared)(self.base, self.experts, self._constants), self.mesh)

    def train(self, run: RunFolder) -> tuple[Router, Any, int]:
        """The trained router, its stacked experts and the step that they are of, from the newest checkpoint on."""
        state = run_steps(
            self.start(), self, self.total, self.config, stage="router", folder=_checkpoints(run),
            about=self._about, mesh=self.mesh, split=self.program.split,
        )  # fmt: skip
        if int(state.skipped) >= int(state.step):
            raise UserError("router: no step had a finite loss, gradient and result; nothing was learned")
        if int(state.skipped):
            log.warning("router: %d steps were not finite and changed nothing", int(state.skipped))
        step, leaves = int(state.step), state.params
        if state.best is not None and state.best_step is not None:
            step, leaves = int(state.best_step), state.best
        trained, experts = on_this_host((leaves, self.experts), self.mesh)
        return *after_stage_2(trained, self._at(step), experts), step

    def start(self) -> TrainState:
        """The state before the first step."""
        return put(self._start(), self.program.shardings)

    def _start(self) -> TrainState:
        return router_start(self.config, self.backbone.config, self.router, self.experts)

    def active(self, state: TrainState) -> tuple[str, ...]:
        patience = self.config.train.patience
        return () if patience is not None and int(np.asarray(state.waited)) >= patience else self.names

    def until(self, step: int) -> int:
        every = self.config.train.evaluate_every
        return self.total if every is None else step - step % every + every

    def serve(self, start: int, stop: int, names: tuple[str, ...]) -> Iterator[Batch]:
        return self.batches.serve(start, stop, names)

    def step(self, state: TrainState, batch: Mapping[str, Any], names: tuple[str, ...]) -> tuple[TrainState, Any]:
        router = self._constants
        if self._gamma:  # asking the step would wait for it
            gamma = put(self._at(int(state.step)).gamma, replicated(self.mesh))
            router = dataclasses.replace(router, gamma=gamma)
        return self.program.update(state, self.base, self._served, router, self.key, batch)

    def flops(self, batch: Batch, names: tuple[str, ...]) -> float:
        context, count = batch.pairs / max(batch.token_count, 1), len(self.router.names)
        rank, trained = next(iter(self.experts.values()))["a"].shape[-1], self.router.config.train_experts
        return router_flops(
            self.backbone.config, batch.token_count, context, batch.supervised, rank, list(self.experts), count, trained
        )

    def describe(self, metrics: Any, names: tuple[str, ...]) -> dict[str, float]:
        out = {k: float(v) for k, v in metrics.items() if k not in ("load", *TOLD)}
        if metrics["skipped"]:
            out["skipped"] = int(metrics["skipped"])
        return out | {f"load/{n}": float(x) for n, x in zip(self.router.names, metrics["load"], strict=True)}

    def validate(self, state: TrainState, names: tuple[str, ...]) -> tuple[TrainState, dict[str, float]]:
        """The mixture's held-out loss on each objective's rows, and the dynamic gamma that the next steps have."""
        if self.config.train.evaluate_every is None:
            return state, {}
        own = self._at(int(state.step))
        placed = put(own, replicated(self.mesh))
        router, experts = after_stage_2(state.params, placed, self._served)
        whole = Split(batch_shards(self.mesh))
        losses = mean_losses(self._sums, (self.base, experts, router), self._held, self.mesh, whole)
        values = {f"validation/{n}": float(x) for n, x in zip(self.names, losses, strict=True)}
        if self._gamma:
            values |= {f"gamma/{n}": float(x) for n, x in zip(self.names, own.gamma, strict=True)}
        return self._after(state, losses.mean().astype(np.float32), np.bool_(True)), values

    def _held_out(self) -> list[Batch]:
        """Every objective's held-out rows."""
        held = self.rows.validation
        labels = np.repeat(np.arange(len(held)), [len(part) for part in held.values()]).tolist()
        rows, split = [row for part in held.values() for row in part], Split(batch_shards(self.mesh))
        size, pad = self.config.evaluate.batch_size, pad_id(self.backbone)
        return [batch for _, batch in evaluation_batches(rows, labels, size, pad, split)]

    def places(self, step: int, bad: np.ndarray, names: tuple[str, ...]) -> list[str]:
        return [row.place for name in names for slot in self.batches.slots(step, name) for row in slot]

    def _at(self, step: int) -> Router:
        """The router's constants at a step: gamma has moved once for every evaluation before it."""
        if not self._gamma:
            return self.router
        return dataclasses.replace(self.router, gamma=self._gamma[step // (self.config.train.evaluate_every or 1)])

    def _gammas(self) -> dict[int, jax.Array]:
        """Dynamic gamma after each evaluation. The experts are frozen, and with them their losses on held-out rows."""
        held = [row for part in self.rows.validation.values() for row in part]
        every = self.config.train.evaluate_every or 1
        if every > self.total:
            raise UserError(
                f"train.evaluate_every: {every} is more than the {self.total} steps, and mocae.gamma_dynamic moves "
                "gamma after an evaluation"
            )
        zeros = jax.tree.map(jnp.zeros_like, trained_experts(self.experts))
        split = self.program.split
        sums = held_out_sums(self.backbone.config, self.program.dtype, self.mesh, split)
        shared = dict.fromkeys(self.names, held)
        batches = validation_batches(shared, self.config.evaluate.batch_size, pad_id(self.backbone), split)
        losses = [
            mean_losses(sums, (params, self.base, self.experts), batches, self.mesh, split)
            for params in (trained_experts(self.experts), zeros)
        ]
        return gammas(self.router.gamma, losses[0], losses[1], every, self.total)


def _steps_of_epochs(batches: TrainingBatches, epochs: float) -> int:
    """Steps of so many epochs of the largest objective; the others repeat, which is said where it is much."""
    total = max(order.steps(epochs) for order in batches.orders.values())
    seen = {name: epochs * total / order.steps(epochs) for name, order in batches.orders.items()}
    if max(seen.values()) > 1.5 * min(seen.values()):
        log.warning("train.epochs: %s", ", ".join(f"{name} is seen {times:.1f} times" for name, times in seen.items()))
    return total


def calibrated_on(
    config: RunConfig, backbone: Backbone, experts: Any, router: Router, rows: Mapping[str, list[Encoded]]
) -> Router:
    """The router with what ``mocae.calibration`` says fitted to the objective id on held-out rows."""
    flat = [e for part in rows.values() for e in part]
    labels = np.repeat(np.arange(len(rows)), [len(part) for part in rows.values()])
    reader = RoutingReader(backbone, experts, config.dtype, config.evaluate.batch_size)
    return calibrate(reader, router, flat, labels, router.config.calibration)
