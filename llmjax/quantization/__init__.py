"""Weights as fewer bits, by replacing leaves of the parameter tree: the model does not know."""
from llmjax.quantization.weights import KINDS, quantize

__all__ = ["KINDS", "quantize"]
