"""Decoding: pure functions over an explicit cache, samplers, and generation from texts or ids."""
from llmjax.decode.beam import beam_search
from llmjax.decode.contrastive import contrastive_search
from llmjax.decode.embed import embed
from llmjax.decode.generate import complete, generate, stream
from llmjax.decode.grammar import Choice, Constraint, Grammar, JsonSchema, Lark, Matcher, Regex
from llmjax.decode.history import History
from llmjax.decode.kinds import CacheKind, Contiguous, Paged, cache_bytes, cache_kind, cache_shardings, make_cache
from llmjax.decode.pages import Pages, hashes
from llmjax.decode.prepare import prepare, stack, unstack
from llmjax.decode.reading import answer_bytes
from llmjax.decode.rows import Completion
from llmjax.decode.sampling import Sampling, best_logprobs, distribution, logprobs_of, make_sampling, row_keys, sample, start_history
from llmjax.decode.score import Score, score
from llmjax.decode.session import Session
from llmjax.decode.speculative import Draft, DraftModel, EarlyExit, NGram
from llmjax.decode.steps import Decoding, begin, can_rewind, copy_pages, decode_step, grow, init_cache, init_evicting, init_paged, loop, prefill, repeat_rows, rewind, take_rows
from llmjax.models import HeavyHitters, Streaming

__all__ = ["CacheKind", "Choice", "Completion", "Constraint", "Contiguous", "Decoding", "Draft", "DraftModel", "EarlyExit", "Grammar", "HeavyHitters", "History", "JsonSchema",
           "Lark", "Matcher", "NGram", "Paged", "Pages", "Regex", "Sampling", "Score", "Session", "Streaming", "answer_bytes", "beam_search", "begin", "best_logprobs",
           "cache_bytes", "cache_kind", "cache_shardings", "can_rewind", "complete", "contrastive_search", "copy_pages", "decode_step", "distribution", "embed", "generate",
           "grow", "hashes", "init_cache", "init_evicting", "init_paged", "logprobs_of", "loop", "make_cache", "make_sampling", "prefill", "prepare", "repeat_rows", "rewind",
           "row_keys", "sample", "score", "stack", "start_history", "stream", "take_rows", "unstack"]
