"""Tokenizers made here: byte-level BPE trained on text, plain bytes, characters. All are objects of the `tokenizers` library and save as `tokenizer.json`."""
from collections.abc import Iterable, Iterator, Sequence

from llmjax.core.errors import ConfigError, DataError
from llmjax.tokenizers.tokenizer import Tokenizer, byte_alphabet

PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
"""GPT-4's cut into words (tiktoken `cl100k_base`): numbers in threes, line ends apart, contractions in any case."""

END = "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END,), *, eos: str | None = END, bos: str | None = None, pad: str | None = None,
              pattern: str = PATTERN, min_frequency: int = 2, chat_template: str | None = None, progress: bool = False) -> Tokenizer:
    """A byte-level BPE (Sennrich 2015; bytes as in GPT-2) of `vocab_size` tokens: `special_tokens` first, then the 256 bytes, then merges. Every text can be written in it.

    A text too small for so many merges gives fewer tokens (ask `.vocab_size`). The same texts give the same tokenizer.
    Raises ConfigError for a vocabulary under 256 + special tokens or an eos, bos, pad that is no special token, DataError for no text."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ConfigError(f"vocab_size {vocab_size} is too small for byte-level BPE: 256 bytes and {len(special_tokens)} special tokens need at least {least}")
    _check_roles(special_tokens, eos=eos, bos=bos, pad=pad)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(special_tokens), show_progress=progress,
                                  initial_alphabet=sorted(byte_alphabet()))
    backend.train_from_iterator(_nonempty(texts), trainer)
    return Tokenizer(backend, eos=eos, bos=bos, pad=pad, chat_template=chat_template)


def bytes_tokenizer(special_tokens: Sequence[str] = (END,), *, eos: str | None = END, bos: str | None = None, pad: str | None = None) -> Tokenizer:
    """The 256 bytes as ids 0 to 255, then the special tokens. Raises ConfigError for an eos, bos, pad that is no special token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    _check_roles(special_tokens, eos=eos, bos=bos, pad=pad)
    backend = tokenizers.Tokenizer(models.BPE(dict(byte_alphabet()), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    return Tokenizer(backend, eos=eos, bos=bos, pad=pad)


def characters_tokenizer(texts: Iterable[str], special_tokens: Sequence[str] = (), *, eos: str | None = None, bos: str | None = None, pad: str | None = None,
                         unk: str | None = None) -> Tokenizer:
    """Every character that the texts hold, in code point order, then the special tokens. A character that was not there is an error to encode, unless `unk` names a special
    token for it.
    Raises ConfigError for an eos, bos, pad, unk that is no special token, DataError for no text."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    _check_roles(special_tokens, eos=eos, bos=bos, pad=pad, unk=unk)
    characters: set[str] = set()
    for text in _nonempty(texts):
        characters.update(text)
    vocabulary = {token: id for id, token in enumerate([*sorted(characters), *special_tokens])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unk or "[UNK]"))  # without one in the vocabulary the library refuses unknown characters
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special_tokens])
    return Tokenizer(backend, eos=eos, bos=bos, pad=pad, unk=unk)


def _check_roles(special_tokens: Sequence[str], **roles: str | None):
    for role, text in roles.items():
        if text is not None and text not in special_tokens:
            raise ConfigError(f"the {role} token {text!r} is not among the special tokens {list(special_tokens)}")


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    """The texts; DataError where there is not one character in them."""
    some = False
    for text in texts:
        some = some or bool(text)
        yield text
    if not some:
        raise DataError("there is no text to make a tokenizer from: the source is empty")
