"""Models whose attention goes through our own machine code on a CPU: every mixer that it knows, contiguous and paged, decodes to the logits of the whole text at once."""
import dataclasses as dc
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from pieces import B, V, close, make

from llmjax import decode
from llmjax.core import Attention, Compute, Layer, Mlp, ModelConfig, Rope
from llmjax.core.model_config import LatentAttention
from llmjax.kernels import attention as kernels
from llmjax.models import Decoder

MIXERS = {"full and ring": (Attention(4, 2, 16, Rope()), Attention(4, 2, 16, Rope(), window=6)), "chunks, sinks": (Attention(4, 4, 16, Rope(), window=7, chunked=True, sinks=True),),
          "latents": (LatentAttention(4, 16, 8, 16, 10),), "lent": (Attention(4, 1, 32, Rope(), lends="a"), Attention(8, 1, 32, Rope(), borrows="a"))}


def caches(model):
    yield "few", decode.init_cache(model, B, 40)
    yield "few_in_pages", dc.replace(decode.init_paged(model, B, 12, length=24, page=4), table=jnp.asarray(np.random.default_rng(0).permutation(12).reshape(B, 6), jnp.int32))


@pytest.mark.parametrize("kind", MIXERS)
def test_decoding_is_the_forward(kind, monkeypatch):
    """A prompt in two pieces, the second row shorter, then token after token."""
    traced = []
    for name, place in (("few", kernels), ("few_in_pages", sys.modules[kernels.paged.__module__])):
        inner = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, name=name, inner=inner, **settings: traced.append(name) or inner(*args, **settings))
    model, params, tokens, wanted = make(ModelConfig(V, 32, prefix=tuple(Layer(m, Mlp(8)) for m in MIXERS[kind]), context=64))
    asked, model = model, Decoder(model.config, Compute("float32"))          # `make` asks for blockwise by name
    tokens, lengths = np.asarray(tokens), np.asarray([5, 3])
    for name, cache in caches(model):
        at = np.broadcast_to(np.arange(5), (B, 5))
        _, cache = decode.prefill(model, params, tokens[:, :5], at, (at < lengths[:, None]).astype(np.int32), cache)
        at = np.arange(3)[None] + lengths[:, None]
        logits, cache = decode.prefill(model, params, np.take_along_axis(tokens, at, 1), at, np.ones_like(at), cache)
        close(logits, wanted[np.arange(B), lengths + 2])
        for place in (lengths + 3 + i for i in range(10)):
            logits, cache = decode.decode_step(model, params, tokens[np.arange(B), place], place, np.ones(B, bool), cache)
            close(logits, wanted[np.arange(B), place])
        assert name in traced
    traced.clear()
    decode.decode_step(asked, params, tokens[:, 0], np.zeros(B, np.int32), np.ones(B, bool), decode.init_cache(asked, B, 40))
    assert not traced                                                         # who names another gets it
