"""Encoders against transformers: every head, ragged batches, token types, gradients, relative positions, embeddings of texts; packing; mutations."""
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
from llmjax.core import Compute, ConfigError
from llmjax.core.model_config import Layer
from llmjax.core.positions import Disentangled, RelativeBuckets
from llmjax.models import relative

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BERT = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=48, pad_token_id=0)
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "max_relative_positions": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
HEADS = {                      # class, config class, fields
    "hidden": ("BertModel", BERT), "masked": ("BertForMaskedLM", BERT), "classes": ("BertForSequenceClassification", {**BERT, "num_labels": 3}), "span": ("BertForQuestionAnswering", BERT),
    "tags": ("RobertaForTokenClassification", {**BERT, "pad_token_id": 1, "num_labels": 4}), "roberta": ("RobertaModel", {**BERT, "pad_token_id": 1}),
    "relu": ("DistilBertForSequenceClassification", dict(vocab_size=61, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=48, pad_token_id=0)),
    "replaced": ("ElectraForPreTraining", {**BERT, "embedding_size": 16}), "electra": ("ElectraForSequenceClassification", {**BERT, "num_labels": 3}),
    "windows": ("ModernBertForTokenClassification", {**BERT, "local_attention": 6, "num_hidden_layers": 4}), "modern": ("ModernBertForQuestionAnswering", BERT),
    "next": ("BertForPreTraining", BERT),
    "both ways": ("Gemma3TextModel", {**BERT, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                                      "use_bidirectional_attention": True}),
    "mean": ("ModernBertForSequenceClassification", {**BERT, "classifier_pooling": "mean", "local_attention": 6}),
    "distances": ("DebertaV2ForSequenceClassification", {**DEBERTA, "pooler_hidden_act": "tanh"}), "apart": ("DebertaV2ForMaskedLM", {**DEBERTA, "share_att_key": False, "type_vocab_size": 2}),
    "convolution": ("DebertaV2ForMaskedLM", {**DEBERTA, "conv_kernel_size": 5, "conv_act": "gelu", "attention_head_size": 8}),
    "plain distances": ("DebertaV2Model", {**DEBERTA, "position_buckets": -1, "pos_att_type": ["c2p"], "norm_rel_ebd": "none", "position_biased_input": False}),
    "buckets": ("T5EncoderModel", dict(vocab_size=61, d_model=32, d_ff=48, d_kv=6, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")),
    "no distances": ("DebertaV2Model", {**DEBERTA, "pos_att_type": []}), "a norm of no distances": ("DebertaV2Model", {**BERT, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}),
}
LENGTHS = (40, 23)             # longer than every window and exact distance above


def theirs(name, scale):
    """A model of transformers with random weights of this scale, its 1-D parameters perturbed so that a swapped or forgotten one shows."""
    kind, fields = HEADS[name]
    config = getattr(transformers, next(k for k in ("DistilBert", "ModernBert", "DebertaV2", "Roberta", "Electra", "Bert", "Gemma3Text",
                                                    "T5") if kind.startswith(k)) + "Config")(**fields, initializer_range=scale)
    torch.manual_seed(0)
    return perturbed(getattr(transformers, kind)(config))


def batch():
    """tokens, segments and token types [2, T], padded on the right."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(3, 61, (2, max(LENGTHS))).astype(np.int32)
    segments = (np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    return np.where(segments, tokens, 0), segments, rng.integers(0, 2, tokens.shape).astype(np.int32)


def far(got, want):
    return float(np.abs(np.asarray(got) - want).max() / want.std())


def answer(output):
    value = next((output[key] for key in ("logits", "prediction_logits", "last_hidden_state") if output.get(key) is not None), None)
    return (torch.stack([output.start_logits, output.end_logits], -1) if value is None else value).numpy()


@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_ragged_batches(name, scale, tmp_path):
    """Float32 on both sides, which differ by the order of sums: some 1e-6 of the answer's standard deviation; 5e-5 leaves room for another machine's."""
    reference = theirs(name, scale)
    reference.save_pretrained(tmp_path)
    tokens, segments, types = batch()
    typed = bool(getattr(reference.config, "type_vocab_size", 0)) and hasattr(reference.config, "type_vocab_size") and reference.config.type_vocab_size > 1
    asked = dict(input_ids=torch.as_tensor(tokens).long(), attention_mask=torch.as_tensor(segments).long()) | (dict(token_type_ids=torch.as_tensor(types).long()) if typed else {})
    with torch.no_grad():
        output = reference(**asked)
    want = answer(output)
    model, params, _ = pretrained.load(tmp_path, dtype="float32")
    assert isinstance(model, models.Encoder) and (model.config.token_types is not None or not typed)
    more = dict(token_types=jnp.asarray(types)) if typed else {}
    got, said = model.apply({"params": params}, jnp.asarray(tokens), segment_ids=jnp.asarray(segments), **more, mutable=["aux"])
    got = np.asarray(got[0])
    assert got.dtype == np.float32 and got.shape == want.shape
    if got.ndim > 1 and got.shape[:2] == tokens.shape:
        got, want = got[segments > 0], want[segments > 0]
    assert far(got, want) < 5e-5
    if getattr(output, "pooler_output", None) is not None:
        assert far(said["aux"]["pooler"]["pooled"][0], output.pooler_output.numpy()) < 5e-5
    if "seq_relationship_logits" in output:
        assert far(said["aux"]["masked"]["scores"][0], output.seq_relationship_logits.numpy()) < 5e-5
    pretrained.save(tmp_path / "again", model, params)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["architectures"] == [HEADS[name][0]]
    with torch.no_grad():
        assert np.array_equal(answer(type(reference).from_pretrained(tmp_path / "again").eval()(**asked)), answer(output))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (reference, model, params) at the scale where a wrong number shows."""
    kept = {}

    def get(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("theirs")
            reference = theirs(name, 0.2)
            reference.save_pretrained(folder)
            kept[name] = reference, *pretrained.load(folder, dtype="float32")[:2]
        return kept[name]
    return get


@pytest.mark.parametrize("name", ["masked", "windows", "apart", "convolution"])
def test_packed_is_separate_and_layers_apart_agree(made, name):
    _, model, params = made(name)
    tokens = jnp.asarray(batch()[0][:1])
    cut, where = 17, np.arange(max(LENGTHS))[None]
    segments, positions = jnp.asarray(np.where(where < cut, 1, 2)), jnp.asarray(np.where(where < cut, where, where - cut))
    packed = model.apply({"params": params}, tokens, positions, segments)[0]
    for part in (slice(0, cut), slice(cut, None)):
        assert far(packed[:, part], np.asarray(model.apply({"params": params}, tokens[:, part])[0])) < 2e-5
    ready, weights = llmjax.decode.prepare(model, params)
    assert far(ready.apply({"params": weights}, tokens, positions, segments)[0], np.asarray(packed)) < 2e-5
    slow = dc.replace(model, compute=Compute("float32", attention="reference", unroll=False))
    assert far(slow.apply({"params": params}, tokens, positions, segments)[0], np.asarray(packed)) < 2e-5


@pytest.mark.parametrize("name", ["masked", "windows", "distances", "apart", "convolution"])
def test_gradients(made, name):
    """Of a weighted sum of the answer, for every tensor of the checkpoint. Float32 on both sides; 1e-4 of a tensor's largest gradient leaves room for the order of sums."""
    reference, model, params = made(name)
    tokens, segments, _ = batch()
    reference.zero_grad()
    output = reference(input_ids=torch.as_tensor(tokens).long(), attention_mask=torch.as_tensor(segments).long()).logits
    weights = np.random.default_rng(3).normal(size=output.shape).astype(np.float32)
    if weights.shape[:2] == tokens.shape:
        weights *= segments[..., None]
    (output * torch.as_tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, jnp.asarray(tokens), segment_ids=jnp.asarray(segments))[0] * weights).sum()))(params)
    ours = {e.name: e.make() for e in exports(table_of(model.config), grads)}
    checked = 0
    for key, p in reference.named_parameters():
        if key in ours and p.grad is not None:
            want = p.grad.numpy().reshape(ours[key].shape)
            assert np.abs(ours[key] - want).max() <= 1e-4 * np.abs(want).max() + 1e-5, key
            checked += 1
    assert checked >= len(ours) - 1


def change_layers(config, change):
    return dc.replace(config, **{part: tuple(change(layer) for layer in getattr(config, part)) for part in ("prefix", "cycle", "suffix")})


def with_mixer(layer: Layer, **changes):
    return dc.replace(layer, mixer=dc.replace(layer.mixer, **changes))


def with_relative(layer: Layer, **changes):
    return with_mixer(layer, relative=dc.replace(layer.mixer.relative, **changes))


@pytest.mark.parametrize(("name", "change"), [
    ("masked", lambda c: change_layers(c, lambda x: with_mixer(x, causal=True))), ("masked", lambda c: change_layers(c, lambda x: with_mixer(x, scale=0.5))),
    ("roberta", lambda c: dc.replace(c, position_offset=0)), ("classes", lambda c: dc.replace(c, head=dc.replace(c.head, pooling="mean"))),
    ("replaced", lambda c: dc.replace(c, head=dc.replace(c.head, transform=dc.replace(c.head.transform, activation="relu")))),
    ("windows", lambda c: change_layers(c, lambda x: with_mixer(x, window=x.mixer.window and x.mixer.window + 1))),
    ("windows", lambda c: change_layers(c, lambda x: with_mixer(x, rope=dc.replace(x.mixer.rope, theta=2 * x.mixer.rope.theta)))),
    ("distances", lambda c: change_layers(c, lambda x: with_relative(x, logarithmic=False))), ("distances", lambda c: change_layers(c, lambda x: with_relative(x, position_to_content=False))),
    ("distances", lambda c: change_layers(c, lambda x: with_relative(x, max_distance=17))),
    ("convolution", lambda c: change_layers(c, lambda x: dc.replace(x, convolution=x.convolution and dc.replace(x.convolution, activation="relu")))),
])
def test_mutations_are_caught(made, name, change):
    _, model, params = made(name)
    tokens = jnp.asarray(batch()[0][:1])
    want = np.asarray(model.apply({"params": params}, tokens)[0])
    got = dc.replace(model, config=change(model.config)).apply({"params": params}, tokens)[0]
    assert far(got, want) > 1e-3


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 20), (16, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_t5s(buckets, reach, causal):
    from transformers.models.t5.modeling_t5 import T5Attention
    distances = torch.arange(-600, 601)
    want = T5Attention._relative_position_bucket(distances, bidirectional=not causal, num_buckets=buckets, max_distance=reach).numpy()
    table = relative.bucket_table(RelativeBuckets(buckets, reach), causal)
    assert np.array_equal(table[np.clip(distances.numpy(), -reach, reach) + reach], want)


@pytest.mark.parametrize(("span", "reach"), [(256, 512), (8, 16), (16, 128), (32, 512)])
def test_rows_are_debertas(span, reach):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    distances = torch.arange(-600, 601)
    want = torch.clamp(make_log_bucket_position(distances, span, reach).long() + span, 0, 2 * span - 1).numpy()
    table = relative.row_table(Disentangled(span, reach))
    got = table[np.clip(distances.numpy(), -reach, reach) + reach]
    assert np.array_equal(got, want)


# Texts as vectors


def test_embeddings_of_ids_are_pooled_hidden_states(made):
    reference, model, params = made("hidden")
    rng = np.random.default_rng(5)
    rows = [rng.integers(3, 61, n).tolist() for n in (3, 40, 17, 1, 25)]
    with torch.no_grad():
        hidden = [reference(input_ids=torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]
    for pooling, want in (("mean", [h.mean(0) for h in hidden]), ("cls", [h[0] for h in hidden])):
        assert far(llmjax.embed(model, params, None, rows, pooling=pooling, normalize=False, batch_size=2), np.stack(want)) < 5e-5
        unit = np.stack([w / np.linalg.norm(w) for w in want])
        assert far(llmjax.embed(model, params, None, rows, pooling=pooling), unit) < 5e-5
    cut = llmjax.embed(model, params, None, rows, max_length=16)
    assert far(cut[1], llmjax.embed(model, params, None, [rows[1][:16]])[0]) < 5e-6


@pytest.mark.parametrize(("texts", "more", "words"), [
    ([[1] * 49], {}, "text 0 has 49 tokens, the model's context is 48: shorten it, or give max_length"), ([[]], {}, "text 0 is empty"), (["a"], {}, "there is no tokenizer"),
    ([[61]], {}, "the id 61"), ("text", {}, "a list is wanted"), ([[1]], {"pooling": "max"}, "pooling='max': mean or cls"),
])
def test_texts_that_cannot_be_embedded(made, texts, more, words):
    _, model, params = made("hidden")
    with pytest.raises(ConfigError) as error:
        llmjax.embed(model, params, None, texts, **more)
    assert words in str(error.value)


def test_what_an_encoder_does_not_do(made):
    _, model, params = made("masked")
    with pytest.raises(ConfigError, match="head is a MaskedHead: it generates no text"):
        llmjax.generate(model, params, None, [[1, 2]])
    with pytest.raises(ConfigError, match="49 tokens: the model has 48 learned positions"):
        model.apply({"params": params}, jnp.ones((1, 49), jnp.int32))
    with pytest.raises(ValueError, match="takes no relative positions; use auto or reference"):
        _, deberta, weights = made("distances")
        dc.replace(deberta, compute=Compute("float32", attention="blockwise")).apply({"params": weights}, jnp.ones((1, 4), jnp.int32))


def test_all_minilm_embeds_as_sentence_transformers_does(tmp_path):
    """The published model, where its package is installed: mean pooling over the tokens, length 1, as its modules.json says. Float32: 1e-5 of numbers whose spread is 0.05."""
    package = pytest.importorskip("all_minilm_l6_v2")
    folder = package.extract_model(str(tmp_path))
    texts = [f"{subject} {verb} {rest}" for subject in ("The sea", "¿Dónde", "日本語のテキスト,", "A telephone's history") for verb in ("is", "WAS not")
             for rest in ("blue.", "invented 1234 times" + " and again" * 20)] + ["x", "...", "é́ ñ", "word " * 100]
    tokenizer, reference = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = reference(**inputs).last_hidden_state, inputs["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    model, params, ours = pretrained.load(folder, dtype="float32")
    assert len(texts) == 20 and far(llmjax.embed(model, params, ours, texts), want) < 2e-4 and float(np.abs(llmjax.embed(model, params, ours, texts) - want).max()) < 1e-5
