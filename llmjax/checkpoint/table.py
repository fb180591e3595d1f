"""The two-way table engine: rows that say which tensor of a file is which of our parameters, read left to right to load and right to left to save.

It knows no model and no file format: it works on a tree of shapes given by the caller (`jax.ShapeDtypeStruct` leaves, with their shardings where they have some) and on a
`Source` of named tensors. Every tensor must be read and every parameter written; what is left over, missing or of another shape is an error that names it.
Loading fills one leaf of the tree at a time, by a few threads, straight to where it lies: above the model the host holds one leaf's local shards and, per thread, a portion of
a tensor (or one whole tensor that cannot be read in portions).
"""
from __future__ import annotations

import dataclasses as dc
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint import patterns
from llmjax.checkpoint.copying import ROWS, aligned, copy_into
from llmjax.core.errors import CheckpointError
from llmjax.core.leaves import dense
from llmjax.core.tree import flatten, unflatten

Tree = Any
Span = tuple[tuple[int, int], ...]                 # what of an array a shard covers: (start, stop) per dimension
PORTION = 4 << 20                                  # numbers of a large tensor that are read at once: 16 MB of float32
READERS = min(8, os.cpu_count() or 1)              # threads that read and transpose, a portion each; more would only wait for memory


class Source(Protocol):
    """Named tensors that can be read, or some rows of one. `where` names the file or folder in errors; `shapes` maps each name to its shape. Several threads read at once, unless
    the source has `readers = 1`."""
    @property
    def where(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


@dc.dataclass(frozen=True)
class Row:
    """One kind of tensor.

    name: in the file, with {l} for the layer and {e} for the expert.
    path: of our parameter, within its layer where the name has {l} ("mixer/q"), else from the top ("embed/table"); several for a tensor that holds several.
    pattern: see `patterns`; "" where the numbers lie the same way.
    added: what the file's numbers are larger by (GGUF keeps Gemma's norm scales as 1 + w).
    stack: the subtree whose layers {l} counts ("" is the top).
    sizes: (letter, parameter, dimension) for letters of the pattern that the shapes leave open: the size of that dimension of that parameter.
    without: a parameter of the layer beside which there is no such tensor (T5 calls a feed-forward's matrix otherwise where it has a gate).
    beside: a parameter that the layer must have too ("" for none), where layers of several kinds have parameters of one name.
    A row whose parameters a model (or a layer) does not have, or has with another number of dimensions, is passed over.
    Where two rows make the same parameter, the first is written; the one whose tensor is there is read.
    """
    name: str
    path: str | tuple[str, ...]
    pattern: str = ""
    added: float = 0.0
    stack: str = ""
    sizes: tuple[tuple[str, str, int], ...] = ()
    without: str = ""
    beside: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


@dc.dataclass(frozen=True)
class Table:
    """All rows of a family.

    base: the prefix that a checkpoint of the bare model (without its head) leaves out.
    renames: (regular expression, replacement) that turn other spellings of tensor names into those of the rows.
    extras: regular expressions of tensors that hold nothing of the model (buffers, parts it does not have).
    copies: (name, name of the tensor whose duplicate it is): read only to see that they are equal.
    """
    rows: tuple[Row, ...]
    base: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    extras: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()


@dc.dataclass(frozen=True)
class Cell:
    """One tensor of a file: which parts of which leaves it is. parts: (leaf, index into its leading axes)."""
    name: str
    row: Row
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    pieces: tuple[dict[str, int], ...] | None      # letter sizes per part; None: as it is
    shape: tuple[int, ...]


def layers_of(flat: Mapping[str, Any], stack: str) -> list[tuple[str, int | None]]:
    """Where each layer's arrays lie, in order: (subtree, index on the stacked axis or None)."""
    lead = f"{stack}/" if stack else ""
    found: dict[str, dict[int, Any]] = {"prefix": {}, "cycle": {}, "suffix": {}}
    for name, leaf in flat.items():
        match = re.match(re.escape(lead) + r"(prefix_|cycle/|suffix_)(\d+)/", name)
        if match:
            found[match[1][:-1]].setdefault(int(match[2]), leaf)
    cycle = found["cycle"]
    repeats = cycle[0].shape[0] if cycle else 0
    layers: list[tuple[str, int | None]] = [(f"{lead}prefix_{i}", None) for i in range(len(found["prefix"]))]
    layers += [(f"{lead}cycle/{i}", r) for r in range(repeats) for i in range(len(cycle))]
    return layers + [(f"{lead}suffix_{i}", None) for i in range(len(found["suffix"]))]


def cells(table: Table, flat: Mapping[str, Any]) -> Iterator[Cell]:
    """Every tensor that the table makes of a model, row by row."""
    layers = functools.cache(functools.partial(layers_of, flat))
    for row in table.rows:
        for l, (base, index) in enumerate(layers(row.stack)) if "{l}" in row.name else [(None, ("", None))]:
            names = [f"{base}/{path}" if base else path for path in row.paths]
            if not all(name in flat for name in names) or (row.without and f"{base}/{row.without}" in flat) or (row.beside and f"{base}/{row.beside}" not in flat):
                continue
            lead = () if index is None else (index,)
            experts = range(flat[names[0]].shape[len(lead)]) if "{e}" in row.name else (None,)
            for e in experts:
                at = lead if e is None else (*lead, e)
                shapes = [tuple(flat[name].shape[len(at):]) for name in names]
                pieces, shape = None, shapes[0]
                if row.pattern:
                    pattern = patterns.parse(row.pattern)
                    if any(len(s) != len(pattern.right) for s in shapes):          # the same name in another kind of layer: a dense one among experts
                        break
                    known = {letter: flat[f"{base}/{path}" if base else path].shape[len(at) + dim] for letter, path, dim in row.sizes}
                    pieces = tuple(patterns.solve(pattern.right, s, known) for s in shapes)
                    shape = patterns.file_shape(pattern, pieces)
                yield Cell(row.name.format(l=l, e=e), row, tuple((name, at) for name in names), pieces, shape)


def choose(table: Table, flat: Mapping[str, Any], names: Mapping[str, str] | None = None) -> list[Cell]:
    """One cell per part of a parameter: of several the one whose tensor is in `names`, else the first. Raises CheckpointError for a parameter no row makes."""
    every = list(cells(table, flat))
    made_whole: set[tuple] = set()         # parts that a chosen cell makes, and what contains some of them
    made_partly: set[tuple] = set()
    chosen: list[Cell] = []
    for present in (True, False):
        for cell in every:
            held = [[(name, at[:i]) for i in range(len(at) + 1)] for name, at in cell.parts]
            taken = all(lead[-1] in made_partly or not made_whole.isdisjoint(lead) for lead in held)
            if (names is None or cell.name in names) == present and not taken:
                made_whole.update(cell.parts)
                made_partly.update(part for lead in held for part in lead)
                chosen.append(cell)
    made = {name for cell in chosen for name, _ in cell.parts}
    for name in flat:
        if name not in made:
            raise CheckpointError(f"the parameter {name!r} {tuple(flat[name].shape)} has no tensor in this family's table; the family cannot hold this model")
    return chosen


def canonical(table: Table, source: Source) -> dict[str, str]:
    """The names the rows use -> the names in the file."""
    names = {}
    for actual in source.shapes:
        name = actual
        for old, new in table.renames:
            name = re.sub(old, new, name)
        names[name] = actual
    if table.base and not any(name.startswith(table.base) for name in names):
        known = {row.name for row in table.rows}
        names = {name if name in known else table.base + name: actual for name, actual in names.items()}
    return names


def check(table: Table, chosen: list[Cell], names: Mapping[str, str], source: Source) -> None:
    """Raises CheckpointError for the first tensor that is missing, of another shape, or not read by anything."""
    for cell in chosen:
        if cell.name not in names:
            raise CheckpointError(f"{source.where}: the tensor {cell.name!r} {cell.shape} is missing; is the download complete, and is this its config?")
        shape = tuple(source.shapes[names[cell.name]])
        if shape != cell.shape:
            raise CheckpointError(f"{source.where}: the tensor {names[cell.name]!r} has shape {shape}, the config makes it {cell.shape}; one of the two belongs to another model")
    used = {cell.name for cell in chosen}
    copies = dict(table.copies)
    left = []
    for name in names:
        if name in used or any(re.fullmatch(pattern, name) for pattern in table.extras):
            continue
        if name in copies:
            twin = copies[name]
            if not np.array_equal(source.read(names[name]), source.read(names[twin])):
                raise CheckpointError(f"{source.where}: {names[name]!r} differs from {names[twin]!r}, but the config says that they are tied; set tie_word_embeddings to false")
            continue
        if not getattr(source, "holds_nothing", lambda _: False)(names[name]):
            left.append(names[name])
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise CheckpointError(f"{source.where}: nothing reads {', '.join(repr(n) for n in left[:3])}{more}; the file holds another model than its config says")


def load(source: Source, table: Table, like: Tree, progress: Callable[[str], None] | None = None) -> Tree:
    """The parameters of a checkpoint.

    like: nested dict of ShapeDtypeStruct: shapes, the dtype each parameter gets, and (optionally) its sharding. -> the same tree of jax arrays.
    progress: called with the name of each leaf once it is in place. Raises CheckpointError before anything is read where names or shapes do not fit.
    """
    flat = flatten(like)
    names = canonical(table, source)
    chosen = choose(table, flat, names)
    check(table, chosen, names, source)
    uses: dict[str, list[tuple[Cell, int, tuple[int, ...]]]] = {}
    for cell in chosen:
        for number, (name, at) in enumerate(cell.parts):
            uses.setdefault(name, []).append((cell, number, at))
    out = {}
    with ThreadPoolExecutor(getattr(source, "readers", READERS)) as pool:
        for name, leaf in flat.items():
            out[name] = fill(source, names, uses[name], leaf, pool)
            if progress:
                progress(name)
    return unflatten(out)


def fill(source: Source, names: Mapping[str, str], uses: list[tuple[Cell, int, tuple[int, ...]]], like: Any, pool: ThreadPoolExecutor) -> jax.Array:
    """One leaf: a host buffer per local shard, filled portion by portion (each has a place of its own, so their order does not matter), then put in its place."""
    sharding = getattr(like, "sharding", None)
    whole = tuple((0, n) for n in like.shape)
    places = {None: whole}
    if sharding is not None:
        places = {device: tuple(s.indices(n)[:2] for s, n in zip(index, like.shape)) for device, index in sharding.addressable_devices_indices_map(like.shape).items()}
    buffers = {span: aligned([stop - start for start, stop in span], like.dtype) for span in set(places.values())}

    def copy(cell: Cell, number: int, part: Part | None, reach: dict[Span, tuple[tuple, tuple]]) -> None:
        x = source.read(names[cell.name], *(part.start * part.rows, part.stop * part.rows) if part else ())
        if cell.pieces is not None:
            pattern, sizes = patterns.parse(cell.row.pattern), cell.pieces
            if part:
                sizes = tuple({**piece, pattern.left[0][0]: part.stop - part.start} for piece in sizes)
            x = patterns.split(x, pattern, sizes, number)
        if cell.row.added:
            x = x.astype(np.float32) - np.float32(cell.row.added)
        for span, (place, taken) in reach.items():
            copy_into(buffers[span][place], x[taken])

    together: list[tuple] = []
    alone: list[tuple] = []
    for cell, number, at in uses:
        spans = [span for span in buffers if all(start <= i < stop for i, (start, stop) in zip(at, span))]
        for part in portions(cell) if spans else ():
            reach = {span: there for span in spans if (there := overlap(span, at, part))}
            if reach:
                (together if part or math.prod(cell.shape) <= PORTION else alone).append((cell, number, part, reach))
    for _ in pool.map(lambda portion: copy(*portion), together):
        pass
    for portion in alone:                            # a large tensor in one piece: two of them at once would be more than the host was promised to hold
        copy(*portion)
    if sharding is None:
        return jax.device_put(buffers[whole])
    shards = [jax.device_put(buffers[span], device) for device, span in places.items()]
    return jax.make_array_from_single_device_arrays(like.shape, sharding, shards)


@dc.dataclass(frozen=True)
class Part:
    """From `start` to before `stop` of our dimension `axis`, in each place of which the file has `rows` rows."""
    axis: int
    start: int
    stop: int
    rows: int


def portions(cell: Cell) -> list[Part] | list[None]:
    """What is read of a tensor at once: [None] is all of it, for one that is small or whose rows are not in the order of one dimension of ours."""
    size, axis, rows = math.prod(cell.shape), 0, 1
    if size <= PORTION or len(cell.parts) > 1:
        return [None]
    if cell.pieces is not None:
        pattern = patterns.parse(cell.row.pattern)
        outer, *inner = pattern.left[0]
        if (outer,) not in pattern.right:
            return [None]
        axis, rows = pattern.right.index((outer,)), math.prod(cell.pieces[0][letter] for letter in inner)
    places = cell.shape[0] // rows
    step = max(1, PORTION * places // size)
    step -= step % max(1, ROWS // rows) if step * rows > ROWS else 0
    return [Part(axis, first, min(first + step, places), rows) for first in range(0, places, step)]


def overlap(span: Span, at: tuple[int, ...], part: Part | None) -> tuple[tuple, tuple] | None:
    """(where in a shard's buffer, what of the tensor read) for a shard that covers `span`, or None where this part does not reach it."""
    target: list[Any] = [i - start for i, (start, _) in zip(at, span)]
    taken = []
    for i, (start, stop) in enumerate(span[len(at):]):
        first, last = (part.start, part.stop) if part and i == part.axis else (0, stop)
        low, high = max(start, first), min(stop, last)
        if low >= high and stop > start:
            return None
        target.append(slice(low - start, high - start))
        taken.append(slice(low - first, high - first))
    return tuple(target), tuple(taken)


@dc.dataclass(frozen=True)
class Export:
    """A tensor to be written: its array is made when `make` is called."""
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def exports(table: Table, params: Tree) -> list[Export]:
    """The tensors of a file out of our parameters (array leaves are made dense), one at a time when asked. Raises CheckpointError for a parameter the table cannot place.

    Where parameters lie on several processes, all of them must make every tensor, in order: a layer of a parameter is brought to all hosts at a time, and no more.
    """
    flat = flatten(params)

    @functools.lru_cache(maxsize=max((len(row.paths) for row in table.rows), default=1))
    def host(name: str, layer: int | None) -> np.ndarray:
        x = dense(flat[name])
        return gather(x, layer) if apart(flat[name]) else np.asarray(x)

    def part(name: str, at: tuple[int, ...]) -> np.ndarray:
        return host(name, at[0])[at[1:]] if at and apart(flat[name]) else host(name, None)[at]

    def make(cell: Cell) -> np.ndarray:
        xs = [part(name, at) for name, at in cell.parts]
        if cell.row.added:
            xs = [(x.astype(np.float32) + np.float32(cell.row.added)).astype(x.dtype) for x in xs]
        return patterns.join(xs, patterns.parse(cell.row.pattern), cell.pieces) if cell.pieces is not None else xs[0]

    return [Export(cell.name, cell.shape, np.dtype(flat[cell.parts[0][0]].dtype), functools.partial(make, cell)) for cell in choose(table, flat)]


def apart(leaf: Any) -> bool:
    """Whether an array, or one of an array leaf's, lies on several processes, none of which has all of it."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated for x in jax.tree.leaves(leaf))


def gather(x: jax.Array, layer: int | None = None) -> np.ndarray:
    """An array that lies on several processes, or x[layer], on every host. All processes must call it."""
    assert isinstance(x.sharding, jax.sharding.NamedSharding)
    whole = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(pick, out_shardings=whole)(x, None if layer is None else np.int32(layer)))


def pick(x: jax.Array, layer: jax.Array | None) -> jax.Array:
    """x, or x[layer] as a sum over one-hot layers: where the layers are divided among devices an index would first bring all of them to each."""
    if layer is None:
        return x
    here = (jnp.arange(x.shape[0]) == layer).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(here, x, 0).sum(0, dtype=x.dtype)
