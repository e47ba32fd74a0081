"""Log-likelihood of rows under the base, a static combination of experts, or the routed mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trinityx_jax.backbone import Backbone
from trinityx_jax.backbone.products import activations, packed
from trinityx_jax.data.batching import evaluation_batches
from trinityx_jax.data.templates import Encoded
from trinityx_jax.mocae import Router, hidden_states, token_routing
from trinityx_jax.training.loss import supervised_nll


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per row: negative log-likelihood of the answer [n], its tokens [n]; of a routed model also pi
    per token, averaged over layers (a list of [S_i,E]), and per layer, averaged over tokens [n,L,E].
    """

    nll: np.ndarray
    tokens: np.ndarray
    token_pi: list[np.ndarray] = dataclasses.field(default_factory=list)
    layer_pi: np.ndarray | None = None


class Scorer:
    """Compiled scoring functions of one base and set of experts, shared by all systems."""

    def __init__(self, backbone: Backbone, experts: Any, dtype: str, batch_size: int):
        self.backbone, self.experts, self.batch_size = backbone, experts, batch_size
        config, kind = backbone.config, activations(dtype)
        self.base = packed(backbone.params)

        def row_nll(base: Any, hidden: jax.Array, batch: Any) -> jax.Array:
            nll = supervised_nll(base, config, hidden, batch)
            rows, length = batch["tokens"].shape
            return jax.ops.segment_sum(nll, batch["where"] // length, rows)

        @jax.jit
        def static(base: Any, experts: Any, weights: jax.Array, batch: Any) -> jax.Array:
            hidden, _, _ = hidden_states(
                base, config, batch["tokens"], batch["mask"], experts=experts, weights=weights, dtype=kind
            )
            return row_nll(base, hidden, batch)

        @jax.jit
        def routed(base: Any, experts: Any, router: Router, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            mask = batch["mask"]
            hidden, aux, _ = hidden_states(
                base, config, batch["tokens"], mask, experts=experts, router=router, dtype=kind
            )
            pi = token_routing(aux)
            count = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None, None]
            per_layer = jnp.einsum("bsle,bs->ble", pi, mask.astype(jnp.float32)) / count
            return row_nll(base, hidden, batch), jnp.mean(pi, axis=2), per_layer

        self._static, self._routed = static, routed

    def batches(self, rows: Sequence[Encoded]) -> int:
        """How many batches ``score`` will run."""
        return -(-len(rows) // self.batch_size)

    def score(
        self,
        rows: Sequence[Encoded],
        *,
        weights: np.ndarray | None = None,
        router: Router | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> Scores:
        """Score rows with static expert ``weights`` [E] (zeros: the base) or with a ``router``."""
        nll, tokens = np.zeros(len(rows)), np.asarray([len(r.ids) - r.prompt_length for r in rows])
        token_pi: dict[int, np.ndarray] = {}
        layer_pi: dict[int, np.ndarray] = {}
        for index, batch in evaluation_batches(rows, [0] * len(rows), self.batch_size, 0):
            arrays, own = batch.arrays(), slice(0, len(index))
            if router is None:
                found = self._static(self.base, self.experts, jnp.asarray(weights, jnp.float32), arrays)
                nll[index] = np.asarray(found)[own]
            else:
                found, pi, layers = self._routed(self.base, self.experts, router, arrays)
                nll[index] = np.asarray(found)[own]
                for row, i in enumerate(index):
                    token_pi[int(i)] = np.asarray(pi[row])[batch.mask[row]]
                    layer_pi[int(i)] = np.asarray(layers[row])
            on_batch()
        if router is None:
            return Scores(nll, tokens)
        order = range(len(rows))
        return Scores(nll, tokens, [token_pi[i] for i in order], np.stack([layer_pi[i] for i in order]))
