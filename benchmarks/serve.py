"""The server: what HTTP costs over the engine alone, what 16 streams make together beside one, and what guessing the next tokens gains; SmolLM2-135M, greedy, streamed.

    python benchmarks/serve.py [--rounds=5] [--model=smollm2] [--quantize=int8] [--save]        needs llmjax[serve,test]; nothing else should run on the machine

The same prompts (new ones each turn, so that no prefix is found again) go to an Engine in this process, without HTTP, and to `llmjax serve` in another, whose client is a plain socket
here. A turn's time goes from the first request sent to the last token had. Prints one JSON line; `latency` has milliseconds to the first token and between two, medians over all turns.
The last row is one stream that repeats a list from its prompt, with --speculate=ngram:7 and without; `steps` has how many calls of the model each took, and of a text that repeats nothing.
"""
import asyncio
import contextlib
import dataclasses as dc
import itertools
import json
import pathlib
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import common

import llmjax
from llmjax.serve import End, Engine, EngineSettings, Knobs, Observer, Request, parse_speculation

TEXT = ("The history of the lighthouse begins long before electricity. On clear nights, fires of wood and coal were kept burning on towers along the coast, and a keeper's family lived beside "
        "them. They wrote down every ship that passed, the weather of the day, and what the storms had carried ashore: ")
SMOKE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
COPY = ("The planets, from the sun outwards, are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune. Once more: the planets, from the sun outwards, are Mercury, Venus, Earth, Mars, "
        "Jupiter, Saturn, Uranus, Neptune. Once more: the planets, from the sun outwards, are Mercury,")
Times = list[list[float]]                                                # of each stream: when it was sent, then when each of its pieces came


class Steps(Observer):
    """How many calls of the model there were."""
    count = 0

    def stepped(self, work: Any) -> None:
        self.count += 1


class Offline:
    """An engine, asked as Python asks it."""

    def __init__(self, loaded: tuple, settings: EngineSettings):
        model, params, self.tokenizer = loaded
        self.steps = Steps()
        self.engine = Engine(model, params, self.tokenizer, settings, self.steps)
        self.engine.start()
        while len(self.engine.known) < len(self.engine.shapes):
            if not self.engine.alive:
                raise RuntimeError(self.engine.failure)
            time.sleep(0.05)

    def __call__(self, prompts: list[str], new: int) -> Times:
        box: queue.Queue = queue.Queue()
        index: dict[Request, int] = {}

        def listen(request: Request, events: list) -> None:
            box.put((index[request], time.perf_counter(), events))
        for i, prompt in enumerate(prompts):
            index[Request(list(self.tokenizer.encode(prompt, add_special_tokens=True)), new, Knobs(temperature=0.0), listen)] = i
        times, left = [[time.perf_counter()] for _ in prompts], len(prompts)
        self.engine.submit(*index)
        while left:
            i, now, events = box.get(timeout=600)
            for event in events:
                if not isinstance(event, End):
                    times[i].append(now)
                elif event.reason != "length":
                    raise RuntimeError(f"ended with {event.reason}: {event.message}")
                else:
                    left -= 1
        return times


class Http:
    """A server at a port of this machine, asked over sockets."""

    def __init__(self, port: int):
        self.port = port

    async def stream(self, prompt: str, new: int) -> list[float]:
        body = json.dumps({"model": "bench", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}).encode()
        times, made = [time.perf_counter()], 0
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        async for line in reader:
            if b'"finish_reason":null' in line:                           # as bytes: the client takes no more of the machine than it must
                times.append(time.perf_counter())
            elif b'"usage":{' in line:
                made = json.loads(line[6:])["usage"]["completion_tokens"]
        writer.close()
        if made != new:
            raise RuntimeError(f"{made} tokens came of {new}")
        return times

    def __call__(self, prompts: list[str], new: int) -> Times:
        async def all_of_them() -> Times:
            return list(await asyncio.gather(*(self.stream(p, new) for p in prompts)))
        return asyncio.run(all_of_them())


@contextlib.contextmanager
def serving(place: str, *more: str) -> Iterator[Http]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "llmjax", "serve", f"--model={place}", "--name=bench", f"--port={port}", "--dtype=float32", *more], stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 600
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"the server did not come up: {log.read().decode(errors='replace')[-400:]}")
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
                    if b"\nllmjax_programs_missing 0.0" in page.read():
                        break
                time.sleep(0.2)
            yield Http(port)
        finally:
            process.terminate()
            process.wait(60)


def tiny(folder: str) -> str:
    """A model with a tokenizer that only shows that everything runs."""
    import transformers
    tokenizer = llmjax.tokenizers.bytes_tokenizer(special_tokens=("<|endoftext|>",))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, **SMOKE)).save_pretrained(folder)
    model, params, _ = llmjax.load(folder, dtype="float32")
    llmjax.save(pathlib.Path(folder, "with"), model, params, tokenizer)
    return str(pathlib.Path(folder, "with"))


def latency(turns: list[Times]) -> dict[str, float]:
    """Milliseconds, medians."""
    firsts = [s[1] - s[0] for times in turns for s in times]
    gaps = [b - a for times in turns for s in times for a, b in itertools.pairwise(s[1:])]
    return {"first token": round(1e3 * statistics.median(firsts), 1), "between tokens": round(1e3 * statistics.median(gaps), 2)}


def main() -> int:
    found = common.parser(__doc__, rounds=5)
    found.add_argument("--model", default="smollm2", help="what is served (smollm2)")
    found.add_argument("--quantize", help="what weights are kept in (float32), as int8")
    found.add_argument("--streams", type=int, default=16, help="streams that run together (16)")
    args = found.parse_args()
    new, streams = (8, 2) if args.smoke else (64, args.streams)
    counter = iter(range(10**6))
    many, one = f"{streams} streams", "1 stream"
    kept: dict[str, list[Times]] = {}
    steps: dict[str, int] = {}

    def side(name: str, asked: Offline | Http, streams: int, text: str = TEXT):
        def run() -> None:
            before = asked.steps.count if isinstance(asked, Offline) else 0
            kept.setdefault(name, []).append(asked([f"{next(counter)}. {text}" for _ in range(streams)], new))
            if isinstance(asked, Offline):
                steps[name] = asked.steps.count - before
        return run
    with tempfile.TemporaryDirectory() as folder:
        place = tiny(folder) if args.smoke else args.model
        settings = EngineSettings(rows=streams, length=512)
        loaded = llmjax.load(place, dtype="float32", quantize=args.quantize)
        with serving(place, f"--rows={streams}", "--context=512", *([f"--quantize={args.quantize}"] if args.quantize else [])) as http:
            plain = Offline(loaded, settings)
            guessing = Offline(loaded, dc.replace(settings, speculate=parse_speculation("ngram:7")))
            try:
                sides = {f"{way}, {n}": side(f"{way}, {n}", asked, count) for n, count in ((many, streams), (one, 1)) for way, asked in (("engine", plain), ("http", http))}
                for kind, text in (("copying", COPY), ("telling", TEXT)):
                    sides |= {f"{way}, {kind}": side(f"{way}, {kind}", asked, 1, text) for way, asked in (("engine", plain), ("guessing", guessing))}
                seconds, _ = common.turns(sides, args.rounds)
            finally:
                plain.engine.stop()
                guessing.engine.stop()
    speed = {name: (streams if name.endswith(many) else 1) * new / s for name, s in seconds.items()}
    late = {name: latency(turns[-args.rounds:]) for name, turns in kept.items()}
    what = "a tiny Llama" if args.smoke else f"{pathlib.Path(args.model).name} in {args.quantize or 'float32'}"
    rows = [common.row(f"serving {many}, {what}", "tok/s", {f"llmjax, {many}": speed[f"http, {many}"], one: speed[f"http, {one}"]}, more_is_better=True)]
    for n in (many, one):
        pair = {"llmjax over HTTP": speed[f"http, {n}"], "the engine alone": speed[f"engine, {n}"]}
        rows.append(common.row(f"HTTP over the engine alone, {n}, {what}", "tok/s", pair, more_is_better=True))
    pair = {"llmjax over HTTP": late[f"http, {one}"]["first token"], "the engine alone": late[f"engine, {one}"]["first token"]}
    rows.append(common.row(f"time to the first token, {one}, {what}", "ms", pair, more_is_better=False))
    for text, label in (("copying", "a text that repeats itself"), ("telling", "one that does not")):
        rows.append(common.row(f"guessing (ngram:7) in {label}, {what}", "tok/s", {"llmjax guessing": speed[f"guessing, {text}"], "without": speed[f"engine, {text}"]}, more_is_better=True))
    common.emit("serve" + (f"_{args.quantize}" if args.quantize else ""), args, rows, ("jax", "uvicorn", "starlette"), latency=late, seconds=seconds, steps=steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
