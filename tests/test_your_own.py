"Somebody's own: notebook 72 with other pictures in place of the made-up animals, and notebook 70 with another run."
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

import notebooks
from poet_nb.coco import lay_out, open_coco
from poet_nb.config import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs/72_your_own.ipynb"
NEWT = dict(id=3, name="newt", keypoints=["snout", "eye_near", "eye_far", "tail_tip"], skeleton=[[1, 4]], flip_pairs=[[2, 3]])  # four joints, no name with a side
SHORT = "train.epochs=1 train.batch_size=8 train.warmup_steps=1 data.scales=[64] data.max_size=64 data.eval_scale=64 data.crop_prob=0 data.pad_multiple=64 train.ema_decay=0"


def newts(folder: Path, n: int, size: int = 64) -> tuple[Path, Path]:
    "n pictures with a light bar each, one of them in a subfolder, and a COCO file beside them."
    pictures, rng, images, found = folder / "my pictures", np.random.default_rng(0), [], []
    for i in range(1, n + 1):
        name = "pond one/deep/7.jpg" if i == 7 else f"{i}.png"
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        x, y = (int(v) for v in rng.integers(8, size - 30, 2))
        pixels = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
        pixels[y:y + 8, x:x + 24] += 150
        Image.fromarray(pixels).save(pictures / name)
        images.append(dict(id=100 + i, file_name=name, width=size, height=size))
        joints = [x, y + 4, 2, x + 2, y + 2, 2, x + 2, y + 6, 1 + i % 2, x + 23, y + 4, 2]
        found.append(dict(id=i, image_id=100 + i, category_id=3, keypoints=joints, num_keypoints=4, bbox=[x, y, 24, 8], area=192, iscrowd=0))
    file = folder / "newts.json"
    file.write_text(json.dumps(dict(images=images, annotations=found, categories=[dict(id=1, name="pond"), NEWT])))
    return pictures, file


def source(word: str) -> str:
    "The one code cell that contains `word`."
    cells = [c.source for c in notebooks.read(NOTEBOOK).cells if c.cell_type == "code" and word in c.source]
    assert len(cells) == 1, (word, len(cells))
    return cells[0]


@pytest.mark.parametrize("n, val", [(2, 1), (9, 1), (30, 6)])
def test_two_parts_of_few_pictures(tmp_path, n, val):
    pictures, file = newts(tmp_path, n)
    for _ in range(2): lay_out(pictures, file, tmp_path / "mine")                          # once more changes nothing
    parts = [open_coco(tmp_path / "mine", split) for split in ("train2017", "val2017")]
    assert [len(part) for part in parts] == [n - val, val] and sorted(i for part in parts for i in part.image_ids) == list(range(101, 101 + n))
    assert all(part.load(i)[0].shape == (3, 64, 64) and len(part.load(i)[1]["labels"]) == 1 for part in parts for i in range(len(part)))
    assert parts[0].skeleton.flip_pairs == ((1, 2),) and (n < 7 or len(list((tmp_path / "mine").glob("*/pond one/deep/7.jpg"))) == 1)


def test_of_many_pictures_a_hundred_are_set_aside(tmp_path):
    pictures, file = newts(tmp_path, 1)
    images = [dict(id=i, file_name=f"{i}.png", width=64, height=64) for i in range(1000)]
    for image in images: os.link(pictures / "1.png", pictures / image["file_name"]) if image["id"] != 1 else None
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(images=images)))
    lay_out(pictures, file, tmp_path / "mine")
    assert [len(list((tmp_path / "mine" / split).iterdir())) for split in ("train2017", "val2017")] == [900, 100]


@pytest.mark.parametrize("name", ["gone.png", "../newts.json", "{pictures}/2.png"])
def test_pictures_elsewhere_are_named(tmp_path, name):
    pictures, file = newts(tmp_path, 3)
    coco = json.loads(file.read_text())
    coco["images"][1]["file_name"] = name = name.format(pictures=pictures)
    file.write_text(json.dumps(coco))
    with pytest.raises(DataError, match="1 of the 3 pictures in .*newts.json are not below .*my pictures") as error: lay_out(pictures, file, tmp_path / "mine")
    assert name in str(error.value) and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("kind, words", [("images", "2 images have the id 1"), ("annotations", "2 annotations have the id"), ("lost", "1 annotations are of images that are not there")])
def test_files_in_which_it_is_not_clear_what_belongs_to_what_are_refused(tmp_path, kind, words):
    "As when two files are joined by hand: joints would end up on another picture, in silence."
    pictures, file = newts(tmp_path, 3)
    coco = json.loads(file.read_text())
    if kind == "lost": coco["annotations"][0]["image_id"] = 77
    else: coco[kind][1]["id"] = coco[kind][0]["id"] = 1
    file.write_text(json.dumps(coco))
    with pytest.raises(DataError, match=f"newts.json: {words}"): lay_out(pictures, file, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def frames(tmp_path: Path, videos: list[int]) -> tuple[Path, Path]:
    "Videos of so many frames each, in folders of their own; the frames of all are mixed in the file."
    pictures, file = newts(tmp_path, 1)
    names = sorted((f"video {v}/v{v}_frame{i:02}.png" for v, n in enumerate(videos) for i in range(n)), key=lambda name: name[-6:])
    for name in names:
        (pictures / name).parent.mkdir(exist_ok=True)
        os.link(pictures / "1.png", pictures / name)
    images = [dict(id=i, file_name=name, width=64, height=64) for i, name in enumerate(names, 101)] # the first is the annotated one
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(images=images)))
    return pictures, file


@pytest.mark.parametrize("group", ["folder", "(.*)_frame", r"v(\d+)_"])
@pytest.mark.parametrize("seed", range(5))
def test_frames_of_a_video_stay_together(tmp_path, group, seed):
    pictures, file = frames(tmp_path, [3, 5, 2, 6, 4])
    parts = lay_out(pictures, file, tmp_path / "mine", val=.3, group=group, seed=seed)
    videos = {split: {p.parent.name for p in (tmp_path / "mine" / split).rglob("*.png")} for split in parts}
    assert not videos["train2017"] & videos["val2017"] and sum(parts.values()) == 20 and 2 <= parts["val2017"] <= 6
    assert {split: len(open_coco(tmp_path / "mine", split)) for split in parts} == parts


def test_groups_that_do_not_divide(tmp_path):
    pictures, file = frames(tmp_path, [4, 9])
    assert lay_out(pictures, file, tmp_path / "mine", val=.1, group="folder") == dict(train2017=9, val2017=4), "the smaller of the two"
    for group, error, said in (("frame", DataError, "13 in 1 group"), ("camera", ConfigError, "occurs in no file_name"), ("(", ConfigError, "not a regular expression")):
        with pytest.raises(error, match=said): lay_out(pictures, file, tmp_path / "other", group=group)
    assert not (tmp_path / "other").exists()


def test_an_area_is_given_only_to_those_without(tmp_path):
    pictures, file = newts(tmp_path, 4)
    coco = json.loads(file.read_text())
    coco["annotations"][0]["area"] = 0
    del coco["annotations"][1]["area"]
    file.write_text(json.dumps(coco))
    areas = lambda root: sorted(a.get("area", -1) for part in root.glob("annotations/*.json") for a in json.loads(part.read_text())["annotations"])
    lay_out(pictures, file, tmp_path / "as it is")
    lay_out(pictures, file, tmp_path / "filled", area=.5)
    assert areas(tmp_path / "as it is") == [-1, 0, 192, 192] and areas(tmp_path / "filled") == [96, 96, 192, 192]


@pytest.mark.parametrize("change, told", [({}, None), (dict(root="data/quadruped"), "data/mine"), (dict(run="data/runs/quadruped"), "data/runs/mine")])
def test_nobodys_pictures_come_among_the_animals(tmp_path, monkeypatch, change, told):
    pictures, file = newts(tmp_path, 7)
    def drawn(*args): raise AssertionError("animals are drawn")
    names = dict(pictures=pictures, coco_file=file, root="data/mine", run="data/runs/mine", start="data/runs/tiny", Path=Path, make_quadrupeds=drawn) | change
    if told is None: return exec(source("make_quadrupeds("), names)
    with pytest.raises(AssertionError, match=told): exec(source("make_quadrupeds("), names)


@pytest.mark.parametrize("place", [".", "nbs"])
def test_a_run_is_named_from_the_repositorys_folder_or_from_the_kernels(tmp_path, monkeypatch, place):
    "`POET_RUN=data/runs/mine`, as notebook 70 says, whether the run is there yet or not."
    book = next(c.source for c in notebooks.read(ROOT / "nbs/70_explore.ipynb").cells if "def seen_from_here(" in c.source)
    function = next(node for node in ast.parse(book).body if isinstance(node, ast.FunctionDef))
    names = dict(Path=Path)
    exec(compile(ast.Module([function], []), "70_explore.ipynb", "exec"), names)
    for folder in ("nbs", "data/runs/mine"): (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / place)
    for given in ("data/runs/mine", tmp_path / "data/runs/mine", *(["../data/runs/mine"] if place == "nbs" else [])):
        assert names["seen_from_here"](str(given)).resolve() == tmp_path / "data/runs/mine", given
    if place == "nbs": assert names["seen_from_here"]("data/runs/later") == Path("../data/runs/later"), "a run that begins later is looked for in the repository"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_notebook_with_thirty_pictures(tmp_path):
    "In a copy, whose first cell is changed as its comments say; every other cell is as it is in the repository."
    home = tmp_path / "a copy"
    for folder in ("nbs", "data/runs"): (home / folder).mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", home)
    shutil.copytree(ROOT / "data/runs/tiny", home / "data/runs/tiny")
    pictures, file = newts(tmp_path, 30)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    book = notebooks.read(NOTEBOOK)
    first = next(c for c in book.cells if c.cell_type == "code")
    mine = dict(pictures=str(pictures), coco_file=str(file), root="data/my newts", run="data/runs/my newts", start="data/runs/tiny", group="", settings=SHORT)
    assert {node.targets[0].id for node in ast.parse(first.source).body} == set(mine), "the first cell names these and nothing else"
    first.source = "\n".join(f"{name} = {value!r}" for name, value in mine.items())
    notebooks.write(book, home / "nbs/72_your_own.ipynb")
    done = subprocess.run([sys.executable, ROOT / "tools/execute.py", "--root", home, "--all", "72_your_own"], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", POET_TRACEBACK=""))
    assert done.returncode == 0, done.stderr[-3000:]
    run, root = home / mine["run"], home / mine["root"]
    assert json.loads((run / "skeleton.json").read_text())["categories"][0]["keypoints"] == NEWT["keypoints"] and (run / "model.safetensors").is_file()
    assert len(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["coco"]) >= 10
    assert sorted(p.name for p in root.iterdir()) == ["annotations", "train2017", "val2017"] and not (home / "data/quadruped").exists()
    assert len([p for p in root.rglob("*") if p.suffix in (".png", ".jpg")]) == 30
    assert len(list((home / "predictions_my newts").glob("*_poses.jpg"))) == 2
    assert {p: p.read_bytes() for p in before if p.name != "72_your_own.ipynb"} == {p: b for p, b in before.items() if p.name != "72_your_own.ipynb"}
    said = "".join(o.get("text", "") for c in notebooks.read(home / "nbs/72_your_own.ipynb").cells for o in c.get("outputs", []))
    for part in ("30 pictures", "eye_near <-> eye_far", "4 of 4 joints", "newt 4 joints; the model knows: True"): assert part in said, said
    assert "quadruped" not in said and sum("image/jpeg" in o.get("data", {}) for c in nbformat.read(home / "nbs/72_your_own.ipynb", 4).cells for o in c.get("outputs", [])) == 5


@pytest.mark.parametrize("what", ["another split of the same pictures", "annotations of others", "a picture too many", "the pictures themselves"])
def test_nothing_that_is_there_is_written_over(tmp_path, what):
    pictures, file = newts(tmp_path, 9)
    root, out = tmp_path / "mine", dict(val=.3)
    lay_out(pictures, file, root, val=.3)
    if what == "another split of the same pictures": out["seed"] = 1
    elif what == "annotations of others": (root / "annotations/person_keypoints_val2017.json").write_text('{"images": []}')
    elif what == "a picture too many": (root / "train2017/holiday.jpg").write_bytes(b"mine")
    else: pictures = Path(shutil.copytree(pictures, root / "val2017", dirs_exist_ok=True))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match="mine: holds something else already .*choose a new folder"): lay_out(pictures, file, root, **out)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_a_picture_of_the_same_name_that_is_another_is_not_written_over(tmp_path):
    pictures, file = newts(tmp_path, 9)
    root = tmp_path / "mine"
    lay_out(pictures, file, root)
    for left in root.glob("annotations/*"): left.unlink()
    mine = next(p for p in (root / "train2017").rglob("*") if p.is_file())
    mine.write_bytes(b"another picture")
    with pytest.raises(DataError, match="holds something else already"): lay_out(pictures, file, root)
    assert mine.read_bytes() == b"another picture" and not any((root / "annotations").iterdir())
    mine.unlink()
    (root / "annotations/train2017.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="holds something else already .*train2017.json"): lay_out(pictures, file, root)
