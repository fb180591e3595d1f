"""One forward: decoding = whole, chunked = whole, packed = separate, padded = unpadded, scanned = unrolled, rematerialised = kept, for every kind of layer."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import Attention, CheckpointError, Compute, Layer, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm, Rope, unrolled
from llmjax.core.model_config import Groups, LatentAttention, Temperature
from llmjax.core.positions import Alibi, Yarn
from llmjax.core.tree import flatten, map_named
from llmjax.decode import prepare, stack, unstack
from llmjax.models import Decoder, abstract_params, init_cache, init_params, labels

V, D, B, T = 61, 32, 2, 24
WINDOW = Layer(Attention(4, 2, 8, Rope(), window=6, softcap=30.0, sinks=True, qkv_bias=True), Mlp(40, "gelu_tanh"), "sandwich")
FULL = Layer(Attention(4, 2, 8, Rope(1e5), qk_norm=QKNorm(), out_bias=True, scale=0.3), Mlp(40), "pre", residual_scale=0.7)
OLD = Layer(Attention(4, 1, 8, None), Mlp(40, "gelu", gated=False, bias=True), "parallel")
TWO = Layer(Attention(4, 4, 8, Rope(fraction=0.5, interleaved=True)), Mlp(24, "relu_squared"), "parallel_two_norms")
EXPERTS = Layer(Attention(4, 2, 8, Rope(), qk_norm=QKNorm(over="full")), MixtureOfExperts(4, 2, 16, shared=24, shared_gate=True), "post")
LATENT = Layer(LatentAttention(4, 12, 6, 8, 10, query_rank=16, bias=True, rope=Rope(interleaved=True, scaling=Yarn(4.0, 8))),
               MixtureOfExperts(8, 2, 16, score="sigmoid", groups=Groups(4, 2, by=2), selection_bias=True, scale=2.5, shared=24))
CHUNKS = Layer(Attention(4, 2, 8, Rope(reverse=True), window=7, chunked=True, clip=1.0, qk_norm=QKNorm(Norm(), "each", rotated=True), temperature=Temperature(0.5, 4.0, 1)), Mlp(24))
SLOPES = Layer(Attention(6, 2, 8, None, alibi=Alibi(scale=0.5)), Mlp(24))
CONFIGS = {
    "latent attention, chunks, slopes": ModelConfig(V, D, prefix=(SLOPES,), cycle=(LATENT,), repeats=2, suffix=(CHUNKS,), context=64),
    "windows, sinks, caps": ModelConfig(V, D, cycle=(WINDOW, FULL), repeats=2, suffix=(WINDOW,), tied=True, embed_scale=3.0, logit_softcap=20.0, norm=Norm(offset=1.0), context=64),
    "layer norm, learned positions": ModelConfig(V, D, prefix=(TWO,), cycle=(OLD,), repeats=2, norm=Norm("layer", bias=True), learned_positions=40, embed_norm=True, head_bias=True, context=40),
    "experts": ModelConfig(V, D, cycle=(EXPERTS,), repeats=2, logit_scale=0.5, context=64),
}


def perturbed(model, key, scale=1.0):
    """Parameters with every vector moved, so that a forgotten or swapped one shows."""
    rng = np.random.default_rng(int(jax.random.key_data(key)[-1]))

    def move(name, x):
        noise = 0.3 * jnp.asarray(rng.standard_normal(x.shape, np.float32))
        return x * scale + noise if x.ndim <= 2 and x.shape[-1] < 64 and "table" not in name else x * scale
    return map_named(move, init_params(model, key))


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def made(request):
    model = Decoder(CONFIGS[request.param], Compute("float32", attention="blockwise"))
    params = perturbed(model, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (B, T), 1, V)
    logits, _ = model.apply({"params": params}, tokens)
    assert float(logits.std()) > 0.05
    return model, params, tokens, logits


def close(a, b, bound=2e-5):
    """float32 on both sides, some ten products deep: 2e-5 of the reference's spread leaves room for the order of sums only."""
    assert float(jnp.abs(a - b).max() / b.std()) < bound


def test_cached_pieces_are_the_whole(made):
    model, params, tokens, logits = made
    cache, out = init_cache(model.config, B, T + 3, jnp.float32), []
    for start, stop in [(0, 9), (9, 18), *((i, i + 1) for i in range(18, T))]:
        piece, cache = model.apply({"params": params}, tokens[:, start:stop], cache=cache)
        out.append(piece)
    close(jnp.concatenate(out, 1), logits)


def test_packed_is_separate_and_padding_is_nothing(made):
    model, params, tokens, logits = made
    cut, pad = 10, 5
    second, _ = model.apply({"params": params}, tokens[:, cut:])
    where = jnp.arange(T)
    positions = jnp.broadcast_to(jnp.where(where < cut, where, where - cut), (B, T))
    segments = jnp.broadcast_to(jnp.where(where < cut, 1, 2), (B, T))
    packed, _ = model.apply({"params": params}, tokens, positions, segments)
    close(packed[:, :cut], logits[:, :cut])
    close(packed[:, cut:], second)
    left = jnp.pad(tokens, [(0, 0), (pad, 0)])
    segments = jnp.broadcast_to((jnp.arange(T + pad) >= pad).astype(jnp.int32), left.shape)
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(T + pad) - pad, 0), left.shape)
    close(model.apply({"params": params}, left, positions, segments)[0][:, pad:], logits)


def test_unrolled_prepared_and_reference_attention_agree(made):
    model, params, tokens, logits = made
    apart = dc.replace(model, config=unrolled(model.config))
    loose = unstack(model.config, params)
    close(apart.apply({"params": loose}, tokens)[0], logits)
    back = stack(model.config, loose)
    assert jax.tree.structure(back) == jax.tree.structure(params) and all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)))
    ready, weights = prepare(model, params)
    close(ready.apply({"params": weights}, tokens)[0], logits)
    slow = dc.replace(model, compute=Compute("float32", attention="reference", experts="loop"))
    close(slow.apply({"params": params}, tokens)[0], logits)


def test_gradients_do_not_depend_on_remat_or_kernels(made):
    model, params, tokens, _ = made

    def gradient(compute):
        other = dc.replace(model, compute=compute)
        return jax.jit(jax.grad(lambda p: jnp.square(other.apply({"params": p}, tokens)[0]).mean()))(params)
    whole = gradient(Compute("float32", attention="reference", experts="loop"))
    for compute in (Compute("float32", remat="full"), Compute("float32", remat="dots")):
        for a, b in zip(jax.tree.leaves(gradient(compute)), jax.tree.leaves(whole)):
            assert float(jnp.abs(a - b).max()) <= 3e-5 * float(jnp.abs(b).max()) + 1e-7        # order of float32 sums
    unread = [name for name, x in flatten(whole).items() if not float(jnp.abs(x).max()) > 0 and not name.endswith("selection_bias")]       # that one only chooses
    assert not unread, f"parameters that nothing reads: {unread}"


def test_mutations_are_caught(made):
    model, params, tokens, logits = made

    def other(layer):
        mixer = layer.mixer
        rope = None if mixer.rope is None else dc.replace(mixer.rope, theta=2 * mixer.rope.theta)
        return dc.replace(layer, mixer=dc.replace(mixer, rope=rope, window=mixer.window and mixer.window + 1, scale=None if rope else 0.5))
    mutated = dc.replace(model.config, **{part: tuple(map(other, getattr(model.config, part))) for part in ("prefix", "cycle", "suffix")})
    got, _ = dc.replace(model, config=mutated).apply({"params": params}, tokens)
    assert float(jnp.abs(got - logits).max() / logits.std()) > 1e-2


def test_bfloat16_is_near_and_logits_stay_float32(made):
    model, params, tokens, logits = made
    got, _ = dc.replace(model, compute=Compute("bfloat16")).apply({"params": params}, tokens)
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - logits).mean() / logits.std()) < 0.1        # 8 bits of mantissa, and experts may be chosen otherwise


def test_labels_name_every_dimension(made):
    model = made[0]
    for label, x in zip(jax.tree.leaves(labels(model), is_leaf=lambda x: hasattr(x, "axes")), jax.tree.leaves(abstract_params(model)), strict=True):
        assert len(label.axes) == len(x.shape)


def test_a_parameter_of_another_shape_names_itself():
    model = Decoder(CONFIGS["experts"], Compute("float32"))
    params = init_params(model, jax.random.key(0))
    params["final_norm"]["scale"] = jnp.ones(D + 1)
    with pytest.raises(CheckpointError, match="final_norm/scale"):
        model.apply({"params": params}, np.ones((1, 4), np.int32))


def test_fresh_parameters_do_not_depend_on_scan():
    config = CONFIGS["experts"]
    a = init_params(Decoder(config), jax.random.key(3))
    b = init_params(Decoder(config), jax.random.key(3))
    assert all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    spread = float(a["cycle"]["0"]["mixer"]["q"].std())
    assert abs(spread * D ** 0.5 - 1) < 0.1 and bool((a["cycle"]["0"]["mixer"]["q"][0] != a["cycle"]["0"]["mixer"]["q"][1]).any())
