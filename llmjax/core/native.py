"""A few rows of activations times a matrix, compiled for this machine's processor: what decoding spends its time on, on a CPU.

XLA's CPU products take one row through float32 numbers alone: weights of fewer bits are widened into memory first, or multiplied as integers with rounded activations. Here a weight is
widened in a register on its way from memory, so that a token costs the reading of the bits that are kept and nothing else. The function is written with llvmlite, which compiles it for
the processor at hand (AVX2, AVX-512, NEON) in a quarter of a second for each form, and is called by XLA through its foreign function interface, on XLA's own threads.

The forms in which a matrix's numbers may lie are those of `core/kept.py`, which holds the slow twin; D is a multiple of 32 here.

A result is a row's and a column's alone, summed in the same order however many rows there are: a token's numbers do not depend on the batch it is in.
"""
import ctypes
import functools
import os
import sys
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 32                 # weights in a block of few bits, and the step of the inner loop
KINDS = ("float32", "bfloat16", "int8", "int8_blocks", "uint8")
LOCK = threading.Lock()
ENGINES: dict[str, Any] = {}                 # machine code stays for the life of the process


def few_rows(x: jax.Array, w: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x [T, D] float32 times a matrix w kept in any of the forms above, transposed -> [T, F] float32. Ask `available` first."""
    operands = (x, w) if scale is None else (x, w, scale)
    kind = "int8_blocks" if w.dtype == jnp.int8 and scale is not None and scale.ndim == 2 else w.dtype.name
    call = jax.ffi.ffi_call(target(kind), jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32), vmap_method="sequential")
    return call(*operands)


@functools.cache
def available() -> bool:
    """Whether such functions can be compiled and called here: tried once on a small product."""
    try:
        with jax.ensure_compile_time_eval():
            return bool(jnp.allclose(jax.jit(few_rows)(jnp.ones((1, BLOCK)), jnp.ones((3, BLOCK))), BLOCK))
    except Exception as error:      # whatever it is: the products of XLA give the same numbers
        warnings.warn(f"decoding on this CPU goes without its own products ({type(error).__name__}: {str(error)[:200]}); it is two to four times slower", stacklevel=2)
        return False


def target(kind: str) -> str:
    """The name under which XLA knows the product with numbers of this kind, compiled and registered."""
    name = f"llmjax_rows_{kind}"
    with LOCK:
        if name not in ENGINES:
            ENGINES[name] = compiled(kind, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
            capsule = ctypes.pythonapi.PyCapsule_New
            capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
            jax.ffi.register_ffi_target(name, capsule(ENGINES[name].get_function_address(name), None, None), platform="cpu")
    return name


def compiled(kind: str, threads: int, processor: str | None = None) -> Any:
    """The machine code of the function llmjax_rows_{kind}: an engine of LLVM's, which owns it. processor: an LLVM name; None: this one."""
    if sys.platform == "win32":
        raise OSError("not written for Windows")
    import llvmlite.binding as llvm

    from llmjax.core.native_code import FEW_TILES, TILES, module
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = {} if processor else dict(llvm.get_host_cpu_features())
    code = llvm.parse_assembly(str(module(kind, BLOCK, threads, TILES if features.get("avx512f") else FEW_TILES)))
    code.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=processor or llvm.get_host_cpu_name(), opt=3,
                                                                           features=",".join(f"{'+' if has else '-'}{name}" for name, has in features.items()))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(code, passes)
    engine = llvm.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    return engine
