"""A router's probabilities from its logits outside the model, and ways to read a row's (METHOD 4). Plain numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from trinityx_jax.mocae.router import Router

SMALLEST = 1e-4  # of a mean pi, where a selection of experts leaves some out of a short row


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def selected(x: np.ndarray, top_k: int | None) -> np.ndarray:
    """Scaled logits [...,E] with all but the ``top_k`` largest at -inf, as the model masks them."""
    if top_k is None or top_k >= x.shape[-1]:
        return x
    kept = np.argsort(-x, axis=-1, kind="stable")[..., :top_k]
    out = np.full_like(x, -np.inf)
    np.put_along_axis(out, kept, np.take_along_axis(x, kept, axis=-1), axis=-1)
    return out


def probabilities(z: np.ndarray, temperature: np.ndarray, top_k: int | None = None) -> np.ndarray:
    """pi [...,L,E] in float64 of logits z, at a temperature [], [E] or [L,E]."""
    return softmax(selected(z.astype(np.float64) / np.asarray(temperature, np.float64), top_k))


def row_means(pi: list[np.ndarray]) -> np.ndarray:
    """Each row's pi [S,L,E], averaged over its tokens and all layers, as ``losses.row_routing`` has it: [N,E]."""
    return np.stack([own.mean(axis=(0, 1)) for own in pi])


def pooled(means: np.ndarray, sharpness: float) -> np.ndarray:
    """A row's probabilities from its mean pi [N,E]: softmax(sharpness log mean).

    A mean of calibrated forecasts is under-confident (Ranjan and Gneiting, 2010): tokens that cannot know the
    objective yet count as much as those that do. This undoes it, and never changes which expert is the likeliest; a
    router's ``pool`` holds it.
    """
    return softmax(sharpness * np.log(np.maximum(means, SMALLEST)))


def pooled_rows(router: Router, means: np.ndarray, kind: str) -> np.ndarray:
    """``pooled`` by a router's pool for whole rows or for prompts (``kind``: row, prompt)."""
    return pooled(means, float(router.pool[f"{kind}_sharpness"]))


def calibrated(router: Router, temperature: np.ndarray, bias: np.ndarray, kind: str) -> Router:
    """The router at another temperature ([], [E] or [L,E]) and with ``bias`` ([L|1,E]) added to its own."""
    return dataclasses.replace(
        router,
        temperature=jnp.asarray(temperature, jnp.float32),
        bias=router.bias + jnp.asarray(bias, jnp.float32),
        config=dataclasses.replace(router.config, calibration=kind),
    )
