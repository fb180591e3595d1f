"""What to train on: sources, what of a record is learnt, the tokenizer, the held-out part, the packing. Frozen dataclasses, the only home of their defaults; no work here."""
from dataclasses import dataclass

from llmjax.core.errors import ConfigError


def _check_fraction(name: str, fraction: float):
    if not 0 < fraction < 1:
        raise ConfigError(f"{name}.fraction {fraction} must lie between 0 and 1")


# what of a record is learnt (a plain string is the name of a text field, all of it learnt)


@dataclass(frozen=True)
class Chat:
    """A list of {"role", "content"} under `field`, written by the tokenizer's chat template; only the assistant's turns are learnt."""
    field: str = "messages"


@dataclass(frozen=True)
class Completion:
    """Two text fields, one after the other; only the completion is learnt, with the separator after it."""
    prompt: str = "prompt"
    completion: str = "completion"


Field = str | Chat | Completion

# sources


@dataclass(frozen=True)
class TextFiles:
    """Plain UTF-8 files. `paths`: files, globs, or folders (all files below whose name ends in one of `suffixes`); `.gz` and `.zst` are unpacked. One document per file, or per
    stretch between two `split`s (for instance "\\n\\n" or "<|endoftext|>")."""
    paths: tuple[str, ...] | str
    split: str | None = None
    suffixes: tuple[str, ...] = (".txt", ".md")


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line: `.jsonl`, `.jsonl.gz`, `.jsonl.zst` (folders: all of these below)."""
    paths: tuple[str, ...] | str
    field: Field = "text"


@dataclass(frozen=True)
class Parquet:
    """Parquet files, one record a row."""
    paths: tuple[str, ...] | str
    field: Field = "text"


@dataclass(frozen=True)
class Tfds:
    """A TFDS data set prepared as array_record or parquet, read without TensorFlow. `data_dir` is TFDS' own folder of data sets, or the folder of one prepared version (then
    `name` may be None)."""
    name: str | None = None
    split: str = "train"
    data_dir: str | None = None
    field: Field = "text"


@dataclass(frozen=True)
class StandardLibrary:
    """Text that is on every machine with Python: the sources of the running Python's own standard library (English documentation strings and comments, and code), a document per
    module, in the order of their names, up to `max_bytes`. Tests, generated tables and vendored packages are left out. Another version of Python has other text."""
    max_bytes: int = 12_000_000


Single = TextFiles | JsonLines | Parquet | Tfds | StandardLibrary


@dataclass(frozen=True)
class Part:
    source: Single
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Several sources, drawn row by row in proportion to their weights; each is gone through in its own epochs."""
    parts: tuple[Part, ...]


Source = Single | Mixture

# tokenizers


@dataclass(frozen=True)
class TrainBpe:
    """Byte-level BPE trained on the training part of the source, on its first `max_bytes` bytes of text."""
    vocab_size: int = 8192
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    eos: str | None = "<|endoftext|>"
    bos: str | None = None
    pad: str | None = None
    chat_template: str | None = None
    max_bytes: int = 100_000_000


@dataclass(frozen=True)
class TokenizerFile:
    """A folder in Hugging Face layout, a tokenizer.json or a SentencePiece .model."""
    path: str


@dataclass(frozen=True)
class Bytes:
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    eos: str | None = "<|endoftext|>"


@dataclass(frozen=True)
class Characters:
    """Every character of the source, held-out part included."""


TokenizerSpec = TrainBpe | TokenizerFile | Bytes | Characters

# the held-out part


@dataclass(frozen=True)
class Fraction:
    """Documents whose hash falls under `fraction`: the same documents in every run, wherever they stand."""
    fraction: float = 0.02

    def __post_init__(self):
        _check_fraction("Fraction", self.fraction)


@dataclass(frozen=True)
class Tail:
    """The end of the text: its last `fraction` of characters. The document that the cut falls into is divided."""
    fraction: float = 0.1

    def __post_init__(self):
        _check_fraction("Tail", self.fraction)


@dataclass(frozen=True)
class HeldOut:
    """Another source."""
    source: Single


Validation = Fraction | Tail | HeldOut | None

# packing


@dataclass(frozen=True)
class BestFit:
    """Documents whole, several to a row, by best-fit decreasing; those longer than a row are divided into full rows and a rest."""


@dataclass(frozen=True)
class Concatenate:
    """Documents one after the other, chopped into rows: no padding, documents divided where a row ends."""


@dataclass(frozen=True)
class Windows:
    """Stretches at random places of all text as one stream (documents are not told apart), as nanoGPT does. An epoch is as many rows as would fill the stream once."""


Packing = BestFit | Concatenate | Windows


@dataclass(frozen=True)
class Corpus:
    """`separator`: what stands around each document of text: "eos" after it, "bos" before it, "both", or None (chat conversations have the template's own).
    `empty`: whether a document without text is an "error" or is left out ("skip"; the manifest counts them)."""
    source: Source
    tokenizer: TokenizerSpec = TrainBpe()
    validation: Validation = Fraction()
    packing: Packing = BestFit()
    separator: str | None = "eos"
    empty: str = "error"
    shard_bytes: int = 16_000_000  # of text; one shard is what a worker does at a time

    def __post_init__(self):
        if self.separator not in ("eos", "bos", "both", None):
            raise ConfigError(f"Corpus.separator {self.separator!r} is not one of 'eos', 'bos', 'both', None")
        if self.empty not in ("error", "skip"):
            raise ConfigError(f"Corpus.empty {self.empty!r} is not one of 'error', 'skip'")
        if self.shard_bytes < 1:
            raise ConfigError(f"Corpus.shard_bytes {self.shard_bytes} must be at least 1")
        if isinstance(self.source, Mixture):
            if not self.source.parts:
                raise ConfigError("Mixture.parts is empty: name at least one Part(source, weight)")
            for i, part in enumerate(self.source.parts):
                if not part.weight > 0:
                    raise ConfigError(f"Mixture.parts[{i}].weight {part.weight} must be above 0")
                if isinstance(part.source, Mixture):
                    raise ConfigError(f"Mixture.parts[{i}] is a Mixture: put its parts into the outer one")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources with their weights; a single source is a mixture of one."""
        return self.source.parts if isinstance(self.source, Mixture) else (Part(self.source),)
