"""What a quantised cache costs: perplexity of SmolLM2-135M-Instruct on a text, every key and value read through the cache.

    python benchmarks/cache_quality.py --text=FILE [--rows=16] [--length=512] [--save]

Rows of `length` tokens, each into a fresh cache in one call that sees nothing but what the cache keeps. Beside the cache's own kinds stand keys alone and values alone in 4 bits, keys in three
forms: a scale per token, the same turned by a Hadamard matrix, and a scale per channel of 32 tokens (KIVI, arXiv:2402.02750). Prints one JSON line. A token's perplexity is paired
with the float cache's: `change` is exp(mean difference) - 1, `error` its standard error.
"""
import dataclasses as dc
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np

import llmjax
from llmjax.core.tree import nbytes
from llmjax.kernels.attention import stored
from llmjax.models import attention

TOKENS = 32            # KIVI's group of keys


def by_token(x: jax.Array) -> jax.Array:
    """x […, H] as 4 bits with a scale and a smallest value for each 32 numbers bring it back."""
    return stored.decode(stored.encode(stored.empty(x.shape, "int4"), x), x.dtype)


def by_channel(k: jax.Array) -> jax.Array:
    """k [B, T, K, H] the same, with a scale and a smallest value per channel of `TOKENS` tokens."""
    return jnp.swapaxes(by_token(jnp.swapaxes(k.reshape(k.shape[0], -1, TOKENS, *k.shape[2:]), 2, -1)), 2, -1).reshape(k.shape)


def losses(model: llmjax.models.Decoder, params: dict, rows: np.ndarray, kind: str) -> np.ndarray:
    """-> [rows, length - 1] nats of each token but the first."""
    def one(params, tokens):
        cache = dc.replace(llmjax.decode.init_cache(model, 1, tokens.shape[1], kind), empty=False)
        logits, _ = model.apply({"params": params}, tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], jnp.ones_like(tokens), cache)
        logits = logits[:, :-1]
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    run = jax.jit(one)
    return np.concatenate([np.asarray(run(params, row[None])) for row in rows])


def replaced(**names: Callable):
    """attention's own functions with others in their place, for the ways that it does not have."""
    class Replacement:
        def __enter__(self):
            self.before = {name: getattr(attention, name) for name in names}
            for name, function in names.items():
                setattr(attention, name, function)

        def __exit__(self, *_):
            for name, function in self.before.items():
                setattr(attention, name, function)
    return Replacement()


def main() -> int:
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("--text", type=pathlib.Path, required=True, help="a text file")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens a row, a multiple of 32")
    args = parser.parse_args()
    model, params, tokenizer = llmjax.load("smollm2", dtype="float32")
    text = args.text.read_text()
    ids = np.asarray(tokenizer.encode(text[:8 * args.rows * args.length]), np.int32)
    count = 1 if args.smoke else args.rows
    length = 64 if args.smoke else args.length
    rows = ids[:count * length].reshape(count, length)
    look = attention.look
    alone = {"keys alone, per token": lambda k, v, *rest: look(by_token(k), v, *rest), "keys alone, per token, turned": lambda k, v, *rest: look(stored.turn(by_token(stored.turn(k))), v, *rest),
             "keys alone, per channel": lambda k, v, *rest: look(by_channel(k), v, *rest), "values alone, per token": lambda k, v, *rest: look(k, by_token(v), *rest)}
    ways = {kind: (kind, {}) for kind in ("float32", "bfloat16", "int8", "int8/int4", "int4")} | {f"4 bits, {name}": ("float32", dict(look=function)) for name, function in alone.items()}
    found: dict[str, dict] = {}
    exact = None
    for name, (kind, names) in ways.items():
        with replaced(**names):
            nats = losses(model, params, rows, kind)
        exact = nats if exact is None else exact
        apart = (nats - exact).ravel()
        layers = jax.eval_shape(lambda kind=kind: llmjax.decode.init_cache(model, 1, length, kind).layers)
        found[name] = {"perplexity": round(float(np.exp(nats.mean())), 3), "change": float(f"{np.expm1(apart.mean()):.3g}"), "error": float(f"{apart.std() / len(apart) ** 0.5:.2g}"),
                       **({} if names else {"bytes_per_token": nbytes(layers) // length})}
        print(name, found[name], file=sys.stderr, flush=True)
    told = {"benchmark": "cache_quality", "model": "SmolLM2-135M-Instruct", "text": args.text.name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16], "tokens": int(rows.size),
            "length": length, "kinds": found, "hardware": common.hardware(), "versions": {"llmjax": common.version("llmjax"), "jax": jax.__version__}}
    print(json.dumps(told))
    if args.save and not args.smoke:
        (common.RESULTS / "cache_quality.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
