"""The paged cache against the contiguous one on the same ragged calls, for every kind of layer; shared prefixes, copied pages, another request in the same row, garbage of a former tenant."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces import V, close, make

from llmjax import decode
from llmjax.core import Attention, Compute, GatedDelta, Layer, LinearAttention, Mlp, ModelConfig, QKNorm, Rope
from llmjax.core.errors import ConfigError
from llmjax.core.model_config import LatentAttention
from llmjax.core.positions import Alibi, RelativeBuckets
from llmjax.core.tree import map_named
from llmjax.models import Decoder

D, ROWS, WIDE, PAGE, LENGTH = 32, 3, 6, 4, 24
PLAIN = Layer(Attention(4, 2, 8, Rope()), Mlp(40))
WINDOW = Layer(Attention(4, 2, 8, Rope(), window=6, softcap=30.0, sinks=True, qkv_bias=True), Mlp(40), "sandwich")
LATENT = Layer(LatentAttention(4, 12, 6, 8, 10, query_rank=16, bias=True), Mlp(24))
CHUNKS = Layer(Attention(4, 2, 8, Rope(), window=7, chunked=True), Mlp(24))
SLOPES = Layer(Attention(6, 2, 8, None, alibi=Alibi(scale=0.5)), Mlp(24))
LENT = Layer(Attention(4, 2, 8, Rope(), window=6, qk_norm=QKNorm(), lends="near"), Mlp(24))
BORROWS = Layer(Attention(4, 2, 8, Rope(), window=6, qk_norm=QKNorm(), borrows="near"), Mlp(24))
GLOBAL = Layer(Attention(4, 2, 8, Rope(), window=5, globals=3), Mlp(40))
DELTA, LINEAR = Layer(GatedDelta(4, 2, 8, 6), Mlp(40)), Layer(LinearAttention(4, 2, 8, Rope()), Mlp(40))
CONFIGS = {
    "grouped, window, cap, sinks, slopes": ModelConfig(V, D, prefix=(SLOPES,), cycle=(PLAIN, WINDOW), repeats=2, context=64),
    "latent, chunks": ModelConfig(V, D, cycle=(LATENT, CHUNKS), repeats=2, context=64),
    "lending, globals": ModelConfig(V, D, prefix=(LENT, BORROWS, GLOBAL), context=64),
    "recurrent and attention": ModelConfig(V, D, prefix=(LINEAR,), cycle=(DELTA, PLAIN), repeats=2, context=64),
}
# how many tokens each row feeds in each call: chunks of a prompt beside single tokens, and rows that rest
FEEDS = [(6, 1, 5), (6, 0, 1), (1, 6, 1), (6, 6, 1), (1, 6, 0)]


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def made(request):
    model, params, _, _ = make(CONFIGS[request.param])
    return model, params, np.random.default_rng(0).integers(1, V, (ROWS, LENGTH)).astype(np.int32)


def calls(tokens, feeds=FEEDS):
    """-> (tokens, positions, segments) [ROWS, WIDE] of each call; what pads is anything."""
    done = np.zeros(ROWS, int)
    for feed in feeds:
        given = np.arange(WIDE)[None] < np.asarray(feed)[:, None]
        at = np.where(given, done[:, None] + np.arange(WIDE)[None], 3)
        yield np.where(given, np.take_along_axis(tokens, np.minimum(at, LENGTH - 1), 1), 7).astype(np.int32), at.astype(np.int32), given.astype(np.int32)
        done += feed


def run(model, params, cache, given):
    """-> (logits of every token that counts, each row's in order, the cache)"""
    out = [[] for _ in range(ROWS)]
    for tokens, positions, segments in given:
        logits, cache = model.apply({"params": params}, tokens, positions, segments, cache)
        for row in range(ROWS):
            out[row].append(logits[row][segments[row] > 0])
    return [jnp.concatenate(x) for x in out], cache


def shuffled(cache, seed=1):
    pages = np.random.default_rng(seed).permutation(30)[:ROWS * LENGTH // PAGE]
    return dc.replace(cache, table=jnp.asarray(pages.reshape(ROWS, -1), jnp.int32))


def spoiled(cache):
    """What a poisoned request left in every page."""
    return dc.replace(cache, layers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, cache.layers))


@pytest.mark.parametrize("scale", [1.0, 0.1])              # standard deviations around 0.2 and 0.02
def test_ragged_pages_are_the_contiguous_cache(made, scale):
    model, params, tokens = made
    params = map_named(lambda name, x: x * scale if x.ndim > 1 and "table" not in name else x, params)
    want, _ = run(model, params, dc.replace(decode.init_cache(model, ROWS, LENGTH), empty=False), calls(tokens))
    got, cache = run(model, params, spoiled(shuffled(decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE))), calls(tokens))
    for a, b in zip(got, want):
        close(a, b, 1e-5)                                                     # float32; only sums over keys are in another order
    assert cache.length == LENGTH and not cache.slots
    other, _ = run(model, params, shuffled(decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE), 2), calls(tokens))
    assert all(bool((a == b).all()) for a, b in zip(got, other))              # where a page lies changes nothing
    if scale == 1.0:
        wrong = dc.replace(shuffled(decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE)), table=jnp.broadcast_to(jnp.arange(6)[None], (ROWS, 6)))
        mixed, _ = run(model, params, wrong, calls(tokens))
        assert max(float(jnp.abs(a - b).max()) for a, b in zip(mixed, want)) > 1e-2          # rows that write over each other show


def test_a_prefix_that_another_request_wrote_and_a_copied_page(made):
    model, params, tokens = made
    recurrent = any(isinstance(layer.mixer, GatedDelta | LinearAttention) for layer in model.config.layers)
    tokens = np.concatenate([np.repeat(tokens[:1, :10], ROWS, 0), tokens[:, 10:]], 1)
    feeds = [(6, 0, 0), (4, 0, 0), (6, 6, 6), (1, 2, 3)]
    whole = [(6, 6, 6), (4, 4, 4), (6, 6, 6), (1, 2, 3)]
    cold, _ = run(model, params, shuffled(decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE)), calls(tokens, whole))
    if recurrent:
        return                                                                # a state is a row's own; its beginnings are not shared
    cache = decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE)
    table = np.arange(18).reshape(ROWS, 6)
    table[1:, :2] = table[0, :2]                                              # 8 positions in two pages of all, two more in a page that is copied
    given = list(calls(tokens, feeds))
    first, cache = run(model, params, dc.replace(cache, table=jnp.asarray(table, jnp.int32)), given[:2])
    cache = decode.copy_pages(cache, jnp.asarray([2, 2, 5]), jnp.asarray([8, 14, -1]))
    moved = [(t, np.where(s > 0, p + np.array([[0], [10], [10]]), 3), s) for t, p, s in given[2:]]
    moved = [(np.where(s > 0, np.take_along_axis(tokens, np.minimum(p, LENGTH - 1), 1), 7), p, s) for t, p, s in moved]
    rest, _ = run(model, params, cache, moved)
    for row in range(ROWS):
        warm = rest[row] if row else jnp.concatenate([first[row], rest[row]])
        assert bool((warm == cold[row][-len(warm):]).all())                   # a prefix hit is the cold start, bit for bit: the same sums


def test_a_row_serves_another_request(made):
    """What the row, its pages and its state held before does not matter, even where it was not a number."""
    model, params, tokens = made
    cache = shuffled(decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE))
    want, fresh = run(model, params, cache, calls(tokens))
    again, _ = run(model, params, spoiled(fresh), calls(tokens))
    assert all(bool((a == b).all()) for a, b in zip(want, again))


def test_steps_go_over_pages():
    model, params, _, _ = make(ModelConfig(V, D, prefix=(WINDOW,), context=64))
    ready = decode.prepare(model, params)
    prompt = np.asarray([[5, 9, 11, 3, 8]], np.int32)
    where, ones = np.arange(5, dtype=np.int32)[None], np.ones((1, 5), np.int32)
    ids = []
    for cache in (decode.init_cache(ready[0], 1, 16), dc.replace(decode.init_paged(ready[0], 1, 5, length=16, page=PAGE), table=jnp.asarray([[4, 0, 2, 1]], jnp.int32))):
        logits, cache = decode.prefill(*ready, prompt, where, ones, cache)
        ids.append([int(logits[0].argmax())])
        for i in range(8):
            logits, cache = decode.decode_step(*ready, np.asarray(ids[-1][-1:], np.int32), np.asarray([5 + i], np.int32), np.ones(1, bool), cache)
            ids[-1].append(int(logits[0].argmax()))
    assert ids[0] == ids[1] and decode.can_rewind(cache)
    for function, way in ((lambda: decode.grow(ready[0], cache, 32), "more pages"), (lambda: decode.repeat_rows(cache, 2), "same pages"),
                          (lambda: ready[0].apply({"params": ready[1]}, prompt, cache=cache), "give positions")):
        with pytest.raises(ConfigError, match=way):
            function()


@pytest.mark.parametrize(("config", "more", "words"), [
    (ModelConfig(V, D, prefix=(dc.replace(PLAIN, cross=Attention(4, 4, 8, None, causal=False)),), encoder=ModelConfig(V, D, prefix=(PLAIN,))), {}, "encoder-decoder"),
    (ModelConfig(V, D, prefix=(Layer(Attention(4, 2, 8, None, relative=RelativeBuckets(8, 16)), Mlp(24)),)), {}, "layer 0 is of relative positions"),
    (CONFIGS["latent, chunks"], dict(page=0), "page=0"), (CONFIGS["latent, chunks"], dict(length=-1), "length=-1"),
])
def test_what_has_no_pages_is_named(config, more, words):
    with pytest.raises(ConfigError, match=words):
        decode.init_paged(Decoder(config, Compute("float32")), 2, 4, **{"length": 16, **more})


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (fake) devices")
def test_heads_on_a_mesh():
    """Tensor parallelism: pools divided over key/value heads stay so, and no device asks for another's pages."""
    from jax.sharding import NamedSharding, PartitionSpec

    from llmjax.core import make_mesh
    from llmjax.core.mesh import shardings
    from llmjax.models import labels
    model, params, _, _ = make(ModelConfig(V + 3, D, prefix=(WINDOW,), context=64))
    tokens = np.random.default_rng(0).integers(1, V, (ROWS, LENGTH)).astype(np.int32)
    fresh = shuffled(decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE))
    given = list(calls(tokens))[:3]
    want, _ = run(model, params, fresh, given)
    mesh = make_mesh(data=4, tensor=2)
    placed = jax.device_put(params, shardings(labels(model), params, mesh))
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor", None))
    cache = dc.replace(fresh, layers=jax.device_put(fresh.layers, heads))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda p, t, at, s, c: model.apply({"params": p}, t, at, s, c), donate_argnums=4)
        text = step.lower(placed, *given[0], cache).compile().as_text()
        out = [[] for _ in range(ROWS)]
        for t, at, s in given:
            logits, cache = step(placed, t, at, s, cache)
            for row in range(ROWS):
                out[row].append(np.asarray(logits)[row][s[row] > 0])
    for a, b in zip(out, want):
        close(np.concatenate(a), b, 1e-5)
    assert cache.layers["prefix"][0].k.sharding.is_equivalent_to(heads, 4)
    moved = [line for line in text.splitlines() if ("all-gather" in line or "all-to-all" in line) and "f32[30,4" in line]
    assert not moved, moved[0][:200]
