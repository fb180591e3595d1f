"""A small random model with a tokenizer and a chat template, and an engine over it: for tests of the server."""
import queue
import threading

import jax

from llmjax import decode, tokenizers
from llmjax.core import Attention, Compute, Layer, Mlp, ModelConfig, Rope
from llmjax.models import Decoder, init_params
from llmjax.serve import End, Engine, EngineSettings, Knobs, Piece, Request

TEMPLATE = "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}" \
           "{% for c in m['tool_calls'] or [] %}<tool_call>{{ {'name': c['function']['name'], 'arguments': c['function']['arguments']} | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" \
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LAYER = Layer(Attention(4, 2, 8, Rope()), Mlp(48))


def make_tokenizer():
    made = tokenizers.bytes_tokenizer(special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return made.with_chat_template(TEMPLATE)


def make_model(seed=0, context=256, **changes):
    """-> (model, params, tokenizer); greedy text of it does not repeat itself at once."""
    tokenizer = make_tokenizer()
    config = ModelConfig(tokenizer.vocab_size, 32, cycle=(LAYER,), repeats=2, tied=False, context=context, end_tokens=(258,), **changes)
    model = Decoder(config, Compute("float32"))
    return model, jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(seed))), tokenizer


SMALL = EngineSettings(rows=4, chunk=32, page=8, queue=64)


class Alone:
    """An engine used from a test: `ask` sends a request and `wait` gives (tokens, text, logprobs, end)."""

    def __init__(self, made, settings=SMALL, **knobs):
        self.model, self.params, self.tokenizer = made
        self.engine = Engine(*made, settings, **knobs)
        self.engine.start()

    def ask(self, prompt, limit=8, start=None, **more):
        box: queue.Queue = queue.Queue()
        seen = threading.Event()

        def listen(request, events):
            seen.set()
            for e in events:
                box.put(e)
        knobs = more.pop("knobs", Knobs(temperature=0.0))
        request = Request(list(prompt), limit, knobs, listen, **more)
        request.box, request.seen = box, seen
        self.engine.submit(request)
        return request

    @staticmethod
    def wait(request, timeout=120):
        pieces, end = [], None
        while end is None:
            event = request.box.get(timeout=timeout)
            if isinstance(event, End):
                end = event
            else:
                assert isinstance(event, Piece)
                pieces.append(event)
        return [p.token for p in pieces], "".join(p.text for p in pieces) + end.text, [p.logprob for p in pieces], end

    def offline(self, prompt, limit=8, **knobs):
        return decode.generate(self.model, self.params, None, [list(prompt)], max_new_tokens=limit, **{"stop": [], **knobs})[0]

    def close(self):
        self.engine.stop(60)


class Web:
    """The whole application on a port of this machine, in a thread; `base` is its address."""

    def __init__(self, made, settings=SMALL, *, keys=(("ann", "k-ann"), ("ben", "k-ben")), rates=None, limits=None, origins=(), tools="auto", adapters=None):
        import time

        import uvicorn
        from tiny_models import free_port

        from llmjax.serve.app import make_app
        from llmjax.serve.guard import Keys
        from llmjax.serve.metrics import Metrics
        from llmjax.serve.service import Limits, Service, Speech
        from llmjax.serve.vectors import Embedder
        model, params, tokenizer = made
        metrics = Metrics()
        self.engine = Engine(model, params, tokenizer, settings, metrics, adapters or {})
        embedder = Embedder(self.engine.model, self.engine.params, tokenizer, model.config.context)
        self.service = Service(self.engine, "tiny", metrics, Speech.of(tokenizer.chat_template, tools), limits or Limits(), ("alias",), embedder)
        self.app = make_app(self.service, keys=Keys(keys) if keys else None, rates=rates, origins=origins)
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=port, log_config=None, access_log=False, lifespan="on"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until = time.monotonic() + 240
        while not self.engine.ready and not self.engine.failure and time.monotonic() < until:
            time.sleep(0.05)
        assert self.engine.ready and self.server.started

    def close(self):
        self.server.should_exit = True
        self.thread.join(90)
