"""Small tools on parameter trees (nested dicts whose leaves are arrays or array leaves, see `leaves.py`)."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llmjax.core.leaves import is_leaf

Tree = Any


def path_name(path: tuple) -> str:
    """A key path of jax.tree_util as "cycle/0/mixer/q"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """A tree as {"cycle/0/mixer/q": leaf}; array leaves (LoRA, int8 …) stay whole, None is left out."""
    return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]}


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten` for nested dicts."""
    tree: dict = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def map_named(f: Callable, tree: Tree, *rest: Tree) -> Tree:
    """f(name, leaf, …) over a tree; array leaves stay whole."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: f(path_name(p), *xs), tree, *rest, is_leaf=is_leaf)


def split(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(what learns, what does not): two trees of the same shape with None where the other one has the array. `keep` is asked with the full path of every
    array, inside array leaves too ("cycle/0/mixer/q/a" is LoRA's down matrix)."""
    on = jax.tree_util.tree_map_with_path(lambda p, x: x if keep(path_name(p)) else None, tree)
    off = jax.tree_util.tree_map_with_path(lambda p, x: None if keep(path_name(p)) else x, tree)
    return on, off


def merge(on: Tree, off: Tree) -> Tree:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, on, off, is_leaf=lambda x: x is None)


def size(tree: Tree) -> int:
    """How many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """How many bytes a tree holds."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
