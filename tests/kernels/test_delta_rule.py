"""The gated delta rule in chunks against the recurrence and against transformers' own; the causal convolution against torch's; documents, padding, pieces, gradients."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels import delta_rule
from llmjax.kernels.delta_rule import gated_delta_rule, recurrence
from llmjax.kernels.recurrence import causal_conv, documents, gaps

B, T, K, N, D, V = 2, 21, 2, 4, 8, 6
# Two documents with padding before, between, inside and behind; one document that fills its row.
SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0], [3] * T], jnp.int32)


def inputs(seed=0, scale=1.0, length=T):
    keys = jax.random.split(jax.random.key(seed), 5)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    q, k = (unit(jax.random.normal(key, (B, length, K, D))) for key in keys[:2])
    v = scale * jax.random.normal(keys[2], (B, length, N, V))
    decay = -scale * jax.nn.softplus(jax.random.normal(keys[3], (B, length, N)))
    return q, k, v, decay, jax.nn.sigmoid(scale * jax.random.normal(keys[4], (B, length, N)))


def close(got, want, bound=1e-5):
    """float32 on both sides; a chunk's system and the recurrence add in another order: 1e-5 of the largest number, whose rounding it is."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.shape == b.shape and float(jnp.abs(a - b).max()) <= bound * float(jnp.abs(b).max())


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_chunks_are_the_recurrence(chunk, scale):
    x = inputs(scale=scale)
    state, segment = scale * jax.random.normal(jax.random.key(9), (B, N, D, V)), jnp.asarray([1, 7], jnp.int32)
    used = (SEGMENTS > 0)[..., None, None]
    for more in ({}, dict(segments=SEGMENTS), dict(segments=SEGMENTS, state=state, segment=segment)):
        got, want = (f(*x, **more) for f in (functools.partial(gated_delta_rule, chunk=chunk), recurrence))
        close((jnp.where(used, got[0], 0), *got[1:]), (jnp.where(used, want[0], 0), *want[1:]))


@pytest.mark.parametrize("chunk", [5, 64])
def test_gradients_are_the_recurrences(chunk):
    x = inputs(3)
    state, segment, weights = jax.random.normal(jax.random.key(9), (B, N, D, V)), jnp.asarray([1, 3], jnp.int32), jax.random.normal(jax.random.key(5), (B, T, N, V))

    def loss(rule, arrays, state):
        y, after, _ = rule(*arrays, segments=SEGMENTS, state=state, segment=segment)
        return jnp.sum(jnp.where((SEGMENTS > 0)[..., None, None], y * weights, 0)) + jnp.sum(jnp.sin(after))
    got, want = (jax.grad(functools.partial(loss, rule), argnums=(0, 1))(x, state) for rule in (functools.partial(gated_delta_rule, chunk=chunk), recurrence))
    close(got, want, 2e-5)


def test_pieces_and_single_steps_are_the_whole():
    x = inputs(1)
    whole = gated_delta_rule(*x, segments=SEGMENTS)
    state, segment, out = jnp.zeros((B, N, D, V)), jnp.zeros((B,), jnp.int32), []
    for start, stop in [(0, 6), (6, 13), *((i, i + 1) for i in range(13, T))]:
        y, state, segment = gated_delta_rule(*(a[:, start:stop] for a in x), segments=SEGMENTS[:, start:stop], state=state, segment=segment, chunk=4)
        out.append(y)
    used = (SEGMENTS > 0)[..., None, None]
    close((jnp.where(used, jnp.concatenate(out, 1), 0), state, segment), (jnp.where(used, whole[0], 0), *whole[1:]))


def test_similar_keys_and_strong_decays_stay_finite_and_exact():
    """All keys alike with beta near 1 and no decay: where powers of the chunk's matrix would cancel catastrophically; and decays that underflow at once."""
    q, k, v, decay, beta = inputs(2, length=80)
    same = jnp.broadcast_to(k[:, :1], k.shape)
    close(gated_delta_rule(q, same, v, 0 * decay, 0 * beta + 0.999), recurrence(q, same, v, 0 * decay, 0 * beta + 0.999), 1e-4)     # 80 corrections of one key amplify rounding tenfold
    close(gated_delta_rule(q, k, v, 200 * decay, beta), recurrence(q, k, v, 200 * decay, beta))
    grads = jax.grad(lambda g: gated_delta_rule(q, k, v, g, beta)[0].sum())(200 * decay)
    assert bool(jnp.isfinite(grads).all())


def test_the_rule_of_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, decay, beta = inputs(4, length=70)
    state = jax.random.normal(jax.random.key(9), (B, N, D, V))
    give = lambda x: torch.tensor(np.asarray(x))
    for rule in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        repeat = lambda x: give(jnp.repeat(x, N // K, 2))          # the recurrent one of some versions wants equal heads
        want, after = rule(repeat(q), repeat(k), give(v), g=give(decay), beta=give(beta), initial_state=give(state), output_final_state=True)
        got = gated_delta_rule(q * D ** -0.5, k, v, decay, beta, state=state, segment=jnp.ones((B,), jnp.int32))
        close(got[:2], (jnp.asarray(want.numpy()), jnp.asarray(after.numpy())))


@pytest.mark.parametrize("mutation", ["no decay", "no correction", "document goes on", "padding decays"])
def test_a_mutation_is_caught(mutation, monkeypatch):
    q, k, v, decay, beta = inputs(1)
    want = recurrence(q, k, v, decay, beta, segments=SEGMENTS)
    if mutation == "no decay":
        decay = 0 * decay
    if mutation == "no correction":
        monkeypatch.setattr(delta_rule.jax.lax.linalg, "triangular_solve", lambda a, b, **_: b)
    if mutation == "document goes on":
        monkeypatch.setattr(delta_rule, "documents", lambda s, first: (documents(s, first)[0] * 0, first))
    segments = jnp.maximum(SEGMENTS, 1) if mutation == "padding decays" else SEGMENTS
    got = gated_delta_rule(q, k, v, decay, beta, segments=segments, chunk=8)
    used = (SEGMENTS > 0)[..., None, None]
    with pytest.raises(AssertionError):
        close(jnp.where(used, got[0], 0), jnp.where(used, want[0], 0), 1e-3)


def test_wrong_shapes_are_named():
    q, k, v, decay, beta = inputs()
    for change, words in (((q[0], k, v, decay, beta), "q, k, v have shapes"), ((q, k, v[:, :, :3], decay, beta), "3 value heads do not divide"),
                          ((q, k, v, decay[:, :3], beta), r"decay has shape \(2, 3, 4\)")):
        with pytest.raises(ValueError, match=words):
            gated_delta_rule(*change)
    with pytest.raises(ValueError, match="give both or neither"):
        gated_delta_rule(q, k, v, decay, beta, segment=jnp.zeros((B,), jnp.int32))


# The convolution


def test_convolution_is_torchs_over_each_document_alone():
    torch = pytest.importorskip("torch")
    x, w = jax.random.normal(jax.random.key(0), (B, T, 2, 3)), jax.random.normal(jax.random.key(1), (4, 2, 3))

    def theirs(piece):
        out = torch.nn.functional.conv1d(torch.tensor(np.asarray(piece.reshape(1, -1, 6)).swapaxes(1, 2)), torch.tensor(np.asarray(w.reshape(4, 1, 6)).T), groups=6, padding=3)
        return out[0, :, :piece.shape[0]].T.numpy().reshape(piece.shape)
    plain, nothing = causal_conv(x, w)
    assert nothing is None
    np.testing.assert_allclose(plain[1], theirs(x[1]), atol=1e-5)      # float32 sums of four products
    assert bool(gaps(SEGMENTS)) and not bool(gaps(jnp.where(SEGMENTS == 1, 0, SEGMENTS)))
    empty = jnp.zeros((B, 3, 2, 3)), jnp.zeros((B, 3), jnp.int32)
    for got in (causal_conv(x, w, SEGMENTS)[0], causal_conv(x, w, SEGMENTS, empty)[0]):
        for row in range(B):
            for document in range(1, 4):
                at = np.flatnonzero(np.asarray(SEGMENTS[row]) == document)
                if len(at):
                    np.testing.assert_allclose(got[row, at], theirs(x[row, at]), atol=1e-5)


def test_convolution_in_pieces_is_the_whole():
    x, w = jax.random.normal(jax.random.key(0), (B, T, 5)), jax.random.normal(jax.random.key(1), (4, 5))
    empty = jnp.zeros((B, 3, 5)), jnp.zeros((B, 3), jnp.int32)
    whole, kept = causal_conv(x, w, SEGMENTS, empty)
    history, out = empty, []
    for start, stop in [(0, 4), (4, 6), *((i, i + 1) for i in range(6, 12)), (12, T)]:
        y, history = causal_conv(x[:, start:stop], w, SEGMENTS[:, start:stop], history)
        out.append(y)
    used = (SEGMENTS > 0)[..., None]
    np.testing.assert_allclose(jnp.where(used, jnp.concatenate(out, 1), 0), jnp.where(used, whole, 0), atol=1e-5)
    for a, b in zip(history, kept):
        np.testing.assert_array_equal(jnp.where(kept[1].reshape(B, 3, *(1,) * (a.ndim - 2)) > 0, a, 0), jnp.where(kept[1].reshape(B, 3, *(1,) * (a.ndim - 2)) > 0, b, 0))
    np.testing.assert_array_equal(kept[0][0], x[0, 16:19])              # the last three tokens that are not padding
    grads = [jax.grad(lambda x, f=f: jnp.where(used, f(x) ** 2, 0).sum())(x) for f in (lambda x: causal_conv(x, w, SEGMENTS)[0], lambda x: causal_conv(x, w, SEGMENTS, empty)[0])]
    np.testing.assert_allclose(*grads, atol=1e-5)
