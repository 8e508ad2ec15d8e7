"""Engine: stopped and resumed runs, signals, damaged checkpoints, steps and images, a full disk, mixed precision, the learning rate."""
import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.models.resnet import BasicBlock, ResNet

from poet_nb import engine
from poet_nb.backbone import BACKBONES
from poet_nb.config import CheckpointError, Config, DataError, NonFiniteError, PoetError, override, preset, save_config
from poet_nb.engine import Targets, fit, lr_factor, read_checkpoint, restore, save_checkpoint, start_phase, train_step
from poet_nb.poet import Poet, build_poet
from poet_nb.switches import HostWaits
from poet_nb.synth import SynthConfig, make_synth

CPU = torch.device("cpu")


class Micro(ResNet):
    "A ResNet with a sixteenth of the channels: a step takes milliseconds."
    def __init__(self, block, layers, norm_layer=nn.BatchNorm2d):
        super().__init__(block, layers, norm_layer=norm_layer)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), norm_layer(4)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64: self.inplanes = 4
        return super()._make_layer(block, planes // 16, blocks, stride, dilate)


BACKBONES["resnet_micro"] = (Micro, BasicBlock, (1, 1, 1, 1))

SMALL = {"data.scales": [48], "data.max_size": 48, "data.eval_scale": 48, "data.crop_resize": [48, 64], "data.crop_size": [32, 64], "data.pad_multiple": 16,
         "data.workers": 0, "model.backbone": "resnet_micro", "model.hidden_dim": 16, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 2,
         "model.dim_feedforward": 16, "model.num_queries": 6, "model.query_groups": 1, "train.epochs": 2, "train.pretrain_epochs": 1, "train.batch_size": 4,
         "train.warmup_steps": 1, "train.device": "cpu", "train.amp": "none", "train.ema_decay": 0., "train.channels_last": False, "train.fold_bn": False}

KINDS = { # settings of the runs that are interrupted; 13 images, batch 4: 3 steps an epoch, 9 in all
    "dropout": {"model.dropout": .1, "model.attention_dropout": .1, "train.schedule": "step", "train.lr_drops": [1], "train.warmup_steps": 0},
    "bf16": {"train.amp": "bf16", "train.accumulate": 2, "train.ema_decay": .9, "train.channels_last": True, "train.fold_bn": True, "model.query_groups": 2},
    "fp16": {"train.amp": "fp16", "model.dropout": .1, "model.backbone_norm": "batch", "train.ema_decay": .5},
}


def small(root, kind="dropout", **changes) -> Config:
    "A configuration that trains in seconds."
    return override(preset("poet_tiny"), **(SMALL | KINDS[kind] | {"data.root": str(root)} | changes))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    "13 scenes to train on and 5 to score."
    root = tmp_path_factory.mktemp("scenes")
    for split, n in (("train2017", 13), ("val2017", 5)): make_synth(root, split, n=n, config=SynthConfig(size=64), seed=1, workers=1, progress=False)
    return root


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    "runs(kind): configuration and folder of a run that nothing disturbed; made once."
    made = {}
    def run(kind="dropout"):
        if kind not in made:
            folder, config = tmp_path_factory.mktemp("run") / kind, small(scenes, kind)
            torch.set_num_threads(1)
            fit(config, folder, progress=False)
            made[kind] = config, folder
        return made[kind]
    return run


class StopAfter(engine.StopRequest):
    "A request to stop that comes after so many steps of `train_step`."
    def __init__(self, steps):
        self.left, self.step = steps, engine.train_step

    def train_step(self, *args):
        try: return self.step(*args)
        finally:
            self.left -= 1
            if self.left <= 0: self.set()


def fit_for(monkeypatch, steps, config, folder, resume=True):
    "Train for some steps, then stop as after Ctrl-C."
    stop = StopAfter(steps)
    with monkeypatch.context() as m:
        m.setattr(engine, "stop_requests", lambda: contextlib.nullcontext(stop))
        m.setattr(engine, "train_step", stop.train_step)
        return fit(config, folder, resume=resume, progress=False)


def without_times(folder, log):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / log).read_text().splitlines()]


def left_by(folder) -> dict:
    "All that a run has computed, times apart."
    found = read_checkpoint(folder)
    found.pop("seconds")
    return dict(pretrain=without_times(folder, "pretrain.jsonl"), metrics=without_times(folder, "metrics.jsonl"),
                predictions=(folder / "predictions.json").read_text(), weights=(folder / "model.safetensors").read_bytes(), checkpoint=found)


def difference(a, b, where=""):
    "Where two nested values first differ by so much as a bit; None if they do not."
    if type(a) is not type(b): return f"{where}: {type(a)}, {type(b)}"
    if isinstance(a, torch.Tensor): return None if a.dtype == b.dtype and torch.equal(a, b) else f"{where}: tensors"
    if isinstance(a, dict):
        if a.keys() != b.keys(): return f"{where}: keys {a.keys() ^ b.keys()}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{where}.{k}"))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return f"{where}: lengths {len(a)}, {len(b)}"
        return next((d for i, pair in enumerate(zip(a, b)) if (d := difference(*pair, f"{where}[{i}]"))), None)
    return None if a == b else f"{where}: {str(a)[:80]}, {str(b)[:80]}"


def copied(folder, tmp_path) -> Path:
    "A copy of a run, to spoil."
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- resuming -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_every_single_step_the_run_is_the_same_to_the_bit(runs, tmp_path, monkeypatch, capsys, kind):
    config, whole = runs(kind)
    places = []
    for _ in range(20):
        fit_for(monkeypatch, 1, config, tmp_path / "run")
        found = read_checkpoint(tmp_path / "run")
        places.append((found["phase"], found["epoch"], found["batch"]))
        if "stopped" not in capsys.readouterr().err: break
    assert {p[0] for p in places} == {"pretrain", "poet"} and len(places) == 10 and places[-1] == ("poet", 2, 0)
    assert difference(left_by(whole), left_by(tmp_path / "run")) is None


def test_loader_processes_change_nothing_and_may_change_in_between(runs, tmp_path, monkeypatch):
    config, whole = runs("dropout")
    for workers, steps in ((1, 2), (0, 3), (1, 100)): fit_for(monkeypatch, steps, override(config, **{"data.workers": workers}), tmp_path / "run")
    ours = left_by(tmp_path / "run")
    ours["checkpoint"]["config"] = config.to_dict()
    assert difference(left_by(whole), ours) is None


def test_the_data_may_move(runs, scenes, tmp_path, monkeypatch):
    config, whole = runs("dropout")
    moved = shutil.copytree(scenes, tmp_path / "elsewhere")
    fit_for(monkeypatch, 4, config, tmp_path / "run")
    log = fit(override(config, **{"data.root": str(moved)}), tmp_path / "run", resume=True, progress=False)
    assert [line["train"] for line in log] == [line["train"] for line in without_times(whole, "metrics.jsonl")]


def test_a_finished_run_has_nothing_left_to_do(runs, tmp_path, monkeypatch):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    monkeypatch.setattr(engine, "train_step", None)
    assert len(fit(config, folder, resume=True, progress=False)) == 2
    assert difference(left_by(whole), left_by(folder)) is None


def test_resuming_where_nothing_is_begins(runs, tmp_path):
    config, whole = runs("dropout")
    fit(config, tmp_path / "new", resume=True, progress=False)
    assert difference(left_by(whole), left_by(tmp_path / "new")) is None


def test_a_log_that_is_ahead_of_the_checkpoint_is_cut(runs, tmp_path):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    os.replace(folder / "checkpoint.prev.pt", folder / "checkpoint.pt") # as after a crash between log and checkpoint
    with open(folder / "metrics.jsonl", "a") as f: f.write('{"epoch": 3, "trai')
    fit(config, folder, resume=True, progress=False)
    assert difference(left_by(whole), left_by(folder)) is None
    assert [line["epoch"] for line in without_times(folder, "metrics.jsonl")] == [1, 2]


def test_a_checkpoint_of_the_pretraining_cuts_the_whole_log_of_what_follows(runs, tmp_path, monkeypatch):
    config, whole = runs("dropout")
    fit_for(monkeypatch, 3, config, tmp_path / "early")
    assert read_checkpoint(tmp_path / "early")["phase"] == "pretrain"
    folder = copied(whole, tmp_path)
    (folder / "checkpoint.prev.pt").unlink()
    shutil.copy(tmp_path / "early/checkpoint.pt", folder / "checkpoint.pt") # as after the loss of the later ones
    fit(config, folder, resume=True, progress=False)
    assert difference(left_by(whole), left_by(folder)) is None


# ---- signals: real ones, to a process of its own ------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from poet_nb import engine
from poet_nb.config import load_config
import test_engine
phase, epoch, batch, config, folder = sys.argv[1:]
torch.set_num_threads(1)
step = engine.train_step
def told(state, *args):
    if [state.phase, str(state.epoch), str(state.batch)] == [phase, epoch, batch]:
        print("here", flush=True)
        sys.stdin.readline()
    return step(state, *args)
engine.train_step = told
engine.fit(load_config(config), folder, progress=False)
print("returned")
"""
SIGNALS = {"SIGINT": ("poet", 1, 1, 1), "SIGTERM": ("pretrain", 0, 1, 0), "SIGKILL": ("poet", 1, 2, 0)} # phase, epoch, batch and loader processes


@pytest.fixture(scope="module")
def processes(scenes, tmp_path_factory):
    "A training run for each signal, all started at once, each waiting at its place."
    started = {}
    for name, (phase, epoch, batch, workers) in SIGNALS.items():
        folder = tmp_path_factory.mktemp(name)
        save_config(small(scenes, **{"data.workers": workers}), folder / "wanted.json")
        command = [sys.executable, "-c", SCRIPT, phase, str(epoch), str(batch), str(folder / "wanted.json"), str(folder / "run")]
        path = os.pathsep.join(map(str, [Path(__file__).parent, Path(engine.__file__).parents[1]]))
        started[name] = folder, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                                 env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    yield started
    for _, process in started.values():
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_leaves_a_run_that_goes_on_to_the_same_end(runs, processes, name):
    folder, process = processes[name]
    assert process.stdout.readline() == "here\n", process.stderr.read()
    os.killpg(process.pid, getattr(signal, name)) # to the whole group, as the terminal does
    out, err = process.communicate("\n", timeout=120)
    if name == "SIGKILL": assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0 and "returned" in out, err
        assert "go on with --resume" in err and "Traceback" not in err
        found, (phase, epoch, batch, _) = read_checkpoint(folder / "run"), SIGNALS[name]
        assert (found["phase"], found["epoch"], found["batch"]) == (phase, epoch, batch + 1), "the step was finished, and is counted"
    assert not list((folder / "run").glob(".*.part")), "no half-written files"
    config, whole = runs("dropout")
    fit(config, folder / "run", resume=True, progress=False)
    ours = left_by(folder / "run")
    assert difference(left_by(whole), ours | dict(checkpoint=ours["checkpoint"] | dict(config=config.to_dict()))) is None


def test_a_signal_during_an_evaluation_breaks_it_off_and_nothing_is_lost(runs, tmp_path, monkeypatch, capsys):
    "The whole run's evaluation may last minutes; a cluster gives seconds."
    config, whole = runs("dropout")
    batches, judged = len(engine.eval_loader(config, torch.device("cpu"))), engine.to_coco_results
    assert batches > 1
    seen = []
    def told(*args):
        seen.append(args[0])
        if len(seen) == 1: signal.raise_signal(signal.SIGTERM)
        return judged(*args)
    with monkeypatch.context() as m:
        m.setattr(engine, "to_coco_results", told)
        fit(config, tmp_path / "run", progress=False)
    assert len(seen) == 1 and "go on with --resume" in capsys.readouterr().err
    found = read_checkpoint(tmp_path / "run")
    assert (found["phase"], found["epoch"]) == ("poet", 0) and found["batch"] > 0, "the steps of the epoch are on disk"
    assert not (tmp_path / "run/predictions.json").exists() and not list((tmp_path / "run").glob(".*"))
    fit(config, tmp_path / "run", resume=True, progress=False)
    assert difference(left_by(whole), left_by(tmp_path / "run")) is None


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_any_signal_stops_at_once_and_handlers_are_given_back(first):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        with engine.stop_requests() as asked:
            assert not asked.is_set()
            signal.raise_signal(first)
            assert asked.is_set()
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_sigterm_does_nothing_more_and_under_torchrun_no_second_signal_does(monkeypatch, capfd):
    with engine.stop_requests() as asked:
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM): signal.raise_signal(s)
        assert asked.is_set()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with engine.stop_requests() as asked:
        for s in (signal.SIGINT, signal.SIGINT, signal.SIGTERM): signal.raise_signal(s)
        assert asked.is_set()
    one, two = (line for line in capfd.readouterr().err.splitlines() if line)
    assert "Ctrl-C stops at once" in one and "everything saved" in two and "Ctrl-C" not in two, "said once a run, and only what is true"


NESTED = """
import signal, sys
from poet_nb.engine import stop_requests
fired = []
def trace(frame, event, argument):
    if event == "line" and frame.f_back is not None and len(fired) % 2 == 0: # not in a handler that this very function has called
        fired.append(frame.f_lineno); signal.raise_signal(signal.SIGTERM); fired.append(0)
    return trace
with stop_requests() as asked:
    sys.settrace(trace)
    signal.raise_signal(signal.SIGTERM)
    sys.settrace(None)
    assert asked.is_set() and len(fired) >= 6, fired
"""


def test_a_signal_may_come_anywhere_while_another_one_is_noted():
    "At each line of the handler and of what it calls: a lock that the handler takes would be waited for by the handler."
    env = os.environ | dict(PYTHONPATH=str(Path(engine.__file__).parents[1]))
    subprocess.run([sys.executable, "-c", NESTED], env=env, check=True, capture_output=True, timeout=120)


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []
    def ask():
        with engine.stop_requests() as asked: seen.append(asked.is_set())
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [False]


# ---- checkpoints that are damaged, foreign or dangerous -----------------------------------------------------------------

class Payload:
    "An object that makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def cut(path): path.write_bytes(path.read_bytes()[:-1000])
def empty(path): path.write_bytes(b"")
def noise(path): path.write_bytes(bytes(range(256)) * 40)
def code(path): torch.save(dict(task=Payload(path.with_name("executed"))), path)
def plain_pickle(path): path.write_bytes(pickle.dumps(Payload(path.with_name("executed"))))
def something_else(path): torch.save({"weight": torch.zeros(3)}, path)
def a_tensor(path): torch.save(torch.zeros(3), path)


DAMAGES = [cut, empty, noise, code, plain_pickle, something_else, a_tensor]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_stands_in_for_a_damaged_one(runs, tmp_path, capsys, damage):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    damage(folder / "checkpoint.pt")
    found = read_checkpoint(folder)
    said = capsys.readouterr().err
    assert "warning" in said and str(folder / "checkpoint.pt") in said and "going on from" in said and "checkpoint.prev.pt" in said
    assert found["phase"] == "poet" and not (folder / "executed").exists()
    if damage is not cut: return
    fit(config, folder, resume=True, progress=False)
    assert difference(left_by(whole), left_by(folder)) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_two_damaged_checkpoints_are_an_error_that_names_both(runs, tmp_path, damage):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"): damage(folder / name)
    log = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as error: fit(config, folder, resume=True, progress=False)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"): assert str(folder / name) in str(error.value)
    assert not (folder / "executed").exists(), "a checkpoint is never executed"
    assert (folder / "metrics.jsonl").read_bytes() == log, "the log is left as it was"


def test_a_crash_between_the_two_renamings_loses_nothing(runs, tmp_path, capsys):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    (folder / "checkpoint.prev.pt").unlink()
    os.replace(folder / "checkpoint.pt", folder / "checkpoint.prev.pt")
    fit(config, folder, resume=True, progress=False)
    assert difference(left_by(whole), left_by(folder)) is None


def test_another_configuration_is_refused_with_the_fields(runs, tmp_path):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    other = override(config, **{"train.lr": .5, "model.dec_layers": 3, "data.scales": [32], "data.root": config.data.root, "data.workers": 1})
    with pytest.raises(CheckpointError) as error: fit(other, folder, resume=True, progress=False)
    said = str(error.value)
    assert "train.lr: 0.0005 -> 0.5" in said and "model.dec_layers: 2 -> 3" in said and "data.scales" in said
    assert "workers" not in said and "root" not in said
    assert difference(left_by(whole), left_by(folder)) is None, "nothing is touched"


def test_settings_of_the_machine_may_change_in_between(runs, tmp_path):
    "What the advice for lack of memory says must be possible with --resume."
    config, whole = runs("dropout")
    free = {"train.accumulate": 2, "train.keep_memory": True, "train.checkpoint_minutes": 1., "train.nonfinite_patience": 9, "data.pin_memory": False}
    found = read_checkpoint(copied(whole, tmp_path))
    other = override(config, **free)
    assert config.model.backbone_norm == "frozen"
    assert restore(found, other, CPU).epoch == found["epoch"]
    live = dict(found, config=override(config, **{"model.backbone_norm": "batch"}).to_dict())
    with pytest.raises(CheckpointError, match="train.accumulate"): restore(live, override(other, **{"model.backbone_norm": "batch"}), CPU)
    with pytest.raises(CheckpointError, match="train.accumulate"): restore(found | dict(phase="pretrain"), other, CPU)
    baseline = {"model.method": "ae", "train.pretrain_epochs": 0}
    with pytest.raises(CheckpointError, match="train.accumulate"): restore(found | dict(config=override(config, **baseline).to_dict()), override(other, **baseline), CPU)


def test_a_folder_with_a_run_is_refused_unless_resumed(runs, tmp_path):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    with pytest.raises(CheckpointError, match="holds a run already.*--resume"): fit(config, folder, progress=False)
    assert difference(left_by(whole), left_by(folder)) is None


# ---- a full disk --------------------------------------------------------------------------------------------------------

def full(*_): raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_leaves_the_checkpoints_there_were(runs, scenes, tmp_path, monkeypatch):
    folder = copied(runs("dropout")[1], tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    config = small(scenes)
    state = start_phase("poet", Poet(config), config, CPU)
    def write_half(content, file):
        file.write(b"half")
        full()
    for patch in ((os, "fsync", full), (torch, "save", write_half)):
        with monkeypatch.context() as m:
            m.setattr(*patch)
            with pytest.raises((OSError, PoetError), match="No space left"): save_checkpoint(state, config, folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "the files that were there, no others"
    assert read_checkpoint(folder)["epoch"] == 2


def test_wherever_the_disk_is_full_the_run_goes_on_later(scenes, tmp_path, monkeypatch):
    config, real = small(scenes, **{"train.epochs": 1, "train.batch_size": 6}), os.fsync
    def files_until(limit, folder, outcome):
        "Train with room for so many files; gives the number written."
        written = 0
        def counted(file):
            nonlocal written
            written += 1
            if written > limit: full()
            real(file)
        with monkeypatch.context() as m, outcome:
            m.setattr(os, "fsync", counted)
            fit(config, folder, progress=False)
        return written
    total = files_until(1000, tmp_path / "whole", contextlib.nullcontext())
    assert total >= 8, "configuration, environment, two logs, two checkpoints, weights, predictions"
    for limit in range(total):
        folder = tmp_path / str(limit)
        files_until(limit, folder, pytest.raises((OSError, PoetError), match="No space left"))
        assert not list(folder.glob(".*")), "no half-written file"
        fit(config, folder, resume=(folder / "config.json").exists(), progress=False)
        assert difference(left_by(tmp_path / "whole"), left_by(folder)) is None, f"room for {limit} files"
        shutil.rmtree(folder)


# ---- steps that are not finite ------------------------------------------------------------------------------------------

def poisoned(monkeypatch, when, how="loss"):
    "Spoil the training steps for which when(image_ids) holds, on the way forward or on the way back; gives the list of spoilt batches."
    spoilt, forward = [], engine.PoetLoss.forward
    def bad(self, samples, targets, *args):
        losses, ids = forward(self, samples, targets, *args), [int(t["image_id"]) for t in targets]
        if not when(ids): return losses
        spoilt.append(ids)
        if how == "loss": return losses | dict(loss=losses["loss"] * float("nan"))
        first = next(self.parameters()).sum()
        return losses | dict(loss=losses["loss"] + (first - first.detach()).sqrt()) # the root of zero: a finite loss with an infinite gradient
    monkeypatch.setattr(engine.PoetLoss, "forward", bad)
    return spoilt


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_written_down(scenes, tmp_path, monkeypatch, how):
    config = small(scenes, **{"train.pretrain_epochs": 0})
    spoilt, steps = poisoned(monkeypatch, lambda ids: 3 in ids, how), []
    def watched(state, *args):
        before = copy.deepcopy((dict(state.task.state_dict()), state.optimizer.state_dict()["state"]))
        try: return train_step(state, *args)
        except NonFiniteError:
            assert difference(before, (dict(state.task.state_dict()), state.optimizer.state_dict()["state"])) is None, "nothing was applied"
            raise
        finally: steps.append(state.batch)
    monkeypatch.setattr(engine, "train_step", watched)
    log = fit(config, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert spoilt and [line["images"] for line in lines] == spoilt and all(3 in line["images"] for line in lines)
    assert all({"phase", "epoch", "batch", "error"} <= line.keys() and "not finite" in line["error"] for line in lines)
    assert len(steps) == 6 and len(log) == 2
    assert all(math.isfinite(v) for line in log for v in line["train"].values()), "the means are those of the good steps"
    assert all(p.isfinite().all() for p in build_poet(tmp_path / "run").parameters())


def test_too_many_bad_steps_stop_the_run_with_its_last_good_state(scenes, tmp_path, monkeypatch):
    config, count, good = small(scenes, **{"train.batch_size": 2}), [0], []
    def late(ids):
        count[0] += 1
        return count[0] > 2 # the first two steps of the phase are good
    def watched(state, *args):
        losses = train_step(state, *args)
        good.append((state.phase, copy.deepcopy(dict(state.task.state_dict()))))
        return losses
    with monkeypatch.context() as m:
        poisoned(m, late)
        m.setattr(engine, "train_step", watched)
        with pytest.raises(NonFiniteError, match="3 steps in a row") as error: fit(config, tmp_path / "run", progress=False)
    assert "nonfinite.jsonl" in str(error.value) and "images" in str(error.value)
    assert len((tmp_path / "run/nonfinite.jsonl").read_text().splitlines()) == 3
    found = read_checkpoint(tmp_path / "run")
    assert [phase for phase, _ in good] == ["pretrain"] * 6 + ["poet"] * 2
    assert found["phase"] == "poet" and difference(good[-1][1], dict(found["task"])) is None, "no good step is lost"
    log = fit(config, tmp_path / "run", resume=True, progress=False) # the reason is gone
    assert len(log) == 2 and all(math.isfinite(line["train"]["loss"]) for line in log)


def test_bad_steps_that_are_not_in_a_row_do_not_stop_a_run(scenes, tmp_path, monkeypatch):
    config, count = small(scenes, **{"train.pretrain_epochs": 0, "train.epochs": 3, "train.nonfinite_patience": 2}), [0]
    def every_other(ids):
        count[0] += 1
        return count[0] % 2 == 0
    spoilt = poisoned(monkeypatch, every_other)
    assert len(fit(config, tmp_path / "run", progress=False)) == 3 and len(spoilt) == 4


def ask_later(monkeypatch):
    "Judge steps on a CPU as on a GPU: the optimiser leaves a bad step out, the host hears of it in the next one."
    monkeypatch.setattr(engine, "asks_later", lambda optimizer, device: optimizer.defaults["fused"])


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_judged_later_is_left_out_all_the_same(scenes, tmp_path, monkeypatch, how):
    config, asked = small(scenes, **{"train.ema_decay": 0., "train.epochs": 3, "train.accumulate": 2, "train.batch_size": 4}), []
    poisoned(monkeypatch, lambda ids: 3 in ids, how)
    logs = {"now": fit(config, tmp_path / "now", progress=False)}
    ask_later(monkeypatch)
    check = engine.Outcome.check
    monkeypatch.setattr(engine.Outcome, "check", lambda self: (asked.append(self.batch), check(self)))
    logs["later"] = fit(config, tmp_path / "later", progress=False)
    assert asked == [0, 1, 2] * (len(asked) // 3) and len(asked) == 3 * (config.train.pretrain_epochs + 3), "every step was judged, in its turn"
    bad = [[json.loads(line) for line in (tmp_path / n / "nonfinite.jsonl").read_text().splitlines()] for n in logs]
    ours, theirs = (read_checkpoint(tmp_path / n) for n in ("later", "now"))
    assert len(bad[0]) >= 3 and bad[0] == bad[1]
    assert all(difference(ours[part], theirs[part], part) is None for part in ("task", "optimizer", "epoch", "batch"))
    for a, b in zip(*logs.values(), strict=True):
        assert difference(*({k: v for k, v in line.items() if k != "seconds"} for line in (a, b))) is None, "means, scores and losses are the same"


def test_too_many_bad_steps_stop_a_run_that_judges_later(scenes, tmp_path, monkeypatch):
    config, count = small(scenes, **{"train.batch_size": 2, "train.pretrain_epochs": 0, "train.ema_decay": 0.}), [0]
    def late(ids):
        count[0] += 1
        return count[0] > 2
    with monkeypatch.context() as m:
        ask_later(m); poisoned(m, late)
        with pytest.raises(NonFiniteError, match="3 steps in a row"): fit(config, tmp_path / "run", progress=False)
    assert [json.loads(line)["batch"] for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()] == [2, 3, 4]
    found = read_checkpoint(tmp_path / "run")
    assert all(x.isfinite().all() for x in found["task"].values() if x.is_floating_point())
    assert {int(s["step"]) for s in found["optimizer"]["state"].values()} == {2}, "only the good steps count"
    log = fit(config, tmp_path / "run", resume=True, progress=False)
    assert len(log) == 2 and all(math.isfinite(line["train"]["loss"]) for line in log)


def test_a_step_that_is_judged_later_waits_only_for_the_matching(scenes, monkeypatch):
    config = small(scenes)
    state, batch = start_phase("poet", Poet(config), config, CPU), next(iter(engine.train_loader(config, CPU)[0]))
    ask_later(monkeypatch)
    with HostWaits(CPU) as waits: train_step(state, [batch], config, CPU)
    assert waits.counts == {"cpu": 1} and state.outcome is not None
    state.outcome.check()
    assert not hasattr(state.optimizer, "found_inf"), "a step that is made by hand is made"


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_another_kind_of_device_is_gone_on_with(scenes, tmp_path, monkeypatch, fused):
    "On Apple's GPUs AdamW is not fused; the checkpoint says so, and the device of today decides."
    config = small(scenes, **{"train.pretrain_epochs": 0, "train.fused": fused})
    fit(override(config, **{"train.epochs": 1}), tmp_path / "run", progress=False)
    found = read_checkpoint(tmp_path / "run")
    for group in found["optimizer"]["param_groups"]: group["fused"] = False
    state = restore(found, override(config, **{"train.epochs": 1}), CPU)
    assert [bool(group["fused"]) for group in state.optimizer.param_groups] == [fused] * 2
    ask_later(monkeypatch)
    train_step(state, [next(iter(engine.train_loader(config, CPU)[0]))], config, CPU)


def test_broken_weights_are_found_by_the_matcher(scenes, tmp_path):
    config = small(scenes)
    state = start_phase("poet", Poet(config), config, CPU)
    with torch.no_grad(): state.task.poet.class_embed.bias[0] = float("nan")
    loader, _ = engine.train_loader(config, CPU)
    samples, targets = next(iter(loader))
    with pytest.raises(NonFiniteError) as error: train_step(state, [(samples, targets)], config, CPU)
    assert all(str(int(t["image_id"])) in str(error.value) for t in targets) and "class" in str(error.value)


# ---- small images first -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"data.buckets": True, "data.pad_multiple": 32}, {"data.workers": 1}])
def test_images_grow_when_they_are_to(scenes, changes):
    "32 px in the pre-training and the first epoch, then 64."
    config = small(scenes, **{"data.small_epochs": 1, "data.small_share": .5, "data.pad_multiple": 32} | changes)
    loader, batches = engine.train_loader(config, CPU)
    def sides():
        return {max(samples.tensors.shape[2:]) for samples, _ in loader}
    for epoch, side in ((0, 32), (1, 64), (engine.PRETRAINING, 32), (engine.PRETRAINING + 1, 32), (5, 64)):
        batches.epoch = epoch
        assert sides() == {side}
    samples, _ = next(iter(engine.eval_loader(config, CPU)))
    assert max(samples.tensors.shape[2:]) == 64, "evaluation has its size throughout"


def test_a_run_that_grows_goes_on_as_if_nothing_had_happened(scenes, tmp_path, monkeypatch):
    config = small(scenes, **{"data.small_epochs": 1, "data.pad_multiple": 32})
    whole, steps = fit(config, tmp_path / "whole", progress=False), [0]
    def stops(*args):
        steps[0] += 1
        if steps[0] in (2, 5): signal.raise_signal(signal.SIGINT)
        return train_step(*args)
    monkeypatch.setattr(engine, "train_step", stops)
    for _ in range(3): log = fit(config, tmp_path / "parts", resume=(tmp_path / "parts").exists(), progress=False)
    assert len(log) == len(whole) == 2
    assert all(difference(a[k], b[k], k) is None for a, b in zip(log, whole) for k in ("train", "val", "coco"))


def test_a_program_that_leaves_a_loader_open_ends(scenes):
    code = f"""
import torch
from poet_nb.config import override, preset
from poet_nb.engine import train_loader
config = override(preset("poet_tiny"), **{{"data.root": {str(scenes)!r}, "data.workers": 2, "train.batch_size": 2}})
loader, _ = train_loader(config, torch.device("cpu"))
it = iter(loader)
print(len(next(it)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


# ---- images that can't be read ------------------------------------------------------------------------------------------

def truncate(root, split, image_id) -> Path:
    path = root / split / f"{image_id:012d}.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_in_training_is_skipped_counted_and_told(scenes, tmp_path, capsys, workers):
    root = shutil.copytree(scenes, tmp_path / "data")
    config = small(root, **{"data.workers": workers, "train.batch_size": 13})
    bad = truncate(root, "train2017", 5)
    log = fit(config, tmp_path / "run", progress=False)
    pretrain = without_times(tmp_path / "run", "pretrain.jsonl")
    assert [line["skipped"] for line in pretrain + log] == [[str(bad)]] * 3, "in every epoch anew"
    said = capsys.readouterr().err
    assert said.count("unreadable") == 3 and str(bad) in said
    assert all("skipped" not in line for line in fit(small(scenes, **{"train.epochs": 1}), tmp_path / "good", progress=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_in_evaluation_is_an_error_and_costs_no_training(runs, scenes, tmp_path, monkeypatch, workers):
    whole = runs("dropout")[1]
    root = shutil.copytree(scenes, tmp_path / "data")
    config = small(root, **{"data.workers": workers})
    bad = truncate(root, "val2017", 4)
    with pytest.raises(DataError) as error: fit(config, tmp_path / "run", progress=False)
    assert str(bad) in str(error.value)
    shutil.copy(scenes / "val2017" / bad.name, bad)
    steps = []
    monkeypatch.setattr(engine, "train_step", lambda *args: steps.append(1) or train_step(*args))
    fit(config, tmp_path / "run", resume=True, progress=False)
    assert len(steps) == 3, "the epoch before the failed evaluation is not trained again"
    assert difference(without_times(whole, "metrics.jsonl"), without_times(tmp_path / "run", "metrics.jsonl")) is None


@pytest.mark.parametrize("changes", [{"train.batch_size": 40, "train.accumulate": 40}, {"train.batch_size": 40, "train.accumulate": 2}])
def test_a_batch_larger_than_the_dataset_trains_or_is_refused(scenes, tmp_path, changes):
    config = small(scenes, **{"train.epochs": 1, "train.pretrain_epochs": 0, **changes})
    try: log = fit(config, tmp_path / "run", progress=False)
    except PoetError as error: assert "train.batch_size" in str(error) and "13" in str(error)
    else: assert math.isfinite(log[0]["train"]["loss"]) and log[0]["images"] == 13


def test_a_split_without_images_is_refused(scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "data")
    file = root / "annotations/person_keypoints_train2017.json"
    coco = json.loads(file.read_text())
    file.write_text(json.dumps(coco | dict(images=[], annotations=[])))
    with pytest.raises(PoetError, match="train2017"): fit(small(root), tmp_path / "run", progress=False)


# ---- where a run starts from --------------------------------------------------------------------------------------------

def test_a_run_can_start_from_another_run_or_its_weights(runs, scenes, tmp_path):
    _, whole = runs("dropout")
    config, firsts = small(scenes, **{"train.epochs": 1}), []
    for i, source in enumerate((whole, whole / "model.safetensors")):
        log = fit(config, tmp_path / str(i), init=source, progress=False)
        assert json.loads((tmp_path / str(i) / "environment.json").read_text())["init"] == dict(path=str(source), sha256=hashlib.sha256((whole / "model.safetensors").read_bytes()).hexdigest())
        assert not (tmp_path / str(i) / "pretrain.jsonl").exists(), "no pretraining: the weights are trained"
        firsts.append(log[0]["train"])
    assert firsts[0] == firsts[1] != without_times(whole, "metrics.jsonl")[0]["train"]
    assert "init" not in json.loads((whole / "environment.json").read_text())


# ---- mixed precision ----------------------------------------------------------------------------------------------------

def one_step(config, samples, targets, clip, scale=None):
    "Gradients that an optimiser step uses, from the same weights every time; and the state after it."
    config = override(config, **{"train.clip_max_norm": clip, "model.dropout": 0.})
    torch.manual_seed(0)
    state = start_phase("poet", Poet(config), config, CPU)
    if scale: state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    losses = train_step(state, [(samples, targets)], config, CPU)
    return torch.cat([p.grad.flatten() for p in state.task.parameters() if p.grad is not None]), state, losses


@pytest.mark.parametrize("clip", [0., .1])
def test_fp16_gradients_are_unscaled_before_they_are_clipped(scenes, clip):
    half, single = small(scenes, "fp16"), small(scenes, "fp16", **{"train.amp": "none"})
    samples, targets = next(iter(engine.train_loader(half, CPU)[0]))
    exact, _, _ = one_step(single, samples, targets, clip)
    for scale in (1., 16., 256.):
        ours, state, _ = one_step(half, samples, targets, clip, scale)
        assert state.scaler.get_scale() == scale, "the step was not skipped"
        assert torch.cosine_similarity(ours, exact, 0) > .99 and math.isclose(ours.norm(), exact.norm(), rel_tol=.05)
    if clip: assert math.isclose(ours.norm(), clip, rel_tol=1e-3), "this batch has a gradient that is clipped"


def test_an_fp16_overflow_skips_the_step_and_halves_a_scale_that_is_kept(scenes, tmp_path):
    config = small(scenes, "fp16")
    samples, targets = next(iter(engine.train_loader(config, CPU)[0]))
    torch.manual_seed(0)
    state = start_phase("poet", Poet(config), config, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.**60)
    before = copy.deepcopy(dict(state.task.named_parameters()))
    train_step(state, [(samples, targets)], config, CPU)
    assert state.scaler.get_scale() == 2.**59 and difference(before, dict(state.task.named_parameters())) is None
    save_checkpoint(state, config, tmp_path)
    assert restore(read_checkpoint(tmp_path), config, CPU).scaler.get_scale() == 2.**59


def test_one_scaler_serves_a_whole_phase(scenes, tmp_path, monkeypatch):
    scalers = {}
    def watched(state, *args):
        scalers.setdefault(state.phase, []).append(state.scaler)
        return train_step(state, *args)
    monkeypatch.setattr(engine, "train_step", watched)
    fit(small(scenes, "fp16"), tmp_path / "run", progress=False)
    assert [len(scalers["pretrain"]), len(scalers["poet"])] == [3, 6]
    assert all(s is seen[0] and s.is_enabled() for seen in scalers.values() for s in seen), "not a new one every epoch"
    found = read_checkpoint(tmp_path / "run")
    applied, skipped = {float(s["step"]) for s in found["optimizer"]["state"].values()}, math.log2(65536 / found["scaler"]["scale"])
    assert applied == {6 - skipped}, "each step was applied or halved the scale"


def test_bf16_needs_no_scaler_and_parameters_stay_fp32(runs):
    _, whole = runs("bf16")
    found = read_checkpoint(whole)
    assert found["scaler"] == {} and all(v.dtype == torch.float32 for v in found["task"].values() if v.is_floating_point())


# ---- average of the weights ---------------------------------------------------------------------------------------------

def test_the_average_follows_its_definition_and_is_what_is_saved(scenes, tmp_path, monkeypatch):
    config = small(scenes, **{"train.ema_decay": .3, "train.pretrain_epochs": 0, "train.epochs": 1})
    weights, real = [], engine.update_ema
    def watched(ema, model, decay):
        if not weights: weights.append(ema.query_embed.weight.clone())
        real(ema, model, decay)
        weights.append(model.query_embed.weight.detach().clone())
        assert math.isclose(decay, min(.3, len(weights[1:]) / (9 + len(weights[1:]))))
    monkeypatch.setattr(engine, "update_ema", watched)
    fit(config, tmp_path / "run", progress=False)
    average = weights[0]
    for step, new in enumerate(weights[1:]):
        decay = min(.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * new
    assert len(weights) == 4 and torch.allclose(read_checkpoint(tmp_path / "run")["ema"]["query_embed.weight"], average, atol=1e-6)
    assert torch.allclose(build_poet(tmp_path / "run").query_embed.weight, average, atol=2e-3), "saved with 16 bits"


# ---- learning rate ------------------------------------------------------------------------------------------------------

@given(per_epoch=st.integers(1, 50), epochs=st.integers(1, 30), drops=st.lists(st.integers(1, 30), min_size=1, max_size=3, unique=True), data=st.data())
def test_lr_drops_at_the_start_of_the_epoch_after(per_epoch, epochs, drops, data):
    config = override(preset("poet_r50"), **{"train.lr_drops": drops})
    epoch, batch = data.draw(st.integers(0, epochs - 1)), data.draw(st.integers(0, per_epoch - 1))
    expected = .1 ** len([d for d in drops if epoch >= d])
    assert math.isclose(lr_factor(epoch * per_epoch + batch, per_epoch, config, epochs), expected)


@given(per_epoch=st.integers(1, 50), epochs=st.integers(1, 30), warmup=st.integers(0, 40), end=st.floats(0, 1))
def test_cosine_falls_from_the_peak_to_its_end_after_the_warm_up(per_epoch, epochs, warmup, end):
    config = override(preset("poet_tiny"), **{"train.warmup_steps": warmup, "train.lr_end": end})
    steps = per_epoch * epochs
    rates = [lr_factor(s, per_epoch, config, epochs) for s in range(steps + 1)]
    plain = [end + (1 - end) * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps + 1)]
    for s, (rate, cosine) in enumerate(zip(rates, plain)): assert math.isclose(rate, cosine * min(1, (s + 1) / (warmup + 1)), abs_tol=1e-12)
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1:])) and 0 < rates[0] <= 1


def test_a_run_uses_the_rates_of_the_schedule(runs, scenes, tmp_path, monkeypatch):
    config, whole = runs("dropout") # a drop after the first epoch
    assert [line["lr"] for line in without_times(whole, "metrics.jsonl")] == pytest.approx([config.train.lr, config.train.lr / 10])
    rates = []
    def watched(state, *args):
        rates.append((state.phase, sorted(g["lr"] for g in state.optimizer.param_groups)))
        return train_step(state, *args)
    monkeypatch.setattr(engine, "train_step", watched)
    cosine = small(scenes, "bf16", **{"train.warmup_steps": 2, "train.accumulate": 1})
    fit(cosine, tmp_path / "run", progress=False)
    t = cosine.train
    peaks = {"pretrain": [t.pretrain_lr] * 2, "poet": sorted([t.lr, t.lr_backbone])}
    for phase, epochs in (("pretrain", 1), ("poet", 2)):
        factors = [lr_factor(s, 3, cosine, epochs) for s in range(3 * epochs)]
        assert [r for p, r in rates if p == phase] == [pytest.approx([f * peak for peak in peaks[phase]]) for f in factors]


# ---- what is refused before anything is spent ---------------------------------------------------------------------------

@pytest.mark.parametrize("changes, names", [({"loss.loss": "paper"}, "absolute_loss_coef"), ({"model.backbone": "resnet_none"}, "resnet_none"),
                                            ({"train.init": "nowhere.safetensors", "train.pretrain_epochs": 0}, "nowhere")])
def test_a_start_that_fails_leaves_nothing_behind(scenes, tmp_path, changes, names):
    with pytest.raises(PoetError, match=names): fit(small(scenes, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists(), "the same command can be given again, mended"


def test_fp16_gradients_that_always_overflow_end_the_run(scenes, tmp_path):
    config = small(scenes, "fp16")
    samples, targets = next(iter(engine.train_loader(config, CPU)[0]))
    torch.manual_seed(0)
    state = start_phase("poet", Poet(config), config, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.5)
    with torch.no_grad(): state.task.poet.kpt_embed.layers[0].weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteError, match="train.amp=bf16"): train_step(state, [(samples, targets)], config, CPU)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_uncommitted_code_is_called_so(tmp_path, monkeypatch):
    "In a repository of our own with the library in a folder, as in this one."
    package = tmp_path / "poet_nb"
    package.mkdir()
    (package / "engine.py").write_text("a = 1\n")
    (tmp_path / "other.txt").write_text("x\n")
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)
    git("init"), git("add", "."), git("commit", "-m", "first")
    monkeypatch.setattr(engine, "__file__", str(package / "engine.py"))
    state = lambda: engine.environment(preset("poet_tiny"), CPU)["dirty"]
    assert not state()
    (tmp_path / "other.txt").write_text("y\n")
    assert not state(), "what lies elsewhere does not count"
    (package / "engine.py").write_text("a = 2\n")
    assert state()


@pytest.mark.parametrize("amp, capabilities, expected", [
    ("auto", {"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16), ("auto", {"avx512_bf16": True, "cpu_name": "Intel Xeon"}, None),
    ("auto", {"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16), ("auto", {}, None), ("none", {"amx_bf16": True}, None), ("bf16", {}, torch.bfloat16),
    ("fp16", {"amx_bf16": True}, torch.float16)])
def test_auto_takes_bf16_where_a_processor_is_fast_with_it(monkeypatch, amp, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert engine.autocast_dtype(amp, CPU) is expected


def test_targets_of_a_batch_travel_as_one_message_and_are_not_pinned():
    "Tensors sent one by one are a file of shared memory each: nearly six hundred for 64 images, slower than a step."

    person = dict(labels=torch.zeros(2).long(), keypoints=torch.rand(2, 17, 2), ignore=torch.zeros(0, 4), size=torch.tensor([3, 4]), image_id=torch.tensor(7), path="a.jpg")
    targets = Targets([person, person | dict(image_id=torch.tensor(8))])
    sent = bytes(ForkingPickler.dumps(targets))
    assert b"rebuild_storage" not in sent and b"rebuild_tensor" not in sent and b"rebuild_storage" in bytes(ForkingPickler.dumps(list(targets)))
    back = pickle.loads(sent)
    assert len(back) == 2 and back[1]["image_id"].item() == 8 and back[0]["path"] == "a.jpg"
    for name, value in person.items():
        if torch.is_tensor(value): assert torch.equal(back[0][name], value) and back[0][name].dtype == value.dtype
    back[0]["keypoints"].mul_(2) # can be written to
    assert pin_memory(targets) is targets


@pytest.mark.parametrize("unposed", ["person", "nobody"])
def test_validation_losses_do_not_depend_on_how_images_are_put_into_batches(tmp_path, unposed):
    "Images without people must not lower the losses of poses because they are alone in a batch."
    make_synth(tmp_path, "val2017", n=12, config=SynthConfig(size=64, empty_share=.4, unlabelled_share=.3), seed=3, workers=1, progress=False)
    data = small(tmp_path, **{"data.unposed": unposed})
    torch.manual_seed(0)
    model = Poet(data)
    alone, some, together = (engine.evaluate(model, override(data, **{"train.batch_size": n}), CPU, progress=False)[1] for n in (1, 5, 12))
    split = engine.open_split(data.data, "val2017")
    posed = split.index.people.visibility.any(1)
    assert 0 < posed.sum() < len(posed) and (np.diff(split.index.people.start) == 0).sum() >= 3
    assert engine.people_an_image(split, data) == (posed.sum() if unposed == "nobody" else len(posed)) / 12
    for name in together:
        if name != "class_error": assert alone[name] == pytest.approx(together[name], rel=1e-4) == some[name], name


# ---- which weights stay, when a run ends, what is trained ---------------------------------------------------------------

def aps(monkeypatch, *values):
    "Let the evaluations of a run, one per epoch, come to these APs; gives the list of weights that they saw."
    left, seen, evaluate = list(values), [], engine.evaluate
    def scored(model, *args, **kwargs):
        numbers, losses, results = evaluate(model, *args, **kwargs)
        seen.append({k: v.half() for k, v in model.state_dict().items() if v.is_floating_point()})
        return dict(numbers, AP=left.pop(0)), losses, results
    monkeypatch.setattr(engine, "evaluate", scored)
    return seen


def kept(folder, seen) -> list[int]:
    "The epochs whose weights are those in the run folder."
    state = load_file(folder / "model.safetensors")
    return [i for i, weights in enumerate(seen, 1) if all(torch.equal(state[k], v) for k, v in weights.items())]


@pytest.mark.parametrize("keep, epoch", [("last", 4), ("best", 2)])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_last_or_the_best_weights_stay(scenes, tmp_path, monkeypatch, keep, epoch, stopped):
    config = small(scenes, **{"train.epochs": 4, "train.pretrain_epochs": 0, "train.keep": keep})
    seen = aps(monkeypatch, .1, .3, .3, .2)
    if stopped: fit_for(monkeypatch, 7, config, tmp_path / "run")            # in the third of four epochs of three steps
    log = fit(config, tmp_path / "run", resume=stopped, progress=False)
    assert [line["coco"]["AP"] for line in log] == [.1, .3, .3, .2] and kept(tmp_path / "run", seen) == [epoch]
    image_ids = {r["image_id"] for r in json.loads((tmp_path / "run/predictions.json").read_text())}
    assert image_ids <= set(engine.open_split(config.data, "val2017").image_ids)


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(scenes, tmp_path, monkeypatch):
    config = small(scenes, **{"train.epochs": 9, "train.pretrain_epochs": 0, "train.patience": 2, "train.keep": "best"})
    seen = aps(monkeypatch, .1, .3, .2, .3)
    for resume in (False, True): assert len(fit(config, tmp_path / "run", resume=resume, progress=False)) == 4
    assert kept(tmp_path / "run", seen) == [2]
    monkeypatch.undo()
    more = fit(override(config, **{"train.patience": 3}), tmp_path / "run", resume=True, progress=False)
    assert len(more) == 5, "patience may be changed in between; the untrained network finds nobody"


def test_more_epochs_of_a_schedule_with_steps_are_as_if_they_had_been_asked_for_at_once(runs, scenes, tmp_path):
    config, _ = runs("dropout")
    longer = override(config, **{"train.epochs": 3})
    fit(longer, tmp_path / "whole", progress=False)
    folder = copied(runs("dropout")[1], tmp_path)
    fit(longer, folder, resume=True, progress=False)
    assert difference(left_by(tmp_path / "whole"), left_by(folder)) is None
    assert json.loads((folder / "config.json").read_text())["train"]["epochs"] == 3
    cosine, whole = runs("bf16")
    with pytest.raises(CheckpointError, match="train.epochs: 2 -> 3.*--init"): fit(override(cosine, **{"train.epochs": 3}), whole, resume=True, progress=False)


def test_frozen_parts_stay_and_the_others_move(runs, scenes, tmp_path):
    _, whole = runs("dropout")
    config = small(scenes, **{"train.epochs": 1, "train.freeze": ["backbone", "transformer.encoder", "query_embed.weight"], "train.weight_decay": .1})
    fit(config, tmp_path / "run", init=whole, progress=False)
    before, after = load_file(whole / "model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not any(k.startswith(("backbone", "transformer.encoder", "query_embed")) for k in moved)
    assert {"class_embed.weight", "input_proj.weight", "transformer.decoder.norm.weight"} <= moved


@pytest.mark.parametrize("names, said", [(["backbon"], "'backbon' is no part of the model; it has backbone, input_proj, transformer"), (["transformer.enc"], "'transformer.enc' is no part"),
                                         (["backbone", "input_proj", "transformer", "query_embed", "class_embed", "kpt_embed"], "nothing is left to train")])
def test_a_part_that_is_not_there_can_not_be_frozen(scenes, tmp_path, names, said):
    with pytest.raises(PoetError, match="train.freeze.*" + said): fit(small(scenes, **{"train.freeze": names, "train.pretrain_epochs": 0}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["num_keypoints", "num_classes"])
def test_data_of_other_joints_or_classes_are_refused_before_anything_is_written(scenes, tmp_path, field):
    with pytest.raises(PoetError, match=f"field model.{field}: the model has 8, .*json has (17|1);"): fit(small(scenes, **{f"model.{field}": 8}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_without_people_to_learn_from_images_are_left_out(tmp_path):
    "Who counts nobody without labelled joints trains on the images that the authors' filter leaves."
    make_synth(tmp_path, "train2017", n=30, config=SynthConfig(size=64, empty_share=.3, unlabelled_share=.5), seed=3, workers=1, progress=False)
    found = {unposed: engine.train_loader(small(tmp_path, **{"data.unposed": unposed, "data.with_people_only": True}), CPU)[0].dataset.dataset for unposed in ("person", "nobody")}
    people = found["person"].index.people
    posed = [i for i in range(30) if people.visibility[people.start[i]:people.start[i + 1]].any()]
    assert found["nobody"].rows.tolist() == posed and 0 < len(posed) < len(found["person"]) < 30


def test_an_epoch_without_evaluation_writes_one_checkpoint(scenes, tmp_path, monkeypatch):
    written, write = [], engine.write_checkpoint
    monkeypatch.setattr(engine, "write_checkpoint", lambda content, folder: (written.append((content["epoch"], content["batch"])), write(content, folder)))
    fit(small(scenes, **{"train.epochs": 3, "train.eval_every": 2, "train.pretrain_epochs": 0}), tmp_path / "run", progress=False)
    assert written == [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)], "before evaluation, and at the end of an epoch"


# ---- what a resumed run goes on with -----------------------------------------------------------------------------------

def test_other_data_are_not_gone_on_with(runs, tmp_path):
    config, whole = runs("dropout")
    folder, other = copied(whole, tmp_path), tmp_path / "other"
    for split, n in (("train2017", 8), ("val2017", 5)): make_synth(other, split, n=n, config=SynthConfig(size=64), seed=1, workers=1, progress=False)
    with pytest.raises(CheckpointError, match="has seen other images or joints than those in .*other.*--init"): fit(override(config, **{"data.root": str(other)}), folder, resume=True, progress=False)
    assert difference(left_by(whole), left_by(folder)) is None
    moved = shutil.copytree(config.data.root, tmp_path / "moved")
    fit(override(config, **{"data.root": str(moved), "train.epochs": 3}), folder, resume=True, progress=False)
    assert json.loads((folder / "config.json").read_text())["data"]["root"] == str(moved), "it is remembered where they are now"


def test_a_checkpoint_from_before_data_were_marked_is_gone_on_with(runs, tmp_path):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    found = read_checkpoint(folder)
    del found["data"]
    engine.write_checkpoint(found, folder)
    assert len(fit(override(config, **{"train.epochs": 3}), folder, resume=True, progress=False)) == 3


def test_data_of_the_same_numbers_are_told_apart(scenes, tmp_path):
    make_synth(tmp_path, "val2017", n=5, config=SynthConfig(size=64), seed=2, workers=1, progress=False)
    a, b = (engine.open_split(small(root).data, "val2017") for root in (scenes, tmp_path))
    assert a.image_ids == b.image_ids and len({engine.data_mark(*pair) for pair in ((a, a), (a, b), (b, a))}) == 3


def test_two_first_starts_in_one_folder(scenes, tmp_path):
    "The second is refused before it writes anything."
    program = "import sys; from pathlib import Path; from poet_nb.engine import only_here\nwith only_here(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(CheckpointError, match="another process trains"): fit(small(scenes), tmp_path / "run", progress=False)
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
        other.communicate("")
    assert not (tmp_path / "run").exists(), "a start that comes to nothing leaves nothing"


def test_parts_with_live_statistics_are_not_called_frozen(scenes, tmp_path):
    with pytest.raises(PoetError, match="train.freeze: 'backbone' has BatchNorms whose statistics"):
        fit(small(scenes, **{"train.pretrain_epochs": 0, "model.backbone_norm": "batch", "train.freeze": ["backbone"]}), tmp_path / "run", progress=False)


@pytest.mark.parametrize("content", ["[]", '{"resumed": []}', "7", "[" * 100_000], ids=["list", "no facts", "number", "deep"])
def test_an_odd_environment_file_is_replaced(runs, tmp_path, content):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    (folder / "environment.json").write_text(content)
    fit(config, folder, resume=True, progress=False)
    assert "commit" in (now := json.loads((folder / "environment.json").read_text())) or now["resumed"][0]["commit"] is not None


def test_what_a_run_goes_on_with_is_written_down(runs, tmp_path):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    facts = json.loads((folder / "environment.json").read_text())
    fit(config, folder, resume=True, progress=False)
    assert json.loads((folder / "environment.json").read_text()) == facts, "nothing is new"
    (folder / "environment.json").write_text(json.dumps(facts | dict(commit="older")))
    (folder / "skeleton.json").unlink()
    for _ in range(2): fit(config, folder, resume=True, progress=False)
    now = json.loads((folder / "environment.json").read_text())
    assert now["commit"] == "older" and [r["commit"] for r in now["resumed"]] == [facts["commit"]] and (folder / "skeleton.json").read_bytes() == (whole / "skeleton.json").read_bytes()
    (folder / "environment.json").write_text("{")
    fit(config, folder, resume=True, progress=False)
    assert json.loads((folder / "environment.json").read_text())["commit"] == facts["commit"]


def test_one_process_trains_in_a_folder(runs, tmp_path):
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    program = "import sys; from pathlib import Path; from poet_nb.engine import only_here\nwith only_here(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(CheckpointError, match="another process trains in this folder"): fit(override(config, **{"train.epochs": 3}), folder, resume=True, progress=False)
        other.kill()
    assert len(fit(override(config, **{"train.epochs": 3}), folder, resume=True, progress=False)) == 3 and not (folder / ".lock").exists()


def test_the_good_checkpoint_outlives_resumes_that_fail(scenes, tmp_path, monkeypatch, capsys):
    "A run that diverges is gone on with once more, and again, as the message says."
    config, folder = small(scenes, **{"train.pretrain_epochs": 0, "train.nonfinite_patience": 1}), tmp_path / "run"
    fit_for(monkeypatch, 1, config, folder, resume=False)
    good = read_checkpoint(folder)
    step, taken = engine.train_step, []
    def failing(*args):
        taken.append(1)
        if len(taken) > 1: raise NonFiniteError("nan", {})
        return step(*args)
    monkeypatch.setattr(engine, "train_step", failing)
    for _ in range(3):
        with pytest.raises(NonFiniteError, match="1 steps in a row were not finite.*remove .*checkpoint.pt.*--init"): fit(config, folder, resume=True, progress=False)
    (folder / "checkpoint.pt").unlink()
    assert difference(good, read_checkpoint(folder)) is None


def test_an_epoch_without_a_finite_step_stops_the_run(scenes, tmp_path, monkeypatch):
    config = small(scenes, **{"train.pretrain_epochs": 0, "train.nonfinite_patience": 99})
    def failing(*args): raise NonFiniteError("nan", {})
    monkeypatch.setattr(engine, "train_step", failing)
    with pytest.raises(NonFiniteError, match="no step of poet epoch 1 was finite"): fit(config, tmp_path / "run", progress=False)


def test_a_line_that_can_not_be_read_costs_no_other(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"epoch": 1}\n{"epo\n{"epoch": 2}\n{"epoch": 3}\n{"ep')
    engine.cut_log(log, 2)
    assert log.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_a_run_stopped_while_it_is_evaluated_says_where_it_is(scenes, tmp_path, monkeypatch, capsys):
    def asked(*args, **kwargs): raise engine.Stopped
    monkeypatch.setattr(engine, "evaluate", asked)
    fit(small(scenes, **{"train.pretrain_epochs": 0}), tmp_path / "run", progress=False)
    found = read_checkpoint(tmp_path / "run")
    assert "stopped after poet epoch 0, batch 3" in capsys.readouterr().err and (found["epoch"], found["batch"]) == (0, 3)
