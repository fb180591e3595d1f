"""Which class of model a configuration is."""
from __future__ import annotations

from llmjax.core import Compute, Layout
from llmjax.core.model_config import LanguageHead, ModelConfig
from llmjax.models.decoder import Decoder
from llmjax.models.encoder import Encoder
from llmjax.models.encoder_decoder import EncoderDecoder


def build(config: ModelConfig, compute: Compute | None = None, layout: Layout | None = None) -> Decoder | Encoder:
    """An EncoderDecoder (which is a Decoder) where the configuration has an encoder, an Encoder where its head is not the language head, else a Decoder."""
    kind = EncoderDecoder if config.encoder else Decoder if isinstance(config.head, LanguageHead) else Encoder
    return kind(config, compute or Compute(), layout or Layout())
