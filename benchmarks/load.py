"""Loading a checkpoint in llmjax beside transformers: seconds, and the most memory a process holds over what it held before, as a multiple of the weights.

    python benchmarks/load.py [--rounds=3] [--save]        needs llmjax[test] and 8 GB of disk in the temporary folder; nothing else should run on the machine

Random Llamas written by transformers: the shapes of SmolLM2-135M (float32 and bfloat16) and 1.1 billion parameters (bfloat16 and float32). Every turn is a process of its own, in which
the libraries are imported and the device is there; the files are in the page cache. transformers maps the file and reads what is touched: each of its parameters is therefore
read once (summed up in its own dtype), as every use of the model does. Prints one JSON line.
"""
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import common

SIZES = {"135 M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
         "1.1 B": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=False)}
SMOKE = {"smoke": dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)}
CASES = (("135 M", "bfloat16"), ("135 M", "float32"), ("1.1 B", "bfloat16"), ("1.1 B", "float32"))

MEASURE = """
import json, sys, time
def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
folder, dtype = sys.argv[1:]
{prepare}
before = held("VmRSS")
start = time.perf_counter()
{load}
print("FOUND" + json.dumps({{"seconds": time.perf_counter() - start, "peak": (held("VmHWM") - before) / weights}}))
"""
SIDES = {
    "llmjax": MEASURE.format(prepare="import jax, llmjax\njax.numpy.ones(8).block_until_ready()\nllmjax.load",
                             load="params = jax.block_until_ready(llmjax.load(folder, dtype=dtype)[1])\nweights = sum(x.nbytes for x in jax.tree.leaves(params))"),
    "transformers": MEASURE.format(prepare="import torch, transformers\ntransformers.utils.logging.disable_progress_bar()\ntransformers.AutoModelForCausalLM, transformers.LlamaForCausalLM",
                                   load="model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))\nfor p in model.parameters():\n    p.sum()\n"
                                        "weights = sum(p.numel() * p.element_size() for p in model.parameters())"),
}
WRITE = """
import json, sys, torch, transformers
folder, dtype, fields = sys.argv[1:]
torch.set_default_dtype(getattr(torch, dtype))
transformers.utils.logging.disable_progress_bar()
transformers.LlamaForCausalLM(transformers.LlamaConfig(**json.loads(fields))).save_pretrained(folder)
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    return done.stdout


def main() -> int:
    args = common.parser(__doc__, rounds=3).parse_args()
    sizes, rows = {**SIZES, **SMOKE}, []
    with tempfile.TemporaryDirectory() as scratch:
        for size, dtype in [("smoke", "float32")] if args.smoke else CASES:
            folder = str(pathlib.Path(scratch, f"{size}-{dtype}".replace(" ", "")))
            python(WRITE, folder, dtype, json.dumps(sizes[size]))
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for turn in range(1 + (1 if args.smoke else args.rounds)):
                for side, code in SIDES.items():
                    line = json.loads(python(code, folder, dtype).split("FOUND")[1])
                    if turn:                                         # the first turn fills the page cache
                        found[side].append(line)
            for what, key, unit in (("loading", "seconds", "s"), ("peak memory over the weights", "peak", "×")):
                medians = {side: statistics.median(x[key] for x in lines) for side, lines in found.items()}
                rows.append(common.row(f"{what}, {size} parameters in {dtype}", unit, medians, more_is_better=False))
            for file in pathlib.Path(folder).iterdir():
                file.unlink()
    common.emit("load", args, rows, ("jax", "torch", "transformers", "safetensors"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
