"""A model behind HTTP as one call: `serve(model, …)` loads, builds, listens, and ends with SIGTERM after what runs is done."""
from __future__ import annotations

import contextlib
import dataclasses as dc
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from llmjax import pretrained
from llmjax.core import make_mesh
from llmjax.core.errors import ConfigError, MissingExtra
from llmjax.core.run_config import DType
from llmjax.serve import adapters
from llmjax.serve.engine import Engine, EngineSettings

log = logging.getLogger("llmjax.serve")


@dc.dataclass(frozen=True)
class ServerSettings:
    """What the command line sets; see `llmjax serve --help`. api_keys: in clear. adapters: name=path. drain: seconds that running requests get after SIGTERM."""
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    rate: str | None = None
    together: int | None = None
    timeout: float = 600.0
    body: int = 10 * 2**20
    drain: float = 60.0
    origins: tuple[str, ...] = ()
    certificate: str | None = None
    private_key: str | None = None
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    embedding_model: str | None = None
    answers_kept: int | None = None
    adapters: tuple[str, ...] = ()
    semantic: float | None = None


DEFAULT, ENGINE = ServerSettings(), EngineSettings()


def serve(model: str, settings: ServerSettings = DEFAULT, engine: EngineSettings = ENGINE, *, dtype: DType | None = None, tensor: int | None = None,
          quantize: str | None = None) -> int:
    """Serves until SIGTERM or SIGINT -> 0. Raises ConfigError, FileNotFoundError, CheckpointError for what the user can mend, MissingExtra without the packages."""
    try:
        import uvicorn

        from llmjax.serve.answers import Store
        from llmjax.serve.app import make_app
        from llmjax.serve.guard import JsonLines, Keys, Rates
        from llmjax.serve.metrics import Metrics
        from llmjax.serve.semantic import SemanticStore
        from llmjax.serve.service import Limits, Service, Speech
        from llmjax.serve.vectors import Embedder
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "serve", "llmjax serve") from None
    import jax
    check(settings)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    keys = Keys.read(settings.api_keys, settings.api_key_file) if settings.api_keys or settings.api_key_file else None
    rates = Rates(None if settings.rate is None else Rates.parse(settings.rate), settings.together)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    mesh = None if tensor is None else make_mesh(tensor=tensor)
    module, params, tokenizer = pretrained.load(model, dtype=dtype, mesh=mesh, quantize=quantize)
    if tokenizer is None:
        raise ConfigError(f"{model}: the checkpoint has no tokenizer; a server of texts needs one")
    metrics = Metrics()
    name = settings.name or pathlib.Path(model).name.removesuffix(".gguf") or model
    machine = Engine(module, params, tokenizer, engine, metrics, adapters.parse(settings.adapters, (name, *settings.aliases)))
    if settings.embedding_model is None:
        embedder = Embedder(machine.model, machine.params, tokenizer, module.config.context)
    else:
        other, weights, reader = pretrained.load(settings.embedding_model, dtype=dtype)
        embedder = Embedder(other, weights, reader, (other.config.encoder or other.config).context)
    service = Service(machine, name, metrics, Speech.of(tokenizer.chat_template, settings.tool_parser, settings.reasoning_parser), Limits(settings.timeout, settings.body), settings.aliases, embedder)
    if settings.answers_kept is not None:
        service.store = Store(settings.answers_kept, lambda found: metrics.stored.labels("exact", "hit" if found else "miss").inc())
    if settings.semantic is not None:
        service.semantic = SemanticStore(embedder, settings.semantic, seen=lambda found: metrics.stored.labels("semantic", "hit" if found else "miss").inc(),
                                         **({} if settings.answers_kept is None else {"size": settings.answers_kept}))
    app = make_app(service, keys=keys, rates=rates, origins=settings.origins)
    log.info("starting", extra={"fields": {"model": name, "dtype": dtype, "devices": str(jax.devices()[0].device_kind), "engine": machine.describe(), "host": settings.host, "port": settings.port,
                                           "adapters": list(service.adapters), "keys": 0 if keys is None else len(keys.digests)}})

    class Server(uvicorn.Server):
        """uvicorn's, with SIGTERM as the wish to end well: what runs is finished and the status is 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for s, old in before.items():
                    signal.signal(s, old)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if not service.draining:
                log.info("draining", extra={"fields": {"signal": signal.Signals(sig).name, "running": machine.waiting}})
            service.draining = True
            super().handle_exit(sig, frame)
    server = Server(uvicorn.Config(app, host=settings.host, port=settings.port, log_config=None, access_log=False, lifespan="on", timeout_keep_alive=75, timeout_graceful_shutdown=int(settings.drain),
                                   ssl_certfile=settings.certificate, ssl_keyfile=settings.private_key, server_header=False, h11_max_incomplete_event_size=64 * 1024))
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    try:
        server.run()
    except SystemExit:
        raise ConfigError(f"--port={settings.port}: the server cannot listen at {settings.host}:{settings.port}; is it taken?") from None
    log.info("stopped")
    if not machine.stopped:
        logging.shutdown()
        os._exit(0)                # a thread is within a compilation, and Python would end by aborting
    return 0


def check(settings: ServerSettings) -> None:
    """Raises ConfigError."""
    if not 0 < settings.port < 65536:
        raise ConfigError(f"--port={settings.port}: a port from 1 to 65535 is wanted")
    if settings.answers_kept is not None and settings.answers_kept < 1:
        raise ConfigError(f"--response-cache={settings.answers_kept}: a number of answers from 1 is wanted")
    if settings.semantic is not None and not 0 < settings.semantic <= 1:
        raise ConfigError(f"--semantic-cache={settings.semantic}: the least cosine of two questions that mean the same is wanted, above 0 and at most 1, as 0.95")
    if (settings.certificate is None) != (settings.private_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together")
    for option, file in (("tls-cert", settings.certificate), ("tls-key", settings.private_key)):
        if file is not None and not pathlib.Path(file).is_file():
            raise ConfigError(f"--{option}={file}: there is no such file")
