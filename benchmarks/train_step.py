"""A train step of a Llama in llmjax beside the same model, weights and batch in transformers + torch.

    python benchmarks/train_step.py [--rounds=7] [--save]        needs llmjax[test]; nothing else should run on the machine

On a CPU: 17 M parameters (6 layers, width 384, 8 heads, ffn 1024, vocabulary 8192 untied), 8 rows of 256 tokens; llmjax in bfloat16 with float32 weights, torch in float32 and in
bfloat16 autocast. On a GPU: Llama 3.2's 1 B shape, 4 rows of 2,048 tokens, bfloat16 with float32 weights on both sides (torch also compiled), and the MFU of each
(convention: llmjax/train/flops.py; peak: the maker's figure). AdamW on both, fused in torch. Prints one JSON line; the first losses must agree, or the work is not the same.
"""
import sys
import tempfile
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

import llmjax


def llama(vocab: int, dim: int, hidden: int, layers: int, heads: int, kv_heads: int, context: int, tied: bool) -> dict:
    return dict(vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                max_position_embeddings=context, tie_word_embeddings=tied)


SMOKE = llama(256, 64, 128, 2, 4, 4, 32, False)
SMALL = llama(8192, 384, 1024, 6, 8, 8, 256, False)
LARGE = llama(128_256, 2048, 8192, 16, 32, 8, 2048, True)
RATE = 1e-4


def torch_step(folder: str, tokens: np.ndarray, device: str, bf16: bool, compiled: bool) -> Callable[[], float]:
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=RATE, fused=True)
    ids = torch.as_tensor(tokens, device=device)
    forward = torch.compile(peer) if compiled else peer

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
    return step


def our_step(folder: str, tokens: np.ndarray) -> tuple[llmjax.models.Decoder, Callable[[], float]]:
    model, params, _ = llmjax.load(folder, dtype="bfloat16", param_dtype="float32")
    optimizer = optax.adamw(RATE)
    one = llmjax.train.make_step(model.apply, llmjax.objectives.NextToken(), optimizer)
    state = llmjax.train.init(params, optimizer, jax.random.key(0))
    batch = dict(tokens=jnp.asarray(tokens[:, :-1], jnp.int32), targets=jnp.asarray(tokens[:, 1:], jnp.int32), weights=jnp.ones(tokens[:, 1:].shape, jnp.float32))

    def step() -> float:
        nonlocal state
        state, metrics = one(state, batch)
        return float(metrics["loss"])
    return model, step


def main() -> int:
    args = common.parser(__doc__, rounds=7).parse_args()
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        print("train_step: jax has a GPU and torch has none; install torch's CUDA build, or set JAX_PLATFORMS=cpu", file=sys.stderr)
        return 2
    device = "cuda" if gpu else "cpu"
    torch.set_num_threads(common.cores())
    transformers.utils.logging.disable_progress_bar()
    fields, batch = (SMOKE, 2) if args.smoke else (LARGE, 4) if gpu else (SMALL, 8)
    length = fields["max_position_embeddings"]
    tokens = np.random.default_rng(0).integers(0, fields["vocab_size"], (batch, length + 1))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)
        if gpu:
            sides = {"torch bf16 autocast": torch_step(folder, tokens, device, True, False), "torch bf16 autocast, compiled": torch_step(folder, tokens, device, True, True)}
        else:
            sides = {"torch float32": torch_step(folder, tokens, device, False, False), "torch bf16 autocast": torch_step(folder, tokens, device, True, False)}
        model, sides["llmjax bf16"] = our_step(folder, tokens)
    first = {name: step() for name, step in sides.items()}
    if max(first.values()) - min(first.values()) > 0.02:                 # bfloat16 moves the mean loss of thousands of tokens by a few thousandths
        print(f"train_step: the sides do not do the same work, first losses {first}", file=sys.stderr)
        return 1
    seconds, _ = common.turns(sides, args.rounds)
    parameters = sum(x.size for x in jax.tree.leaves(llmjax.models.abstract_params(model)))
    more = {"tokens_per_second": {name: round(batch * length / s) for name, s in seconds.items()}, "first_loss": {name: round(x, 4) for name, x in first.items()}}
    if gpu:
        peak, source = llmjax.train.peak_flops("bfloat16")
        flops = llmjax.train.flops_per_token(model, length) * batch * length
        more["mfu"] = {name: round(flops / s / (peak / jax.device_count()), 4) for name, s in seconds.items()}
        more["peak"] = {"flops": peak / jax.device_count(), "source": source}
    what = f"train step, {parameters / 1e6:,.0f} M Llama, {batch} × {length:,} tokens"
    rows = [common.row(what, "s", seconds, more_is_better=False)]
    common.emit("train_step", args, rows, ("jax", "optax", "torch", "transformers"), jax.devices()[0].device_kind if gpu else None, model=fields, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
