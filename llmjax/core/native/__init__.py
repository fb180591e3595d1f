"""What decoding spends its time on, on a CPU, compiled for this machine's processor: a few rows of activations times a matrix (`rows.py`), a few queries over the keys and values of a cache
(`queries.py`).

XLA's CPU products take one row through float32 numbers alone: weights of fewer bits are widened into memory first, or multiplied as integers with rounded activations. Here a weight is
widened in a register on its way from memory, so that a token costs the reading of the bits that are kept and nothing else. Attention of one query is a dozen of XLA's small programs, half of
them for slots that nobody sees.

The functions are written with llvmlite, which compiles them for the processor at hand (AVX2, AVX-512, NEON) in a quarter of a second each, and are called by XLA through its foreign function
interface, on XLA's own threads. The forms in which a matrix's numbers may lie are those of `core/kept.py`, which holds the slow twin of the product; that of attention is
`kernels/attention/reference.py`.

A result is its own row's and column's alone, or its own query's, summed in the same order whatever stands beside it: a token's numbers do not depend on the batch it is in.
"""
import ctypes
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 32                 # D of a product is a multiple of this
WIDTH = 16                 # and a head's dim of this: numbers in a vector (LLVM splits it where a processor's are shorter)
KINDS = ("float32", "bfloat16", "int8", "int8_blocks", "uint8")              # of a matrix; keys and values are of the first two
LOCK = threading.Lock()
ENGINES: dict[str, Any] = {}                 # machine code stays for the life of the process
BOARD = (ctypes.c_int64 * 16)()              # where jobs are posted to idle helpers (team.py)


def few_rows(x: jax.Array, w: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x [T, D] float32 times a matrix w kept in any of the forms above, transposed -> [T, F] float32. Ask `available` first."""
    operands = (x, w) if scale is None else (x, w, scale)
    kind = "int8_blocks" if w.dtype == jnp.int8 and scale is not None and scale.ndim == 2 else w.dtype.name
    return called(f"rows_{kind}", (x.shape[0], w.shape[0]), *operands)


def few_queries(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, see: jax.Array, sinks: jax.Array, width: int) -> jax.Array:
    """Queries q [B, T, N, H] float32, scaled, over keys k [P, page, K, H] and values v [P, page, K, at least `width`], float32 or bfloat16: slot s of row b lies in page table[b, s // page],
    int32 [B, W], all of them pages that exist. see [B, T, S] bool, S a multiple of WIDTH: which slots each query sees; where it is false k and v may hold anything. sinks [N] float32: a
    score beside the others that has no value, -inf for none. -> [B, T, N, width] float32, zeros where a query sees nothing. Ask `available` first."""
    return called(f"queries_{k.dtype.name}", (*q.shape[:3], width), q, k, v, table, see, sinks)


def called(name: str, shape: tuple[int, ...], *operands: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call(target(name), jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")(*operands)


@functools.cache
def available() -> bool:
    """Whether such functions can be compiled and called here: tried once on a small product."""
    try:
        with jax.ensure_compile_time_eval():
            return bool(jnp.allclose(jax.jit(few_rows)(jnp.ones((1, BLOCK)), jnp.ones((3, BLOCK))), BLOCK))
    except Exception as error:      # whatever it is: XLA's own programs give the same numbers
        warnings.warn(f"decoding on this CPU goes without its own products ({type(error).__name__}: {str(error)[:200]}); it is two to four times slower", stacklevel=2)
        return False


def target(name: str) -> str:
    """The name under which XLA knows a function, compiled and registered."""
    whole = f"llmjax_{name}"
    with LOCK:
        if name not in ENGINES:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            ENGINES[name] = compiled(name, threads, ctypes.addressof(BOARD))
            capsule = ctypes.pythonapi.PyCapsule_New
            capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
            jax.ffi.register_ffi_target(whole, capsule(ENGINES[name].get_function_address(whole), None, None), platform="cpu")
    return whole


def compiled(name: str, threads: int, board: int, processor: str | None = None) -> Any:
    """The machine code of the function llmjax_{name}: an engine of LLVM's, which owns it. board: the address of a BOARD; processor: an LLVM name; None: this one."""
    if sys.platform == "win32":
        raise OSError("not written for Windows")
    import llvmlite.binding as llvm
    from llvmlite import ir

    from llmjax.core.native import queries, rows
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = {} if processor else dict(llvm.get_host_cpu_features())
    module = ir.Module(name)
    what, kind = name.split("_", 1)
    tiles = rows.TILES if features.get("avx512f") else rows.FEW_TILES
    writers: dict[str, Callable[[], None]] = dict(rows=lambda: rows.write(module, kind, threads, board, tiles), queries=lambda: queries.write(module, kind, threads, board))
    writers[what]()
    code = llvm.parse_assembly(str(module))
    code.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=processor or llvm.get_host_cpu_name(), opt=3,
                                                                           features=",".join(f"{'+' if has else '-'}{name}" for name, has in features.items()))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(code, passes)
    engine = llvm.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    return engine
