"""Serving: a scheduler over the functions of `decode`, and HTTP around it. Only `engine.py`, `schedule.py` and `step.py` are needed to use the engine from Python; the rest takes the
`serve` extra."""
from llmjax.serve.drafts import parse_speculation
from llmjax.serve.engine import Engine, EngineSettings
from llmjax.serve.requests import End, Knobs, Observer, Piece, Refused, Request
from llmjax.serve.server import ServerSettings, serve

__all__ = ["End", "Engine", "EngineSettings", "Knobs", "Observer", "Piece", "Refused", "Request", "ServerSettings", "parse_speculation", "serve"]
