"""Adapters that requests ask for by name: read once at the start, all of them in the one step, each row with its own or none."""
from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llmjax import pretrained
from llmjax.checkpoint.lora_folder import with_adapters
from llmjax.core.errors import ConfigError

Paths = Mapping[str, str | pathlib.Path]


def parse(given: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
    """["name=path", …] -> {name: path}. taken: names that mean something else. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name.strip() and equals and path.strip()):
            raise ConfigError(f"--adapter={text}: name=path is wanted, a name that requests call it by and the folder of a LoRA adapter")
        if name in found or name in taken:
            raise ConfigError(f"--adapter={text}: the name {name!r} is taken; give another")
        found[name] = path
    return found


def attached(model: Any, params: Any, paths: Paths, mesh: jax.sharding.Mesh | None) -> Any:
    """Parameters as `decode.prepare` gave them, with the adapters of these folders. Raises FileNotFoundError, CheckpointError."""
    if not paths:
        return params
    read = [pretrained.read_adapter(model, path) for path in paths.values()]
    return with_adapters(params, read, model.compute.dtype, None if mesh is None else NamedSharding(mesh, PartitionSpec()))
