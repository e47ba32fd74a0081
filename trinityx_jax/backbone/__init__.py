"""The frozen LLaMA-family decoder."""

from trinityx_jax.backbone.cache import Cache, empty_cache
from trinityx_jax.backbone.config import BackboneConfig
from trinityx_jax.backbone.model import Backbone, Decoder, abstract_params, base_feed_forward, init_params, unembed

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Cache",
    "Decoder",
    "abstract_params",
    "base_feed_forward",
    "empty_cache",
    "init_params",
    "unembed",
]
