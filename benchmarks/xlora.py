"""peft's X-LoRA over a LLaMA with random weights, for ``mixture.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any


def xlora(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """A forward pass of the base, or ``routed``: of X-LoRA over so many adapters on gate, up and down."""
    import torch
    from peft import LoraConfig, XLoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if job["dtype"] == "float32" else torch.bfloat16
    config = LlamaConfig(**{k: v for k, v in job["config"].items() if k not in ("architectures", "model_type")})
    model: Any = LlamaForCausalLM(config).to(dtype).eval()
    model.config.use_cache = False
    if job["routed"]:
        sites = ["gate_proj", "up_proj", "down_proj"]
        with tempfile.TemporaryDirectory() as folder:
            adapters = {str(i): f"{folder}/{i}" for i in range(job["experts"])}  # other names it loses
            settings = LoraConfig(r=job["rank"], lora_alpha=job["rank"], target_modules=sites, task_type="CAUSAL_LM")
            for path in adapters.values():  # of a model of their own: what is unloaded leaves traces
                get_peft_model(LlamaForCausalLM(config), settings).save_pretrained(path)
            mixed = XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=config.hidden_size, adapters=adapters, xlora_depth=1,
                layerwise_scalings=True,
            )  # fmt: skip
            model = get_peft_model(model, mixed).to(dtype).eval()
    ids = torch.randint(0, config.vocab_size, (1, job["tokens"]))

    def work() -> dict[str, Any]:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return {}

    work()
    work()
    return {}, work
