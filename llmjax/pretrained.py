"""`load` and `save`: a model, its parameters and its tokenizer out of a checkpoint, and back into the Hugging Face layout.

    model, params, tokenizer = load("PATH | hf:org/name[@revision] | smollm2", dtype="bfloat16")
    save("out/", model, params, tokenizer)
"""
from __future__ import annotations

import dataclasses as dc
import pathlib
import warnings
from typing import Any

import jax
from tqdm import tqdm

from llmjax import models, quantization, tokenizers
from llmjax.checkpoint import fetch, folder, lora_folder, orbax_folder, safetensors_file, table
from llmjax.checkpoint.families import table_of
from llmjax.core.errors import CheckpointError, nearest
from llmjax.core.mesh import RULES, Layout, Rules, shardings
from llmjax.core.model_config import ModelConfig
from llmjax.core.run_config import Compute, DType
from llmjax.core.tree import flatten, nbytes


def locate(name: str | pathlib.Path) -> pathlib.Path:
    """The folder or GGUF file that a user's name means, fetched if need be.

    Raises FileNotFoundError for nothing of that name, CheckpointError for what cannot be fetched or is no checkpoint.
    """
    text = str(name)
    path = pathlib.Path(name).expanduser()
    if text.startswith("hf:"):
        return fetch.hub(text[3:])
    if path.is_dir():
        if (path / "hf" / "config.json").exists():
            return path / "hf"
        if orbax_folder.is_parameters(path) or orbax_folder.is_run(path):
            return path
        if (path / "checkpoints").is_dir() and ((not (path / "config.json").exists()) or orbax_folder.is_run_config(path)):
            raise FileNotFoundError(f"{path}: a run that has saved no model yet (there is no {path / 'hf'}); let it reach its end, or start it again on this folder")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            way = f"; load its folder {path.parent}" if path.suffix in (".safetensors", ".json") else ""
            raise CheckpointError(f"{path}: a .gguf file or a folder in Hugging Face layout is expected{way}")
        return path
    if text in fetch.KNOWN:
        return fetch.KNOWN[text]()
    hint = nearest(text, fetch.KNOWN) if "/" not in text else ""
    raise FileNotFoundError(f"{text}: there is no such folder or .gguf file, and no known model of that name{hint}; a model of the Hub is written hf:org/name")


def load(path: str | pathlib.Path, dtype: DType = "bfloat16", param_dtype: DType | None = None, mesh: jax.sharding.Mesh | None = None,
         rules: Rules = RULES, quantize: str | None = None, adapter: str | pathlib.Path | None = None) -> tuple[Any, dict[str, Any], tokenizers.Tokenizer | None]:
    """(model, params, tokenizer) of a checkpoint.

    path: a folder in Hugging Face layout, a `.gguf` file, the folder of a run, "hf:org/name[@revision]", or "smollm2".
    dtype: what is computed in; param_dtype: what the weights are kept in (None: the same). mesh: the weights go straight to where `rules` lay them; None: the default device.
    quantize: "int8" turns matrices into int8 leaves once they are read (quantization.quantize), for decoding and for adapters on top.
    adapter: the folder of a LoRA adapter as PEFT writes it, or "hf:org/name": Lora leaves around the weights it adds to.
    -> a Flax module, nested dicts of arrays, and a tokenizer or None where there is none.
    Raises FileNotFoundError, CheckpointError (a file that is damaged, incomplete, of an unknown family or of another model than its config), ConfigError, ShardingError.
    """
    place = locate(path)
    compute = Compute(dtype=dtype, param_dtype=param_dtype or dtype)
    config, source, rows = open_checkpoint(place)
    tokenizer = read_tokenizer(place, source)
    model = models.build(with_ids(config, tokenizer) if orbax_folder.is_run(place) else config, compute, Layout(rules=rules))
    like = models.abstract_params(model)
    if mesh is not None:
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings(models.labels(model), like, mesh, rules))
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, place)
    if isinstance(source, orbax_folder.Parameters):
        return model, adapted(model, quantized(model, source.load(like), quantize), adapter), tokenizer
    sizes = flatten(like)
    with tqdm(total=nbytes(like), desc="weights", unit="B", unit_scale=True, delay=1.0, disable=None, leave=False) as bar:
        params = table.load(source, rows, like, lambda name: bar.update(sizes[name].size * sizes[name].dtype.itemsize))
    return model, adapted(model, quantized(model, params, quantize), adapter), tokenizer


def quantized(model: Any, params: Any, kind: str | None) -> Any:
    return params if kind is None else quantization.quantize(models.labels(model), params, kind, donate=True)


def adapted(model: Any, params: Any, path: str | pathlib.Path | None) -> Any:
    return params if path is None else lora_folder.with_lora(params, read_adapter(model, path))


def read_adapter(model: Any, path: str | pathlib.Path) -> lora_folder.Adapter:
    """What a LoRA adapter (a folder as PEFT writes it, or "hf:org/name[@revision]") adds to the parameters of this model, its layers stacked or apart.
    Raises FileNotFoundError, CheckpointError."""
    place = fetch.hub(str(path)[3:]) if str(path).startswith("hf:") else pathlib.Path(path).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder; an adapter's folder holds adapter_config.json and adapter_model.safetensors")
    return lora_folder.read(place, table_of(model.config), models.labels(model), models.abstract_params(model))


def open_checkpoint(place: pathlib.Path) -> tuple[ModelConfig, Any, table.Table]:
    """(configuration, source of tensors, table) of a folder or a GGUF file; stored parameters (Orbax) have no table."""
    if orbax_folder.is_parameters(place) or orbax_folder.is_run(place):
        return *orbax_folder.open_folder(place), table.Table(())
    if place.suffix == ".gguf" and place.is_file():
        from llmjax.checkpoint import gguf_file, gguf_models
        file = gguf_file.Gguf(place)
        return gguf_models.to_model_config(file), file, gguf_models.table(file)
    config = folder.read_config(place)
    return config, folder.open_weights(place), table_of(config)


def read_tokenizer(place: pathlib.Path, source: Any) -> tokenizers.Tokenizer | None:
    if place.is_file():
        return tokenizers.from_gguf(source.fields) if source.fields.get("tokenizer.ggml.model", "no_vocab") != "no_vocab" else None
    place = place / "data" / "tokenizer" if orbax_folder.is_run(place) else place
    if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")):
        return tokenizers.load(place)
    return None


def with_ids(config: ModelConfig, tokenizer: tokenizers.Tokenizer | None) -> ModelConfig:
    """A configuration with the tokenizer's special ids where it names none."""
    if tokenizer is None:
        return config
    ends = config.end_tokens or (() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    start, pad = (mine if mine is not None else theirs for mine, theirs in ((config.bos_token, tokenizer.bos_id), (config.pad_token, tokenizer.pad_id)))
    return dc.replace(config, end_tokens=ends, bos_token=start, pad_token=pad)


def check_vocabulary(tokenizer: tokenizers.Tokenizer, config: ModelConfig, place: pathlib.Path) -> None:
    """Raises CheckpointError where the tokenizer makes ids the model has no row for.

    Special tokens beyond the table only warn: published text models have some that belong to their larger kin (Gemma 3 1B's tokenizer has the picture token).
    """
    if tokenizer.vocab_size <= config.vocab_size:
        return
    special = set(tokenizer.special_tokens.values())
    beyond = [text for text, i in tokenizer.backend.get_vocab(with_added_tokens=True).items() if i >= config.vocab_size]
    if any(tokenizer.backend.token_to_id(text) not in special for text in beyond) or len(beyond) > 16:
        raise CheckpointError(f"{place}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {config.vocab_size}; one of the two belongs to another model")
    warnings.warn(f"{place}: the special tokens {', '.join(sorted(beyond)[:4])} lie beyond the model's vocabulary of {config.vocab_size}; do not use them", stacklevel=3)


def save(path: str | pathlib.Path, model: Any, params: dict[str, Any], tokenizer: tokenizers.Tokenizer | None = None,
         shard_bytes: int = safetensors_file.SHARD_BYTES) -> None:
    """Writes a folder in Hugging Face layout, which transformers reads: config.json, generation_config.json, safetensors (several files over `shard_bytes`), the tokenizer's files.

    The weights are written in the dtype they have; array leaves (LoRA, int8, transposed) are made dense; the layers may be stacked or apart.
    What stands in the folder stays until all is written.
    Raises CheckpointError where the model's family cannot express it, where params are another model's, and where the disk is full.
    """
    target, config = pathlib.Path(path).expanduser(), model.config
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, target)
    given = check_params(target, model, params, table_of(config))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    with tqdm(total=given, desc=f"saving {total / 1e9:.2f} GB", unit="tensor", delay=1.0, disable=None, leave=False) as bar:
        folder.write(target, config, params, tokenizer.save if tokenizer is not None else None, shard_bytes, lambda _: bar.update())


def check_params(target: pathlib.Path, model: models.Decoder, params: dict[str, Any], rows: table.Table) -> int:
    """How many tensors a table makes of the parameters. Raises CheckpointError, naming the first tensor, where they are not this model's."""
    wanted = {cell.name: cell.shape for cell in table.cells(rows, flatten(models.abstract_params(model)))}
    given = {cell.name: cell.shape for cell in table.cells(rows, flatten(params))}
    for name in sorted({**wanted, **given}):
        if wanted.get(name) != given.get(name):
            raise CheckpointError(f"{target}: params are not this model's: {name!r} would be {given.get(name, 'absent')}, model.config makes it {wanted.get(name, 'absent')}")
    return len(given)
