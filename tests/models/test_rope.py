"""Frequencies of every scaling against transformers; the rotation against complex multiplication."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.positions import DynamicNtk, LinearScaling, Llama3Scaling, Rope, Yarn
from llmjax.models import rope as ours

CASES = {
    "plain": (None, {"rope_type": "default"}),
    "linear": (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (DynamicNtk(4.0, 32), {"rope_type": "dynamic", "factor": 4.0}),
    "llama3": (Llama3Scaling(8.0, 1.0, 4.0, 32), {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn": (Yarn(4.0, 32), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn, mscale": (Yarn(40.0, 64, mscale=0.9, mscale_all_dim=0.5, beta_fast=16.0),
                     {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.9, "mscale_all_dim": 0.5, "beta_fast": 16.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies(name):
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    scaling, fields = CASES[name]
    for theta, head_dim in ((10_000.0, 16), (500_000.0, 64)):
        original = fields.get("original_max_position_embeddings", 32)
        config = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=original, rope_parameters={"rope_theta": theta, **fields})
        length = 100
        if fields["rope_type"] == "default":
            theirs, factor = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim), 1.0
        else:
            theirs, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, torch.device("cpu"), seq_len=length)
        got, mine = ours.frequencies(Rope(theta, scaling=scaling), head_dim, jnp.asarray([length]))
        np.testing.assert_allclose(np.ravel(got), np.asarray(theirs), rtol=2e-6)
        assert mine == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_is_complex_multiplication(interleaved, fraction):
    rope = Rope(100.0, fraction, interleaved)
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 16))
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [9, 2, 2, 40, 0, 1, 3]])
    got = np.asarray(ours.rotate(x, ours.tables(rope, 16, positions), rope))
    d = int(16 * fraction)
    turned = np.asarray(x[..., :d])
    pairs = turned.reshape(*turned.shape[:-1], d // 2, 2) if interleaved else np.stack(np.split(turned, 2, -1), -1)
    angles = np.asarray(positions)[..., None] * 100.0 ** (-np.arange(0, d, 2) / d)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, :, None]
    back = np.stack([z.real, z.imag], -1).reshape(turned.shape) if interleaved else np.concatenate([z.real, z.imag], -1)
    np.testing.assert_allclose(got[..., :d], back, atol=1e-5)
    np.testing.assert_array_equal(got[..., d:], np.asarray(x[..., d:]))
