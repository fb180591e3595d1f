"""GGUF files of encoders and encoder-decoders (BERT, T5) with their vocabularies: written and read against transformers, llama.cpp and what each format cannot say."""
import dataclasses as dc
import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import free_port

from llmjax import convert, decode, models, pretrained, tokenizers
from llmjax.checkpoint import gguf_file, gguf_models, gguf_write
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import MaskedHead, NoHead
from llmjax.core.positions import RelativeBuckets
from llmjax.core.tree import flatten
from llmjax.models import feed_forward

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
    "t5, alike": ("T5ForConditionalGeneration", "T5Config", {**T5, "num_decoder_layers": 2}),            # neither llama.cpp nor transformers' reader takes a deeper decoder
    # transformers makes a tied one of it: see `saved`
    "t5 v1.1": ("T5ForConditionalGeneration", "T5Config", {**T5, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
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


@pytest.mark.parametrize("name", ["t5, alike", "t5 v1.1"])
def test_transformers_reads_what_is_written(name, tmp_path):
    """transformers' own reader of GGUF files (it has one for T5), which knows nothing of ours; of the configuration it knows too little (always a gate)."""
    reference = saved(name, 0.2, tmp_path / "hf")
    unigram(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", progress=False)
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, gguf_file="m.gguf", config=reference.config, dtype=torch.float32).eval()
    assert far(answer(other), answer(reference)) < 1e-6


def test_as_llama_cpps_converter_writes_bert(tmp_path):
    """It leaves the pooler out, and says how a text's vector is made."""
    reference = saved("bert", 0.2, tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "whole.gguf", to="gguf", dtype="float32", progress=False)
    file = gguf_file.Gguf(tmp_path / "whole.gguf")
    fields = {key: x for key, x in file.fields.items() if key.startswith(("bert.", "tokenizer.", "general.architecture"))} | {"bert.pooling_type": 1}
    kept = [gguf_write.Tensor(name, shape, "F32", functools.partial(file.read, name)) for name, shape in file.shapes.items() if not name.startswith("cls")]
    gguf_write.write(tmp_path / "m.gguf", fields, kept, "F32")
    model, got = ours(tmp_path / "m.gguf")
    assert len(kept) == len(file.shapes) - 2 and model.config.head == NoHead() and far(got, answer(reference)) < 5e-5


SERVER = """
import json, sys, urllib.request, os
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads, params.port, params.warmup = sys.argv[1], 64, 1, int(sys.argv[2]), False
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
def post(path, body):
    request = urllib.request.Request(server.listening_address + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())
found = [post("/embeddings", dict(content=ids, embd_normalize=-1))[0]["embedding"][0] for ids in json.loads(sys.argv[3])]
words = [post("/tokenize", dict(content=text, add_special=True, parse_special=False))["tokens"] for text in json.loads(sys.argv[4])]
print("FOUND" + json.dumps([found, words]), flush=True)
os._exit(0)
"""
# Its server has no way to an encoder-decoder, its C interface has. Parameters are taken as bytes (whose first are what it knows); two ones after the pointers are the cache's types.
LIBRARY = """
import ctypes, json, struct, sys, xllamacpp, pathlib, os
lib = ctypes.CDLL(str(next(pathlib.Path(xllamacpp.__file__).parent.glob("*.so"))))
class Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 1024)]
class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits"))]
for name, result, takes in (("llama_model_default_params", Parameters, []), ("llama_context_default_params", Parameters, []),
                            ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, Parameters]),
                            ("llama_init_from_model", ctypes.c_void_p, [ctypes.c_void_p, Parameters]), ("llama_batch_get_one", Batch, [ctypes.c_void_p, ctypes.c_int32]),
                            ("llama_encode", ctypes.c_int32, [ctypes.c_void_p, Batch]), ("llama_decode", ctypes.c_int32, [ctypes.c_void_p, Batch]),
                            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]), ("llama_get_model", ctypes.c_void_p, [ctypes.c_void_p]),
                            ("llama_model_get_vocab", ctypes.c_void_p, [ctypes.c_void_p]),
                            ("llama_tokenize", ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool])):
    function = getattr(lib, name)
    function.restype, function.argtypes = result, takes
lib.llama_backend_init()
settings = lib.llama_context_default_params()
numbers = list(struct.unpack("256i", bytes(settings.bytes)))
at = next(i for i in range(16, 60) if numbers[i:i + 2] == [1, 1])
numbers[at] = numbers[at + 1] = 0                                  # float32
numbers[numbers.index(-1) + 3] = 0                                # no flash attention
settings.bytes[:] = list(struct.pack("256i", *numbers))
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
context = lib.llama_init_from_model(model, settings)
source, target, texts = (json.loads(x) for x in sys.argv[2:5])
array = (ctypes.c_int32 * len(source))(*source)
assert lib.llama_encode(context, lib.llama_batch_get_one(ctypes.cast(array, ctypes.c_void_p), len(source))) == 0
answers = []
for token in target:
    one = (ctypes.c_int32 * 1)(token)
    assert lib.llama_decode(context, lib.llama_batch_get_one(ctypes.cast(one, ctypes.c_void_p), 1)) == 0
    answers.append(lib.llama_get_logits_ith(context, -1)[:int(sys.argv[5])])
words = []
for text in texts:
    out = (ctypes.c_int32 * 256)()
    count = lib.llama_tokenize(lib.llama_model_get_vocab(model), text.encode(), len(text.encode()), ctypes.cast(out, ctypes.c_void_p), 256, True, False)
    words.append(out[:count])
print("FOUND" + json.dumps([answers, words]), flush=True)
os._exit(0)
"""
llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp in a wheel) is not installed")


def with_their_gelu(model, monkeypatch):
    """The model with llama.cpp's GELU in both stacks: the tanh approximation, looked up in a table of float16 numbers. It goes by a name that no case here uses."""
    def half(x):
        return x.astype(jnp.float16).astype(x.dtype)

    def changed(config):
        parts = {part: tuple(dc.replace(x, ffn=dc.replace(x.ffn, activation="quick_gelu" if "gelu" in x.ffn.activation else x.ffn.activation)) for x in getattr(config, part))
                 for part in ("prefix", "cycle", "suffix")}
        return dc.replace(config, **parts, encoder=config.encoder and changed(config.encoder))
    monkeypatch.setitem(feed_forward.ACTIVATIONS, "quick_gelu", lambda x: half(jax.nn.gelu(half(x), approximate=True)))
    return models.build(changed(model.config), model.compute)


def asked(program, *given):
    done = subprocess.run([sys.executable, "-c", program, *map(str, given)], capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if "FOUND" in line]
    assert lines, done.stderr[-800:]
    return json.loads(lines[0].split("FOUND", 1)[1])


@llama_cpp
@pytest.mark.parametrize("scale", [0.02, 0.2])
def test_llama_cpp_reads_bert(scale, tmp_path, monkeypatch):
    """Mean embeddings of llama.cpp are ours with its GELU (a number on the edge of two float16 ones may fall the other way: 1e-3 of the deviation), and its ids are ours."""
    saved("bert", scale, tmp_path / "hf")
    words = word_piece()
    words.save(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", progress=False)
    model, params, read = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    found, ids = asked(SERVER, tmp_path / "m.gguf", free_port(), json.dumps(TOKENS.tolist()), json.dumps(TEXTS))
    want = np.asarray(found)
    got = decode.embed(with_their_gelu(model, monkeypatch), params, None, TOKENS.tolist(), normalize=False)
    assert far(got, want) < 1e-3
    for text, theirs_ids in zip(TEXTS, ids):
        if "[" not in text and text:                         # a special token's name in a text: llama.cpp is asked not to look for it, we always do
            assert words.encode(text, True) == read.encode(text, True) == theirs_ids, text


@llama_cpp
@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("name", ["t5, alike", "t5 v1.1"])
def test_llama_cpp_reads_t5(name, scale, tmp_path, monkeypatch):
    """Logits of encoder and decoder, which llama.cpp leaves unscaled where the head is the embedding. Float32: 2e-4 of the deviation; with
    its GELU, where a number on the edge of two float16 ones may fall the other way, 1e-3."""
    saved(name, scale, tmp_path / "hf")
    words = unigram(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", progress=False)
    model, params, read = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    source, target = TOKENS[0, :30], TOKENS[1, :9]
    found, ids = asked(LIBRARY, tmp_path / "m.gguf", json.dumps(source.tolist()), json.dumps(target.tolist()), json.dumps(TEXTS), model.config.vocab_size)
    like_theirs = with_their_gelu(model, monkeypatch)
    got = np.asarray(like_theirs.apply({"params": params}, jnp.asarray(target[None]), encoder_tokens=jnp.asarray(source[None]))[0])[0] / model.config.logit_scale
    assert far(got, np.asarray(found)) < (1e-3 if "v1.1" in name else 2e-4)
    for text, theirs_ids in zip(TEXTS, ids):
        if "<" not in text and text:
            assert words.encode(text, True) == read.encode(text, True) == theirs_ids, text


# Vocabularies


@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces(lower):
    words = word_piece(lower)
    fields = tokenizers.to_gguf(words, 200)
    assert fields["tokenizer.ggml.model"] == "bert" and fields["tokenizer.ggml.normalizer.lowercase"] is lower and len(fields["tokenizer.ggml.tokens"]) == 200
    assert {text[:1] for text, type in zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]) if type == 1} > {"▁"}
    again = tokenizers.from_gguf(fields)
    for text in TEXTS:
        assert again.encode(text, True) == words.encode(text, True) and again.decode(again.encode(text)) == words.decode(words.encode(text))
    assert (again.pad_id, again.unk_id, again.bos_id, again.special_tokens) == (words.pad_id, words.unk_id, None, words.special_tokens)


def test_word_pieces_of_a_file_that_says_little():
    """As the first converters wrote them: no normaliser, the places of the special tokens known by BERT's vocabulary."""
    vocabulary = [f"▁[unused{i}]" for i in range(99)]
    texts = ["[PAD]", *vocabulary, "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁hello", "▁cafe", "s", "▁,"]
    made = tokenizers.from_gguf({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": [3 if t[0] == "[" else 1 for t in texts]})
    assert made.encode("Hello, CAFÉs zzz", True) == [101, 104, 107, 105, 106, 100, 102]
    with pytest.raises(CheckpointError, match="no tokenizer.ggml.bos_token_id, and fewer tokens than the 101"):
        tokenizers.from_gguf({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": texts[:50]})


def test_unigram(tmp_path):
    words = unigram(tmp_path)
    fields = tokenizers.to_gguf(words, 200)
    assert fields["tokenizer.ggml.model"] == "t5" and fields["tokenizer.ggml.remove_extra_whitespaces"] is True and len(fields["tokenizer.ggml.precompiled_charsmap"]) > 1000
    gguf_write.write(tmp_path / "m.gguf", {"general.architecture": "t5", **fields}, [], "F32")
    stored = gguf_file.Gguf(tmp_path / "m.gguf").fields
    signed = [x - 256 if x > 127 else x for x in stored["tokenizer.ggml.precompiled_charsmap"]]
    for read in (tokenizers.from_gguf(stored), tokenizers.from_gguf({**stored, "tokenizer.ggml.precompiled_charsmap": signed})):
        assert all(read.encode(text, True) == words.encode(text, True) for text in TEXTS) and (read.eos_id, read.pad_id, read.bos_id) == (1, 0, None)
    worse = tokenizers.from_gguf({**stored, "tokenizer.ggml.scores": [-99.0 if len(text) > 1 else -1.0 for text in stored["tokenizer.ggml.tokens"]]})
    assert any(worse.encode(text) != words.encode(text) for text in TEXTS)


# What metadata cannot say


def config_of(name, **changed):
    from llmjax.checkpoint import to_model_config
    cls, config, fields = CASES[name]
    return to_model_config(getattr(transformers, config)(**{**fields, **changed}).to_dict() | {"architectures": [cls], **({"tie_word_embeddings": False} if "v1.1" in name else {})})


def each(config, change):
    return dc.replace(config, prefix=tuple(map(change, config.layers)), cycle=(), repeats=0, suffix=())


@pytest.mark.parametrize(("config", "words"), [
    (lambda: config_of("bert", hidden_act="gelu_new"), "ffn.activation='gelu_tanh'"),
    (lambda: dc.replace(config_of("bert"), head=MaskedHead(None)), r"head=MaskedHead\(.*write the Hugging Face layout"),
    (lambda: each(config_of("t5"), lambda x: dc.replace(x, mixer=dc.replace(x.mixer, relative=RelativeBuckets(32, 64)))), "max_distance=64"),
    (lambda: config_of("t5", feed_forward_proj="silu"), "ffn.activation='silu'"),
    (lambda: dc.replace(config_of("t5"), logit_scale=1.0), "logit_scale=1.0"),
])
def test_what_cannot_be_written(config, words):
    made = config()
    with pytest.raises(CheckpointError, match=words):
        gguf_models.to_gguf(made, flatten(models.abstract_params(models.build(made))))


@pytest.mark.parametrize(("name", "fields", "shapes", "words"), [
    ("bert", {"bert.attention.causal": True}, {}, "bert.attention.causal=true"),
    ("bert", {"bert.classifier.pooling_type": 2}, {}, "bert.classifier.pooling_type=.2. is a setting this version does not know"),
    ("bert", {}, {"cls.output.weight": (3, 64), "cls.weight": None}, "without the pooler before it"),
    ("t5", {"t5.attention.relative_buckets_count": None}, {}, "metadata lack t5.attention.relative_buckets_count"),
])
def test_what_is_not_read(name, fields, shapes, words):
    from llmjax.checkpoint.gguf_meta import Head
    made = config_of(name)
    params = flatten(models.abstract_params(models.build(made)))
    said, rows, _ = gguf_models.to_gguf(made, params)
    from llmjax.checkpoint.table import cells
    names = {cell.name: cell.shape for cell in cells(rows, params)}
    said, names = ({key: x for key, x in {**old, **new}.items() if x is not None} for old, new in ((said, fields), (names, shapes)))
    with pytest.raises(CheckpointError, match=words):
        gguf_models.to_model_config(Head("x.gguf", said, names, {}))


@pytest.mark.parametrize(("name", "tensors"), [("t5", ("enc.blk.0.attn_rel_b.weight", "dec.blk.0.attn_rel_b.weight")), ("t5", ("dec.blk.1.attn_q.weight", "dec.blk.1.cross_attn_q.weight")),
                                               ("bert", ("blk.0.attn_output_norm.bias", "blk.0.layer_output_norm.bias"))])
def test_a_check_catches_two_tensors_in_each_others_place(name, tensors, tmp_path, monkeypatch):
    saved(name, 0.2, tmp_path / "hf")
    real, other = gguf_write.write, dict(zip(tensors, reversed(tensors)))

    def write(file, fields, all_, *more):
        make = {t.name: t.make for t in all_}
        real(file, fields, [dc.replace(t, make=make[other.get(t.name, t.name)]) for t in all_], *more)
    monkeypatch.setattr(gguf_write, "write", write)
    assert not convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", check=True, progress=False).check.passed


@pytest.mark.parametrize("name", ["bert, classifier", "t5 v1.1"])
def test_eight_bits(name, tmp_path):
    """What was written is what is read; the tables of positions, types and distances stay exact."""
    saved(name, 0.02, tmp_path / "hf")
    report = convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="q8_0", check=True, progress=False)
    assert report.check.passed and 0.0 < report.check.to_source < 0.2
    file = gguf_file.Gguf(tmp_path / "m.gguf")
    assert {file.describe(x)[0] for x in file.shapes if "rel_b" in x or "token_types" in x or "position" in x} == {"F32"}
    assert {file.describe(x)[0] for x in file.shapes if "attn_q.weight" in x} == {"Q8_0"}
