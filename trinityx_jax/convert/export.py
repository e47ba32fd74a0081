"""Models out: PEFT adapters, and the routed mixture as a Hugging Face folder. Needs no torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trinityx_jax.backbone import Backbone, BackboneConfig
from trinityx_jax.convert import hf
from trinityx_jax.convert.fetch import HUB_ID, SMOLLM2
from trinityx_jax.errors import UserError
from trinityx_jax.experts import TaskVector, stack
from trinityx_jax.experts.lora import site_shape
from trinityx_jax.files import atomic_dir, write_json, write_text
from trinityx_jax.mocae import Router
from trinityx_jax.mocae.router import per_layer

SHARD_BYTES = 5_000_000_000
MODELING = "modeling_trinityx.py"


def export_peft(vectors: Mapping[str, TaskVector], backbone: Backbone, out: Path, base_model: str) -> list[Path]:
    """One PEFT LoRA adapter per expert, in ``out/NAME``.

    Args:
        base_model: hub id or path that the adapters name as their base.

    Returns:
        the adapters' folders, in the mapping's order.

    Raises:
        UserError: a name is no folder name, a vector does not fit the base, a folder to be replaced
            holds something else, or the place cannot be written.
    """
    out = Path(out)
    base_model = HUB_ID if base_model == SMOLLM2 else base_model  # a name that peft can resolve
    _check_vectors(vectors, backbone.config)
    folders = [out / name for name in vectors]
    for folder in folders:
        _check_replaceable(folder, "adapter_config.json")
    with contextlib.ExitStack() as stack:  # all are complete before the first gets its name
        for folder, (name, vector) in zip(folders, vectors.items(), strict=True):
            scale = _uniform_scale(vector)
            staging = stack.enter_context(atomic_dir(folder))
            _save(staging / "adapter_model.safetensors", dict(_peft_tensors(vector, fold=scale is None)))
            write_json(staging / "adapter_config.json", _peft_config(vector, scale, base_model))
            write_text(staging / "README.md", _adapter_card(name, vector, backbone, base_model))
    return folders


def export_mocae(backbone: Backbone, vectors: Mapping[str, TaskVector], router: Router, out: Path) -> Path:
    """Base, experts and router as one folder for ``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)``.

    Returns:
        ``out``.

    Raises:
        UserError: the router's experts are not the vectors, one of them does not fit the base, a
            folder to be replaced holds something else, or the place cannot be written.
    """
    out = Path(out)
    _check_vectors(vectors, backbone.config)
    _check_router(router, vectors, backbone.config)
    _check_replaceable(out, MODELING)
    ordered = {name: vectors[name] for name in router.names}
    with atomic_dir(out) as staging:
        tensors = itertools.chain(
            hf.disassemble(backbone.config, backbone.params),
            _expert_tensors(ordered, backbone.config.num_layers),
            _router_tensors(router, backbone.config.num_layers),
        )
        _write_shards(staging, tensors)
        write_json(staging / "config.json", _mocae_config(backbone, ordered, router))
        write_json(staging / "generation_config.json", _generation_config(backbone))
        if backbone.tokenizer is not None:
            backbone.tokenizer.save_pretrained(staging)
        shutil.copyfile(Path(__file__).parent / "mocae_hf" / MODELING, staging / MODELING)
        write_text(staging / "README.md", _mocae_card(out.name, backbone, ordered, router))
    return out


def _check_vectors(vectors: Mapping[str, TaskVector], config: BackboneConfig) -> None:
    if not vectors:
        raise UserError("export: there are no experts")
    for name, vector in vectors.items():
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
            raise UserError(f"export: expert name {name!r} is not a folder name (letters, digits, '.', '_' and '-')")
        if not vector.sites:
            raise UserError(f"export: expert {name!r} has no sites")
        for site, leaf in vector.sites.items():
            size_in, size_out = site_shape(config, site)
            rank, layers = leaf["a"].shape[-1], config.num_layers
            wanted = {"a": (layers, size_in, rank), "b": (layers, rank, size_out), "scale": (layers,)}
            for key, shape in wanted.items():
                if leaf[key].shape != shape:
                    raise UserError(
                        f"export: expert {name!r}: {site}.{key} is {leaf[key].shape}, the base needs {shape}"
                    )


def _check_router(router: Router, vectors: Mapping[str, TaskVector], config: BackboneConfig) -> None:
    if set(router.names) != set(vectors):
        raise UserError(f"export: the router weighs {', '.join(router.names)}, the experts are {', '.join(vectors)}")
    depth, *rest = router.kernel.shape
    if depth not in (1, config.num_layers) or rest != [config.hidden_size, len(vectors)]:
        raise UserError(f"export: the router's kernel {router.kernel.shape} does not fit this base and these experts")


def _check_replaceable(folder: Path, marker: str) -> None:
    """A folder is replaced whole, so one that holds anything but an earlier export is refused."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).exists():
        raise UserError(f"{folder}: holds other files, an export replaces the whole folder; choose a new one")


def _uniform_scale(vector: TaskVector) -> float | None:
    """The scale of all layers and sites where it is one non-zero number."""
    scales = np.unique(np.concatenate([np.asarray(leaf["scale"], np.float32) for leaf in vector.sites.values()]))
    return float(scales[0]) if len(scales) == 1 and scales[0] != 0 else None


def _alpha(scale: float | None, rank: int) -> float:
    """lora_alpha with alpha / rank == scale; an integer where that is exact in float32 (1 where scale is folded)."""
    alpha = (1.0 if scale is None else scale) * rank
    whole = round(alpha)
    return whole if np.float32(whole / rank) == np.float32(alpha / rank) else alpha


def _peft_tensors(vector: TaskVector, fold: bool) -> Iterator[tuple[str, np.ndarray]]:
    for site, leaf in vector.sites.items():
        a, b = np.asarray(leaf["a"], np.float32), np.asarray(leaf["b"], np.float32)
        if fold:
            b = b * np.asarray(leaf["scale"], np.float32)[:, None, None]
        for layer in range(a.shape[0]):
            stem = f"base_model.model.model.layers.{layer}.mlp.{site}_proj"
            yield f"{stem}.lora_A.weight", a[layer].T
            yield f"{stem}.lora_B.weight", b[layer].T


def _peft_config(vector: TaskVector, scale: float | None, base_model: str) -> dict[str, Any]:
    rank = max(vector.ranks.values())
    others = {f"{site}_proj": r for site, r in vector.ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _alpha(scale, rank),
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(scale, r) for module, r in others.items()},
        "target_modules": [f"{site}_proj" for site in vector.sites],
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _expert_tensors(vectors: Mapping[str, TaskVector], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Per layer and site a [E,in,R], b [E,R,out], scale [E]; unequal ranks are padded with zeros."""
    stacked = stack(list(vectors.values()))
    for layer in range(layers):
        for site, leaf in stacked.items():
            for key, value in leaf.items():
                yield f"model.layers.{layer}.mlp.experts.{site}.{key}", np.asarray(value[layer], np.float32)


def _router_tensors(router: Router, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """The router of every layer: a shared one repeats, one temperature serves all experts."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float32), per_layer(router, layers))
    norm = {"scale": "mixture_norm.weight", "bias": "mixture_norm.bias", "gate": "mixture_gate"}
    for layer in range(layers):
        stem = f"model.layers.{layer}.mlp"
        yield f"{stem}.router.weight", tree["kernel"][layer].T
        yield f"{stem}.router.bias", tree["bias"][layer]
        yield f"{stem}.router.gamma", tree["gamma"][layer]
        yield f"{stem}.router.temperature", np.broadcast_to(tree["temperature"][layer], (len(router.names),))
        for key, value in tree["norm"].items():
            yield f"{stem}.{norm[key]}", np.atleast_1d(value[layer])


def _write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """One ``model.safetensors``, or several with an index; at most one shard is in memory."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        _save(folder / f"{len(shards)}.part", shard)
        shards.append(list(shard))
        total += sum(value.nbytes for value in shard.values())
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, value in tensors:
        if shard and size + value.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard


def _save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    # the writer copies memory as it lies, so a transposed view would be saved scrambled
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata={"format": "pt"})


def _mocae_config(backbone: Backbone, vectors: Mapping[str, TaskVector], router: Router) -> dict[str, Any]:
    module, switches = MODELING.removesuffix(".py"), router.config
    ranks: dict[str, int] = {}
    for vector in vectors.values():
        for site, rank in vector.ranks.items():
            ranks[site] = max(rank, ranks.get(site, 0))
    return {
        **backbone.config.to_hf(),
        "model_type": "trinityx",
        "architectures": ["TrinityXForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.TrinityXConfig",
            "AutoModelForCausalLM": f"{module}.TrinityXForCausalLM",
        },
        "dtype": _dtype(backbone),
        "expert_names": list(vectors),
        "expert_ranks": ranks,
        "router_scope": switches.router_scope,
        "router_top_k": switches.top_k,
        "mixture_weight": switches.weight,
        "mixture_mixing": switches.mixing,
        "mixture_output": switches.output,
        "mixture_dropout": switches.dropout,
    }


def _generation_config(backbone: Backbone) -> dict[str, Any]:
    fields = backbone.config.to_hf()
    tokens = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if fields[key] is not None}
    return tokens | dict(backbone.extras.get("generation_config") or {})


def _dtype(backbone: Backbone) -> str:
    return str(jax.tree.leaves(backbone.params)[0].dtype)


def _front_matter(backbone: Backbone, **fields: Any) -> str:
    licence = backbone.extras.get("license")
    fields |= {"license": licence} if licence else {}
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()) + "---\n"


def _licence(backbone: Backbone) -> str:
    licence = backbone.extras.get("license")
    return f"The base model's licence ({licence}) applies." if licence else "The base model's licence applies."


def _adapter_card(name: str, vector: TaskVector, backbone: Backbone, base_model: str) -> str:
    ranks = ", ".join(f"{site}_proj (rank {rank})" for site, rank in vector.ranks.items())
    return f"""{_front_matter(backbone, base_model=base_model, library_name="peft", tags=["lora", "trinityx"])}
# {name}

A LoRA adapter: one TrinityX expert (task vector) on the feed-forward of the base model.

- Base model: {base_model}
- Objective: {vector.origin.get("objective", name)}
- Adapted: {ranks}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(base_model)})
model = PeftModel.from_pretrained(model, "{name}")  # this folder
```

## Licence

{_licence(backbone)}
"""


def _mocae_card(name: str, backbone: Backbone, vectors: Mapping[str, TaskVector], router: Router) -> str:
    base, switches = backbone.extras.get("source", "a LLaMA-family model"), router.config
    gamma = np.asarray(router.gamma, np.float32)
    rows = "\n".join(
        f"| {expert} | {', '.join(f'{s} {r}' for s, r in vector.ranks.items())} | {weight:.4f} |"
        for (expert, vector), weight in zip(vectors.items(), gamma, strict=True)
    )
    return f"""{_front_matter(backbone, library_name="transformers", pipeline_tag="text-generation", tags=["trinityx"])}
# {name}

A mixture of calibrated experts (TrinityX): low-rank experts on every feed-forward layer of a frozen base
model, weighed per token and layer by a router.

- Base model: {base}, {_dtype(backbone)}
- Router: {switches.router_scope}, top-k {switches.top_k or "all"}
- Mixture: {switches.weight} weights over {switches.mixing}, output {switches.output}

| expert | rank per site | gamma |
|---|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)  # this folder
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("How do I stay safe online?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
print(model(**inputs, output_routing=True).routing.shape)  # [batch, sequence, layers, experts]
```

`trust_remote_code` runs `{MODELING}` of this folder: read it first. It needs transformers 5 or later.

## Licence

{_licence(backbone)}
"""
