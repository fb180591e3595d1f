"""Qwen3.5, the text model: Qwen3-Next's layers, dense, with the delta net's projections apart.

Of a checkpoint with pictures (model_type "qwen3_5") the text model is read; the vision tower and the layers that predict further tokens are left out.
"""
from functools import partial
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.qwen3_next import DELTA, GATED, D, model, read_mixers, write_mixers
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, GatedDelta, Mlp, ModelConfig, Norm

APART = (Row(D + "in_proj_qkv.weight", ("mixer/q", "mixer/k", "mixer/v"), "[k h] d -> d k h", beside="mixer/z"), Row(D + "in_proj_z.weight", "mixer/z", "(k h) d -> d k h"),
         Row(D + "in_proj_b.weight", "mixer/beta", "(k r) d -> d k r"), Row(D + "in_proj_a.weight", "mixer/decay", "(k r) d -> d k r"))
PICTURES = dict(renames=((r"^(model\.language_model\.|language_model\.model\.)", "model."), (r"^language_model\.lm_head\.", "lm_head.")), extras=(r"mtp\..*", r"(model\.)?visual\..*"))


def read(f: Fields) -> ModelConfig:
    dim, norm, context = f.count("hidden_size"), Norm(eps=f.number("rms_norm_eps", 1e-6), offset=1.0), f.count("max_position_embeddings", 32_768)
    mixers = read_mixers(f, dim, norm, context, 4)
    ffn = Mlp(f.count("intermediate_size", 12_288), f.activation("hidden_act", "silu"))
    return model(f, "qwen3_5", mixers, [ffn] * len(mixers), dim=dim, norm=norm, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    return write_mixers(config)


FAMILY = base.Family("qwen3_5", ("qwen3_5_text", "qwen3_5"), "Qwen3_5ForCausalLM", partial(base.text_part, read=read), write,
                     base.table(*APART, *DELTA, *GATED, *base.MLP, *base.PRE, **PICTURES), mixer=(Attention, GatedDelta))
