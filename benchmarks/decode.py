"""SmolLM2-135M from one GGUF file in llmjax beside transformers: reading a prompt of 128 tokens, and 64 greedy tokens after it.

    python benchmarks/decode.py [--rounds=5] [--save]        needs llmjax[test]; nothing else should run on the machine

llmjax in float32 (on a GPU in bfloat16), `generate` of transformers in float32 and bfloat16, one row, the same prompt ids. Prints one JSON line; it also says how many of the first
new tokens are those of transformers in the same dtype.
"""
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
import torch
import transformers

import llmjax

SMOKE = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def theirs(place: pathlib.Path, prompt: list[int], new: int, device: str, dtype: str) -> tuple[Callable[[], Any], Callable[[], list[int]]]:
    """-> (reads the prompt, generates)"""
    folder, knobs = (str(place.parent), dict(gguf_file=place.name)) if place.is_file() else (str(place), {})
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **knobs).to(device).eval()
    ids = torch.tensor([prompt], device=device)

    def read() -> Any:
        with torch.inference_mode():
            return peer(input_ids=ids, use_cache=True, logits_to_keep=1).logits.float().cpu()

    def generate() -> list[int]:
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
        return out[0, len(prompt):].tolist()
    return read, generate


def ours(place: pathlib.Path, prompt: list[int], new: int, dtype: str) -> tuple[Callable[[], Any], Callable[[], list[int]]]:
    model, params, _ = llmjax.load(place, dtype=dtype)
    model, params = llmjax.decode.prepare(model, params)
    tokens = np.asarray([prompt], np.int32)
    positions, segments = np.arange(len(prompt), dtype=np.int32)[None], np.ones_like(tokens)

    def read() -> Any:
        cache = llmjax.decode.init_cache(model, 1, len(prompt) + new)
        return np.asarray(llmjax.decode.prefill(model, params, tokens, positions, segments, cache)[0])

    def generate() -> list[int]:
        return llmjax.generate(model, params, None, [prompt], max_new_tokens=new, temperature=0.0, stop=[])[0]
    return read, generate


def main() -> int:
    args = common.parser(__doc__, rounds=5).parse_args()
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        print("decode: jax has a GPU and torch has none; install torch's CUDA build, or set JAX_PLATFORMS=cpu", file=sys.stderr)
        return 2
    torch.set_num_threads(common.cores())
    transformers.utils.logging.disable_progress_bar()
    dtype = "bfloat16" if gpu else "float32"
    length, new = (16, 8) if args.smoke else (128, 64)
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            place, largest = pathlib.Path(folder), SMOKE["vocab_size"]
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOKE)).save_pretrained(folder)
        else:
            place, largest = llmjax.pretrained.locate("smollm2"), 40_000
        prompt = np.random.default_rng(1).integers(100, largest, length).tolist()
        sides = {f"transformers {name}": theirs(place, prompt, new, "cuda" if gpu else "cpu", name) for name in DTYPES}
        sides[f"llmjax {dtype}"] = ours(place, prompt, new, dtype)
    reading, _ = common.turns({name: read for name, (read, _) in sides.items()}, args.rounds)
    making, made = common.turns({name: generate for name, (_, generate) in sides.items()}, args.rounds)
    if any(len(ids) != new for ids in made.values()):
        print(f"decode: the sides do not do the same work, tokens made {({name: len(ids) for name, ids in made.items()})}", file=sys.stderr)
        return 1
    name = "a tiny Llama" if args.smoke else "SmolLM2-135M"
    rows = [common.row(f"generation, {name}, {new} tokens after {length}", "tok/s", {side: new / s for side, s in making.items()}, more_is_better=True),
            common.row(f"prefill, {name}, {length} tokens", "tok/s", {side: length / s for side, s in reading.items()}, more_is_better=True)]
    same = next((i for i, (a, b) in enumerate(zip(made[f"llmjax {dtype}"], made[f"transformers {dtype}"])) if a != b), new)
    common.emit("decode", args, rows, ("jax", "torch", "transformers"), jax.devices()[0].device_kind if gpu else None, seconds={"generate": making, "prefill": reading},
                first_tokens_equal=same)
    return 0


if __name__ == "__main__":
    sys.exit(main())
