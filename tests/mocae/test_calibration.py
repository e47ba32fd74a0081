"""Temperature scaling of the router against known answers and an exhaustive search."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from trinityx_jax.mocae import losses
from trinityx_jax.mocae.calibration import fit_temperature, negative_log_likelihood, row_probabilities
from trinityx_jax.mocae.router import probabilities


def make_rows(count: int, tokens: int | None, seed: int, best: float = 1.0) -> tuple[list[np.ndarray], np.ndarray]:
    """Router logits [S,L,E] per row, and objective ids drawn from softmax(z / best) of the row."""
    draw = np.random.default_rng(seed)
    z, labels = [], []
    for _ in range(count):
        length = tokens or int(draw.integers(1, 6))
        row = best * draw.normal(size=(1, 1, 3)) * 1.5 + np.zeros((length, 2, 3))
        z.append(row)
        p = np.exp(row[0, 0] / best)
        labels.append(draw.choice(3, p=p / p.sum()))
    return z, np.array(labels)


@pytest.mark.parametrize("best", [0.2, 1.0, 4.0])
def test_the_temperature_that_made_the_labels_is_found(best: float) -> None:
    z, labels = make_rows(4000, 1, seed=1, best=best)
    assert abs(np.log(fit_temperature(z, labels) / best)) < 0.1


@pytest.mark.parametrize("seed", [2, 3])
def test_no_temperature_on_a_fine_grid_is_better(seed: int) -> None:
    z, labels = make_rows(150, None, seed)
    draw = np.random.default_rng(seed)
    z = [row + draw.normal(size=row.shape) for row in z]  # tokens and layers disagree
    found = fit_temperature(z, labels)
    grid = np.exp(np.linspace(np.log(0.02), np.log(20), 500))
    at = {t: negative_log_likelihood(row_probabilities(z, t), labels) for t in grid}
    best = min(at, key=at.__getitem__)
    assert abs(np.log(found / best)) < 0.02
    assert negative_log_likelihood(row_probabilities(z, found), labels) <= at[best] + 1e-6
    assert negative_log_likelihood(row_probabilities(z, found), labels) < at[grid[0]]


def test_hopeless_and_perfect_logits_end_at_the_bounds() -> None:
    labels = np.arange(300) % 3
    sure = [4.0 * np.eye(3)[i][None, None] for i in labels]
    wrong = [4.0 * np.eye(3)[(i + 1) % 3][None, None] for i in labels]
    assert fit_temperature(sure, labels, (0.1, 10.0)) < 0.2
    assert fit_temperature(wrong, labels, (0.1, 10.0)) > 9.9


def test_row_probabilities_are_the_routing_that_the_model_reports() -> None:
    draw = np.random.default_rng(4)
    z = draw.normal(size=(3, 7, 2, 3)) * 3
    mask = np.arange(7) < np.array([[7], [4], [1]])
    found = row_probabilities([z[i][mask[i]] for i in range(3)], 0.6)
    pi = probabilities(jnp.asarray(z, jnp.float32), jnp.float32(0.6), None)
    np.testing.assert_allclose(found, losses.row_routing(pi, jnp.asarray(mask)), rtol=1e-5)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-12)
    assert np.all(np.isfinite(row_probabilities([1e4 * z[0]], 0.02)))
