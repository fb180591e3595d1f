"""Attention behind one signature: `reference` (the slow twin), `blockwise` (CPU and portable), `cudnn`, `splash`; which of them `auto` means, and how one runs on a mesh
(`sharded`; `ring` and `ulysses` where rows are divided).

`sparse` (windows with global tokens) and `paged` (keys and values in pages, decoding alone) have signatures of their own.
"""
from llmjax.kernels.attention.blockwise import blockwise
from llmjax.kernels.attention.choice import IMPLEMENTATIONS, choose, sharded
from llmjax.kernels.attention.cudnn import cudnn
from llmjax.kernels.attention.few import few, fits
from llmjax.kernels.attention.merged import merged, pays
from llmjax.kernels.attention.paged import Rule, paged
from llmjax.kernels.attention.reference import reference
from llmjax.kernels.attention.ring import exchange, ring, ulysses
from llmjax.kernels.attention.sparse import sparse
from llmjax.kernels.attention.splash import splash

__all__ = ["IMPLEMENTATIONS", "Rule", "blockwise", "choose", "cudnn", "exchange", "few", "fits", "merged", "paged", "pays", "reference", "ring", "sharded", "sparse", "splash", "ulysses"]
