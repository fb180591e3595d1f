"""Decoding: pure functions over an explicit cache, samplers, and generation from texts or ids."""
from llmjax.decode.embed import embed
from llmjax.decode.generate import Completion, complete, generate, stream
from llmjax.decode.kinds import cache_bytes, make_cache
from llmjax.decode.pages import Pages, hashes
from llmjax.decode.prepare import prepare, stack, unstack
from llmjax.decode.sampling import Sampling, make_sampling, sample
from llmjax.decode.session import Session
from llmjax.decode.steps import Decoding, begin, can_rewind, copy_pages, decode_step, grow, init_cache, init_evicting, init_paged, loop, prefill, repeat_rows, rewind
from llmjax.models import HeavyHitters, Streaming

__all__ = ["Completion", "Decoding", "HeavyHitters", "Pages", "Sampling", "Session", "Streaming", "begin", "cache_bytes", "can_rewind", "complete", "copy_pages", "decode_step", "embed",
           "generate", "grow", "hashes", "init_cache", "init_evicting", "init_paged", "loop", "make_cache", "make_sampling", "prefill", "prepare", "repeat_rows", "rewind", "sample", "stack",
           "stream", "unstack"]
