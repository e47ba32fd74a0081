"""Hugging Face names and layouts: one map, used in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from trinityx_jax.backbone import BackboneConfig, abstract_params
from trinityx_jax.errors import UserError
from trinityx_jax.files import read_json

# Our leaf -> (Hugging Face's name, transposed). "{}" is the layer; block leaves are stacked over it.
_NAMES: dict[tuple[str, ...], tuple[str, bool]] = {
    ("embed", "embedding"): ("model.embed_tokens.weight", False),
    ("norm", "scale"): ("model.norm.weight", False),
    ("lm_head", "kernel"): ("lm_head.weight", True),
    ("blocks", "attn_norm", "scale"): ("model.layers.{}.input_layernorm.weight", False),
    ("blocks", "mlp_norm", "scale"): ("model.layers.{}.post_attention_layernorm.weight", False),
}
for _site in "qkvo":
    _NAMES["blocks", _site, "kernel"] = (f"model.layers.{{}}.self_attn.{_site}_proj.weight", True)
    _NAMES["blocks", _site, "bias"] = (f"model.layers.{{}}.self_attn.{_site}_proj.bias", False)
for _site in ("gate", "up", "down"):
    _NAMES["blocks", _site, "kernel"] = (f"model.layers.{{}}.mlp.{_site}_proj.weight", True)
    _NAMES["blocks", _site, "bias"] = (f"model.layers.{{}}.mlp.{_site}_proj.bias", False)


DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STORED = {"F64", "F32", "F16", "BF16"}  # safetensors' names; integers and float8 are quantisations


def expected(config: BackboneConfig) -> dict[str, tuple[tuple[str, ...], int | None, bool]]:
    """Hugging Face name -> (our leaf's path, layer or None, transposed), for every tensor."""
    out: dict[str, tuple[tuple[str, ...], int | None, bool]] = {}
    for path, _ in leaves(config):
        name, transposed = _NAMES[path]
        if path[0] == "blocks":
            for layer in range(config.num_layers):
                out[name.format(layer)] = (path, layer, transposed)
        else:
            out[name] = (path, None, transposed)
    return out


def leaves(config: BackboneConfig) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Path and shape of every leaf of the base tree."""
    flat = jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda x: x, abstract_params(config)))[0]
    return [(tuple(k.key for k in path if hasattr(k, "key")), leaf.shape) for path, leaf in flat]


def assemble(
    config: BackboneConfig, tensors: Iterable[tuple[str, np.ndarray]], dtype: str | None, where: str
) -> dict[str, Any]:
    """Fill the base tree from (name, tensor) pairs, one tensor in memory at a time.

    Args:
        dtype: ``float32``, ``bfloat16``, or None for the one all tensors are stored in.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape.
    """
    places = expected(config)
    shapes = dict(leaves(config))
    arrays: dict[tuple[str, ...], np.ndarray] = {}
    seen: set[str] = set()
    repeated: np.ndarray | None = None
    stored = ""
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):  # derived from theta, stored by old transformers
            continue
        if name == "lm_head.weight" and config.tie_embeddings:  # some tied files repeat the embedding
            repeated = tensor
            continue
        if name not in places:
            raise UserError(f"{where}: tensor {name!r} does not belong to this model")
        path, layer, transposed = places[name]
        if dtype is None and str(tensor.dtype) != (stored := stored or str(tensor.dtype)):
            raise UserError(f"{where}: stored in {stored} and {tensor.dtype}; choose one dtype to load it in")
        if dtype is None and stored not in DTYPES:
            raise UserError(f"{where}: stored as {stored}; choose one to load it in ({', '.join(DTYPES)})")
        value = tensor.T if transposed else tensor
        if path not in arrays:
            arrays[path] = np.empty(shapes[path], numpy_dtype(dtype or stored))
        target = arrays[path]
        slot = target if layer is None else target[layer]
        if slot.shape != value.shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {tensor.shape}, its config says {_flip(slot, transposed)}"
            )
        slot[...] = value.astype(target.dtype)
        seen.add(name)
    missing = sorted(places.keys() - seen)
    if missing:
        raise UserError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if repeated is not None:
        embedding = arrays["embed", "embedding"]
        if not np.array_equal(repeated.astype(embedding.dtype), embedding):
            raise UserError(f"{where}: lm_head.weight differs from the embedding it is declared tied to")
    return nest(arrays)


def disassemble(config: BackboneConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of ``assemble``: Hugging Face (name, tensor) pairs in the leaves' dtype."""
    for name, (path, layer, transposed) in expected(config).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        value = np.asarray(leaf if layer is None else leaf[layer])
        yield name, np.ascontiguousarray(value.T if transposed else value)


def nest(flat: Mapping[tuple[str, ...], Any], wrap: Callable[[Any], Any] = lambda x: x) -> dict[str, Any]:
    """{("a", "b"): x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = wrap(value)
    return tree


def numpy_dtype(name: str) -> np.dtype:
    """numpy's dtype for a dtype name, bfloat16 included.

    Raises:
        UserError: not one of the dtypes a base is kept in.
    """
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, each checked to exist."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        described = read_json(index)
        weight_map = described.get("weight_map") if isinstance(described, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: has no 'weight_map' from tensors to files")
        names = sorted(set(weight_map.values()))
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {pickled[0]} is a pickle, which is never loaded: save as safetensors" if pickled else ""
        raise UserError(f"{folder}: no model.safetensors{hint}")
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder}: shard {name} is missing")
    return [folder / name for name in names]


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Stream (name, tensor) from safetensors files.

    Raises:
        UserError: a file is cut short or is not safetensors, or a tensor is quantised.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    stored = handle.get_slice(name).get_dtype()
                    if stored not in _STORED:
                        raise UserError(f"{file}: tensor {name!r} is stored as {stored}, which is not supported")
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error})") from error


def _flip(slot: np.ndarray, transposed: bool) -> tuple[int, ...]:
    return slot.shape[::-1] if transposed else slot.shape
