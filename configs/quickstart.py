"""A small decoder from nothing, on the text that comes with Python itself.

    llmjax train --config=configs/quickstart.py                  7 M parameters, three to five minutes on two CPU cores
    llmjax train --config=configs/quickstart.py:size=tiny        the smoke size, under a minute
    llmjax train --config=configs/quickstart.py:size=tiny,experts=4

The text is the source code and documentation strings of the standard library of the Python that runs it (no download); a byte-level BPE tokenizer is trained on it first.
Expected: see the table in the README. The warm-up is a number of steps, not a share: without one the first steps of Adam, each as large as the learning rate whatever the gradient,
make of the rounding differences between two layouts different choices of experts.
"""
from llmjax.core import AdamW, Attention, Compute, ConfigError, Layer, MixtureOfExperts, Mlp, ModelConfig, Norm, Rope, RunConfig, WarmupCosine
from llmjax.data import BestFit, Corpus, Fraction, StandardLibrary, TrainBpe
from llmjax.objectives import NextToken

SIZES = {
    "tiny": dict(vocab=512, dim=64, layers=4, heads=4, hidden=128, context=64, batch=16, steps=40, warmup=10, text=600_000),
    "7m": dict(vocab=4096, dim=256, layers=8, heads=4, hidden=704, context=256, batch=4, steps=320, warmup=16, text=12_000_000),
}


def get_config(size: str = "7m", experts: int | None = None) -> RunConfig:
    if size not in SIZES:
        raise ConfigError(f"size={size!r}: one of {', '.join(SIZES)} is wanted")
    s = SIZES[size]
    feed_forward = Mlp(s["hidden"]) if experts is None else MixtureOfExperts(experts, top_k=2, hidden=s["hidden"] // 2)
    layer = Layer(Attention(s["heads"], s["heads"], s["dim"] // s["heads"], Rope()), feed_forward)
    return RunConfig(
        model=ModelConfig(s["vocab"], s["dim"], cycle=(layer,), repeats=s["layers"], norm=Norm(eps=1e-5), tied=True, context=s["context"], family="llama" if experts is None else "mixtral"),
        data=Corpus(StandardLibrary(s["text"]), TrainBpe(s["vocab"]), validation=Fraction(0.03), packing=BestFit()),
        objective=NextToken(),
        optimizer=AdamW(2e-3, weight_decay=0.1),
        schedule=WarmupCosine(warmup=s["warmup"]),
        compute=Compute(dtype="bfloat16"),
        steps=s["steps"],
        batch_size=s["batch"],
        context=s["context"],
        log_every=s["steps"] // 8,
        eval_every="25%",
        checkpoint_every="25%",
        sample="def ",
    )
