"""What runs on a GPU, on a pretended one (`pretend_gpu`): everything that the library does gives there, to the bit, what it gives on the CPU."""
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretend_gpu import gpu, is_gpu
from test_engine import CPU, difference, fit_for, poisoned, scenes, small  # noqa: F401
from torch import nn

from poet_nb import switches, transformer
from poet_nb.analysis import run_layers
from poet_nb.attention import observe
from poet_nb.bench import PARTS, run_bench
from poet_nb.coco import open_split
from poet_nb.config import override
from poet_nb.engine import choose_device, fit, memory_layout, new_model, start_phase, train_loader, train_step
from poet_nb.export import DeployedPoet
from poet_nb.poet import build_poet
from poet_nb.predict import predict
from poet_nb.switches import count_waits

HERE = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")]


@pytest.fixture
def there(monkeypatch):
    "A context with a pretended GPU."
    return lambda kind="cuda": gpu(monkeypatch, kind)


@pytest.fixture
def alike(monkeypatch):
    "Dropout and attention of the CPU as those of a GPU: PyTorch's."
    attend = transformer.attend
    def fused(q, k, v, nheads, padding=None, dropout=0., need_weights=False):
        if need_weights: return attend(q, k, v, nheads, padding, dropout, True)
        q, k, v = (x.unflatten(-1, (nheads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, None if padding is None else ~padding[:, None, None], dropout).transpose(1, 2).flatten(-2), None
    monkeypatch.setattr(transformer, "attend", fused)
    monkeypatch.setattr(transformer, "drop", lambda x, prob: F.dropout(x, prob) if prob else x)


# ---- the pretended GPU itself: it must find what a real one would ------------------------------------------------------------------

MIXED = [lambda x, y: x + y, lambda x, y: y * x, lambda x, y: torch.cat([x, y]), lambda x, y: torch.stack([x.sum(), y.sum()]), lambda x, y: x @ y, lambda x, y: torch.where(x > 0, x, y), lambda x, y: y[x.long()],
         lambda x, y: F.linear(y, x[None]), lambda x, y: x.add_(y), lambda x, y: y.add_(x.sum()), lambda x, y: x.index_add(0, torch.tensor([0]), y[:1]), lambda x, y: x.__setitem__(torch.tensor([0, 1, 2]), y)]


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_tensors_of_two_devices_are_refused(there, number):
    with there(), pytest.raises(RuntimeError, match="same device"): MIXED[number](torch.ones(3, device="cuda"), torch.ones(3))


def test_what_may_meet_does(there):
    with there():
        x, y = torch.ones(3, device="cuda"), torch.arange(3.)
        for z in (x + y[1], x * 2, x[y.long()], x.clone().copy_(y), x.new_zeros(2), torch.zeros_like(x), x.to(torch.float64), x.detach(), x.view(1, 3), *x.unbind(), torch.tensor([1.], device=x.device), y.to(x)):
            assert is_gpu(z) and z.device == HERE and z.is_cuda
        x[:2] = y[:2]
        for z in (x.cpu(), x.to("cpu"), y[:1], torch.zeros_like(x, device="cpu"), y.to(y)): assert not is_gpu(z) and z.device == CPU
        assert x.tolist() == [0, 1, 1] and x.cpu().numpy().sum() == 2 and float(x.sum()) == 2
        for array in (lambda: x.numpy(), lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="numpy"): array()


def test_a_copy_that_nobody_waits_for_has_not_come(there):
    with there():
        x = torch.arange(3., device="cuda")
        host, event = x.to("cpu", non_blocking=True), torch.cuda.Event()
        assert host.tolist() != [0, 1, 2]
        event.record(); event.synchronize()
        assert host.tolist() == [0, 1, 2]
        source = torch.zeros(3).pin_memory()
        source.to("cuda", non_blocking=True); source += 1
        with pytest.raises(AssertionError, match="while it was copied"): x.sum().item()


def test_a_network_with_its_optimiser_and_a_file(there, tmp_path):
    with there():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).to("cuda")
        assert all(map(is_gpu, [*net.parameters(), *net.buffers()])) and all(isinstance(p, nn.Parameter) for p in copy.deepcopy(net).parameters())
        with pytest.raises(RuntimeError, match="same device"): net(torch.ones(2, 3, 4, 4))
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        net(torch.ones(2, 3, 4, 4, device="cuda")).sum().backward()
        assert nn.utils.clip_grad_norm_(net.parameters(), 1.).is_cuda
        optimizer.step()
        assert any(not a.equal(b) for a, b in zip(before, net.parameters())) and all(map(is_gpu, optimizer.state[net[0].weight].values()))
        torch.save(net.state_dict(), tmp_path / "net.pt")
        found = torch.load(tmp_path / "net.pt", weights_only=True)
        assert not any(map(is_gpu, found.values())) and net[3].weight.cpu().equal(found["3.weight"])


# ---- training ----------------------------------------------------------------------------------------------------------------------

def numbers(log): return [{k: v for k, v in line.items() if k != "seconds"} for line in log]


@pytest.mark.parametrize("kind, changes", [("dropout", {"data.buckets": True, "data.pad_multiple": 32}), ("bf16", {}), ("bf16", {"model.quality": True}), ("fp16", {"data.unposed": "nobody"}), ("bf16", {"model.method": "ae", "model.stride": 8, "train.pretrain_epochs": 0})])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_run_is_that_of_the_cpu_to_the_bit(scenes, tmp_path, there, alike, device, kind, changes):
    "Pre-training, training, evaluation, in the three precisions; and the other method."
    config = small(scenes, kind, **changes | ({"train.fused": True} if device == "cuda" else {"train.fused": False, "train.channels_last": False})) # neither is for Apple's
    whole = fit(config, tmp_path / "cpu", progress=False)
    with there(device):
        assert choose_device("auto") == torch.device(device)
        log = fit(override(config, **{"train.device": device}), tmp_path / "gpu", progress=False)
    assert numbers(log) == numbers(whole) and all(math.isfinite(v) for line in log for v in line["train"].values())
    assert (tmp_path / "gpu/predictions.json").read_bytes() == (tmp_path / "cpu/predictions.json").read_bytes()
    facts = json.loads((tmp_path / "gpu/environment.json").read_text())
    assert facts["device"] == device and (device == "mps" or facts["device_name"] == "pretended GPU")


def test_a_run_goes_on_on_the_other_device(scenes, tmp_path, there, alike, monkeypatch):
    config = small(scenes, "bf16", **{"train.fused": True})
    on_gpu, whole = override(config, **{"train.device": "cuda"}), fit(config, tmp_path / "cpu", progress=False)
    with there(): fit_for(monkeypatch, 3, on_gpu, tmp_path / "run", resume=False)
    fit_for(monkeypatch, 2, config, tmp_path / "run")
    with there(): log = fit(on_gpu, tmp_path / "run", resume=True, progress=False)
    assert numbers(log) == numbers(whole)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_there_either(scenes, tmp_path, there, alike, monkeypatch, how):
    "There the host hears of it during the next step."
    config = small(scenes, **{"train.pretrain_epochs": 0, "train.fused": True})
    poisoned(monkeypatch, lambda ids: 3 in ids, how)
    whole = fit(config, tmp_path / "cpu", progress=False)
    with there(): log = fit(override(config, **{"train.device": "cuda"}), tmp_path / "gpu", progress=False)
    bad = [[json.loads(line) for line in (tmp_path / device / "nonfinite.jsonl").read_text().splitlines()] for device in ("cpu", "gpu")]
    assert bad[0] and bad[0] == bad[1] and numbers(log) == numbers(whole)


@pytest.mark.parametrize("quality", [False, True])
def test_the_host_waits_once_a_step_and_copies_from_pinned_memory(scenes, there, quality):
    "For the costs of the matching."
    config = override(small(scenes, "bf16", **{"train.fused": True, "train.accumulate": 1, "model.quality": quality}), **{"train.device": "cuda"})
    with there():
        state = start_phase("poet", new_model(config, "poet"), config, HERE)
        batch, *_ = train_loader(config, HERE)[0]
        assert batch[0].tensors.is_pinned() and batch[0].mask.is_pinned() and not batch[0].tensors.is_cuda
        train_step(state, [batch], config, HERE)
        state.outcome.check()
        assert count_waits(lambda: train_step(state, [batch], config, HERE), HERE) == {"synchronizing": 1}
        assert count_waits(lambda: state.outcome.losses["loss"].item(), HERE) == {"synchronizing": 1}, "what counts counts"


# ---- what is done with a model -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(): return build_poet(ROOT / "data/runs/tiny")


@pytest.fixture(scope="module")
def pictures(scenes): return sorted((scenes / "val2017").glob("*.jpg"))


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_predictions_are_those_of_the_cpu(tiny, pictures, there, device, dtype):
    whole = predict(tiny, pictures, batch_size=2, dtype=dtype)
    with there(device): found = predict(copy.deepcopy(tiny), pictures, batch_size=2, dtype=dtype, device=device)
    assert len(found) == len(whole) == 5 and sum(len(p["scores"]) for p in whole)
    for a, b in zip(whole, found, strict=True):
        assert difference(dict(a), dict(b)) is None and not any(map(is_gpu, b.values()))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_attention_is_that_of_the_cpu(tiny, pictures, there, device):
    whole = observe(tiny, pictures[0])
    with there(device): found = observe(copy.deepcopy(tiny).to(device), pictures[0])
    assert difference(vars(whole), vars(found)) is None


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_what_is_measured_of_a_model_is_that_of_the_cpu(tiny, scenes, there, device):
    data = open_split(override(tiny.config, **{"data.root": str(scenes)}).data, "val2017")
    whole = run_layers(tiny, data, batch_size=2)
    with there(device): found = run_layers(copy.deepcopy(tiny), data, batch_size=2, device=device)
    arrays = lambda run: [a for part in (run.pairs, *run.layers) for a in vars(part).values() if isinstance(a, np.ndarray)]
    assert len(whole.pairs.image_ids) and len(arrays(whole)) > 10
    close = 0 if device == "cuda" else .11 # another layout in memory, so another order of sums; coordinates are kept to a tenth of a pixel
    for a, b in zip(arrays(whole), arrays(found), strict=True): np.testing.assert_allclose(a, b, rtol=0, atol=close)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_what_is_exported_of_a_model_on_the_gpu_is_on_the_cpu(tiny, there, device):
    with there(device): found = dict(DeployedPoet(copy.deepcopy(tiny).to(device)).state_dict())
    assert difference(dict(DeployedPoet(tiny).state_dict()), found) is None


def test_every_part_is_measured_there(scenes, there):
    config = override(small(scenes, "bf16", **{"train.fused": True}), **{"train.device": "cuda"})
    with there(): record = run_bench(config, HERE, size=64, rounds=1, ceiling_n=64, steps=2)
    assert record["environment"]["device_name"] == "pretended GPU" and record["step"]["host_waits"] == {"synchronizing": 1}
    assert all(record[part]["peak_memory"] == 1 << 30 for part in PARTS)


def test_what_compiling_lacks_is_said_before_the_first_step(there, monkeypatch, tmp_path):
    have = dict(compiler=None, include=str(tmp_path), triton=False)
    monkeypatch.setattr(switches.shutil, "which", lambda name: have["compiler"])
    monkeypatch.setattr(switches.sysconfig, "get_paths", lambda: dict(include=have["include"]))
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: have["triton"])
    said = []
    for change in ({}, dict(compiler="/usr/bin/gcc"), None, dict(triton=True)):
        if change is None: (tmp_path / "Python.h").touch()
        have |= change or {}
        said.append(switches.lacks_for_compiling(HERE))
    assert [next((word for word in ("gcc", "python3-dev", "WSL2") if word in text), "") for text in said] == ["gcc", "python3-dev", "WSL2", ""]
    assert switches.lacks_for_compiling(torch.device("mps")) == ""


def test_apples_gpu_gets_no_channels_last(scenes, there):
    "PyTorch before 2.14 has a wrong gradient of BatchNorm for it there."
    config = small(scenes, **{"train.channels_last": True})
    assert [memory_layout(config, torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == [torch.channels_last, torch.channels_last, torch.contiguous_format]
    with there("mps"): state = start_phase("poet", new_model(config, "poet"), config, torch.device("mps"))
    assert state.model.backbone.body.conv1.weight.is_contiguous()


def test_apples_gpu_has_no_doubles(there):
    with there("mps"):
        x = torch.ones(3, device="mps")
        assert is_gpu(x) and not x.is_cuda and x.device == torch.device("mps", 0)
        for doubled in (lambda: x.double(), lambda: x.to(torch.float64), lambda: torch.zeros(3, device="mps", dtype=torch.float64), lambda: torch.ones(3).double().to("mps")):
            with pytest.raises(TypeError, match="float64"): doubled()
