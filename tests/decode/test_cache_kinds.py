"""What a cache takes is known before it is made, for every kind; kinds by name; what `llmjax plan` prints of them."""
import json

import jax
import pytest
from jax.sharding import PartitionSpec

from llmjax import cli, decode
from llmjax.core import Attention, Compute, ConfigError, GatedDelta, Layer, Mlp, ModelConfig, Rope, make_mesh
from llmjax.core.model_config import LatentAttention
from llmjax.models import Decoder, HeavyHitters, Streaming

FULL, RING = Layer(Attention(4, 2, 8, Rope()), Mlp(8)), Layer(Attention(4, 2, 8, Rope(), window=6), Mlp(8))
STATE, LATENT = Layer(GatedDelta(4, 2, 8, 6), Mlp(8)), Layer(LatentAttention(4, 12, 6, 8, 10), Mlp(8))
MODEL = Decoder(ModelConfig(61, 32, prefix=(STATE,), cycle=(FULL, RING), repeats=2, context=64), Compute("bfloat16"))
LATENTS = Decoder(ModelConfig(61, 32, cycle=(LATENT,), repeats=2, context=64), Compute("float32"))


@pytest.mark.parametrize("model", [MODEL, LATENTS], ids=["attention, ring, state", "latents"])
@pytest.mark.parametrize("kind", ["contiguous", "float32", "int8", "int4", "int8/int4", "paged", "paged=8,int8", "int4,paged", "streaming=3+9", "heavy=8+8,float32"])
def test_bytes_are_those_allocated(model, kind):
    if model is LATENTS and kind[0] in "sh":
        pytest.skip("latent attention has no such rule")
    cache = decode.make_cache(model, 3, 50, kind)
    assert decode.cache_bytes(decode.make_cache, model, 3, 50, kind) == sum(x.nbytes for x in jax.tree.leaves(cache)) > 0


def test_where_a_cache_lies_on_a_mesh():
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    for kind in ("bfloat16", "paged=8,int8", "streaming=3+9"):
        cache = jax.eval_shape(lambda kind=kind: decode.make_cache(MODEL, 3, 50, kind))
        for path, sharding in jax.tree_util.tree_flatten_with_path(decode.cache_shardings({"cache": cache}, mesh))[0]:
            heads = any(getattr(key, "name", "") in ("k", "v") for key in path)
            spread = [axis for axis in sharding.spec if axis is not None]
            assert len(spread) == heads and sharding.spec[-1:] == tuple(spread), path                          # the last but one dimension, [..., K, H], or nothing
    latents = decode.cache_shardings(jax.eval_shape(lambda: decode.make_cache(LATENTS, 3, 50)), mesh)
    assert {s.spec for s in jax.tree.leaves(latents)} == {PartitionSpec()}                                   # one head for all devices


def test_bytes_by_hand():
    """Of one attention layer with 2 heads of 8: keys and values of 50 positions, their slots (two int32), scales (bfloat16)."""
    model = Decoder(ModelConfig(61, 32, prefix=(FULL,), context=64), Compute("bfloat16"))
    size = lambda kind: decode.cache_bytes(decode.make_cache, model, 1, 50, kind)
    numbers, slots = 2 * 50 * 2 * 8, 50 * 8
    assert size("bfloat16") == 2 * numbers + slots and size("int8") == numbers + 2 * numbers // 8 + slots
    assert 2 * size("int8/int4") == size("int8") + size("int4")
    assert size("int4") == numbers // 2 + 2 * 2 * numbers // 8 + slots                                       # a scale and a smallest value for 8 numbers
    assert size("paged=16") == 4 * 16 * 2 * 2 * 8 * 2 + 4 * 4                                                # four pages and their table
    assert size("streaming=2+8") == 2 * 10 * 2 * 8 * 2 + 10 * 8 and size("heavy=2+8") == 10 * 2 * (2 * 8 * 2 + 8)
    assert decode.cache_bytes(decode.init_paged, model, 1, 4, length=50) == size("paged")


def test_kinds_have_names():
    assert decode.make_cache(MODEL, 1, 50, "paged=8,int8").page == 8 and decode.make_cache(MODEL, 1, 50, "streaming=3+9").policy == Streaming(3, 9)
    assert decode.make_cache(MODEL, 1, 50, "heavy").policy == HeavyHitters()
    for kind in ("contiguous", "int8", "paged=8,int4", "streaming=3+9,float32", "heavy=4+4"):
        assert decode.cache_kind(kind).name == kind and decode.cache_kind(decode.cache_kind(kind)) == decode.cache_kind(kind)
    assert decode.cache_kind("h2o:4+4") == decode.CacheKind(HeavyHitters(4, 4)) and decode.cache_kind(Streaming()).name == "streaming=4+1020"
    for kind, words in (("padged", "did you mean 'paged'"), ("int4=3", "int4=3"), ("heavy=4", "two numbers"), ("paged=0", "at least 1 position"), ("contiguous=1", "no numbers"),
                        ("heavy,int8", "keeps floats"), ("streaming=x+4", "two numbers are wanted"), ("paged,sinks", "one layout"), ("int8,int4", "one dtype"),
                        (3, "a name as"), ("sinks:4", "two numbers")):
        with pytest.raises(ConfigError, match=words):
            decode.make_cache(MODEL, 1, 50, kind)


def test_plan_prints_it(capsys):
    assert cli.main(["plan", "--model=llama-3-8b", "--context=4096", "--cache=int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache_kind_bytes"] == 32 * 4096 * 2 * 8 * (128 + 2) + 4096 * 8
    assert cli.main(["plan", "--model=llama-3-8b", "--context=4096", "--cache=paged,int4"]) == 0
    assert "as paged,int4" in capsys.readouterr().out
    assert cli.main(["plan", "--model=llama-3-8b", "--cache=int5"]) == 2 and "did you mean 'int" in capsys.readouterr().err
