"The program `poet`: help, errors without traceback, and the whole chain from data to predictions on a tiny dataset."
import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import poet_nb
from poet_nb import checks, cli, engine, weights
from poet_nb.config import DataError, PoetError, load_config
from poet_nb.coco import open_coco
from poet_nb.keypoints import COCO_PERSON
from poet_nb.synth import SynthConfig, make_synth
from test_engine import StopAfter

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split("model.hidden_dim=16 model.nheads=2 model.enc_layers=1 model.dec_layers=2 model.dim_feedforward=16 model.query_groups=1 "
                   "data.scales=[64] data.max_size=64 data.eval_scale=64 data.crop_prob=0 data.pad_multiple=64 data.workers=0 "
                   "train.pretrain_epochs=0 train.batch_size=4 train.warmup_steps=0 train.amp=none train.ema_decay=0 train.device=cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "8 training and 4 validation scenes."
    root = tmp_path_factory.mktemp("data")
    for split, n in (("train2017", 8), ("val2017", 4)): make_synth(root, split, n, SynthConfig(size=96, clutter=0), seed=1, progress=False)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    "A run of two epochs; whoever changes it works on a copy."
    run, threads = tmp_path_factory.mktemp("runs") / "trained", torch.get_num_threads()
    torch.set_num_threads(1)                                     # as in the tests, whose fixture comes after this one
    try: assert cli.main(["train", "--run", str(run), "--data", str(data), "--quiet", "--set", "train.epochs=2", *TINY]) == 0
    finally: torch.set_num_threads(threads)
    return run


def refused(result, *parts) -> str:
    "The message of an error of the user's: exit code 2, one line, and all `parts` in it."
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("poet: error: ")]
    assert code == 2 and len(lines) == 1 and err.rstrip().endswith(lines[0]), err
    for part in parts: assert str(part) in lines[0], lines[0]
    return lines[0]


# ---- help ----

@pytest.mark.parametrize("name", ["", "data", *cli.COMMANDS])
def test_help_has_an_example_that_parses(name, poet):
    code, out, _ = poet(*name.split(), "--help")
    assert code == 0 and re.search(r"^examples?:$", out, re.M)
    examples = [line.strip() for line in out[out.index("example"):].splitlines()[1:]]
    assert examples
    for line in examples:
        program, *words = shlex.split(line)
        assert program == "poet" and callable(cli.make_parser().parse_args(words).do)
    if name in cli.COMMANDS:
        for flag in ("--quiet", "--traceback"): assert flag in out


def test_without_a_command_there_is_help(poet):
    for words in ((), ("data",)):
        code, out, err = poet(*words)
        assert (code, err) == (0, "") and "usage: poet" in out and "example" in out


def test_version(poet): assert poet("--version") == (0, f"poet_nb {poet_nb.__version__}\n", "")


def commands_in(text: str) -> list[str]:
    "What is called `poet ...` in a text, as far as it could be typed."
    found = re.findall(r"(?:`|-m |^ *)poet(?:_nb\.cli)? ((?:data|train|eval|predict|export|figures|bench|doctor)\b[^`#\n]*)", text, re.M)
    return [f.strip() for f in found if not re.search(r"[|<…]|\.\.\.", f) and len(f.split()) > 1 + f.startswith("data ")]


@pytest.mark.parametrize("file", ["Makefile", "README.md", "CONTRIBUTING.md", "data/README.md", "nbs/index.ipynb"])
def test_commands_in_documents_parse(file):
    if not (ROOT / file).is_file(): pytest.skip(f"there is no {file}")
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".ipynb"): text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    for line in commands_in(text):
        assert callable(cli.make_parser().parse_args(shlex.split(line)).do), f"{file}: poet {line}"


def test_commands_in_documents_are_found():
    text = "run `poet train --run a --resume`, `poet data coco` or `poet eval | head`\n\t$(PY) -m poet_nb.cli data synth --val 5\n    poet eval --run b   # scores\n"
    assert commands_in(text) == ["train --run a --resume", "data synth --val 5", "eval --run b"]


# ---- the chain ----

def test_synth_makes_what_is_asked_for(poet):
    code, out, _ = poet("data", "synth", "--folder", "s", "--train", 3, "--val", 2, "--size", 64, "--seed", 5, "--people", 1.5, "--workers", 1, "--quiet")
    assert code == 0 and "s/train2017: 3 images" in out and "next: poet train" in out
    record = json.loads(Path("s/annotations/person_keypoints_val2017.json").read_text())["info"]["synth"]
    assert (record["n"], record["seed"], record["config"]["size"], record["config"]["people"]) == (2, 5, 64, 1.5)
    assert poet("data", "synth", "--folder", "only", "--train", 0, "--val", 1, "--size", 64, "--quiet")[0] == 0
    assert sorted(p.name for p in Path("only").iterdir()) == ["annotations", "val2017"]
    refused(poet("data", "synth", "--folder", "s", "--train", 4, "--val", 0, "--size", 64, "--quiet"), "person_keypoints_train2017.json", "another folder")


def test_the_default_dataset_is_that_of_the_committed_run():
    args = cli.make_parser().parse_args(["data", "synth"])
    assert (args.train, args.val, args.seed, str(args.folder)) == (24000, 500, 0, "data/synth")
    assert SynthConfig(args.size, args.people, clutter=args.clutter, occlusion=args.occlusion) == SynthConfig()


def test_train_says_where_and_what_next(data, poet):
    code, out, _ = poet("train", "--run", "new run", "--data", data, "--set", "train.epochs=1", *TINY)
    assert code == 0 and out.startswith("poet_tiny on cpu: 1 epochs, 4 images per step")
    assert "new run: 1 of 1 epochs, AP " in out and "poet eval --run 'new run'" in out
    refused(poet("train", "--run", "new run", "--data", data, "--set", "train.epochs=1", *TINY), "new run", "--resume")


def test_the_first_line_tells_the_images_that_a_step_has(data, poet):
    "A batch that is larger than the split has 8 images, not 64."
    code, out, _ = poet("train", "--run", "run", "--data", data, "--set", *TINY, "train.epochs=1", "train.batch_size=64")
    assert code == 0 and out.startswith("poet_tiny on cpu: 1 epochs, 8 images per step")


@pytest.mark.parametrize("settings, told", [("train.schedule=step train.epochs=1", "the learning rate never falls: train.lr_drops=[200, 250]"), ("train.schedule=step train.epochs=1 train.lr_drops=[1]", "never falls"),
                                            ("train.schedule=step train.epochs=1 train.lr_drops=[]", ""), ("train.epochs=1 train.warmup_steps=2", "train.warmup_steps=2 are all of the 2 steps"),
                                            ("train.epochs=2 train.warmup_steps=3", "are most of the 4 steps"), ("train.epochs=1 train.warmup_steps=1", ""), ("train.epochs=1 model.num_queries=1", "but the model finds at most model.num_queries=1")])
def test_plans_that_are_seldom_meant_are_told_at_the_start(data, poet, monkeypatch, settings, told):
    monkeypatch.setattr(cli, "fit", lambda *args: [])
    lines = poet("train", "--run", "run", "--data", data, "--set", *TINY, *settings.split())[2].splitlines()
    assert len(lines) == (2 if "queries" in told else bool(told)), lines                          # of both splits there are more people than queries
    assert all(line.startswith("poet: warning: ") and told in line for line in lines)


def test_missing_images_are_told_before_the_run_begins(data, trained, tmp_path, poet):
    gaps = tmp_path / "gaps"
    shutil.copytree(data, gaps)
    words = ("train", "--run", "run", "--data", gaps, "--set", "train.epochs=1", *TINY)
    (gaps / "train2017/000000000002.jpg").unlink()
    code, _, err = poet(*words)
    assert code == 0 and "1 of the 8 images of" in err and "train2017/000000000002.jpg; they are passed over" in err
    shutil.rmtree("run")
    for image in (gaps / "train2017").iterdir(): image.unlink()
    refused(poet(*words), "8 of the 8 images of", "restore them", f"poet data synth --folder {gaps}")
    shutil.copytree(data / "train2017", gaps / "train2017", dirs_exist_ok=True)
    (gaps / "val2017/000000000003.jpg").unlink()
    for line in (words, ("eval", "--run", trained, "--data", gaps, "--quiet")): refused(poet(*line), "1 of the 4 images of", "val2017/000000000003.jpg", "mend field file_name")
    assert not Path("run").exists()
    code, out, _ = poet("doctor", "--data", gaps)
    assert code == 2 and re.search(r"^error .*1 of the 4 images", out, re.M)


def test_the_doctor_counts_people_and_queries(data, poet):
    assert re.search(r"^warning +queries +up to \d+ of person in an image, but the model finds at most model.num_queries=1: ", poet("doctor", "--data", data, "--set", "model.num_queries=1")[1], re.M)
    assert "queries" not in poet("doctor", "--data", data)[1]


def test_labels_are_not_scored_as_those_of_another_category(data, trained, tmp_path, poet):
    def dataset(name, *names):
        shutil.copytree(data, name)
        for file in Path(name, "annotations").iterdir():
            coco = json.loads(file.read_text())
            coco["categories"] = [coco["categories"][0] | dict(id=i, name=n) for i, n in enumerate(names, 1)]
            file.write_text(json.dumps(coco))
        return name
    assert poet("train", "--run", "run", "--data", dataset("two", "person", "clone"), "--quiet", "--set", "train.epochs=1", *TINY)[0] == 0
    assert poet("eval", "--run", "run", "--quiet")[0] == 0
    refused(poet("eval", "--run", "run", "--quiet", "--data", dataset("swapped", "clone", "person")), "its categories (clone, person)", "has learnt (person, clone)", "order them")
    code, _, err = poet("eval", "--run", trained, "--quiet", "--data", dataset("other", "dancer"))   # one category: no label can be another's
    assert code == 0 and "its categories (dancer) are not those that the run has learnt (person); scored as if they were" in err


def test_predictions_are_scored_by_the_names_of_their_images(data, trained, tmp_path, poet):
    "What `poet predict` writes, for images whose numbers are others, is what `poet eval` computes; frames, strangers and absent images are told."
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    file = moved / "annotations/person_keypoints_val2017.json"
    coco = json.loads(file.read_text())
    for record, field in [(i, "id") for i in coco["images"]] + [(a, "image_id") for a in coco["annotations"]]: record[field] = 1000 - record[field]
    (moved / "val2017/day").mkdir()
    for image in coco["images"][:2]: (moved / "val2017" / image["file_name"]).rename(moved / "val2017/day" / image["file_name"]); image["file_name"] = f"day/{image['file_name']}"
    file.write_text(json.dumps(coco))
    assert poet("predict", moved / "val2017", "--run", trained, "--threshold", 0, "--no-overlays", "--quiet", "--out", "found")[0] == 0
    words = ("eval", "--annotations", file, "--json", "--results")
    wanted = json.loads(poet("eval", "--run", trained, "--data", moved, "--json", "--quiet")[1])
    code, out, err = poet(*words, "found/predictions.json", "--out", "again.json")
    assert (code, err) == (0, "") and json.loads(out) == pytest.approx(wanted, abs=.02) and {r["image_id"] for r in json.loads(Path("again.json").read_text())} == {i["id"] for i in coco["images"]}
    found = json.loads(Path("found/predictions.json").read_text())
    Path("marked.json").write_text(json.dumps(found), encoding="utf-8-sig")                           # with a byte-order mark
    assert poet(*words, "marked.json")[1] == out

    def written(**changes):
        Path("changed.json").write_text(json.dumps(found | changes))
        return poet(*words, "changed.json")
    flat = [i | dict(file_name=Path(i["file_name"]).name) for i in found["images"]]
    assert json.loads(written(images=flat)[1]) == json.loads(out)                                    # base names, each there once
    code, _, err = written(images=[flat[0] | dict(file_name="stranger.jpg"), *flat[1:]])
    assert code == 0 and "1 of its 4 images are not in" in err and "has nothing about 1 of the 4 images" in err
    refused(written(images=[i | dict(file_name=flat[0]["file_name"]) for i in flat]), "several of its images have the name of one")
    refused(written(images=[i | dict(file_name="stranger.jpg") for i in flat]), "not one of its 4 images")
    refused(written(annotations=[{k: v for k, v in a.items() if k != "score"} for a in found["annotations"]]), "changed.json: neither a list of results", "score")
    refused(poet(*words, file), "person_keypoints_val2017.json: neither a list of results")


def test_eval_scores_what_training_scored(data, trained, poet):
    logged = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["coco"]
    code, out, _ = poet("eval", "--run", trained, "--json", "--quiet", "--out", "new/results.json")
    numbers = json.loads(out)
    assert code == 0 and numbers["images"] == 4 and len(json.loads(Path("new/results.json").read_text())) == 4 * 25
    for name in set(logged) - {"images"}: assert numbers[name] == pytest.approx(logged[name], abs=.02)   # weights are kept in 16 bits
    file = data / "annotations/person_keypoints_val2017.json"
    for name in ("numpy", "pycocotools"):
        code, out, _ = poet("eval", "--results", "new/results.json", "--annotations", file, "--json", "--engine", name)
        again = json.loads(out)
        assert code == 0 and again == pytest.approx(numbers, abs=1e-9)


def test_eval_layers_and_images(trained, poet):
    last, first = (poet("eval", "--run", trained, "--quiet", "--layer", layer, "--out", f"{layer}.json") for layer in (2, 1))
    assert last[0] == first[0] == 0 and "scored 4 images" in last[1]
    assert Path("1.json").read_bytes() != Path("2.json").read_bytes()
    assert poet("eval", "--run", trained, "--quiet", "--out", "3.json")[0] == 0 and Path("2.json").read_bytes() == Path("3.json").read_bytes()
    for layer in (0, 3): refused(poet("eval", "--run", trained, "--layer", layer), f"--layer {layer}", "1 to 2")
    refused(poet("eval", "--run", trained, "--set", "model.num_queries=5"), "model")
    refused(poet("eval", "--run", trained, "--split", "test2017"), "person_keypoints_test2017.json", "--data")
    refused(poet("eval", "--results", "1.json"), "--annotations")
    refused(poet("eval", "--results", "1.json", "--annotations", "1.json", "--run", trained), "--run and --results")
    for option, value in (("--layer", 3), ("--split", "val2017"), ("--device", "cpu"), ("--set", "train.amp=none"), ("--data", "elsewhere"), ("--name", "mine")):
        refused(poet("eval", "--results", "1.json", "--annotations", "1.json", option, value), f"{option} and --results", "as it is")


def test_eval_tells_where_it_fails(tmp_path, poet):
    "A pose of two animals is off by 3 and 4 pixels at one joint; the other animal is missed when a score of .8 is asked for."
    kinds = [dict(id=i, name=name, keypoints=["head", "tail"], skeleton=[]) for i, name in ((1, "cow"), (2, "calf"))]
    people = [dict(id=i, image_id=1, category_id=i, keypoints=[20 * i, 20, 2, 20 * i, 50, 1], num_keypoints=2, area=900, bbox=[20 * i - 5, 10, 10, 50], iscrowd=0) for i in (1, 2)]
    results = [dict(image_id=1, category_id=p["category_id"], keypoints=p["keypoints"], score=s) for p, s in zip(people, (.9, .7))]
    results[0] |= dict(keypoints=[23, 24, 1, 20, 50, 1])
    for name, content in (("truth", dict(images=[dict(id=1, width=99, height=99)], annotations=people, categories=kinds)), ("results", results)): Path(f"{name}.json").write_text(json.dumps(content))
    words = ("eval", "--annotations", "truth.json", "--results", "results.json")
    code, out, _ = poet(*words, "--json", "--joints", "--by-category")
    numbers = json.loads(out)
    assert code == 0 and [(row["category"], row["people"], row["AR"]) for row in numbers["categories"]] == [("cow", 1, pytest.approx(numbers["AR"] * 2 - 1)), ("calf", 1, 1.)]
    cow = dict(category="cow", joint="head", labelled=1, missed=0, median=5, rms=5, pck=1)
    assert numbers["joints"][0] == cow and numbers["joints"][2]["rms"] == pytest.approx((25 / 2) ** .5) and {row["rms"] for row in numbers["joints"][3:]} == {0}
    strict = json.loads(poet(*words, "--json", "--joints", ".8")[1])
    assert strict["joints"][0] == cow and {row["missed"] for row in strict["joints"][3:]} == {1} and strict["AP"] == numbers["AP"] and "categories" not in strict
    code, out, _ = poet(*words, "--joints", ".8")
    lines = out.splitlines()
    assert code == 0 and lines[-7].split() == ["category", "joint", "labelled", "missed", "median", "rms", "pck"] and lines[-1].split() == ["calf", "all", "2", "1.000", "-", "-", "0.000"]
    assert poet(*words, "--joints", "1")[1].splitlines()[-1].split() == ["calf", "all", "2", "1.000", "-", "-", "0.000"]   # nobody at all is found
    for more in (("--joints",), ("--by-category",)): refused(poet("eval", "--split", "test-dev", *more), "--joints and --by-category", "test-dev")


def test_eval_images_annotated_leaves_out_empty_images(tmp_path, poet):
    truth = dict(images=[dict(id=i, width=64, height=64) for i in (1, 2)], categories=[dict(id=1, name="person", keypoints=["a", "b"], skeleton=[])],
                 annotations=[dict(id=1, image_id=1, category_id=1, keypoints=[9, 9, 2, 50, 50, 2], num_keypoints=2, bbox=[5, 5, 50, 50], area=2500, iscrowd=0)])
    results = [dict(image_id=i, category_id=1, keypoints=[9, 9, 1, 50, 50, 1], score=score) for i, score in ((1, .5), (2, .9))]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = {}
    for images in ("all", "annotated"):
        code, out, _ = poet("eval", "--annotations", "truth.json", "--results", "results.json", "--images", images, "--json")
        found[images] = json.loads(out)
    assert (found["all"]["images"], found["annotated"]["images"]) == (2, 1)
    assert found["all"]["AP"] == pytest.approx(.5) and found["annotated"]["AP"] == pytest.approx(1)


def test_predict_writes_pictures_and_coco(data, trained, poet):
    pictures = data / "val2017"
    shutil.copy(pictures / "000000000001.jpg", "000000000001.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)).save("small.png")
    original = Path("small.png").read_bytes()
    code, out, _ = poet("predict", pictures, "*.jpg", "small.png", "--run", trained, "--threshold", 0, "--batch", 2, "--out", ".", "--quiet")
    assert code == 0 and out.startswith("150 people in 6 images")
    found = json.loads(Path("predictions.json").read_text())
    assert [len(found[k]) for k in ("images", "annotations", "categories")] == [6, 150, 1] and len(found["categories"][0]["keypoints"]) == 17
    assert {a["image_id"] for a in found["annotations"]} == {i["id"] for i in found["images"]} == set(range(1, 7))
    last = found["images"][-1]
    assert (last["file_name"], last["width"], last["height"]) == ("small.png", 90, 50)
    assert Image.open("small_poses.jpg").size == (90, 50) and Path("small.png").read_bytes() == original
    assert {"000000000001_poses.jpg", "000000000001_poses_2.jpg", "000000000004_poses.jpg"} <= set(os.listdir())
    code, out, _ = poet("predict", "small.png", "--run", trained, "--threshold", 1, "--quiet")
    assert code == 0 and out.startswith("0 people in 1 images") and json.loads(Path("predictions/predictions.json").read_text())["annotations"] == []


def test_ctrl_c_ends_with_130_and_a_run_to_go_on_with(data, poet):
    "The signal comes once the first epoch is through."
    run, ended = Path("stopped").resolve(), threading.Event()
    def interrupt():
        while not (run / "metrics.jsonl").exists() and not ended.wait(.02): pass
        if not ended.is_set(): os.kill(os.getpid(), signal.SIGINT)
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try: code, out, err = poet("train", "--run", "stopped", "--data", data, "--set", "train.epochs=1000", *TINY)
    finally: ended.set(); watcher.join()
    assert code == 130 and "stopped after" in err
    assert out.rstrip().endswith("next: poet train --run stopped --resume")
    assert 1 <= len((run / "metrics.jsonl").read_text().splitlines()) < 1000 and (run / "checkpoint.pt").is_file()
    refused(poet("train", "--run", "stopped", "--resume", "--set", "model.dec_layers=3"), "model.dec_layers")


def test_resume_equals_an_uninterrupted_run(data, trained, poet, monkeypatch):
    "Stopped in the middle of the second epoch, and gone on with by the line that was printed: the same losses."
    words = ["--data", data, "--quiet", "--set", "train.epochs=2", *TINY]
    with monkeypatch.context() as patch:
        asked = StopAfter(3)
        patch.setattr(engine, "stop_requests", lambda: contextlib.nullcontext(asked))
        patch.setattr(engine, "train_step", asked.train_step)
        code, out, err = poet("train", "--run", "mine", *words)
    assert code == 130 and "mine: 1 of 2 epochs" in out and "stopped" in err
    line = out.splitlines()[-1]
    assert line == "next: poet train --run mine --resume"
    code, out, _ = poet(*shlex.split(line)[2:], "--quiet")
    assert code == 0 and "mine: 2 of 2 epochs" in out
    logs = [[json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()] for run in (trained, Path("mine"))]
    for field in ("epoch", "train", "val", "coco", "lr"): assert [l[field] for l in logs[0]] == [l[field] for l in logs[1]]


def test_a_run_that_began_from_weights_is_not_begun_without_them(data, trained, tmp_path, poet):
    "Stopped before its first checkpoint, it has only its configuration and a note of the weights."
    run, weights = tmp_path / "it's one", trained / "model.safetensors"
    words = ("train", "--run", run, "--data", data, "--quiet", "--set", "train.epochs=1", *TINY)
    assert poet(*words, "--init", weights)[0] == 0
    for name in ("checkpoint.pt", "checkpoint.prev.pt", "metrics.jsonl", "model.safetensors", "predictions.json"): (run / name).unlink(missing_ok=True)
    told = refused(poet("train", "--run", run, "--resume", "--quiet"), f"--init {shlex.quote(str(weights))} again")
    assert json.loads((run / "environment.json").read_text())["init"]["path"] == str(weights), told
    assert poet("train", "--run", run, "--resume", "--init", weights, "--quiet")[0] == 0


def test_a_run_without_weights_does_not_send_its_user_in_a_circle(data, trained, tmp_path, poet):
    run = tmp_path / "logs"
    run.mkdir()
    for name in ("config.json", "environment.json", "metrics.jsonl"): shutil.copy(trained / name, run)
    for words in (("eval", "--run", run, "--data", data), ("train", "--run", run, "--resume"), ("train", "--run", tmp_path / "other", "--init", run, "--data", data)):
        assert "--resume` goes on" not in refused(poet(*words), "its weights were not kept; train anew")


def test_results_do_not_replace_what_is_there(data, trained, tmp_path, poet):
    before = (trained / "predictions.json").read_bytes()
    refused(poet("predict", data / "val2017", "--run", trained, "--out", trained), trained, "its predictions.json would be replaced")
    refused(poet("eval", "--run", trained, "--data", data, "--out", tmp_path), tmp_path, "this is a folder; name a file")
    assert (trained / "predictions.json").read_bytes() == before


def test_committed_runs_cannot_be_overwritten_by_resume(data, trained, tmp_path, poet):
    run = tmp_path / "committed"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoint*"))
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    refused(poet("train", "--run", run, "--resume", "--quiet"), run, "checkpoint.pt", "--init")
    refused(poet("train", "--run", run, "--quiet", "--data", data), run, "--resume")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_run_can_start_from_another(trained, poet):
    code, out, _ = poet("train", "--run", "second", "--init", trained, "--quiet", "--set", "train.epochs=1", "train.lr=1e-6", "train.lr_backbone=1e-6")
    assert code == 0 and load_config("second").model == load_config(trained).model
    assert poet("train", "--run", "third", "--init", trained / "model.safetensors", "--quiet", "--config", "second/config.json")[0] == 0
    refused(poet("train", "--run", "fourth", "--init", trained, "--set", "model.hidden_dim=32"), "model.safetensors", "shape")
    refused(poet("train", "--run", "fourth", "--init", "nobody"), "nobody")
    assert not Path("fourth").exists()


# ---- weights of others ----

@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    "A small checkpoint of the authors' layout, which tells its stride."
    from poet_nb.config import override, preset
    from poet_nb.poet import Poet
    torch.manual_seed(0)
    config = override(preset("poet_r50"), **{"model.backbone": "resnet18", "model.hidden_dim": 16, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 16,
                                             "model.num_queries": 7, "model.num_classes": 2})
    state = {name.replace("backbone.body.", "backbone.0.body."): value for name, value in Poet(config).state_dict().items()}
    path = tmp_path_factory.mktemp("theirs") / "checkpoint.pth"
    torch.save(dict(model=state, args=argparse.Namespace(dilation=False, nheads=2)), path)
    return path


def test_weights_without_a_run(data, trained, theirs, tmp_path, poet, monkeypatch):
    "A run's file, one of the authors' layout, an address, a name on the hub, a bare file: each predicted and scored without a run folder of its own."
    picture = data / "val2017/000000000001.jpg"
    def poses(*words):
        code, _, err = poet("predict", picture, *words, "--threshold", 0, "--no-overlays", "--quiet")
        assert code == 0, err
        return json.loads(Path("predictions/predictions.json").read_text())["annotations"]
    wanted, bare = poses("--run", trained), tmp_path / "bare.safetensors"
    shutil.copy(trained / "model.safetensors", bare)
    monkeypatch.setattr(weights, "hub_folder", lambda repo: {"me/poet": trained}[repo])
    for words in (("--weights", trained), ("--weights", trained / "model.safetensors"), ("--weights", "me/poet"), ("--run", trained, "--weights", bare)): assert poses(*words) == wanted, words
    official = poses("--weights", theirs)
    assert len(official) == 7 and len(official[0]["keypoints"]) == 51 and official != wanted
    monkeypatch.setenv("POET_HOME", str(tmp_path / "home"))
    (tmp_path / "home/official").mkdir(parents=True)
    shutil.copy(theirs, tmp_path / "home/official/poet_r50.pth")
    assert poses("--weights", "official") == official
    small = ["--set", "data.scales=[64]", "data.eval_scale=64", "data.max_size=64", "data.crop_prob=0", "data.workers=0", "--data", data, "--json", "--quiet", "--device", "cpu"]
    for words in (("--weights", "me/poet"), ("--weights", theirs)):
        code, out, err = poet("eval", *words, *small)
        assert code == 0 and json.loads(out)["images"] == 4, err


def test_weights_that_do_not_help_say_what_does(data, trained, theirs, tmp_path, poet, monkeypatch):
    picture, bare, silent = data / "val2017/000000000001.jpg", tmp_path / "bare.safetensors", tmp_path / "silent.pth"
    shutil.copy(trained / "model.safetensors", bare)
    torch.save(dict(model=torch.load(theirs, weights_only=False)["model"]), silent)
    monkeypatch.setenv("POET_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    cases = {("nothing.pth",): ("nothing.pth", "no such file", "owner/name"), (bare,): (bare, "does not tell its network", "--run"), (bare, "--run", "poet_r51"): ("poet_r51", "no such run folder"),
             (bare, "--run", "poet_r50"): (bare,), (silent,): (silent, "stride", "--run: poet_r50 (stride 32) or poet_dc5_r50 (stride 16)"), ("official",): ("poet_r50.pth", "put it there"), ("me/poet",): ("me/poet", "pip install huggingface_hub")}
    for words, parts in cases.items():
        for command in (("predict", picture), ("eval", "--data", data)): refused(poet(*command, "--weights", *words, "--quiet"), *parts)
    refused(poet("eval", "--weights", bare, "--results", "a.json", "--annotations", "b.json"), "--weights and --results")


def test_training_starts_from_a_name_on_the_hub(trained, poet, monkeypatch):
    "With its configuration, as from a run folder."
    monkeypatch.setattr(weights, "hub_folder", lambda repo: {"me/poet": trained}[repo])
    code, _, err = poet("train", "--run", "second", "--init", "me/poet", "--quiet", "--set", "train.epochs=1", "train.lr=1e-6", "train.lr_backbone=1e-6")
    assert code == 0 and load_config("second").model == load_config(trained).model, err


# ---- errors ----

LAYOUT = ("data/README.md", "poet data split")


@pytest.mark.parametrize("name, files, split, parts", [
    ("my animals", None, "train2017", ["poet data synth --folder 'my animals'"]), ("empty", [], "train2017", ["poet data synth --folder empty"]),
    ("coco", ["zips/train2017.zip"], "train2017", ["poet data coco --folder coco", "downloads COCO"]),
    ("herd", ["annotations/person_keypoints_all.json"], "train2017", ["but there is person_keypoints_all.json", "--set data.train=NAME data.val=NAME", "train2017 and val2017", *LAYOUT]),
    ("my_coco", ["annotations/person_keypoints_all.json"], "val2017", ["--set data.train=NAME data.val=NAME", *LAYOUT]),
    ("herd", ["annotations/animals.json", "1.jpg"], "train2017", ["but there is animals.json", "annotations/person_keypoints_NAME.json", *LAYOUT]), ("herd", ["1.jpg"], "train2017", [*LAYOUT])])
def test_a_missing_split_of_somebody_elses_data_is_not_drawn(tmp_path, poet, name, files, split, parts):
    root = tmp_path / name
    for file in files or []: (root / file).parent.mkdir(parents=True, exist_ok=True); (root / file).write_text('{"info": {"description": "mine"}}')
    if files == []: root.mkdir()
    line = refused(poet("train", "--run", "run", "--data", name, "--set", f"data.train={split}"), f"person_keypoints_{split}.json", *parts)
    made = re.compile("poet data (synth|coco)")
    assert bool(made.search(line)) == bool(made.search(parts[0]))


def test_a_missing_split_of_drawn_people_can_be_drawn(data, tmp_path, poet):
    shutil.copytree(data, tmp_path / "people")
    (tmp_path / "people/annotations/person_keypoints_train2017.json").unlink()
    refused(poet("train", "--run", "run", "--data", "people"), "but there is person_keypoints_val2017.json", "poet data synth --folder people")
    assert "poet data synth" not in refused(poet("train", "--run", "run", "--data", "people", "--set", "data.train=all"), "--set data.train=NAME", "poet data split")


def test_errors_of_train_name_field_and_remedy_before_anything_is_written(data, poet):
    cases = {("--set", "train.epohcs=5"): ("epohcs", "did you mean 'epochs'"), ("--set", "train.epochs"): ("train.epochs", "PART.FIELD=VALUE"),
             ("--set", "train.epochs=0"): ("train.epochs", "greater than 0"), ("--set", "data.scales=12"): ("data.scales",), ("--preset", "poet_r51"): ("poet_r51", "poet_r50"),
             ("--config", "no.json"): ("no.json",), ("--config", "no.json", "--preset", "poet_tiny"): ("--preset and --config",), ("--device", "cuda:77"): ("cuda:77", "poet doctor"),
             ("--device", "toaster"): ("toaster", "mps"), ("--resume",): ("run", "without --resume"), ("--data", "nowhere"): ("nowhere", "poet data synth --folder nowhere", "--data"),
             ("--data", data, "--set", "data.train=nosplit"): ("person_keypoints_nosplit.json", "but there is person_keypoints_train2017.json, person_keypoints_val2017.json"), ("--data", data, "--set", "model.num_keypoints=5"): ("model.num_keypoints", "17"),
             ("--data", data, "--set", "model.num_classes=2"): ("model.num_classes", "--set model.num_classes=1")}
    for words, parts in cases.items(): refused(poet("train", "--run", "run", *words), *parts)
    assert not Path("run").exists()


def test_errors_of_other_commands(data, trained, tmp_path, poet):
    refused(poet("eval", "--run", "nobody"), "nobody", "is the path right", "poet train")
    refused(poet("eval", "--run", trained / "model.safetensors"), "model.safetensors", "run folder")
    refused(poet("predict", "nothing.jpg", "--run", trained), "nothing.jpg")
    refused(poet("predict", "nothing/*.jpg", "--run", trained), "nothing/*.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    refused(poet("predict", "broken.jpg", "--run", trained, "--quiet"), "broken.jpg")
    refused(poet("predict", data / "val2017", "--run", trained, "--quiet", "--out", "broken.jpg"), "broken.jpg")      # a file, not a folder
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text('{"model": {"stride": 7}}')
    (tmp_path / "bad/model.safetensors").write_bytes(b"no weights")
    refused(poet("predict", data / "val2017", "--run", "bad"), "model.stride", "7")
    (tmp_path / "bad/config.json").write_bytes((trained / "config.json").read_bytes())
    refused(poet("predict", data / "val2017", "--run", "bad"), "model.safetensors")
    (tmp_path / "cut.json").write_text('{"images": [')
    refused(poet("eval", "--results", "cut.json", "--annotations", data / "annotations/person_keypoints_val2017.json"), "cut.json", "JSON")
    for text in ('{"images": ' + "[" * 100_000, "[" * 100_000):
        (tmp_path / "deep.json").write_text(text)
        for words in (("--results", "deep.json", "--annotations", data / "annotations/person_keypoints_val2017.json"), ("--results", "cut.json", "--annotations", "deep.json")): refused(poet("eval", *words), "deep.json: not valid JSON")
    refused(poet("data", "coco", "--splits", "test2017"), "test2017", "val2017")
    refused(poet("data", "synth", "--size", 7, "--quiet"), "size", "7")
    assert "argument --seed: 99999999999 is too large" in poet("data", "synth", "--seed", "99999999999")[2]
    refused(poet("train", "--run", "run", "--data", data, "--set", "train.seed=5000000000"), "train.seed", "below 2**32")
    refused(poet("train", "--run", "run", "--data", data, "--set", "name="), "field name")
    for name in ("config.json", "checkpoint.pt"):
        refused(poet("train", "--run", "run", "--data", data, "--init", trained / name), name, f"give the run folder, {trained}")
        refused(poet("eval", "--weights", trained / name), name, f"give the run folder, {trained}")
    assert "annotations" not in refused(poet("predict", "broken.jpg", "--run", trained, "--quiet", "--out", "new"), "replace the file")


@pytest.mark.parametrize("words", [["train"], ["predict", "--webcam"], ["nonsense"], ["predict", "a.jpg", "--threshold", "2"], ["predict", "a.jpg", "--batch", "0"],
                                   ["data", "synth", "--train", "-1"], ["data", "synth", "--val", "1e3"], ["eval", "--engine", "magic"], ["eval", "--layer", "x"]])
def test_misspelt_lines_are_refused_by_the_parser(words, poet):
    code, out, err = poet(*words)
    assert code == 2 and out == "" and err.startswith("usage: poet") and ": error: " in err


def test_an_error_in_a_loader_process_is_one_line(data, trained, tmp_path, poet):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    image = broken / "val2017/000000000002.jpg"
    image.write_bytes(image.read_bytes()[:300])
    refused(poet("eval", "--run", trained, "--data", broken, "--quiet", "--set", "data.workers=1"), image, "not a readable image")


def test_traceback_on_request(poet, monkeypatch):
    with pytest.raises(DataError): cli.main(["predict", "nothing.jpg", "--traceback"])
    monkeypatch.setenv("POET_TRACEBACK", "1")
    with pytest.raises(DataError): cli.main(["predict", "nothing.jpg"])
    monkeypatch.setenv("POET_TRACEBACK", "0")
    refused(poet("predict", "nothing.jpg"), "nothing.jpg")


@pytest.mark.parametrize("error, code, parts", [
    (OSError(28, "No space left on device", "data/a.jpg"), 2, ["data/a.jpg", "make room"]), (OSError(28, "No space left on device"), 2, ["make room"]),
    (PermissionError(13, "Permission denied", "runs"), 2, ["runs", "no permission"]), (FileNotFoundError(2, "No such file", "x.json"), 2, ["x.json", "is the path right"]),
    (OSError("the network is down"), 2, ["the network is down"]), (KeyboardInterrupt(), 130, ["stopped"])])
def test_errors_of_the_system_are_explained(error, code, parts, poet, monkeypatch):
    def fail(args): raise error
    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("Fail.", "poet fail", (), fail))
    got, _, err = poet("fail")
    assert got == code and len(err.splitlines()) == 1
    for part in parts: assert part in err


def test_a_reader_that_has_gone_is_no_error(monkeypatch):
    "`poet ... | head`: quiet, with the exit code of a program that got SIGPIPE."
    def fail(args): raise BrokenPipeError
    moved = []
    monkeypatch.setattr(cli.os, "dup2", lambda *fds: moved.append(fds))
    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("Fail.", "poet fail", (), fail))
    assert cli.main(["fail"]) == 141 and moved[0][1] == 1


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def fail(args): raise ZeroDivisionError
    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("Fail.", "poet fail", (), fail))
    with pytest.raises(ZeroDivisionError): cli.main(["fail"])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                                   RuntimeError("unable to mmap 100 bytes from file </torch_1>: Cannot allocate memory (12)"),
                                   RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")])
def test_out_of_memory_says_what_helps(error, data, poet, monkeypatch):
    def fail(*args): raise error
    monkeypatch.setattr(cli, "fit", fail)
    line = refused(poet("train", "--run", "run", "--data", data, "--quiet"), "out of memory", "16 images of up to 128 pixels", "train.accumulate=2", "data.workers=0")
    assert ("train.amp" in line) == (engine.autocast_dtype("auto", torch.device("cpu")) is None), "where poet_tiny has bf16 already it is no help"


def test_a_bug_in_a_loader_process_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="boom") as caught:
        with cli.explain_memory("more"): raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nboom")
    assert not isinstance(caught.value, PoetError)


def test_warnings_are_one_line(poet, monkeypatch, tmp_path):
    truth = dict(images=[dict(id=1, width=64, height=64)], annotations=[], categories=[dict(id=1, name="person", keypoints=["a"], skeleton=[])])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text("[]")
    code, _, err = poet("eval", "--annotations", "truth.json", "--results", "results.json")
    assert code == 0 and err and all(line.startswith("poet: warning: ") for line in err.splitlines())


# ---- doctor and figures ----

def test_doctor_finds_what_is_missing_and_what_is_broken(data, trained, tmp_path, poet):
    code, out, _ = poet("doctor")
    assert code == 0 and re.search(r"^warning +data/synth +not there; `poet data synth", out, re.M) and re.search(r"^ok +torch ", out, re.M)
    folder = tmp_path / "all"
    shutil.copytree(data, folder / "synth")
    shutil.copytree(trained, folder / "runs/mine")
    code, out, _ = poet("doctor", "--folder", folder)
    assert code == 0 and "8 images" in out and "epoch 2 of 2, AP " in out
    (folder / "synth/train2017/000000000003.jpg").unlink()
    (folder / "synth/annotations/person_keypoints_val2017.json").unlink()
    (folder / "runs/mine/config.json").write_text("{")
    code, out, _ = poet("doctor", "--folder", folder, "--quiet")
    errors = [line for line in out.splitlines() if line.startswith("error")]
    assert code == 2 and len(errors) == 3 and not re.search(r"^ok", out, re.M) and "3 error" in out
    for part in ("8 images are listed, 7 are there", "4 images without annotations, interrupted?", "config.json: not valid JSON"): assert any(part in e for e in errors)


def test_doctor_compares_versions(monkeypatch):
    monkeypatch.setattr(checks.metadata, "requires", lambda name: ["torch>=99.1", "numpy>=1.26", "nbdev<3,>=2.4.14; extra == 'dev'"])
    found = {subject: (level, text) for level, subject, text in checks.check_software()}
    assert found["torch"][0] == "error" and "older than 99.1" in found["torch"][1] and found["numpy"][0] == "ok"


def test_figures_needs_the_repository(tmp_path, poet, monkeypatch):
    class Installed: origin = str(tmp_path / "site" / "poet_nb" / "__init__.py")
    monkeypatch.setattr(cli, "find_spec", lambda name: Installed)
    refused(poet("figures"), "clone the repository")
    for folder in ("tools", "nbs"): (tmp_path / folder).mkdir()
    (tmp_path / "tools" / "execute.py").write_text("")
    (tmp_path / "nbs" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "nbs" / "deep")
    assert cli.find_checkout() == tmp_path


@pytest.fixture
def atelier(tmp_path, trained, data, monkeypatch) -> Path:
    "A small repository whose notebook draws one figure, or fails."
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "tools", checkout / "tools")
    for folder in ("nbs", "data/runs", "poet_nb"): (checkout / folder).mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", checkout)
    draw = ("import os; from pathlib import Path; import json\nfolder = Path('../figures'); folder.mkdir(exist_ok=True)\n"
            "(folder / 'fig.txt').write_text(json.loads(Path(os.environ['POET_RUN'], 'config.json').read_text())['name'] + ' ' + Path(os.environ['POET_DATA']).name + ' ' + os.environ.get('POET_IMAGES', ''))")
    for name, source in (("50_good", draw), ("51_bad", "1 / 0")):
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), checkout / "nbs" / f"{name}.ipynb")
    monkeypatch.setattr(cli, "find_checkout", lambda: checkout)
    return checkout


def test_figures_come_from_a_copy_of_the_notebooks(atelier, trained, data, poet):
    before = {p: p.read_bytes() for p in atelier.rglob("*") if p.is_file()}
    refused(poet("figures", "50"), atelier, "config.json")                                      # no run in this repository
    refused(poet("figures", "50", "--run", trained, "--data", "nowhere"), "poet data synth --folder nowhere --train 0")
    code, out, _ = poet("figures", "50", "--run", trained, "--data", data, "--images", 7, "--out", "drawn")
    assert code == 0 and out.splitlines()[-1] == "drawn/fig.txt"
    assert "a notebook failed" not in refused(poet("figures", "50", "99", "--run", trained, "--data", data), "99: no notebook has this number or name", "50_good, 51_bad")
    assert Path("drawn/fig.txt").read_text() == f"poet_tiny {data.name} 7"
    assert {p: p.read_bytes() for p in atelier.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == before


@pytest.mark.slow
def test_figures_tell_of_a_notebook_that_fails_and_keep_the_others(atelier, trained, data, capfd):
    code = cli.main(["figures", "--run", str(trained), "--data", str(data)])
    out, err = capfd.readouterr()
    assert code == 2 and "51_bad.ipynb" in err and "ZeroDivisionError" in err and err.rstrip().endswith("what the others drew is kept")
    assert (atelier / "figures" / "fig.txt").is_file()


# ---- the program itself ----

def test_as_a_program(tmp_path):
    "`python -m poet_nb.cli`, as torchrun starts it."
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "POET_TRACEBACK": ""}
    done = subprocess.run([sys.executable, "-m", "poet_nb.cli", "predict", "nothing.jpg"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == "poet: error: nothing.jpg: there is no such image, video, folder or pattern; is the path right?\n"


@pytest.mark.parametrize("there, level", [(range(5, 16), "warning"), (range(5, 15), "error")], ids=["19 missing in a row", "20 in a row"])
def test_a_gap_that_no_other_image_can_fill_is_an_error(tmp_path, there, level):
    "Of thirty images; the first follow the last."
    (tmp_path / "train2017").mkdir(); (tmp_path / "annotations").mkdir()
    person = dict(id=1, image_id=1, category_id=1, keypoints=[5, 5, 2] + [0] * 48, num_keypoints=1, bbox=[0, 0, 9, 9], area=50, iscrowd=0)
    images = [dict(id=i, file_name=f"{i}.jpg", width=9, height=9) for i in range(1, 31)]
    (tmp_path / "annotations/person_keypoints_train2017.json").write_text(json.dumps(dict(images=images, annotations=[person], categories=[COCO_PERSON.to_category()])))
    for i in there: (tmp_path / f"train2017/{i}.jpg").touch()
    data = open_coco(tmp_path, "train2017")
    if level == "warning": assert "19 of the 30 images" in checks.check_images(data, tmp_path, few=True)
    else:
        with pytest.raises(DataError, match="20 of the 30 images"): checks.check_images(data, tmp_path, few=True)


def test_predictions_of_other_joints_or_categories_are_not_scored_by_their_numbers(tmp_path):
    truth = SimpleNamespace(name="truth.json", dataset=dict(categories=[dict(id=3, name="horse", keypoints=["a", "b"])]))
    same = lambda *categories: cli.same_kinds([dict(id=i, name=n, keypoints=list(k)) for i, n, k in categories], truth, "predictions.json")
    assert same((1, "horse", "ab")) == {1: 3}
    with pytest.warns(UserWarning, match="'zebra' is scored as 'horse'"): assert same((3, "zebra", "ab")) == {3: 3}
    with pytest.raises(DataError, match=r"joints of 'horse' \(b, a\) are not those of truth.json \(a, b\)"): same((1, "horse", "ba"))
    truth.dataset["categories"].append(dict(id=4, name="cow", keypoints=["a", "b"]))
    with pytest.raises(DataError, match="category 'zebra' is not in truth.json, which has horse, cow"): same((3, "zebra", "ab"))
