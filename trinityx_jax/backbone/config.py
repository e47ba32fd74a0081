"""Geometry of a LLaMA-family decoder, and its translation from and to Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from trinityx_jax.errors import UserError

log = logging.getLogger(__name__)

LLAMA_DEFAULT_THETA = 10000.0  # what LlamaConfig documents for a file without a theta


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Everything the decoder's mathematics depends on.

    Sizes are counts of elements; ``head_dim`` need not be ``hidden_size / num_heads``.
    """

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) <= 0:
                raise UserError(f"backbone config: {name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"backbone config: {self.num_heads} attention heads are not a multiple of "
                f"{self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise UserError(f"backbone config: head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"backbone config: hidden_act {self.activation!r} is not one of {sorted(ACTIVATIONS)}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> BackboneConfig:
        """Read Hugging Face's ``config.json`` as a mapping.

        Raises:
            UserError: the model type, or a field that is set, is not supported; a size is missing or no number.
        """
        if not isinstance(config, Mapping):
            raise UserError(f"{where}: not a model's configuration (expected a JSON object)")
        config = dict(config)
        kind = config.pop("model_type", None)
        if kind != "llama":
            raise UserError(f"{where}: model_type {kind!r} is not supported (supported: llama)")
        values: dict[str, Any] = {}
        for theirs, ours in _FIELDS.items():
            value = config.pop(theirs, None)
            if value is not None:
                values[ours] = value
            if ours in _SIZES and value is not None and (not isinstance(value, int) or value <= 0):
                raise UserError(f"{where}: field {theirs!r} = {value!r} is not a positive whole number")
        values["rope_theta"] = _take_theta(config, where)
        for name in sorted(config.keys() - _NO_EFFECT):
            if config[name] != _NEUTRAL.get(name):
                raise UserError(f"{where}: field {name!r} = {config[name]!r} is not supported")
        missing = [t for t in _REQUIRED if _FIELDS[t] not in values]
        if missing:
            raise UserError(f"{where}: field {missing[0]!r} is missing")
        if not _positive(values["rms_norm_eps"]):
            raise UserError(f"{where}: field 'rms_norm_eps' = {values['rms_norm_eps']!r} is not a positive number")
        values.setdefault("num_kv_heads", values["num_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_heads"])
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` fields of ``LlamaForCausalLM`` (transformers >= 5 rope layout)."""
        out: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        for theirs, ours in _FIELDS.items():
            value = getattr(self, ours)
            out[theirs] = list(value) if isinstance(value, tuple) else value
        out["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        return out


ACTIVATIONS = {"silu"}

# config.json field -> ours
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "hidden_act": "activation",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
# Bookkeeping: says where a file came from, how it was initialised or stored, never what it computes.
_NO_EFFECT = {
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "initializer_range",
    "is_llama_config",
    "transformers_version",
    "transformers.js_config",
    "unk_token_id",
    "use_cache",
}
# Fields that change the mathematics unless they hold this value.
_NEUTRAL = {"pretraining_tp": 1, "attention_dropout": 0.0, "rope_interleaved": False}


def _take_theta(config: dict[str, Any], where: str) -> float:
    """Remove every spelling of the rope settings from ``config`` and return theta."""
    theta = config.pop("rope_theta", None)
    for name in ("rope_parameters", "rope_scaling"):
        settings = config.pop(name, None) or {}
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}: field {name!r} = {settings!r} is not a JSON object")
        settings = dict(settings)
        found = settings.pop("rope_theta", None)
        theta = found if found is not None else theta
        kind = settings.pop("rope_type", settings.pop("type", "default"))
        settings.pop("type", None)
        if kind != "default":
            raise UserError(f"{where}: {name} of type {kind!r} is not supported")
        if settings:
            raise UserError(f"{where}: {name} field {next(iter(settings))!r} is not supported")
    if theta is None:
        log.warning("%s has no rope theta: using LLaMA's documented default %g", where, LLAMA_DEFAULT_THETA)
        theta = LLAMA_DEFAULT_THETA
    if not _positive(theta):
        raise UserError(f"{where}: rope_theta = {theta!r} is not a positive number")
    return float(theta)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
