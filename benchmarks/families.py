"""Every family's answers beside transformers' on a tiny random checkpoint of the tests, and docs/families.md out of them.

    python benchmarks/families.py            measures all families (needs llmjax[test]; a few minutes) and writes benchmarks/results/families.json and docs/families.md
    python benchmarks/families.py --table    writes docs/families.md from the figures that are kept

The figure is the greatest difference of the logits over their standard deviation, float32 on both sides.
"""
import argparse
import importlib
import json
import pathlib
import platform
import sys
import tempfile
from importlib.metadata import version
from typing import Any

import common

ROOT = pathlib.Path(__file__).parent.parent
DOC, KEPT = ROOT / "docs" / "families.md", common.RESULTS / "families.json"
HEADS = {"Model": "hidden states", "ForMaskedLM": "masked words", "ForSequenceClassification": "classes", "ForTokenClassification": "classes of tokens", "ForQuestionAnswering": "spans",
         "ForPreTraining": "replaced tokens"}
PROOF = {"grok1": "its published code written out in numpy (tests/checkpoint/test_grok1.py)"}


def cases() -> Any:
    """The module of the tests that makes tiny checkpoints."""
    sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module("test_pretrained")


def measure() -> dict[str, float]:
    from llmjax import pretrained
    tiny, found = cases(), {}
    for name in tiny.CASES:
        with tempfile.TemporaryDirectory() as folder:
            reference = tiny.theirs(name)
            reference.save_pretrained(folder)
            model, params, _ = pretrained.load(folder, dtype="float32")
            far = float(f"{tiny.far(tiny.ours(model, params), tiny.answer(reference)):.1e}")
            found[model.config.family] = max(far, found.get(model.config.family, 0.0))
            print(f"{name}: {far:.1e}", file=sys.stderr, flush=True)
    return found


def kind(name: str) -> str:
    """What a family's models are, and for encoders which heads are read."""
    from llmjax.checkpoint import PUBLISHED, to_model_config
    from llmjax.core.errors import CheckpointError
    from llmjax.core.model_config import LanguageHead, MaskedHead
    prefixes = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert", "electra": "Electra", "modernbert": "ModernBert", "deberta-v2": "DebertaV2"}
    if name == "deberta-v2-legacy":
        return "encoder: masked words, with the first release's head"
    if name not in prefixes:
        config = next((to_model_config(fields) for fields in PUBLISHED.values() if to_model_config(fields).family == name), None)
        return "encoder-decoder" if name == "mbart" or (config and config.encoder) else "decoder"
    fields = next(fields for fields in PUBLISHED.values() if to_model_config(fields).family == name)
    heads = []
    for ending, what in HEADS.items():
        try:
            config = to_model_config({**fields, "architectures": [prefixes[name] + ending]})
        except CheckpointError:
            continue
        assert not isinstance(config.head, LanguageHead)
        heads.append("next sentence" if isinstance(config.head, MaskedHead) and config.head.text else what)
    return f"encoder: {', '.join(heads)}"


def size(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 999.5e6 else f"{count / 1e6:.3g} M"


def table(differences: dict[str, float]) -> str:
    from llmjax import models
    from llmjax.checkpoint import FAMILIES, PUBLISHED, published
    from llmjax.checkpoint.gguf_models import ARCHITECTURES
    from llmjax.core.tree import size as count
    sizes: dict[str, list[str]] = {}
    for name in PUBLISHED:
        config = published(name)
        sizes.setdefault(config.family, []).append(f"{name} ({size(count(models.abstract_params(models.build(config))))})")
    holds = {family: arch for arch, entry in ARCHITECTURES.items() for family in entry.families}
    lines = ["| family (`model_type`) | models | GGUF | published sizes known by name | logits beside transformers' |", "|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        proof = f"{differences[name]:.0e}" if name in differences else PROOF[name]
        types = ", ".join(f"`{kind}`" for kind in family.model_types)
        lines.append(f"| {types} | {kind(name)} | {f'`{holds[name]}`' if name in holds else ''} | {', '.join(sizes.get(name, []))} | {proof} |")
    return "\n".join(lines)


def document(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"""# Families

Read from and written to the Hugging Face layout (safetensors; GPTQ, AWQ, FP8 and MXFP4 folders are read, dequantised). Decoders are trained by `llmjax train`, the others in a loop of
one's own; decoders and encoder-decoders are decoded with a cache. Parameters are counted by shape, without loading anything. The last column is the greatest difference of the logits
over their standard deviation, float32 on both sides, on a tiny random checkpoint written by transformers ({versions}).

This file is written by `python benchmarks/families.py`.

{table(found["differences"])}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing, write docs/families.md from the figures that are kept")
    if not parser.parse_args().table:
        common.RESULTS.mkdir(exist_ok=True)
        found = {"differences": measure(), "hardware": common.hardware(), "versions": {"python": platform.python_version(), **{p: version(p) for p in ("jax", "torch", "transformers")}}}
        KEPT.write_text(json.dumps(found, indent=1) + "\n")
    DOC.write_text(document(json.loads(KEPT.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
