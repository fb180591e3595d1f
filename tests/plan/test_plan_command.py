"""Memory, traffic and time of a run: against the arrays a real state holds, closed forms, and what must move when a knob does."""
import dataclasses as dc
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from llmjax import cli, models, settings, train
from llmjax.core import ConfigError, ShardingError, make_mesh, shardings
from llmjax.plan import chips, job, memory, report, roofline, search, traffic

TINY = "configs/quickstart.py:size=tiny"


def plan(config=TINY, *overrides, topology=None):
    made = job.make(settings.load(config, overrides), chips.topology(topology) if topology else None)
    return made, memory.estimate(made)


def big(*overrides, topology="v5p:4x4x4", model="llama-3-8b"):
    return plan(f"configs/pretrain.py:model={model}", "layout.fsdp=64", "batch_size=256", "context=2048", *overrides, topology=topology)


@pytest.mark.parametrize("layout", [dict(fsdp=8), dict(fsdp=2, tensor=4), dict(data=2, tensor=2, fsdp=2), dict(data=8)])
def test_what_lies_still_is_what_a_real_state_holds(layout):
    made, found = plan(TINY, *[f"layout.{k}={v}" for k, v in ({"data": 1} | layout).items()])
    config = made.config
    model, mesh = models.Decoder(config.model, config.compute, config.layout), make_mesh(**({"data": 1} | layout))
    places = shardings(models.labels(model), models.abstract_params(model), mesh)
    optimizer = train.make_optimizer(config.optimizer, lambda step: 1e-3, models.labels(model))
    state = train.init(models.init_params(model, jax.random.key(0), places), optimizer, jax.random.key(1))
    on_first = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert found["weights"] == found["gradients"] == on_first(state.params)
    assert found["optimizer"] == on_first(state.opt_state)


def test_layers_behind_the_stages_are_layers_all_the_same():
    whole, _ = plan("configs/pretrain.py:model=llama-3.1-405b")
    parted, _ = plan("configs/pretrain.py:model=llama-3.1-405b,suffix=14", "layout.stage=8", "layout.fsdp=32", "layout.tensor=8", "batch_size=2048", topology="v5p:8x16x16")
    assert parted.config.model.layers == whole.config.model.layers and parted.config.model.repeats == 112
    with pytest.raises(ShardingError, match="a divisor of 126"):
        plan("configs/pretrain.py:model=llama-3.1-405b", "layout.stage=8", "layout.fsdp=32", "layout.tensor=8", "batch_size=2048", topology="v5p:8x16x16")


def test_kept_activations_under_full_remat_are_the_layers_inputs():
    _, found = big("compute.remat=full")
    inputs = 32 * 4 * 2048 * 4096 * 2
    assert inputs <= found["activations"] < 1.2 * inputs               # and what stands before the last norm, the tables of sines
    _, parted = big("compute.remat=full", "layout.fsdp=16", "layout.tensor=4")                # 16 rows a device, each a quarter of its length: as much
    assert inputs <= parted["activations"] < 1.2 * inputs


def test_less_remat_keeps_more_and_costs_less_time():
    kept, times = [], []
    for remat in ("full", "dots", "None"):
        made, found = big(f"compute.remat={remat}")
        kept.append(found["activations"])
        times.append(roofline.step_time(made, found)["compute"])
    assert kept[0] < kept[1] < kept[2] and times[0] > times[1] > times[2]
    assert times[0] / times[2] == pytest.approx(4 / 3, rel=0.08)       # a forward pass more; the head is not made again


def test_activations_are_divided_by_what_divides_them():
    _, whole = big("compute.remat=None")
    _, rows = big("compute.remat=None", "batch_size=512")
    assert rows["activations"] == pytest.approx(2 * whole["activations"], rel=1e-6)
    _, tensor = plan("configs/pretrain.py:model=llama-3-8b", "layout.fsdp=16", "layout.tensor=4", "batch_size=64", "context=2048", "compute.remat=None", topology="v5p:4x4x4")
    assert 0.25 * whole["activations"] < tensor["activations"] < 0.75 * whole["activations"]         # the stream of width D is whole on every device
    _, parts = big("accumulate=2", "batch_size=512")
    assert parts["activations"] == big()[1]["activations"] and parts["gradients"] == 2 * big()[1]["gradients"]


def test_traffic_of_fsdp_is_two_gathers_and_one_reduction():
    made, _ = big()
    sent = traffic.per_axis(made)
    weights = 8.030e9 - 2 * 128_256 * 4096
    assert set(sent) == {"fsdp"}
    assert sent["fsdp"] == pytest.approx(2 * 63 / 64 * (4 * weights + 3 * 128_256 * 4096), rel=1e-3)     # the head is gathered once


def test_traffic_of_the_other_axes():
    made, _ = plan("configs/pretrain.py:model=mixtral-8x7b", "layout.fsdp=4", "layout.expert=4", "layout.tensor=2", "layout.data=2", "batch_size=64", "context=2048", topology="v5p:4x4x4")
    sent = traffic.per_axis(made)
    tokens = 64 // 32 * 2048
    assert sent["expert"] == pytest.approx(3 / 4 * tokens * 4096 * 2 * 32 * 2 * 2 * 3)
    assert sent["tensor"] == pytest.approx(1 / 2 * tokens * 4096 * 2 * (32 * (4 + 3 + 4) + 4))         # forward, again but for the last sum, backward; embedding and head
    assert "data+fsdp+expert" in sent and "data+fsdp" in sent            # dense weights over all three, experts' over the rest


def test_roofline_and_cost():
    made, found = big()
    times = roofline.step_time(made, found)
    assert times["bound"] == max(times[k] for k in ("compute", "memory", "network")) and 0.6 < times["mfu"] <= 0.8
    half = roofline.cost(made, times, price=2.0, mfu=times["mfu"] / 2)
    assert half["step_seconds"] == pytest.approx(2 * times["bound"])
    assert half["dollars"] == pytest.approx(half["chip_hours"] * 2.0) and half["chip_hours"] == pytest.approx(64 * 10_000 * 2 * times["bound"] / 3600)
    gpu, there = plan("configs/pretrain.py:model=llama-3-8b", "layout.fsdp=16", "batch_size=16", topology="h100:2x8")
    assert roofline.link_speed(gpu, chips.CHIPS["h100"], "fsdp") == chips.CHIPS["h100"].network       # an axis of 16 leaves the node
    assert roofline.cost(gpu, roofline.step_time(gpu, there), price=None, mfu=None)["dollars"] is None


def test_what_does_not_fit_says_what_would_help():
    made, found = plan("configs/pretrain.py:model=llama-3-8b", "layout.fsdp=16", "batch_size=64", "context=8192", topology="v5e:4x4")
    assert found["total"] > search.room(made.topology)
    rows = search.advice(made, found["total"])
    assert rows == sorted(rows, key=lambda row: row["total"]) and all(row["saves"] > 0 for row in rows)
    halved = next(row for row in rows if row["change"] == "--config.batch_size=32")
    assert halved["total"] == memory.estimate(job.make(dc.replace(made.config, batch_size=32), made.topology))["total"]
    written = report.of_run(made.config, "v5e:4x4")[0]
    assert not written.numbers["fits"] and "does NOT fit" in written.text and rows[0]["change"] in written.text


def test_the_front_is_one():
    made, _ = plan("configs/pretrain.py:model=smollm2-135m", "layout.fsdp=4", "batch_size=32", topology="v5e:2x2")
    rows = search.front(made, price=None)
    assert len(rows) >= 2
    for faster, slower in itertools.pairwise(rows):
        assert faster["tokens_per_second"] >= slower["tokens_per_second"] and faster["bytes"] > slower["bytes"]
    assert all(row["bytes"] <= search.room(made.topology) for row in rows)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v3", "gemma3-1b", "gpt-2", "qwen3-next-80b-a3b", "llama-3.1-405b"])
def test_every_kind_of_model_is_planned(model):
    made, found = plan(f"configs/pretrain.py:model={model}", "layout.fsdp=16", "batch_size=16", "context=1024", topology="v6e:4x4")
    assert all((found[kind] > 0) == (kind not in ("stage", "tick")) for kind in memory.KINDS) and roofline.step_time(made, found)["bound"] > 0


def test_refusals():
    with pytest.raises(ShardingError, match="does not divide"):
        plan("configs/pretrain.py:model=smollm2-135m", "layout.tensor=4", "layout.data=1")
    with pytest.raises(ConfigError, match="batch_size=3"):
        plan(TINY, "batch_size=3", "layout.data=2")


@pytest.mark.parametrize("text, devices", [("v5p:4x4x8", 128), ("v5p-128", 64), ("v5e-256", 256), ("v4:2x2x1", 4), ("7x:2x2x1", 8), ("tpu7x:4x4x4", 128),
                                           ("h100:8", 8), ("h100:16", 16), ("a100:3x8", 24), ("V6E:2x4", 8), ("2xv5e-256", 512), ("3x7x:4x4x4", 384)])
def test_topologies(text, devices):
    found = chips.topology(text)
    assert found.devices == devices and chips.topology(found.name) == found


def test_slices_talk_over_the_network():
    apart, _ = plan(TINY, "layout.data=2", "layout.fsdp=4", "batch_size=8", topology="2xv5e:2x2")
    chip, ring = chips.CHIPS["v5e"], 2 * 7 / 8 * 1e9                              # an all-reduce of 1 GB over both slices' eight
    slow = 2 * 1 / 2 * 1e9 / 4                                                    # across: an all-reduce of each of four's share, between two
    assert roofline.wire_seconds(apart, chip, "data+fsdp", ring) == pytest.approx(slow / chip.network + (ring - slow) / chip.link)
    assert roofline.wire_seconds(apart, chip, "fsdp", 1e9) == pytest.approx(1e9 / chip.link)
    with pytest.raises(ShardingError, match="2 slices do not divide data=1"):
        plan(TINY, "layout.data=1", "layout.fsdp=8", "batch_size=8", topology="2xv5e:2x2")
    with pytest.raises(ConfigError, match="2x says how many slices of TPUs"):
        chips.topology("2xh100:8")


def test_command_line(capsys, tmp_path):
    assert cli.main(["plan", "--config=configs/pretrain.py:model=smollm2-135m", "--topology=v5e:2x2", "--config.layout.fsdp=4", "--mfu=0.4", "--price=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["chips"] == 4 and found["mfu"] == 0.4 and found["dollars"] > 0 and found["memory_per_device_bytes"]["total"] > 0
    assert cli.main(["plan", f"--config={TINY}", "--topology=v5e:1x1"]) == 0
    assert "fits" in capsys.readouterr().out
    assert cli.main(["plan", f"--config={TINY}"]) == 0
    assert "one device" in capsys.readouterr().out


def test_a_published_size_is_trainable(tmp_path):
    """configs/pretrain.py as it stands, but for its size: one step."""
    from llmjax import run
    config = settings.load("configs/pretrain.py:model=smollm2-135m", ["model.repeats=2", "model.dim=64", "context=64", "batch_size=8", "steps=1", "data.source.max_bytes=60000",
                                                                       "data.tokenizer.vocab_size=300", "model.vocab_size=512", "data.validation=None"])
    found = run.train_model(config, tmp_path, quiet=True)
    assert jnp.isfinite(found["loss"])


def test_stages_wait_for_each_other_and_share_the_layers():
    overrides = ["layout.stage=4", "layout.fsdp=16", "batch_size=256", "context=2048"]
    one, alone = big()
    made, found = plan("configs/pretrain.py:model=llama-3-8b", *overrides, "layout.microbatches=4", topology="v5p:4x4x4")
    many, _ = plan("configs/pretrain.py:model=llama-3-8b", *overrides, "layout.microbatches=16", topology="v5p:4x4x4")
    seconds = [roofline.step_time(m, f)["compute"] for m, f in ((one, alone), (made, found), (many, found))]
    assert seconds[1] / seconds[0] == pytest.approx(1 + 3 / 4) and seconds[2] / seconds[0] == pytest.approx(1 + 3 / 16)      # (stages - 1) / microbatches
    assert "stage" in traffic.per_axis(made) and traffic.per_axis(made)["fsdp"] < 0.5 * traffic.per_axis(one)["fsdp"]       # a stage gathers its own layers
    assert found["weights"] < 1.5 * alone["weights"]                                                                          # embedding and head are not divided over stages


@pytest.mark.parametrize("microbatches", [4, 16])
def test_a_pipeline_keeps_what_its_ticks_keep(microbatches):
    """Of GPipe every tick the inputs of a stage's eight layers, idle ticks too; interleaved the input of a chunk alone. And what went in."""
    overrides = ["layout.stage=4", "layout.fsdp=16", "batch_size=256", "context=2048", "compute.remat=full", f"layout.microbatches={microbatches}"]
    stream, rows = 2048 * 4096 * 2, 16                                                       # bytes of a row; a stage works on the rows of all four
    for more, ticks, inputs in ((["layout.interleave=1"], microbatches + 3, 8), (["layout.interleave=2"], 2 * microbatches + 3, 1)):
        _, found = plan("configs/pretrain.py:model=llama-3-8b", *overrides, *more, topology="v5p:4x4x4")
        kept = stream * rows * (ticks * inputs / microbatches + 1)
        assert kept <= found["activations"] < 1.02 * kept + 5 * 4 * stream                  # and of four rows what stands before and behind the layers, partly in float32
        assert found["stage"] == 8 * 218_112_000 * 2                                         # eight layers in bfloat16
    _, flat = plan("configs/pretrain.py:model=llama-3-8b", *overrides, "layout.interleave=2", "layout.ticks=flat", topology="v5p:4x4x4")
    assert flat["activations"] == found["activations"] and flat["tick"] > 2 * (found["tick"] - found["stage"])      # four layers at a time, not one


def test_offloaded_inputs_lie_with_the_host():
    _, kept = big("compute.remat=full")
    _, moved = big("compute.remat=offload")
    inputs = 32 * 4 * 2048 * 4096 * 2
    assert kept["host"] == 0 and moved["host"] == inputs and moved["activations"] == kept["activations"] - inputs


def test_an_optimiser_that_waits_with_the_host():
    made, near = plan(TINY, "layout.fsdp=8")
    _, far = plan(TINY, "layout.fsdp=8", "offload_optimizer=True")
    assert far["host"] == pytest.approx(near["optimizer"], abs=100) and far["optimizer"] < 100 and made.devices == 8
