"""Attention behind one signature: `reference` (the slow twin), `blockwise` (CPU, portable), and which of them `auto` means."""
from llmjax.kernels.attention.blockwise import blockwise
from llmjax.kernels.attention.reference import reference

__all__ = ["blockwise", "reference"]
