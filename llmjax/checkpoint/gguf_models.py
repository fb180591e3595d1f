"""GGUF models: metadata <-> ModelConfig, and the tensor table of each architecture (the naming of llama.cpp's gguf-py/gguf/constants.py).

What differs from the Hugging Face layout: llama keeps the two halves of each rotated pair as neighbours (rows of q and k are un-permuted here), Gemma's norm scales are kept
as 1 + w, Llama 3's rotary scaling is a tensor of factors, a tied head is an absent `output.weight`, GPT-2's kernels are transposed, experts are stacked, and what llama.cpp fixes
in its source stands here as numbers. It has no window for Phi-3 and StarCoder2: the key is written and read here, there it changes nothing. BERT's exact GELU is there the tanh
approximation (here it stays exact), and T5's logits are not scaled where the head is the embedding, which no order among them shows.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llmjax.checkpoint.families import difference
from llmjax.checkpoint.families.base import mixers, plain, scale_of
from llmjax.checkpoint.gguf_meta import File, Head, Meta, decoder_fields, divisors_of, finish, layer_norm_of, mixer_of, norm_of, rope_of
from llmjax.checkpoint.table import Row, Table, cells
from llmjax.core.errors import CheckpointError, ConfigError
from llmjax.core.model_config import Attention, ClassifierHead, Layer, MixtureOfExperts, Mlp, ModelConfig, NoHead, QKNorm, Transform
from llmjax.core.positions import RelativeBuckets, Rope

B = "blk.{l}."


def top(added: float = 0.0) -> tuple[Row, ...]:
    return (Row("token_embd.weight", "embed/table"), Row("output_norm.weight", "final_norm/scale", added=added), Row("output.weight", "head/kernel", "v d -> d v"))


def attention(pairs: bool) -> tuple[Row, ...]:
    """pairs: whether the rows of q and k are kept as neighbouring pairs (architecture llama)."""
    rows = [Row(B + "attn_v.weight", "mixer/v", "(k h) d -> d k h"), Row(B + "attn_v.bias", "mixer/v_bias", "(k h) -> k h"),
            Row(B + "attn_output.weight", "mixer/o", "d (n h) -> n h d"), Row(B + "attn_output.bias", "mixer/o_bias")]
    for c in "qk":
        rows += [Row(B + f"attn_{c}.weight", f"mixer/{c}", "(n p 2) d -> d n (2 p)" if pairs else "(n h) d -> d n h"),
                 Row(B + f"attn_{c}.bias", f"mixer/{c}_bias", "(n p 2) -> n (2 p)" if pairs else "(n h) -> n h")]
    return tuple(rows)


def norms(added: float = 0.0, /, **names: str) -> tuple[Row, ...]:
    return tuple(Row(f"{B}{theirs}.weight", f"{ours}/scale", added=added) for theirs, ours in names.items())


MLP = (*(Row(f"{B}ffn_{c}.weight", f"ffn/{c}", "f d -> d f") for c in ("gate", "up")), *(Row(f"{B}ffn_{c}.bias", f"ffn/{c}_bias") for c in ("gate", "up", "down")),
       Row(B + "ffn_down.weight", "ffn/down", "d f -> f d"))
EXPERTS = (Row(B + "ffn_gate_inp.weight", "ffn/router", "e d -> d e"),
           *(Row(f"{B}ffn_{c}_exps.weight", f"ffn/{c}", "e f d -> e d f") for c in ("gate", "up")), Row(B + "ffn_down_exps.weight", "ffn/down", "e d f -> e f d"),
           *(Row(f"{B}ffn_{c}.{{e}}.weight", f"ffn/{c}", "f d -> d f") for c in ("gate", "up")), Row(B + "ffn_down.{e}.weight", "ffn/down", "d f -> f d"))
PRE = dict(attn_norm="norm_mixer", ffn_norm="norm_ffn")
SANDWICH = dict(attn_norm="norm_mixer", post_attention_norm="norm_mixer_out", ffn_norm="norm_ffn", post_ffw_norm="norm_ffn_out")
POST = dict(attn_output_norm="norm_mixer_out", layer_output_norm="norm_ffn_out")
QK = dict(attn_q_norm="mixer/q_norm", attn_k_norm="mixer/k_norm")
UNUSED = (r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd", r"rope_freqs")       # read into the configuration, or buffers of old files
COPIES = (("output.weight", "token_embd.weight"),)
FUSED = (Row(B + "attn_qkv.weight", ("mixer/q", "mixer/k", "mixer/v"), "[n h] d -> d n h"), Row(B + "attn_qkv.bias", ("mixer/q_bias", "mixer/k_bias", "mixer/v_bias"), "[n h] -> n h"))


def with_biases(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """LayerNorms: each row of a scale, and that of its bias."""
    return (*rows, *(Row(row.name.removesuffix("weight") + "bias", str(row.path).removesuffix("scale") + "bias") for row in rows if str(row.path).endswith("scale")))


def to_model_config(file: File) -> ModelConfig:
    """The ModelConfig of a GGUF file. Raises CheckpointError for an unknown architecture, missing metadata and what the architecture's reader does not know."""
    reader = architecture(file).read
    meta = Meta(file, file.fields["general.architecture"])
    try:
        config = reader(meta)
        meta.finish()
        return config
    except ConfigError as error:
        raise CheckpointError(f"{file.where}: {error}") from error


def table(file: File) -> Table:
    arch = architecture(file)
    return arch.experts if file.fields.get(f"{file.fields['general.architecture']}.expert_count") and arch.experts else arch.table


def architecture(file: File) -> Architecture:
    name = file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{file.where}: the GGUF architecture {name!r} is not read by this version; known: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def read_llama(m: Meta) -> ModelConfig:
    norm, mixer = norm_of(m), mixer_of(m)
    experts = m.get("expert_count", 0)
    ffn: Any = MixtureOfExperts(int(experts), int(m.need("expert_used_count")), int(m.one("feed_forward_length"))) if experts else \
        Mlp(int(m.one("feed_forward_length")), bias="blk.0.ffn_up.bias" in m.file.shapes)
    return finish(m, "mixtral" if experts else "llama", [Layer(mixer, ffn)] * int(m.need("block_count")), norm)


def read_qwen(m: Meta) -> ModelConfig:
    norm = norm_of(m)
    mixer = mixer_of(m, qk_norm=QKNorm(norm) if m.arch == "qwen3" else None)
    return finish(m, m.arch, [Layer(mixer, Mlp(int(m.one("feed_forward_length"))))] * int(m.need("block_count")), norm)


def gemma_scale(m: Meta, size: int, large: int) -> float | None:
    """The attention scale that llama.cpp takes: of the model's 27 B size (known by its depth) from dim / heads, else from the head."""
    heads = int(m.one("attention.head_count"))
    return scale_of((int(m.need("embedding_length")) / heads) ** -0.5 if m.need("block_count") == large else size ** -0.5, size)


def read_gemma2(m: Meta) -> ModelConfig:
    norm, mixer = norm_of(m, 1.0), mixer_of(m, softcap=float(m.get("attn_logit_softcapping", 50.0)))
    mixer, window = replace(mixer, scale=gemma_scale(m, mixer.head_dim, 46)), int(m.get("attention.sliding_window", 4096))
    ffn = Mlp(int(m.one("feed_forward_length")), "gelu_tanh")
    layers = [Layer(replace(mixer, window=None if i % 2 else window), ffn, "sandwich") for i in range(int(m.need("block_count")))]
    return finish(m, "gemma2", layers, norm, embed_scale=int(m.need("embedding_length")) ** 0.5, logit_softcap=float(m.get("final_logit_softcapping", 30.0)))


def read_gemma3(m: Meta) -> ModelConfig:
    norm, every = norm_of(m, 1.0), int(m.get("attention.sliding_window_pattern", 6))
    mixer, window = mixer_of(m, qk_norm=QKNorm(norm)), m.get("attention.sliding_window")
    far = rope_of(m, mixer.head_dim)
    mixer = replace(mixer, scale=gemma_scale(m, mixer.head_dim, 62), rope=far if m.get("rope.freq_base") else replace(far, theta=1_000_000.0))
    near, ffn = Rope(float(m.get("rope.freq_base_swa", 10_000.0))), Mlp(int(m.one("feed_forward_length")), "gelu_tanh")
    slides = [bool(window) and bool((i + 1) % every) for i in range(int(m.need("block_count")))]
    layers = [Layer(replace(mixer, window=int(window) if s else None, rope=near if s else mixer.rope), ffn, "sandwich") for s in slides]
    cap = m.get("final_logit_softcapping")
    return finish(m, "gemma3", layers, norm, embed_scale=int(m.need("embedding_length")) ** 0.5, logit_softcap=cap and float(cap))


def read_qwen3moe(m: Meta) -> ModelConfig:
    norm = norm_of(m)
    ffn = MixtureOfExperts(int(m.need("expert_count")), int(m.need("expert_used_count")), int(m.need("expert_feed_forward_length")))
    return finish(m, "qwen3_moe", [Layer(mixer_of(m, qk_norm=QKNorm(norm)), ffn)] * int(m.need("block_count")), norm)


def read_phi3(m: Meta) -> ModelConfig:
    if any(name.startswith("rope_factors") for name in m.file.shapes):
        raise CheckpointError(f"{m.file.where}: its rotary factors for long and short texts (rope_factors_long) are not read by this version; take the model with the short context")
    mixer = mixer_of(m, partial=True, fused="blk.0.attn_qkv.weight" in m.file.shapes, window=int(m.get("attention.sliding_window", 0)) or None)
    return finish(m, "phi3", [Layer(mixer, Mlp(int(m.one("feed_forward_length"))))] * int(m.need("block_count")), norm_of(m))


def read_gpt2(m: Meta) -> ModelConfig:
    mixer = replace(mixer_of(m, fused=True), rope=None)
    ffn = Mlp(int(m.one("feed_forward_length")), "gelu_tanh", gated=False, bias=True)
    positions = m.file.shapes.get("position_embd.weight", (0,))[0]
    return finish(m, "gpt2", [Layer(mixer, ffn)] * int(m.need("block_count")), layer_norm_of(m), learned_positions=positions)


def read_starcoder2(m: Meta) -> ModelConfig:
    mixer = mixer_of(m, window=int(m.get("attention.sliding_window", 0)) or None)
    ffn = Mlp(int(m.one("feed_forward_length")), "gelu_tanh", gated=False, bias="blk.0.ffn_up.bias" in m.file.shapes)
    return finish(m, "starcoder2", [Layer(mixer, ffn)] * int(m.need("block_count")), layer_norm_of(m))


POOLER = Transform("tanh")


def read_bert(m: Meta) -> ModelConfig:
    """BERT as an encoder of texts, or with the classifier of a re-ranker. Its pooler is the tensor `cls`, which llama.cpp's converter leaves out and its source reads."""
    shapes = m.file.shapes
    if m.get("attention.causal", False):
        raise CheckpointError(f"{m.file.where}: bert.attention.causal=true: a BERT whose tokens see the earlier ones alone is not read")
    m.get("pooling_type")           # how a text's vector is made of the hidden states: `decode.embed` is told by its caller
    labels, pooler = m.get("classifier.output_labels"), "cls.weight" in shapes
    head: Any = NoHead(POOLER if pooler else None)
    if "cls.output.weight" in shapes:
        if not pooler:
            raise CheckpointError(f"{m.file.where}: it has a classifier (cls.output.weight) without the pooler before it (cls.weight), which its converter left out; "
                                  "use the Hugging Face checkpoint")
        head = ClassifierHead(tuple(labels or (f"LABEL_{i}" for i in range(shapes["cls.output.weight"][0]))), POOLER)
    mixer = replace(mixer_of(m), rope=None, causal=False)
    layer = Layer(mixer, Mlp(int(m.one("feed_forward_length")), "gelu", gated=False, bias="blk.0.ffn_up.bias" in shapes), "after_sum")
    return finish(m, "bert", [layer] * int(m.need("block_count")), layer_norm_of(m), learned_positions=shapes.get("position_embd.weight", (0,))[0],
                  token_types=shapes.get("token_types.weight", (None,))[0], embed_norm=True, final_norm=False, head=head)


def read_t5(m: Meta) -> ModelConfig:
    """T5, and with a gate T5 v1.1 and Flan-T5. llama.cpp fixes the activations, and 128 as the distance where buckets end."""
    norm, relative = norm_of(m), RelativeBuckets(int(m.need("attention.relative_buckets_count")), 128)
    mixer = replace(mixer_of(m), rope=None, scale=1.0, relative=relative, qkv_bias=False, out_bias=False)
    gated = "dec.blk.0.ffn_gate.weight" in m.file.shapes
    ffn = Mlp(int(m.one("feed_forward_length")), "gelu_tanh" if gated else "relu", gated=gated)
    count = int(m.need("block_count"))
    inner = finish(m, "t5", [Layer(replace(mixer, causal=False), ffn)] * count, norm, head=NoHead())
    start = m.get("decoder_start_token_id")
    layers = [Layer(mixer, ffn, cross=replace(mixer, relative=None, causal=False))] * int(m.get("decoder_block_count", count))
    return finish(m, "t5", layers, norm, encoder=inner, logit_scale=inner.dim ** -0.5 if inner.tied else 1.0, decoder_start=inner.pad_token or 0 if start is None else int(start))


# The way back

def write_mixture(config: ModelConfig) -> dict[str, Any]:
    ffn = config.layers[0].ffn
    return decoder_fields(config) | ({"expert_count": ffn.experts, "expert_used_count": ffn.top_k} if isinstance(ffn, MixtureOfExperts) else {})


def write_qwen3moe(config: ModelConfig) -> dict[str, Any]:
    return {**write_mixture(config), "expert_feed_forward_length": config.layers[0].ffn.hidden}


def write_window(config: ModelConfig) -> dict[str, Any]:
    window = next((mixer.window for mixer in mixers(config) if mixer.window), None)
    return decoder_fields(config) | ({"attention.sliding_window": window} if window else {})


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    mixer = mixers(config)[0]
    return {**write_window(config), "attn_logit_softcapping": mixer.softcap or 0.0, "final_logit_softcapping": config.logit_softcap or 0.0}


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    """llama.cpp knows the layers that see all by their place, every sixth; another pattern is told."""
    kinds = mixers(config)
    far, near = (next((x.rope for x in kinds if (x.window is None) == whole), None) for whole in (True, False))
    every = next((i + 1 for i, x in enumerate(kinds) if x.window is None), 6)
    first = replace(config.layers[0], mixer=replace(kinds[0], rope=far or Rope(1_000_000.0)))
    out = write_window(replace(config, prefix=(first, *config.layers[1:]), cycle=(), repeats=0, suffix=()))
    out |= {"rope.freq_base_swa": near.theta} if near and near.theta != 10_000.0 else {}
    return out | ({"attention.sliding_window_pattern": every} if every != 6 else {}) | ({"final_logit_softcapping": config.logit_softcap} if config.logit_softcap else {})


def write_bert(config: ModelConfig) -> dict[str, Any]:
    labels = {"classifier.output_labels": list(config.head.labels), "pooling_type": 4} if isinstance(config.head, ClassifierHead) else {}         # 4: its score, "rank"
    return {**decoder_fields(config), "attention.causal": False, **labels}


def write_t5(config: ModelConfig) -> dict[str, Any]:
    """Its buckets end at 128 unsaid; the number of layers is the encoder's."""
    inner, mixer = config.encoder or config, config.layers[0].mixer
    assert isinstance(mixer, Attention) and isinstance(mixer.relative, RelativeBuckets)
    return {**decoder_fields(config), "block_count": len(inner.layers), "decoder_block_count": len(config.layers), "attention.layer_norm_epsilon": config.norm.eps,
            "attention.relative_buckets_count": mixer.relative.buckets, "decoder_start_token_id": config.decoder_start}


@dc.dataclass(frozen=True)
class Architecture:
    """families: the families whose models it holds. read: metadata -> ModelConfig. write: the way back, keys without the architecture's name (what it cannot say is found by
    reading it back). table: its tensors; experts: those of its mixture-of-experts models."""
    families: tuple[str, ...]
    read: Callable[[Meta], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: Table
    experts: Table | None = None


def t5_rows() -> tuple[Row, ...]:
    """The rows of both stacks; a stack's relative positions are with its first layer."""
    rows = []
    for lead, stack in (("enc.", "encoder"), ("dec.", "")):
        ours, block = f"{stack}/" if stack else "", lead + B
        rows += [Row(f"{lead}output_norm.weight", f"{ours}final_norm/scale"), Row(f"{lead}blk.0.attn_rel_b.weight", f"{ours}relative/table")]
        named = {"attn_": "mixer", "cross_attn_": "cross"} if not stack else {"attn_": "mixer"}
        for theirs, path in named.items():
            rows += [Row(f"{block}{theirs}{c}.weight", f"{path}/{c}", "(n h) d -> d n h", stack=stack) for c in "qkv"]
            rows += [Row(f"{block}{theirs}o.weight", f"{path}/o", "d (n h) -> n h d", stack=stack), Row(f"{block}{theirs}norm.weight", f"norm_{path}/scale", stack=stack)]
        rows += [Row(f"{block}ffn_{c}.weight", f"ffn/{c}", "f d -> d f" if c != "down" else "d f -> f d", stack=stack) for c in ("gate", "up", "down")]
        rows += [Row(f"{block}ffn_norm.weight", "norm_ffn/scale", stack=stack)]
    return (*top()[::2], *rows)


def classifier_rows() -> tuple[Row, ...]:
    """A pooler and a classifier, each with its bias."""
    kernels = {"cls": ("classifier/dense", "pooler/dense"), "cls.output": ("classifier/out",)}
    return tuple(row for name, paths in kernels.items() for path in paths for row in (Row(f"{name}.weight", path, "o i -> i o"), Row(f"{name}.bias", f"{path}_bias")))


PLAIN = (*top(), *attention(False), *MLP)
POSITIONS = Row("position_embd.weight", "positions/table")
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama", "mistral", "mixtral"), read_llama, write_mixture, Table((*top(), *attention(True), *MLP, *norms(**PRE)), extras=UNUSED, copies=COPIES),
                          Table((*top(), *attention(True), *EXPERTS, *norms(**PRE)), extras=UNUSED, copies=COPIES)),
    "qwen2": Architecture(("qwen2",), read_qwen, decoder_fields, Table((*PLAIN, *norms(**PRE)), extras=UNUSED, copies=COPIES)),
    "qwen3": Architecture(("qwen3",), read_qwen, decoder_fields, Table((*PLAIN, *norms(**PRE), *norms(**QK)), extras=UNUSED, copies=COPIES)),
    "qwen3moe": Architecture(("qwen3_moe",), read_qwen3moe, write_qwen3moe, Table((*top(), *attention(False), *EXPERTS, *norms(**PRE), *norms(**QK)), copies=COPIES)),
    "gemma2": Architecture(("gemma2",), read_gemma2, write_gemma2, Table((*top(1.0), *attention(False), *MLP, *norms(1.0, **SANDWICH)), copies=COPIES)),
    "gemma3": Architecture(("gemma3",), read_gemma3, write_gemma3, Table((*top(1.0), *attention(False), *MLP, *norms(1.0, **SANDWICH), *norms(1.0, **QK)), copies=COPIES)),
    "phi3": Architecture(("phi3",), read_phi3, write_window, Table((*top(), FUSED[0], *attention(False), *norms(**PRE),
                                                                  Row(B + "ffn_up.weight", ("ffn/gate", "ffn/up"), "[f] d -> d f"), MLP[-1]), copies=COPIES)),
    "gpt2": Architecture(("gpt2",), read_gpt2, decoder_fields, Table((*with_biases((*top(), *norms(**PRE))), POSITIONS, *FUSED, *attention(False)[2:4], *MLP), copies=COPIES)),
    "starcoder2": Architecture(("starcoder2",), read_starcoder2, write_window, Table((*with_biases((*top(), *norms(**PRE))), *attention(False), *MLP), extras=UNUSED, copies=COPIES)),
    "bert": Architecture(("bert",), read_bert, write_bert, Table((top()[0], POSITIONS, Row("token_types.weight", "types/table"), Row("token_embd_norm.weight", "embed_norm/scale"),
                                                                  Row("token_embd_norm.bias", "embed_norm/bias"), *with_biases(norms(**POST)), *attention(False), *MLP, *classifier_rows()))),
    # the first release's cross-attention has a table that was never used
    "t5": Architecture(("t5",), read_t5, write_t5, Table(t5_rows(), extras=(r"dec\.blk\.0\.cross_attn_rel_b\.weight",), copies=COPIES)),
}


def to_gguf(config: ModelConfig, params: Mapping[str, Any]) -> tuple[dict[str, Any], Table, dict[str, np.ndarray]]:
    """A model as GGUF says it -> (metadata with the architecture and the special tokens in it, the table of its tensors, small tensors beside them).

    params: {"cycle/0/mixer/q": leaf}, of which shapes are read alone. Raises CheckpointError where no architecture holds the family, naming those that do, and for the first field
    that its metadata cannot express.
    """
    name = next((name for name, arch in ARCHITECTURES.items() if config.family in arch.families), None)
    if name is None:
        known = ", ".join(sorted(family for arch in ARCHITECTURES.values() for family in arch.families))
        raise CheckpointError(f"models of the family {config.family!r} are not written as GGUF by this version; known: {known}")
    arch = ARCHITECTURES[name]
    if len(config.end_tokens) > 3:
        raise CheckpointError(f"GGUF has room for three end tokens, the model has {len(config.end_tokens)}: {config.end_tokens}; keep the ones that are used")
    ids = {"bos": config.bos_token, "padding": config.pad_token, **dict(zip(("eos", "eot", "eom"), config.end_tokens))}
    fields = {"general.architecture": name, **{f"{name}.{key}": value for key, value in arch.write(config).items()},
              **{f"tokenizer.ggml.{role}_token_id": value for role, value in ids.items() if value is not None}}
    if config.token_types:
        fields["tokenizer.ggml.token_type_count"] = config.token_types          # llama.cpp keeps the number of rows of `token_types` with the words
    mixer = mixers(config)[0]
    small = divisors_of(mixer.rope, mixer.head_dim)
    rows = arch.experts if f"{name}.expert_count" in fields and arch.experts else arch.table
    shapes = {cell.name: cell.shape for cell in cells(rows, params)} | {key: x.shape for key, x in small.items()}
    again = to_model_config(Head("the GGUF file to be written", {k: stored(v) for k, v in fields.items()}, shapes, small))
    found = difference(rounded(plain(config)), rounded(plain(replace(again, family=config.family))))
    if found:
        where = found[0].replace("prefix[", "layers[")
        raise CheckpointError(f"a GGUF file of the architecture {name} cannot express {where}={found[1]!r} (read back: {found[2]!r}); write the Hugging Face layout instead")
    return fields, rows, small


def stored(value: Any) -> Any:
    """A number as the file keeps it."""
    return float(np.float32(value)) if isinstance(value, float) else value


def rounded(x: Any) -> Any:
    """A configuration with its numbers as a file keeps them: float32, six digits."""
    if dc.is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: rounded(getattr(x, f.name)) for f in dc.fields(x)})
    if isinstance(x, tuple):
        return tuple(map(rounded, x))
    return float(f"{x:.6g}") if isinstance(x, float) else x
