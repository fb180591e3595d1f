"""What a compiled TPU program says about itself, read from its text: collectives with their bytes, and the compiler's estimate of cycles, each as often as its loop runs.

The text is HLO after scheduling, for one device. A loop's trips are the constant its condition compares with (`lax.scan` counts from 0); loops without one are counted once and named. Of a
conditional the first branch counts (`lax.switch`'s 0, the false one of `lax.cond`). The
pieces of one asynchronous collective stand in several fusions with the same channel: they count once in the computation around them. Estimated cycles stand on fusions, convolutions and
copies alone: collectives and Pallas kernels carry none.
"""
from __future__ import annotations

import dataclasses as dc
import math
import re
from collections import Counter
from typing import Any

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


def group(text: str) -> int:
    """How many devices take part in one group of a collective; 1 where the line does not say."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[[\d,]*?(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", found[1]))
        return math.prod(int(part or sizes.get(axis, 1)) for axis, part in re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", found[2]))
    return 1


def sent(kind: str, size: float, devices: int) -> float:
    """Bytes one device sends for a collective over `size` bytes, around a ring."""
    if kind == "collective-permute":
        return size
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def read(text: str) -> dict[str, Any]:
    """-> {"collectives": {kind: {"count", "bytes", "sent_bytes"}}, "sent_bytes", "estimated_cycles", "kernels": {name: count}, "loops_counted_once": [names]}."""
    known, entry = computations(text)
    collectives: dict[str, dict[str, float]] = {}
    total, kernels, unknown = Counter[str](), Counter[str](), []

    def trips(loop: Instruction) -> int:
        if found := re.search(r'known_trip_count\D+(\d+)', loop.text):
            return int(found[1])
        condition = known[loop.named("condition") or ""]
        test = next((i for i in condition.values() if i.root), None)
        bounds = [re.search(r"constant\((\d+)\)", condition[name].text) for name in test.operands if name in condition and condition[name].op == "constant"] if test and test.op == "compare" else []
        if not bounds or not bounds[0]:
            unknown.append(loop.name)
            return 1
        return int(bounds[0][1])

    def note(table: dict[str, Instruction], x: Instruction, times: int, around: str) -> None:
        kind = x.op.removesuffix("-start")
        given = sum(nbytes(table[name].result) for name in x.operands if name in table)
        made = given if x.op.endswith("-start") and kind in ("collective-permute", "all-reduce") else nbytes(x.result) - (given if x.op.endswith("-start") else 0)
        if kind == "all-reduce" and (around.startswith("all-reduce-scatter") or (around and any(i.op == "dynamic-slice" for i in table.values()))):
            kind = "reduce-scatter"
        size = max(given, made)
        row = collectives.setdefault(kind, {"count": 0, "bytes": 0, "sent_bytes": 0})
        for key, value in (("count", 1), ("bytes", size), ("sent_bytes", sent(kind, size, group(x.text)))):
            row[key] += value * times

    def walk(name: str, times: int, seen: set[str], around: str = "") -> None:
        table = known[name]
        for x in table.values():
            if not around and (found := re.search(r'"estimated_cycles":"(\d+)"', x.text)):
                total["cycles"] += int(found[1]) * times
            if x.op.removesuffix("-start") in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", x.text)
                key = f"{x.op} {channel[1]}" if channel else f"{name}/{x.name}"
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
            "estimated_cycles": total["cycles"], "kernels": dict(kernels), "loops_counted_once": unknown}
