"""What following a JSON schema costs: the host's walk through the grammar (forced tokens, mask) and the mask inside the draw, beside a decode step of the same model.

    python benchmarks/grammar.py --model=smollm2 --tokens=96

Prints one JSON line; times are milliseconds, medians. The walk runs while the device computes the step.
"""
import argparse
import json
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np

import llmjax
from llmjax import decode

TAGS = {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4}
PERSON = {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 130}, "tags": TAGS, "notes": {"type": "string"}}
SCHEMA = {"type": "object", "properties": PERSON, "required": list(PERSON), "additionalProperties": False}


def timed(run, rounds):
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    model, params, tokenizer = llmjax.load(args.model)
    model, params = decode.prepare(model, params)
    vocab = model.config.vocab_size
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Describe a person as JSON."}], add_generation_prompt=True)
    began = time.perf_counter()
    grammar = decode.Grammar(decode.JsonSchema(SCHEMA), tokenizer, vocab, model.config.end_tokens)
    compiled = time.perf_counter() - began
    began = time.perf_counter()
    decode.Grammar(decode.JsonSchema(SCHEMA), tokenizer, vocab, model.config.end_tokens)
    again = time.perf_counter() - began
    answer = decode.complete(model, params, tokenizer, [prompt], max_new_tokens=args.tokens, temperature=0.8, seed=1, grammar=decode.JsonSchema(SCHEMA))[0]
    walks, forced, matcher, at = [], 0, grammar.matcher(), 0
    bits = np.zeros(-(-vocab // 32), np.int32)
    while at < len(answer.ids) and not matcher.done:
        began = time.perf_counter()
        new = matcher.forced() or [answer.ids[at]]
        forced += len(new) - 1
        for token in new:
            matcher.advance(token)
        matcher.mask(bits)
        walks.append(1000 * (time.perf_counter() - began))
        at += len(new)
    cache = decode.init_cache(model, 1, 256)
    one = np.ones(1, np.int32)

    def step():
        nonlocal cache
        logits, cache = decode.decode_step(model, params, one, one * 100, one > 0, cache)
        return logits
    logits = step()
    sampling, keys = decode.make_sampling(1, temperature=0.8, top_p=0.95), decode.row_keys(0, 1)
    plain = jax.jit(lambda x: decode.sample(x, sampling, keys, jnp.arange(1))[0])
    masked = jax.jit(lambda x, m: decode.sample(x, sampling, keys, jnp.arange(1), None, m)[0])
    some = np.full((1, len(bits)), 0x0F0F0F0F, np.int32)
    plain(logits), masked(logits, some)
    found = {"step": timed(step, 30), "draw": timed(lambda: plain(logits), 30), "draw under a mask": timed(lambda: masked(logits, some), 30), "walk, median": statistics.median(walks),
             "walk, mean": statistics.mean(walks), "walk, most": max(walks)}
    print(json.dumps({"what": "grammar", "model": args.model, "vocab": vocab, "device": str(jax.devices()[0]), "ms": {k: round(v, 3) for k, v in found.items()},
                      "compile s": round(compiled, 3), "compile again s": round(again, 4),
                      "tokens": len(answer.ids), "draws saved": forced, "share of a step": round((statistics.mean(walks) + found["draw under a mask"] - found["draw"]) / found["step"], 4)}))


if __name__ == "__main__":
    main()
