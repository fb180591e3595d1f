"""Linear attention in chunks against its quadratic twin and the paper's formula in numpy; pieces, gradients, memory that does not grow with T²."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels import linear_attention as kernel
from llmjax.kernels.linear_attention import features, linear_attention, quadratic

B, T, N, K, D, V = 2, 21, 4, 2, 8, 6
SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0], [3] * T], jnp.int32)
USED = (SEGMENTS > 0)[..., None, None]
fast = jax.jit(linear_attention, static_argnames="chunk")


def inputs(scale=1.0):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(f(scale * jax.random.normal(key, (B, T, n, size))) for key, n, size, f in zip(keys, (N, K, K), (D, D, V), (features, features, lambda x: x)))


def close(got, want):
    """float32 sums of some twenty positive terms in another order: 1e-5 of the largest number."""
    assert got.shape == want.shape and float(jnp.abs(got - want).max()) <= 1e-5 * float(jnp.abs(want).max())


@pytest.mark.parametrize("scale", [0.1, 2.0])
@pytest.mark.parametrize("chunk", [4, 64])
def test_chunks_are_the_quadratic_form_and_the_paper(chunk, scale):
    x = inputs(scale)
    for segments in (None, SEGMENTS):
        close(jnp.where(USED, fast(*x, segments=segments, chunk=chunk)[0], 0), jnp.where(USED, quadratic(*x, segments=segments), 0))
    q, k, v = (np.asarray(a, np.float64) for a in x)
    for row, i, n in ((0, 9, 1), (1, 20, 3)):                            # eq. 9, token by token, in the token's own document
        seen = [j for j in range(i + 1) if SEGMENTS[row, j] == SEGMENTS[row, i]]
        weights = np.asarray([q[row, i, n] @ k[row, j, n // 2] for j in seen])
        np.testing.assert_allclose(fast(*x, segments=SEGMENTS)[0][row, i, n], weights @ v[row, seen, n // 2] / weights.sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features(jnp.asarray([-2.0, 0.0, 3.0])), [np.exp(-2.0), 1.0, 4.0], rtol=1e-6)


def test_pieces_are_the_whole():
    x = inputs()
    whole, state, segment = fast(*x, segments=SEGMENTS)
    held, out = dict(state=jnp.zeros_like(state), segment=jnp.zeros((B,), jnp.int32)), []
    for start, stop in [(0, 6), (6, 13), *((i, i + 1) for i in range(13, 17)), (17, T)]:
        y, *after = fast(*(a[:, start:stop] for a in x), segments=SEGMENTS[:, start:stop], **held)
        held = dict(zip(("state", "segment"), after))
        out.append(y)
    close(jnp.where(USED, jnp.concatenate(out, 1), 0), jnp.where(USED, whole, 0))
    close(held["state"], state)
    assert held["segment"].tolist() == segment.tolist() == [2, 3]


def test_gradients_are_the_twins():
    x, weights = inputs(), jax.random.normal(jax.random.key(5), (B, T, N, V))

    def grads(rule):
        return jax.jit(jax.grad(lambda x: jnp.where(USED, rule(*x) * weights, 0).sum()))(x)
    for got, want in zip(grads(lambda *x: linear_attention(*x, segments=SEGMENTS, chunk=8)[0]), grads(lambda *x: quadratic(*x, segments=SEGMENTS))):
        close(got, want)


def test_memory_grows_with_the_length_alone():
    def scratch(length):
        x = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 2, 2)]
        return jax.jit(jax.grad(lambda *x: linear_attention(*x)[0].sum(), argnums=(0, 1, 2))).lower(*x).compile().memory_analysis().temp_size_in_bytes
    assert scratch(4096) < 5 * scratch(1024)


@pytest.mark.parametrize("mutation", ["document goes on", "keys of padding", "not causal"])
def test_a_mutation_is_caught(mutation, monkeypatch):
    x = inputs()
    segments = jnp.maximum(SEGMENTS, 1) if mutation == "keys of padding" else SEGMENTS
    want = quadratic(*x, segments=SEGMENTS)
    if mutation == "document goes on":
        real = kernel.documents
        monkeypatch.setattr(kernel, "documents", lambda s, first: (real(s, first)[0] * 0, first))
    if mutation == "not causal":
        monkeypatch.setattr(kernel.jnp, "tri", lambda n, **_: jnp.ones((n, n), bool))
    got = linear_attention(*x, segments=segments, chunk=8)[0]
    with pytest.raises(AssertionError):
        close(jnp.where(USED, got, 0), jnp.where(USED, want, 0))


def test_wrong_shapes_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="3 query heads do not divide"):
        linear_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"segments has shape \(2, 5\)"):
        linear_attention(q, k, v, segments=SEGMENTS[:, :5])
    with pytest.raises(ValueError, match="give both or neither"):
        linear_attention(q, k, v, segment=SEGMENTS[:, 0])
