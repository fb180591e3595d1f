"""The reader of compiled programs on a program written by hand; and, where libtpu is installed, a small run compiled for TPUs that are not there."""
import dataclasses as dc
import importlib.util
import json

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax import cli, run, settings
from llmjax.core import Attention, ConfigError, Layer, MissingExtra, Mlp, ModelConfig, Rope, make_mesh
from llmjax.plan import chips, compile, decoding, hlo, job, memory, traffic

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_gather (p0: f32[64,16]) -> bf16[1024,16] {
  %p0 = f32[64,16]{1,0} parameter(0)
  %c.1 = bf16[64,16]{1,0} convert(%p0), backend_config={"estimated_cycles":"999"}
  ROOT %ag.1 = bf16[1024,16]{1,0} all-gather(%c.1), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}
}

%fused_gather_done (p0.1: f32[64,16]) -> bf16[1024,16] {
  %p0.1 = f32[64,16]{1,0} parameter(0)
  %c.2 = bf16[64,16]{1,0} convert(%p0.1)
  ROOT %ag.2 = bf16[1024,16]{1,0} all-gather(%c.2), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}
}

%body (t: (s32[], bf16[1024,16])) -> (s32[], bf16[1024,16]) {
  %t = (s32[]{:T(128)}, bf16[1024,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = f32[64,16]{1,0} constant({...})
  %start = bf16[1024,16]{1,0} fusion(%w), kind=kCustom, calls=%fused_gather, backend_config={"window_config":{"estimated_cycles":"100"}}
  %done = bf16[1024,16]{1,0} fusion(%w), kind=kCustom, calls=%fused_gather_done
  %kernel.3 = bf16[1024,16]{1,0} custom-call(%done), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
}}
  %sum = bf16[1024,16]{1,0} all-reduce(%kernel.3), channel_id=2, replica_groups=mesh['a'=4,'b'=4] {'a'}, to_apply=%add
  ROOT %out = (s32[], bf16[1024,16]{1,0}) tuple(%next, %sum)
}

%cond (t.1: (s32[], bf16[1024,16])) -> pred[] {
  %t.1 = (s32[], bf16[1024,16]{1,0}) parameter(0)
  %bound = s32[] constant(32)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x: bf16[1024,16]) -> bf16[1024,16] {
  %x = bf16[1024,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[1024,16]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[1024,16]{1,0}) while(%init), condition=%cond, body=%body
  %moved = bf16[1024,16]{1,0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %copy.9 = bf16[1024,16]{1,0} copy(%moved), backend_config={"estimated_cycles":"7"}
}
"""


def test_reader():
    found = hlo.read(PROGRAM)
    size = 1024 * 16 * 2
    assert found["collectives"]["all-gather"] == {"count": 32, "bytes": 32 * size, "sent_bytes": 32 * size * 15 / 16}             # its two pieces are one
    assert found["collectives"]["all-reduce"] == {"count": 32, "bytes": 32 * size, "sent_bytes": 32 * size * 2 * 3 / 4}
    assert found["collectives"]["collective-permute"] == {"count": 1, "bytes": size, "sent_bytes": size}
    assert found["estimated_cycles"] == 32 * 100 + 7 and found["kernels"] == {"kernel": 32} and not found["loops_counted_once"]
    assert hlo.read(PROGRAM.replace("constant(32)", "parameter(1)"))["loops_counted_once"] == ["loop"]
    ragged = PROGRAM.replace("%moved =", "%few = bf16[256,16]{1,0} constant({...})\n  %dealt = bf16[1024,16]{1,0} ragged-all-to-all(%few, %x), channel_id=4, replica_groups=[1,4]<=[4]\n  %moved =")
    assert hlo.read(ragged)["collectives"]["ragged-all-to-all"] == {"count": 1, "bytes": size / 4, "sent_bytes": size / 4 * 3 / 4}        # not what it has room for
    by_twos = PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert hlo.read(by_twos)["kernels"] == {"kernel": 16} and hlo.read(by_twos.replace("constant(32)", "constant(31)"))["estimated_cycles"] == 16 * 100 + 7


@pytest.mark.parametrize("text, size", [("replica_groups={{0,1,2,3},{4,5,6,7}}", 4), ("replica_groups=[8,32]<=[256]", 32), ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
                                        ("replica_groups=mesh['x'=16,'y'=16] {'x','y'}", 256), ("no groups", 1)])
def test_groups(text, size):
    assert hlo.group(text) == size


@pytest.mark.parametrize("text, axes", [("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"), ("replica_groups=[2,4]<=[4,2]T(1,0)", "stage+fsdp"), ("replica_groups=[1,8]<=[8]", "stage+fsdp+tensor"),
                                        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", "fsdp"), ("replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a':(1)2}", "tensor"),
                                        ("replica_groups=mesh['a'=8] {'a':(1)2}", "stage"), ("source_target_pairs={{0,0},{1,5}}", "stage"), ("no groups", "")])
def test_axes(text, axes):
    assert hlo.crossed(text, {"stage": 2, "fsdp": 2, "tensor": 2}) == axes


def test_what_a_permutation_sends():
    """Half of the devices keep what they have; and two that share a channel are two."""
    one = "  %moved = bf16[1024,16]{1,0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}"
    half = one.replace("{{0,1},{1,0}}", "{{0,0},{1,2}}")
    assert hlo.read(PROGRAM.replace(one, f"{one}\n{half.replace('moved', 'kept')}"))["collectives"]["collective-permute"] == {"count": 2, "bytes": 2 * 32768, "sent_bytes": 1.5 * 32768}


def test_the_last_words_of_a_compiler():
    words = "a\nXlaRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15G.\nFor simplicity, JAX has removed its internal frames"
    assert "Used 20G of 15G" in compile.reason(words, 1)
    assert compile.reason("", -11) == "the compiler ended with status -11"


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"llmjax\[tpu\]"):
        run.plan_run(settings.load("configs/quickstart.py:size=tiny"), "v5e:2x2", compile=True)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'llmjax[tpu]'")
SMALL = ["layout.fsdp=4", "batch_size=16", "context=512", "compute.remat=full", "model.repeats=2", "model.vocab_size=2048"]


@needs_libtpu
def test_a_small_run_compiles(tmp_path):
    config = settings.load("configs/pretrain.py:model=qwen3-0.6b", SMALL)
    said = compile.run(config, chips.topology("v5e:2x2"), tmp_path)
    assert set(said["collectives"]) >= {"all-gather", "all-reduce"} and sum(said["kernels"].values()) >= 3 * 2 and said["estimated_cycles"] > 0 and not said["loops_counted_once"]
    assert json.loads((tmp_path / "program.meta.json").read_text())["temp_size_in_bytes"] > 0 and (tmp_path / "program.hlo").read_text().startswith("HloModule")
    found = run.plan_run(config, "v5e:2x2").numbers
    held = sum(found["memory_per_device_bytes"][kind] for kind in ("weights", "optimizer", "batch"))
    assert said["memory"]["argument_size_in_bytes"] == pytest.approx(held, rel=0.03)               # the compiler pads small arrays to tiles
    text = (tmp_path / "program.hlo").read_text()
    heads = [line for line in text.splitlines() if " all-gather(" in line and "[2048,1024]" in line.split(" all-gather(")[0] and "jvp()" in line]
    assert len({line.split("channel_id=")[1].split(",")[0] for line in heads}) == 1                # once, whatever the chunks


@needs_libtpu
@pytest.mark.slow
def test_a_pipeline_sends_and_holds_what_is_estimated(tmp_path):
    """Stages, fsdp and tensor together. A quarter for what the estimate of traffic leaves out: the embedding's gradient, padding to tiles. Without the stages' idle ticks, or with the tokens of
    one stage for those of all, it would be a third or a half less. Memory: the compiler frees and fuses, so that its peak is up to a third lower (1.40 of 1.85 GB measured)."""
    wanted = ["model.repeats=8", "model.vocab_size=8192", "context=4096", "compute.remat=full", "batch_size=32", "layout.data=1", "layout.stage=2", "layout.fsdp=2", "layout.tensor=2",
              "layout.interleave=2", "layout.microbatches=4"]
    config, where = settings.load("configs/pretrain.py:model=qwen3-0.6b", wanted), chips.topology("v5p:2x2x2")
    said, made = compile.run(config, where, tmp_path), job.make(config, where)
    ours = traffic.per_axis(made)
    assert sum(ours.values()) == pytest.approx(said["sent_bytes"], rel=0.25) and ours["tensor"] == pytest.approx(said["sent_over"]["tensor"], rel=0.15)
    assert said["peak_bytes"] < memory.estimate(made)["total"] < 1.5 * said["peak_bytes"]


@needs_libtpu
def test_meshes_of_tpus_that_are_not_there(monkeypatch):
    for name, value in compile.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    mesh = make_mesh(data=1, fsdp=8, expert=8, devices=compile.devices(chips.topology("v5p:4x4x4")))          # neither is a dimension of the torus
    assert mesh.shape["fsdp"] == mesh.shape["expert"] == 8 and len({d.id for d in mesh.devices.flat}) == 64
    grid = make_mesh(data=2, fsdp=8, devices=compile.devices(chips.topology("2xv5e:2x4"))).devices.reshape(2, 8)
    assert [{d.slice_index for d in row} for row in grid] == [{0}, {1}]


@needs_libtpu
def test_a_kernel_inside_a_stage_is_lowered(monkeypatch):
    """A TPU's kernel may have no automatic axis around it, not even one of a single device."""
    for name, value in compile.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    config = settings.load("configs/pretrain.py:model=qwen3-0.6b", [x for x in SMALL if "fsdp" not in x] + ["layout.stage=2", "layout.fsdp=2"])
    assert "splash" in compile.lower(config, chips.topology("v5e:2x2")).as_text()


@needs_libtpu
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_decode_step_gathers_no_weight_and_keeps_its_cache(monkeypatch, quantize):
    for name, value in compile.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    config = ModelConfig(2048, 1024, cycle=(Layer(Attention(8, 8, 128, Rope()), Mlp(2048)),), repeats=2, context=512)
    made = decoding.spread(config, chips.topology("v5e:2x4"), quantize=quantize)
    program = decoding.lower(made, 8, 512).compile()
    said, sizes = hlo.read(program.as_text()), program.memory_analysis()
    assert set(said["collectives"]) == {"all-reduce"}                                              # two a layer and the embedding's; weights stay where they are
    assert sizes.alias_size_in_bytes >= 2 * 2 * 8 * 512 * 128 * 2                                  # keys and values of a head a device: all given back in place
    layer = (4 * 1024 * 128 + 3 * 1024 * 256) * 2
    assert sizes.temp_size_in_bytes < layer and sizes.argument_size_in_bytes < 2 * (layer + 1024 * 256 * 2 + 2 * 8 * 512 * 128 * 2) + 2**20
    if quantize is None:
        apart = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(made.mesh, PartitionSpec())), made.params)
        whole = decoding.lower(dc.replace(made, params=apart), 8, 512).compile()
        assert whole.memory_analysis().argument_size_in_bytes > 4 * sizes.argument_size_in_bytes            # the figures see where weights lie


@needs_libtpu
def test_what_the_compiler_refuses_is_one_line(capsys):
    assert cli.main(["plan", "--config=configs/pretrain.py:model=llama-3-8b", "--topology=v5e:1x1", "--config.batch_size=1", "--compile"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "memory" in captured.err.lower()


def test_chips_that_are_no_tpus():
    with pytest.raises(ConfigError, match="no TPUs"):
        compile.run(settings.load("configs/quickstart.py:size=tiny"), chips.topology("h100:8"))
