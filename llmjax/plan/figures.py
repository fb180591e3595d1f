"""Figures of a model alone, before any chip: parameters, arithmetic, cache, memory of its weights."""
from __future__ import annotations

import math
from typing import Any

import jax

from llmjax import decode, models, train
from llmjax.core import ConfigError, MixtureOfExperts, ModelConfig
from llmjax.core.model_config import Attention, LanguageHead, LatentAttention
from llmjax.core.tree import flatten, nbytes
from llmjax.train.flops import mixing

# Bits a weight takes when it is stored so. nf4: blocks of 64 with doubly quantised scales, 4 + 8/64 + 32/(64 · 256) (Dettmers et al. 2023, arXiv:2305.14314, section 3).
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 4.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
ADAM_MIXED = 16                        # bytes a parameter: float32 weight, gradient and both moments
TOKENS_PER_PARAMETER = 20              # Hoffmann et al. 2022 (arXiv:2203.15556), table 3: 67 B parameters want 1.5 T tokens, and Chinchilla is 70 B on 1.4 T


def weight_bytes(parameters: float, kind: str) -> float:
    """Bytes of `parameters` weights kept as one of BITS."""
    return parameters * BITS[kind] / 8


def parameters(model: models.Decoder) -> tuple[int, int]:
    """-> (all, active): of experts a token passes only the chosen ones and the shared one; embedding and head count in both, as published counts have it."""
    known, total, active = flatten(models.labels(model)), 0, 0.0
    spec = next((layer.ffn for layer in model.config.layers if isinstance(layer.ffn, MixtureOfExperts)), None)
    for name, x in flatten(models.abstract_params(model)).items():
        count = math.prod(x.shape)
        total += count
        active += count * (spec.top_k / spec.experts if spec is not None and "expert" in known[name].batch else 1.0)
    return total, round(active)


def cache_bytes(config: ModelConfig, rows: int, length: int, dtype: str = "bfloat16") -> int:
    """Keys and values (or latents, or states) of `rows` texts with room for `length` tokens each; a layer with a window keeps its window alone."""
    return nbytes(jax.eval_shape(lambda: models.init_cache(config, rows, length, dtype).layers))


def cache_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """What one more token costs while no window is full; states of recurrent layers do not grow."""
    return cache_bytes(config, 1, 2, dtype) - cache_bytes(config, 1, 1, dtype)


def full_attention_flops(model: models.Decoder, context: int) -> float:
    """`train.flops_per_token` with every query seeing `context` keys: what is spent where nothing of the mask is skipped, and what many published figures count."""
    layers = [layer.mixer for layer in model.config.layers]
    seen = sum(mixing(mixer, context) for mixer in layers)
    whole = sum(12 * mixer.heads * mixer.head_dim * context if isinstance(mixer, Attention | LatentAttention) else mixing(mixer, context) for mixer in layers)
    return train.flops_per_token(model, context) - seen + whole


def of_model(config: ModelConfig, context: int | None = None, cache: str | None = None) -> dict[str, Any]:
    """Everything `llmjax plan --model=NAME` tells. cache: a kind of cache (`decode.make_cache`) whose bytes for one row of `context` tokens are wanted too.
    Raises ConfigError for a model that is no decoder and for a context beyond the model's own."""
    if config.encoder or not isinstance(config.head, LanguageHead):
        raise ConfigError("a plan is made of a decoder with the language head; this model is another")
    context = config.context if context is None else context
    if not 1 <= context <= config.context:
        raise ConfigError(f"--context={context}: from 1 to {config.context}, the model's own")
    model = models.Decoder(config)
    total, active = parameters(model)
    chosen = {} if cache is None else {"cache_kind": cache, "cache_kind_bytes": decode.cache_bytes(decode.make_cache, model, 1, context, cache)}
    return chosen | {
        "parameters_total": total, "parameters_active": active, "context": context,
        "flops_per_token_6n": 6 * active, "flops_per_token": train.flops_per_token(model, context), "flops_per_token_full_attention": full_attention_flops(model, context),
        "kv_cache_bytes_per_token": cache_bytes_per_token(config), "kv_cache_bytes": cache_bytes(config, 1, context),
        "chinchilla_tokens": TOKENS_PER_PARAMETER * active, "chinchilla_flops": 6 * active * TOKENS_PER_PARAMETER * active,
        "memory_bytes": {**{kind: weight_bytes(total, kind) for kind in BITS}, "training_adam": float(ADAM_MIXED * total)},
    }


def finetune_bytes(config: ModelConfig, *, rank: int = 64, kind: str = "nf4", rows: int = 1, context: int = 512) -> dict[str, float]:
    """A fine-tune with LoRA on every matrix of the layers, base weights kept as `kind` (embedding and head in bfloat16, as QLoRA leaves them), adapters and AdamW in float32 (bfloat16
    adapters, 32-bit states), a layer's input kept for each layer and logits of one row (Dettmers et al. 2023). -> bytes by kind, and "total"."""
    model = models.Decoder(config)
    known, base, apart, adapters = flatten(models.labels(model)), 0.0, 0.0, 0
    for name, x in flatten(models.abstract_params(model)).items():
        label, count = known[name], math.prod(x.shape)
        if not label.is_matrix or name.startswith(("embed/", "head/", "positions/")):
            apart += 2 * count
            continue
        base += weight_bytes(count, kind)
        lead, ins, outs = (math.prod(x.shape[i] for i in label.dims(role)) for role in ("batch", "inputs", "outputs"))
        adapters += lead * rank * (ins + outs)
    found = {"weights": base + apart, "adapters": 2.0 * adapters, "gradients": 2.0 * adapters, "optimizer": 8.0 * adapters,
             "activations": 2.0 * rows * context * config.dim * len(config.layers), "logits": 4.0 * 2 * rows * context * config.vocab_size}
    return {**found, "total": sum(found.values())}

