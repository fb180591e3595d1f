"""Data: sources to tokens to rows to batches. `build(corpus, folder, context=..., seed=...)` gives a `Dataset`; a `Corpus` says of what. No jax."""
from llmjax.data.build import build, make_tokenizer
from llmjax.data.config import (
    BestFit,
    Bytes,
    Characters,
    Chat,
    Completion,
    Concatenate,
    Corpus,
    Fraction,
    HeldOut,
    JsonLines,
    Mixture,
    Parquet,
    Part,
    StandardLibrary,
    Tail,
    TextFiles,
    Tfds,
    TokenizerFile,
    TrainBpe,
    Windows,
)
from llmjax.data.dataset import Batch, Dataset, Split
from llmjax.data.loader import Loader
from llmjax.data.scoring import scored_bytes, scoring_batches
from llmjax.data.sources import documents
from llmjax.data.store import TokenStore, open_store

__all__ = [
    "Batch", "BestFit", "Bytes", "Characters", "Chat", "Completion", "Concatenate", "Corpus", "Dataset", "Fraction", "HeldOut", "JsonLines", "Loader", "Mixture", "Parquet",
    "Part", "Split", "StandardLibrary",
    "Tail", "TextFiles", "Tfds", "TokenStore", "TokenizerFile", "TrainBpe", "Windows", "build", "documents", "make_tokenizer", "open_store", "scored_bytes",
    "scoring_batches",
]
