"""The families this version reads and writes, by name and by what config.json calls them. A new family is a file beside this one and a line here."""
from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Mapping
from typing import Any

from llmjax.checkpoint.families import (
    bart,
    bert,
    bloom,
    cohere,
    cohere2,
    dbrx,
    deberta_v2,
    deberta_v2_legacy,
    deepseek_v2,
    deepseek_v3,
    distilbert,
    electra,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granitemoe,
    grok1,
    llama,
    llama4,
    mbart,
    ministral3,
    mistral,
    mixtral,
    modernbert,
    mpt,
    nanochat,
    olmo2,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    roberta,
    smollm3,
    stablelm,
    starcoder2,
    t5,
    xlm_roberta,
)
from llmjax.checkpoint.families.base import Family, plain
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.quantized import scheme_of
from llmjax.checkpoint.table import Table
from llmjax.core.errors import CheckpointError, ConfigError, nearest
from llmjax.core.model_config import Attention, ModelConfig, NoHead

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (
    llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe, gemma, gemma2, gemma3, gpt2, gpt_neox, gptj, phi, phi3, olmo2, granite, smollm3, starcoder2, stablelm, cohere, cohere2, glm4,
    ministral3, deepseek_v2, deepseek_v3, gpt_oss, granitemoe, glm4_moe, llama4, dbrx, falcon, bloom, mpt, nanochat, opt, grok1, qwen3_next, qwen3_5, qwen3_5_moe, gemma4,
    bert, roberta, xlm_roberta, distilbert, electra, t5, bart, mbart, modernbert, deberta_v2, deberta_v2_legacy)}
BY_TYPE: dict[str, Family] = {name: family for family in FAMILIES.values() for name in family.model_types}


def get(name: str) -> Family:
    """The family of ModelConfig.family. Raises CheckpointError for one there is no table for."""
    if name not in FAMILIES:
        raise CheckpointError(f"there is no checkpoint family {name!r}" + nearest(name, FAMILIES))
    return FAMILIES[name]


def table_of(config: ModelConfig) -> Table:
    """The table that writes this model: that of its family, and for a model without a head the names a bare model has."""
    table = get(config.family).rows(config)
    if not isinstance(config.head, NoHead):
        return table
    rows = tuple(dc.replace(row, name=row.name.removeprefix(table.base)) for row in table.rows)
    copies = tuple((name.removeprefix(table.base), twin.removeprefix(table.base)) for name, twin in table.copies)
    return dc.replace(table, base="", rows=rows, copies=copies, extras=tuple(pattern.removeprefix(re.escape(table.base)) for pattern in table.extras))


def of_config(hf: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config.json, by its model_type and else by its architectures. Raises CheckpointError naming the known ones."""
    kind = hf.get("model_type")
    if kind in BY_TYPE:
        return BY_TYPE[kind]
    for name in hf.get("architectures") or [] if kind is None else []:
        for family in FAMILIES.values():
            if family.architecture == name:
                return family
    raise CheckpointError(f"{where}: model_type={kind!r} is not a family this version reads" + nearest(str(kind), BY_TYPE))


def to_model_config(hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelConfig:
    """The ModelConfig of a config.json; the end tokens of generation_config.json win over config.json's. Raises CheckpointError for unknown families, names, types and fields."""
    fields = Fields(hf, where)
    try:
        config = of_config(hf, where).read(fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    scheme_of(fields.value("quantization_config", None), where)
    fields.finish()
    ends = Fields(generation or {}, "generation_config.json").ids("eos_token_id")
    return dc.replace(config, end_tokens=ends) if ends else config


def to_hf(config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """The contents of config.json, readable by transformers 4 and 5. dtype: what the weights are saved in.

    Raises CheckpointError naming the first field that this family's format cannot express.
    """
    family = get(config.family)
    for i, layer in enumerate(config.layers):
        if not isinstance(layer.mixer, family.mixer) or not isinstance(layer.ffn, family.ffn):
            raise CheckpointError(f"a {family.name} checkpoint cannot hold layer {i}: {type(layer.mixer).__name__} with {type(layer.ffn).__name__}; set family to one that can")
        if isinstance(layer.mixer, Attention) and family.rotary is not None and (layer.mixer.rope is not None) != family.rotary:
            raise CheckpointError(f"a {family.name} checkpoint cannot hold layer {i}: rope={layer.mixer.rope}; set family to one that can")
    out = {"architectures": [family.architecture], "model_type": family.model_types[0], **family.write(config)}
    out |= {"dtype": dtype, "torch_dtype": dtype} if dtype else {}
    found = difference(plain(config), plain(to_model_config(out)))
    if found:
        name = found[0].replace("prefix[", "layers[")
        raise CheckpointError(f"a {family.name} checkpoint cannot express {name}={found[1]!r} (read back: {found[2]!r}); change it, or set family to one that can")
    return out


def difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two configurations differ: (path, left value, right value)."""
    if dc.is_dataclass(a) and type(a) is type(b):
        pairs = [(f"{name}.{f.name}" if name else f.name, getattr(a, f.name), getattr(b, f.name)) for f in dc.fields(a)]
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        pairs = [(f"{name}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b))]
    else:
        return None if a == b else (name, a, b)
    return next(filter(None, (difference(x, y, where) for where, x, y in pairs)), None)
