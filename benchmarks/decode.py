"""SmolLM2-135M from one GGUF file in llmjax beside transformers and llama.cpp: reading a prompt of 128 tokens, and 64 greedy tokens after it.

    python benchmarks/decode.py [--rounds=5] [--save]        needs llmjax[test]; nothing else should run on the machine

llmjax in float32 and bfloat16 (on a GPU in bfloat16 alone), `generate` of transformers in float32 and bfloat16, one row, the same prompt ids. On a CPU also weights in few bits: llmjax's int8, and
the file's own 4 bits (what float32 reads them as), beside llama.cpp's Q8_0 (the same weights, written by `llmjax convert`) and Q4_1 (the file itself), each side with all cores; and, apart from
these, int8 with n-gram drafting. Prints one JSON line; it also says how many of the first new tokens are those of transformers in the same dtype.
"""
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import common
import jax
import numpy as np
import torch
import transformers

import llmjax
from llmjax import convert

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


LLAMA_CPP = """
import os, socket, sys
import xllamacpp
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.cpuparams_batch.n_threads, params.port = sys.argv[1], 512, 1, int(sys.argv[2]), int(sys.argv[2]), port
server = xllamacpp.Server(params)
print("AT", server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextlib.contextmanager
def llama_cpp(file: pathlib.Path, prompt: list[int], new: int) -> Iterator[tuple[Callable[[], Any], Callable[[], list[int]]]]:
    """llama.cpp's own server over a file, asked over the loopback -> (reads the prompt, and makes one token; generates)."""
    with subprocess.Popen([sys.executable, "-c", LLAMA_CPP, str(file), str(common.cores())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdin and child.stdout
        try:
            address = next((line.split("AT ")[1].strip() for line in child.stdout if "AT " in line), None)
            if address is None:
                raise RuntimeError(f"llama.cpp does not open {file.name}")

            def ask(count: int) -> list[int]:
                body = dict(prompt=prompt, n_predict=count, temperature=0, return_tokens=True, cache_prompt=False, ignore_eos=True, samplers=["temperature"])
                request = urllib.request.Request(address + "/completion", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return json.loads(answer.read())["tokens"]
            yield lambda: ask(1), lambda: ask(new)
        finally:
            child.stdin.close()


def in_few_bits(place: pathlib.Path, prompt: list[int], new: int, rounds: int) -> tuple[list[dict], dict[str, Any]]:
    """int8, and the file's own 4 bits, beside llama.cpp's files of 8 and 4 bits -> (rows, median seconds)."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        whole = pathlib.Path(folder, "q8_0.gguf")
        convert.convert(place, whole, to="gguf", dtype="q8_0", progress=False)
        files = {"llama.cpp Q8_0": whole, "llama.cpp Q4_1": place}
        sides = {name: stack.enter_context(llama_cpp(file, prompt, new)) for name, file in files.items()}
        sides["llmjax int8"] = ours(place, prompt, new, "float32", quantize="int8")
        sides["llmjax Q4_1"] = ours(place, prompt, new, "float32")
        guessing = {**{name: make for name, (_, make) in sides.items()}, "llmjax int8, n-grams": ours(place, prompt, new, "float32", quantize="int8", draft=llmjax.decode.NGram())[1]}
        reading, _ = common.turns({name: read for name, (read, _) in sides.items()}, rounds)
        making, made = common.turns(guessing, rounds)
    if any(len(ids) != new for ids in made.values()):
        raise RuntimeError(f"the sides do not do the same work, tokens made {({name: len(ids) for name, ids in made.items()})}")
    speed = {side: new / s for side, s in making.items()}
    alone = {side: v for side, v in speed.items() if side != "llmjax int8, n-grams"}
    return [common.row(f"generation, SmolLM2-135M in few bits, {new} tokens after {len(prompt)}", "tok/s", alone, more_is_better=True),
            common.row("the same with n-gram drafting", "tok/s", {side: v for side, v in speed.items() if side not in ("llmjax int8", "llmjax Q4_1")}, more_is_better=True),
            common.row(f"prefill, SmolLM2-135M in few bits, {len(prompt)} tokens", "tok/s", {side: len(prompt) / s for side, s in reading.items()}, more_is_better=True)], \
        {"generate in few bits": making, "prefill in few bits": reading}


def ours(place: pathlib.Path, prompt: list[int], new: int, dtype: str, quantize: str | None = None, draft: Any = None) -> tuple[Callable[[], Any], Callable[[], list[int]]]:
    model, params, _ = llmjax.load(place, dtype=dtype, quantize=quantize)
    model, params = llmjax.decode.prepare(model, params)
    tokens = np.asarray([prompt], np.int32)
    positions, segments = np.arange(len(prompt), dtype=np.int32)[None], np.ones_like(tokens)

    def read() -> Any:
        cache = llmjax.decode.init_cache(model, 1, len(prompt) + new)
        return np.asarray(llmjax.decode.prefill(model, params, tokens, positions, segments, cache)[0])

    def generate() -> list[int]:
        return llmjax.generate(model, params, None, [prompt], max_new_tokens=new, temperature=0.0, stop=[], **({} if draft is None else {"draft": draft}))[0]
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
        sides |= {f"llmjax {name}": ours(place, prompt, new, name) for name in ([dtype] if gpu else DTYPES)}
    reading, _ = common.turns({name: read for name, (read, _) in sides.items()}, args.rounds)
    making, made = common.turns({name: generate for name, (_, generate) in sides.items()}, args.rounds)
    if any(len(ids) != new for ids in made.values()):
        print(f"decode: the sides do not do the same work, tokens made {({name: len(ids) for name, ids in made.items()})}", file=sys.stderr)
        return 1
    name = "a tiny Llama" if args.smoke else "SmolLM2-135M"
    rows = [common.row(f"generation, {name}, {new} tokens after {length}", "tok/s", {side: new / s for side, s in making.items()}, more_is_better=True),
            common.row(f"prefill, {name}, {length} tokens", "tok/s", {side: length / s for side, s in reading.items()}, more_is_better=True)]
    seconds: dict[str, Any] = {"generate": making, "prefill": reading}
    if not gpu and not args.smoke:
        more, took = in_few_bits(place, prompt, new, args.rounds)
        rows, seconds = rows + more, seconds | took
    same = next((i for i, (a, b) in enumerate(zip(made[f"llmjax {dtype}"], made[f"transformers {dtype}"])) if a != b), new)
    common.emit("decode", args, rows, ("jax", "torch", "transformers", "xllamacpp"), jax.devices()[0].device_kind if gpu else None, seconds=seconds, first_tokens_equal=same)
    return 0


if __name__ == "__main__":
    sys.exit(main())
