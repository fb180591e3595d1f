"""Figures of models against published ones; each row says whose."""
import json

import pytest

from llmjax import cli
from llmjax.checkpoint.families import to_model_config
from llmjax.checkpoint.presets import llama, published
from llmjax.core import ConfigError
from llmjax.plan import chips, figures, roofline


@pytest.mark.parametrize("name, total, active", [
    ("llama-2-70b", 68.98e9, None), ("llama-3-8b", 8.030e9, None), ("llama-3.1-405b", 405.85e9, None), ("gpt-2", 124.44e6, None),
    ("mixtral-8x7b", 46.70e9, 12.88e9),            # arXiv:2401.04088: 46.7 B, 12.9 B used
    ("deepseek-v3", 671.0e9, 37.5e9),              # arXiv:2412.19437: 671 B, 37 B activated
    ("qwen3-30b-a3b", 30.5e9, 3.3e9),              # the model's card
])
def test_parameters(name, total, active):
    found = figures.of_model(published(name))
    assert found["parameters_total"] == pytest.approx(total, rel=0.002)
    assert found["parameters_active"] == pytest.approx(active or total, rel=0.02 if active else 0.002)


def test_cache_of_llama_2_70b():
    """8 KV heads, 4,096 tokens, FP16: 1.34 GB a row, 42.9 GB for 32."""
    config = published("llama-2-70b")
    assert figures.cache_bytes_per_token(config) * 4096 == pytest.approx(1.342e9, rel=1e-3)
    assert figures.cache_bytes(config, 1, 4096) == pytest.approx(1.342e9, rel=1e-3)
    assert figures.cache_bytes(config, 32, 4096) == pytest.approx(42.9e9, rel=2e-3)


def test_a_window_a_latent_and_a_state_take_what_they_keep():
    gemma = published("gemma3-1b")                 # 22 of 26 layers have a window of 512
    per_layer = 2 * 1 * 256 * 2
    assert figures.cache_bytes(gemma, 1, 4096) == per_layer * (4 * 4096 + 22 * 512)
    deepseek = published("deepseek-v3")
    assert figures.cache_bytes_per_token(deepseek) == 61 * (512 + 64) * 2           # arXiv:2412.19437: the latent and the shared rotary key
    hybrid = published("qwen3-next-80b-a3b")
    assert figures.cache_bytes_per_token(hybrid) == 12 * 2 * 2 * 256 * 2            # its 36 recurrent layers do not grow


@pytest.mark.parametrize("kind, size", [("float32", 28e9), ("bfloat16", 14e9), ("int8", 7e9), ("int4", 3.5e9)])
def test_memory_of_7b(kind, size):
    assert figures.weight_bytes(7e9, kind) == size


def test_nf4_with_double_quantisation_is_4_127_bits():
    assert figures.BITS["nf4"] == pytest.approx(4.127, abs=5e-4)


def test_65b_is_tuned_in_48_gb():
    """QLoRA (arXiv:2305.14314): a 65 B model on one 48 GB GPU; in 16 bits it is more than 780 GB with Adam."""
    config = to_model_config(llama(32_000, 8192, 22_016, 80, 64, 64, 2048), where="llama-65b")
    assert figures.of_model(config)["parameters_total"] == pytest.approx(65.3e9, rel=2e-3)
    found = figures.finetune_bytes(config, rank=64, rows=1, context=512)
    assert 36e9 < found["total"] < 48e9
    assert figures.finetune_bytes(config, rank=64, kind="bfloat16")["total"] > 130e9


def test_training_flops_and_days():
    """70 B on 2 T tokens: 8.4e23 FLOPs. 70 B on 15 T on 1,024 H100s at half of 989 TFLOP/s: 144 days (Stanford CS336, lecture 2)."""
    assert pytest.approx(8.4e23) == 6 * 70e9 * 2e12
    assert figures.of_model(published("llama-2-70b"))["flops_per_token_6n"] * 2e12 == pytest.approx(8.4e23, rel=0.02)
    assert roofline.training_days(6 * 70e9 * 15e12, chips.topology("h100:128x8"), 0.5) == pytest.approx(143.9, rel=0.005)
    assert roofline.training_days(8.4e23, chips.topology("h100:256x8"), 0.5) == pytest.approx(9.59, rel=0.005)
    for mfu in (0, 1.5):
        with pytest.raises(ConfigError, match="mfu"):
            roofline.training_days(8.4e23, chips.topology("h100:256x8"), mfu)


def test_chinchilla_tokens():
    assert figures.of_model(published("llama-2-70b"))["chinchilla_tokens"] == pytest.approx(1.4e12, rel=0.02)


def test_full_attention_counts_twice_the_causal_one():
    found = figures.of_model(published("llama-3-8b"), 8192)
    weights = found["flops_per_token"] - 12 * 32 * 32 * 128 * 8193 / 2
    assert found["flops_per_token_full_attention"] == pytest.approx(weights + 12 * 32 * 32 * 128 * 8192)


def test_command_line(capsys):
    assert cli.main(["plan", "--model=llama-3-8b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"parameters_total", "parameters_active", "flops_per_token_6n", "flops_per_token", "kv_cache_bytes_per_token", "chinchilla_tokens", "memory_bytes"} <= set(found)
    assert cli.main(["plan", "--model=llama-3-8b", "--context=4096"]) == 0
    assert "8.03 G" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [
    (["--model=llama-3-9b"], "llama-3-8b"), (["--model=bert-base"], "decoder"), (["--model=llama-3-8b", "--context=9999"], "8192"), ([], "one of --model"),
    (["--model=llama-3-8b", "--fit=x"], "one of --model"), (["--model=llama-3-8b", "--topology=v5e:2x2"], "--config"), (["--model=llama-3-8b", "--config.steps=3"], "no --config"),
    (["--config=configs/quickstart.py", "--compile"], "--topology"), (["--config=configs/quickstart.py", "--price=3"], "--topology"), (["--config=configs/quickstart.py", "--dump=x"], "--compile"),
    (["--config=configs/quickstart.py", "--topology=v5q:4x4"], "v5e"), (["--config=configs/quickstart.py", "--topology=v5e:3x3"], "2x4"),
    (["--config=configs/quickstart.py", "--topology=h100:3"], "h100:8"),
    (["--config=configs/pretrain.py:model=llama-9"], "llama-"), (["--config=configs/pretrain.py:model=qwen3-0.6b,suffix=28"], "suffix=28"), (["--fit=/nowhere"], "no such folder"),
    (["--config=configs/quickstart.py:size=tiny", "--topology=h100:8", "--compile"], "no TPUs"),
    (["--config=configs/quickstart.py:size=tiny", "--config.layout.tensor=3", "--topology=v5e:2x2"], "multiple of 3"),
    (["--config=configs/quickstart.py:size=tiny", "--config.batch_size=6", "--topology=v5e:2x2"], "batch_size=6"),
    (["--config=configs/quickstart.py:size=tiny", "--topology=v5e:2x2", "--mfu=2"], "--mfu=2"), (["--config=configs/quickstart.py:size=tiny", "--topology=v5e:2x2", "--price=-1"], "--price=-1"),
])
def test_bad_input_is_one_line(arguments, said, capsys):
    assert cli.main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out
