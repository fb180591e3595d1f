"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, read through the same table that reads the model they were trained on.

Reference: huggingface/peft, `LoraConfig` and `save_pretrained`. What adds to a weight W [out, in] of the file is scale · B A, A [r, in], B [out, r], scale alpha / r, or alpha / √r where
use_rslora is set (Kalajdzievski 2023, arXiv:2312.03732).
"""
from __future__ import annotations

import dataclasses as dc
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint import patterns
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.safetensors_file import SafeTensors, read_json
from llmjax.checkpoint.table import Cell, Source, Table, canonical, cells
from llmjax.core.errors import CheckpointError, nearest
from llmjax.core.leaves import Adapters, Lora
from llmjax.core.tree import flatten, unflatten

Place = tuple[str, tuple[int, ...]]                # a parameter, and of a stacked one which layer
HARMLESS = frozenset({"rank_pattern", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "base_model_name_or_path", "revision", "task_type",
                      "inference_mode", "auto_mapping", "peft_version", "runtime_config", "ensure_weight_tying"})          # the tensors say it, or it concerns training alone
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")        # ways to start that change the base weights too


@dc.dataclass(frozen=True)
class Low:
    """What an adapter adds to one matrix: scale · a b, a [in…, R], b [R, out…] float32."""
    a: np.ndarray
    b: np.ndarray
    scale: float


Adapter = dict[Place, Low]


@dc.dataclass(frozen=True)
class Settings:
    """What adapter_config.json says: alpha, and alphas of modules whose names match a pattern; targets that must be there; root: alpha / √r instead of alpha / r."""
    alpha: float
    alphas: Mapping[str, float]
    targets: tuple[str, ...]
    root: bool

    def scale(self, module: str, rank: int) -> float:
        alpha = next((value for key, value in self.alphas.items() if re.fullmatch(rf"(.*\.)?({key})", module)), self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.root else rank)


def read_settings(folder: pathlib.Path) -> Settings:
    """Raises FileNotFoundError without an adapter_config.json, CheckpointError naming the field that asks for what is not done here."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: there is no adapter_config.json; the folder of a LoRA adapter is wanted, as peft's save_pretrained writes it")
    fields = Fields(read_json(file), str(file))
    fields.choice("peft_type", ("LORA",), "LORA")
    fields.choice("bias", ("none",), "none")
    fields.choice("megatron_core", ("megatron.core",), "megatron.core")
    fields.choice("qalora_group_size", (16,), 16)
    start = fields.value("init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(MOVED):
        raise CheckpointError(f"{file}: init_lora_weights={start!r} changes the base model's weights; save the adapter with peft's path_initial_model_for_weight_conversion")
    fields.count("r")
    alpha, targets = fields.number("lora_alpha"), fields.value("target_modules", None)
    if alpha <= 0:
        raise CheckpointError(f"{file}: lora_alpha={alpha!r}: a number above 0 is wanted")
    found = Settings(alpha, fields.value("alpha_pattern", None) or {}, tuple(targets) if isinstance(targets, list) else (), fields.flag("use_rslora"))
    fields.finish(HARMLESS)
    return found


def read(folder: pathlib.Path, table: Table, labels: Any, like: Any) -> Adapter:
    """An adapter of the model whose family has this table. labels, like: `models.labels` and `models.abstract_params` of it, its layers stacked or apart.

    -> what it adds, by parameter. Raises FileNotFoundError, CheckpointError (a field or a tensor that is not supported, a target this model has not, another shape).
    """
    settings, file = read_settings(folder), folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: there is no adapter_model.safetensors" 
                                + ("; adapter_model.bin can run any code when it is opened: save it again with peft" if (folder / "adapter_model.bin").exists() else ""))
    source, flat, by_label = SafeTensors([file], str(file)), flatten(like), flatten(labels)
    modules: dict[str, dict[str, str]] = {}
    for name in source.shapes:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        if match is None:
            way = "it is a copy of the base model's; save the adapter with save_embedding_layers=False" if ".base_layer." in name else "lora_A and lora_B of weight matrices are supported"
            raise CheckpointError(f"{file}: nothing reads {name!r}; {way}")
        modules.setdefault(match[1], {})[match[2]] = name
    if not modules:
        raise CheckpointError(f"{file}: there is no tensor in it")
    for target in settings.targets:
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            raise CheckpointError(f"{folder}: target_modules names {target!r}, of which there is no tensor" + nearest(target, {m.rpartition(".")[2] for m in modules}))
    known: dict[str, Cell] = {}
    for cell in cells(table, flat):
        known.setdefault(cell.name, cell)
    named = canonical(table, cast(Source, SimpleNamespace(shapes={f"{module}.weight": () for module in modules})))
    found: Adapter = {}
    for name, actual in named.items():
        module = actual.removesuffix(".weight")
        if name not in known:
            there = sorted({n.removesuffix(".weight").rpartition(".")[2] for n, c in known.items() if n.endswith(".weight") and by_label[c.parts[0][0]].is_matrix})
            raise CheckpointError(f"{file}: it adapts {module!r}, which this model has not; matrices it has: {', '.join(there)}")
        if len(modules[module]) != 2:
            raise CheckpointError(f"{file}: {module!r} has a lora_{next(iter(modules[module]))} alone; copy or download it again")
        a, b = (source.read(modules[module][kind]).astype(np.float32) for kind in "AB")
        scale = settings.scale(module, a.shape[0])
        for part, down, up in factors(known[name], by_label, a, b, f"{file}: {module!r}"):
            found[part] = Low(down, up, scale)
    return found


def factors(cell: Cell, labels: Mapping[str, Any], a: np.ndarray, b: np.ndarray, where: str) -> list[tuple[Place, np.ndarray, np.ndarray]]:
    """A [R, in] and B [out, R] of a tensor, for each of our parameters it holds: (parameter, a [in…, R], b [R, out…])."""
    made = []
    for number, (leaf, at) in enumerate(cell.parts):
        label = labels[leaf]
        if not label.is_matrix or set(label.batch) - {"layer"} or len(at) != len(label.batch) or len(cell.shape) != 2:
            raise CheckpointError(f"{where}: adapters of {'experts' if 'expert' in label.batch else 'a ' + str(label)} are not supported")
        if cell.pieces is None:
            pattern, pieces = patterns.Pattern((("i",), ("o",)), (("i",), ("o",)), None), (dict(i=cell.shape[0], o=cell.shape[1]),) * len(cell.parts)
        else:
            pattern, pieces = patterns.parse(cell.row.pattern), cell.pieces
        count = len(label.inputs)
        summed = {letter for group in pattern.right[:count] for letter in group}
        into = next((i for i, group in enumerate(pattern.left) if set(group) - {"1"} <= summed), None)
        if into is None or (pattern.cut and pattern.cut[0] == into):
            raise CheckpointError(f"{where}: how this matrix stands in the file does not tell its inputs from its outputs; its adapter is not supported")
        rank = a.shape[0]
        if a.shape != (rank, cell.shape[into]) or b.shape != (cell.shape[1 - into], rank):
            raise CheckpointError(f"{where}: lora_A has shape {a.shape} and lora_B {b.shape}; for this model [r, {cell.shape[into]}] and [{cell.shape[1 - into]}, r] are wanted")
        sizes = [{**piece, "rank": rank} for piece in pieces]
        down = patterns.Pattern((("rank",), pattern.left[into]), (*pattern.right[:count], ("rank",)), None)
        up = patterns.Pattern((pattern.left[1 - into], ("rank",)), (("rank",), *pattern.right[count:]), (0, *pattern.cut[1:]) if pattern.cut else None)
        made.append(((leaf, at), patterns.split(a, down, sizes, number), patterns.split(b, up, sizes, number)))
    return made


def by_parameter(adapter: Adapter) -> dict[str, dict[tuple[int, ...], Low]]:
    found: dict[str, dict[tuple[int, ...], Low]] = {}
    for (name, at), low in adapter.items():
        found.setdefault(name, {})[at] = low
    return found


def padded(lows: Mapping[tuple[int, ...], Low], lead: tuple[int, ...], unit: float) -> tuple[np.ndarray, np.ndarray]:
    """a [*lead, in…, R], b [*lead, R, out…]: each low-rank product at its index, its scale / unit in b, zeros where there is none and beyond a smaller rank."""
    one, rank = next(iter(lows.values())), max(low.a.shape[-1] for low in lows.values())
    a, b = np.zeros((*lead, *one.a.shape[:-1], rank), np.float32), np.zeros((*lead, rank, *one.b.shape[1:]), np.float32)
    for at, low in lows.items():
        a[at][..., :low.a.shape[-1]] = low.a
        b[at][:low.b.shape[0]] = low.b * (low.scale / unit)
    return a, b


def with_lora(params: Any, adapter: Adapter) -> Any:
    """The parameters with a Lora leaf around each weight that the adapter adds to, a and b in float32."""
    flat = flatten(params)
    for name, lows in by_parameter(adapter).items():
        unit = next(iter(lows.values())).scale
        a, b = padded(lows, tuple(flat[name].shape[:len(next(iter(lows)))]), unit)
        flat[name] = Lora(flat[name], jnp.asarray(a), jnp.asarray(b), unit * max(low.a.shape[-1] for low in lows.values()))
    return unflatten(flat)


def with_adapters(params: Any, adapters: Sequence[Adapter], dtype: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """The parameters, layers apart, with an Adapters leaf around each weight that one of the adapters adds to; number i is `which` = i + 1. sharding: where a and b lie.
    Raises CheckpointError for a weight that has no such leaf: a tied embedding, the parts of latent attention that stand for keys and values."""
    flat = flatten(params)
    for name in dict.fromkeys(name for adapter in adapters for name, _ in adapter):
        if name.endswith(("mixer/k_up", "mixer/v_up")) or (name == "embed/table" and "head/kernel" not in flat):
            raise CheckpointError(f"an adapter adds to {name!r}, which {'is the head too' if name == 'embed/table' else 'is multiplied into queries'}: it cannot differ from row to row")
        lows: dict[tuple[int, ...], Low] = {(i,): adapter[name, ()] for i, adapter in enumerate(adapters) if (name, ()) in adapter}
        a, b = (jax.device_put(jnp.asarray(x, dtype), sharding) for x in padded(lows, (len(adapters),), 1.0))
        flat[name] = Adapters(flat[name], a, b)
    return unflatten(flat)
