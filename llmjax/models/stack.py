"""A stack of layers between an embedding and a last norm: what decoders, encoders and encoder-decoders have in common.

Legend: B batch, T length, D embed, E width of the embedding (D unless it is factorised), V vocabulary, P rows of a learned position table.
"""
from __future__ import annotations

import dataclasses as dc
import operator
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, constrain, dot, platform, take
from llmjax.core.errors import ConfigError
from llmjax.core.model_config import ModelConfig, unrolled
from llmjax.core.positions import Disentangled, RelativeBuckets
from llmjax.kernels import lookup
from llmjax.models import pipeline, sequence
from llmjax.models.cache import Cache
from llmjax.models.context import Context, make_context
from llmjax.models.layer import Block, Cycle
from llmjax.models.layer_inputs import OwnInputs
from llmjax.models.module import Model, Module, Start, along, compact, rematerialised, scan, stacked_labels, vector, weight
from llmjax.models.norms import Normalize
from llmjax.models.paged import restart
from llmjax.models.relative import Distances, bucket_bias, row_index


class Table(Module):
    """A weight on its own: `Table(name="embed", …)()` is params["embed"][key]."""
    key: str
    label: str
    shape: tuple[int, ...]
    compute: Compute

    @compact
    def __call__(self) -> Any:
        return weight(self, self.key, self.label, self.shape, Start(0.02))


class Widen(Module):
    """Embeddings [B, T, E] -> [B, T, D], where the two widths differ."""
    dim: int
    bias: bool
    compute: Compute

    @compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = dot("bte,ed->btd", x, weight(self, "kernel", "factor -> embed", (x.shape[-1], self.dim)))
        return y + along(vector(self, "bias", "norm", (self.dim,)), y) if self.bias else y


class Stack(Model):
    """Embedding, layers, last norm; `compute.scan=False` sets every layer apart (`config` is then the unrolled one). What comes after the last norm is the subclass's."""
    config: ModelConfig
    compute: Compute = Compute()
    layout: Layout = Layout()

    def __post_init__(self):
        if not self.compute.scan and self.config.cycle:
            object.__setattr__(self, "config", unrolled(self.config))
        super().__post_init__()

    def setup(self):
        c, k = self.config, self.compute
        rest, width = (c.norm, k, self.layout), c.embed_dim or c.dim
        inner = c.dim if c.embed_proj_first else width
        self.embed = Table("table", "vocab -> embed" if width == c.dim else "vocab -> factor", (c.vocab_size, width), k)
        if c.learned_positions:
            self.positions = Table("table", "position -> embed", (c.learned_positions, inner), k)
        if c.token_types:
            self.types = Table("table", "position -> embed", (c.token_types, inner), k)
        if c.embed_norm:
            self.embed_norm = Normalize(c.norm, k)
        if width != c.dim:
            self.embed_proj = Widen(c.dim, c.embed_proj_bias, k)
        mixer = next(iter(c.relative_mixers), None)
        relative = mixer.relative if mixer else None
        if mixer and isinstance(relative, RelativeBuckets):
            self.relative = Table("table", "position -> heads", (relative.buckets, mixer.heads), k)
        elif isinstance(relative, Disentangled):
            self.relative = Table("table", "position -> embed", (2 * relative.span, c.dim), k)
            if relative.norm:
                self.relative_norm = Normalize(c.norm, k)
        if c.layer_inputs:
            self.layer_inputs = OwnInputs(c.layer_inputs, len(c.layers), c.norm, k)
        apart = rematerialised(Block, k.remat, scanned=False)
        self.prefix = [apart(layer, *rest) for layer in c.prefix]
        if c.cycle:
            self.cycle = scan(rematerialised(Cycle, k.remat, scanned=True), c.repeats)(c.cycle, *rest)
        self.suffix = [apart(layer, *rest) for layer in c.suffix]
        if c.final_norm:
            self.final_norm = Normalize(c.norm, k)

    def embedded(self, tokens: jax.Array, context: Context, table: Any, token_types: jax.Array | None = None) -> jax.Array:
        """tokens, token_types [B, T] int32 (types None: all 0), the embedding [V, E] -> [B, T, D] in the computing dtype."""
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        with jax.named_scope("embed"):
            x = lookup(table, tokens, dtype)
            if c.embed_proj_first:
                x = self.embed_proj(x)
            if c.embed_scale != 1.0:
                x = x * jnp.asarray(c.embed_scale, dtype)
            if c.learned_positions:
                where = jnp.arange(tokens.shape[1])[None] if context.positions is None else context.positions
                x = x + take(self.positions(), where + c.position_offset, dtype)
            if c.token_types:
                x = x + take(self.types(), jnp.zeros((1, 1), jnp.int32) if token_types is None else token_types, dtype)
            if c.embed_norm:
                x = self.embed_norm(x)
            if c.embed_dim not in (None, c.dim) and not c.embed_proj_first:
                x = self.embed_proj(x)
            return constrain(x, "batch residual .", self.layout.rules)

    def body(self, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None, cache: Cache | None, table: Any, token_types: jax.Array | None = None,
             prefix: jax.Array | None = None, **source: Any) -> tuple[jax.Array, Cache | None]:
        """-> ([B, T, D] in the computing dtype after the last norm, cache). source: what of the Context an encoder gives."""
        c, T = self.config, tokens.shape[1]
        if c.learned_positions and positions is None and cache is None and T + c.position_offset > c.learned_positions:
            raise ConfigError(f"{T} tokens: the model has {c.learned_positions - c.position_offset} learned positions; shorten the text")
        across = sequence.form(c, self.compute, self.layout, tokens.shape) if cache is None and prefix is None else None
        zigzag = across == "ring" and sequence.balanced(c)
        if zigzag:
            places = jnp.arange(T, dtype=jnp.int32)[None] if positions is None else positions
            tokens, positions, segment_ids, token_types = sequence.reorder((tokens, places, segment_ids, token_types), self.layout)
        context = dc.replace(make_context(c, tokens, positions, segment_ids, cache, prefix), across=across, zigzag=zigzag, **source)
        context = dc.replace(context, relative=self.distances(context, T))
        if cache is not None and context.paging is not None:
            cache = restart(cache, context.places(T), context.paging.used)
        x = self.embedded(tokens, context, table, token_types)
        x, cache = self.run_layers(x, cache, context, self.layer_inputs(tokens, x) if c.layer_inputs else None)
        x = self.final_norm(x) if c.final_norm else x
        return sequence.reorder(x, self.layout, back=True) if zigzag else x, cache

    def distances(self, context: Context, length: int) -> Distances | None:
        """What the layers share of relative positions. The keys are this call's own tokens where nothing older is in the cache, else the cache's (as in MultiHeadAttention.attend)."""
        mixer = next(iter(self.config.relative_mixers), None)
        if mixer is None:
            return None
        spec = mixer.relative
        mine = jnp.arange(length, dtype=jnp.int32)[None] if context.positions is None else context.positions
        keys = mine if not context.plans or (context.empty and length > 1) else context.plans[max(context.plans)].after.positions
        if isinstance(spec, RelativeBuckets):
            return Distances(bias=bucket_bias(spec, mixer.causal, self.relative(), mine, keys))
        assert isinstance(spec, Disentangled)
        rows = take(self.relative(), jnp.arange(2 * spec.span), jnp.dtype(self.compute.dtype))
        return Distances(rows=self.relative_norm(rows) if spec.norm else rows, index=row_index(spec, mine, keys))

    def run_layers(self, x: jax.Array, cache: Cache | None, context: Context, inputs: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        held: dict[str, Any] = dict(prefix=(None,) * len(self.prefix), cycle=None, suffix=(None,) * len(self.suffix)) if cache is None else cache.layers
        new: dict[str, Any] = {"prefix": [], "cycle": (), "suffix": []}
        for part, blocks in (("prefix", self.prefix), ("cycle", None), ("suffix", self.suffix)):
            if blocks is None:
                if self.config.cycle:
                    if cache is None and not self.is_initializing() and pipeline.pipelined(self.layout) > 1:
                        x, new["cycle"] = self.piped(x, context)
                    else:
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
        return x, dc.replace(cache, layers=layers, slots={size: p.after for size, p in context.plans.items()}, empty=False,
                             kept=None if context.eviction is None else context.eviction.after)

    def unrolls(self) -> bool:
        return not self.is_initializing() and (platform() == "cpu" if self.compute.unroll is None else self.compute.unroll)

    def piped(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        """What `self.cycle` computes without a cache, over the stages of a pipeline."""
        c, asked = self.config, ["aux"] if self.is_mutable_collection("aux") else []
        again = None if self.layout.ticks == "flat" else self.compute.remat
        trip = rematerialised(Cycle, again, scanned=True)(c.cycle, c.norm, self.compute, self.layout, parent=None)

        def stage(weights, x, context):
            def one(x, w):
                (x, _), said = trip.apply({"params": w}, x, None, context, mutable=asked)
                return x, said.get("aux")
            return jax.lax.scan(one, x, weights)
        known = stacked_labels(trip, x, None, context)
        x, said = pipeline.run(stage, self.variables["params"]["cycle"], known, x, context, self.layout, self.compute.dtype)
        if said:
            self.put_variable("aux", "cycle", said)
        return constrain(x, "batch residual .", self.layout.rules), None

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
