"""What drawing a token costs over a large vocabulary, filter by filter, and beside a full sort: milliseconds per call, best of several rounds in turns.

    python benchmarks/sampling.py --vocab=262144 --rows=1

Prints one JSON line.
"""
import argparse
import json
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp

from llmjax import decode


def programs(rows: int, vocab: int):
    def program(**knobs):
        sampling = decode.make_sampling(rows, vocab, **knobs)
        history = decode.start_history(sampling, vocab, [list(range(500))] * rows, length=1024)
        keys, positions = decode.row_keys(0, rows), jnp.arange(rows)
        return jax.jit(lambda x: decode.sample(x, sampling, keys, positions, history)[0])
    yield "greedy", program()
    yield "temperature", program(temperature=0.8)
    yield "top_k 50", program(temperature=0.8, top_k=50)
    yield "top_p 0.9", program(temperature=0.8, top_p=0.9)
    yield "min_p 0.05", program(temperature=0.8, min_p=0.05)
    yield "top_k 50, top_p 0.9", program(temperature=0.8, top_k=50, top_p=0.9)
    yield "typical 0.9", program(temperature=0.8, typical_p=0.9)
    yield "top_p 0.9, repetition, frequency", program(temperature=0.8, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1)
    yield "dry", program(temperature=0.8, dry_multiplier=0.8)
    yield "mirostat 2", program(temperature=0.8, mirostat_tau=5.0)
    yield "10 alternatives", jax.jit(lambda x: decode.best_logprobs(x, 10)[1])
    yield "a full sort", jax.jit(lambda x: jnp.sort(x, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    noise = jax.random.normal(jax.random.key(0), (args.rows, args.vocab))
    inputs = {"peaked": 2 * noise.at[:, 1000:1100].add(6.0), "flat": 0.1 * noise}
    found = {}
    for shape, logits in inputs.items():
        all_programs = dict(programs(args.rows, args.vocab))
        times = {name: [] for name in all_programs}
        for _ in range(args.rounds + 1):
            for name, run in all_programs.items():
                began = time.perf_counter()
                run(logits).block_until_ready()
                times[name].append(1000 * (time.perf_counter() - began))
        found[shape] = {name: round(min(t[1:]), 3) for name, t in times.items()}
    print(json.dumps({"what": "sampling", "vocab": args.vocab, "rows": args.rows, "device": str(jax.devices()[0]), "ms": found}))


if __name__ == "__main__":
    main()
