"""Prefill, decode, sampling."""

from trinityx_jax.generation.decode import Sampling, generate

__all__ = ["Sampling", "generate"]
