"""A layer: a mixer and a feed-forward joined by a wiring, which says where norms and residual sums stand.

A new kind of mixer or feed-forward is a dataclass in core/model_config.py, a module here in `models/`, and a row of the tables below.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from llmjax.core import Compute, Layout, constrain, dot, free_axes
from llmjax.core.model_config import Attention, GatedDelta, LatentAttention, Layer, LinearAttention, MixtureOfExperts, Mlp, Norm
from llmjax.models.attention import CrossAttention, MultiHeadAttention
from llmjax.models.cache import Entry, WithSource
from llmjax.models.context import Context, Seen
from llmjax.models.convolution import CentredConvolution
from llmjax.models.feed_forward import MultiLayerPerceptron, gate
from llmjax.models.gated_delta import GatedDeltaNet
from llmjax.models.latent_attention import MultiHeadLatentAttention
from llmjax.models.linear_attention import LinearMultiHeadAttention
from llmjax.models.mixture_of_experts import Experts
from llmjax.models.module import LAYER_INPUT, Module, compact, vector, weight
from llmjax.models.norms import Normalize
from llmjax.models.paged import InPages

MIXERS = {Attention: MultiHeadAttention, LatentAttention: MultiHeadLatentAttention, GatedDelta: GatedDeltaNet, LinearAttention: LinearMultiHeadAttention}
FEED_FORWARDS = {Mlp: MultiLayerPerceptron, MixtureOfExperts: Experts}

Sub = Callable[[jax.Array], jax.Array]


# Wirings: (x, mix, feed, norm, s) -> x, where norm(name) makes a norm and s scales what is added to the residual stream; those that know cross-attention take it last.

def pre(x, mix: Sub, feed: Sub, norm, s, cross: Sub | None = None):
    """GPT-2, Llama; T5."""
    x = x + s * mix(norm("norm_mixer")(x))
    if cross:
        x = x + s * cross(norm("norm_cross")(x))
    return x + s * feed(norm("norm_ffn")(x))


def post(x, mix: Sub, feed: Sub, norm, s):
    """OLMo 2: the norms on what is added."""
    x = x + s * norm("norm_mixer_out")(mix(x))
    return x + s * norm("norm_ffn_out")(feed(x))


def sandwich(x, mix: Sub, feed: Sub, norm, s):
    """Gemma 2 and 3: before and after."""
    x = x + s * norm("norm_mixer_out")(mix(norm("norm_mixer")(x)))
    return x + s * norm("norm_ffn_out")(feed(norm("norm_ffn")(x)))


def sandwich_open(x, mix: Sub, feed: Sub, norm, s):
    """Gemma 4's mixtures: the feed-forward has norms of its own on what it sees."""
    x = x + s * norm("norm_mixer_out")(mix(norm("norm_mixer")(x)))
    return x + s * norm("norm_ffn_out")(feed(x))


def parallel(x, mix: Sub, feed: Sub, norm, s):
    """GPT-J, Falcon 7B, Phi-2, Command-R."""
    h = norm("norm_mixer")(x)
    return x + s * (mix(h) + feed(h))


def parallel_two_norms(x, mix: Sub, feed: Sub, norm, s):
    """GPT-NeoX, Falcon 40B."""
    return x + s * (mix(norm("norm_mixer")(x)) + feed(norm("norm_ffn")(x)))


def after_sum(x, mix: Sub, feed: Sub, norm, s, cross: Sub | None = None):
    """BERT, BART and the first Transformer: the norms on the residual stream."""
    x = norm("norm_mixer_out")(x + s * mix(x))
    if cross:
        x = norm("norm_cross_out")(x + s * cross(x))
    return norm("norm_ffn_out")(x + s * feed(x))


def pre_ffn(x, mix: Sub, feed: Sub, norm, s):
    """ModernBERT's first layer: its input has just been normalised."""
    x = x + s * mix(x)
    return x + s * feed(norm("norm_ffn")(x))


WIRINGS = {"pre": pre, "post": post, "sandwich": sandwich, "sandwich_open": sandwich_open, "parallel": parallel, "parallel_two_norms": parallel_two_norms, "after_sum": after_sum,
           "pre_ffn": pre_ffn}


def divided(length: int, layout: Layout) -> bool:
    """Whether the residual stream of this length is divided further than the tokens a mixer or feed-forward sees: norms and sums then run on a share of them, and each tensor-parallel
    sum leaves as a reduce-scatter and comes back as an all-gather, together as many bytes as its all-reduce (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2)."""
    _, axes, parts = free_axes("residual", layout.rules)
    return axes != free_axes("length", layout.rules)[1] and length % parts == 0


def whole_within(sub: Sub, layout: Layout) -> Sub:
    """A mixer or feed-forward for such a stream."""
    return lambda h: constrain(sub(brought(layout, h)), "batch residual .", layout.rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def brought(layout: Layout, h: jax.Array) -> jax.Array:
    """h [B, T, D] with its length whole. Its gradient, a sum over the devices, leaves as a reduce-scatter; the transpose of the constraint would ask for all of it on every device: an all-reduce."""
    return constrain(h, "batch length .", layout.rules)


brought.defvjp(lambda layout, h: (brought(layout, h), None), lambda layout, _, g: (constrain(g, "batch residual .", layout.rules),))


class Block(Module):
    """x [B, T, D] -> ([B, T, D], the layer's cache, what it lends by name). `inputs` [B, T, P]: the layer's own, of models with LayerInputs."""
    layer: Layer
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, stored: Entry | None, context: Context, inputs: jax.Array | None = None) -> tuple[jax.Array, Entry | None, dict[str, Seen | InPages]]:
        layer, lent = self.layer, {}
        x = checkpoint_name(x, LAYER_INPUT) if self.compute.remat == "offload" else x
        box: list = [stored.own, stored.source] if isinstance(stored, WithSource) else [stored, None]

        def mix(h):
            with jax.named_scope("mixer"):
                y, box[0], *seen = MIXERS[type(layer.mixer)](layer.mixer, self.norm, self.compute, self.layout, name="mixer")(h, context, box[0])
                lent.update({layer.mixer.lends: seen[0]} if seen else {})
            return y

        def feed(h):
            with jax.named_scope("ffn"):
                ffn = FEED_FORWARDS[type(layer.ffn)](layer.ffn, self.compute, self.layout, name="ffn")
                return ffn(h, context.segments) if isinstance(layer.ffn, MixtureOfExperts) else ffn(h)

        def cross(h):
            with jax.named_scope("cross"):
                y, box[1] = CrossAttention(layer.cross, self.norm, self.compute, self.layout, name="cross")(h, context, box[1])
            return y

        def norm(name):
            return Normalize(self.norm, self.compute, name=name)
        within = whole_within if divided(x.shape[1], self.layout) else lambda sub, layout: sub
        entering = x
        x = WIRINGS[layer.wiring](x, within(mix, self.layout), within(feed, self.layout), norm, layer.residual_scale, **({"cross": within(cross, self.layout)} if layer.cross else {}))
        if layer.convolution:
            x = norm("norm_convolution_out")(x + CentredConvolution(layer.convolution, self.compute, name="convolution")(entering, context.segments))
        if inputs is not None:
            x = x + norm("norm_input_out")(self.own_input(x, inputs))
        if layer.output_scale:
            x = x * vector(self, "output_scale", "norm", (1,), 1.0).astype(x.dtype)[None, None]
        return constrain(x, "batch residual .", self.layout.rules), WithSource(*box) if isinstance(stored, WithSource) else box[0], lent

    def own_input(self, x: jax.Array, inputs: jax.Array) -> jax.Array:
        """inputs [B, T, P], gated by what x says of them -> [B, T, D]."""
        D, P = x.shape[-1], inputs.shape[-1]
        with jax.named_scope("own_input"):
            h = gate(self.layer.ffn.activation, dot("btd,dp->btp", x, weight(self, "input_gate", "embed -> norm", (D, P))), inputs)
            return dot("btp,pd->btd", h, weight(self, "input_projection", "norm -> embed", (P, D)))


class Cycle(Module):
    """One trip through the repeated unit; its layers are named "0", "1", …"""
    layers: tuple[Layer, ...]
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, stored: tuple[Entry, ...] | None, context: Context):
        new = []
        for i, layer in enumerate(self.layers):
            x, kept, _ = Block(layer, self.norm, self.compute, self.layout, name=str(i))(x, None if stored is None else stored[i], context)
            new.append(kept)
        return x, None if stored is None else tuple(new)
