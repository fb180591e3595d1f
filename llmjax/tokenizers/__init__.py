"""Tokenizers and chat templates. No jax, and the libraries behind are imported when first used."""
from llmjax.tokenizers.chat import CHATML, CHATML_TOKENS
from llmjax.tokenizers.gguf import from_gguf
from llmjax.tokenizers.gguf_write import to_gguf
from llmjax.tokenizers.load import load
from llmjax.tokenizers.tokenizer import Tokenizer
from llmjax.tokenizers.train import bytes_tokenizer, characters_tokenizer, train_bpe

__all__ = ["CHATML", "CHATML_TOKENS", "Tokenizer", "bytes_tokenizer", "characters_tokenizer", "from_gguf", "load", "to_gguf", "train_bpe"]
