"""WordPiece vocabularies (BERT's `vocab.txt`: one piece a line, its id the line's number) as objects of the `tokenizers` library."""
import pathlib
from collections.abc import Mapping

from llmjax.core.errors import CheckpointError


def read(path: pathlib.Path, *, lower_case: bool = True, strip_accents: bool | None = None, chinese: bool = True, unk: str = "[UNK]", cls: str = "[CLS]", sep: str = "[SEP]",
         others: tuple[str, ...] = ("[PAD]", "[MASK]")):
    """-> `tokenizers.Tokenizer`, see `build`. Raises CheckpointError where a special token is no line of the file."""
    from tokenizers import AddedToken
    vocabulary = {line: i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines())}
    for token in (unk, cls, sep):
        if token not in vocabulary:
            raise CheckpointError(f"{path}: the special token {token!r} is not in it: the file is damaged, or belongs to another tokenizer")
    backend = build(vocabulary, lower_case=lower_case, strip_accents=strip_accents, chinese=chinese, unk=unk, cls=cls, sep=sep)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (unk, cls, sep, *others) if t in vocabulary])
    return backend


def build(vocabulary: Mapping[str, int], *, lower_case: bool = True, strip_accents: bool | None = None, chinese: bool = True, unk: str, cls: str, sep: str):
    """-> `tokenizers.Tokenizer` that cleans and splits texts as BERT's does (Devlin et al. 2019), with cls and sep around a text. lower_case, strip_accents (None: as lower_case),
    chinese (a word for each such character): as tokenizer_config.json says. Its special tokens are for the caller to add."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    backend = tokenizers.Tokenizer(models.WordPiece(dict(vocabulary), unk_token=unk, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=chinese, strip_accents=strip_accents, lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=[(t, vocabulary[t]) for t in (cls, sep)])
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend
