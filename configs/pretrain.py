"""Any published size, trained from nothing: what `llmjax plan` is asked about, and what a pod runs once there is data for it.

    llmjax plan --config=configs/pretrain.py:model=llama-3-8b --config.layout.fsdp=256 --config.batch_size=1024 --config.context=2048 --topology=v5e:16x16
    llmjax train --config=configs/pretrain.py:model=llama-3-8b,text=/data/web,tokenizer=/models/llama-3 --config.layout.fsdp=256 --config.batch_size=1024

model: a name of llmjax/checkpoint/presets.py. text: files, a glob or a folder of .jsonl (field "text") or of plain text; without it the running Python's own standard library stands in,
which is enough to see that a run works. tokenizer: a folder in Hugging Face layout, a tokenizer.json or a SentencePiece .model; without it a byte-level BPE of at most the model's
vocabulary is trained on the text. suffix: so many of the repeated layers stand behind the others, each by itself, where a pipeline's stages do not divide them all (llama-3.1-405b has 126;
suffix=14 leaves 112 = 8 stages of 14). Expected: the loss of a size's first steps is near log(vocabulary); what it reaches is the data's affair.
"""
import dataclasses as dc

from llmjax.checkpoint.presets import published
from llmjax.core import AdamW, Compute, ConfigError, RunConfig, WarmupCosine
from llmjax.data import BestFit, Corpus, Fraction, JsonLines, StandardLibrary, TextFiles, TokenizerFile, TrainBpe
from llmjax.objectives import NextToken


def get_config(model: str = "smollm2-135m", text: str | None = None, tokenizer: str | None = None, suffix: int = 0) -> RunConfig:
    size = published(model)
    if suffix:
        if not 0 < suffix < size.repeats * len(size.cycle) or suffix % len(size.cycle):
            raise ConfigError(f"suffix={suffix}: {model} repeats {len(size.cycle)} layers {size.repeats} times; a multiple of {len(size.cycle)} below {size.repeats * len(size.cycle)} is wanted")
        times = suffix // len(size.cycle)
        size = dc.replace(size, repeats=size.repeats - times, suffix=size.cycle * times + size.suffix)
    plain = text is not None and text.endswith((".txt", ".md", "/"))
    source = StandardLibrary() if text is None else TextFiles(text) if plain else JsonLines(text)
    return RunConfig(
        model=size,
        data=Corpus(source, TrainBpe(min(size.vocab_size, 32_000)) if tokenizer is None else TokenizerFile(tokenizer), validation=Fraction(0.002), packing=BestFit()),
        objective=NextToken(),
        optimizer=AdamW(3e-4, weight_decay=0.1),
        schedule=WarmupCosine(warmup="1%"),
        compute=Compute(dtype="bfloat16", remat="full"),
        steps=10_000,
        batch_size=32,
        context=min(size.context, 2048),
        eval_every="5%",
        checkpoint_every="2%",
    )
