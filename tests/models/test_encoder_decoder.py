"""Encoder-decoders against transformers: logits of ragged sources, generation, gradients; a cache that holds the source, layers apart, several continuations; mutations."""
import dataclasses as dc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import perturbed

import llmjax
from llmjax import models, pretrained
from llmjax.checkpoint import exports
from llmjax.checkpoint.families import table_of
from llmjax.core import Attention, Compute, ConfigError, Layer, Mlp, ModelConfig
from llmjax.decode import init_cache, stack, unstack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

T5 = dict(vocab_size=61, d_model=32, d_ff=48, d_kv=8, num_layers=3, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0, relative_attention_num_buckets=8,
          relative_attention_max_distance=20)
BART = dict(vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=40, encoder_attention_heads=4, decoder_attention_heads=2,
            max_position_embeddings=64, forced_eos_token_id=None)
KINDS = {"t5": ("T5", T5), "gated": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}), "bart": ("Bart", BART),
         "apart": ("Bart", {**BART, "tie_word_embeddings": False, "encoder_layers": 1, "decoder_layers": 1})}
SOURCES, T = (40, 23), 17      # longer than the far end of T5's buckets


def theirs(name, scale):
    """scale: the standard deviation of BART's weights; T5's are drawn with their own, times 50 × scale."""
    prefix, fields = KINDS[name]
    config = getattr(transformers, prefix + "Config")(**fields, **(dict(init_std=scale) if prefix == "Bart" else dict(initializer_factor=50 * scale)))
    torch.manual_seed(0)
    model = perturbed(getattr(transformers, prefix + "ForConditionalGeneration")(config), also=("relative_attention_bias",))
    if prefix == "Bart":
        model.final_logits_bias.add_(torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(2)))
    return model


def batch():
    """source [2, S], its segments (padded on the right), target [2, T]."""
    rng = np.random.default_rng(2)
    segments = (np.arange(max(SOURCES)) < np.asarray(SOURCES)[:, None]).astype(np.int32)
    return np.where(segments, rng.integers(3, 61, segments.shape), 0).astype(np.int32), segments, rng.integers(3, 61, (2, T)).astype(np.int32)


def asked(source, segments, target):
    return dict(input_ids=torch.as_tensor(source).long(), attention_mask=torch.as_tensor(segments).long(), decoder_input_ids=torch.as_tensor(target).long())


def far(got, want):
    return float(np.abs(np.asarray(got) - want).max() / want.std())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    kept = {}

    def get(name, scale=0.02):
        if (name, scale) not in kept:
            folder = tmp_path_factory.mktemp("theirs")
            reference = theirs(name, scale)
            reference.save_pretrained(folder)
            kept[name, scale] = reference, *pretrained.load(folder, dtype="float32")[:2]
        return kept[name, scale]
    return get


@pytest.mark.parametrize(("name", "scale"), [("t5", 0.02), ("t5", 0.03), ("gated", 0.02), ("gated", 0.03), ("bart", 0.02), ("bart", 0.2), ("apart", 0.2)])
def test_logits_of_ragged_sources(made, name, scale):
    """Against float64, where transformers' own float32 is the measure: attention without a scale (T5) saturates at larger weights and magnifies rounding, theirs as ours. 1e-5 is float32's
    order of sums some ten products deep."""
    reference, model, params = made(name, scale)
    source, segments, target = batch()
    assert isinstance(model, models.EncoderDecoder)
    with torch.no_grad():
        want32 = reference(**asked(source, segments, target)).logits.numpy()
        want64 = reference.double()(**asked(source, segments, target)).logits.numpy()
        reference.float()
    got = model.apply({"params": params}, jnp.asarray(target), encoder_tokens=jnp.asarray(source), encoder_segment_ids=jnp.asarray(segments))[0]
    assert got.dtype == jnp.float32 and far(got, want64) <= 3 * far(want32, want64) + 1e-5 and far(got, want64) < 2e-4
    alone = model.apply({"params": params}, jnp.asarray(target[1:]), encoder_tokens=jnp.asarray(source[1:, :SOURCES[1]]))[0]
    assert far(alone, want64[1:]) <= 3 * far(want32, want64) + 1e-5


def test_the_cache_holds_the_source(made):
    """First call with the source, later ones without: pieces = whole, for a cycle that is scanned and for layers apart."""
    for name in ("t5", "bart"):
        _, model, params = made(name)
        source, segments, target = map(jnp.asarray, batch())
        whole = np.asarray(model.apply({"params": params}, target, encoder_tokens=source, encoder_segment_ids=segments)[0])
        for each, weights in ((model, params), (dc.replace(model, compute=Compute("float32", scan=False)), unstack(model.config, params)), llmjax.decode.prepare(model, params)):
            cache, out = init_cache(each, 2, T + 5), []
            for start, stop in [(0, 6), (6, 11), *((i, i + 1) for i in range(11, T))]:
                more = dict(encoder_tokens=source, encoder_segment_ids=segments) if not start else {}
                piece, cache = each.apply({"params": weights}, target[:, start:stop], cache=cache, **more)
                out.append(piece)
                cache = llmjax.decode.grow(each, cache, T + 7) if start == 6 else cache
            assert far(jnp.concatenate(out, 1), whole) < 2e-5
        back = stack(model.config, unstack(model.config, params))
        assert jax.tree.structure(back) == jax.tree.structure(params) and all(jax.tree.leaves(jax.tree.map(np.array_equal, back, params)))


@pytest.mark.parametrize("name", ["t5", "gated", "bart"])
def test_greedy_text_is_transformers(made, name):
    reference, model, params = made(name, 0.02 if name != "bart" else 0.2)
    source, _, _ = batch()
    prompts = [source[0, :40].tolist(), source[1, :9].tolist(), source[1, :23].tolist()]
    got = llmjax.generate(model, params, None, prompts, max_new_tokens=12, stop=[])
    for prompt, ids in zip(prompts, got):
        with torch.no_grad():
            want = reference.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0)[0].tolist()
        assert ids == want[1:] and want[0] == model.config.decoder_start
    ends = [ids[4] for ids in got]
    stopped = llmjax.generate(model, params, None, prompts, max_new_tokens=12, stop=ends)
    assert all(ids == full[:len(ids)] and len(ids) <= 4 for ids, full in zip(stopped, got))


def test_draws_depend_on_row_and_position_alone(made):
    _, model, params = made("t5")
    source, _, _ = batch()
    prompts = [source[0].tolist(), source[1, :9].tolist()]
    both = llmjax.generate(model, params, None, prompts, max_new_tokens=8, temperature=1.0, seed=[3, 4], stop=[])
    assert both[1] == llmjax.generate(model, params, None, prompts[1:], max_new_tokens=8, temperature=1.0, seed=[4], stop=[])[0]
    several = llmjax.generate(model, params, None, prompts[1:], max_new_tokens=8, temperature=1.0, seed=[4, 5], n=2, stop=[])
    assert several[0][0] == both[1] and several[0][1] != both[1]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_gradients(made, name):
    """For every tensor of the checkpoint, the shared embedding and T5's tables among them. Float32 on both sides; 2e-4 of a tensor's largest gradient leaves room for the order of sums."""
    reference, model, params = made(name)
    source, segments, target = batch()
    reference.zero_grad()
    output = reference(**asked(source, segments, target)).logits
    weights = np.random.default_rng(3).normal(size=output.shape).astype(np.float32)
    (output * torch.as_tensor(weights)).sum().backward()
    loss = lambda p: (model.apply({"params": p}, jnp.asarray(target), encoder_tokens=jnp.asarray(source), encoder_segment_ids=jnp.asarray(segments))[0] * weights).sum()
    ours = {e.name: e.make() for e in exports(table_of(model.config), jax.jit(jax.grad(loss))(params))}
    wanted = {key: p.grad.numpy() for key, p in reference.named_parameters() if key in ours}
    assert set(ours) - set(wanted) <= {"final_logits_bias"}
    for key, want in wanted.items():
        assert np.abs(ours[key] - want).max() <= 2e-4 * np.abs(want).max() + 1e-5, key


@pytest.mark.parametrize(("name", "change"), [
    ("t5", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, relative=dc.replace(x.mixer.relative, max_distance=24)))),
    ("t5", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, scale=None))), ("t5", lambda x: dc.replace(x, cross=dc.replace(x.cross, scale=None))),
    ("bart", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, causal=False))), ("bart", lambda x: dc.replace(x, ffn=dc.replace(x.ffn, activation="relu"))),
])
def test_mutations_are_caught(made, name, change):
    _, model, params = made(name, 0.03 if name == "t5" else 0.2)
    source, _, target = map(jnp.asarray, batch())
    target = jnp.concatenate([target, target], 1)                       # far enough for T5's last buckets
    want = np.asarray(model.apply({"params": params}, target, encoder_tokens=source)[0])
    changed = dc.replace(model.config, **{part: tuple(map(change, getattr(model.config, part))) for part in ("prefix", "cycle", "suffix")})
    assert far(dc.replace(model, config=changed).apply({"params": params}, target, encoder_tokens=source)[0], want) > 1e-3


def test_a_head_of_its_own(made, tmp_path):
    """Flan-T5: lm_head beside the embedding, logits unscaled."""
    from safetensors.torch import load_file, save_file
    reference, _, _ = made("gated")
    reference.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    save_file(tensors | {"lm_head.weight": torch.randn(61, 32) * 0.3}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "scale_decoder_outputs"} | {"tie_word_embeddings": False}))
    source, segments, target = batch()
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = other(**asked(source, segments, target)).logits.numpy()
    model, params, _ = pretrained.load(tmp_path, dtype="float32")
    assert not model.config.tied and model.config.logit_scale == 1.0
    got = model.apply({"params": params}, jnp.asarray(target), encoder_tokens=jnp.asarray(source), encoder_segment_ids=jnp.asarray(segments))[0]
    assert far(got, want) < 5e-5


def test_what_users_get_wrong(made):
    _, model, params = made("t5")
    with pytest.raises(ConfigError, match="encoder_tokens are missing"):
        model.apply({"params": params}, jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ConfigError, match="names no decoder_start_token_id"):
        llmjax.generate(dc.replace(model, config=dc.replace(model.config, decoder_start=None)), params, None, [[3, 4]])
    attention = Attention(2, 2, 8, None)
    with pytest.raises(ConfigError, match="cross-attention looks at an encoder, and the model has none"):
        ModelConfig(61, 16, (Layer(attention, Mlp(16), cross=attention),), 2)
    with pytest.raises(ConfigError, match="wiring 'parallel' has no place for cross-attention"):
        ModelConfig(61, 16, (Layer(attention, Mlp(16), "parallel", cross=attention),), 2)
