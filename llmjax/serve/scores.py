"""Log-probabilities of prompts that a request wants back, by `decode.score`."""
from __future__ import annotations

import asyncio
import dataclasses as dc
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp

from llmjax.core import chosen
from llmjax.decode.score import Score, score
from llmjax.serve.engine import Engine
from llmjax.serve.step import TOP


@dc.dataclass
class Scorer:
    """Beside the engine, in a thread of its own, a prompt at a time: few shapes, few programs."""
    engine: Engine
    thread: ThreadPoolExecutor = dc.field(default_factory=lambda: ThreadPoolExecutor(1, "score"))

    async def __call__(self, ids: list[int], adapter: str | None, best: int) -> Score:
        """best: how many alternatives each place gets, up to TOP. Raises what `decode.score` raises."""
        def work() -> Score:
            params = self.engine.params
            if len(self.engine.adapters) > 1:
                params = chosen(params, jnp.asarray([self.engine.adapters.index(adapter)], jnp.int32))
            with self.engine.on_mesh():
                found = score(self.engine.model, params, None, [ids], alternatives=min(TOP, self.engine.model.config.vocab_size) if best else 0)[0]
            return found if found.alternatives is None else dc.replace(found, alternatives=[None if x is None else x[:best] for x in found.alternatives])
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)
