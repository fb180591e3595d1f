"""From `configs/x.py:size=tiny` and `--config.a.b=value` to a RunConfig."""
from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Sequence

import ml_collections

from llmjax.core import ConfigError, RunConfig, nearest
from llmjax.core.override import call_typed, from_json, override, to_json


def find(name: str) -> pathlib.Path:
    """A configuration file: as named, or of those that come with the package. Raises FileNotFoundError naming the nearest."""
    path = pathlib.Path(name)
    if path.is_file():
        return path
    shipped = pathlib.Path(__file__).parent / "configs"
    if not shipped.is_dir():
        shipped = pathlib.Path(__file__).parent.parent / "configs"           # a checkout
    if path.parts[:1] == ("configs",) and (shipped / path.name).is_file():
        return shipped / path.name
    known = [f"configs/{p.name}" for p in sorted(shipped.glob("*.py")) if p.name != "__init__.py"]
    raise FileNotFoundError(f"--config={name}: there is no such file" + nearest(name, known))


def load(text: str, overrides: Sequence[str] = ()) -> RunConfig:
    """text: "FILE.py[:argument=value,…]", or a run's config.json. overrides: "optimizer.learning_rate=1e-4", … Raises ConfigError, FileNotFoundError."""
    name, _, arguments = text.partition(":")
    path = find(name)
    if path.suffix == ".json":
        try:
            config = from_json(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON ({error})") from error
    elif path.suffix == ".py":
        config = call_typed(get_config(path), arguments, name)
    else:
        raise ConfigError(f"--config={name}: a .py file with get_config, or a run's config.json is wanted")
    if isinstance(config, ml_collections.ConfigDict):                # the same fields, by name
        fields = {key: config[key] for key in config}
        unknown = [key for key in fields if key not in RunConfig.__dataclass_fields__]
        if unknown:
            raise ConfigError(f"{name}: a run has no field {unknown[0]!r}" + nearest(unknown[0], RunConfig.__dataclass_fields__))
        config = RunConfig(**fields)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{name}: get_config gave {type(config).__name__}, a RunConfig is wanted")
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--config.{item}: a value is missing, as in --config.{item}=…")
        config = override(config, key, value)
    return config


def get_config(path: pathlib.Path):
    """The `get_config` of a Python file. Raises ConfigError where the file fails or has none."""
    spec = importlib.util.spec_from_file_location(f"llmjax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)                   # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)                              # type: ignore[union-attr]
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path}: it has no function get_config")
    return module.get_config


__all__ = ["find", "from_json", "get_config", "load", "to_json"]
