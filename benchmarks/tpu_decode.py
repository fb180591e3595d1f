"""One token of each row through an 8 B Llama, tensor parallel over eight TPU chips that are not there: what the compiler says of llmjax's own programs. No TPU is needed, libtpu is:
pip install 'llmjax[tpu]'.

    python benchmarks/tpu_decode.py                               every case: one to three minutes each on two cores
    python benchmarks/tpu_decode.py decode-v5e-int8-8 --save      one, kept in results/

Expected: one JSON line and a table; no weight is gathered (`gathered_bytes`, the largest array that is, in whatever branch, belongs to the draw), the whole cache is aliased, and the
temporaries are far smaller than a layer's cache and weights. `decode` is decode.decode_step over a contiguous cache, `serve` the server's step (serve.step.step: paged cache, draws, penalties),
whose cycles are those of the forward pass and greedy draws. The bound is what reading weights (of the embedding only rows) and the cache once takes at the chip's published bandwidth, in cycles
of its clock. Estimated cycles leave out what is fetched ahead while something else computes, and collectives: they may fall below the bound. Compilers differ from version to version.
"""
import dataclasses as dc
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from common import compile_cases
from report import decoding as table

from llmjax import decode
from llmjax.checkpoint import presets
from llmjax.core.tree import flatten
from llmjax.decode.history import History
from llmjax.plan import compile, decoding, hlo, topology
from llmjax.plan.chips import CHIPS
from llmjax.serve import step

MODEL, LENGTH, PAGE = "llama-3-8b", 2048, 16
CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9}             # peak FLOP/s over FLOPs a cycle of four matrix units: of 128 × 128 (v5e), 256 × 256 (v6e)


@dc.dataclass(frozen=True)
class Case:
    """what: "decode" or "serve"; chip: eight of them; weights: bf16 or int8; rows: texts of LENGTH tokens."""
    what: str
    chip: str
    weights: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.what}-{self.chip}-{self.weights}-{self.rows}"


SIZES = ("decode", 8), ("serve", 8), ("decode", 64)          # 8 full rows are one turn of the loop over pages, whose trips the program does not tell
CASES = {case.name: case for case in (Case(what, chip, weights, rows) for chip in CLOCKS for weights in ("bf16", "int8") for what, rows in SIZES)}


def memory(model: Any, rows: int) -> step.Memory:
    """What the server keeps on the device, with pages for `rows` full rows."""
    cache, size = decode.init_paged(model, rows, rows * LENGTH // PAGE, length=LENGTH, page=PAGE), (rows + 1, model.config.vocab_size)
    return step.Memory(dc.replace(cache, table=None), jnp.zeros(rows + 1, jnp.int32), History(seen=jnp.zeros(size, bool), counts=jnp.zeros(size, jnp.int32)))


def local(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(name: str) -> dict:
    case = CASES[name]
    config, where = presets.published(MODEL), topology(f"{case.chip}:2x4")
    made, begun = decoding.spread(config, where, quantize=None if case.weights == "bf16" else case.weights), time.perf_counter()
    if case.what == "decode":
        held = decoding.laid_cache(jax.eval_shape(lambda: decode.make_cache(made.model, case.rows, LENGTH)), made.mesh)
        program = decoding.lower(made, case.rows, LENGTH).compile()
    else:
        held = decoding.laid_cache(jax.eval_shape(lambda: memory(made.model, case.rows)), made.mesh)
        with jax.set_mesh(made.mesh):
            program = step.compiled(made.model, made.params, held, step.empty_rows(case.rows, 1, LENGTH // PAGE, case.rows, config.vocab_size))
    chip, sizes, text = CHIPS[case.chip], program.memory_analysis(), program.as_text()
    said = hlo.read(text)
    kept = local(held.cache.layers if case.what == "serve" else held.layers)
    weights = local(made.params) - sum(local(x) for name, x in flatten(made.params).items() if name.startswith("embed/"))
    gathered = max((hlo.nbytes(x.result) for part in hlo.computations(text)[0].values() for x in part.values() if x.op.startswith("all-gather")), default=0)       # in whatever branch
    found = {"case": case.name, **dc.asdict(case), "length": LENGTH, "hbm_gb": sizes.peak_memory_in_bytes / 1e9, "temp_mb": sizes.temp_size_in_bytes / 1e6, "gathered_bytes": int(gathered),
             "reduced_mb": said["collectives"].get("all-reduce", {"bytes": 0})["bytes"] / 1e6, "cache_mb": kept / 1e6, "aliased_mb": sizes.alias_size_in_bytes / 1e6,
             "donated": sizes.alias_size_in_bytes >= kept, "mcycles": said["estimated_cycles"] / 1e6, "bound_mcycles": (weights + kept) / chip.bandwidth * CLOCKS[case.chip] / 1e6,
             "turns_counted_once": len(said["loops_counted_once"]), "seconds": time.perf_counter() - begun}
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}


if __name__ == "__main__":
    os.environ |= compile.ENVIRONMENT                # read by libtpu when it is first asked, not by jax's import
    jax.config.update("jax_platforms", "cpu")
    compile_cases("tpu_decode", __doc__ or "", CASES, measure, table)
