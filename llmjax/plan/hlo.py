"""What a compiled TPU program says about itself, read from its text: collectives with their bytes, and the compiler's estimate of cycles, each as often as its loop runs.

The text is HLO after scheduling, for one device. A loop's trips are the constant its condition compares with (`lax.scan` counts from 0) over what its body adds to the counter, 1 where
that cannot be seen (the loops that XLA makes of a product and its collective go two by two); loops without a constant are counted once and named. Of a
conditional the first branch counts (`lax.switch`'s 0, the false one of `lax.cond`). The
pieces of one asynchronous collective stand in several fusions with the same channel: they count once in the computation around them. Collectives that a program asks for by itself share a
channel, and count each. Estimated cycles stand on fusions, convolutions and copies alone: collectives and Pallas kernels carry none.
"""
from __future__ import annotations

import dataclasses as dc
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\(")
CALLED = re.compile(r"\b(?:calls|to_apply|body)=%([\w.\-]+)")


@dc.dataclass(frozen=True)
class Instruction:
    name: str
    result: str            # its type
    op: str
    text: str              # the whole line
    root: bool

    @property
    def operands(self) -> list[str]:
        inside = self.text[self.text.index(f" {self.op}(") + len(self.op) + 2:]
        return re.findall(r"%([\w.\-]+)", inside[:inside.index(")")])

    def named(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.text)
        return found[1] if found else None


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """-> ({computation: {instruction: …}}, the entry's name)."""
    found: dict[str, dict[str, Instruction]] = {}
    here, entry, last = None, "", Instruction("", "", "", "", False)
    for line in text.splitlines():
        if here is None:
            head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line)
            if head:
                here = found.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):        # a kernel's metadata has lines that begin so too
            here = None
        else:
            at = LINE.match(line)
            if at:
                last = here[at[2]] = Instruction(at[2], at[3], at[4], line, bool(at[1]))
            elif here:
                last = here[last.name] = dc.replace(last, text=last.text + line)
    return found, entry


def nbytes(kind: str) -> float:
    """Bytes of an array type, or of all arrays of a tuple type."""
    return sum(BYTES.get(name, 1) * math.prod(int(n) for n in dims.split(",") if n) for name, dims in ARRAY.findall(kind) if name in BYTES or name.startswith("f8"))


def members(text: str) -> list[int]:
    """The devices of one group of a collective, by their places in the mesh; of a permutation those of its first pair that moves. Empty where the line does not say."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return _numbers(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))[0].tolist()
    if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?[^{]*\{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([\w.]+)'=(\d+)", found[1])}
        taken = {axis: (int(before or 1), int(part or sizes[axis])) for axis, before, part in re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", found[4])}      # "'a':(2)4": 4 of what is in 2
        split = [(before, part, size // before // part) for axis, size in sizes.items() for before, part in [taken.get(axis, (size, 1))]]
        grid = (_iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes.values()))).reshape([n for three in split for n in three])
        return grid[tuple(slice(None) if i % 3 == 1 else 0 for i in range(grid.ndim))].reshape(-1).tolist()
    return next(([a, b] for a, b in pairs(text) if a != b), [])


def pairs(text: str) -> list[tuple[int, int]]:
    """Who sends to whom in a permutation."""
    found = re.search(r"source_target_pairs=(\{[\d,{}]*\})", text)
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])] if found else []


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    found = np.arange(math.prod(shape)).reshape(shape)
    return (found.transpose(_numbers(order)) if order else found).reshape(-1)


def crossed(text: str, mesh: Mapping[str, int]) -> str:
    """The axes of a mesh that a collective goes over, "data+fsdp"; "" where its line does not say."""
    places = np.stack(np.unravel_index(np.array(members(text), int), tuple(mesh.values())), -1)
    return "+".join(axis for axis, column in zip(mesh, places.T) if len(set(column.tolist())) > 1)


def group(text: str) -> int:
    """How many devices take part in one group of a collective; 1 where the line does not say."""
    return max(1, len(members(text)))


def sent(kind: str, size: float, text: str) -> float:
    """Bytes one device sends for a collective over `size` bytes, around a ring; in a permutation on the average, for some may keep what they have."""
    if kind == "collective-permute":
        moves = [a != b for a, b in pairs(text)]
        return size * sum(moves) / len(moves) if moves else size
    devices = group(text)
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def stride(body: Mapping[str, Instruction], condition: Mapping[str, Instruction], compared: list[str]) -> int:
    """What one trip adds to the counter that the condition compares; 1 where the text does not show it."""
    places = [found[1] for name in compared if name in condition and (found := re.search(r"\bindex=(\d+)", condition[name].text)) and condition[name].op == "get-tuple-element"]
    made = next((x.operands for x in body.values() if x.root and x.op == "tuple"), [])
    if len(places) != 1 or int(places[0]) >= len(made):
        return 1
    counted = body.get(made[int(places[0])])
    while counted and counted.op in ("copy", "bitcast") and counted.operands:
        counted = body.get(counted.operands[0])
    added = [re.search(r"constant\((\d+)\)", body[name].text) for name in counted.operands if name in body and body[name].op == "constant"] if counted and counted.op == "add" else []
    return max(1, int(added[0][1])) if len(added) == 1 and added[0] else 1


def read(text: str, mesh: Mapping[str, int] | None = None) -> dict[str, Any]:
    """-> {"collectives": {kind: {"count", "bytes", "sent_bytes"}}, "sent_bytes", "estimated_cycles", "kernels": {name: count}, "loops_counted_once": [names]}; with the mesh's axes, outermost
    first, "sent_over" as well: {"fsdp": bytes, "data+fsdp": …}."""
    known, entry = computations(text)
    collectives: dict[str, dict[str, float]] = {}
    total, kernels, over, unknown = Counter[str](), Counter[str](), Counter[str](), []
    kinds: dict[str, set[tuple[str, str]]] = {}                                # a channel that differing collectives name is that of all of a program's shard_maps, and no one's own
    for x in (x for table in known.values() for x in table.values() if x.op.removesuffix("-start") in COLLECTIVES):
        for channel in re.findall(r"channel_id=(\d+)", x.text):
            kinds.setdefault(channel, set()).add((x.op, x.result))

    def trips(loop: Instruction) -> int:
        if found := re.search(r'known_trip_count\D+(\d+)', loop.text):
            return int(found[1])
        condition = known[loop.named("condition") or ""]
        test = next((i for i in condition.values() if i.root), None)
        bounds = [re.search(r"constant\((\d+)\)", condition[name].text) for name in test.operands if name in condition and condition[name].op == "constant"] if test and test.op == "compare" else []
        if not bounds or not bounds[0]:
            unknown.append(loop.name)
            return 1
        return -(-int(bounds[0][1]) // stride(known[loop.named("body") or ""], condition, test.operands))         # type: ignore[union-attr]

    def note(table: dict[str, Instruction], x: Instruction, times: int, around: str) -> None:
        kind = x.op.removesuffix("-start")
        given = sum(nbytes(table[name].result) for name in x.operands if name in table)
        made = given if x.op.endswith("-start") and kind in ("collective-permute", "all-reduce") else nbytes(x.result) - (given if x.op.endswith("-start") else 0)
        if kind == "all-reduce" and (around.startswith("all-reduce-scatter") or (around and any(i.op == "dynamic-slice" for i in table.values()))):
            kind = "reduce-scatter"
        size = max(given, made)
        if kind == "ragged-all-to-all":                                        # one of its two buffers has room for the worst case; what is sent fits the other
            size = min(made, nbytes(table[x.operands[0]].result))
        row = collectives.setdefault(kind, {"count": 0, "bytes": 0, "sent_bytes": 0})
        for key, value in (("count", 1), ("bytes", size), ("sent_bytes", sent(kind, size, x.text))):
            row[key] += value * times
        if mesh:
            over[crossed(x.text, mesh)] += sent(kind, size, x.text) * times          # type: ignore[assignment]

    def walk(name: str, times: int, seen: set[str], around: str = "") -> None:
        table = known[name]
        for x in table.values():
            if not around and (found := re.search(r'"estimated_cycles":"(\d+)"', x.text)):
                total["cycles"] += int(found[1]) * times
            if x.op.removesuffix("-start") in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", x.text)
                key = f"{x.op} {channel[1]}" if around and channel and len(kinds[channel[1]]) == 1 else f"{name}/{x.name}"
                if key not in seen:
                    seen.add(key)
                    note(table, x, times, around)
            elif x.op == "while":
                walk(x.named("body") or "", times * trips(x), set())
            elif x.op == "fusion":
                walk(x.named("calls") or "", times, seen, x.named("calls") or "")
            elif x.op in ("call", "async-start"):
                callee = x.named("calls") or x.named("to_apply")
                if callee in known:
                    walk(callee, times, seen, around)
            elif x.op == "conditional":
                branch = re.search(r"(?:branch_computations=\{|false_computation=)%([\w.\-]+)", x.text)
                if branch and branch[1] in known:
                    walk(branch[1], times, seen, around)
            elif x.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in x.text:
                kernels[re.sub(r"[.\d]+$", "", x.name)] += times
    walk(entry, 1, set())
    return {"collectives": dict(sorted(collectives.items())), "sent_bytes": sum(c["sent_bytes"] for c in collectives.values()),
            "estimated_cycles": total["cycles"], "kernels": dict(kernels), "loops_counted_once": unknown, **({"sent_over": dict(over)} if mesh else {})}
