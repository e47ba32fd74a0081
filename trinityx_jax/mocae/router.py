"""The router: logits, probabilities, selection, calibrated weights (paper 3.2, METHOD 2)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from trinityx_jax.backbone import BackboneConfig
from trinityx_jax.errors import UserError

CHOICES = {
    "router_scope": ("layer", "shared"),
    "weight": ("convex", "product", "anchored"),
    "mixing": ("outputs", "weights"),
    "output": ("prenorm", "gated", "layernorm"),
    "gamma_similarity": ("cosine", "inner", "uniform"),
    "entropy": ("batch_diversity", "token_literal"),
    "kl": ("step", "ema", "token", "layer"),
    "attention_deltas": (None, "drop", "merge", "route"),
}
NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class MoCaEConfig:
    """Every reading of METHOD section 2; the defaults are the ``recommended`` preset.

    Raises:
        UserError: a value is outside its range or not one of its choices.
    """

    temperature: float = 0.7  # tau
    top_k: int | None = None  # None: all experts
    router_scope: str = "layer"
    weight: str = "convex"
    mixing: str = "outputs"
    output: str = "prenorm"
    dropout: float = 0.0
    gamma_similarity: str = "cosine"
    gamma_reference: str | None = None  # an expert's name or path; None: the mean of the experts
    gamma_floor: float | None = None  # what a lower similarity counts as; None: a negative one raises
    gamma_dynamic: bool = False  # moves towards experts that gain most on held-out rows
    entropy: str = "batch_diversity"
    kl: str = "step"
    lambda_entropy: float = 0.1
    lambda_kl: float = 0.01
    lambda_gate: float = 0.1
    train_gamma: bool = False
    train_norm: bool = False
    attention_deltas: str | None = None  # of experts that hold some (METHOD 1); None raises

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise UserError(f"mocae.{name}: {getattr(self, name)!r} is not one of {choices}")
        for name in ("temperature", "dropout", "lambda_entropy", "lambda_kl", "lambda_gate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"mocae.{name}: must be a number, not {value!r}")
        for name in ("train_gamma", "train_norm", "gamma_dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"mocae.{name}: must be true or false, not {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise UserError(f"mocae.temperature: must be positive, not {self.temperature}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"mocae.dropout: must be in [0, 1), not {self.dropout}")
        for name in ("lambda_entropy", "lambda_kl", "lambda_gate"):
            if getattr(self, name) < 0:
                raise UserError(f"mocae.{name}: must not be negative, is {getattr(self, name)}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise UserError(f"mocae.top_k: must be a whole number of at least 1, not {self.top_k!r}")
        if self.train_gamma and self.gamma_dynamic:
            raise UserError("mocae.gamma_dynamic: gamma is trained (train_gamma); choose one")
        if self.gamma_reference is not None and not isinstance(self.gamma_reference, str):
            raise UserError(f"mocae.gamma_reference: must be a name or a path, not {self.gamma_reference!r}")
        if self.train_norm and self.output == "prenorm":
            raise UserError("mocae.train_norm: output 'prenorm' has no norm to train")
        if self.mixing == "weights" and self.weight == "anchored":
            raise UserError("mocae.mixing: 'weights' mixes deltas, which 'anchored' weighting does not apply to")
        if self.output == "gated" and not self.train_norm:
            raise UserError("mocae.output: 'gated' needs train_norm: its gate starts at 0, where it does nothing")


PRESETS: dict[str, MoCaEConfig] = {
    "recommended": MoCaEConfig(),
    "literal": MoCaEConfig(
        router_scope="shared",
        weight="product",
        output="layernorm",
        gamma_similarity="inner",
        entropy="token_literal",
        lambda_gate=0.0,
        train_norm=True,
    ),
}


def preset(name: str, **changes: Any) -> MoCaEConfig:
    """A named preset with some fields changed.

    Raises:
        UserError: there is no such preset, or a field is unknown.
    """
    if name not in PRESETS:
        raise UserError(f"mocae.preset: {name!r} is not one of {', '.join(PRESETS)}")
    known = [field.name for field in dataclasses.fields(MoCaEConfig)]
    for key in changes:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"mocae.{key}: unknown key (nearest: {nearest})")
    return dataclasses.replace(PRESETS[name], **changes)


@flax.struct.dataclass
class Router:
    """Router parameters (float32) and the static switches they go with.

    kernel [L|1,D,E], bias [L|1,E], gamma [E] (normalised), temperature [] or [E]; ``norm`` holds
    scale and bias [L,D] (and gate [L] for ``gated``) where the output reading has a LayerNorm.
    """

    kernel: jax.Array
    bias: jax.Array
    gamma: jax.Array
    temperature: jax.Array
    norm: dict[str, jax.Array]
    config: MoCaEConfig = flax.struct.field(pytree_node=False)
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)


def init_router(
    config: BackboneConfig, names: Sequence[str], gamma: jax.Array, mocae: MoCaEConfig, seed: int = 0
) -> Router:
    """A router with a small random kernel and zero bias: close to uniform at first."""
    count, layers, d = len(names), config.num_layers, config.hidden_size
    if mocae.top_k is not None and mocae.top_k > count:
        raise UserError(f"mocae.top_k: {mocae.top_k} of {count} experts cannot be selected")
    depth = layers if mocae.router_scope == "layer" else 1
    kernel = 0.02 / d**0.5 * jax.random.normal(jax.random.key(seed), (depth, d, count), jnp.float32)
    norm: dict[str, jax.Array] = {}
    if mocae.output != "prenorm":
        norm = {"scale": jnp.ones((layers, d)), "bias": jnp.zeros((layers, d))}
    if mocae.output == "gated":
        norm["gate"] = jnp.zeros((layers,))
    return Router(
        kernel=kernel,
        bias=jnp.zeros((depth, count)),
        gamma=jnp.asarray(gamma, jnp.float32),
        temperature=jnp.asarray(mocae.temperature, jnp.float32),
        norm=norm,
        config=mocae,
        names=tuple(names),
    )


def per_layer(router: Router, layers: int) -> dict[str, Any]:
    """The router as [L,...] leaves for the scan over blocks; a shared one is broadcast."""

    def spread(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[None], (layers, *x.shape))

    def stretch(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (layers, *x.shape[1:])) if x.shape[0] == 1 else x

    return {
        "kernel": stretch(router.kernel),
        "bias": stretch(router.bias),
        "gamma": spread(router.gamma),
        "temperature": spread(router.temperature),
        "norm": dict(router.norm),
    }


def logits(layer: Mapping[str, Any], u: jax.Array) -> jax.Array:
    """z [B,S,E] in float32, before the temperature."""
    kernel = layer["kernel"].astype(jnp.float32)
    z = jnp.einsum("bsd,de->bse", u.astype(jnp.float32), kernel, precision="highest")
    return z + layer["bias"]


def probabilities(z: jax.Array, temperature: jax.Array, top_k: int | None) -> jax.Array:
    """pi = softmax(z / tau) [...,E], the largest top_k kept and renormalised."""
    scaled = z / temperature
    if top_k is not None and top_k < z.shape[-1]:
        _, index = jax.lax.top_k(scaled, top_k)
        kept = jnp.sum(jax.nn.one_hot(index, z.shape[-1], dtype=bool), axis=-2, dtype=bool)
        scaled = jnp.where(kept, scaled, -jnp.inf)
    return jax.nn.softmax(scaled, axis=-1)


def mixture_weights(pi: jax.Array, gamma: jax.Array, weight: str) -> jax.Array:
    """alpha [...,E] in float32: pi * gamma~, renormalised where ``convex``."""
    alpha = pi * gamma
    return alpha / jnp.sum(alpha, axis=-1, keepdims=True) if weight == "convex" else alpha
