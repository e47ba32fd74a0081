"""Temperature scaling of the router on rows it was not trained on (METHOD 4)."""

from __future__ import annotations

import numpy as np


def selected(z: np.ndarray, top_k: int | None) -> np.ndarray:
    """Router logits [...,E] with all but the ``top_k`` largest at -inf, as the model masks them."""
    if top_k is None or top_k >= z.shape[-1]:
        return z
    kept = np.argsort(-z, axis=-1, kind="stable")[..., :top_k]
    out = np.full_like(z, -np.inf)
    np.put_along_axis(out, kept, np.take_along_axis(z, kept, axis=-1), axis=-1)
    return out


def row_probabilities(z: list[np.ndarray], temperature: float) -> np.ndarray:
    """Each row's pi at a temperature [N,E], from its router logits [S,L,E], as ``row_routing`` has it."""
    out = []
    for row in z:
        scaled = row.astype(np.float64) / temperature
        scaled -= scaled.max(axis=-1, keepdims=True)
        pi = np.exp(scaled)
        out.append((pi / pi.sum(axis=-1, keepdims=True)).mean(axis=(0, 1)))
    return np.stack(out)


def row_nll(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p of each row's label [N] under [N,E]."""
    return -np.log(probabilities[np.arange(len(labels)), labels] + 1e-20)


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean -log p of the labels [N] under [N,E]."""
    return float(np.mean(row_nll(probabilities, labels)))


def calibrated_temperature(z: list[np.ndarray], labels: np.ndarray, trained: float) -> float:
    """The temperature nearest the trained one whose NLL is within a standard error of the best.

    A row's pi is a mean over tokens and layers, so its NLL is flat where tokens are already
    decisive; without this rule the fit runs off to a hard, rounding-sensitive routing that the
    held-out rows do not call for.
    """
    best = fit_temperature(z, labels)
    losses = row_nll(row_probabilities(z, best), labels)
    limit = losses.mean() + losses.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else losses.mean()
    for temperature in np.geomspace(trained, best, 50):
        if negative_log_likelihood(row_probabilities(z, float(temperature)), labels) <= limit:
            return float(temperature)
    return best


def fit_temperature(z: list[np.ndarray], labels: np.ndarray, bounds: tuple[float, float] = (0.02, 20.0)) -> float:
    """The temperature of least NLL of the objective id, by golden-section search on its logarithm.

    Args:
        z: router logits [S,L,E] per row, before any temperature. labels: [N] expert index.

    The logits are those of the model at its present temperature; a layer's logits change a little
    when earlier layers mix at another one, so a caller measures before and after on the model.
    """
    ratio = (5**0.5 - 1) / 2
    low, high = np.log(bounds[0]), np.log(bounds[1])

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(row_probabilities(z, float(np.exp(log_temperature))), labels)

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    f_left, f_right = loss(left), loss(right)
    while high - low > 1e-3:
        if f_left <= f_right:
            high, right, f_right = right, left, f_left
            left = high - ratio * (high - low)
            f_left = loss(left)
        else:
            low, left, f_left = left, right, f_right
            right = low + ratio * (high - low)
            f_right = loss(right)
    return float(np.exp((low + high) / 2))
