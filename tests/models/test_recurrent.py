"""Recurrent mixers in a model: pieces = whole, packed = separate, padded = unpadded, rows of different lengths, models without attention; prefix-free decoding through `generate`."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces import B, T, V, close, make

from llmjax import decode
from llmjax.core import Attention, Compute, GatedDelta, Layer, LinearAttention, Mlp, ModelConfig, Rope
from llmjax.core.errors import ConfigError
from llmjax.decode.steps import can_rewind, grow, init_cache
from llmjax.models import Decoder, State, labels
from llmjax.train.flops import flops_per_token

D = 32
DELTA, LINEAR = Layer(GatedDelta(4, 2, 8, 6), Mlp(40)), Layer(LinearAttention(4, 2, 8, Rope()), Mlp(40))
FULL, RING = Layer(Attention(4, 2, 8, Rope(), gate=True, qkv_bias=True), Mlp(40)), Layer(Attention(4, 2, 8, Rope(), window=6), Mlp(40))
CONFIGS = {
    "delta and gated attention": ModelConfig(V, D, cycle=(DELTA, FULL), repeats=2, suffix=(DELTA,), context=64),
    "delta alone": ModelConfig(V, D, cycle=(DELTA,), repeats=2, context=64),
    "linear and a ring": ModelConfig(V, D, prefix=(LINEAR,), cycle=(LINEAR, RING), repeats=2, context=64),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def made(request):
    return make(CONFIGS[request.param])


def test_cached_pieces_are_the_whole(made):
    model, params, tokens, logits = made
    cache, out = init_cache(model, B, 12), []
    for start, stop in [(0, 9), (9, 18), (18, 19), (19, 20), (20, T)]:
        cache = grow(model, cache, T) if start == 9 else cache
        piece, cache = model.apply({"params": params}, tokens[:, start:stop], cache=cache)
        out.append(piece)
    close(jnp.concatenate(out, 1), logits)
    assert not can_rewind(cache) and cache.length == T


def test_packed_is_separate_and_padding_is_nothing(made):
    """Documents of a row; padding left, right, between and inside; and the same through a cache, in pieces that cut the padding."""
    model, params, tokens, logits = made
    cut = 10
    second = model.apply({"params": params}, tokens[:, cut:])[0]
    plan = [1] * 4 + [0] + [1] * (cut - 4) + [0] * 2 + [2] * (T - cut) + [0] * 2
    for lead in (0, 3):
        segments = np.asarray([0] * lead + plan)
        one, two = np.flatnonzero(segments == 1), np.flatnonzero(segments == 2)
        padded, positions = np.full((B, len(segments)), 7, np.int32), np.zeros((B, len(segments)), np.int32)
        padded[:, np.r_[one, two]], positions[:, one], positions[:, two] = tokens, np.arange(cut), np.arange(T - cut)
        wide = jnp.broadcast_to(jnp.asarray(segments, jnp.int32), padded.shape)
        got = model.apply({"params": params}, padded, positions, wide)[0]
        close(got[:, one], logits[:, :cut])
        close(got[:, two], second)
    cache, got = init_cache(model, B, 64), []
    for start, stop in [(0, 6), (6, 14), (14, 15), (15, len(segments))]:         # the second document's tokens go to slots of their own: positions go on
        piece, cache = model.apply({"params": params}, padded[:, start:stop], jnp.asarray(np.arange(start, stop))[None], wide[:, start:stop], cache=cache)
        got.append(piece)
    whole = model.apply({"params": params}, padded, jnp.arange(len(segments))[None], wide)[0]
    used = np.r_[one, two]
    close(jnp.concatenate(got, 1)[:, used], whole[:, used])


def test_rows_of_different_lengths_decode_as_alone(made):
    model, params, tokens, _ = made
    prompts = [tokens[0, :5].tolist(), tokens[1, :13].tolist()]
    together = decode.generate(model, params, None, prompts, max_new_tokens=5, temperature=0.0, stop=[])
    assert together == [decode.generate(model, params, None, [p], max_new_tokens=5, temperature=0.0, stop=[])[0] for p in prompts]
    for prompt, made_ids in zip(prompts, together):
        ids = prompt + made_ids
        best = model.apply({"params": params}, jnp.asarray([ids]))[0][0].argmax(-1)
        assert made_ids == best[len(prompt) - 1:-1].tolist()


def test_gradients_reach_every_weight(made):
    model, params, tokens, _ = made
    grads = jax.grad(lambda p: model.apply({"params": p}, tokens)[0].std())(params)
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    assert jax.tree.structure(labels(model)) == jax.tree.structure(params) and flops_per_token(model, 16) > 0


def test_what_a_cache_holds():
    cache = init_cache(Decoder(CONFIGS["delta alone"], Compute("float32")), 3, 64)
    entry = cache.layers["cycle"][0]
    assert isinstance(entry, State) and entry.state.shape == (2, 3, 4, 8, 6) and entry.recent[0].shape == (2, 3, 3, 2, 28) and set(cache.slots) == {64}
    long = init_cache(Decoder(CONFIGS["delta alone"], Compute("float32")), 3, 4096)
    assert all(a.shape == b.shape for a, b in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(long.layers)))          # a state does not grow


@pytest.mark.parametrize(("mixer", "words"), [(GatedDelta(4, 3, 8, 8), "heads=4 is not a multiple of key_heads=3"), (GatedDelta(4, 2, 8, 8, width=1), "width=1"),
                                              (GatedDelta(4, 2, 8, 8, activation="sillu"), "did you mean 'silu'"), (LinearAttention(4, 3, 8), "kv_heads=3")])
def test_numbers_that_do_not_go_together(mixer, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(V, D, cycle=(dc.replace(DELTA, mixer=mixer),), repeats=1)
