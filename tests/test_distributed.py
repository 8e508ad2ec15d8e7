"""Several processes train as one does: the same losses and weights, every image scored once, one writer, and a killed process is a restart."""
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from poet_nb import cli, distributed
from poet_nb.config import ConfigError, PoetError, override, preset
from poet_nb.distributed import fresh_part, mark_begun, share_of, was_restarted
from poet_nb.engine import EpochBatches, fit
from poet_nb.synth import SynthConfig, make_synth

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    "48 training and 10 validation scenes."
    root = tmp_path_factory.mktemp("people")
    for split, n in (("train2017", 48), ("val2017", 10)): make_synth(root, split, n=n, config=SynthConfig(), seed=3, workers=1, progress=False)
    return root


def small(root, **changes):
    "A model for seconds, without dropout, in float32: what differs between one process and two is the order of sums alone."
    return override(preset("poet_tiny"), **({
        "data.root": str(root), "data.scales": [64], "data.max_size": 64, "data.eval_scale": 64, "data.crop_resize": [64, 80], "data.crop_size": [48, 80],
        "data.pad_multiple": 64, "data.workers": 0, "model.hidden_dim": 32, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 32,
        "train.batch_size": 8, "train.epochs": 4, "train.warmup_steps": 2, "train.device": "cpu", "train.pretrain_epochs": 0, "train.amp": "none",
        "train.lr": 1e-3, "train.eval_every": 4, "train.ema_decay": .9} | changes))


STARTED = [] # by the present test


def launch(config, run, *more, processes=2, nodes=None, environment={}, script=None):
    "`torchrun` with processes on this machine; the process object."
    file = run.parent / f"{run.name}.json"
    file.write_text(json.dumps(config.to_dict()))
    where = nodes or ["--standalone"]
    what = [script] if script else ["-m", "poet_nb.cli", "train", "--config", file, "--folder", run, "--quiet", *more]
    words = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", processes, *what]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo") | environment
    STARTED.append(subprocess.Popen([str(w) for w in words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True))
    return STARTED[-1]


def family(pid):
    "Process numbers of a process and all that come from it: torchrun gives each of its processes a session of its own."
    pairs = [tuple(map(int, line.split())) for line in subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()]
    found = [pid]
    for one in found: found += [child for child, parent in pairs if parent == one]
    return found


def send(job, number):
    "A signal to the whole family, as a cluster sends it."
    for pid in family(job.pid):
        with contextlib.suppress(ProcessLookupError): os.kill(pid, number)


@pytest.fixture(autouse=True)
def nobody_is_left():
    "Whatever becomes of a test."
    STARTED.clear()
    yield
    for job in STARTED:
        if job.poll() is None: send(job, signal.SIGKILL); job.communicate()


def finish(job, seconds=300):
    "Its output. The limit is there for what hangs: beside other work the start of PyTorch alone has taken a minute."
    try: return job.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired as error:
        said = error.output or ""
        raise AssertionError(f"still running after {seconds} s; it said\n{(said if isinstance(said, str) else said.decode(errors='replace'))[-6000:]}") from None


def log_of(run): return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(a, b, tolerance):
    "Do two logs tell the same losses?"
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for part in ("train", "val"):
            for k, v in x.get(part, {}).items():
                if "error" not in k: assert math.isclose(v, y[part][k], rel_tol=tolerance, abs_tol=tolerance), (x["epoch"], part, k, v, y[part][k])


def test_batches_are_dealt_out(monkeypatch):
    whole, parts = list(EpochBatches(30, 7, seed=1)), []
    for me in range(3):
        monkeypatch.setattr("poet_nb.engine.share_of", lambda batch: share_of(batch, me, 3))
        parts.append(list(EpochBatches(30, 7, seed=1)))
    assert [sum(three, []) for three in zip(*parts)] == whole and {len(p) for ps in parts for p in ps} == {2, 3}


def test_commands_of_the_notebook_are_understood():
    "By torchrun, which takes the beginning of an option's name for the option, and by the program."
    text = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/30b_distributed.ipynb").read_text())["cells"] if c["cell_type"] == "markdown")
    lines = [line for line in text.replace("\\\n", " ").replace("$resume", "--resume").splitlines() if line.startswith(("torchrun --", "srun --kill-on-bad-exit=1 torchrun --"))]
    assert len(lines) == 3
    for line in lines:
        run = get_args_parser().parse_args(shlex.split(line.removeprefix("srun --kill-on-bad-exit=1 "))[1:])
        assert (run.training_script, run.module, run.max_restarts) == ("poet_nb.cli", True, 3)
        args = cli.make_parser().parse_args(run.training_script_args)
        assert args.run == Path("data/runs/coco") and args.preset == "poet_r50_official", line
        train = override(preset(args.preset), **dict(word.split("=", 1) for word in args.set)).train
        assert train.batch_size // train.accumulate >= int(run.nnodes.split(":")[-1]) * int(run.nproc_per_node), f"{line}: every process needs an image"
    script = text.partition("#!/bin/bash")[2].partition("```")[0]
    assert script.index("activate") < script.index("srun"), "torchrun is in the environment"


def test_the_fast_command_is_understood():
    text = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/30c_switches.ipynb").read_text())["cells"] if c["cell_type"] == "markdown")
    line, = (line for line in text.replace("\\\n", " ").splitlines() if line.startswith("poet train"))
    args = cli.make_parser().parse_args(shlex.split(line)[1:])
    config = cli.train_config(args)
    assert (config.train.amp, config.train.compile, config.train.fold_bn, config.train.channels_last, config.data.buckets, config.data.pad_multiple) == ("bf16", True, True, True, True, 128)


SGD = """
import sys, torch
from pathlib import Path
import poet_nb.engine as engine
from poet_nb.config import load_config
from poet_nb.distributed import leave
torch.set_num_threads(1)
def sgd(task, config, lr=None):
    return torch.optim.SGD([dict(params=[p for p in task.parameters() if p.requires_grad], base_lr=config.train.lr)], lr=config.train.lr, momentum=.9)
adamw = engine.make_optimizer
def tame(*args, **kw):
    optimizer = adamw(*args, **kw)
    for group in optimizer.param_groups: group["eps"] = 1e-3
    return optimizer
engine.make_optimizer = OPTIMIZER
engine.fit(load_config(CONFIG), Path(RUN), progress=False)
leave()
"""


@pytest.mark.parametrize("optimizer, lr", [("sgd", .3), pytest.param("tame", 1e-2, marks=pytest.mark.slow)])
def test_two_processes_are_one(people, tmp_path, optimizer, lr):
    """24 steps: losses and weights to 1e-5. By gradient descent, and by the engine's AdamW with a larger eps: with the usual one it makes full steps out of gradients that are rounding errors around zero."""
    config, jobs = small(people, **{"train.lr": lr, "train.lr_backbone": lr}), []
    for n, run in ((1, "one"), (2, "two")):
        script = tmp_path / f"{run}.py"
        script.write_text(SGD.replace("OPTIMIZER", optimizer).replace("CONFIG", repr(str(tmp_path / f"{run}.json"))).replace("RUN", repr(str(tmp_path / run))))
        jobs.append(launch(config, tmp_path / run, processes=n, script=script))
    said = [finish(job) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said[0][-2000:] + said[1][-2000:]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert two[-1]["step"] == 24 and two[-1]["train"]["loss"] < .95 * two[0]["train"]["loss"], "something is learnt"
    same(one, two, 1e-5)
    a, b = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["task"] for run in ("one", "two"))
    assert a.keys() == b.keys() and max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 1e-5


@pytest.mark.slow
def test_the_command_with_two_processes(people, tmp_path):
    "The first steps are those of one process, every image is scored once and in the same order, one process writes."
    config = small(people, **{"train.epochs": 2, "train.eval_every": 1})
    torch.set_num_threads(1)
    job = launch(config, tmp_path / "two")
    alone = fit(config, tmp_path / "one", progress=False)
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    together = log_of(tmp_path / "two")
    same(alone[:1], together[:1], 1e-4); same(alone, together, 1e-2)
    assert together[-1]["coco"]["images"] == 10 and json.loads((tmp_path / "two/environment.json").read_text())["processes"] == 2
    found = [json.loads((tmp_path / run / "predictions.json").read_text()) for run in ("one", "two")]
    assert [r["image_id"] for r in found[0]] == [r["image_id"] for r in found[1]]


@pytest.mark.slow
def test_shares_that_are_not_equal_and_parts(people, tmp_path):
    "A batch of 14 in 2 parts of 7: 3 images in one process, 4 in the other."
    config = small(people, **{"train.batch_size": 14, "train.accumulate": 2, "train.epochs": 1, "train.eval_every": 1})
    whole = override(config, **{"train.accumulate": 1})
    job = launch(config, tmp_path / "two")
    alone = fit(whole, tmp_path / "one", progress=False)
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    same(alone, log_of(tmp_path / "two"), 1e-5)


def test_more_processes_than_images_are_refused(people, tmp_path):
    job = launch(small(people, **{"train.batch_size": 1}), tmp_path / "run")
    said = finish(job)
    assert job.returncode and said.count("poet: error: field train.batch_size: 1 images in 1 parts do not give each of 2 processes one") == 1, said[-2000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", [0, -1])
def test_an_error_of_one_process_alone_is_told(people, tmp_path, place):
    "A validation image that can't be read: in the share of the main process, or of the other one."
    root = tmp_path / "people"
    shutil.copytree(people, root)
    image = sorted((root / "val2017").iterdir())[place]
    image.write_bytes(image.read_bytes()[:200])
    job = launch(small(root, **{"train.epochs": 1, "train.eval_every": 1}), tmp_path / "run")
    said = finish(job)
    told = [line for line in said.splitlines() if "poet: error:" in line]
    assert job.returncode and len(told) == 1 and image.name in told[0] and ("process 1: " in told[0]) == (place == -1), said[-3000:]


BROKEN = '''
import sys, torch
from pathlib import Path
import poet_nb.engine as engine
from poet_nb.config import NonFiniteError, load_config
from poet_nb.distributed import leave, rank
real = engine.PoetLoss.forward
calls = 0
def forward(self, samples, targets, *args, **kw):      # the fourth batch of process 1 is bad, in the forward pass; the sixth of process 0, in the loss
    global calls
    calls += 1
    if calls == 4 and rank() == 1: raise NonFiniteError("made up")
    out = real(self, samples, targets, *args, **kw)
    return out | (dict(loss=out["loss"] * float("nan")) if calls == 6 and rank() == 0 else {})
engine.PoetLoss.forward = forward
log = engine.fit(load_config(sys.argv[1] if len(sys.argv) > 1 else CONFIG), Path(RUN), progress=False)
assert len(log) == 1 and log[0]["train"]["loss"] > 0
leave()
'''


@pytest.mark.parametrize("parts", [1, 2])
def test_a_bad_batch_in_one_process_is_left_out_by_all(people, tmp_path, parts):
    "With two parts the bad ones are the last of their step: the next step begins with one that is not averaged."
    config, run = small(people, **{"train.epochs": 1, "train.batch_size": 6 * parts, "train.accumulate": parts}), tmp_path / "run"
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.replace("CONFIG", repr(str(tmp_path / "run.json"))).replace("RUN", repr(str(run))))
    job = launch(config, run, script=script)
    said = finish(job, 100)
    assert job.returncode == 0, said[-3000:]
    lines = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [[3, 5], [1, 2]][parts - 1] and all(len(set(line["images"])) == 6 * parts for line in lines), "the images of both processes are named"


def test_a_restart_is_known_by_what_torchrun_keeps(monkeypatch):
    "Its count is another on each machine: 0 where nobody died, 1 where a start was refused."
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in dict(USE_AGENT_STORE="True", RESTART_COUNT="1").items(): monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1"), monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert not was_restarted()
    mark_begun()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert was_restarted()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert not was_restarted(), "each start has a store of its own: then the count is all there is"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert was_restarted()


def test_addresses_of_the_dead_are_not_read():
    "Three rounds over the store that torchrun keeps, with a process of the second that dies in the middle of the meeting."
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    def meet(me, turn):
        part = fresh_part(dist.TCPStore("127.0.0.1", server.port, is_master=False), me, 3, minutes=1)
        assert not part.check([f"address/{me}"])
        part.set(f"address/{me}", turn)
        return [part.get(f"address/{other}").decode() for other in range(3)]
    for turn in "ac":
        with ThreadPoolExecutor(3) as pool: found = list(pool.map(lambda me: meet(me, turn), range(3)))
        assert found == [[turn] * 3] * 3
        with ThreadPoolExecutor(3) as pool: # process 2 does not come
            late = [pool.submit(fresh_part, dist.TCPStore("127.0.0.1", server.port, is_master=False), me, 3, .02) for me in (0, 1)]
            with pytest.raises(PoetError, match="process 2 has not come"): late[0].result()


REFUSED_ONCE = """
import sys
from pathlib import Path
from poet_nb import cli, distributed
from poet_nb.distributed import leave, was_restarted
with open(RUN + ".starts", "a") as f: f.write(f"{was_restarted()} ")
leave(cli.main(["train", "--config", CONFIG, "--folder", RUN, "--quiet"]))
"""


@pytest.mark.slow
def test_a_refused_start_is_not_a_restart(people, tmp_path):
    "A folder that holds a run is refused; torchrun tries again, and must not go on with that run because of it."
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    script = tmp_path / "again.py"
    script.write_text(REFUSED_ONCE.replace("CONFIG", repr(str(tmp_path / "run.json"))).replace("RUN", repr(str(run))))
    job = launch(small(people), run, nodes=["--standalone", "--max-restarts", 1, "--monitor-interval", ".1"], script=script)
    said = finish(job)
    assert job.returncode and said.count("holds a run already") == 2, said[-3000:]
    starts = (tmp_path / "run.starts").read_text().split()
    assert len(starts) >= 3 and set(starts) == {"False"}, starts
    assert [p.name for p in run.iterdir()] == ["config.json"]


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import poet_nb.engine as engine
from poet_nb import cli, distributed
from poet_nb.distributed import leave, rank
step, sent = engine.train_step, Path(RUN + ".sent")
def told(state, *args):
    if state.batch == 2 and not sent.exists():
        Path(f"{RUN}.{rank()}").touch()
        while not sent.exists(): time.sleep(.01)
        time.sleep(1)                                         # torchrun has had time to pass its signal on
    return step(state, *args)
engine.train_step = told
leave(cli.main(["train", "--config", CONFIG, "--folder", RUN, "--quiet", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_job_saves_once_and_the_run_goes_on(people, tmp_path, name):
    "A cluster sends it to torchrun, processes and loader processes; torchrun passes it on, so the processes have it twice."
    config, run = small(people, **{"train.epochs": 1, "train.eval_every": 1, "data.workers": 1}), tmp_path / "run"
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED.replace("CONFIG", repr(str(tmp_path / "run.json"))).replace("RUN", repr(str(run))))
    job, end = launch(config, run, script=script), time.monotonic() + 200
    while not all((tmp_path / f"run.{me}").exists() for me in (0, 1)) and time.monotonic() < end: time.sleep(.05)
    assert len(family(job.pid)) >= 5, "torchrun, two processes, a loader process of each"
    send(job, getattr(signal, name))
    (tmp_path / "run.sent").touch()
    said = finish(job)
    assert "go on with --resume" in said and "KeyboardInterrupt" not in said and "DataLoader worker" not in said, said[-4000:]
    found = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (found["phase"], found["epoch"], found["batch"]) == ("poet", 0, 3), "the step was finished, and is counted"
    jobs = [launch(config, run, "--resume")] + ([launch(config, tmp_path / "whole")] if name == "SIGINT" else []) # the slow one
    torch.set_num_threads(1)
    whole = fit(override(config, **{"data.workers": 0}), tmp_path / "alone", progress=False)
    said = [finish(job) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), "\n=====\n".join(said)
    same(whole, log_of(run), 1e-4)
    if name == "SIGINT": same(log_of(tmp_path / "whole"), log_of(run), 1e-6)


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


def test_two_machines_and_a_process_that_is_killed(people, tmp_path):
    """Two agents that meet on loopback, one process each, train and evaluate; one process is killed in the middle and all go on from the checkpoint. The folder is seen by the main process only."""
    config, port = small(people, **{"train.epochs": 3, "train.eval_every": 3, "train.checkpoint_minutes": 0.}), free_port()
    meet = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--max-restarts", 5, "--monitor-interval", ".1"]
    run = tmp_path / "run"
    jobs = [launch(config, run, processes=1, nodes=meet) for _ in range(2)]
    victim, limit = None, time.monotonic() + 200
    while victim is None and time.monotonic() < limit: # a worker, as soon as there is something to go on from
        time.sleep(.02)
        if (run / "checkpoint.pt").exists():
            children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(jobs[1].pid)], capture_output=True, text=True).stdout.splitlines()
            victim = next((int(line.split()[0]) for line in children if "poet_nb.cli" in line or "train" in line), None)
    assert victim, "no process was found to be killed\n" + "\n=====\n".join(finish(job, 1) for job in jobs)
    before = (run / "environment.json").read_text()
    os.kill(victim, signal.SIGKILL)
    said = [finish(job) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n=====\n".join(said)
    assert sum(text.count("another process of this job has ended") for text in said) >= 1 and not any("Traceback" in text for text in said), "\n=====\n".join(said)
    log = log_of(run)
    assert [line["epoch"] for line in log] == [1, 2, 3] and log[-1]["coco"]["images"] == 10 and (run / "environment.json").read_text() == before
    torch.set_num_threads(1)
    same(fit(config, tmp_path / "alone", progress=False), log, 1e-2)


@pytest.mark.parametrize("device, environment, words", [("cuda", dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="2"), "2 processes on a machine with 1 GPUs"), ("cuda", dict(LOCAL_RANK="1"), "2 processes on a machine with 1 GPUs"),
                                                        ("cuda:0", dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"), "cuda:0 is one GPU")])
def test_too_many_processes_for_the_gpus_are_refused_by_each(monkeypatch, device, environment, words):
    "By the main one too, which is the one that speaks."
    for name, value in dict(WORLD_SIZE="2", **environment).items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=words): distributed.local_gpu(torch.device(device))
