"""A small decoder with its tokens and logits, and what counts as equal: for tests of layer kinds."""
import jax
import jax.numpy as jnp

from llmjax.core import Compute
from llmjax.models import Decoder, init_params

V, B, T = 61, 2, 22


def make(config):
    """-> (model, parameters that are all moved from where they start, tokens [B, T], logits)."""
    model = Decoder(config, Compute("float32", attention="blockwise"))
    params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), init_params(model, jax.random.key(1)))
    tokens = jax.random.randint(jax.random.key(4), (B, T), 1, V)          # a state of almost nothing before a norm magnifies rounding a hundredfold: keys 2, 3 and 5 meet one
    return model, params, tokens, model.apply({"params": params}, tokens)[0]


def close(a, b, bound=5e-5):
    """float32 on both sides, some ten to fifteen products, norms and perhaps a recurrence deep: 5e-5 of the reference's spread leaves room for the order of sums only."""
    assert float(jnp.abs(a - b).max() / b.std()) < bound
