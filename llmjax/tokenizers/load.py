"""Tokenizers from files: a folder in Hugging Face layout, a `tokenizer.json`, a SentencePiece `.model`. Not here: GGUF metadata (`gguf.py`), the Hub."""
import json
import pathlib

from llmjax.core.errors import CheckpointError
from llmjax.tokenizers import sentencepiece, wordpiece
from llmjax.tokenizers.tokenizer import Tokenizer

ROLES = ("bos", "eos", "pad", "unk")
SETTINGS: dict = dict(                 # what tokenizer_config.json means where it does not say
    legacy=True,                       # SentencePiece's first space stands before every text, not before the first piece alone
    add_bos_token=False, add_eos_token=False,                                      # SentencePiece
    do_lower_case=True, strip_accents=None, tokenize_chinese_chars=True,           # WordPiece; strip_accents None: as do_lower_case
    chat_template=None, added_tokens_decoder={})
TOKEN = dict(lstrip=False, rstrip=False, normalized=False, special=True)           # an added token's marks


def load(path) -> Tokenizer:
    """The tokenizer at `path`: a folder (`tokenizer.json` before `tokenizer.model` before `vocab.txt`, with `tokenizer_config.json`, `special_tokens_map.json`, chat templates), or one of the two
    files. Of a single file the folder's other files are not read: it has no bos, eos or chat template besides what is inside.

    Raises FileNotFoundError where nothing is there, CheckpointError for a damaged file."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: it takes a folder in Hugging Face layout, a tokenizer.json or a SentencePiece .model")
    return Tokenizer(_json(path)) if path.suffix == ".json" else sentencepiece.read(path)


def _json(path: pathlib.Path):
    import tokenizers
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise CheckpointError(f"{path} is not a tokenizer.json or is damaged: {str(error)[:200]}") from None


def _read_json(path: pathlib.Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _folder(folder: pathlib.Path) -> Tokenizer:
    config = SETTINGS | _read_json(folder / "tokenizer_config.json")
    marks = _read_json(folder / "special_tokens_map.json")
    text = lambda token: token["content"] if isinstance(token, dict) else token
    names = {role: text(config.get(f"{role}_token") or marks.get(f"{role}_token")) for role in ROLES}
    templates = _templates(folder, config)
    models = [folder / name for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model") if (folder / name).is_file()]
    if (folder / "tokenizer.json").is_file():
        backend = _json(folder / "tokenizer.json")
    elif models:
        whole = "first" if config["legacy"] is False else "always"       # null means true there
        read = sentencepiece.read(models[0], add_bos=bool(config["add_bos_token"]), add_eos=bool(config["add_eos_token"]), prefix_scheme=whole)
        backend = read.backend
        names = {role: text or read._names[role] for role, text in names.items()}
    elif (folder / "vocab.txt").is_file():
        told = {role: said for role in ("unk", "cls", "sep") if (said := text(config.get(f"{role}_token", marks.get(f"{role}_token"))))}
        backend = wordpiece.read(folder / "vocab.txt", lower_case=config["do_lower_case"], strip_accents=config["strip_accents"], chinese=config["tokenize_chinese_chars"], **told)
        names = {"pad": "[PAD]" if backend.token_to_id("[PAD]") is not None else None, "unk": told.get("unk", "[UNK]")} | {role: text for role, text in names.items() if text}
    else:
        present = sorted(p.name for p in folder.iterdir())[:8]
        raise FileNotFoundError(f"no tokenizer in {folder}: neither tokenizer.json nor tokenizer.model nor vocab.txt (it holds {', '.join(present) or 'nothing'})")
    _add_missing(backend, config, _read_json(folder / "added_tokens.json"), folder)
    return Tokenizer(backend, **names, chat_template=templates)


def _add_missing(backend, config: dict, added: dict, folder: pathlib.Path):
    """Tokens that only the configuration lists (SentencePiece repositories put theirs there), each at the id it names."""
    from tokenizers import AddedToken
    listed = {int(id): token for id, token in config["added_tokens_decoder"].items()} | {int(id): {"content": text} for text, id in added.items()}
    for id, token in sorted(listed.items()):
        text = token["content"]
        if backend.token_to_id(text) is None:
            backend.add_tokens([AddedToken(text, **{mark: token.get(mark, usual) for mark, usual in TOKEN.items()})])
        if backend.token_to_id(text) != id:
            raise CheckpointError(f"{folder}: added token {text!r} is said to be {id}, but stands at {backend.token_to_id(text)} in the vocabulary: "
                                  "the files do not belong together")


def _templates(folder: pathlib.Path, config: dict) -> str | dict[str, str] | None:
    """chat_template.jinja and additional_chat_templates/*.jinja, else chat_template of the configuration: one text, or a list of named ones."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    single = folder / "chat_template.jinja"
    if single.is_file():
        found["default"] = single.read_text(encoding="utf-8")
    if not found:
        value = config["chat_template"] or _read_json(folder / "chat_template.json").get("chat_template")
        if not isinstance(value, list):
            return value
        found = {entry["name"]: entry["template"] for entry in value}
    return found["default"] if set(found) == {"default"} else found
