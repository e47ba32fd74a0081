"""A model folder's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trinityx_jax.errors import UserError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or None where it holds none.

    Raises:
        UserError: it holds one that cannot be loaded.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; each means this folder's tokenizer is unusable
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({cause})") from error
