"""Grok-1 has no class in transformers: its mathematics, written out in numpy from the published code (github.com/xai-org/grok-1, model.py), beside ours.

Float32 against float64: 1e-4 of the logits' standard deviation is rounding over three layers; what is forgotten shows as more than twice that.
"""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import models
from llmjax.checkpoint import FAMILIES, exports, to_model_config
from llmjax.core.run_config import Compute

HEADS, GROUPS, SIZE, EXPERTS, LAYERS = 4, 2, 8, 4, 3
FIELDS = dict(model_type="grok-1", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
              max_position_embeddings=64, num_experts=EXPERTS, num_experts_per_tok=2, attn_output_multiplier=0.5, embedding_multiplier_scale=3.0, output_multiplier_scale=0.577,
              max_attn_value=1.5, rms_norm_eps=1e-5)
TOKENS = np.random.default_rng(3).integers(0, 96, (2, 20))


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def turned(x):
    """x [B, T, N, H] rotated: pairs (i, i + H/2), base 10,000."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / 10_000 ** (np.arange(half) / half)
    sin, cos = np.sin(angle)[None, :, None], np.cos(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def written_out(w, tokens):
    B, T = tokens.shape
    x = w["model.embed_tokens.weight"][tokens] * 3.0
    for i in range(LAYERS):
        p = {name.removeprefix(f"model.layers.{i}."): value for name, value in w.items() if name.startswith(f"model.layers.{i}.")}
        h = rms(x, p["pre_attn_norm.weight"])
        q, k, v = (turned(y) if name != "v" else y for name, y in ((name, (h @ p[f"attn.{name}_proj.weight"].T).reshape(B, T, -1, SIZE)) for name in "qkv"))
        k, v = np.repeat(k, HEADS // GROUPS, 2), np.repeat(v, HEADS // GROUPS, 2)
        scores = 1.5 * np.tanh(np.einsum("btnh,bsnh->bnts", q, k) * 0.5 / 1.5)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        h = np.einsum("bnts,bsnh->btnh", softmax(scores), v).reshape(B, T, -1) @ p["attn.o_proj.weight"].T
        x = x + rms(h, p["post_attn_norm.weight"])
        h = rms(x, p["pre_moe_norm.weight"])
        probabilities, mixed = softmax(h @ p["moe_block.gate.weight"].T), np.zeros_like(h)
        for b in range(B):
            for t in range(T):
                for e in np.argsort(-probabilities[b, t])[:2]:
                    up, into, down = (p[f"moe_block.experts.{e}.{name}.weight"] for name in ("linear_v", "linear", "linear_1"))
                    mixed[b, t] += probabilities[b, t, e] * (down @ (gelu(into @ h[b, t]) * (up @ h[b, t])))
        x = x + rms(mixed, p["post_moe_norm.weight"])
    return rms(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T * 0.577


@pytest.fixture(scope="module", params=[0.05, 0.3])
def pair(request):
    config = to_model_config(FIELDS)
    model = models.build(config, Compute("float32"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (rng.normal(size=x.shape) * request.param + (x.ndim == 1 or x.shape == (LAYERS, 32))).astype(np.float32), models.abstract_params(model))
    tensors = {e.name: e.make().astype(np.float64) for e in exports(FAMILIES["grok1"].rows(config), params)}
    return model, params, written_out(tensors, TOKENS)


def far(model, params, want):
    got = model.apply({"params": params}, jnp.asarray(TOKENS, jnp.int32))[0]
    return np.abs(np.asarray(got) - want).max() / want.std()


def test_logits(pair):
    assert far(*pair) < 1e-4


@pytest.mark.parametrize("change", [dict(embed_scale=1.0), dict(logit_scale=1.0), dict(softcap=None), dict(top_k=1), dict(activation="gelu"), dict(wiring="pre")])
def test_a_mutation_shows(pair, change):
    """(That the two gates are not made to sum to 1 cannot show: the norm after the experts takes a common factor away.)"""
    model, params, want = pair
    layer = model.config.cycle[0]
    parts = {"mixer": ("softcap",), "ffn": ("top_k", "activation")}
    for part, names in parts.items():
        mine = {k: v for k, v in change.items() if k in names}
        layer = dc.replace(layer, **{part: dc.replace(getattr(layer, part), **mine)})
    if "wiring" in change:
        layer = dc.replace(layer, wiring="pre")
    top = {k: v for k, v in change.items() if k.endswith("_scale")}
    other = models.build(dc.replace(model.config, cycle=(layer,), **top), model.compute)
    assert far(other, params, want) > 2e-4
