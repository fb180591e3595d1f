"""Local and global attention in blocks against its dense twin and transformers' Longformer: documents, padding, both directions, a cache, gradients, memory."""
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention.sparse import dense, sparse

kernel = importlib.import_module("llmjax.kernels.attention.sparse")

B, T, N, K, H = 2, 43, 4, 2, 8
# Padding before, between and behind; a long document, a short one (shorter than the window), one that begins inside another's block; and one that fills its row.
ROW = [0] * 2 + [1] * 20 + [2] * 2 + [0] + [3] * 14 + [0] * 4
SEGMENTS = jnp.asarray([ROW, [5] * T], jnp.int32)
POSITIONS = jnp.asarray([[sum(s == ROW[i] for s in ROW[:i]) if ROW[i] else 0 for i in range(T)], list(range(T))], jnp.int32)


def inputs(length=T):
    return tuple(jax.random.normal(key, (B, length, n, H)) for key, n in zip(jax.random.split(jax.random.key(0), 3), (N, K, K)))


def settings(causal, window, globals, **more):
    return dict(causal=causal, window=window, globals=globals, in_order=True, softcap=None, scale=0.4, **more)


WHERE = dict(query_positions=POSITIONS, key_positions=POSITIONS, query_segments=SEGMENTS, key_segments=SEGMENTS)
USED = (SEGMENTS > 0)[..., None, None]


def close(got, want):
    """float32 sums of some forty terms in another order: 1e-5 of the largest number."""
    assert got.shape == want.shape and float(jnp.abs(got - want).max()) <= 1e-5 * float(jnp.abs(want).max())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "globals"), [pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(6, 3, marks=pytest.mark.slow), (3, 7), (64, 2)])
def test_blocks_are_the_dense_form(causal, window, globals):
    x, how = inputs(), settings(causal, window, globals)
    for where in ({}, WHERE):
        got, want = (jax.jit(functools.partial(f, **how))(*x, **where) for f in (sparse, dense))
        used = USED if where else True
        close(jnp.where(used, got, 0), jnp.where(used, want, 0))
    softer = dict(how, softcap=2.0)
    close(sparse(*x, **softer), dense(*x, **softer))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_the_twins(causal):
    x, weights, how = inputs(), jax.random.normal(jax.random.key(5), (B, T, N, H)), settings(causal, 5, 2)

    def grads(f):
        return jax.jit(jax.grad(lambda x: jnp.where(USED, f(*x, **WHERE, **how) * weights, 0).sum()))(x)
    for got, want in zip(grads(sparse), grads(dense)):
        close(got, want)


def test_longformer_of_transformers():
    """Its global tokens have projections of their own, which here are the local ones; attention_window counts both sides."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    from transformers import LongformerConfig
    layer = theirs.LongformerSelfAttention(LongformerConfig(hidden_size=N * H, num_attention_heads=N, attention_window=[8], attention_probs_dropout_prob=0.0), 0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            own = getattr(layer, name)
            own.weight.normal_(0, 0.3)
            getattr(layer, f"{name}_global").load_state_dict(own.state_dict())
    length, many = 40, 3
    x = np.random.default_rng(0).normal(size=(B, length, N * H)).astype(np.float32)
    mask = np.zeros((B, length), np.float32)
    mask[:, :many], mask[1, 33:] = 10000.0, -10000.0                             # global, and padding
    give = torch.tensor(mask)
    with torch.no_grad():
        want = layer(torch.tensor(x), attention_mask=give, is_index_masked=give < 0, is_index_global_attn=give > 0, is_global_attn=True)[0].numpy()
    q, k, v = ((x @ getattr(layer, name).weight.detach().numpy().T + getattr(layer, name).bias.detach().numpy()).reshape(B, length, N, H) for name in ("query", "key", "value"))
    segments = jnp.asarray(mask >= 0, jnp.int32)
    got = sparse(*map(jnp.asarray, (q, k, v)), query_segments=segments, key_segments=segments, **dict(settings(False, 5, many), scale=H ** -0.5))
    used = np.asarray(segments > 0)
    close(jnp.asarray(np.asarray(got).reshape(want.shape)[used]), jnp.asarray(want[used]))


def test_a_cache_is_the_whole():
    x, how = inputs(), settings(True, 5, 3)
    whole = dense(*x, **how)
    full = jnp.where(jnp.arange(T)[None] < 30, 1, 0) * jnp.ones((B, 1), jnp.int32)
    for start, stop in ((7, 12), (29, 30)):
        q = x[0][:, start:stop]
        held = jnp.where(jnp.arange(T)[None] < stop, full, 0)
        got = sparse(q, *x[1:], query_positions=jnp.broadcast_to(jnp.arange(start, stop)[None], (B, stop - start)), key_positions=jnp.broadcast_to(jnp.arange(T)[None], (B, T)),
                     query_segments=jnp.ones((B, stop - start), jnp.int32), key_segments=held, **dict(how, in_order=False))
        close(got, whole[:, start:stop])


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_with_the_length_times_window_and_globals(causal):
    def scratch(length):
        x = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 2, 2)]
        return jax.jit(jax.grad(lambda *x: sparse(*x, **settings(causal, 32, 4)).sum(), argnums=(0, 1, 2))).lower(*x).compile().memory_analysis().temp_size_in_bytes
    assert scratch(4096) < 5 * scratch(1024)


@pytest.mark.parametrize("mutation", ["no far keys", "no far queries", "window off by one"])
def test_a_mutation_is_caught(mutation, monkeypatch):
    x, how = inputs(), settings(False, 4, 2)
    want = dense(*x, **WHERE, **how)
    if mutation == "no far keys":
        monkeypatch.setattr(kernel.jax.lax, "cummax", lambda x, axis: x + T)
    if mutation == "no far queries":
        monkeypatch.setattr(kernel, "_merged", lambda whole, *_: whole)
    if mutation == "window off by one":
        how = dict(how, window=5)
    got = sparse(*x, **WHERE, **how)
    with pytest.raises(AssertionError):
        close(jnp.where(USED, got, 0), jnp.where(USED, want, 0))


def test_what_means_nothing_is_refused():
    x = inputs()
    with pytest.raises(ValueError, match="globals=0"):
        sparse(*x, **settings(True, 4, 0))
    with pytest.raises(ValueError, match="over a cache is causal"):
        sparse(x[0][:, :3], *x[1:], **dict(settings(False, 4, 1), in_order=False))
