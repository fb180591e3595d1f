"""A Hugging Face folder: `config.json`, `generation_config.json`, safetensors weights, and whatever a tokenizer adds."""
from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from llmjax.checkpoint import families, quantized, safetensors_file
from llmjax.checkpoint.table import exports
from llmjax.core.model_config import ModelConfig
from llmjax.core.tree import flatten


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The ModelConfig of a folder. Raises FileNotFoundError without a config.json, CheckpointError for one that cannot be used."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder}: there is no config.json; name a folder in Hugging Face layout, a .gguf file, hf:org/name, or a known model")
    more = safetensors_file.read_json(generation) if generation.exists() else None
    return families.to_model_config(safetensors_file.read_json(file), more, str(file))


def open_weights(folder: pathlib.Path) -> Any:
    """The tensors of a folder, dequantised while they are read where its config.json says that they are quantised. Raises as `safetensors_file.open_folder` does."""
    file = folder / "config.json"
    return quantized.opened(safetensors_file.open_folder(folder), quantized.scheme_of(safetensors_file.read_json(file).get("quantization_config"), str(file)))


def write(folder: pathlib.Path, config: ModelConfig, params: Any, others: Callable[[pathlib.Path], None] | None = None, shard_bytes: int = safetensors_file.SHARD_BYTES,
          progress: Callable[[str], None] | None = None) -> None:
    """Writes a model in Hugging Face layout, in the dtype of its parameters; nothing that stands there changes unless all of it could be written.

    params: the parameter tree (array leaves are made dense; of several processes all must call this, and process 0 writes). others: writes further files (a tokenizer's) into the folder it is given.
    Raises CheckpointError where the family cannot express the model, and where the disk is full.
    """
    dtypes = sorted({str(leaf.dtype) for leaf in flatten(params).values()})
    hf = families.to_hf(config, dtypes[0] if len(dtypes) == 1 else "float32")
    tensors = exports(families.table_of(config), params)
    generation = {"bos_token_id": hf["bos_token_id"], "eos_token_id": hf["eos_token_id"], "pad_token_id": hf["pad_token_id"]}

    def rest(scratch: pathlib.Path) -> None:
        for name, values in (("config.json", hf), ("generation_config.json", {k: v for k, v in generation.items() if v is not None})):
            (scratch / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if others:
            others(scratch)

    if jax.process_index() > 0:
        for tensor in tensors:         # process 0 writes; what lies on several processes is brought to it by all
            tensor.make()
        return
    safetensors_file.write_folder(folder, tensors, rest, shard_bytes, progress)
