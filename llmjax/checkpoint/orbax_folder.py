"""Parameters kept by Orbax: a folder of their own (`model.json` with the ModelConfig, `params/`, the tokenizer's files), or the newest checkpoint of a run.

Names, shapes and stacking are ours, so there is no table: what is stored is put where it is wanted, in the dtype that is wanted, and nothing else of a checkpoint is read.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from llmjax.checkpoint.safetensors_file import read_json
from llmjax.checkpoint.store import Store, full_disk
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import ModelConfig
from llmjax.core.override import from_json, to_json
from llmjax.core.run_config import RunConfig
from llmjax.core.tree import flatten, unflatten

MODEL = "model.json"


@dc.dataclass(frozen=True)
class Parameters:
    """Stored parameters: the checkpoints' folder, the step, and what their names begin with ("" or "params/")."""
    folder: pathlib.Path
    step: int
    lead: str = ""

    @property
    def where(self) -> str:
        return str(self.folder / str(self.step))

    def describe(self, name: str) -> tuple[str, str]:
        """(the dtype of a parameter, where it stands)."""
        return self.arrays[name][1], self.folder.name

    @functools.cached_property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Every stored parameter: name -> (shape, dtype)."""
        store = Store(self.folder)
        try:
            found = store.arrays(self.step)
        finally:
            store.close()
        return {name.removeprefix(self.lead): (tuple(shape), dtype) for name, (shape, dtype) in found.items() if name.startswith(self.lead)}

    def load(self, like: Any) -> Any:
        """The parameters as `like` (ShapeDtypeStructs) wants them: dtype and sharding. Raises CheckpointError for another model's and for damaged ones."""
        store = Store(self.folder)
        try:
            flat = store.restore_part(self.step, {self.lead + name: leaf for name, leaf in flatten(like).items()})
        finally:
            store.close()
        return unflatten({name.removeprefix(self.lead): x for name, x in flat.items()})


def is_parameters(folder: pathlib.Path) -> bool:
    return (folder / MODEL).is_file() and (folder / "params").is_dir()


def is_run(folder: pathlib.Path) -> bool:
    """Whether a run's folder has a checkpoint that can be read."""
    return (folder / "checkpoints").is_dir() and newest(folder / "checkpoints") is not None and is_run_config(folder)


def is_run_config(folder: pathlib.Path) -> bool:
    """Whether the config.json of a folder is a run's and not a Hugging Face model's."""
    file = folder / "config.json"
    return file.is_file() and str(read_json(file).get("type", "")).startswith("llmjax.")


def newest(folder: pathlib.Path) -> int | None:
    """The last whole step in a folder of checkpoints, by their names."""
    return max((int(x.name) for x in folder.iterdir() if x.is_dir() and x.name.isdigit()), default=None)


def open_folder(folder: pathlib.Path) -> tuple[ModelConfig, Parameters]:
    """The configuration and the parameters of a folder that `is_parameters` or `is_run`. Raises CheckpointError for a damaged one."""
    file = folder / (MODEL if is_parameters(folder) else "config.json")
    found = from_json(read_json(file), str(file))
    if isinstance(found, RunConfig):
        step = newest(folder / "checkpoints")
        assert step is not None
        return found.model, Parameters(folder / "checkpoints", step, "params/")
    if not isinstance(found, ModelConfig):
        raise CheckpointError(f"{file}: a ModelConfig or a RunConfig is expected, it holds a {type(found).__name__}")
    step = newest(folder / "params")
    if step is None:
        raise CheckpointError(f"{folder / 'params'}: it holds no parameters; write the folder again")
    return found, Parameters(folder / "params", step)


def write(folder: pathlib.Path, config: ModelConfig, params: Any, others: Callable[[pathlib.Path], None] | None = None) -> None:
    """Writes a folder of parameters; what stood there is replaced when all is written. Raises CheckpointError where the disk is full."""
    folder = folder.absolute()
    scratch, old = (folder.with_name(f".{word}-{os.getpid()}-{folder.name}") for word in ("writing", "replaced"))
    try:
        with full_disk(folder):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / MODEL).write_text(json.dumps(to_json(config), indent=1) + "\n", encoding="utf-8")
            if others:
                others(scratch)
            store = Store(scratch / "params", keep=1)
            try:
                store.save(0, params, wait=True)
            finally:
                store.close()
            if folder.exists():
                os.replace(folder, old)
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(old, ignore_errors=True)
