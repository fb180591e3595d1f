"""Converting checkpoints: whatever `pretrained.load` reads, written as a Hugging Face folder, a GGUF file or a folder of Orbax parameters, with an account of every tensor.

    report = convert("smollm2", "out.gguf", to="gguf", dtype="q8_0", check=True)
"""
from __future__ import annotations

import dataclasses as dc
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llmjax import models, pretrained, tokenizers
from llmjax.checkpoint import gguf_models, gguf_write, orbax_folder, table
from llmjax.core.errors import CheckpointError, nearest
from llmjax.core.tree import flatten, size

FLOATS = ("float32", "bfloat16", "float16")
DTYPES: dict[str, tuple[str, ...]] = {"hf": FLOATS, "gguf": tuple(gguf_write.KINDS), "orbax": FLOATS}
TOLERANCE = 1e-4          # of the logits' standard deviation: the same numbers on both sides, numbers of the configuration kept in float32
CHECKED = 48              # tokens per row that a check reads


@dc.dataclass(frozen=True)
class Moved:
    """Where a tensor went. dtype: the types it is stored in before and after; parameters: our names, with the layer in brackets where layers are stacked; targets: "name (file)"."""
    source: str
    shape: tuple[int, ...]
    dtype: tuple[str, str]
    parameters: tuple[str, ...]
    targets: tuple[str, ...]


@dc.dataclass(frozen=True)
class Check:
    """Logits of random tokens, largest differences over the logits' standard deviation. to_source: between the source and what was written, rounding and all; unexplained: between
    what was written and the source rounded in memory to the type written."""
    to_source: float
    unexplained: float

    @property
    def passed(self) -> bool:
        return self.unexplained <= TOLERANCE


@dc.dataclass(frozen=True)
class Report:
    family: str
    parameters: int
    dtype: str
    tokenizer: bool
    target: str
    tensors: tuple[Moved, ...]
    check: Check | None = None


def convert(source: str | pathlib.Path, target: str | pathlib.Path, *, to: str = "hf", dtype: str = "bfloat16", check: bool = False, overwrite: bool = False,
            tokenizer: bool = True, progress: bool = True) -> Report:
    """Writes a checkpoint in another layout.

    source: anything `pretrained.load` takes. to: "hf" (a folder), "gguf" (a file) or "orbax" (a folder of parameters). dtype: of the weights written, see DTYPES.
    check: the written checkpoint is loaded again and its logits compared. overwrite: target may hold such a checkpoint already; it stays whole until the new one is.
    tokenizer: False leaves it out.
    Raises CheckpointError for a target that is there, a dtype the layout has not, and what the layout cannot express; otherwise what `pretrained.load` raises.
    """
    if to not in DTYPES:
        raise CheckpointError(f"--to={to} is no layout this version writes" + nearest(to, DTYPES))
    if dtype not in DTYPES[to]:
        raise CheckpointError(f"--dtype={dtype}: {to} is written in {', '.join(DTYPES[to])}")
    place = pathlib.Path(target).expanduser()
    check_target(place, to, overwrite)
    exact: Any = "float32" if to == "gguf" else dtype
    model, params, found = pretrained.load(source, dtype=exact)
    found = found if tokenizer else None
    expected = WRITERS[to](place, model, params, found, dtype, progress)
    origin, written = pretrained.locate(source), pretrained.locate(place)
    moved = tuple(account(pretrained.open_checkpoint(origin), pretrained.open_checkpoint(written), models.abstract_params(model)))
    result = None
    if check:
        want = logits(model, expected())
        del params, expected
        result = compare(place, source, want)
    return Report(model.config.family, size(models.abstract_params(model)), dtype, found is not None, str(target), moved, result)


def check_target(place: pathlib.Path, to: str, overwrite: bool) -> None:
    """Raises CheckpointError where something stands that must not be replaced."""
    if not place.exists() or (place.is_dir() and to != "gguf" and not any(place.iterdir())):
        return
    same = {"hf": place.is_dir() and (place / "config.json").is_file(), "gguf": place.is_file() and place.suffix == ".gguf", "orbax": orbax_folder.is_parameters(place)}[to]
    if not overwrite:
        raise CheckpointError(f"{place}: it is there already; name another target" + (", or give --overwrite" if same else ""))
    if not same:
        raise CheckpointError(f"{place}: it holds something else than a checkpoint of the layout {to}, which --overwrite does not replace; name another target")


# Writers: (place, model, params, tokenizer, dtype, progress) -> a function that gives the parameters as they are rounded on the way

def write_hf(place: pathlib.Path, model: models.Decoder, params: Any, tokenizer: tokenizers.Tokenizer | None, dtype: str, progress: bool) -> Callable[[], Any]:
    pretrained.save(place, model, params, tokenizer)
    return lambda: params


def write_orbax(place: pathlib.Path, model: models.Decoder, params: Any, tokenizer: tokenizers.Tokenizer | None, dtype: str, progress: bool) -> Callable[[], Any]:
    orbax_folder.write(place, model.config, params, tokenizer.save if tokenizer is not None else None)
    return lambda: params


def write_gguf(place: pathlib.Path, model: models.Decoder, params: Any, tokenizer: tokenizers.Tokenizer | None, dtype: str, progress: bool) -> Callable[[], Any]:
    if place.suffix != ".gguf":
        raise CheckpointError(f"{place}: the name of a GGUF file ends in .gguf")
    if tokenizer is not None:
        pretrained.check_vocabulary(tokenizer, model.config, place)
    fields, rows, small = gguf_models.to_gguf(model.config, flatten(params))
    words = tokenizers.to_gguf(tokenizer, model.config.vocab_size) if tokenizer is not None else {"tokenizer.ggml.model": "no_vocab"}
    wanted = gguf_write.KINDS[dtype]
    tensors = [gguf_write.Tensor(t.name, t.shape, gguf_write.kind_of(t.name, t.shape, wanted), t.make) for t in table.exports(rows, params)]
    extra = [gguf_write.Tensor(name, x.shape, "F32", functools.partial(np.asarray, x)) for name, x in small.items()]
    with tqdm(total=len(tensors) + len(extra), desc=str(place.name), unit="tensor", delay=1.0, disable=None if progress else True, leave=False) as bar:
        gguf_write.write(place, {**words, **fields}, [*tensors, *extra], wanted, lambda _: bar.update())
    like = models.abstract_params(model)
    return lambda: table.load(Rounded(str(place), {t.name: t for t in tensors}), rows, like)


WRITERS = {"hf": write_hf, "gguf": write_gguf, "orbax": write_orbax}


@dc.dataclass(frozen=True)
class Rounded:
    """A `table.Source` in memory: tensors as a GGUF file would give them back."""
    where: str
    tensors: Mapping[str, gguf_write.Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: t.shape for name, t in self.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        t = self.tensors[name]
        return gguf_write.decode(gguf_write.encode(t.make(), t.kind), t.kind).reshape(t.shape)[start:stop]


# The check

def logits(model: models.Decoder, params: Any) -> np.ndarray:
    """What the model answers to random tokens, computed in float32: logits [2, T, V], or what an encoder's head gives."""
    exact = models.build(model.config, dc.replace(model.compute, dtype="float32", param_dtype="float32"), model.layout)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, min(CHECKED, model.config.context)))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    source = {} if model.config.encoder is None else {"encoder_tokens": jnp.asarray(tokens[::-1], jnp.int32)}
    return np.asarray(exact.apply({"params": params}, jnp.asarray(tokens, jnp.int32), **source)[0])


def compare(place: pathlib.Path, source: str | pathlib.Path, want: np.ndarray) -> Check:
    """want: the logits of the source, rounded in memory as it was written."""
    written, original = (logits(*pretrained.load(name, dtype="float32")[:2]) for name in (place, source))
    spread = float(original.std()) or 1.0
    return Check(float(np.abs(written - original).max()) / spread, float(np.abs(written - want).max()) / spread)


# The account

def account(origin: tuple, written: tuple, like: Any) -> Iterator[Moved]:
    """Every tensor of the source and where its numbers are now; then what the target has besides."""
    before, after = (list(placed(side[1], side[2], like)) for side in (origin, written))
    by_leaf: dict[str, list] = {}
    for name, _, parts in after:
        for leaf, at in parts:
            by_leaf.setdefault(leaf, []).append((at, name))
    seen: set[str] = set()
    for name, shape, parts in before:
        targets = dict.fromkeys(there for leaf, at in parts for other, there in by_leaf.get(leaf, ()) if all(a == b for a, b in zip(at, other)))
        seen.update(targets)
        kinds = dict.fromkeys(written[1].describe(there)[0] for there in targets)
        yield Moved(name, shape, (origin[1].describe(name)[0], ", ".join(kinds)), tuple(spelled(*part) for part in parts), tuple(where(written[1], there) for there in targets))
    read = {name for name, _, _ in before}
    for name, shape in () if isinstance(origin[1], orbax_folder.Parameters) else origin[1].shapes.items():
        if name not in read:
            yield Moved(name, tuple(shape), (origin[1].describe(name)[0], ""), (), ())
    for name, shape in () if isinstance(written[1], orbax_folder.Parameters) else written[1].shapes.items():
        if name not in seen:
            yield Moved("", tuple(shape), ("", written[1].describe(name)[0]), (), (where(written[1], name),))


def placed(source: Any, rows: table.Table, like: Any) -> Iterator[tuple[str, tuple[int, ...], tuple[tuple[str, tuple[int, ...]], ...]]]:
    """(name, shape, the parts of our parameters that it holds) of each tensor of a checkpoint that is read."""
    flat = flatten(like)
    if isinstance(source, orbax_folder.Parameters):
        yield from ((name, tuple(leaf.shape), ((name, ()),)) for name, leaf in flat.items())
        return
    names = table.canonical(rows, source)
    yield from ((names[cell.name], cell.shape, cell.parts) for cell in table.choose(rows, flat, names))


def spelled(leaf: str, at: tuple[int, ...]) -> str:
    return leaf + "".join(f"[{i}]" for i in at)


def where(source: Any, name: str) -> str:
    return f"{name} ({source.describe(name)[1]})"


def lines(report: Report, shown: int | None = None) -> list[str]:
    """The account as text: every tensor, or the first and last `shown`, then what was written and what the check found."""
    rows = [(t.source or "(made)", "×".join(map(str, t.shape)) or "1", t.dtype[0], ", ".join(t.targets) or "nowhere: a duplicate or a buffer", t.dtype[1]) for t in report.tensors]
    left = len(rows) - 2 * shown if shown else 0
    shorter = rows if left <= 0 else [*rows[:shown], *rows[-(shown or 0):]]
    widths = [max((len(row[i]) for row in shorter), default=0) for i in range(3)]
    out = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  -> {d}  {e}".rstrip() for a, b, c, d, e in shorter]
    if left > 0:
        out.insert(shown or 0, f"… {left} more (--verbose shows them)")
    out.append(f"{report.target}: {report.family}, {report.parameters:,} parameters in {report.dtype}, {len(rows)} tensors, {'with' if report.tokenizer else 'without'} a tokenizer")
    if report.check is not None:
        found = report.check
        out.append(f"check: logits differ from the source's by {found.to_source:.2g} of their standard deviation; {found.unexplained:.2g} of it is not the rounding to {report.dtype} "
                   f"({'passed' if found.passed else f'FAILED: at most {TOLERANCE:g} is expected'})")
    return out


def write_report(file: str | pathlib.Path, report: Report) -> None:
    """The account of every tensor in a file: JSON where its name ends in .json, else text."""
    text = json.dumps(dc.asdict(report), indent=1) if str(file).endswith(".json") else "\n".join(lines(report))
    pathlib.Path(file).write_text(text + "\n", encoding="utf-8")
