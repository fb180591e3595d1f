"""Flax modules: decoders, encoders, encoder-decoders and their parts. A module is a function of (parameters, tokens, positions, segments, cache)."""
from llmjax.models.build import build
from llmjax.models.cache import Cache, KeyValue, Pool, Slots, State, grow_cache, init_cache
from llmjax.models.decoder import Decoder
from llmjax.models.encoder import Encoder
from llmjax.models.encoder_decoder import EncoderDecoder
from llmjax.models.evicting import HeavyHitters, Streaming, init_evicting
from llmjax.models.module import abstract_params, init_params, jit_by_model, labels
from llmjax.models.paged import copy_pages, init_paged

__all__ = ["Cache", "Decoder", "Encoder", "EncoderDecoder", "HeavyHitters", "KeyValue", "Pool", "Slots", "State", "Streaming", "abstract_params", "build", "copy_pages",
           "grow_cache", "init_cache", "init_evicting", "init_paged", "init_params", "jit_by_model", "labels"]
