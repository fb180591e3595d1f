"""Flax modules: the decoder and its parts. A module is a function of (parameters, tokens, positions, segments, cache)."""
from llmjax.models.cache import Cache, KeyValue, Slots, State, grow_cache, init_cache
from llmjax.models.decoder import Decoder
from llmjax.models.module import abstract_params, init_params, labels

__all__ = ["Cache", "Decoder", "KeyValue", "Slots", "State", "abstract_params", "grow_cache", "init_cache", "init_params", "labels"]
