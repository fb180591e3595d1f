"""The decoder-only language model.

Legend: B batch, T length, D embed, V vocabulary, P rows of a learned position table.

`model.apply({"params": params}, tokens, positions, segment_ids, cache) -> (logits, cache)`; its two parts answer by name: `method="features"` gives [B, T, D] before the
head, `method="unembed"` turns features into logits. One forward serves training, packing, prefill, chunked prefill and decoding.
"""
from __future__ import annotations

import dataclasses as dc
import operator
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, constrain, dot, platform, take
from llmjax.core.model_config import ModelConfig, unrolled
from llmjax.models.cache import Cache
from llmjax.models.context import Context, make_context
from llmjax.models.layer import Block, Cycle
from llmjax.models.layer_inputs import OwnInputs
from llmjax.models.module import Model, Module, Start, along, compact, rematerialised, scan, vector, weight
from llmjax.models.norms import Normalize


class Table(Module):
    """A weight on its own: `Table(name="embed", …)()` is params["embed"][key]."""
    key: str
    label: str
    shape: tuple[int, ...]
    compute: Compute

    @compact
    def __call__(self) -> Any:
        return weight(self, self.key, self.label, self.shape, Start(0.02))


class Head(Module):
    """Features [B, T, D] -> logits [B, T, V] float32; with `table` given the head is that embedding."""
    config: ModelConfig
    compute: Compute

    @compact
    def __call__(self, x: jax.Array, table: Any | None) -> jax.Array:
        c = self.config
        if table is not None:
            logits = dot("btd,vd->btv", x, table, out_dtype=jnp.float32)
        else:
            kernel = weight(self, "kernel", "embed -> vocab", (c.dim, c.vocab_size), Start(0.02))
            logits = dot("btd,dv->btv", x, kernel, out_dtype=jnp.float32)
        if c.head_bias:
            logits = logits + along(vector(self, "bias", "vocab", (c.vocab_size,)), logits)
        if c.logit_scale != 1.0:
            logits = logits * c.logit_scale
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)


class Decoder(Model):
    """A decoder-only language model; `compute.scan=False` sets every layer apart (`config` is then the unrolled one)."""
    config: ModelConfig
    compute: Compute = Compute()
    layout: Layout = Layout()

    def __post_init__(self):
        if not self.compute.scan and self.config.cycle:
            object.__setattr__(self, "config", unrolled(self.config))
        super().__post_init__()

    def setup(self):
        c, k = self.config, self.compute
        rest = (c.norm, k, self.layout)
        self.embed = Table("table", "vocab -> embed", (c.vocab_size, c.dim), k)
        if c.learned_positions:
            self.positions = Table("table", "position -> embed", (c.learned_positions, c.dim), k)
        if c.embed_norm:
            self.embed_norm = Normalize(c.norm, k)
        if c.layer_inputs:
            self.layer_inputs = OwnInputs(c.layer_inputs, len(c.layers), c.norm, k)
        apart = rematerialised(Block, k.remat, scanned=False)
        self.prefix = [apart(layer, *rest) for layer in c.prefix]
        if c.cycle:
            self.cycle = scan(rematerialised(Cycle, k.remat, scanned=True), c.repeats)(c.cycle, *rest)
        self.suffix = [apart(layer, *rest) for layer in c.suffix]
        if c.final_norm:
            self.final_norm = Normalize(c.norm, k)
        self.head = Head(c, k)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: Cache | None = None,
                 prefix: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        """tokens [B, T] int32; positions, segment_ids [B, T] int32 (0 is padding; tokens of a segment stand in order) -> (logits [B, T, V] float32, the cache with these tokens in it).

        prefix int32 [B] (or [B, T]: of each token's document): so many tokens at the start of a document see each other from both sides (prefix-LM: Raffel et al. 2019,
        arXiv:1910.10683, figure 4); with a cache all of them stand in one call. Raises ConfigError for a prefix where a layer has a window or is recurrent.
        """
        x, cache = self.features(tokens, positions, segment_ids, cache, prefix)
        return self.unembed(x), cache

    def features(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: Cache | None = None,
                 prefix: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        """-> ([B, T, D] in the computing dtype, cache): everything before the head."""
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        context = make_context(c, tokens, positions, segment_ids, cache, prefix)
        with jax.named_scope("embed"):
            x = take(self.embed(), tokens, dtype)
            if c.embed_scale != 1.0:
                x = x * jnp.asarray(c.embed_scale, dtype)
            if c.learned_positions:
                where = jnp.arange(tokens.shape[1])[None] if context.positions is None else context.positions
                x = x + take(self.positions(), where, dtype)
            if c.embed_norm:
                x = self.embed_norm(x)
            x = constrain(x, "batch length .", self.layout.rules)
        inputs = self.layer_inputs(tokens, x) if c.layer_inputs else None
        x, cache = self.run_layers(x, cache, context, inputs)
        return (self.final_norm(x) if c.final_norm else x), cache

    def run_layers(self, x: jax.Array, cache: Cache | None, context: Context, inputs: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        held: dict[str, Any] = dict(prefix=(None,) * len(self.prefix), cycle=None, suffix=(None,) * len(self.suffix)) if cache is None else cache.layers
        new: dict[str, Any] = {"prefix": [], "cycle": (), "suffix": []}
        for part, blocks in (("prefix", self.prefix), ("cycle", None), ("suffix", self.suffix)):
            if blocks is None:
                if self.config.cycle:
                    x, new["cycle"] = self.straight(x, context) if cache is None and self.unrolls() else self.cycle(x, held["cycle"], context)
                continue
            for block, stored in zip(blocks, held[part]):
                own = None if inputs is None else inputs[:, :, len(new[part])]
                x, kept, lent = block(x, stored, context, own)
                context = dc.replace(context, lent=context.lent | lent) if lent else context
                new[part].append(kept)
        if cache is None:
            return x, None
        layers = {part: tuple(kept) for part, kept in new.items()}
        return x, dc.replace(cache, layers=layers, slots={size: p.after for size, p in context.plans.items()}, empty=False)

    def unrolls(self) -> bool:
        return not self.is_initializing() and (platform() == "cpu" if self.compute.unroll is None else self.compute.unroll)

    def straight(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        """What `self.cycle` computes without a cache, as straight code over constant slices of the stacked weights: measured a quarter faster in training on a CPU."""
        c = self.config
        # lax.split: its gradient is one concatenation; that of indexing would be a padded sum of whole stacks
        parts = jax.tree.map(lambda w: jax.lax.split(w, (1,) * c.repeats), self.variables["params"]["cycle"])
        trip = rematerialised(Cycle, self.compute.remat, scanned=False)(c.cycle, c.norm, self.compute, self.layout, parent=None)
        told, asked = [], ["aux"] if self.is_mutable_collection("aux") else []
        for i in range(c.repeats):
            mine = jax.tree.map(operator.itemgetter(i), parts, is_leaf=lambda w: isinstance(w, list | tuple))
            (x, _), said = trip.apply({"params": jax.tree.map(lambda w: w[0], mine)}, x, None, context, mutable=asked)
            told.append(said.get("aux"))
        if told[0]:
            self.put_variable("aux", "cycle", jax.tree.map(lambda *y: jnp.stack(y), *told))
        return x, None

    def unembed(self, x: jax.Array) -> jax.Array:
        """Features [..., T, D] -> logits [..., T, V] float32."""
        with jax.named_scope("unembed"):
            return self.head(x, self.embed() if self.config.tied else None)
