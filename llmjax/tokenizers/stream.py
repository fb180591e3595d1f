"""Streaming detokenisation: ids in one at a time, text out as soon as it is whole, never half a character. No tokenizer kinds here (`tokenizer.py`)."""
import codecs


class ByteStream:
    """For tokenizers whose tokens are bytes: the pieces' bytes go through an incremental UTF-8 decoder. The pushes' and the flush's text joined are `decode(ids)`, for any ids."""

    def __init__(self, token_bytes, skip: frozenset[int], strip_first_space: bool):
        """`token_bytes(id) -> bytes`; ids in `skip` give no text; `strip_first_space` drops the one space that SentencePiece writes before a text."""
        self._bytes, self._skip, self._strip = token_bytes, skip, strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _trim(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text[1:] if text[0] == " " else text
        return text

    def push(self, id: int) -> str:
        """The text that became certain with this id: maybe none, maybe several characters. Raises DataError for an id outside the vocabulary."""
        return "" if id in self._skip else self._trim(self._decoder.decode(self._bytes(id)))

    def flush(self) -> str:
        """What is left at the end: a character whose bytes never all came is U+FFFD. The stream starts anew after it."""
        return self._trim(self._decoder.decode(b"", final=True))


class WholeStream:
    """For tokenizers whose decoder looks at neighbours (WordPiece and the like): decodes all ids so far and gives what was added. A text that the decoder later changes is held
    back until `flush`."""

    def __init__(self, decode):
        self._decode, self._ids, self._sent = decode, [], ""

    def push(self, id: int) -> str:
        self._ids.append(id)
        text = self._decode(self._ids)
        if text.endswith("�") or not text.startswith(self._sent):
            return ""
        fresh, self._sent = text[len(self._sent):], text
        return fresh

    def flush(self) -> str:
        text = self._decode(self._ids)
        fresh = text[len(self._sent):] if text.startswith(self._sent) else ""
        self._ids, self._sent = [], ""
        return fresh
