"""Ministral 3: Mistral with YaRN, and queries that grow with the logarithm of their position (`llama_4_scaling_beta`)."""
from dataclasses import replace
from typing import Any

from llmjax.checkpoint.families import base, mistral
from llmjax.checkpoint.fields import Fields, both_ropes
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import ModelConfig, Temperature

YARN = {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16_384, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1}


def read(f: Fields) -> ModelConfig:
    rope = dict(f.value("rope_parameters", None) or f.value("rope_scaling", None) or YARN)
    beta, length = rope.pop("llama_4_scaling_beta", None), rope.get("original_max_position_embeddings")
    if not isinstance(beta, int | float) or not length:
        raise CheckpointError(f"{f.where}: rope_parameters needs llama_4_scaling_beta and original_max_position_embeddings")
    rope.pop("max_position_embeddings", None)                                            # repeats the field beside it
    f.values = {"max_position_embeddings": 262_144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None, **f.values,
                "rope_parameters": rope, "rope_scaling": None}
    config, warm = mistral.read(f), Temperature(float(beta), float(length))
    mixer: Any = replace(base.first(config).mixer, temperature=warm)
    return replace(config, family="ministral3", cycle=tuple(replace(layer, mixer=mixer) for layer in config.cycle))


def write(config: ModelConfig) -> dict[str, Any]:
    mixer = base.first(config).mixer
    ropes = both_ropes(mixer.rope)
    beta = {"llama_4_scaling_beta": mixer.temperature.beta} if mixer.temperature else {}
    return {**mistral.write(config), **{k: v | beta if isinstance(v, dict) else v for k, v in ropes.items()}}


FAMILY = base.Family("ministral3", ("ministral3",), "Ministral3ForCausalLM", read, write, mistral.FAMILY.table)
