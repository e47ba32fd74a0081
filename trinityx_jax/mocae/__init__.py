"""Mixture of calibrated experts: router, mixture, losses, calibration."""

from trinityx_jax.mocae.model import hidden_states, token_routing
from trinityx_jax.mocae.router import MoCaEConfig, Router, init_router, preset

__all__ = ["MoCaEConfig", "Router", "hidden_states", "init_router", "preset", "token_routing"]
