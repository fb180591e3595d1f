"""Rearrange patterns against what they mean, written out in numpy, both ways."""
import numpy as np
import pytest

from llmjax.checkpoint import patterns

D, N, K, H, F = 6, 4, 2, 3, 5
rng = np.random.default_rng(0)


def both_ways(text, shapes, file_array, expected, known=None):
    """file_array splits into `expected` and they join into it again, bit for bit; the file's shape follows from ours."""
    pattern = patterns.parse(text)
    pieces = [patterns.solve(pattern.right, s, known or {}) for s in shapes]
    assert patterns.file_shape(pattern, pieces) == file_array.shape
    ours = [patterns.split(file_array, pattern, pieces, i) for i in range(len(shapes))]
    for x, want, shape in zip(ours, expected, shapes):
        assert x.shape == shape
        np.testing.assert_array_equal(x, want)
    np.testing.assert_array_equal(patterns.join(ours, pattern, pieces), file_array)


def test_linear_of_all_heads():
    x = rng.normal(size=(N * H, D))
    both_ways("(n h) d -> d n h", [(D, N, H)], x, [x.reshape(N, H, D).transpose(2, 0, 1)])


def test_output_projection():
    x = rng.normal(size=(D, N * H))
    both_ways("d (n h) -> n h d", [(N, H, D)], x, [x.reshape(D, N, H).transpose(1, 2, 0)])


def test_neighbouring_pairs_become_halves():
    ours = rng.normal(size=(D, N, 8))
    # llama.cpp's convert_hf_to_gguf permute: [heads, 2, half] -> [heads, half, 2]
    file = ours.transpose(1, 2, 0).reshape(N, 2, 4, D).swapaxes(1, 2).reshape(N * 8, D)
    both_ways("(n p 2) d -> d n (2 p)", [(D, N, 8)], file, [ours])


def test_fused_one_after_the_other_with_unequal_parts():
    q, k, v = rng.normal(size=(D, N, H)), rng.normal(size=(D, K, H)), rng.normal(size=(D, K, H))
    both_ways("d [n h] -> d n h", [q.shape, k.shape, v.shape], np.concatenate([x.reshape(D, -1) for x in (q, k, v)], 1), [q, k, v])


def test_fused_bias():
    q, k = rng.normal(size=(N, H)), rng.normal(size=(K, H))
    both_ways("[n h] -> n h", [q.shape, k.shape], np.concatenate([q.ravel(), k.ravel()]), [q, k])


def test_fused_within_each_head():
    q, k, v = (rng.normal(size=(D, N, H)) for _ in range(3))
    file = np.stack([x.transpose(1, 2, 0) for x in (q, k, v)], 1).reshape(N * 3 * H, D)
    both_ways("(n [h]) d -> d n h", [q.shape] * 3, file, [q, k, v])


def test_fused_within_each_group_of_queries():
    q, k = rng.normal(size=(D, N, H)), rng.normal(size=(D, K, H))
    file = np.concatenate([q.transpose(1, 2, 0).reshape(K, N // K, H, D), k.transpose(1, 2, 0).reshape(K, 1, H, D)], 1).reshape(-1, D)
    both_ways("(k [g] h) d -> d (k g) h", [q.shape, k.shape], file, [q, k], {"k": K})


def test_fused_one_by_one():
    gate, up = rng.normal(size=(D, F)), rng.normal(size=(D, F))
    both_ways("d (f [1]) -> d f", [gate.shape, up.shape], np.stack([gate, up], -1).reshape(D, 2 * F), [gate, up])


def test_what_does_not_fit_is_said():
    pattern = patterns.parse("(n p 2) -> n (2 p)")
    with pytest.raises(ValueError, match="does not split"):
        patterns.solve(pattern.right, (4, 7), {})
    with pytest.raises(ValueError, match="do not follow"):
        patterns.solve(patterns.parse("(k g) -> (k g)").right, (8,), {})
    with pytest.raises(ValueError, match="2 dimensions are expected"):
        patterns.solve(pattern.right, (4,), {})
