"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Order without segments is cuDNN's own business: causal and a causal window cost no mask. Segments, positions and other windows become one mask [B, 1, T, S], which cuDNN reads
as a bias: exact, but its bytes grow with T S (2 each, for all heads together). That is why `choose` never picks it for those; asking for it by name does.

Legend: B batch, T query length, S key length, N query heads, K kv heads, H head dim.
"""
import jax
import jax.numpy as jnp

from llmjax.kernels.attention.mask import check, visible, whereabouts


def refusal(q, v, softcap, sinks, slopes=None) -> str | None:
    """Why cuDNN cannot do this call, or None where it can."""
    H = q.shape[-1]
    if softcap is not None:
        return f"cuDNN attention has no soft-cap (softcap={softcap}); use blockwise"
    if sinks is not None:
        return "cuDNN attention has no sinks; use blockwise"
    if slopes is not None:
        return "cuDNN attention has no slopes (ALiBi); use blockwise"
    if v.shape[-1] != H:
        return f"cuDNN attention wants equal head sizes; keys have {H}, values {v.shape[-1]}; use blockwise"
    if H % 8 or H > 256:
        return f"cuDNN attention wants a head size that is a multiple of 8 and at most 256 (128 before Hopper), not {H}; use blockwise"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention computes in bfloat16 or float16, not {q.dtype}; use blockwise, or compute.dtype='bfloat16'"
    return None


def native(pattern, segments: bool) -> bool:
    """Whether the mask is one of cuDNN's own: no bytes for it."""
    return pattern.in_order and not segments and (pattern.causal or pattern.window is None)


def arguments(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None, pattern) -> dict:
    """-> the mask part of the call: keyword arguments of `jax.nn.dot_product_attention`, whatever the implementation behind it (so that it can be tried without a GPU)."""
    if native(pattern, query_segments is not None or key_segments is not None):
        return dict(is_causal=pattern.causal, local_window_size=None if pattern.window is None else (pattern.window - 1, 0))
    see = visible(*whereabouts(q, k, query_positions, key_positions, query_segments, key_segments), causal=pattern.causal, window=pattern.window)
    return dict(mask=jnp.broadcast_to(see, (q.shape[0], *see.shape[1:]))[:, None])


def cudnn(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None,
          causal: bool, in_order: bool, window: int | None, softcap: float | None, scale: float, sinks=None, slopes=None, implementation: str = "cudnn") -> jax.Array:
    """The sum of `reference`: q [B, T, N, H], k [B, S, K, H], v [B, S, K, H] -> [B, T, N, H] in `q.dtype`; a query that sees nothing gives zeros.

    Raises ValueError for what cuDNN cannot do (`refusal`: soft-cap, sinks, unequal or odd head sizes, float32) and for wrong arguments (mask.check). `implementation` is
    jax.nn's; "xla" stands in for tests on a machine without a GPU.
    """
    pattern = check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, sinks, slopes)
    reason = refusal(q, v, softcap, sinks, slopes) if implementation == "cudnn" else None
    if reason:
        raise ValueError(reason)
    how = arguments(q, k, v, query_positions=query_positions, key_positions=key_positions, query_segments=query_segments, key_segments=key_segments, pattern=pattern)
    out = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), scale=scale, implementation=implementation, **how)  # type: ignore[call-overload]
    if "mask" in how:  # a row without any key is an average over all of them there
        out = jnp.where(how["mask"].any(-1)[:, 0, :, None, None], out, 0)
    return out
