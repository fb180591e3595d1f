"""GGUF files of encoders and encoder-decoders (BERT, T5) with their vocabularies: written and read against transformers, llama.cpp and what each format cannot say."""
import dataclasses as dc
import importlib.util
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import convert, decode, models, pretrained, tokenizers
from llmjax.checkpoint import gguf_file, gguf_models, gguf_write
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import MaskedHead, RelativeBuckets
from llmjax.core.tree import flatten

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

BERT = dict(vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, max_position_embeddings=80)
T5 = dict(vocab_size=200, d_model=64, d_kv=8, d_ff=96, num_layers=2, num_decoder_layers=3, num_heads=4, decoder_start_token_id=0)
CASES = {
    "bert": ("BertModel", "BertConfig", BERT),
    "bert, classifier": ("BertForSequenceClassification", "BertConfig", {**BERT, "id2label": {"0": "near", "1": "far", "2": "neither"}, "label2id": {"near": 0, "far": 1, "neither": 2}}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 v1.1": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),         # of which transformers makes a tied one: see `saved`
}
TOKENS = np.random.default_rng(2).integers(3, 199, (2, 40)).astype(np.int32)
CORPUS = ["The history of the lighthouse begins long before electricity, it's told.", "Café, naïve, 東京, Ελλάδα, здравствуйте!", "playing played plays; un-believable (12345) x_y"] * 8
TEXTS = [*CORPUS[:3], "", "  two  spaces\tand a tab\n", "UPPER lower Ünï Ç ß ſ ŁÓDŹ", "東京abc 12,345.67 don't…", "[CLS] a [SEP] </s> [MASK]b", "q" * 30]


def theirs(name, scale):
    """A model of transformers at a weight scale, its 1-D parameters perturbed so that a swapped or forgotten one shows."""
    cls, config, fields = CASES[name]
    spread = dict(initializer_range=scale) if "Bert" in cls else dict(initializer_factor=1.0 if scale < 0.1 else 1.5)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**fields, **spread)).eval().float()
    generator = torch.Generator().manual_seed(1)
    if fields.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator) * scale)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def saved(name, scale, folder):
    """The model, and a folder of it whose config says (as published ones do, and transformers 5 does not) that its head is its own."""
    model = theirs(name, scale)
    model.save_pretrained(folder)
    if CASES[name][2].get("tie_word_embeddings") is False:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return model


def answer(model):
    ids = torch.as_tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=ids.flip(0)[:, :9]) if model.config.is_encoder_decoder else model(input_ids=ids)
    return (out.last_hidden_state if "last_hidden_state" in out and not hasattr(out, "logits") else out.logits).float().numpy()


def ours(file):
    model, params, _ = pretrained.load(file, dtype="float32")
    more = {"encoder_tokens": jnp.asarray(TOKENS)} if model.config.encoder else {}
    tokens = TOKENS[::-1, :9].copy() if more else TOKENS
    return model, np.asarray(model.apply({"params": params}, jnp.asarray(tokens), **more)[0])


def far(got, want):
    return float(np.abs(np.asarray(got) - want).max() / want.std())


def word_piece(lower=True):
    """A BERT tokenizer trained here, in a tokenizer of ours."""
    import tokenizers as library
    from tokenizers import models as kinds
    from tokenizers import normalizers, pre_tokenizers, trainers

    from llmjax.tokenizers import wordpiece
    trained = library.Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizers.BertNormalizer(lowercase=lower), pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=190, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    vocabulary = trained.get_vocab()
    marks = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    backend = wordpiece.build(vocabulary, lower_case=lower, unk="[UNK]", cls="[CLS]", sep="[SEP]")
    backend.add_special_tokens(sorted(marks, key=vocabulary.__getitem__))
    return tokenizers.Tokenizer(backend, pad="[PAD]", unk="[UNK]")


def unigram(folder):
    """A SentencePiece Unigram model with T5's special tokens, trained here."""
    import io

    import sentencepiece
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=made, vocab_size=120, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
                                             hard_vocab_limit=False, minloglevel=2)
    (folder / "spiece.model").write_bytes(made.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}))
    return tokenizers.load(folder)


@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, scale, tmp_path):
    """transformers -> our load -> GGUF -> our load -> Hugging Face folder -> transformers. Float32 throughout: 5e-5 of the answer's deviation is the order of sums."""
    reference = saved(name, scale, tmp_path / "hf")
    report = convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", check=True, progress=False)
    assert report.check.passed and report.check.to_source == 0.0
    assert all(t.targets for t in report.tensors if t.source)
    model, got = ours(tmp_path / "m.gguf")
    assert far(got, answer(reference)) < 5e-5
    _, params, _ = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    pretrained.save(tmp_path / "back", model, params)
    again = getattr(transformers, CASES[name][0]).from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert np.array_equal(answer(again), answer(reference))


@pytest.mark.parametrize("name", ["t5", "t5 v1.1"])
def test_transformers_reads_what_is_written(name, tmp_path):
    """transformers' own reader of GGUF files (it has one for T5), which knows nothing of ours."""
    reference = saved(name, 0.2, tmp_path / "hf")
    unigram(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", progress=False)
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    assert far(answer(other), answer(reference)) < 1e-6
