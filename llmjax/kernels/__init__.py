"""Fast versions behind plain signatures, each with its slow twin: attention, chunked cross entropy, grouped products."""
from llmjax.kernels import attention
from llmjax.kernels.cross_entropy import chunked_cross_entropy, chunked_logprobs
from llmjax.kernels.grouped_matmul import grouped_matmul
from llmjax.kernels.lookup import lookup

__all__ = ["attention", "chunked_cross_entropy", "chunked_logprobs", "grouped_matmul", "lookup"]
