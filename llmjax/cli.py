"""Arguments -> run. What a user can cause ends in one line on stderr and exit status 2; `--debug` shows the trace."""
from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from llmjax.core.errors import nearest

VERBS = {
    "train": "train a model from a configuration; started again on the same folder it goes on",
    "generate": "continue prompts, for scripts",
    "chat": "talk with a model",
    "serve": "answer over HTTP as OpenAI's API does, with a page to chat on",
    "eval": "loss, perplexity and bits per byte on a text or jsonl file",
    "convert": "write any readable checkpoint in another layout: Hugging Face, GGUF, Orbax",
    "tokenizer": "train a tokenizer, encode, decode",
    "data": "build a run's tokenizer and token shards without training",
    "plan": "what a model or a run takes: parameters, memory, time and cost, scaling laws; nothing is attached or started",
    "show": "print a resolved configuration, its sharding, or a checkpoint's configuration",
}
MODEL = "a folder in Hugging Face layout, a .gguf file, a run's folder, hf:org/name, or smollm2"


class Parser(argparse.ArgumentParser):
    """Errors are one line; an unknown verb answers with the nearest."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    top = Parser(prog="llmjax", formatter_class=argparse.RawDescriptionHelpFormatter, usage="llmjax VERB [options]",
                 description=f"The whole life of a language model in JAX.\n\nverbs:\n{lines}\n\nllmjax VERB --help tells a verb's options.")
    top.add_argument("--version", action="version", version=version())
    verbs = top.add_subparsers(prog="llmjax", dest="verb", required=True, parser_class=Parser, metavar="VERB", help=argparse.SUPPRESS)

    def add(name: str, more: str = "") -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=VERBS[name], description=VERBS[name][0].upper() + VERBS[name][1:] + "." + (f"\n\n{more}" if more else ""),
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
        return parser

    def configured(parser: argparse.ArgumentParser, required: bool = True) -> None:
        parser.add_argument("--config", required=required, metavar="FILE.py[:arg=value,…]", help="a Python file with get_config, its arguments after a colon; or a run's config.json")
        parser.add_argument("--config.FIELD", dest="override_help", metavar="VALUE", help="override a field, as in --config.optimizer.learning_rate=1e-3 (`llmjax show` lists them)")

    def computed(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what is computed in (float32 on a CPU, else bfloat16)")
        parser.add_argument("--quantize", choices=["int8"], help="weights in int8, one scale per output channel (as they are stored)")

    def sampled(parser: argparse.ArgumentParser, tokens: int) -> None:
        parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=tokens, help=f"at most this many new tokens ({tokens})")
        parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (0)")
        parser.add_argument("--top-k", "--top_k", type=int, help="draw among the k best")
        parser.add_argument("--top-p", "--top_p", type=float, help="draw among the most probable that make up this mass")
        parser.add_argument("--min-p", "--min_p", type=float, help="leave out what is less probable than this share of the best")
        parser.add_argument("--typical-p", "--typical_p", type=float, help="draw among the tokens of typical surprise that make up this mass")
        parser.add_argument("--top-n-sigma", "--top_n_sigma", type=float, help="leave out logits more than so many standard deviations below the best")
        parser.add_argument("--mirostat-tau", "--mirostat_tau", type=float, help="mirostat 2: bits of surprise a token to hold on to (5 is usual)")
        parser.add_argument("--mirostat-eta", "--mirostat_eta", type=float, help="mirostat 2: its learning rate (0.1)")
        parser.add_argument("--repetition-penalty", "--repetition_penalty", type=float, help="above 1 makes tokens already there less likely")
        parser.add_argument("--frequency-penalty", "--frequency_penalty", type=float, help="taken off a token's logit for each time the answer holds it")
        parser.add_argument("--presence-penalty", "--presence_penalty", type=float, help="taken off a token's logit if the answer holds it")
        parser.add_argument("--dry-multiplier", "--dry_multiplier", type=float, help="DRY: how hard to punish what makes a repeat longer (0.8 is usual)")
        parser.add_argument("--min-tokens", "--min_tokens", type=int, help="do not stop before so many new tokens")
        parser.add_argument("--bad-word", "--bad_word", dest="bad_words", action="append", metavar="TEXT", help="a text that may not come; may be given several times")
        parser.add_argument("--stop", action="append", help="stop at this text; may be given several times")
        parser.add_argument("--seed", type=int, default=0, help="the random seed (0)")
        parser.add_argument("--cache", metavar="KIND", help="how keys and values are kept: int8, int4, int8/int4, paged=16, sinks:4+1020 (StreamingLLM: first and newest tokens), h2o:512+512 (heavy "
                                                            "hitters and newest), or a layout and a dtype (paged,int8); its size goes to stderr")
        computed(parser)

    p = add("train", "A run's folder holds config.json, metrics.jsonl, checkpoints/, hf/ (the model in Hugging Face layout) and plots/.\n"
                     "example: llmjax train --config=configs/quickstart.py:size=tiny --config.steps=20 --workdir=runs/a\n\n"
                     "SIGTERM and Ctrl-C save a checkpoint and end it (with status LLMJAX_STOPPED_STATUS, 0 unless set). Several processes, on one host or many, make one run: see launch/.")
    configured(p)
    p.add_argument("--workdir", metavar="DIR", help="the run's folder (runs/NAME of the configuration)")
    p.add_argument("--quiet", action="store_true", help="no progress, no sample")

    p = add("generate", "example: llmjax generate --model=smollm2 --prompt='The sea' --max-new-tokens=32")
    p.add_argument("--model", required=True, help=MODEL)
    p.add_argument("--prompt", action="append", help="a text to continue; may be given several times")
    p.add_argument("--prompts", metavar="FILE.jsonl", help='prompts, one a line: a string, or an object with "prompt"; answers come as JSON lines')
    p.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template as a user's turn")
    p.add_argument("--n", type=int, default=1, help="continuations per prompt (1)")
    p.add_argument("--best-of", "--best_of", type=int, help="draw so many per prompt and give the n most probable")
    p.add_argument("--beams", type=int, help="search with so many beams instead of drawing; the n best are given")
    p.add_argument("--draft", metavar="MODEL", help="a smaller model with the same vocabulary whose guesses save calls of the model")
    p.add_argument("--ngram", type=int, metavar="TOKENS", help="guess so many tokens at a time from the text so far, which saves calls of the model")
    p.add_argument("--json-schema", "--json_schema", metavar="FILE.json", help="answers are JSON that fits this schema")
    p.add_argument("--regex", metavar="PATTERN", help="answers match this regular expression")
    p.add_argument("--lark", metavar="FILE", help="answers follow this Lark grammar")
    p.add_argument("--choice", action="append", metavar="TEXT", help="answers are one of these texts; given several times")
    p.add_argument("--batch-size", "--batch_size", type=int, default=8, help="prompts at a time (8)")
    p.add_argument("--json", action="store_true", help="answer in JSON lines for --prompt too")
    sampled(p, 64)

    p = add("chat", "example: llmjax chat --model=smollm2\nWithin: /reset forgets the conversation, /quit or Ctrl-D ends.")
    p.add_argument("--model", required=True, help=MODEL)
    p.add_argument("--system", help="a system message")
    sampled(p, 512)

    p = add("serve", "example: llmjax serve --model=smollm2 --port=8000, then open http://127.0.0.1:8000/ or point a client of OpenAI's API at http://127.0.0.1:8000/v1\n\n"
                     "Paths: /v1/chat/completions /v1/completions /v1/embeddings /v1/models /v1/responses /v1/messages /tokenize /detokenize /health /ready /metrics /openapi.json\n"
                     "SIGTERM ends it well: what runs is finished first. Needs pip install 'llmjax[serve]'.")
    p.add_argument("--model", required=True, help=MODEL)
    p.add_argument("--name", help="what clients call the model (the last part of --model)")
    p.add_argument("--alias", action="append", default=[], help="another name that is taken too; may be given several times")
    p.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="a LoRA adapter (a folder as PEFT writes it) that requests ask for by model=NAME; may be given several times")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1: this machine alone; 0.0.0.0: everywhere, then give keys)")
    p.add_argument("--port", type=int, default=8000, help="the port (8000)")
    computed(p)
    p.add_argument("--tensor", type=int, metavar="N", help="lay the model over N devices (tensor parallel)")
    p.add_argument("--rows", type=int, default=32, help="sequences that are computed together (32)")
    p.add_argument("--context", type=int, help="tokens of a sequence, prompt and answer (the model's context)")
    p.add_argument("--cache-memory", "--cache_memory", metavar="SIZE", help="bytes of the cache, as 4G or 800M (room for 1,024 tokens of every row)")
    p.add_argument("--chunk", type=int, default=128, help="tokens of a prompt computed at a time between steps of the others (128)")
    p.add_argument("--queue", type=int, default=256, help="sequences that may wait; beyond it the answer is 429 (256)")
    p.add_argument("--no-prefix-cache", "--no_prefix_cache", action="store_true", help="compute every prompt anew")
    p.add_argument("--speculate", metavar="ngram:N", help="guess up to N tokens a step, copied from what followed the same words before, and judge them together; texts stay the same (off)")
    p.add_argument("--api-key", "--api_key", action="append", default=[], help="a key that clients must send; may be given several times (arguments can be seen by others here: see --api-key-file)")
    p.add_argument("--api-key-file", "--api_key_file", metavar="FILE", help="keys, one a line, as owner:key or key")
    p.add_argument("--rate", metavar="N/TIME", help="requests of a key, as 600/min (unlimited)")
    p.add_argument("--concurrency", type=int, help="requests of a key that run together (unlimited)")
    p.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take (600)")
    p.add_argument("--max-body", "--max_body", metavar="SIZE", default="10M", help="bytes a request may have (10M)")
    p.add_argument("--drain", type=float, default=60.0, help="seconds that running requests get after SIGTERM (60)")
    p.add_argument("--cors-origin", "--cors_origin", action="append", default=[], metavar="ORIGIN", help="a site whose pages may ask, or *; may be given several times")
    p.add_argument("--tls-cert", "--tls_cert", metavar="FILE", help="the certificate (PEM), for HTTPS")
    p.add_argument("--tls-key", "--tls_key", metavar="FILE", help="its private key")
    p.add_argument("--tool-parser", "--tool_parser", default="auto", metavar="NAME", help="how the model writes calls of tools: hermes, llama3, mistral, none (auto: read off its chat template)")
    p.add_argument("--reasoning-parser", "--reasoning_parser", default="auto", metavar="NAME", help="how it writes thoughts: think, none (auto: read off its chat template)")
    p.add_argument("--response-cache", "--response_cache", type=int, metavar="N", help="keep the last N whole answers and give them again to the same key for the same question (off)")
    p.add_argument("--semantic-cache", "--semantic_cache", type=float, metavar="COSINE",
                   help="give a kept answer again to the same key where the last question means nearly the same: by embeddings whose cosine is at least this, as 0.95 "
                        "(off; the last 1,024 answers, or as many as --response-cache says)")
    p.add_argument("--embedding-model", "--embedding_model", metavar="MODEL", help="the model of /v1/embeddings (the served one, its last hidden states averaged)")

    p = add("eval", "example: llmjax eval --model=smollm2 --file=book.txt --context=1024")
    p.add_argument("--model", required=True, help=MODEL)
    p.add_argument("--file", required=True, help="a text file, or jsonl")
    p.add_argument("--field", default="text", help="the text's field in jsonl (text)")
    p.add_argument("--context", type=int, help="tokens per row (1024, at most the model's own)")
    p.add_argument("--batch-size", "--batch_size", type=int, default=8, help="rows at a time (8)")
    computed(p)
    p.add_argument("--json", action="store_true", help="one JSON line")

    p = add("convert", "examples: llmjax convert smollm2 out/ --dtype=float32\n          llmjax convert hf:org/name model.gguf --to=gguf --dtype=q8_0 --check\n"
                       "          llmjax convert runs/a params/ --to=orbax")
    p.add_argument("source", help=MODEL + ", or a folder of Orbax parameters")
    p.add_argument("target", help="the folder (hf, orbax) or .gguf file to write")
    p.add_argument("--to", choices=["hf", "gguf", "orbax"], default="hf", help="the layout to write (hf)")
    p.add_argument("--dtype", default="bfloat16", help="of the weights written: float32, bfloat16, float16, and in gguf q8_0, q5_1, q5_0, q4_1, q4_0 (bfloat16)")
    p.add_argument("--check", action="store_true", help="load what was written and compare logits; status 1 where the written dtype does not explain the difference")
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint of this layout that is there; it stays until the new one is whole")
    p.add_argument("--no-tokenizer", "--no_tokenizer", action="store_true", help="leave the tokenizer out")
    p.add_argument("--report", metavar="FILE", help="write the account of every tensor, JSON where the name ends in .json, else text")
    p.add_argument("--verbose", action="store_true", help="show every tensor")

    p = add("tokenizer", "examples: llmjax tokenizer train a.txt b.txt --out=tok --vocab-size=8192\n          llmjax tokenizer encode --tokenizer=tok --text='Hello'\n"
                         "          llmjax tokenizer decode --tokenizer=tok --ids='1 2 3'")
    p.add_argument("action", choices=["train", "encode", "decode"])
    p.add_argument("files", nargs="*", help="train: text files, globs or folders (jsonl with --field)")
    p.add_argument("--out", help="train: the folder to write")
    p.add_argument("--vocab-size", "--vocab_size", type=int, default=8192, help="train: size of the vocabulary (8192)")
    p.add_argument("--field", help="train: the files are jsonl, this field is the text")
    p.add_argument("--tokenizer", help="encode, decode: a folder, a tokenizer file, or a model")
    p.add_argument("--text", help="encode: the text")
    p.add_argument("--ids", help="decode: ids separated by spaces or commas")

    p = add("data", "example: llmjax data --config=configs/quickstart.py --workdir=runs/quickstart")
    configured(p)
    p.add_argument("--workdir", metavar="DIR", help="the run's folder (runs/NAME of the configuration); the shards go to its data/")

    p = add("plan", "examples: llmjax plan --model=llama-3-8b --json\n"
                    "          llmjax plan --config=configs/pretrain.py:model=llama-3-8b --topology=v5e:16x16 --config.layout.fsdp=256 --config.batch_size=1024\n"
                    "          … --search, or … --compile --dump=out/    (the TPU compiler itself, no TPU needed: pip install 'llmjax[tpu]')\n          llmjax plan --fit=runs/")
    configured(p, required=False)
    p.add_argument("--model", help="figures of a published size by name (llama-3-8b), or of a checkpoint: " + MODEL)
    p.add_argument("--fit", metavar="DIR", help="fit a scaling law L(N, D) to the runs below this folder; a plot goes to DIR/scaling.png")
    p.add_argument("--context", type=int, help="with --model: tokens in a row (the model's own)")
    p.add_argument("--cache", metavar="KIND", help="with --model: the bytes of a cache of this kind too: int8, int4, paged=16, sinks:4+1020, h2o:512+512, or two of these (paged,int8)")
    p.add_argument("--topology", help="with --config: the chips, as v5e:16x16, v5p:4x4x8, v5p-128, 2xv5e-256 (two slices), h100:4x8 (as many devices as the layout names, of no kind in particular)")
    p.add_argument("--price", type=float, help="with --topology: US dollars a chip-hour (Google's list price, where there is one)")
    p.add_argument("--mfu", type=float, help="with --topology: model FLOPs utilisation to expect, above 0 and at most 1 (the roofline's)")
    p.add_argument("--search", action="store_true", help="with --topology: the Pareto front of batch × remat × layout, time against memory")
    p.add_argument("--compile", action="store_true", help="with --topology of TPUs: compile the train step with libtpu and compare (minutes)")
    p.add_argument("--dump", metavar="DIR", help="with --compile: keep program.hlo and program.meta.json")
    p.add_argument("--json", action="store_true", help="one JSON object")

    p = add("show", "examples: llmjax show --config=configs/quickstart.py --config.steps=10\n          llmjax show --config=configs/quickstart.py --sharding\n          llmjax show --model=smollm2")
    configured(p, required=False)
    p.add_argument("--model", help=MODEL)
    p.add_argument("--sharding", action="store_true", help="with --config: where each weight lies on the devices")
    return top


def version() -> str:
    from llmjax import __version__
    return f"llmjax {__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """-> the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(argv)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if "--debug" in argv:
            raise
        print(f"llmjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("llmjax: stopped", file=sys.stderr)
        return 130


def dispatch(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        raise ValueError(f"there is no verb {argv[0]!r}" + nearest(argv[0], VERBS))
    overrides, rest = take_overrides(argv)
    args = build_parser().parse_args(rest)
    if overrides and not hasattr(args, "config"):
        raise ValueError(f"--config.{overrides[0]}: `llmjax {args.verb}` takes no configuration")
    import os
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return HANDLERS[args.verb](args, overrides)


def take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(["a.b=value", …] of every --config.a.b=value or --config.a.b value, the other arguments)."""
    overrides, rest, i = [], [], 0
    while i < len(argv):
        item = argv[i]
        if item.startswith("--config."):
            text = item.removeprefix("--config.")
            if "=" not in text and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
                i += 1
                text = f"{text}={argv[i]}"
            overrides.append(text)
        else:
            rest.append(item)
        i += 1
    return overrides, rest


def read_config(args: argparse.Namespace, overrides: list[str]) -> Any:
    from llmjax import settings
    return settings.load(args.config, overrides)


def workdir_of(args: argparse.Namespace) -> pathlib.Path:
    return pathlib.Path(args.workdir) if args.workdir else pathlib.Path("runs", pathlib.Path(args.config.partition(":")[0]).stem)


SAMPLED = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "mirostat_tau", "mirostat_eta", "repetition_penalty", "frequency_penalty",
           "presence_penalty", "dry_multiplier", "min_tokens", "bad_words", "stop", "seed", "cache", "dtype", "quantize")


def knobs(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLED}


def on_train(args: argparse.Namespace, overrides: list[str]) -> int:
    config = read_config(args, overrides)
    import os

    from llmjax import run
    found = run.train_model(config, workdir_of(args), quiet=args.quiet)
    return 0 if found["complete"] else int(os.environ.get("LLMJAX_STOPPED_STATUS", "0"))


def on_generate(args: argparse.Namespace, _: list[str]) -> int:
    from llmjax import run
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("give --prompt=TEXT (once or more) or --prompts=FILE.jsonl")
    prompts = args.prompt or run.read_prompts(args.prompts)
    grammar = run.read_grammar(json_schema=args.json_schema, regex=args.regex, lark=args.lark, choice=args.choice)
    for done in run.generate(args.model, prompts, chat=args.chat, batch_size=args.batch_size, n=args.n, best_of=args.best_of, grammar=grammar, beams=args.beams, draft=args.draft, ngram=args.ngram,
                             **knobs(args)):
        if args.json or args.prompts:
            print(json.dumps(done, ensure_ascii=False), flush=True)
        else:
            print(("" if args.chat else done["prompt"]) + done["text"], flush=True)
    return 0


def on_chat(args: argparse.Namespace, _: list[str]) -> int:
    from llmjax import run
    lines = None if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin)
    run.chat(args.model, system=args.system, lines=lines, **knobs(args))
    return 0


def on_serve(args: argparse.Namespace, _: list[str]) -> int:
    from llmjax import serve
    memory = None if args.cache_memory is None else in_bytes("cache-memory", args.cache_memory)
    engine = serve.EngineSettings(args.rows, args.context, memory=memory, chunk=args.chunk, queue=args.queue, share_prefixes=not args.no_prefix_cache,
                                  speculate=None if args.speculate is None else serve.parse_speculation(args.speculate))
    settings = serve.ServerSettings(
        host=args.host, port=args.port, name=args.name, aliases=tuple(args.alias), api_keys=tuple(args.api_key), api_key_file=args.api_key_file, rate=args.rate, together=args.concurrency,
        timeout=args.timeout, body=in_bytes("max-body", args.max_body), drain=args.drain, origins=tuple(args.cors_origin), certificate=args.tls_cert, private_key=args.tls_key,
        tool_parser=args.tool_parser, reasoning_parser=args.reasoning_parser, embedding_model=args.embedding_model,
        answers_kept=args.response_cache, adapters=tuple(args.adapter), semantic=args.semantic_cache)
    return serve.serve(args.model, settings, engine, dtype=args.dtype, tensor=args.tensor, quantize=args.quantize)


def in_bytes(option: str, text: str) -> int:
    """"4G" -> 4294967296. Raises ValueError."""
    number, unit = text.strip().removesuffix("B").removesuffix("i"), 1
    if number[-1:].upper() in "KMGT" and number:
        number, unit = number[:-1], 1024 ** ("KMGT".index(number[-1].upper()) + 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"--{option}={text}: a size is wanted, as 4G or 800M")
    return size


def on_eval(args: argparse.Namespace, _: list[str]) -> int:
    from llmjax import run
    found = run.evaluate(args.model, args.file, context=args.context, batch_size=args.batch_size, field=args.field, dtype=args.dtype, quantize=args.quantize, progress=not args.json)
    print(json.dumps(found) if args.json else "\n".join(f"{k:<14} {v:,.4f}" if k != "tokens" else f"{k:<14} {v:,.0f}" for k, v in found.items()))
    return 0


def on_convert(args: argparse.Namespace, _: list[str]) -> int:
    from llmjax import convert
    done = convert.convert(args.source, args.target, to=args.to, dtype=args.dtype, check=args.check, overwrite=args.overwrite, tokenizer=not args.no_tokenizer)
    if args.report:
        convert.write_report(args.report, done)
    print("\n".join(convert.lines(done, None if args.verbose else 3)))
    return 0 if done.check is None or done.check.passed else 1


def on_tokenizer(args: argparse.Namespace, _: list[str]) -> int:
    from llmjax import run
    needed = {"train": ("files", "out"), "encode": ("tokenizer", "text"), "decode": ("tokenizer", "ids")}[args.action]
    missing = [name for name in needed if not getattr(args, name)]
    if missing:
        raise ValueError(f"tokenizer {args.action} needs {' and '.join(missing if missing == ['files'] else ['--' + m if m != 'files' else m for m in missing])}")
    if args.action == "train":
        done = run.train_tokenizer(args.files, args.out, vocab_size=args.vocab_size, field=args.field)
        print(f"{done['folder']}: {done['vocab_size']} tokens")
    elif args.action == "encode":
        print(" ".join(map(str, run.encode(args.tokenizer, args.text))))
    else:
        try:
            ids = [int(x) for x in args.ids.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"--ids={args.ids!r}: whole numbers are wanted") from None
        print(run.decode_ids(args.tokenizer, ids))
    return 0


def on_data(args: argparse.Namespace, overrides: list[str]) -> int:
    config = read_config(args, overrides)
    from llmjax import run
    for name, value in run.prepare_data(config, workdir_of(args)).items():
        print(f"{name:<18} {value}")
    return 0


def on_plan(args: argparse.Namespace, overrides: list[str]) -> int:
    given = [name for name in ("model", "config", "fit") if getattr(args, name)]
    if len(given) != 1:
        raise ValueError("plan needs one of --model=NAME, --config=FILE.py and --fit=DIR")
    belongs = {"context": "model", "cache": "model", "topology": "config", "price": "topology", "mfu": "topology", "search": "topology", "compile": "topology", "dump": "compile"}
    for option, owner in belongs.items():
        if getattr(args, option) not in (None, False) and getattr(args, owner) in (None, False):
            raise ValueError(f"--{option} says something about --{owner}, which is not given")
    if overrides and not args.config:
        raise ValueError(f"--config.{overrides[0]} changes a configuration, and no --config is given")
    import jax
    jax.config.update("jax_platforms", "cpu")          # a plan asks for no device: it neither waits for an accelerator nor takes one from who is using it
    from llmjax import run
    if args.model:
        found = run.plan_model(args.model, args.context, args.cache)
    elif args.fit:
        found = run.plan_fit(args.fit)
    else:
        found = run.plan_run(read_config(args, overrides), args.topology, price=args.price, mfu=args.mfu, search=args.search, compile=args.compile, dump=args.dump)
    print(json.dumps(found.numbers) if args.json else found.text)
    return 0


def on_show(args: argparse.Namespace, overrides: list[str]) -> int:
    if bool(args.config) == bool(args.model):
        raise ValueError("show needs --config=FILE.py or --model=NAME")
    config = read_config(args, overrides) if args.config else None
    from llmjax import run
    if config is None:
        print(run.show_model(args.model))
    else:
        print(run.show_sharding(config) if args.sharding else run.show_config(config))
    return 0


HANDLERS = {"train": on_train, "generate": on_generate, "chat": on_chat, "serve": on_serve, "eval": on_eval, "convert": on_convert,
            "tokenizer": on_tokenizer, "data": on_data, "plan": on_plan, "show": on_show}
