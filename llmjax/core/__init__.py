"""The ground floor: configuration dataclasses, labels, array leaves and `dot`, tree tools, mesh and sharding, errors."""
from llmjax.core.contract import contract
from llmjax.core.errors import CheckpointError, ConfigError, DataError, MissingExtra, ShardingError, nearest
from llmjax.core.labels import Label
from llmjax.core.leaves import Adapters, Int8, Joined, Lora, Rows, add_lora, chosen, dense, dot, dots, is_leaf, join, quantize_int8, take
from llmjax.core.mesh import Layout, batch_parts, batch_sharding, check_batch, constrain, explain_sharding, free_axes, from_layout, make_mesh, shardings
from llmjax.core.model_config import Attention, GatedDelta, Layer, LayerInputs, LinearAttention, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm, find_cycle, unrolled
from llmjax.core.platform import partitioned, platform
from llmjax.core.positions import Rope
from llmjax.core.run_config import Adafactor, AdamW, Compute, Constant, Distributed, Guard, Linear, Lion, Muon, RunConfig, WarmupCosine, WarmupStableDecay

__all__ = [
    "Adafactor", "AdamW", "Adapters", "Attention", "CheckpointError", "Compute", "ConfigError", "Constant", "DataError", "Distributed", "GatedDelta", "Guard", "Int8",
    "Joined", "Label", "Layer", "LayerInputs", "Layout", "Linear", "LinearAttention", "Lion", "Lora",
    "MissingExtra", "MixtureOfExperts", "Mlp", "ModelConfig", "Muon", "Norm", "QKNorm", "Rope", "Rows", "RunConfig", "ShardingError", "WarmupCosine", "WarmupStableDecay",
    "add_lora", "batch_parts", "batch_sharding", "check_batch", "chosen", "constrain", "contract", "dense", "dot", "dots", "explain_sharding", "find_cycle", "free_axes", "from_layout", "is_leaf",
    "join", "make_mesh", "nearest", "partitioned", "platform", "quantize_int8", "shardings", "take", "unrolled",
]
