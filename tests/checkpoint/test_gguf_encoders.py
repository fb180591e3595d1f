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
    "t5, alike": ("T5ForConditionalGeneration", "T5Config", {**T5, "num_decoder_layers": 2}),            # neither llama.cpp nor transformers' reader takes a deeper decoder
    "t5 v1.1": ("T5ForConditionalGeneration", "T5Config", {**T5, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),         # of which transformers makes a tied one: see `saved`
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
    _fields_ = [("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p), ("pos", ctypes.c_void_p), ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p), ("logits", ctypes.c_void_p)]
for name, result, takes in (("llama_model_default_params", Parameters, []), ("llama_context_default_params", Parameters, []), ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, Parameters]),
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


def asked(program, *given):
    done = subprocess.run([sys.executable, "-c", program, *map(str, given)], capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if "FOUND" in line]
    assert lines, done.stderr[-800:]
    return json.loads(lines[0].split("FOUND", 1)[1])


@llama_cpp
@pytest.mark.parametrize("scale", [0.02, 0.2])
def test_llama_cpp_reads_bert(scale, tmp_path):
    """Mean embeddings of llama.cpp are ours with its GELU (tanh, looked up in float16: 2e-3 of the deviation), and its ids are ours."""
    saved("bert", scale, tmp_path / "hf")
    words = word_piece()
    words.save(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", progress=False)
    model, params, read = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    like_theirs = models.build(dc.replace(model.config, cycle=tuple(dc.replace(x, ffn=dc.replace(x.ffn, activation="gelu_tanh")) for x in model.config.cycle)), model.compute)
    found, ids = asked(SERVER, tmp_path / "m.gguf", 18900 + int(100 * scale), json.dumps(TOKENS.tolist()), json.dumps(TEXTS))
    want = np.asarray(found)
    got = decode.embed(like_theirs, params, None, TOKENS.tolist(), normalize=False)
    assert far(got, want) < 2e-3
    for text, theirs_ids in zip(TEXTS, ids):
        if "[" not in text and text:                         # a special token's name in a text: llama.cpp is asked not to look for it, we always do
            assert words.encode(text, True) == read.encode(text, True) == theirs_ids, text


@llama_cpp
@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("name", ["t5, alike", "t5 v1.1"])
def test_llama_cpp_reads_t5(name, scale, tmp_path):
    """Logits of encoder and decoder, which llama.cpp leaves unscaled where the head is the embedding. Float32: its softmax, and GELU out of a table of float16 numbers (2e-3)."""
    saved(name, scale, tmp_path / "hf")
    words = unigram(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", progress=False)
    model, params, read = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    source, target = TOKENS[0, :30], TOKENS[1, :9]
    found, ids = asked(LIBRARY, tmp_path / "m.gguf", json.dumps(source.tolist()), json.dumps(target.tolist()), json.dumps(TEXTS), model.config.vocab_size)
    got = np.asarray(model.apply({"params": params}, jnp.asarray(target[None]), encoder_tokens=jnp.asarray(source[None]))[0])[0] / model.config.logit_scale
    assert far(got, np.asarray(found)) < (2e-3 if "v1.1" in name else 2e-4)
    for text, theirs_ids in zip(TEXTS, ids):
        if "<" not in text and text:
            assert words.encode(text, True) == read.encode(text, True) == theirs_ids, text
