"""Where the milliseconds of a token go: SmolLM2-135M on this machine, one row, greedy, the calls of `decode.decode_step` under jax's profiler, what ran summed by the part of the model it is of.

    python benchmarks/decode_profile.py [--save]        nothing else should run on the machine

float32 (the file's own 4 bits) and int8. Parts are read from the compiled program: an instruction belongs to the scope the model gave it. "between" is what the wall clock says beyond all
of them: the runtime between instructions, Python between calls, and the profiler's own share. Prints one JSON line.
"""
import collections
import gzip
import json
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

import llmjax
from llmjax import decode

PARTS = (("head", r"unembed"), ("attention", r"attend"), ("mixer's products", r"mixer.*ffi_call|mixer.*dot_general"), ("feed-forward's products", r"ffn.*ffi_call|ffn.*dot_general"),
         ("norms, rotations, cache, the rest", r""))


def scopes(text: str) -> dict[str, str]:
    """Instruction -> the scope it was traced in, of those that do something themselves."""
    made = re.findall(r"^\s+(?:ROOT )?%([\w.-]+) = .*? ([a-z][\w-]*)\(.*op_name=\"([^\"]*)\"", text, re.MULTILINE)
    return {name: scope for name, kind, scope in made if kind not in ("while", "conditional", "parameter", "tuple", "get-tuple-element")}


def traced(folder: str) -> list[tuple[str, float]]:
    """(instruction, microseconds) of every one that ran."""
    file = max(pathlib.Path(folder).rglob("*.trace.json.gz"), key=lambda f: f.stat().st_mtime)
    return [(e["name"], e["dur"]) for e in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if e.get("ph") == "X"]


def measured(name: str, prompt: list[int], new: int, **how: Any) -> dict[str, Any]:
    model, params, _ = llmjax.load("smollm2", dtype="float32", **how)
    model, params = decode.prepare(model, params)

    def one(params, token, position, cache):
        logits, cache = decode.decode_step(model, params, token, position, jnp.ones((1,), bool), cache)
        return jnp.argmax(logits, -1).astype(jnp.int32), position + 1, cache
    start = np.arange(len(prompt), dtype=np.int32)[None]
    logits, cache = decode.prefill(model, params, np.asarray([prompt], np.int32), start, np.ones_like(start), decode.init_cache(model, 1, len(prompt) + 4 * new))
    state = jnp.argmax(logits, -1).astype(jnp.int32), jnp.full((1,), len(prompt), jnp.int32), cache
    step = jax.jit(one, donate_argnums=(3,)).lower(params, *state).compile()
    known = scopes(step.as_text())

    def run():
        nonlocal state
        for _ in range(new):
            state = step(params, *state)
        jax.block_until_ready(state)
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            began = time.perf_counter()
            run()
            wall = 1000 * (time.perf_counter() - began) / new
        events = traced(folder)
    parts: dict[str, float] = collections.defaultdict(float)
    for instruction, took in events:
        if instruction in known:
            parts[next(part for part, pattern in PARTS if re.search(pattern, known[instruction]))] += took / 1000 / new
    if sum(parts.values()) > wall or not all(parts[part] for part, _ in PARTS):
        raise RuntimeError(f"the trace does not fit the program: {dict(parts)} of {wall:.2f} ms")
    parts["between"] = wall - sum(parts.values())
    return {"weights": name, "milliseconds": round(wall, 2), "parts": {part: round(parts[part], 2) for part, _ in (*PARTS, ("between", ""))},
            "read_MB": round(sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6)}


def main() -> int:
    args = common.parser(__doc__, rounds=1).parse_args()
    prompt = np.random.default_rng(1).integers(100, 40_000, 128).tolist()
    tokens = [measured("4 bits of the file", prompt, 64), measured("int8", prompt, 64, quantize="int8")]
    common.emit("decode_profile", args, [], ("jax",), tokens=tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
