"""Prompt templates: how an example becomes the text a model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trinityx_jax.data.objectives import Example
from trinityx_jax.errors import UserError

TEMPLATES = ("auto", "chat", "alpaca", "trinityx")

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_TRINITYX = (  # the paper's Figure 3
    "Below is an instruction paired with an input. Write the most helpful, harmless, and honest "
    "response.\n\n### Instruction: {prompt}\n### Response: "
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of one row; the first ``prompt_length`` are given, the others are learned."""

    ids: np.ndarray
    prompt_length: int


def resolve(template: str, tokenizer: Any) -> str:
    """``auto`` is the tokenizer's chat template where it has one, else Alpaca's.

    Raises:
        UserError: the name is unknown, or ``chat`` is asked of a tokenizer without a chat template.
    """
    if template not in TEMPLATES:
        raise UserError(f"template {template!r} is not one of {', '.join(TEMPLATES)}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        return "chat" if has_chat else "alpaca"
    if template == "chat" and not has_chat:
        raise UserError("template 'chat': the tokenizer has no chat template")
    return template


def prompt_text(template: str, example: Example, tokenizer: Any) -> str:
    """The text before the answer."""
    if template == "chat":
        messages = [{"role": "user", "content": example.prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if template == "alpaca":
        form = _ALPACA_INPUT if example.input else _ALPACA
        return form.format(instruction=example.instruction, input=example.input)
    return _TRINITYX.format(prompt=example.prompt)


def encode_prompts(template: str, examples: Sequence[Example], tokenizer: Any) -> list[list[int]]:
    """Prompt token ids. A chat template writes its own special tokens; the others get the tokenizer's."""
    template = resolve(template, tokenizer)
    if not examples:
        return []
    texts = [prompt_text(template, e, tokenizer) for e in examples]
    return tokenizer(texts, add_special_tokens=template != "chat")["input_ids"]


def encode(template: str, examples: Sequence[Example], tokenizer: Any, seq_len: int) -> list[Encoded]:
    """Tokenise examples as prompt + response + end-of-sequence, at most ``seq_len`` tokens each.

    A row that is too long loses the prompt's tail first, then the response's; at least one answer
    token stays.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token: an answer's end could not be learned")
    prompts = encode_prompts(template, examples, tokenizer)
    if not prompts:
        return []
    answers = tokenizer([e.response for e in examples], add_special_tokens=False)["input_ids"]
    out = []
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = [*answer, tokenizer.eos_token_id][: seq_len - 1]
        prompt = prompt[: max(1, seq_len - len(answer))]
        out.append(Encoded(np.asarray(prompt + answer, np.int32), len(prompt)))
    return out
