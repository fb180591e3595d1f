"""Splash attention on TPUs: the Pallas kernel that jax ships, with segments, windows, soft-cap and sinks; off the TPU in interpret mode (slow, for tests).

Its mask is fixed when the program is traced, so it serves tokens in order (training, prefill from nothing), not a cache at arbitrary positions.
A Pallas kernel cannot be partitioned by the compiler: on a mesh of several devices wrap it (`sharded` in choice.py), so that each device calls it on its own rows and heads.

Legend: B batch, T length, N query heads, K kv heads, H head dim.
"""
import jax
import jax.numpy as jnp

from llmjax.core.platform import partitioned, platform
from llmjax.kernels.attention.mask import check

LANES = 128


def refusal(q, in_order, slopes=None) -> str | None:
    """Why splash cannot do this call, or None where it can."""
    if not in_order:
        return "splash attention fixes its mask at trace time: in_order=True (the same tokens as queries and keys) is needed; use blockwise with a cache"
    if slopes is not None:
        return "splash attention has no slopes (ALiBi); use blockwise"
    if q.shape[1] % LANES:
        return f"splash attention wants a length that is a multiple of {LANES}, not {q.shape[1]}; pad the context or use blockwise"
    return None


def splash(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None,
           causal: bool, in_order: bool, window: int | None, softcap: float | None, scale: float, sinks=None, slopes=None) -> jax.Array:
    """The sum of `reference` over tokens in order: q [B, T, N, H], k [B, T, K, H], v [B, T, K, Hv] -> [B, T, N, Hv] in `q.dtype`; padding (segment 0) gives zeros.

    Positions are not read: order says the same. Raises ValueError where `refusal` says so (a cache, a length that is no multiple of 128), inside a program that the compiler
    partitions, and for wrong arguments (mask.check).
    """
    pattern = check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, sinks, slopes)
    reason = refusal(q, in_order, slopes)
    if reason:
        raise ValueError(reason)
    if partitioned():
        raise ValueError("splash attention inside a program over several devices: a Pallas kernel is not partitioned by the compiler; wrap it with kernels.attention.sharded(...)")
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # here: Pallas takes half a second to import
    N, T = q.shape[2], q.shape[1]
    kernel = kernels.make_splash_mha(mask=kernels.MultiHeadMask([_mask(kernels, pattern, T)] * N), block_sizes=_blocks(kernels, T), head_shards=1, q_seq_shards=1,
    attn_logits_soft_cap=softcap,
                                     interpret=platform() != "tpu")
    heads_first = lambda x: x.astype(q.dtype).swapaxes(1, 2)  # [B, N, T, H]
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale of its own
    segments, axes = None, None
    if query_segments is not None or key_segments is not None:
        given = query_segments if query_segments is not None else key_segments
        given = jnp.broadcast_to(given, q.shape[:2])
        segments, axes = kernels.SegmentIds(given, given if key_segments is None else jnp.broadcast_to(key_segments, q.shape[:2])), kernels.SegmentIds(0, 0)  # type: ignore[arg-type]
    out = jax.vmap(kernel, in_axes=(0, 0, 0, axes, None))(heads_first(scaled), heads_first(k), heads_first(v), segments, sinks).swapaxes(1, 2)
    if segments is not None:  # padding sees padding in the kernel
        out = jnp.where((segments.q > 0)[:, :, None, None], out, 0)
    return out.astype(q.dtype)


def _mask(kernels, pattern, length):
    if pattern.window is not None:
        return kernels.LocalMask((length, length), (pattern.window - 1, 0 if pattern.causal else pattern.window - 1), 0)
    return kernels.CausalMask((length, length)) if pattern.causal else kernels.FullMask((length, length))


def _blocks(kernels, length):
    side = next(side for side in (512, 384, 256, LANES) if length % side == 0)  # large blocks keep the matrix unit busy; MaxText uses 512 too
    return kernels.BlockSizes(block_q=side, block_kv=side, block_kv_compute=side, block_q_dkv=side, block_kv_dkv=side, block_kv_dkv_compute=side, block_q_dq=side, block_kv_dq=side)
