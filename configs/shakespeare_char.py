"""nanoGPT's small character model on one text file: 4 layers, 4 heads, width 128, batch 12, context 64, 2,000 steps, the last tenth held out.

    llmjax train --config=configs/shakespeare_char.py:path=tinyshakespeare.txt

Expected on tiny Shakespeare: validation loss at most 1.88 (nanoGPT's own figure for this size), in a few minutes on two CPU cores.
"""
from llmjax.core import AdamW, Attention, Compute, Layer, Mlp, ModelConfig, Norm, Rope, RunConfig, WarmupCosine
from llmjax.data import Characters, Corpus, Tail, TextFiles, Windows
from llmjax.objectives import NextToken


def get_config(path: str, vocab: int = 128) -> RunConfig:
    """path: a UTF-8 text; vocab: room for its different characters."""
    layer = Layer(Attention(4, 4, 32, Rope()), Mlp(352))
    return RunConfig(
        model=ModelConfig(vocab, 128, cycle=(layer,), repeats=4, norm=Norm(eps=1e-5), tied=True, context=64),
        data=Corpus(TextFiles(path), Characters(), validation=Tail(0.1), packing=Windows(), separator=None),
        objective=NextToken(),
        optimizer=AdamW(3e-3, b2=0.99),
        schedule=WarmupCosine(warmup=100),
        compute=Compute(dtype="float32"),
        steps=2000,
        batch_size=12,
        context=64,
        log_every=50,
        eval_every=500,
        checkpoint_every=500,
        sample="ROMEO:",
    )
