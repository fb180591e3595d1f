"""SentencePiece `.model` files (BPE and Unigram, byte fallback, normalisation tables), the same ids as the `sentencepiece` library. The vocabulary itself is built in
`pieces.py`."""
import pathlib

from llmjax.core.errors import CheckpointError
from llmjax.tokenizers import pieces
from llmjax.tokenizers.tokenizer import Tokenizer


def read(path, *, add_bos: bool = False, add_eos: bool = False, prefix_scheme: str = "always", chat_template=None) -> Tokenizer:
    """The tokenizer in a SentencePiece model file. `add_bos` and `add_eos` say what `encode(add_special_tokens=True)` puts around (transformers keeps that in
    `tokenizer_config.json`).

    Control symbols (`<s>`) that stand in a text become their ids, as in transformers; the library itself spells them out.
    Raises FileNotFoundError, CheckpointError for a damaged file or a kind of model that is not BPE or Unigram."""
    from sentencepiece import sentencepiece_model_pb2
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no SentencePiece model at {path}")
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        raise CheckpointError(f"{path} is not a SentencePiece model or is damaged: {error}") from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kind = {1: "unigram", 2: "bpe"}.get(trainer.model_type)
    if not len(proto.pieces):
        raise CheckpointError(f"{path} holds no pieces: it is not a SentencePiece model or is cut short")
    if kind is None:
        raise CheckpointError(f"{path} is a SentencePiece model of kind {trainer.model_type} (word or char); BPE and Unigram are read")
    if trainer.treat_whitespace_as_suffix:
        raise CheckpointError(f"{path} writes spaces after words (treat_whitespace_as_suffix), which is not supported")
    texts, types = [p.piece for p in proto.pieces], [p.type for p in proto.pieces]
    unk_id = next((i for i, t in enumerate(types) if t == pieces.UNKNOWN), None)
    table = pieces.Pieces(texts, [p.score for p in proto.pieces], types, unk_id, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces,
                          normalizer.precompiled_charsmap, normalizer.escape_whitespaces, prefix_scheme)
    backend = pieces.build(table, kind == "unigram", str(path))

    def present(text: str) -> str | None:
        return text if text in texts and types[texts.index(text)] in (pieces.CONTROL, pieces.UNKNOWN, pieces.USER_DEFINED) else None

    bos, eos = present(trainer.bos_piece), present(trainer.eos_piece)
    pieces.wrap_ids(backend, texts, texts.index(bos) if add_bos and bos else None, texts.index(eos) if add_eos and eos else None)
    return Tokenizer(backend, bos=bos, eos=eos, pad=present(trainer.pad_piece), unk=None if unk_id is None else texts[unk_id], chat_template=chat_template)
