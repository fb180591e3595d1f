"""llmjax: the whole life of a language model in JAX and Flax.

    model, params, tokenizer = llmjax.load("smollm2")
    texts = llmjax.generate(model, params, tokenizer, ["The sea"], max_new_tokens=32)
    llmjax.save("out/", model, params, tokenizer)

Rooms are imported when they are first named: llmjax.train, llmjax.decode, llmjax.objectives, llmjax.data, llmjax.models, llmjax.core, …
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

FUNCTIONS = {"load": "pretrained", "save": "pretrained", "generate": "decode", "embed": "decode", "make_mesh": "core", "RunConfig": "core"}
ROOMS = ("core", "kernels", "tokenizers", "models", "checkpoint", "objectives", "data", "train", "decode", "pretrained", "run", "settings")

if TYPE_CHECKING:
    from llmjax import checkpoint, core, data, decode, kernels, models, objectives, pretrained, run, settings, tokenizers, train
    from llmjax.core import RunConfig, make_mesh
    from llmjax.decode import embed, generate
    from llmjax.pretrained import load, save

__all__ = ["RunConfig", "checkpoint", "core", "data", "decode", "embed", "generate", "kernels", "load", "make_mesh", "models", "objectives", "pretrained", "run", "save",
           "settings", "tokenizers", "train"]


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return getattr(importlib.import_module(f"llmjax.{FUNCTIONS[name]}"), name)
    if name in ROOMS:
        return importlib.import_module(f"llmjax.{name}")
    raise AttributeError(f"module 'llmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FUNCTIONS, *ROOMS])
