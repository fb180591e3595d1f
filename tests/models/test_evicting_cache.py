"""Evicting caches against slow twins written from the papers, token by token; in models: room for all = the whole, pieces = tokens, rows apart, what has no rule."""
import dataclasses as dc
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces import T, V, close, make

from llmjax import decode
from llmjax.core import Attention, ConfigError, GatedDelta, Layer, Mlp, ModelConfig, QKNorm, Rope
from llmjax.core.model_config import LatentAttention, Temperature
from llmjax.core.positions import Alibi, LongRope
from llmjax.models import HeavyHitters, Streaming, rope
from llmjax.models.cache import Heavy, Sinks, Slots
from llmjax.models.evicting import Eviction, evict, hit, stream

B, L, N, K, H = 2, 23, 4, 2, 8
ROPE = Rope(100.0)
SCALE = 0.4


def turned(x, place):
    """Rotary positions of one token, x [heads, H], by the formula: pairs (i, i + H/2), angle place · theta^(-2i/H)."""
    angle = place * 100.0 ** (-np.arange(0, H, 2) / H)
    a, b = x[:, :H // 2], x[:, H // 2:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def softmax_over(q, keys, values, slopes=None, distances=None):
    """q [N, H], keys, values [S, K, H] -> (out [N, H], probabilities [N, S])."""
    scores = np.einsum("ngh,snh->ngs", q.reshape(K, N // K, H), keys).reshape(N, -1) * SCALE
    scores = scores if slopes is None else scores - slopes[:, None] * np.abs(distances)[None]
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    return np.einsum("ngs,snh->ngh", p.reshape(K, N // K, -1), values).reshape(N, H), p


def streaming_twin(q, k, v, sinks, window, slopes=None):
    """StreamingLLM, section 3.2: of one row [L, heads, H]. The cache rolls, positions are those within it."""
    cache, out = [], []
    for t in range(len(q)):
        cache.append((k[t], v[t]))
        if len(cache) > sinks + window:
            del cache[sinks]
        places = np.arange(len(cache))
        keys = np.stack([turned(key, place) for (key, _), place in zip(cache, places)])
        out.append(softmax_over(turned(q[t], places[-1]), keys, np.stack([value for _, value in cache]), slopes, places[-1] - places)[0])
    return np.stack(out)


def heavy_twin(q, k, v, heavy, recent, pieces):
    """H2O, algorithm 1, of one row [L, heads, H]: per key/value head a set that loses its least attended member among those that are not recent."""
    kept, out, start = [[] for _ in range(K)], [], 0
    mass = [{} for _ in range(K)]
    for size in pieces:
        for t in range(start, start + size):
            answer = np.empty((N, H))
            for head in range(K):
                kept[head].append(t)
                group = slice(head * N // K, (head + 1) * N // K)
                tiled = lambda x, head=head: np.repeat(x[kept[head]][:, head:head + 1], K, 1)
                one, p = softmax_over(q[t], tiled(k), tiled(v))
                answer[group] = one[group]
                for i, j in enumerate(kept[head]):
                    mass[head][j] = mass[head].get(j, 0.0) + p[group, i].sum()
            out.append(answer)
        start += size
        for head in range(K):
            while len(kept[head]) > heavy + recent:
                kept[head].remove(min((j for j in kept[head] if j <= start - 1 - recent), key=lambda j, head=head: mass[head][j]))
    return np.stack(out), kept


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(3)
    return [rng.normal(size=(B, L, heads, H)).astype(np.float32) for heads in (N, K, K)]


def rotate(x, places):
    return rope.rotate(x, rope.tables(ROPE, H, places), ROPE)


def over_pieces(step, entry, kept, policy, arrays, pieces, lead=2):
    """Row 1 is `lead` tokens late and pads its first call on the left. -> [B, L, N, H], the entry."""
    from llmjax.models import Cache
    cache, outs, done = Cache({}, {}, policy=policy, kept=kept), [], 0
    for size in pieces:
        at = np.broadcast_to(np.arange(done, done + size), (B, size)).astype(np.int32)
        q, k, v = (jnp.asarray(x[:, done:done + size]) for x in arrays)
        segments = np.ones((B, size), np.int32)
        if done == 0:
            at, segments = np.pad(at, [(0, 0), (lead, 0)]), np.pad(segments, [(0, 0), (lead, 0)])
            q, k, v = (jnp.pad(x, [(0, 0), (lead, 0), (0, 0), (0, 0)], constant_values=9.0) for x in (q, k, v))
        where = evict(cache, jnp.asarray(at), jnp.asarray(segments))
        out, entry = step(q, k, v, entry, where)
        cache = dc.replace(cache, kept=where.after)
        outs.append(np.asarray(out)[:, -size:])
        done += size
    return np.concatenate(outs, 1), entry


@pytest.mark.parametrize(("sinks", "window"), [(4, 4), (2, 7), (0, 5)])
@pytest.mark.parametrize("alibi", [False, True])
def test_streaming_is_the_paper_whatever_the_pieces(arrays, sinks, window, alibi):
    policy, slopes = Streaming(sinks, window), np.array([0.5, 0.25, 0.1, 0.05], np.float32) if alibi else None
    want = np.stack([streaming_twin(*(x[b] for x in arrays), sinks, window, slopes) for b in range(B)])
    step = jax.jit(functools.partial(stream, rotate=rotate, softcap=None, scale=SCALE, slopes=None if slopes is None else jnp.asarray(slopes)))
    for pieces in ([1] * L,) if alibi else ([1] * L, [9, 9, 1, 4], [L]):
        entry = Sinks(*(jnp.full((B, policy.size, K, H), 7.0) for _ in range(2)))
        blank = Slots(*(jnp.zeros((B, policy.size), jnp.int32) for _ in range(2)))
        got, _ = over_pieces(step, entry, blank, policy, arrays, pieces)
        wider = streaming_twin(*(x[1] for x in arrays), sinks, window + 1, slopes)
        assert np.abs(got[1] - wider).max() > 1e-2                            # one token more shows
        np.testing.assert_allclose(got, want, atol=3e-5)                      # float32 rotations by places up to 23 on both sides of a softmax


def test_places_are_the_papers_example():
    """Section 3.2: with the cache [0, 1, 2, 3, 6, 7, 8], decoding the ninth token, positions are [0, 1, 2, 3, 4, 5, 6, 7]."""
    where = Eviction(*(jnp.asarray(x, jnp.int32) for x in ([[9]], [[1]])), jnp.ones((1, 1), bool), jnp.asarray([9]), jnp.asarray([2]), None, None, None, Streaming(4, 4))
    assert where.within(jnp.asarray([[0, 1, 2, 3, 6, 7, 8, 9]])).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] and where.capped.tolist() == [[7]]


@pytest.mark.parametrize("pieces", [[1] * L, [12, *[1] * 11], [7, 9, 7]], ids=["tokens", "prompt and tokens", "pieces"])
def test_heavy_hitters_are_the_papers(arrays, pieces):
    policy, (q, k, v) = HeavyHitters(3, 4), (x.copy() for x in arrays)
    q += 0.7
    k[:, 9, 0], k[:, 12, 1] = 1.5, 1.5                                        # tokens that all queries look at, another in each head
    arrays = q, k, v
    step = jax.jit(functools.partial(hit, softcap=None, scale=SCALE))
    blank = (B, policy.size, K)
    entry = Heavy(*(jnp.full((*blank, H), jnp.float32(7)) for _ in range(2)), jnp.full(blank, -1, jnp.int32), jnp.zeros(blank))
    got, entry = over_pieces(step, entry, None, policy, arrays, pieces)
    for b in range(B):
        want, kept = heavy_twin(*(x[b] for x in arrays), 3, 4, pieces)
        np.testing.assert_allclose(got[b], want, atol=1e-5)
        assert [sorted(np.asarray(entry.positions[b, :, head]).tolist()) for head in range(K)] == [sorted(x) for x in kept]
    assert 9 in kept[0] and 12 in kept[1] and kept[0] != kept[1]              # heads choose for themselves


FULL = Layer(Attention(4, 2, 8, Rope(), qk_norm=QKNorm(), qkv_bias=True, sinks=True, gate=True, softcap=20.0), Mlp(40))
SLOPES = Layer(Attention(4, 2, 8, None, alibi=Alibi()), Mlp(24))
RING = Layer(Attention(4, 2, 8, Rope(), window=6), Mlp(40))
STATE = Layer(GatedDelta(4, 2, 8, 6), Mlp(24))
MIXED = ModelConfig(V, 32, prefix=(STATE,), cycle=(FULL, RING), repeats=2, suffix=(SLOPES,), context=64)


@pytest.fixture(scope="module")
def made():
    return make(MIXED)


def fed(model, params, tokens, policy, pieces):
    cache, out, done = decode.init_evicting(model, tokens.shape[0], policy), [], 0
    for size in pieces:
        at = np.broadcast_to(np.arange(done, done + size, dtype=np.int32), (tokens.shape[0], size))
        piece, cache = model.apply({"params": params}, tokens[:, done:done + size], at, None, cache)
        out.append(piece)
        done += size
    return jnp.concatenate(out, 1), cache


@pytest.mark.parametrize("policy", [Streaming(3, 30), HeavyHitters(3, 30)], ids=lambda p: type(p).__name__)
def test_with_room_for_all_nothing_is_given_up(made, policy):
    model, params, tokens, logits = made
    got, cache = fed(model, params, tokens, policy, [9, 11, 1, 1])
    close(got, logits)
    assert cache.length == 33 and not decode.can_rewind(cache)


def test_pieces_are_tokens_in_a_streaming_model(made):
    model, params, tokens, logits = made
    one, _ = fed(model, params, tokens, Streaming(2, 5), [9, 11, 1, 1])
    other, _ = fed(model, params, tokens, Streaming(2, 5), [1] * T)
    close(one, other)
    assert float(jnp.abs(one - logits).max() / logits.std()) > 1e-2           # and something is given up


@pytest.mark.parametrize(("layer", "policy", "words"), [
    (Layer(LatentAttention(4, 12, 6, 8, 10), Mlp(8)), Streaming(2, 4), "no rule for latent attention"),
    (dc.replace(FULL, mixer=dc.replace(FULL.mixer, qk_norm=QKNorm(rotated=True))), Streaming(2, 4), "norms after the rotation"),
    (dc.replace(FULL, mixer=dc.replace(FULL.mixer, rope=Rope(scaling=LongRope((1.0,) * 4, (2.0,) * 4, 8, 1.0)))), Streaming(2, 4), "depend on the text's length"),
    (FULL, HeavyHitters(4, 0), "recent=0"), (FULL, Streaming(-1, 4), "sinks=-1"),
    (Layer(Attention(4, 2, 8, Rope(), window=5, globals=2), Mlp(8)), HeavyHitters(2, 4), "global tokens"),
])
def test_what_has_no_rule_is_named(layer, policy, words):
    model = make(ModelConfig(V, 32, prefix=(FULL,)))[0]
    with pytest.raises(ConfigError, match=words):
        decode.init_evicting(dc.replace(model, config=ModelConfig(V, 32, prefix=(layer,))), 1, policy)
    with pytest.raises(ConfigError, match="keeps floats"):
        decode.init_evicting(model, 1, Streaming(), "int8")


def test_a_temperature_follows_the_place_in_the_cache():
    spec = dc.replace(FULL.mixer, temperature=Temperature(0.5, 4.0))
    model, params, tokens, _ = make(ModelConfig(V, 32, prefix=(dc.replace(FULL, mixer=spec),), context=64))
    plain = dc.replace(model, config=ModelConfig(V, 32, prefix=(FULL,), context=64))
    got, want = (fed(m, params, tokens, Streaming(1, 2), [T])[0] for m in (model, plain))
    close(got, want)                                                          # places stay below 3: the temperature is 1
