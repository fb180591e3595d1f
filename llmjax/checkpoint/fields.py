"""Reading `config.json`: every field is asked for by name, and what nobody asked for is an error unless it is known to change nothing or is off.

Both spellings of transformers are read: version 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and version 5 (`rope_parameters`, `dtype`); both are written.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmjax.core.errors import CheckpointError, nearest
from llmjax.core.positions import DynamicNtk, LinearScaling, Llama3Scaling, LongRope, Proportional, Rope, Yarn

# What a config.json may say that does not change the answer: names, training and generation settings, caches, ids that the tokenizer knows better.
HARMLESS = frozenset("""
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path use_cache cache_implementation initializer_range
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout classifier_dropout output_attentions output_hidden_states return_dict return_dict_in_generate
    output_scores torchscript gradient_checkpointing pretraining_tp id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
    sep_token_id cls_token_id unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens bad_words_ids
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences exponential_decay_length_penalty remove_invalid_values chunk_size_feed_forward
    attn_implementation _attn_implementation _attn_implementation_autoset _from_model_config is_encoder_decoder is_llama_config transformers.js_config unsloth_version unsloth_fixed
    router_aux_loss_coef output_router_logits router_jitter_noise reorder_and_upcast_attn
    output_past _num_labels tie_weights_ use_bfloat16 n_special predict_special_tokens replacing_rate language name auto_map custom_pipelines
    sbert_ce_default_activation_function sentence_transformers _flash_attn_2_enabled tokenizer_name model_max_length max_sequence_length
""".split())  # noqa: SIM905

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu_squared", "tanh": "tanh"}
SPELLINGS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu_squared": "relu2", "tanh": "tanh"}
NONE = object()


class Fields:
    """A config.json (or a dictionary in it) that remembers what was asked for."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values = dict(values)
        self.where = where
        self.asked: set[str] = set()

    def value(self, name: str, default: Any = NONE) -> Any:
        """The field as it stands (None stays None); `default` where it is absent. Raises CheckpointError where it is absent and has none."""
        self.asked.add(name)
        if name in self.values:
            return self.values[name]
        if default is NONE:
            raise CheckpointError(f"{self.where}: the field {name!r} is missing")
        return default

    def count(self, name: str, default: Any = NONE) -> Any:
        """A whole number from 1; `default` where it is absent or null."""
        value = self.value(name, default)
        value = default if value is None and default is not NONE else value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{self.where}: {name}={value!r}: a whole number from 1 is expected")
        if value is None and default is NONE:
            raise CheckpointError(f"{self.where}: {name} is null, a whole number is expected")
        return value

    def number(self, name: str, default: Any = NONE) -> Any:
        """A number; `default` (which may be None) where it is absent or null."""
        value = self.optional(name, default)
        if value is None and default is NONE:
            raise CheckpointError(f"{self.where}: {name} is null, a number is expected")
        return default if value is None else value

    def optional(self, name: str, default: Any = NONE) -> Any:
        """A number, or None where it is null; `default` where it is absent."""
        value = self.value(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CheckpointError(f"{self.where}: {name}={value!r}: a number is expected")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; `default` where it is absent, false where it is null."""
        value = self.value(name, default)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name}={value!r}: true or false is expected")
        return value

    def activation(self, name: str, default: str) -> Any:
        value = self.value(name, default)
        if value not in ACTIVATIONS:
            raise CheckpointError(f"{self.where}: {name}={value!r} is an activation this version does not know" + nearest(str(value), ACTIVATIONS))
        return ACTIVATIONS[value]

    def choice(self, name: str, allowed: Sequence[Any], default: Any = NONE) -> Any:
        """One of a few values; `default` where it is absent or null. Raises CheckpointError naming them for another."""
        value = self.value(name, default)
        value = default if value is None and default is not NONE else value
        if not any(value == x and type(value) is type(x) for x in allowed):
            raise CheckpointError(f"{self.where}: {name}={str(value)[:60]!r} is not read ({', '.join(map(str, allowed))} {'are' if len(allowed) > 1 else 'is'})")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: a number, a list or null; negative ones mean none."""
        value = self.value(name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise CheckpointError(f"{self.where}: {name}={value!r}: token ids are expected")
        return tuple(v for v in values if v >= 0)

    def ignore(self, *names: str) -> None:
        """Marks fields as read that change nothing here (say why beside the call)."""
        self.asked.update(names)

    def fixed(self, **only: Any) -> None:
        """Fields of which this family knows one value; null is what is off. Raises CheckpointError where another is given."""
        for name, value in only.items():
            given = self.value(name, value)
            if given != value and (given is not None or value):
                raise CheckpointError(f"{self.where}: {name}={self.values[name]!r}: this family is read with {name}={value!r} alone")

    def finish(self, harmless: Iterable[str] = HARMLESS) -> None:
        """Raises CheckpointError for a field that nobody asked for and that is on."""
        for name, value in self.values.items():
            if name not in self.asked and name not in harmless and value not in (None, False, [], {}, ""):
                raise CheckpointError(f"{self.where}: {name}={str(value)[:60]!r} is a field this version does not know, and it may change the answer; remove it if it does not")


def read_rope(fields: Fields, theta: float, context: int, kind: str | None = None, names: tuple[str, str] = ("rope_theta", "rope_scaling"), *,
              fraction: float | None = None, interleaved: bool = False, reverse: bool = False) -> Rope:
    """Rotary settings out of `rope_parameters` (version 5; of layers of `kind` where they differ) or of `rope_theta` and `rope_scaling` (version 4).

    theta, fraction: what holds where nothing is said (fraction None: the family rotates whole heads). context: max_position_embeddings. names: the two fields of version 4
    ("" where there is none).
    Raises CheckpointError for unknown types and fields.
    """
    given = fields.value("rope_parameters", None) or {}
    if kind is not None and kind in given:
        given = given[kind] or {}
    elif any(isinstance(v, dict) for v in given.values()):
        given = {}
    base_name, scaling_name = names
    outer = fields.number(base_name, None) if base_name else None
    scaling = (fields.value(scaling_name, None) if scaling_name else None) or {}
    partial = fields.number("partial_rotary_factor", None)
    fields.value("original_max_position_embeddings", None)
    if not isinstance(given, dict) or not isinstance(scaling, dict):
        raise CheckpointError(f"{fields.where}: rope_parameters and rope_scaling are objects, as in {{'rope_type': 'linear', 'factor': 2.0}}")
    rope = Fields({**scaling, **given}, f"{fields.where}: rope_parameters")
    base = rope.number("rope_theta", None)
    base = float(base if base is not None else outer if outer is not None else theta)
    partial = rope.number("partial_rotary_factor", partial)
    if fraction is None and partial not in (None, 1, 1.0) and rope.values.get("rope_type") != "proportional":
        raise CheckpointError(f"{fields.where}: partial_rotary_factor={partial}: this family rotates whole heads")
    old = rope.value("type", None)
    name = rope.value("rope_type", old) or "default"
    original = fields.values.get("original_max_position_embeddings") or rope.number("original_max_position_embeddings", None) or context
    rope.ignore("original_max_position_embeddings", "finetuned", "mrope_section", "mrope_interleaved")      # of text all sections have the same position
    scale: Any = None
    if name == "linear":
        scale = LinearScaling(float(rope.number("factor")))
    elif name == "dynamic":
        scale = DynamicNtk(float(rope.number("factor")), context)
    elif name == "llama3":
        scale = Llama3Scaling(float(rope.number("factor")), float(rope.number("low_freq_factor")), float(rope.number("high_freq_factor")), int(original))
    elif name in ("longrope", "su") or (name == "yarn" and "short_factor" in rope.values):          # "su" and "yarn": Phi-3's older names
        scale = read_longrope(rope, context, int(original))
    elif name == "yarn":
        factor = rope.number("factor", None)
        fast, slow = float(rope.number("beta_fast", None) or 32), float(rope.number("beta_slow", None) or 1)
        scale = Yarn(float(context / original if factor is None else factor), int(original), fast, slow,
                     rope.number("attention_factor", None), rope.number("mscale", None), rope.number("mscale_all_dim", None), rope.flag("truncate", True))
    elif name == "proportional":
        scale = Proportional(float(1.0 if partial is None else partial), float(rope.number("factor", 1.0)))
        fraction = None
    elif name != "default":
        raise CheckpointError(f"{fields.where}: the rope type {name!r} is unknown" + nearest(str(name), ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]))
    if name == "default":
        rope.ignore("factor")
    rope.finish(())
    return Rope(base, 1.0 if fraction is None else float(fraction if partial is None else partial), interleaved, scale, reverse)


def read_longrope(rope: Fields, context: int, original: int) -> LongRope:
    """The two lists of factors; sines and cosines grow with the logarithm of how far the context was stretched (arXiv:2402.13753, section 3)."""
    lists = {name: rope.value(name) for name in ("short_factor", "long_factor")}
    for name, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(x, int | float) and x > 0 for x in values):
            raise CheckpointError(f"{rope.where}: {name}={str(values)[:60]!r}: a list of positive numbers is expected, one for two rotated dimensions")
    stretched, attention = rope.number("factor", None) or context / original, rope.number("attention_factor", None)
    if attention is None:
        attention = 1.0 if stretched <= 1 else math.sqrt(1 + math.log(stretched) / math.log(original))
    return LongRope(tuple(map(float, lists["short_factor"])), tuple(map(float, lists["long_factor"])), original, attention)


def write_rope(rope: Rope) -> dict[str, Any]:
    """A Rope as `rope_parameters` of version 5 says it."""
    scale = rope.scaling
    out: dict[str, Any] = {"rope_theta": rope.theta}
    if scale is None:
        return out | {"rope_type": "default"}
    if isinstance(scale, LinearScaling):
        return out | {"rope_type": "linear", "factor": scale.factor}
    if isinstance(scale, DynamicNtk):
        return out | {"rope_type": "dynamic", "factor": scale.factor}
    if isinstance(scale, Llama3Scaling):
        return out | {"rope_type": "llama3", "factor": scale.factor, "low_freq_factor": scale.low_freq_factor, "high_freq_factor": scale.high_freq_factor,
                      "original_max_position_embeddings": scale.context}
    if isinstance(scale, LongRope):
        return out | {"rope_type": "longrope", "short_factor": list(scale.short), "long_factor": list(scale.long), "original_max_position_embeddings": scale.context,
                      "attention_factor": scale.attention_factor}
    if isinstance(scale, Yarn):
        optional = {"attention_factor": scale.attention_factor, "mscale": scale.mscale, "mscale_all_dim": scale.mscale_all_dim}
        out |= {"rope_type": "yarn", "factor": scale.factor, "original_max_position_embeddings": scale.context, "beta_fast": scale.beta_fast, "beta_slow": scale.beta_slow}
        return out | {k: v for k, v in optional.items() if v is not None} | ({} if scale.truncate else {"truncate": False})
    if isinstance(scale, Proportional):
        return out | {"rope_type": "proportional", "partial_rotary_factor": scale.fraction, **({"factor": scale.factor} if scale.factor != 1.0 else {})}
    raise CheckpointError(f"config.json has no words for the rotary scaling {type(scale).__name__}")


def both_ropes(rope: Rope, partial: bool = False) -> dict[str, Any]:
    """The rotary fields of version 5 and of version 4 side by side; either version of transformers reads its own. partial: of a family that rotates a part of each head."""
    new = write_rope(rope)
    old = {k: v for k, v in new.items() if k != "rope_theta"}
    part = {"partial_rotary_factor": rope.fraction} if partial else {}
    return {"rope_parameters": new | part, "rope_theta": rope.theta} | part | ({"rope_scaling": old} if rope.scaling else {})
