"""Checkpoints: two-way tables between our parameters and published formats, Hugging Face folders, GGUF files, published sizes, and the store of a run.

This room knows configurations and trees of arrays, no modules: `llmjax.pretrained` puts it together with models and tokenizers.
"""
from llmjax.checkpoint.families import FAMILIES, to_hf, to_model_config
from llmjax.checkpoint.families.base import Family
from llmjax.checkpoint.presets import PUBLISHED, published
from llmjax.checkpoint.replicas import Replicas
from llmjax.checkpoint.store import Store
from llmjax.checkpoint.table import Row, Source, Table, cells, exports, load

__all__ = ["FAMILIES", "PUBLISHED", "Family", "Replicas", "Row", "Source", "Store", "Table", "cells", "exports", "load", "published", "to_hf", "to_model_config"]
