"""Train steps compiled for TPU pods that are not there, beside what MaxText 0.2.5 compiled to on the same topologies: HBM, traffic, cycles. No TPU is needed, libtpu is: pip install 'llmjax[tpu]'.

    python benchmarks/tpu_compile.py                       every case: minutes each, the largest half an hour on two cores
    python benchmarks/tpu_compile.py 8b-v5e-256 --save     one, kept in results/

Expected: one JSON line and a table; every case fits its chips, and at most MaxText's bytes. MaxText's figures: jax 0.11.1, libtpu 0.0.46, bfloat16 compute, float32 weights and Adam, full remat,
flash attention, segment ids, FSDP over all chips, as here. HBM is arguments + temporaries + outputs − aliases of a device; traffic is what one device sends per step, around rings; cycles are
the compiler's estimate for what is neither kernel nor collective. Gaps of cycles below 5 % are noise.
"""
import dataclasses as dc
import time

from common import compile_cases
from report import compiled

from llmjax import settings
from llmjax.plan import compile, topology
from llmjax.plan.chips import CHIPS


@dc.dataclass(frozen=True)
class Case:
    """rows: per chip. peer: MaxText's HBM and traffic in 1e9 bytes and its cycles in 1e6, where it was compiled. suffix: layers that stand behind the pipeline's stages."""
    model: str
    topology: str
    layout: dict[str, int | str]
    rows: int
    context: int
    peer: tuple[float, float, float] | None = None
    suffix: int = 0

    @property
    def what(self) -> str:
        where, layout = topology(self.topology), " × ".join(f"{axis} {size}" for axis, size in self.layout.items())
        behind = f", {self.suffix} layers behind the stages" if self.suffix else ""
        return f"{self.model}, {where.chips:,} chips of {where.chip}, {layout}{behind}, {self.rows} × {self.context} tokens a chip"


CASES = {
    "8b-v5e-256": Case("llama-3-8b", "v5e:16x16", dict(fsdp=256), 4, 2048, (9.06, 59.98, 4639)),
    "8b-v5e-256-long": Case("llama-3-8b", "v5e:16x16", dict(fsdp=256), 2, 8192, (16.05, 60.13, 10099)),
    "8b-v5p-128": Case("llama-3-8b", "v5p:4x4x4", dict(fsdp=64), 4, 8192, (37.47, 58.60, 9426)),
    "8b-v6e-256": Case("llama-3-8b", "v6e:16x16", dict(fsdp=256), 4, 8192),
    "70b-v5p-512": Case("llama-3-70b", "v5p:4x8x8", dict(fsdp=256), 4, 8192, (92.86, 552.86, 83963)),
    "mixtral-v5p-128": Case("mixtral-8x7b", "v5p:4x4x4", dict(fsdp=8, expert=8), 4, 4096),
    "405b-v5p-2048": Case("llama-3.1-405b", "v5p:8x16x16", dict(stage=8, fsdp=32, tensor=8, microbatches=64, interleave=2, ticks="flat"), 1, 8192, suffix=14),
}


def measure(name: str) -> dict:
    case = CASES[name]
    where = topology(case.topology)
    wanted = [f"layout.{axis}={size}" for axis, size in case.layout.items()] + ["layout.data=1", f"batch_size={case.rows * where.chips}", f"context={case.context}", "compute.remat=full"]
    begun = time.perf_counter()
    try:
        found = compile.run(settings.load(f"configs/pretrain.py:model={case.model},suffix={case.suffix}", wanted), where)
    except ValueError as error:
        return {"case": name, "error": str(error)}
    limit = CHIPS[where.chip].share("hbm")
    row = {"case": name, "what": case.what, "hbm_gb": found["hbm_bytes"] / 1e9, "peak_gb": found["peak_bytes"] / 1e9, "sent_gb": found["sent_bytes"] / 1e9, "mcycles": found["estimated_cycles"] / 1e6,
           "kernels": sum(found["kernels"].values()), "fits": min(found["hbm_bytes"], found["peak_bytes"]) <= limit, "seconds": time.perf_counter() - begun}
    if case.peer:
        row |= dict(zip(("maxtext_hbm_gb", "maxtext_sent_gb", "maxtext_mcycles"), case.peer))
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


if __name__ == "__main__":
    compile_cases("tpu_compile", __doc__ or "", CASES, measure, compiled)
