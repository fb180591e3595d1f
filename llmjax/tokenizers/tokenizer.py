"""The tokenizer: every kind is an object of the `tokenizers` library inside, with ids of its special tokens, exact bytes per token, a chat template and a loss mask around it.

Made by `load.py` (files), `gguf.py`, `sentencepiece.py` (vocabularies rebuilt) and `train.py`. No jax.
"""
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from llmjax.core.errors import CheckpointError, DataError
from llmjax.tokenizers import chat
from llmjax.tokenizers.stream import ByteStream, WholeStream


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte (openai/gpt-2 `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text <-> ids.

    bos_id, eos_id, pad_id, unk_id: int | None. special_tokens: dict text -> id. vocab_size: the largest id + 1. A Tokenizer pickles, and is not changed after it is made
    (`with_chat_template` gives a new one).
    """

    def __init__(self, backend, *, bos: str | None = None, eos: str | None = None, pad: str | None = None, unk: str | None = None,
                 chat_template: str | Mapping[str, str] | None = None):
        """`backend` is a `tokenizers.Tokenizer`; bos, eos, pad, unk are texts of tokens. Raises CheckpointError for one that is not in the vocabulary."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.chat_template = dict(chat_template) if isinstance(chat_template, Mapping) else chat_template
        self._names = dict(bos=bos, eos=eos, pad=pad, unk=unk)
        for role, text in self._names.items():
            if text is not None and backend.token_to_id(text) is None:
                raise CheckpointError(f"the tokenizer's {role} token {text!r} is not in its vocabulary of {backend.get_vocab_size()} tokens")
        ids = {role: None if text is None else backend.token_to_id(text) for role, text in self._names.items()}
        self.bos_id: int | None = ids["bos"]
        self.eos_id: int | None = ids["eos"]
        self.pad_id: int | None = ids["pad"]
        self.unk_id: int | None = ids["unk"]
        self._added = backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {token.content: id for id, token in sorted(self._added.items()) if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        self.vocab_size: int = max([*backend.get_vocab(with_added_tokens=True).values(), -1]) + 1
        if not self.vocab_size:
            raise CheckpointError("the tokenizer's vocabulary is empty")
        self._kind, self._strip = _decoder_kind(backend.decoder)

    def __repr__(self):
        return f"Tokenizer(vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_id={self.eos_id}, pad_id={self.pad_id}, chat_template={'yes' if self.chat_template else 'no'})"

    def __getstate__(self):
        return dict(json=self.backend.to_str(), names=self._names, chat_template=self.chat_template)

    def __setstate__(self, state):
        import tokenizers
        self.__init__(tokenizers.Tokenizer.from_str(state["json"]), **state["names"], chat_template=state["chat_template"])

    # ids and text

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text. The text of a special token inside it becomes that token; `add_special_tokens` puts the ones the file asks for (bos, eos) around.
        Raises DataError for what is no text, holds half a surrogate pair, or cannot be written in this vocabulary."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of each; the library uses all cores for a long list."""
        try:
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]
        except Exception as error:
            raise self._explain(texts, error) from None

    def _explain(self, texts, error: Exception) -> Exception:
        for text in texts:
            if not isinstance(text, str):
                return DataError(f"a tokenizer encodes str, not {type(text).__name__} {str(text)[:60]!r}")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as wrong:
                return DataError(f"the text holds half a surrogate pair, {text[wrong.start]!r} at character {wrong.start}, which is no Unicode text: "
                                 "decode it from its bytes again")
        if "[UNK]" in str(error) or "unk" in str(error).lower():
            known = self.backend.get_vocab()
            strange = next((c for text in texts for c in text if c not in known), "?")
            return DataError(f"character {strange!r} (U+{ord(strange):04X}) is not in this tokenizer's vocabulary, and it has no unknown token")
        return DataError(f"the text cannot be encoded: {error}")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Raises DataError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if self._kind == "whole":
            for i in ids:
                self._check(i)
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        stream = self.stream(skip_special_tokens)
        table, skip = self._bytes, stream._skip
        for i in ids:
            if not 0 <= i < len(table):
                self._check(i)
        return stream._trim(b"".join([table[i] for i in ids if i not in skip]).decode("utf-8", "replace"))

    def stream(self, skip_special_tokens: bool = False, after: Sequence[int] = ()):
        """An incremental detokeniser: `.push(id) -> str`, `.flush() -> str`. `after` are ids that already stand (a prompt): their text is not given again, but the text that
        follows reads as a continuation of them (SentencePiece keeps its space then)."""
        skip = self._special_ids if skip_special_tokens else frozenset()
        whole = WholeStream(lambda ids: self.backend.decode(ids, skip_special_tokens=skip_special_tokens))
        made = whole if self._kind == "whole" else ByteStream(self.token_bytes, skip, self._strip)
        for id in after:
            made.push(int(id))
        return made

    def _check(self, id: int):
        if not 0 <= id < self.vocab_size:
            raise DataError(f"id {id} is outside this tokenizer's vocabulary of {self.vocab_size} tokens")

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for piece, id in self.backend.get_vocab(with_added_tokens=True).items():
            table[id] = piece.encode() if id in self._added else self._piece_bytes(piece)
        return table

    def _piece_bytes(self, piece: str) -> bytes:
        if self._kind == "byte_level":
            alphabet = byte_alphabet()
            return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()
        if self._kind == "sentencepiece":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes.fromhex(piece[3:5])
            return piece.replace("▁", " ").encode()
        if self._kind == "pieces":
            return piece.encode()
        return (piece[2:] if piece.startswith("##") else " " + piece).encode()  # WordPiece: a piece without ## opens a word

    def token_bytes(self, id: int) -> bytes:
        """The bytes this id stands for (a special token: its own text). Raises DataError for an id outside the vocabulary."""
        self._check(id)
        return self._bytes[id]

    def token_lengths(self) -> np.ndarray:
        """[vocab_size] int32: bytes of text per id, 0 for special tokens: what bits per byte divides by. (SentencePiece's added first space counts as one byte.)"""
        return np.array([0 if i in self._special_ids else len(b) for i, b in enumerate(self._bytes)], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides ids: the library's own JSON, which tokens are bos, eos and padding, the chat template."""
        whole = json.dumps([json.loads(self.backend.to_str()), self._names, self.chat_template], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    # chat

    def with_chat_template(self, template: str | Mapping[str, str] | None) -> "Tokenizer":
        """This tokenizer with another chat template (`llmjax.tokenizers.CHATML` for one trained here)."""
        import tokenizers
        return Tokenizer(tokenizers.Tokenizer.from_str(self.backend.to_str()), **self._names, chat_template=template)

    def render_chat(self, messages, add_generation_prompt: bool = False, tools=None, template: str | None = None, **variables) -> str:
        """The conversation as the text the model reads. `template` names one where the tokenizer has several; `variables` reach the template.
        Raises ConfigError without a template, DataError for a conversation it refuses."""
        messages, tools = chat.check_messages(messages), chat._plain(tools)
        named = {f"{role}_token": text for role, text in self._names.items() if text is not None}
        return chat.render(chat.choose(self.chat_template, template, tools), messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
                           **(named | variables))

    def apply_chat_template(self, messages, add_generation_prompt: bool = False, tools=None, **variables) -> list[int]:
        """`encode(render_chat(...))`: the template writes its own bos."""
        return self.encode(self.render_chat(messages, add_generation_prompt, tools, **variables))

    def chat_with_mask(self, messages, tools=None, **variables) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and for each whether it is the assistant's (its end-of-turn token included): what fine-tuning learns.

        The mask comes from rendering: an assistant turn begins where the conversation before it, rendered with a generation prompt, ends, in text and in ids, and ends where the
        conversation up to it ends (white space that the template writes after the end-of-turn token is not the assistant's). Raises DataError where the template does not render
        prefixes as prefixes (then the model would be trained on ids it never sees when it speaks) and where no turn is the assistant's."""
        messages = chat.check_messages(messages)
        ids = self.apply_chat_template(messages, False, tools, **variables)
        mask, turns = [False] * len(ids), [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns:
            before = self.apply_chat_template(messages[:i], True, tools, **variables)
            after = self._trim_tail(self.apply_chat_template(messages[:i + 1], False, tools, **variables))
            for what, part in (("before", before), ("through", after)):
                if ids[:len(part)] != part:
                    at = next((k for k, (a, b) in enumerate(zip(ids, part)) if a != b), min(len(ids), len(part)))
                    raise DataError(f"the chat template does not render the conversation {what} message {i} (assistant) as a beginning of the whole: "
                                    f"they part at token {at}, {self.decode(part[max(0, at - 3):at + 4])!r} against {self.decode(ids[max(0, at - 3):at + 4])!r}; "
                                    "split the conversation so that it ends with this turn, "
                                    "or use a template that keeps earlier turns as they were")
            mask[len(before):len(after)] = [True] * max(0, len(after) - len(before))
        if not any(mask):
            raise DataError(f"a conversation of {len(messages)} messages has nothing to train on: no assistant turn with text in it (roles {[m['role'] for m in messages]})")
        return ids, mask

    def _trim_tail(self, ids: list[int]) -> list[int]:
        """Without the white space that a template writes after its last special token."""
        last = max((k for k, i in enumerate(ids) if i in self._special_ids), default=-1)
        return ids[:last + 1] if last >= 0 and not self.decode(ids[last + 1:]).strip() else ids

    # files

    def save(self, folder) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (several: `additional_chat_templates/`): transformers and `load` read the same ids from
        them."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": int(1e30)}
        config |= {f"{role}_token": text for role, text in self._names.items() if text is not None}
        config["added_tokens_decoder"] = {str(id): dict(content=t.content, lstrip=t.lstrip, normalized=t.normalized, rstrip=t.rstrip, single_word=t.single_word, special=t.special)
                                          for id, t in sorted(self._added.items())}
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template} if self.chat_template else {}
        files = {"tokenizer.json": self.backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}
        files |= {"chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja": text for name, text in templates.items()}
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            part = path.with_name(path.name + ".partial")
            part.write_text(text, encoding="utf-8", newline="")
            part.replace(path)


def _decoder_kind(decoder) -> tuple[str, bool]:
    """How pieces become text: byte_level | sentencepiece (▁ and <0xXX>) | pieces (joined as they stand) | whole (the library's decoder sees all ids); and whether the first
    space goes."""
    if decoder is None:
        return "whole", False
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    names = [s["type"] for s in steps]
    if names == ["ByteLevel"]:
        return "byte_level", False
    if names == ["Fuse"]:
        return "pieces", False
    if names == ["Metaspace"] and steps[0]["replacement"] == "▁":
        return "sentencepiece", steps[0]["prepend_scheme"] != "never"
    if names and names[0] == "Replace" and steps[0]["pattern"] == {"String": "▁"} and steps[0]["content"] == " " and names[1:3] == ["ByteFallback", "Fuse"]:
        if not names[3:]:
            return "sentencepiece", False
        if names[3:] == ["Strip"] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (" ", 1, 0):
            return "sentencepiece", True
    return "whole", False

