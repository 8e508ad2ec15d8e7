"""Switches, buckets and the bench: what is compiled keeps names and numbers, an interrupted epoch of buckets goes on where it was, and what is measured is measured."""
import copy
import json
import mmap
import shlex
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poet_nb import bench, cli, switches
from poet_nb.buckets import bucket_order
from poet_nb.config import ConfigError, override, preset
from poet_nb.engine import fit, new_model, start_phase, train_loader, train_step
from poet_nb.switches import HostWaits, compile_parts, has_compiler
from poet_nb.synth import SynthConfig, make_synth

CPU = torch.device("cpu")
TINY = override(preset("poet_tiny"), **{"model.hidden_dim": 16, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 16, "train.init": "none",
                                        "train.device": "cpu", "train.amp": "none", "train.pretrain_epochs": 0, "train.ema_decay": 0., "train.epochs": 2, "train.batch_size": 2,
                                        "data.scales": [64, 96], "data.max_size": 128, "data.eval_scale": 64, "data.crop_prob": .5, "data.crop_resize": [64, 96],
                                        "data.crop_size": [48, 96], "data.pad_multiple": 32})


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "12 training and 4 validation scenes."
    root = tmp_path_factory.mktemp("data")
    for split, n in (("train2017", 12), ("val2017", 4)): make_synth(root, split, n, SynthConfig(size=96, clutter=0), seed=1, progress=False)
    return root


# ---- buckets ----

@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 7))
def test_every_image_once_and_batches_alike(buckets, batch_size):
    order = list(bucket_order(range(len(buckets)), lambda i: (buckets[i], 0), batch_size))
    assert sorted(order) == list(range(len(buckets)))
    mixed = [len({buckets[i] for i in order[k:k + batch_size]}) > 1 for k in range(0, len(order), batch_size)]
    assert sum(mixed) <= 4 and True not in mixed[:sum(buckets.count(b) // batch_size for b in range(4))]


def test_batches_of_the_loader_have_their_planned_size(data):
    config = override(TINY, **{"data.root": str(data), "data.buckets": True})
    loader, batches = train_loader(config, CPU)
    for epoch in (0, 1):
        batches.epoch = epoch
        planned = list(batches)
        assert sorted(i for batch in planned for i, _ in batch) == list(range(12))
        for batch, (samples, _) in zip(planned, loader):
            sizes = [batches.arrange.bucket_of(i, epoch) for i, _ in batch]
            assert tuple(samples.tensors.shape[2:]) == tuple(np.max(sizes, 0))
    first = list(batches)
    batches.start = 4
    assert list(batches) == first[4:] and len(batches) == 2
    batches.arrange, batches.start = None, 0
    assert list(batches) != first


def test_a_stopped_run_with_buckets_goes_on_as_if_nothing_had_happened(data, tmp_path, monkeypatch):
    config = override(TINY, **{"data.root": str(data), "data.buckets": True})
    whole = fit(config, tmp_path / "whole", progress=False)
    steps = [0]
    import poet_nb.engine as engine
    def stopping(*args, **kwargs):
        out = train_step(*args, **kwargs); steps[0] += 1
        if steps[0] == 9: engine.os.kill(engine.os.getpid(), engine.signal.SIGTERM); time.sleep(.05)
        return out
    monkeypatch.setattr(engine, "train_step", stopping)
    stopped = fit(config, tmp_path / "parts", progress=False)
    monkeypatch.undo()
    assert len(stopped) == 1
    resumed = fit(config, tmp_path / "parts", resume=True, progress=False)
    assert [line["train"] for line in resumed] == [line["train"] for line in whole] and [line["val"] for line in resumed] == [line["val"] for line in whole]


# ---- switches ----

def losses_of(state, config, steps=2):
    "Losses of some steps on noise."
    torch.manual_seed(0)
    state.task.train()
    return [float(train_step(state, [bench.noise_batch(config, (64, 64), 2, seed)], config, CPU)["loss"]) for seed in range(steps)]


def compiled_against_eager(backend, monkeypatch):
    "Two states with equal weights, one compiled by the flag; their losses."
    torch.manual_seed(0)
    model = new_model(TINY)
    monkeypatch.setattr("poet_nb.engine.compile_parts", lambda m: compile_parts(m, backend))
    config = override(TINY, **{"train.compile": True, "train.ema_decay": .5, "train.fold_bn": True})
    eager, compiled = start_phase("poet", copy.deepcopy(model), override(config, **{"train.compile": False}), CPU), start_phase("poet", model, config, CPU)
    assert model.backbone._compiled_call_impl is not None and compiled.ema.backbone._compiled_call_impl is None
    assert list(compiled.task.state_dict()) == list(eager.task.state_dict()) and not any("_orig_mod" in k for k in compiled.model.state_dict())
    return losses_of(eager, config), losses_of(compiled, config)


def test_the_flag_compiles_and_changes_neither_names_nor_losses(monkeypatch):
    eager, compiled = compiled_against_eager("aot_eager", monkeypatch)
    assert np.allclose(eager, compiled, rtol=1e-4) and eager[0] != eager[1]


@pytest.mark.slow
def test_compiled_by_inductor_the_losses_are_the_same(monkeypatch):
    if not has_compiler(): pytest.skip("no C++ compiler: g++ would do")
    eager, compiled = compiled_against_eager("inductor", monkeypatch)
    assert np.allclose(eager, compiled, rtol=1e-3)


def test_on_a_gpu_the_flag_wants_a_c_compiler(monkeypatch):
    weight = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.delenv("CC", raising=False); monkeypatch.setattr(switches.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="train.compile: Triton needs a C compiler.*gcc"): compile_parts(SimpleNamespace(parameters=lambda: iter([weight])))


def test_without_a_compiler_the_flag_is_refused(monkeypatch):
    monkeypatch.setattr(switches, "has_compiler", lambda: False)
    with pytest.raises(ConfigError, match="train.compile.*g\\+\\+"): start_phase("poet", new_model(TINY), override(TINY, **{"train.compile": True}), CPU)


def test_evaluation_is_not_compiled(data, monkeypatch):
    calls = []
    def backend(graph, inputs): calls.append(graph); return graph
    config = override(TINY, **{"data.root": str(data)})
    model = compile_parts(new_model(config), backend).eval()
    from poet_nb.engine import evaluate
    evaluate(model, config, CPU, progress=False)
    assert not calls
    model(torch.zeros(1, 3, 64, 64))
    assert calls


@pytest.mark.parametrize("fused", [True, False])
def test_fused_adamw_is_a_switch_of_the_same_arithmetic(fused):
    torch.manual_seed(0)
    config = override(TINY, **{"train.fused": fused})
    state = start_phase("poet", new_model(config), config, CPU)
    assert {bool(g["fused"]) for g in state.optimizer.param_groups} == {fused}
    assert losses_of(state, config)[1] == pytest.approx(losses_of(start_phase("poet", seeded_model(), TINY, CPU), TINY)[1], rel=1e-4)


def seeded_model():
    torch.manual_seed(0)
    return new_model(TINY)


def test_how_often_a_step_waits_for_the_device():
    "Once for matching, once for the loss and the gradient's norm together, so that a step that is not finite is not applied; more would be a step back."
    state = start_phase("poet", new_model(TINY), TINY, CPU)
    batch = bench.noise_batch(TINY, (64, 64), 2)
    train_step(state, [batch], TINY, CPU)
    with HostWaits(CPU) as waits: train_step(state, [batch], TINY, CPU)
    assert waits.counts.pop("cpu") == 1 and sum(waits.counts.values()) <= 1, waits.counts


# ---- bench ----

def test_bench_writes_what_it_measured(tmp_path, capsys):
    words = f"bench --preset poet_tiny --size 64x96 --batch 2 --rounds 2 --steps 2 --device cpu --fast --out {tmp_path} --set model.enc_layers=1 model.dec_layers=1 data.workers=0"
    assert cli.main(shlex.split(words + " --parts step,train,predict")) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    s, t, out = record["step"], record["train"], capsys.readouterr().out
    assert (tmp_path / "bench.png").stat().st_size > 5000 and f"{s['images_per_second']:.3g} images/s" in out and "loader" not in record
    assert s["images_per_second"] == pytest.approx(2 / s["step"]["median"]) and s["flops_per_second"] == pytest.approx(s["flops"] / s["step"]["median"])
    assert set(s["pieces"]) == set(bench.PIECES) and all(0 < p["low"] <= p["median"] <= p["high"] for p in s["pieces"].values()) and s["size"] == [64, 96]
    assert {"commit", "device_name", "threads", "torch"} <= record["environment"].keys() and s["peak_memory"] > 1e8
    assert s["share_of_ceiling"] == pytest.approx(s["flops_per_second"] / record["ceilings"][s["ceiling"]])
    assert s["share_of_copy"] == pytest.approx(s["bytes"] / s["step"]["median"] / record["ceilings"]["copy"]) and f"{s['share_of_copy']:.0%} of the copy" in out
    assert t["share_of_ready"] == pytest.approx(t["images_per_second"] / t["ready_images_per_second"]) and (t["steps"], t["images"]) == (2, 4)
    assert f"{t['images_per_second']:.3g} images/s = {t['share_of_ready']:.0%} of {t['ready_images_per_second']:.3g}" in out and "fold_bn on" in out and "compile off, buckets off" in out


@pytest.mark.parametrize("size", ["800*1066", "800x", "x800", "16x800", "800x1066x3"])
def test_a_size_is_one_number_or_two(size, capsys):
    assert cli.main(["bench", "--size", size]) == 2 and "HEIGHTxWIDTH" in capsys.readouterr().err


def test_more_work_is_counted_as_more():
    small, large = (bench.bench_step(TINY, CPU, (side, side), 2, rounds=1) for side in (64, 128))
    assert 3.2 < large["flops"] / small["flops"] < 4.5
    fixed = 7 * 4 * sum(p.numel() for p in new_model(TINY).parameters() if p.requires_grad)       # what AdamW moves, whatever the images
    assert fixed < small["bytes"] < large["bytes"] < 4.5 * small["bytes"]


def test_bytes_of_a_layer_by_hand():
    x, layer = torch.ones(32, 64, requires_grad=True), torch.nn.Linear(64, 16, bias=False)
    sizes = 32 * 64, 64 * 16, 32 * 16                                                              # input, weights, output
    assert bench.count_bytes(lambda: layer(x)) == 4 * sum(sizes)
    y, gradient = layer(x), torch.ones(32, 16)
    assert bench.count_bytes(lambda: torch.autograd.grad(y, [x, layer.weight], gradient)) == 4 * 2 * sum(sizes)
    layer.to(torch.bfloat16)
    with torch.no_grad(): assert bench.count_bytes(lambda: layer(x.bfloat16())) == 4 * sizes[0] + 2 * (2 * sizes[0] + sizes[1] + sizes[2])


class Clock:
    "Time that passes only where it is told to."
    def __init__(self): self.now = 0.
    def perf_counter(self): return self.now
    def takes(self, seconds, f): return lambda *args: (f(*args), setattr(self, "now", self.now + seconds))[0]


def test_a_slow_loader_shows_in_training_and_a_fast_one_does_not(data, monkeypatch):
    config, clock, steps, plan = override(TINY, **{"data.root": str(data), "data.workers": 0}), Clock(), [], bench.train_loader
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "train_step", clock.takes(1., lambda state, parts, *_: steps.append([int(t["image_id"]) for t in parts[0][1]])))
    fast = bench.bench_train(config, CPU, steps=3)
    assert (fast["share_of_ready"], fast["images_per_second"], fast["steps"], fast["images"]) == (1, 2, 3, 6)
    assert steps[1:4] == [steps[0], *steps[2:4]] and steps[4] == steps[1] and steps[5:8] == [*steps[2:4], steps[1]] # warm, three ready-made; from files one to begin, and three
    def slow_loader(*args):
        loader, batches = plan(*args)
        loader.dataset.transforms = clock.takes(.75, loader.dataset.transforms)                                     # two images a batch: half as long again as a step
        return loader, batches
    monkeypatch.setattr(bench, "train_loader", slow_loader)
    slow = bench.bench_train(config, CPU, steps=3)
    assert (slow["share_of_ready"], slow["ready_images_per_second"], slow["images_per_second"]) == (.4, 2, .8)


def test_the_loader_of_processes_is_timed_in_its_steady_state(data):
    config = override(TINY, **{"data.root": str(data), "data.workers": 2})
    found = bench.bench_loader(config, CPU, 1)
    assert found["workers"] == 2 and found["images"] == 2 * 2 * 2


def test_each_part_has_its_own_peak_where_the_system_lets_it_be_forgotten():
    if not bench.forget_peak(CPU): pytest.skip("the peak can't be forgotten here")
    with mmap.mmap(-1, 2**27) as hog:                                                              # given back for sure, whatever malloc was told before
        hog.write(b"x" * 2**27)
        high = bench.peak_memory(CPU)
    assert bench.peak_memory(CPU) > high - 2**22 and high > 2**27 and bench.forget_peak(CPU)         # the kernel counts pages in lumps, per thread
    assert bench.peak_memory(CPU) < high - 2**26


def test_a_missing_dataset_is_drawn_and_removed(tmp_path):
    config = override(TINY, **{"data.root": str(tmp_path / "none")})
    with bench.some_data(config, images=4, size=96) as ready:
        assert ready.data.root != config.data.root and bench.bench_loader(ready, CPU, 2)["images"] == 4
        root = ready.data.root
    assert not bench.Path(root).exists()


def test_the_baseline_has_no_step_to_bench():
    with pytest.raises(ConfigError, match="model.method"): bench.bench_step(override(TINY, **{"model.method": "ae", "model.stride": 4, "model.backbone_norm": "batch"}), CPU)
