"""Faults: killed at random moments, a full disk, damaged files, dying and hanging loader processes, hostile images, malformed annotations, memory over thousands of steps."""
import contextlib
import copy
import errno
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from conftest import person
from poet_nb import cli, coco, engine
from poet_nb.coco import image_target, index_coco, read_image
from poet_nb.config import DataError, PoetError, WorkerError, load_config, override, preset, save_config
from poet_nb.engine import fit, read_checkpoint, restore, save_checkpoint, train_step
from poet_nb.keypoints import COCO_PERSON
from poet_nb.synth import SynthConfig, make_synth
from test_engine import CPU, copied, difference, left_by, runs, scenes, small, without_times  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*(outside their image|num_keypoints|area 0|missing):UserWarning"), pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /dev/full")


# ---- a program that is started often: its libraries are loaded once, every start is a fork -----------------------------------------

def hanging_images():
    "Loader processes wait for a disk that does not answer; the main process does not."
    real = coco.read_image
    coco.read_image = lambda *args: time.sleep(1000) if get_worker_info() else real(*args)


def deadly_images():
    "Loader processes are ended as by the system when memory runs out."
    real = coco.read_image
    coco.read_image = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if get_worker_info() else real(*args)


SERVER = """
import os, sys, torch
import test_faults
from poet_nb import cli
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    fault, folder, *words = line.split()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2): os.dup2(os.open(folder + ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        if fault != "none": getattr(test_faults, fault)()
        sys.exit(cli.main(["train", "--run", folder, "--quiet", *words]))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Programs:
    "Runs of `poet train`, one after another, each in a process group of its own."
    running = None

    def __init__(self):
        path = os.pathsep.join(map(str, [Path(__file__).parent, Path(engine.__file__).parents[1]]))
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "POET_TRACEBACK": ""})
        assert self.server.stdout.readline() == "ready\n"

    def start(self, folder, *words, fault="none") -> int:
        "Begin; gives the process id."
        self.server.stdin.write(" ".join(map(str, [fault, folder, *words])) + "\n")
        self.server.stdin.flush()
        self.running = int(self.server.stdout.readline())
        return self.running

    def code(self) -> int:
        "Exit code, at the end; negative: the signal that ended it."
        code, self.running = int(self.server.stdout.readline()), None
        return code

    def close(self):
        if self.running:
            with contextlib.suppress(ProcessLookupError): os.killpg(self.running, signal.SIGKILL)
        self.server.communicate(timeout=60)


@pytest.fixture(scope="module")
def programs():
    found = Programs()
    yield found
    found.close()


def words_for(folder: Path, config: Path) -> list[str]:
    "What a person types to begin a run, or to go on with what there is of it."
    return ["--config", config] + ["--resume"] * (folder / "config.json").exists()


def readable(folder: Path) -> dict | None:
    "Read every file of a run folder that somebody has just killed; gives its checkpoint, if it came to one."
    for name in ("config.json", "environment.json", "predictions.json"):
        if (folder / name).exists(): json.loads((folder / name).read_text())
    if (folder / "config.json").exists(): load_config(folder)
    if (folder / "model.safetensors").exists(): load_file(folder / "model.safetensors")
    for name in ("pretrain.jsonl", "metrics.jsonl"):
        if (folder / name).exists(): [json.loads(line) for line in (folder / name).read_text().splitlines()[:-1]]  # the last may be half
    there = [name for name in ("checkpoint.pt", "checkpoint.prev.pt") if (folder / name).exists()]
    with contextlib.redirect_stderr(io.StringIO()) as said: found = read_checkpoint(folder) if there else None
    assert "not readable" not in said.getvalue(), "every checkpoint under its own name is whole"
    return found


# ---- kill -9 ------------------------------------------------------------------------------------------------------------------------

def undisturbed(scenes, folder, **changes):
    "A configuration that saves after every step, its file, and a run of it that nothing disturbed."
    torch.set_num_threads(1)
    config = small(scenes, **{"train.checkpoint_minutes": 0.} | changes)
    save_config(config, folder / "wanted.json")
    fit(config, folder / "whole", progress=False)
    return config, folder / "wanted.json", folder / "whole"


@pytest.fixture(scope="module")
def hurried(scenes, tmp_path_factory): return undisturbed(scenes, tmp_path_factory.mktemp("hurried"))  # 9 steps


@linux
@pytest.mark.parametrize("kills", [pytest.param(3, id="3"), pytest.param(50, id="50", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_at_random_moments_and_gone_on_with_the_run_is_the_same_to_the_bit(programs, scenes, tmp_path, kills):
    "A run that comes to its end is compared, and the next begins. The longest wait follows the machine: shorter after an end, longer after a start that got nowhere."
    _, wanted, whole = undisturbed(scenes, tmp_path, **{"train.pretrain_epochs": max(1, kills // 10), "train.epochs": max(2, kills // 5), "train.eval_every": 2})
    begun = time.monotonic()
    programs.start(tmp_path / "timed", *words_for(tmp_path / "timed", wanted))
    assert programs.code() == 0, (tmp_path / "timed.said").read_text()
    longest, moment, done, number, places = (time.monotonic() - begun) / 2, random.Random(0), 0, 0, []
    while True:
        folder = tmp_path / str(number)
        pid = programs.start(folder, *words_for(folder, wanted))
        if done < kills and places[-1:] != [("poet", load_config(wanted).train.epochs, 0)]:  # a run killed after its last step may end
            time.sleep(moment.uniform(0, longest))
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        code, found = programs.code(), readable(folder)
        assert code in (0, -signal.SIGKILL), (tmp_path / f"{number}.said").read_text()
        if code:
            done += 1
            places.append((found["phase"], found["epoch"], found["batch"]) if found else ("nothing",))
            if places[-2:-1] == places[-1:]: longest *= 1.2
            continue
        places.append(("whole",))
        assert difference(left_by(whole), left_by(folder)) is None
        assert not list(folder.glob(".*")), "what the killed ones left half-written is gone"
        number, longest = number + 1, longest * .8
        if done >= kills: break
    said = "".join(p.read_text() for p in tmp_path.glob("*.said"))
    assert "Traceback" not in said and "error" not in said
    print(f"\n{done} kills, {number} whole runs; last saved when killed: {dict(sorted(Counter(p for p in places if p != ('whole',)).items()))}")
    if kills >= 50: assert len(set(places)) >= 15, "the moments are spread over the run"


def test_half_written_files_of_a_killed_process_are_swept_up(hurried, tmp_path):
    config, _, whole = hurried
    folder = copied(whole, tmp_path)
    for name in (".checkpoint.7.part", ".model.safetensors.7.part"): (folder / name).write_bytes(b"half")
    fit(config, folder, resume=True, progress=False)
    assert not list(folder.glob(".*")) and difference(left_by(whole), left_by(folder)) is None


@linux
@pytest.mark.slow
def test_loader_processes_end_with_a_killed_main_process(programs, scenes, tmp_path):
    save_config(small(scenes, **{"data.workers": 2, "train.epochs": 1000}), tmp_path / "wanted.json")
    pid, children = programs.start(tmp_path / "run", "--config", tmp_path / "wanted.json"), []
    while len(children) < 2 and Path(f"/proc/{pid}").exists(): children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split(); time.sleep(.05)
    assert len(children) == 2, (tmp_path / "run.said").read_text()
    os.kill(pid, signal.SIGKILL)
    assert programs.code() == -signal.SIGKILL
    alive = lambda: [c for c in children if Path(f"/proc/{c}/stat").exists() and Path(f"/proc/{c}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"]
    end = time.monotonic() + 60
    while alive() and time.monotonic() < end: time.sleep(.2)
    assert not alive()


# ---- SIGTERM ------------------------------------------------------------------------------------------------------------------------

@linux
def test_sigterm_to_all_processes_saves_and_exits_cleanly(programs, hurried, tmp_path):
    "A cluster sends it to the loader processes too; they must not die of it before the step is done."
    config, wanted, whole = hurried
    for number in range(5):
        folder = tmp_path / str(number)
        pid = programs.start(folder, "--config", wanted, "--set", "data.workers=1")
        while not (folder / "checkpoint.pt").exists(): time.sleep(.005)
        with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGTERM)
        if programs.code() == 130: break  # else it was through already
    said = (tmp_path / f"{number}.said").read_text()
    assert "go on with --resume" in said and "Traceback" not in said and "error" not in said, said
    found = read_checkpoint(folder)
    assert (found["phase"], found["epoch"]) != ("poet", 2) and not list(folder.glob(".*"))
    fit(config, folder, resume=True, progress=False)
    ours = left_by(folder)
    assert difference(left_by(whole), ours | dict(checkpoint=ours["checkpoint"] | dict(config=config.to_dict()))) is None


# ---- loader processes ---------------------------------------------------------------------------------------------------------------

@linux
@pytest.mark.parametrize("fault, settings, parts", [("deadly_images", [], ["has died", "for lack of memory", "data.workers=0"]),
                                                    ("hanging_images", ["data.worker_timeout=1"], ["hangs", "data.worker_timeout", "data.workers=0"])])
def test_a_loader_process_that_dies_or_hangs_is_one_line(programs, hurried, tmp_path, fault, settings, parts):
    config, wanted, whole = hurried
    pid, begun = programs.start(tmp_path / "run", "--config", wanted, "--set", "data.workers=1", *settings, fault=fault), time.monotonic()
    code = programs.code()
    said = (tmp_path / "run.said").read_text()
    assert code == 2 and len(said.splitlines()) == 1 and said.startswith("poet: error: a loader process "), said
    for part in parts: assert part in said
    assert time.monotonic() - begun < 60, "and does not hang at the end"
    with pytest.raises(ProcessLookupError): os.killpg(pid, 0)  # nothing of it is left
    log = fit(config, tmp_path / "run", resume=True, progress=False)
    assert [line["train"] for line in log] == [line["train"] for line in without_times(whole, "metrics.jsonl")], "without loader processes it goes on"


@linux
def test_a_loader_that_falls_silent_is_started_anew_and_nobody_can_tell(hurried, tmp_path, monkeypatch, capsys):
    "Once in an epoch and once in an evaluation, each in the middle; the disk answers the next process."
    config, _, whole = hurried
    splits = {name: tmp_path / name for name in (config.data.train, config.data.val)}
    for flag in splits.values(): flag.touch()
    real, calls = coco.read_image, Counter()
    def slow(path, *args):
        for name, flag in splits.items():
            calls[name] += get_worker_info() is not None and name in str(path)
            if calls[name] == 7 and flag.exists(): flag.unlink(); time.sleep(1000)
        return real(path, *args)
    monkeypatch.setattr(coco, "read_image", slow)
    fit(override(config, **{"data.workers": 1, "data.worker_timeout": 2}), tmp_path / "run", progress=False)
    assert not any(flag.exists() for flag in splits.values()) and capsys.readouterr().err.count("was started anew") == 2
    ours = left_by(tmp_path / "run")
    assert difference(left_by(whole), ours | dict(checkpoint=ours["checkpoint"] | dict(config=config.to_dict()))) is None


SPAWNED = """
import multiprocessing, sys
import numpy, scipy, torch, torchvision, poet_nb.buckets, poet_nb.coco_eval, poet_nb.distributed, poet_nb.pretrain, poet_nb.switches, poet_nb.weights
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.platform, real = "darwin", sys.platform # for the one line of the engine that asks
    import poet_nb.engine
    sys.platform = real
    assert issubclass(poet_nb.engine.LoaderProcess, multiprocessing.context.SpawnProcess)
    import test_engine # its backbone
    from poet_nb.cli import main
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_loader_processes_that_are_no_copies_as_on_a_mac(hurried, tmp_path):
    "They get data and augmentation as a message, and the run is the same to the bit."
    config, wanted, whole = hurried
    (tmp_path / "train.py").write_text(SPAWNED)
    words = ["train", "--config", wanted, "--run", tmp_path / "run", "--quiet", "--set", "data.workers=2"]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, [ROOT, ROOT / "tests"])))
    done = subprocess.run([sys.executable, tmp_path / "train.py", *map(str, words)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours = left_by(tmp_path / "run")
    assert difference(left_by(whole), ours | dict(checkpoint=ours["checkpoint"] | dict(config=config.to_dict()))) is None


def test_a_bug_in_a_loader_process_stays_a_bug():
    @engine.loader_faults()
    def broken(): raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nboom")
    with pytest.raises(RuntimeError, match="boom") as caught: broken()
    assert not isinstance(caught.value, PoetError)


@pytest.mark.parametrize("error", [EOFError(), OSError(errno.EMFILE, "Too many open files"), RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)")])
def test_too_many_open_files_are_said_to_be_that(error):
    @engine.loader_faults()
    def loads(): raise error
    with pytest.raises(WorkerError, match="too many open files.*ulimit -n"): loads()
    with pytest.raises(FileNotFoundError):
        with engine.loader_faults(): raise FileNotFoundError(errno.ENOENT, "no such file", "a.jpg")


@linux
def test_large_batches_fit_through_a_small_limit_of_open_files(tmp_path):
    "64 images a batch, a limit of 300: without raising it a loader process can't hand over a batch."
    make_synth(tmp_path, "train2017", n=140, config=SynthConfig(size=64), seed=3, workers=1, progress=False)
    program = f"""
import multiprocessing, os, resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import torch
from poet_nb.config import override, preset
from poet_nb.engine import train_loader
config = override(preset("poet_tiny"), **{{"data.root": {str(tmp_path)!r}, "train.batch_size": 64, "data.workers": 1, "data.worker_timeout": 60}})
loader = iter(train_loader(config, torch.device("cpu"))[0])
kept = [next(loader), time.sleep(1), next(loader)]
print(len(kept[0][1]), len(kept[2][1]), flush=True)
for child in multiprocessing.active_children(): child.kill()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.stdout.split() == ["64", "64"], done.stderr[-2000:]


# ---- a full disk --------------------------------------------------------------------------------------------------------------------

@linux
@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "model.safetensors",
                                  *(pytest.param(n, marks=pytest.mark.slow) for n in ("environment.json", "predictions.json"))])
def test_a_disk_that_is_full_is_named_and_the_run_goes_on(hurried, tmp_path, poet, monkeypatch, name):
    "The device /dev/full answers every write as a full disk does; it stands where a file is to be written. The logs: see test_engine."
    _, wanted, whole = hurried
    run, trap, epoch = tmp_path / "run", tmp_path / f"run/.{name.removesuffix('.pt')}.{os.getpid()}.part", engine.train_epoch
    run.mkdir()
    def lay(*args):
        trap.symlink_to("/dev/full")
        return epoch(*args)
    with monkeypatch.context() as m:
        if name in ("config.json", "environment.json"): trap.symlink_to("/dev/full")
        else: m.setattr(engine, "train_epoch", lambda state, *args: lay(state, *args) if state.phase == "poet" and not trap.is_symlink() else epoch(state, *args))
        code, _, err = poet("train", "--run", run, "--config", wanted, "--quiet")
    assert (code, err) == (2, f"poet: error: {run / name}: no space left on this disk; make room and give the same command again\n")
    assert not list(run.glob(".*")) and (readable(run) is None) == (name in ("config.json", "environment.json")), "no litter, and nothing that was there is lost"
    assert poet("train", "--run", run, "--quiet", *words_for(run, wanted))[0] == 0
    assert difference(left_by(whole), left_by(run)) is None


def test_a_disk_that_fills_up_within_a_file_is_a_full_disk(runs, tmp_path):
    "PyTorch covers the system's error with one of its own; the limit on a file's size stands for the disk's."
    config, whole = runs("dropout")
    folder = copied(whole, tmp_path)
    before, state = (folder / "checkpoint.pt").read_bytes(), restore(read_checkpoint(folder), config, CPU)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (0, 5_000, 100_000, len(before) - 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(OSError) as error: save_checkpoint(state, config, folder)
            assert error.value.filename == str(folder / "checkpoint.pt")
            assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob(".*"))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- damaged checkpoints ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flips", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_checkpoint_gets_through(runs, tmp_path, flips):
    "Either it is noticed and the one before stands in, or it was in a byte that means nothing."
    folder, draw = copied(runs("dropout")[1], tmp_path), random.Random(flips)
    path, good = folder / "checkpoint.pt", read_checkpoint(folder)
    whole, noticed = path.read_bytes(), 0
    for _ in range(flips):
        spoilt, place = bytearray(whole), draw.randrange(len(whole))
        spoilt[place] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        with contextlib.redirect_stderr(io.StringIO()) as said: found = read_checkpoint(folder)
        if str(path) in said.getvalue(): noticed += 1; assert "going on from" in said.getvalue()
        else: assert difference(good, found) is None, f"bit of byte {place}"
    assert noticed > flips / 2


# ---- losses that are not finite -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["dropout", "fp16"])
def test_loss_terms_of_a_step_that_is_not_finite_are_written_down(scenes, tmp_path, monkeypatch, kind):
    "In half precision too: a smaller loss scale does not mend a loss."
    config, forward, spoilt = small(scenes, kind, **{"train.pretrain_epochs": 0}), engine.PoetLoss.forward, []
    def poisoned(self, samples, targets, *args, **kwargs):
        losses, ids = forward(self, samples, targets, *args, **kwargs), [int(t["image_id"]) for t in targets]
        if 3 not in ids: return losses
        spoilt.append(ids)
        return losses | dict(loss=losses["loss"] * float("nan"))
    monkeypatch.setattr(engine.PoetLoss, "forward", poisoned)
    log = fit(config, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert lines and [line["images"] for line in lines] == spoilt
    for line in lines:
        assert line["terms"]["loss"] == "nan" and math.isfinite(line["terms"]["loss_ce"]) and {"loss_keypoints", "loss_visibility", "loss_centers"} <= line["terms"].keys()
        assert f"loss_ce = {line['terms']['loss_ce']:.4g}" in line["error"]
    assert all(math.isfinite(v) for line in log for v in line["train"].values()), "no mean is spoilt"


# ---- memory -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["forward", "evaluation"])
def test_out_of_memory_tells_the_size_of_the_batch_and_three_settings(scenes, tmp_path, poet, monkeypatch, where):
    save_config(small(scenes, **{"train.pretrain_epochs": 0, "train.epochs": 1, "train.lr_drops": []}), tmp_path / "wanted.json")
    def greedy(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with monkeypatch.context() as m:
        if where == "forward": m.setattr(engine.PoetLoss, "forward", greedy)
        else: m.setattr(engine.PostProcess, "forward", greedy)
        code, _, err = poet("train", "--run", "run", "--config", "wanted.json", "--quiet")
    assert code == 2 and len(err.splitlines()) == 1
    for part in ("4 images, padded to 48 x 48 pixels", "train.accumulate=2", "train.amp=bf16", "data.max_size"): assert part in err


def resident() -> float: return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20  # MiB of this process


def memory_of(config, folder, monkeypatch, every=10) -> list[dict]:
    "Train, and note resident and allocated memory every few steps."
    seen, step = [], engine.train_step
    def watched(state, *args):
        losses = step(state, *args)
        watched.steps += 1
        if watched.steps % every == 0: seen.append(dict(step=watched.steps, rss=resident(), cuda=torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.))
        return losses
    watched.steps = 0
    monkeypatch.setattr(engine, "train_step", watched)
    fit(config, folder, progress=False)
    return seen


@linux
def test_memory_of_a_small_run_stays_the_same(scenes, tmp_path, monkeypatch):
    seen = memory_of(small(scenes, **{"train.pretrain_epochs": 0, "train.epochs": 18, "train.eval_every": 6}), tmp_path / "run", monkeypatch, every=3)
    early, late = (np.median([s["rss"] for s in part]) for part in (seen[3:9], seen[-6:]))
    assert len(seen) == 18 and late - early < 8, (early, late)


@linux
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_memory_of_poet_tiny_stays_the_same_for_3000_steps(tmp_path, monkeypatch):
    "10 steps an epoch, a checkpoint each, an evaluation every 10; on a GPU the allocated memory too. After the first tenth of a phase nothing may grow."
    for split, n in (("train2017", 160), ("val2017", 16)): make_synth(tmp_path / "data", split, n=n, seed=1, workers=1, progress=False)
    config = override(preset("poet_tiny"), **{"data.root": str(tmp_path / "data"), "train.pretrain_epochs": 50, "train.epochs": 250, "train.eval_every": 10})
    seen = memory_of(config, tmp_path / "run", monkeypatch, every=50)
    assert len(seen) == 60
    for first, last in ((1, 10), (15, 60)):  # pre-training, training
        rss = [s["rss"] for s in seen[first:last]]
        third = len(rss) // 3
        print(f"\nsteps {seen[first]['step']} to {seen[last - 1]['step']}: resident {min(rss):.0f} to {max(rss):.0f} MiB, allocated on the GPU {max(s['cuda'] for s in seen[first:last]):.0f} MiB")
        assert np.median(rss[-third:]) - np.median(rss[:third]) < 20
        assert len({s["cuda"] for s in seen[first:last]}) == 1


# ---- images -------------------------------------------------------------------------------------------------------------------------

def enlarged(path: Path, side: int = 65_000):
    "A JPEG whose header claims gigapixels."
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0")
    content[frame + 5:frame + 9] = side.to_bytes(2, "big") * 2
    path.write_bytes(content)


BAD_IMAGES = { # name -> (make it out of the good file, what the error says)
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-200]), "truncated"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]), "truncated"),
    "zero bytes": (lambda p: p.write_bytes(b""), "no image format"),
    "web page": (lambda p: p.write_bytes(b"<html>404</html>"), "no image format"),
    "bomb": (lambda p: Image.new("1", (12_000, 12_000)).save(p, "PNG"), "89,478,485 pixels"),
    "bomb that PIL refuses itself": (lambda p: Image.new("1", (15_000, 15_000)).save(p, "PNG"), "89,478,485 pixels"),
    "claims gigapixels": (enlarged, "89,478,485 pixels"),
    "pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "a pipe"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "a folder"),
    "2 GB of nothing": (lambda p: os.truncate(p, 2**31), "2.0 GB"),
    "floating point": (lambda p: Image.fromarray(np.ones((64, 64), np.float32)).save(p, "TIFF"), "floating-point"),
    "other size": (lambda p: Image.new("RGB", (50, 64)).save(p, "JPEG"), "50 x 64 pixels"),
    "not there": (lambda p: p.unlink(), "no such image"),
}


@linux
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named_before_it_takes_memory(scenes, tmp_path, monkeypatch, kind):
    spoil, says = BAD_IMAGES[kind]
    path = Path(shutil.copy(scenes / "train2017/000000000001.jpg", tmp_path))
    spoil(path)
    if "pixels" in says and kind != "other size": monkeypatch.setattr(coco.cv2, "imdecode", None)  # nothing may decode it
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=says) as error: read_image(path, (64, 64))
    assert not warned and str(path) in str(error.value) and len(str(error.value)) < 500


@linux
def test_bad_images_of_every_kind_cost_training_nothing_but_themselves(scenes, tmp_path, poet):
    root = Path(shutil.copytree(scenes, tmp_path / "data"))
    bad = [root / f"train2017/{i:012d}.jpg" for i in range(1, 12)]
    kinds = [k for k in BAD_IMAGES if k not in ("half", "bomb that PIL refuses itself")]
    for path, kind in zip(bad, kinds, strict=True): BAD_IMAGES[kind][0](path)
    save_config(small(root, **{"train.pretrain_epochs": 0, "train.epochs": 1, "train.batch_size": 13, "train.lr_drops": []}), tmp_path / "wanted.json")
    code, _, err = poet("train", "--run", "run", "--config", "wanted.json", "--quiet")
    assert code == 0 and f"11 unreadable training images were skipped, first {bad[0]}" in err and len(err.splitlines()) == 2
    assert err.startswith("poet: warning: 1 of the 13 images") and f"not there, the first is {bad[kinds.index('not there')]}" in err
    line = json.loads(Path("run/metrics.jsonl").read_text())
    assert line["skipped"] == list(map(str, bad)) and math.isfinite(line["train"]["loss"])
    for kind in ("truncated", "claims gigapixels"):
        image = Path(shutil.copy(scenes / "val2017/000000000002.jpg", root / "val2017"))
        BAD_IMAGES[kind][0](image)
        code, _, err = poet("eval", "--run", "run", "--quiet")
        assert code == 2 and str(image) in err and BAD_IMAGES[kind][1] in err and len(err.splitlines()) == 1


# ---- annotations --------------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-5, 60), st.floats(-5, 60, allow_nan=False).map(lambda x: round(x, 3)))
NO_NUMBER = st.sampled_from([math.nan, math.inf, -math.inf, None, "7", "", [], {}, [1], 1e300, -1e10, 10**400])


@st.composite
def datasets(draw) -> dict:
    "A file in COCO's format in which nothing is wrong."
    K, ids = draw(st.integers(1, 5)), st.lists(st.integers(0, 10**12), unique=True)
    categories = [dict(id=5, name="creature", keypoints=[f"joint {k}" for k in range(K)], skeleton=[[1, K]] if K > 1 else []), dict(id=8, name="car")][:draw(st.integers(1, 2))]
    images = [dict(id=i, width=draw(st.integers(1, 80)), height=draw(st.integers(1, 80)), file_name=f"{i}.jpg") for i in draw(ids.filter(bool).map(lambda x: x[:4]))]
    records = []
    for i in draw(ids.filter(bool).map(lambda x: x[:5])):
        joints = [v for _ in range(K) for v in (draw(NUMBERS), draw(NUMBERS), draw(st.integers(0, 2)))]
        records.append(dict(id=i, image_id=draw(st.sampled_from(images))["id"], category_id=5, keypoints=joints, num_keypoints=K, iscrowd=draw(st.sampled_from([0, 0, 1])),
                            bbox=[draw(NUMBERS), draw(NUMBERS), abs(draw(NUMBERS)), abs(draw(NUMBERS))], area=abs(draw(NUMBERS)), segmentation=[[1, 2, 3.5, 4, 5, 6]]))
    return dict(images=images, annotations=records, categories=categories)


def in_list(draw, records, field, width=None):
    "Spoil a number of a record, or a number in its list; gives what the error has to name."
    record = draw(st.sampled_from(records))
    if width is not None and draw(st.booleans()): record[field][draw(st.integers(0, width - 1))] = draw(NO_NUMBER)
    elif draw(st.integers(0, 5)) or field == "iscrowd": record[field] = draw(NO_NUMBER.filter(lambda v: width is None or v != [1] or width != 1))
    else: del record[field]
    return record, field


def of_annotation(draw, d):
    field = draw(st.sampled_from(["keypoints", "bbox", "area", "iscrowd", "image_id", "category_id", "id"]))
    width = {"keypoints": 3 * len(d["categories"][0]["keypoints"]), "bbox": 4}.get(field)
    for r in d["annotations"]: r["iscrowd"] = 0  # a crowd need not have joints
    number, before = None, copy.deepcopy(d["annotations"])
    record, field = in_list(draw, d["annotations"], field, width)
    if field in ("bbox", "area") and record.get(field) is None: record[field] = {}      # what is missing follows from the rest
    for i, n in enumerate(record["keypoints"] if field == "keypoints" and isinstance(record.get("keypoints"), list) else ()):
        if i % 3 < 2 and (n is None or n != n): record["keypoints"][i - i % 3 + 2] = 2  # and where no joint is labelled anything may stand
    number = d["annotations"].index(record) if field != "id" else next(i for i, (a, b) in enumerate(zip(before, d["annotations"])) if a != b)
    return "annotation", before[number]["id"] if field != "id" else None, field


def of_image(draw, d):
    field, before = draw(st.sampled_from(["id", "width", "height"])), copy.deepcopy(d["images"])
    record, field = in_list(draw, d["images"], field)
    number = next(i for i, r in enumerate(d["images"]) if r is record)
    return "image", before[number]["id"] if field != "id" else None, field


def of_size(draw, d):
    "Negative sizes."
    what = draw(st.sampled_from(["bbox", "area", "width", "height"]))
    if what in ("width", "height"):
        record = draw(st.sampled_from(d["images"]))
        record[what] = draw(st.integers(-100, 0))
        return "image", record["id"], what
    record = draw(st.sampled_from(d["annotations"]))
    if what == "bbox": record["bbox"][draw(st.integers(2, 3))] = draw(st.floats(-1e6, -1e-3))
    else: record["area"] = draw(st.floats(-1e6, -1e-3))
    return "annotation", record["id"], what


def of_count(draw, d):
    "A wrong number of joints."
    record, K = draw(st.sampled_from(d["annotations"])), len(d["categories"][0]["keypoints"])
    record["keypoints"] = [1] * draw(st.integers(record["iscrowd"], 60).filter(lambda n: n != 3 * K)) # a crowd need not have joints
    return "annotation", record["id"], "keypoints"


def of_visibility(draw, d):
    record, K = draw(st.sampled_from(d["annotations"])), len(d["categories"][0]["keypoints"])
    record["keypoints"][3 * draw(st.integers(0, K - 1)) + 2] = draw(st.sampled_from([3, -1, .5, 1.5, 100]))
    return "annotation", record["id"], "keypoints"


def of_reference(draw, d):
    "An unknown category or image."
    field, record = draw(st.sampled_from(["category_id", "image_id"])), draw(st.sampled_from(d["annotations"]))
    record[field] = draw(st.integers(-10, 10**12).filter(lambda i: i not in {x["id"] for x in d["categories"] + d["images"]}))
    return "annotation", record["id"], field


def of_id(draw, d):
    "An id that is there twice."
    kind = draw(st.sampled_from(["images", "annotations", "categories"]))
    twin = copy.deepcopy(draw(st.sampled_from(d[kind])))
    d[kind].append(twin)
    return {"images": "image", "annotations": "annotation", "categories": "category"}[kind], twin["id"], "id"


def of_name(draw, d):
    record = draw(st.sampled_from(d["images"]))
    record["file_name"] = draw(st.sampled_from([None, 7, "", "  ", "a\0b", "a\nb", [], {}, "\ud800"]))
    return "image", record["id"], "file_name"


def of_schema(draw, d):
    "Another kind of file: a part is missing, or no list of objects."
    field = draw(st.sampled_from(["images", "annotations", "categories"]))
    if draw(st.booleans()): del d[field]
    else: d[field] = draw(st.sampled_from([None, {}, "x", 3, [3], [None], [[]], ["a"]]))
    return None, None, field


FAULTS = [None, "cut", of_annotation, of_image, of_size, of_count, of_visibility, of_reference, of_id, of_name, of_schema]


def check_right(index):
    "Whatever loads is finite, inside its image and of the right shape."
    for row, (height, width) in enumerate(index.images.sizes):
        target = image_target(index, row)
        joints, visibility = torch.Tensor(target["keypoints"]), target["visibility"]
        assert joints.shape == (len(target["labels"]), index.skeleton.num_keypoints, 2) and visibility.shape == joints.shape[:2] and target["boxes"].shape == (len(joints), 4)
        assert all(torch.isfinite(target[f].float()).all() for f in ("keypoints", "area", "boxes", "ignore"))
        assert ((joints >= 0) & (joints <= torch.tensor([width, height]))).all() and set(visibility.unique().tolist()) <= {0, 1, 2}


def said_by(*words) -> tuple[int, str]:
    "Exit code and standard error of a command."
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()): code = cli.main([str(w) for w in words])
    assert "Traceback" not in err.getvalue()
    return code, err.getvalue()


def check_annotations(folder, value, fault, cut):
    "One generated case; `cut` is the share of the file that is there."
    file = folder / "annotations/person_keypoints_val2017.json"
    text = json.dumps(value)
    file.write_text(text[:int(cut * len(text))] if cut < 1 else text)
    (folder / "results.json").write_text("[]")
    if fault is None and cut == 1: check_right(index_coco(file))
    else:
        with pytest.raises(DataError) as error: index_coco(file)
        kind, id, field = fault if cut == 1 else (None, None, None)
        wanted = [str(file)] + ([f"field '{field}'"] if field else ["not valid JSON"])
        if kind: wanted.append(f"{kind} {id}: " if id is not None else f"{kind} ")
        code, err = said_by("train", "--run", folder / "run", "--data", folder, "--quiet", "--set", "data.train=val2017", "train.device=cpu")
        assert code == 2 and len(err.splitlines()) == 1
        for part in wanted: assert part in str(error.value) and part in err, (part, str(error.value), err)
        assert len(str(error.value)) < 700 and not (folder / "run").exists()
    code, err = said_by("eval", "--annotations", file, "--results", folder / "results.json", "--json")
    assert code in (0, 2) and (code == 0) >= (fault is None and cut == 1), err  # scoring needs less than training, but never less than a whole file
    if code: assert str(file) in err


def generated_annotations(examples):
    "A test of so many generated files of each kind."
    @pytest.mark.parametrize("make", FAULTS, ids=lambda make: getattr(make, "__name__", str(make)))
    @settings(max_examples=examples)
    @given(value=datasets(), data=st.data())
    def test(tmp_path_factory, make, value, data):
        folder = tmp_path_factory.getbasetemp() / "generated"
        for name in ("annotations", "val2017"): (folder / name).mkdir(parents=True, exist_ok=True)
        if make == "cut": check_annotations(folder, value, None, data.draw(st.floats(0, 1, exclude_max=True)))
        else: check_annotations(folder, value, make and make(data.draw, value), 1)
    return test


test_300_generated_annotation_files_load_or_are_named = generated_annotations(28)
test_5000_generated_annotation_files_load_or_are_named = pytest.mark.slow(pytest.mark.timeout(3600)(generated_annotations(455)))


@pytest.mark.parametrize("n", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_very_many_people_in_one_image(tmp_path, n):
    "They load, and a training step has a finite loss."
    draw = np.random.default_rng(0)
    joints = np.concatenate([draw.integers(0, 64, (n, 17, 2)), np.full((n, 17, 1), 2)], -1).reshape(n, -1).tolist()
    records = [person(i, 1, keypoints=k, num_keypoints=17, bbox=[1, 2, 3, 4], segmentation=[]) for i, k in enumerate(joints)]
    for name in ("annotations", "train2017"): (tmp_path / name).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "train2017/1.jpg")
    (tmp_path / "annotations/person_keypoints_train2017.json").write_text(json.dumps(dict(
        images=[dict(id=1, width=64, height=64, file_name="1.jpg")], annotations=records, categories=[COCO_PERSON.to_category()])))
    config = small(tmp_path, **{"train.batch_size": 1})
    samples, targets = next(iter(engine.train_loader(config, CPU)[0]))
    assert len(targets[0]["labels"]) == n
    state = engine.start_phase("poet", engine.Poet(config), config, CPU)
    assert math.isfinite(train_step(state, [(samples, targets)], config, CPU)["loss"])
