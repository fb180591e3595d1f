"""How a model knows where a token stands: rotary positions and their scalings, ALiBi, relative positions. (A learned table is a number of ModelConfig, no positions are None.)"""
from __future__ import annotations

import dataclasses as dc
import math


@dc.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023)."""
    factor: float


@dc.dataclass(frozen=True)
class DynamicNtk:
    """The rotary base grows with the sequence once it is longer than `context` (dynamic NTK; as in transformers)."""
    factor: float
    context: int


@dc.dataclass(frozen=True)
class Yarn:
    """NTK-by-parts interpolation with a temperature on attention (Peng et al. 2023, arXiv:2309.00071)."""
    factor: float
    context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def temperature(self, mscale: float) -> float:
        """What sines and cosines are multiplied by so that scores stay as sharp (eq. 22; `mscale` as in DeepSeek-V2's code)."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dc.dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    context: int


@dc.dataclass(frozen=True)
class LongRope:
    """Each frequency divided by its own factor: one list up to `context` tokens, another for longer sequences (Ding et al. 2024, arXiv:2402.13753; Phi-3)."""
    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int
    attention_factor: float = 1.0


@dc.dataclass(frozen=True)
class Proportional:
    """The slowest pairs of each head stand still: the first `fraction` of the frequencies of the whole head, the others 0; all divided by `factor` (Gemma 4; as in transformers)."""
    fraction: float
    factor: float = 1.0


RopeScaling = LinearScaling | DynamicNtk | Yarn | Llama3Scaling | LongRope | Proportional


@dc.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021) on the first `fraction` of each head; pairs are (i, i + d/2), or neighbours when `interleaved`."""
    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None
    reverse: bool = False              # turned by minus the angle (nanochat)


@dc.dataclass(frozen=True)
class Alibi:
    """Scores fall by slope × distance instead of rotary positions (Press et al. 2021, arXiv:2108.12409); head i of a power of two of heads n has slope 2 ** (-max_bias · i / n)."""
    max_bias: float = 8.0
    scale: float = 1.0                 # on all slopes
    rounded: bool = False              # slopes rounded to bfloat16 (Falcon)


@dc.dataclass(frozen=True)
class RelativeBuckets:
    """One learned number per head and bucket of key position - query position, added to the scores; one table for all layers of a stack (T5; Raffel et al. 2020, section 2.1).
    Near distances have a bucket each, far ones share logarithmically; where attention is not causal, half of the buckets look ahead."""
    buckets: int = 32
    max_distance: int = 128


@dc.dataclass(frozen=True)
class Disentangled:
    """DeBERTa's attention (He et al. 2021, eq. 4): content to position and position to content beside content to content, all over sqrt(head_dim × number of terms).
    2 × `span` learned rows stand for the distances, near ones a row each; from span / 2 on they share logarithmically up to `max_distance` where `logarithmic`."""
    span: int
    max_distance: int
    logarithmic: bool = True
    content_to_position: bool = True
    position_to_content: bool = True
    shared: bool = True                # the rows pass through the layer's own query and key projections
    norm: bool = True                  # a norm on the rows

    @property
    def terms(self) -> int:
        return 1 + self.content_to_position + self.position_to_content


Relative = RelativeBuckets | Disentangled
