"Synthetic people: any settings give sound annotations; the same request gives the same bytes, whatever happens on the way."
import io, json, os, signal, subprocess, sys, time, zlib
from contextlib import redirect_stderr
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pycocotools import mask as rle

from poet_nb import synth
from poet_nb.config import DataError, PoetError
from poet_nb.keypoints import COCO_PERSON
from poet_nb.quadruped import make_quadrupeds
from poet_nb.synth import SynthConfig, make_synth, render_scene

SMALL = SynthConfig(size=48)
GOLDEN = dict(num_keypoints=[17, 14, 9], centers=[[91.45, 115.21], [173.62, 149.76], [213.8, 67.75]],
              area=[13803.0, 6830.0, 16505.0], color=[106.6, 104.8, 137.8])  # train2017, seed 0, fourth image
share = st.floats(0, 1)
configs = st.builds(SynthConfig, size=st.integers(32, 200), people=st.floats(1, 4), max_people=st.integers(4, 13), min_height=st.floats(0.05, 0.5),
                    max_height=st.floats(0.5, 4), clutter=share, occlusion=share, empty_share=share, far_share=share, crowd_share=share, unlabelled_share=share)


@pytest.fixture
def small_packages(monkeypatch):
    "Packages of four images, so that few images make several."
    monkeypatch.setattr(synth, "CHUNK", 4)


def content(folder):
    "Every file below a folder, hidden ones too, with its bytes."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- scenes

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs, st.integers(0, 2**63))
def test_any_settings_give_sound_annotations(config, seed):
    image, annotations = render_scene(config, seed)
    assert image.shape == (config.size, config.size, 3) and image.dtype == np.uint8
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
    taken = np.zeros(image.shape[:2], int)
    for a in annotations:
        mask = rle.decode(a["segmentation"])
        taken += mask
        ys, xs = np.nonzero(mask)
        assert mask.shape == image.shape[:2] and a["area"] == mask.sum() > 0
        assert a["bbox"] == [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
        k = np.array(a["keypoints"], float).reshape(-1, 3)
        assert len(k) == COCO_PERSON.num_keypoints and set(k[:, 2]) <= {0, 1, 2}
        assert a["num_keypoints"] == (k[:, 2] > 0).sum() and not k[k[:, 2] == 0].any()
        assert (k[:, :2] >= 0).all() and (k[:, :2] <= config.size).all()
        if a["iscrowd"] or a["area"] < 32**2: assert a["num_keypoints"] == 0
        near = cv2.dilate(mask, np.ones((3, 3), np.uint8))
        for x, y, v in k:
            if v == 2: assert near[min(int(y), config.size - 1), min(int(x), config.size - 1)]
    assert taken.max(initial=0) <= 1  # a pixel shows one person at most
    assert json.loads(json.dumps(annotations)) == annotations  # nothing but plain numbers, lists and strings


@settings(max_examples=10, deadline=None)
@given(configs, st.integers(0, 2**63))
def test_a_seed_gives_one_scene(config, seed):
    (a, x), (b, y) = render_scene(config, seed), render_scene(config, seed)
    assert (a == b).all() and x == y


def test_a_scene_is_the_same_in_another_process():
    code = ("import zlib, json; from poet_nb.synth import *; i, a = render_scene(SynthConfig(people=4.), 'x/0/3');"
            "print(zlib.crc32(i.tobytes()), zlib.crc32(json.dumps(a).encode()))")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    out = subprocess.run([sys.executable, "-c", code], env=env | dict(PYTHONHASHSEED="1"), capture_output=True, text=True, check=True).stdout
    image, annotations = render_scene(SynthConfig(people=4.), "x/0/3")
    assert out.split() == [str(zlib.crc32(image.tobytes())), str(zlib.crc32(json.dumps(annotations).encode()))]


def test_version_1_still_makes_the_scenes_of_version_1():
    "If this fails, scenes changed: count VERSION up, or data made earlier would be taken for the same. Joints within 0.05 pixels."
    image, annotations = render_scene(SynthConfig(), "train2017/0/3")
    people = [np.array(a["keypoints"], float).reshape(-1, 3) for a in annotations]
    assert synth.VERSION == 1
    assert [a["num_keypoints"] for a in annotations] == GOLDEN["num_keypoints"]
    np.testing.assert_allclose([k[k[:, 2] > 0, :2].mean(0) for k in people if k.any()], GOLDEN["centers"], atol=0.05)
    np.testing.assert_allclose([a["area"] for a in annotations], GOLDEN["area"], rtol=0.01)
    np.testing.assert_allclose(image.mean((0, 1)), GOLDEN["color"], atol=1)


@pytest.mark.parametrize("size", [32, 333, 1024])
def test_any_size(size):
    image, annotations = render_scene(SynthConfig(size=size, people=5.), 2)
    assert image.shape == (size, size, 3) and annotations


def test_shares_mean_what_they_say():
    scenes = lambda **kw: [render_scene(SynthConfig(size=128, **kw), i)[1] for i in range(25)]
    people = dict(empty_share=0.)
    assert not any(scenes(empty_share=1.))
    assert all(scenes(**people))
    assert not any(a["num_keypoints"] for s in scenes(unlabelled_share=1., **people) for a in s)
    crowds = [sum(a["iscrowd"] for a in s) for s in scenes(crowd_share=1., **people)]
    assert max(crowds) == 1 and np.mean(crowds) > 0.5  # now and then a near person hides it
    assert sum(a["num_keypoints"] == 0 for s in scenes(far_share=1., **people) for a in s) > sum(a["num_keypoints"] == 0 for s in scenes(far_share=0., **people) for a in s)


def test_occlusion_covers_joints_and_people_overlap():
    def covered(occlusion):
        config = SynthConfig(occlusion=occlusion, empty_share=0., size=160, unlabelled_share=0.)
        v = np.concatenate([np.array(a["keypoints"])[2::3] for i in range(40) for a in render_scene(config, i)[1]])
        return (v == 1).sum() / (v > 0).sum()
    assert covered(1.) > covered(0.) + 0.02  # most joints are covered by the own body


def test_people_and_heights_follow_the_settings():
    number = lambda people: np.mean([len(render_scene(SynthConfig(size=64, people=people, empty_share=0., far_share=0., crowd_share=0.), i)[1]) for i in range(60)])
    assert number(1.) == 1 and number(4.) > number(2.) > 1.5
    boxes = lambda low, high: np.mean([a["bbox"][3] for i in range(40) for a in render_scene(
        SynthConfig(size=128, people=1., min_height=low, max_height=high, empty_share=0., far_share=0., occlusion=0.), i)[1]])
    assert boxes(0.2, 0.25) < 40 < boxes(0.8, 0.9)


def test_joints_and_pixels_agree_on_where_things_are():
    "The pixel at a shoulder shows the shirt: coordinates have their origin at the image's edge, not at the first pixel's centre."
    canvas = synth.blank_canvas(64, 64)
    synth.paint(canvas, synth.hull(np.array([[32.5, 20.5]]), np.array([1.2])), (255, 255, 255), 33, 1)
    ys, xs = np.nonzero(canvas.labels)
    assert (xs + 0.5).mean() == pytest.approx(32.5) and (ys + 0.5).mean() == pytest.approx(20.5)


def test_not_slow():
    "One core, 256 x 256, with masks and JPEG: 40 scenes a second are promised; the processor's time counts, so that a busy machine fails nothing."
    start = time.process_time()
    for i in range(30): cv2.imencode(".jpg", render_scene(SynthConfig(), f"speed/{i}")[0], [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert (time.process_time() - start) / 30 < 1 / 40


# ---------------------------------------------------------------- datasets

def test_processes_do_not_matter(tmp_path, small_packages):
    for w in (1, 2): make_synth(tmp_path / str(w), "val2017", 10, SMALL, workers=w, progress=False)
    one = content(tmp_path / "1")
    assert one == content(tmp_path / "2") and len(one) == 11


def test_splits_and_seeds_share_no_scene(tmp_path):
    for split, seed in (("train2017", 0), ("val2017", 0)): make_synth(tmp_path, split, 12, SMALL, seed, progress=False)
    make_synth(tmp_path / "other", "train2017", 12, SMALL, 1, progress=False)
    images = [p.read_bytes() for p in tmp_path.rglob("*.jpg")]
    assert len(images) == len(set(images)) == 36


def test_a_longer_dataset_begins_like_a_shorter_one(tmp_path):
    make_synth(tmp_path / "a", "val2017", 5, SMALL, progress=False), make_synth(tmp_path / "b", "val2017", 8, SMALL, progress=False)
    for i in range(5): assert (tmp_path / "a/val2017" / synth.file_name(i)).read_bytes() == (tmp_path / "b/val2017" / synth.file_name(i)).read_bytes()


@pytest.mark.parametrize("stop", [1, 5, 8, 10])
def test_interrupted_and_finished(tmp_path, monkeypatch, small_packages, stop):
    make_synth(tmp_path / "whole", "val2017", 10, SMALL, progress=False)
    real, drawn = synth.render_scene, []
    def fragile(config, seed):
        if len(drawn) == stop - 1: raise KeyboardInterrupt
        drawn.append(seed)
        return real(config, seed)
    monkeypatch.setattr(synth, "render_scene", fragile)
    with pytest.raises(KeyboardInterrupt): make_synth(tmp_path / "half", "val2017", 10, SMALL, progress=False)
    assert not (tmp_path / "half" / "annotations").exists()
    again = []
    monkeypatch.setattr(synth, "render_scene", lambda config, seed: (again.append(seed), real(config, seed))[1])
    make_synth(tmp_path / "half", "val2017", 10, SMALL, progress=False)
    assert content(tmp_path / "half") == content(tmp_path / "whole")
    assert len(again) == 10 - (stop - 1) // 4 * 4  # whole packages were kept


def test_killed_and_finished(tmp_path):
    "SIGKILL, which leaves no time to tidy up."
    code = ("import sys; from poet_nb import synth; synth.CHUNK = 4;"
            f"synth.make_synth({str(tmp_path / 'half')!r}, 'val2017', 4000, synth.SynthConfig(size=48), progress=False)")
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path)))
    for _ in range(6000):
        if len(list((tmp_path / "half/val2017").glob("*.jpg"))) > 10: break
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL), process.wait()
    (tmp_path / "half/val2017/000000000002.jpg.99.part").write_bytes(b"half an image")
    make_synth(tmp_path / "half", "val2017", 12, SMALL, progress=False)  # another request: its leftovers go
    make_synth(tmp_path / "whole", "val2017", 12, SMALL, progress=False)
    assert content(tmp_path / "half") == content(tmp_path / "whole")


def test_missing_images_come_back(tmp_path, small_packages):
    path = make_synth(tmp_path, "val2017", 10, SMALL, progress=False)
    before, stamp = content(tmp_path), path.stat().st_mtime_ns
    for i in (3, 9): (tmp_path / "val2017" / synth.file_name(i)).unlink()
    make_synth(tmp_path, "val2017", 10, SMALL, progress=False)
    assert content(tmp_path) == before and path.stat().st_mtime_ns == stamp


def test_a_second_call_does_nothing(tmp_path, monkeypatch):
    make_synth(tmp_path, "val2017", 6, SMALL, progress=False)
    monkeypatch.setattr(synth, "render_scene", lambda *a: pytest.fail("drawn again"))
    make_synth(tmp_path, "val2017", 6, SMALL, workers=2, progress=False)
    assert not list(tmp_path.glob(".*"))


def test_another_dataset_is_not_overwritten(tmp_path):
    make_synth(tmp_path, "val2017", 6, SMALL, progress=False)
    before = content(tmp_path)
    for change in (dict(n=7), dict(seed=1), dict(config=SynthConfig(size=48, clutter=0.5))):
        with pytest.raises(DataError, match="describes another dataset"):
            make_synth(tmp_path, "val2017", **(dict(n=6, config=SMALL, seed=0, progress=False) | change))
    assert content(tmp_path) == before


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "val2017").mkdir(); (tmp_path / "val2017/000000000139.jpg").write_bytes(b"a photograph")
    with pytest.raises(DataError, match="not ours to fill"): make_synth(tmp_path, "val2017", 4, SMALL, progress=False)
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/person_keypoints_val2017.json"
    for text, message in ((json.dumps(dict(info={}, images=[])), "describes another dataset"), ("{", "is not a COCO annotation file"), ("[]", "is not a COCO")):
        path.write_text(text)
        with pytest.raises(DataError, match=message): make_synth(tmp_path, "val2017", 4, SMALL, progress=False)
    assert (tmp_path / "val2017/000000000139.jpg").read_bytes() == b"a photograph" and path.read_text() == "[]"


@pytest.mark.parametrize("text, message", [("[]", "is not a COCO annotation file"), ("[" * 100_000, "is not a COCO annotation file .not valid JSON"), ('{"info": {}}', "describes another dataset")], ids=["list", "deep", "another"])
def test_animals_are_not_drawn_over_a_file_of_something_else(tmp_path, text, message):
    (tmp_path / "annotations").mkdir()
    (path := tmp_path / "annotations/person_keypoints_val2017.json").write_text(text)
    with pytest.raises(DataError, match=message): make_quadrupeds(tmp_path, "val2017", n=1)
    assert path.read_text() == text and not (tmp_path / "val2017").exists()


@pytest.mark.parametrize("change, message", [
    (dict(split="a/b"), "split = 'a/b'"), (dict(split="../x"), "plain name"), (dict(split=""), "split = ''"), (dict(n=0), "n = 0"), (dict(n=2.5), "n = 2.5"),
    (dict(n=True), "n = True"), (dict(workers=0), "workers = 0"), (dict(seed=-1), "seed = -1"), (dict(seed="1"), "seed = '1'")])
def test_bad_requests(tmp_path, change, message):
    with pytest.raises(DataError, match=message): make_synth(tmp_path / "x", **(dict(split="val2017", n=2, config=SMALL, progress=False) | change))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", [dict(size=31), dict(size=64.), dict(size=True), dict(people=0.5), dict(people=float("nan")), dict(max_people=0), dict(clutter=-0.1),
                                    dict(occlusion=1.01), dict(empty_share="0.1"), dict(min_height=0.), dict(max_height=0.2), dict(quality=0), dict(people=14.),
                                    dict(max_people=2), dict(unlabelled_share=None)])
def test_bad_settings_are_named(change):
    with pytest.raises(DataError, match=f"SynthConfig.*{next(iter(change))}") as e: SynthConfig(**change)
    assert isinstance(e.value, PoetError)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"): make_synth(tmp_path / "file", "val2017", 2, SMALL, progress=False)
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(synth.os, "replace", full)
    with pytest.raises(DataError, match="No space left on device.*free space"): make_synth(tmp_path / "x", "val2017", 2, SMALL, progress=False)


def test_progress_goes_to_the_end(tmp_path, small_packages):
    with redirect_stderr(io.StringIO()) as bar: make_synth(tmp_path, "val2017", 10, SMALL, progress=True)
    assert "10/10" in bar.getvalue() and "val2017" in bar.getvalue()
    with redirect_stderr(io.StringIO()) as bar: make_synth(tmp_path / "b", "val2017", 4, SMALL, progress=False)
    assert bar.getvalue() == ""


def test_written_images_are_the_rendered_ones(tmp_path):
    path = make_synth(tmp_path, "val2017", 3, SynthConfig(size=128), seed=4, progress=False)
    coco = json.loads(path.read_text())
    assert coco["categories"] == [COCO_PERSON.to_category()] and coco["info"]["synth"]["seed"] == 4
    assert [i["id"] for i in coco["images"]] == [1, 2, 3] and {i["width"] for i in coco["images"]} == {128}
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for i in range(3):
        image, annotations = render_scene(SynthConfig(size=128), synth.scene_seed("val2017", 4, i))
        read = cv2.cvtColor(cv2.imread(str(tmp_path / "val2017" / synth.file_name(i))), cv2.COLOR_BGR2RGB)
        assert np.abs(read.astype(int) - image).mean() < 6  # JPEG, and red is red
        mine = [a for a in coco["annotations"] if a["image_id"] == i + 1]
        assert [{k: v for k, v in a.items() if k not in ("id", "image_id")} for a in mine] == [{k: v for k, v in a.items() if k not in ("id", "image_id")} for a in annotations]
