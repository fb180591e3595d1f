"""Batch -> loss. Each objective is a frozen dataclass; see base.py for what it must answer."""
from llmjax.objectives.base import Mean, Objective
from llmjax.objectives.language import NextToken

__all__ = ["Mean", "NextToken", "Objective"]
