"""Errors a user can cause. All are `ValueError`s, so a caller needs to know none of them by name; messages are one line: the thing, its value, the way out."""
import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration names something that does not exist or holds a value that is not allowed."""


class CheckpointError(ValueError):
    """A model file, a tokenizer file or a saved state cannot be used as asked."""


class ShardingError(ValueError):
    """A mesh or a layout does not fit the devices or the parameters."""


class DataError(ValueError):
    """A data source, a shard or a row cannot be used as asked."""


class MissingExtra(ValueError):
    """An optional package is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'llmjax[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest right one, or all of them. -> "; did you mean 'steps'?" """
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
