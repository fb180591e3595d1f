"""One function per verb: the command line's whole logic, callable from Python."""
from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
import json
import os
import pathlib
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from llmjax import checkpoint, data, decode, models, plan, pretrained, tokenizers, train
from llmjax.core import CheckpointError, ConfigError, ModelConfig, RunConfig, batch_sharding, check_batch, distributed, explain_sharding, from_layout, shardings
from llmjax.core.model_config import LanguageHead
from llmjax.core.override import as_text, from_json, to_json
from llmjax.core.run_config import DType, in_steps
from llmjax.core.tree import size

# what a run may change when it goes on
FREE = ("layout", "offload_optimizer", "compute", "steps", "log_every", "eval_every", "checkpoint_every", "keep", "replicas", "tensorboard", "sample", "guard", "distributed")


# train

def train_model(config: RunConfig, workdir: str | pathlib.Path, *, quiet: bool = False) -> dict[str, float]:
    """A training run in `workdir`, started or gone on with. -> its last evaluation and loss, and `complete`: 0.0 where a signal stopped it before its end.

    The folder holds config.json, metrics.jsonl, data/ (tokenizer and shards), checkpoints/, hf/ (the model in Hugging Face layout), plots/loss.png.
    Started in several processes (see core/cluster.py), it is one run of all of them: it must be called before jax is asked for its devices, and a process that fails ends the others.
    Raises ConfigError, DataError, ShardingError, CheckpointError, TrainingStopped.
    """
    with distributed.session(config) as together:
        return train_together(config, pathlib.Path(workdir), together, quiet or jax.process_index() > 0)


def train_together(config: RunConfig, workdir: pathlib.Path, together: distributed.Session, quiet: bool) -> dict[str, float]:
    """This process's part of a run."""
    mesh = from_layout(config.layout)
    check_batch(config.batch_size, config.accumulate, config.context, mesh, config.layout)
    together.meet(workdir)
    with together.first("data") as mine:
        if mine:
            remember(config, workdir)
        corpus = data.build(config.data, workdir / "data", context=config.context, seed=config.seed, progress=not quiet)
    together.agree([f"the data of training = {corpus.train.fingerprint}"], "all processes must read the same sources, and see the same folder of the run")
    model = make_model(config, corpus.tokenizer)
    total = in_steps(config.steps, None, corpus.train.steps_per_epoch(config.batch_size), "steps")

    def steps(value, name):
        return None if value is None else max(1, in_steps(value, total, corpus.train.steps_per_epoch(config.batch_size), name))
    schedule = train.make_schedule(config.schedule, config.optimizer.learning_rate, total, corpus.train.steps_per_epoch(config.batch_size))
    labels = models.labels(model)
    optimizer = train.make_optimizer(config.optimizer, schedule, labels)
    key = jax.random.key(config.seed)
    with contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh):
        places = None if mesh.size == 1 else shardings(labels, models.abstract_params(model), mesh, config.layout.rules)
        store = checkpoint.Store(workdir / "checkpoints", keep=config.keep)
        replicas = None if config.replicas is None else checkpoint.Replicas(config.replicas.folder, name_of(workdir))
        state, extra = start(model, optimizer, key, places, store, replicas, config.offload_optimizer)
        place, part = placing(mesh, config)
        loader = corpus.train.loader(config.batch_size, 0, *part)
        if extra:
            loader.set_state(extra["loader"])
        begun = int(state.step)
        console = train.Console(total, begun, quiet)
        loggers = make_loggers(config, workdir, begun, console)

        def evaluate(params):
            batches = corpus.validation.batches(config.batch_size, *part)
            return train.evaluate(model.apply, params, batches, corpus.tokenizer.token_lengths(), model.config.vocab_size, place)
        peak, source = train.peak_flops(config.compute.dtype)
        if not quiet:
            if len(together.hosts) > 1:
                console.say(distributed.describe(together.hosts, mesh))
            announce(console, config, model, corpus, total, begun, peak, source)
        loop = train.Loop(
            step=train.make_step(model.apply, config.objective, optimizer, accumulate=config.accumulate, skip=config.guard.policy == "skip"),
            batches=loader, store=store, total=total, log_every=steps(config.log_every, "log_every") or 1, eval_every=steps(config.eval_every, "eval_every"),
            checkpoint_every=steps(config.checkpoint_every, "checkpoint_every"), evaluate=None if corpus.validation is None else evaluate, loggers=loggers, console=console,
            watch=train.Watch(config.guard, **extra.get("watch", {})), place=place, tokens_per_step=config.batch_size * config.context,
            flops_per_token=train.flops_per_token(model, config.context), peak_flops=peak, learning_rate=schedule, enter=together.enter, replicas=replicas,
            replicate_every=1 if config.replicas is None else steps(config.replicas.every, "replicas.every"))
        whole = False
        try:
            state, whole = train.run(loop, state)
        finally:
            store.close()
            if replicas is not None:
                replicas.close(done=whole)
            for logger in loggers:
                if hasattr(logger, "close"):
                    logger.close()
        if whole:
            finish(config, workdir, model, state.params, corpus.tokenizer, quiet)
    rows = train.read_rows(workdir / "metrics.jsonl")
    return {**{k: v for row in rows for k, v in row.items()}, "complete": float(whole)}


def remember(config: RunConfig, workdir: pathlib.Path) -> None:
    """Keeps the configuration in the run's folder; a folder that holds another run's is refused, but for the fields in FREE."""
    file = workdir / "config.json"
    if file.exists():
        try:
            before = from_json(json.loads(file.read_text()))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}: not JSON ({error}); remove it, or use another --workdir") from error
        same = dc.replace(before, **{name: getattr(config, name) for name in FREE})
        if same != config:
            old, new = as_text(same), as_text(config)
            first = next((f"{b.split(' = ')[0]} was {a.split(' = ')[-1]}, now {b.split(' = ')[-1]}" for a, b in zip(old, new) if a != b), "their shapes differ")
            raise ConfigError(f"{workdir}: holds a run of another configuration ({first}); use another --workdir, or the same configuration")
    part = file.with_suffix(".part")
    part.write_text(json.dumps(to_json(config), indent=1))
    os.replace(part, file)


def make_model(config: RunConfig, tokenizer: Any) -> models.Decoder:
    """The configured model with the tokenizer's special ids. Raises ConfigError where the vocabulary is too small, and for a model that is no decoder."""
    c: ModelConfig = config.model
    if c.encoder or not isinstance(c.head, LanguageHead):
        raise ConfigError("this run trains on the next token, which takes a decoder: a model without an encoder and with the language head")
    if tokenizer.vocab_size > c.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size={c.vocab_size} is too small; set --config.model.vocab_size={-(-tokenizer.vocab_size // 128) * 128}")
    return models.Decoder(pretrained.with_ids(c, tokenizer), config.compute, config.layout)


def name_of(workdir: pathlib.Path) -> str:
    """A name for the run in this folder that no other run has, whatever folder that had: its copies on the hosts' disks are told by it."""
    file = workdir / "run.id"
    if jax.process_index() == 0 and not file.exists():
        file.write_text(secrets.token_hex(8))
    if jax.process_count() == 1:
        return file.read_text()
    return distributed.exchange("run", file.read_text() if jax.process_index() == 0 else "")[0]


def start(model: models.Decoder, optimizer: Any, key: jax.Array, places: Any, store: checkpoint.Store, replicas: checkpoint.Replicas | None, offload: bool) -> tuple[train.State, dict]:
    """A fresh state, or the newest checkpoint's (or copy's) straight in its place. -> (state, what was stored beside it)."""
    latest, like = store.latest(), models.abstract_params(model)
    if places is not None:
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, places)
    like = train.abstract(like, optimizer, key, offload=offload)
    copy = None if replicas is None else replicas.newest(like)
    if replicas is not None and copy is not None and copy.step > (latest or 0):
        return replicas.restore(copy, like)
    if latest is None:
        return train.init(models.init_params(model, key, places), optimizer, key, offload=offload), {}
    return store.restore(latest, like)


def make_loggers(config: RunConfig, workdir: pathlib.Path, begun: int, console: train.Console) -> tuple:
    if jax.process_index() > 0:
        return (console,)
    found: tuple = (console, train.JsonLines(workdir / "metrics.jsonl", begun))
    return (*found, train.TensorBoard(workdir / "tensorboard")) if config.tensorboard else found


def placing(mesh: Any, config: RunConfig) -> tuple[Any, tuple[int, int]]:
    """-> (a function that puts this process's rows of a batch on the devices, which rows those are: the i-th of n parts)."""
    if mesh.size == 1:
        return jax.device_put, (0, 1)
    sharding, shape = batch_sharding(mesh, 2, config.layout.rules), (config.batch_size, config.context)
    return lambda batch: {k: jax.make_array_from_process_local_data(sharding, v, shape) for k, v in batch.items()}, distributed.share(sharding, shape)


def announce(console: train.Console, config: RunConfig, model: models.Decoder, corpus: Any, total: int, begun: int, peak: float, source: str) -> None:
    parameters = size(models.abstract_params(model))
    console.say(f"{parameters / 1e6:.2f} M parameters, {total} steps of {config.batch_size} × {config.context} tokens, {corpus.train.steps_per_epoch(config.batch_size)} steps an epoch; "
                f"peak {peak / 1e12:.2f} TFLOP/s ({source})")
    if begun:
        console.say(f"going on from step {begun} of {total}" if begun < total else f"the run is complete ({total} steps)")


def finish(config: RunConfig, workdir: pathlib.Path, model: models.Decoder, params: Any, tokenizer: Any, quiet: bool) -> None:
    """The end of a run: the model in Hugging Face layout, the plot, a sample."""
    if jax.process_index() == 0:
        train.plot_losses(workdir / "metrics.jsonl", workdir / "plots" / "loss.png")
    pretrained.save(workdir / "hf", model, params, tokenizer)
    if config.sample and not quiet and jax.process_count() > 1:
        print(f"sample: left out with several processes; llmjax generate --model={workdir} --prompt={config.sample!r}")
    elif config.sample and not quiet:
        text = decode.generate(model, params, tokenizer, [config.sample], max_new_tokens=64, temperature=0.8, top_k=50, seed=config.seed)[0]
        print(f"sample: {config.sample}{text}")
    if not quiet:
        print(f"model: {workdir / 'hf'}   metrics: {workdir / 'metrics.jsonl'}   plot: {workdir / 'plots' / 'loss.png'}")


# generate and chat

def read_prompts(file: str | pathlib.Path) -> list[str]:
    """Prompts of a jsonl file: each line a string, or an object with "prompt"."""
    prompts = []
    path = pathlib.Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--prompts={file}: there is no such file")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {number}: not JSON ({error})") from error
        text = row if isinstance(row, str) else row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f'{file}, line {number}: a string, or an object with "prompt" is wanted')
        prompts.append(text)
    if not prompts:
        raise ConfigError(f"{file}: no prompts in it")
    return prompts


def read_grammar(*, json_schema: str | None = None, regex: str | None = None, lark: str | None = None, choice: list[str] | None = None) -> decode.Constraint | None:
    """What answers may be, of at most one of: a JSON schema's file, a pattern, a Lark grammar's file, texts."""
    given = {"--json-schema": json_schema, "--regex": regex, "--lark": lark, "--choice": choice}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)}: an answer follows one of them")
    for name, file in (("--json-schema", json_schema), ("--lark", lark)):
        if file is not None and not pathlib.Path(file).is_file():
            raise FileNotFoundError(f"{name}={file}: there is no such file")
    if json_schema is not None:
        try:
            return decode.JsonSchema(json.loads(pathlib.Path(json_schema).read_text()))
        except json.JSONDecodeError as error:
            raise ConfigError(f"--json-schema={json_schema}: not JSON ({error})") from error
    if lark is not None:
        return decode.Lark(pathlib.Path(lark).read_text())
    return decode.Regex(regex) if regex is not None else decode.Choice(choice) if choice is not None else None


def generate(model: str, prompts: list[str], *, chat: bool = False, batch_size: int = 8, dtype: DType | None = None, quantize: str | None = None,
             beams: int | None = None, draft: str | None = None, ngram: int | None = None, cache: str | None = None, **knobs: Any) -> Iterator[dict[str, Any]]:
    """Continuations of prompts, a batch at a time. -> {"prompt", "text", "finish", "tokens"} each; with `chat` a prompt is a user's turn of the model's chat template. cache: a kind of
    cache (decode.make_cache), whose size goes to stderr before it is made."""
    kind = decode.cache_kind(cache)            # a wrong name is said before anything is loaded
    module, params, tokenizer = pretrained.load(model, dtype=dtype or usual_dtype(), quantize=quantize)
    if tokenizer is None:
        raise CheckpointError(f"{model}: the checkpoint has no tokenizer; call decode.generate with ids from Python")
    module, params = decode.prepare(module, params)
    n = knobs.get("n", 1)
    if beams is not None:
        alone = [name for name in ("best_of", "grammar") if knobs.pop(name, None) is not None] + [name for name, value in (("draft", draft), ("ngram", ngram)) if value is not None]
        if alone:
            raise ConfigError(f"--beams and --{alone[0].replace('_', '-')} do not go together: leave one out")
        knobs = {k: v for k, v in knobs.items() if k not in ("seed", "temperature")} | ({"temperature": knobs["temperature"]} if knobs.get("temperature") else {})
        answer = functools.partial(decode.beam_search, beams=beams)
    else:
        if draft is not None and ngram is not None:
            raise ConfigError("--draft and --ngram do not go together: leave one out")
        guesses: decode.Draft | None = None if ngram is None else decode.NGram(ngram)
        if draft is not None:
            guesses = decode.DraftModel(*pretrained.load(draft, dtype=dtype or usual_dtype())[:2])
        answer = functools.partial(decode.complete, draft=guesses)
    for begin in range(0, len(prompts), batch_size):
        texts = prompts[begin:begin + batch_size]
        rows = [tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True) for t in texts] if chat else texts
        if cache is not None:
            say_cache(kind, *decode.answer_bytes(module, tokenizer, rows, n=beams or knobs.get("best_of") or n, cache=kind, **{k: v for k, v in knobs.items() if k == "max_new_tokens"}))
        for i, done in enumerate(answer(module, params, tokenizer, rows, cache=kind, **knobs)):
            yield {"prompt": texts[i // n], "text": done.text, "finish": done.finish, "tokens": len(done.ids)}


def say_cache(kind: decode.CacheKind, rows: int, length: int, size: int) -> None:
    print(f"cache: {kind.name}, {rows} rows of up to {length:,} tokens, {size / 2**20:,.1f} MiB", file=sys.stderr)


def usual_dtype() -> DType:
    """float32 on a CPU, whose matrix-vector products are fastest in it; bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def chat(model: str, *, system: str | None = None, dtype: DType | None = None, quantize: str | None = None, max_new_tokens: int = 512, cache: str | None = None, lines: Any = None,
         out: Any = None, **knobs: Any) -> None:
    """A conversation on the terminal. `lines`: an iterator of what the user says (default: asks for it); /reset forgets, /quit ends."""
    out, kind = out or sys.stdout, decode.cache_kind(cache)
    module, params, tokenizer = pretrained.load(model, dtype=dtype or usual_dtype(), quantize=quantize)
    session = decode.Session(module, params, tokenizer, system=system, cache=kind)
    if cache is not None:
        say_cache(kind, 1, session.length, decode.cache_bytes(decode.make_cache, module, 1, session.length, kind))
    del params
    if lines is None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    print(f"{model}: /reset forgets the conversation, /quit or Ctrl-D ends", file=out)
    while (text := ask(lines)) is not None:
        if text.strip() in ("/quit", "/exit"):
            break
        if text.strip() == "/reset":
            session.reset()
            continue
        if not text.strip():
            continue
        try:
            for piece in session.say(text, max_new_tokens=max_new_tokens, **knobs):
                print(piece, end="", file=out, flush=True)
        except ConfigError as error:
            print(error, end="", file=out)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=out)
        print(file=out, flush=True)


def ask(lines: Any) -> str | None:
    """The user's next line, or None at the end."""
    if lines is not None:
        return next(lines, None)
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


# eval, tokenizer, data, show (convert has a room of its own)

def evaluate(model: str, file: str, *, context: int | None = None, batch_size: int = 8, field: str = "text", dtype: DType | None = None,
             quantize: str | None = None, progress: bool = True) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte of a model on a text or jsonl file, documents cut into rows of `context` tokens. A quantised model is measured as it decodes."""
    module, params, tokenizer = pretrained.load(model, dtype=dtype or usual_dtype(), quantize=quantize)
    if tokenizer is None:
        raise CheckpointError(f"{model}: the checkpoint has no tokenizer, a text cannot be scored")
    if quantize:
        module, params = decode.prepare(module, params)
    source = data.JsonLines(file, field) if file.endswith(data.sources.JSON_SUFFIXES) else data.TextFiles(file)
    length = min(context or 1024, module.config.context)
    batches = data.scoring_batches(data.documents(source), tokenizer, context=length, batch_size=batch_size)
    if progress:
        from tqdm import tqdm
        batches = tqdm(batches, desc="scoring", unit="batch", disable=None)
    return train.evaluate(module.apply, params, batches, tokenizer.token_lengths(), module.config.vocab_size)


def train_tokenizer(files: list[str], out: str, *, vocab_size: int = 8192, field: str | None = None) -> dict[str, Any]:
    """A byte-level BPE tokenizer trained on text or jsonl files, written in Hugging Face layout."""
    source = data.JsonLines(tuple(files), field) if field else data.TextFiles(tuple(files))
    made = tokenizers.train_bpe(data.documents(source), vocab_size)
    made.save(out)
    return {"vocab_size": made.vocab_size, "folder": out}


def encode(tokenizer: str, text: str) -> list[int]:
    return open_tokenizer(tokenizer).encode(text)


def decode_ids(tokenizer: str, ids: list[int]) -> str:
    return open_tokenizer(tokenizer).decode(ids)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a folder, a tokenizer file, a GGUF file or a known model."""
    path = pathlib.Path(name)
    if path.suffix in (".json", ".model") and path.is_file():
        return tokenizers.load(path)
    place = pretrained.locate(name)
    _, source, _ = pretrained.open_checkpoint(place) if place.is_file() else (None, None, None)
    found = pretrained.read_tokenizer(place, source)
    if found is None:
        raise CheckpointError(f"{name}: there is no tokenizer in it")
    return found


def prepare_data(config: RunConfig, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Builds a run's tokenizer and shards without training. -> counts."""
    corpus = data.build(config.data, pathlib.Path(workdir) / "data", context=config.context, seed=config.seed)
    batch = corpus.train.batch(0, config.batch_size)
    return {"folder": str(pathlib.Path(workdir) / "data"), "vocab_size": corpus.tokenizer.vocab_size, "rows_per_epoch": corpus.train.rows_per_epoch,
            "tokens_per_epoch": corpus.train.tokens_per_epoch, "steps_per_epoch": corpus.train.steps_per_epoch(config.batch_size),
            "filled": float(np.mean(batch["segment_ids"] > 0)), "held_out": corpus.validation is not None}


def show_config(config: RunConfig) -> str:
    """The resolved configuration, a field a line."""
    return "\n".join(as_text(config))


def show_sharding(config: RunConfig) -> str:
    """How the configured layout lays every weight on the devices there are."""
    model = models.build(config.model, config.compute, config.layout)
    return explain_sharding(models.labels(model), models.abstract_params(model), from_layout(config.layout), config.layout.rules)


def show_model(name: str) -> str:
    """A checkpoint's configuration and parameter count, without loading its weights."""
    config, _, _ = pretrained.open_checkpoint(pretrained.locate(name))
    parameters = size(models.abstract_params(models.build(config)))
    return "\n".join([*as_text(config, "model"), f"parameters: {parameters:,}"])


# plan

def plan_model(name: str, context: int | None = None, cache: str | None = None) -> plan.Report:
    """Figures of a published size, or of a checkpoint without its weights."""
    known = name in checkpoint.presets.PUBLISHED
    if not known and "/" not in name and not pathlib.Path(name).exists() and name not in checkpoint.fetch.KNOWN and not name.startswith("hf:"):
        checkpoint.presets.published(name)             # raises, naming the nearest
    return plan.of_model(name, checkpoint.presets.published(name) if known else pretrained.open_checkpoint(pretrained.locate(name))[0], context, cache)


def plan_run(config: RunConfig, topology: str | None = None, *, price: float | None = None, mfu: float | None = None, search: bool = False, compile: bool = False,
             dump: str | pathlib.Path | None = None) -> plan.Report:
    """Memory, traffic, time and cost of a run on chips that need not be there; with `compile` also what the TPU compiler says of its train step.
    Raises ConfigError, ShardingError, MissingExtra where libtpu is wanted and not installed."""
    found, job, estimated = plan.of_run(config, topology, price=price, mfu=mfu, search_front=search)
    return plan.compiled(found, job, estimated, dump) if compile else found


def plan_fit(folder: str | pathlib.Path) -> plan.Report:
    """A scaling law fitted to the finished runs below a folder; its plot goes there too."""
    return plan.fit(folder)
