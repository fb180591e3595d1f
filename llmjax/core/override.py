"""Configurations as text: `--config.a.b=value`, JSON that a run can be repeated from, and the arguments of `configs/x.py:size=135m,lora=16`.

Every value is checked against the dataclass's annotation; an unknown name answers with the nearest right one.
"""
from __future__ import annotations

import ast
import dataclasses as dc
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from llmjax.core.errors import ConfigError, nearest


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type (Any, Literal, unions, tuples, classes)."""
    origin = typing.get_origin(hint)
    if hint is Any or hint is object:
        return True
    if origin is Literal:
        return any(value == v and type(value) is type(v) for v in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return any(fits(value, h) for h in typing.get_args(hint))
    if origin is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is ...:
            return all(fits(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(fits(v, h) for v, h in zip(value, inner))
    if origin is not None:
        return isinstance(value, origin)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """An annotation in words a user can act on."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " | ".join(repr(v) for v in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " | ".join(describe(h) for h in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")


def check_type(cls: type, name: str, value: Any, where: str | None = None) -> None:
    """Raises ConfigError naming the field, its value and what is allowed."""
    hint = hints(cls)[name]
    if not fits(value, hint):
        raise ConfigError(f"{where or name}={value!r}: {describe(hint)} is wanted")


def check_fields(config: Any) -> None:
    """check_type for every field of a dataclass."""
    for field in dc.fields(config):
        check_type(type(config), field.name, getattr(config, field.name))


def classes(hint: Any) -> dict[str, type]:
    """The dataclasses an annotation admits, by name."""
    if typing.get_origin(hint) in (Union, types.UnionType, tuple):
        return {k: v for h in typing.get_args(hint) for k, v in classes(h).items()}
    return {hint.__name__: hint} if isinstance(hint, type) and dc.is_dataclass(hint) else {}


def parse_value(text: str, hint: Any, where: str) -> Any:
    """Text from a command line as a value of the annotated type: Python literals, bare words, or a dataclass as Name(field=value, …)."""
    known = classes(hint)
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        tree = None
    if known and isinstance(tree, ast.Call | ast.Name):
        name = tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else getattr(tree, "id", "")
        if name in known:
            return construct(known[name], {str(k.arg): ast.unparse(k.value) for k in tree.keywords} if isinstance(tree, ast.Call) else {}, where)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, float) and value.is_integer() and "e" in text.lower() and fits(int(value), hint) and not fits(value, hint):
        value = int(value)                                        # --config.steps=1e4
    if not fits(value, hint) and fits(text, hint):
        value = text
    if not fits(value, hint) and fits((value,), hint):
        value = (value,)
    if not fits(value, hint):
        extra = f" (or one of {', '.join(f'{k}(…)' for k in known)})" if known else ""
        raise ConfigError(f"{where}={text}: {describe(hint)} is wanted{extra}")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and fits(1.5, hint) and not fits_exactly_int(hint) else value


def fits_exactly_int(hint: Any) -> bool:
    return hint is int or (typing.get_origin(hint) in (Union, types.UnionType) and any(h is int for h in typing.get_args(hint)))


def construct(cls: type, texts: dict[str, str], where: str) -> Any:
    """A dataclass from texts per field. Raises ConfigError for unknown or missing fields."""
    names = [f.name for f in dc.fields(cls)]
    for name in texts:
        if name not in names:
            raise ConfigError(f"{where}: {cls.__name__} has no field {name!r}" + nearest(name, names))
    missing = [f.name for f in dc.fields(cls) if f.name not in texts and f.default is dc.MISSING and f.default_factory is dc.MISSING]
    if missing:
        raise ConfigError(f"{where}: {cls.__name__} needs {', '.join(missing)}")
    return cls(**{k: parse_value(v, hints(cls)[k], f"{where}.{k}") for k, v in texts.items()})


def override(config: Any, path: str, text: str, where: str = "config") -> Any:
    """A copy of a dataclass tree with the field at "a.b.0.c" replaced by what `text` says. Raises ConfigError naming the field, the value and what is allowed."""
    head, _, rest = path.partition(".")
    where = f"{where}.{head}"
    if isinstance(config, tuple):
        if not head.isdigit() or int(head) >= len(config):
            raise ConfigError(f"{where}: a number from 0 to {len(config) - 1} is wanted")
        index = int(head)
        if not rest:
            raise ConfigError(f"{where}={text}: name a field of it, as in {where}.FIELD=VALUE")
        return config[:index] + (override(config[index], rest, text, where),) + config[index + 1:]
    if not dc.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"{where}: {type(config).__name__} has no fields")
    names = [f.name for f in dc.fields(config)]
    if head not in names:
        raise ConfigError(f"{where}: {type(config).__name__} has no field {head!r}" + nearest(head, names))
    if rest:
        new = override(getattr(config, head), rest, text, where)
    else:
        hint = hints(type(config))[head]
        if hint is Any and dc.is_dataclass(getattr(config, head)):
            raise ConfigError(f"{where}={text}: name a field of {type(getattr(config, head)).__name__}, as in {where}.FIELD=VALUE")
        new = parse_value(text, hint, where)
    return dc.replace(config, **{head: new})


def to_json(value: Any) -> Any:
    """A configuration as plain JSON; dataclasses carry their class as "type": "llmjax.core.run_config:AdamW"."""
    if dc.is_dataclass(value):
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **{f.name: to_json(getattr(value, f.name)) for f in dc.fields(value)}}
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"a configuration holds {type(value).__name__}, which cannot be written; use numbers, text, tuples and dataclasses")


def from_json(value: Any, where: str = "config") -> Any:
    """The inverse of `to_json`. Raises ConfigError for classes and fields that do not exist."""
    if isinstance(value, list):
        return tuple(from_json(v, where) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.get("type", "")
    module, _, cls_name = str(name).partition(":")
    try:
        cls: Any = getattr(importlib.import_module(module), cls_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: there is no configuration class {name!r}") from error
    if not (isinstance(cls, type) and dc.is_dataclass(cls)):
        raise ConfigError(f"{where}: {name!r} is not a configuration class")
    names = [f.name for f in dc.fields(cls)]
    for key in value:
        if key != "type" and key not in names:
            raise ConfigError(f"{where}: {cls_name} has no field {key!r}" + nearest(key, names))
    new = cls(**{k: from_json(v, f"{where}.{k}") for k, v in value.items() if k != "type"})
    for key in names:
        check_type(cls, key, getattr(new, key), f"{where}.{key}")
    return new


def as_text(value: Any, name: str = "config") -> list[str]:
    """One line per field, `config.optimizer.learning_rate = 0.0003`: what `llmjax show` prints and what `--config.…` overrides."""
    if dc.is_dataclass(value):
        fields = [line for f in dc.fields(value) for line in as_text(getattr(value, f.name), f"{name}.{f.name}")]
        return [f"{name} : {type(value).__name__}", *fields]
    if isinstance(value, tuple) and any(dc.is_dataclass(v) for v in value):
        return [line for i, v in enumerate(value) for line in as_text(v, f"{name}.{i}")]
    return [f"{name} = {value!r}"]


def call_typed(function: Callable, text: str, where: str) -> Any:
    """function(**arguments of "size=135m,lora=16"), each of the type its annotation or default says. Raises ConfigError."""
    parameters = inspect.signature(function).parameters
    known = typing.get_type_hints(function)
    given = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in parameters:
            raise ConfigError(f"{where}: get_config has no argument {name!r}" + nearest(name, parameters))
        if not equals:
            raise ConfigError(f"{where}: {name!r} needs a value, as in {name}=…")
        hint = known.get(name, type(parameters[name].default) if parameters[name].default not in (inspect.Parameter.empty, None) else Any)
        given[name] = parse_value(value, hint, f"{where}: {name}")
    missing = [p.name for p in parameters.values() if p.default is inspect.Parameter.empty and p.name not in given]
    if missing:
        raise ConfigError(f"{where}: get_config needs {', '.join(f'{m}=…' for m in missing)}, given after the file's name as in FILE.py:{missing[0]}=…")
    return function(**given)
