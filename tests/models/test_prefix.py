"""Prefix-LM: the prefix sees itself from both sides, the rest as ever; against transformers with the mask written out, packed, padded, through a cache; refused where it means nothing."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import pretrained
from llmjax.core import Attention, Compute, GatedDelta, Layer, Mlp, ModelConfig
from llmjax.core.errors import ConfigError
from llmjax.models import Decoder, init_cache, init_params

T, V = 18, 61
PREFIX = jnp.asarray([5, 9], jnp.int32)
FULL = Layer(Attention(4, 2, 8), Mlp(40))


@pytest.fixture(scope="module")
def made():
    model = Decoder(ModelConfig(V, 32, cycle=(FULL,), repeats=2, context=64), Compute("float32"))
    params = init_params(model, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (2, T), 1, V)
    return model, params, tokens, model.apply({"params": params}, tokens, prefix=PREFIX)[0]


def close(a, b, bound=2e-5):
    """float32 on both sides, some ten products deep: 2e-5 of the spread."""
    assert float(jnp.abs(a - b).max() / b.std()) < bound


@pytest.mark.parametrize("scale", [0.02, 0.2])
def test_the_mask_written_out_for_transformers(scale, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=scale)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval().float()
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("eager")
    tokens = np.random.default_rng(0).integers(3, 96, (2, T))
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    see = np.stack([(j <= i) | (j < int(p)) for p in PREFIX])[:, None]
    give = torch.tensor(tokens)
    mask = torch.tensor(np.where(see, 0.0, -1e30), dtype=torch.float32)
    labels = torch.tensor(tokens[:, 1:])
    out = theirs(input_ids=give, attention_mask=mask).logits
    torch.nn.functional.cross_entropy(out[:, :-1].reshape(-1, 96), labels.reshape(-1)).backward()
    model, params, _ = pretrained.load(tmp_path, dtype="float32")

    def loss(params, prefix):
        logits = model.apply({"params": params}, jnp.asarray(tokens), prefix=prefix)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(tokens)[:, 1:, None], -1).mean(), logits
    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params, PREFIX)
    close(logits, jnp.asarray(out.detach().numpy()), 5e-5)
    close(grads["cycle"]["0"]["mixer"]["k"][0].reshape(32, -1), jnp.asarray(theirs.model.layers[0].self_attn.k_proj.weight.grad.numpy().T), 2e-4)      # a gradient sums 36 tokens of either sign
    with pytest.raises(AssertionError):                      # a plain causal mask is another model
        close(loss(params, None)[1], jnp.asarray(out.detach().numpy()), 5e-5)
    with pytest.raises(AssertionError):                      # and so is a prefix one token longer
        close(loss(params, PREFIX + 1)[1], jnp.asarray(out.detach().numpy()), 5e-5)


def test_no_prefix_is_causal(made):
    model, params, tokens, logits = made
    plain = model.apply({"params": params}, tokens)[0]
    for short in (0, 1):
        close(model.apply({"params": params}, tokens, prefix=jnp.full((2,), short, jnp.int32))[0], plain)
    assert float(jnp.abs(logits - plain).max()) > 1e-2


def test_packed_padded_and_cached(made):
    model, params, tokens, logits = made
    lead, two = 3, 1
    row = jnp.concatenate([jnp.zeros(lead, jnp.int32), tokens[0], tokens[1], jnp.zeros(two, jnp.int32)])[None]
    segments = jnp.asarray([[0] * lead + [1] * T + [2] * T + [0] * two])
    positions = jnp.asarray([[0] * lead + list(range(T)) * 2 + [0] * two])
    prefix = jnp.where(segments == 1, PREFIX[0], PREFIX[1])
    packed = model.apply({"params": params}, row, positions, segments, prefix=prefix)[0]
    close(packed[0, lead:lead + T], logits[0])
    close(packed[0, lead + T:lead + 2 * T], logits[1])
    cache, out = init_cache(model.config, 2, T, jnp.float32), []
    for start, stop in [(0, 10), (10, 13), *((i, i + 1) for i in range(13, T))]:
        piece, cache = model.apply({"params": params}, tokens[:, start:stop], cache=cache, prefix=PREFIX)
        out.append(piece)
    close(jnp.concatenate(out, 1), logits)


@pytest.mark.parametrize(("mixer", "words"), [(Attention(4, 2, 8, window=6), "layer 0 has window=6"), (GatedDelta(4, 2, 8, 8), r"layer 0 is recurrent \(GatedDelta\)")])
def test_refused_where_it_means_nothing(mixer, words):
    model = Decoder(ModelConfig(V, 32, cycle=(dc.replace(FULL, mixer=mixer),), repeats=1), Compute("float32"))
    with pytest.raises(ConfigError, match=words):
        model.apply({"params": init_params(model, jax.random.key(0))}, jnp.ones((1, 4), jnp.int32), prefix=jnp.ones((1,), jnp.int32))
