"""Decoding: pure functions over an explicit cache, samplers, and generation from texts or ids."""
from llmjax.decode.embed import embed
from llmjax.decode.generate import Completion, complete, generate, stream
from llmjax.decode.prepare import prepare, stack, unstack
from llmjax.decode.sampling import Sampling, make_sampling, sample
from llmjax.decode.session import Session
from llmjax.decode.steps import Decoding, begin, can_rewind, decode_step, grow, init_cache, loop, prefill, repeat_rows, rewind

__all__ = ["Completion", "Decoding", "Sampling", "Session", "begin", "can_rewind", "complete", "decode_step", "embed", "generate", "grow", "init_cache", "loop", "make_sampling", "prefill", "prepare",
           "repeat_rows", "rewind", "sample", "stack", "stream", "unstack"]
