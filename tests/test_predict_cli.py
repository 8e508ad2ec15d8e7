"`poet predict` and `poet eval --split test-dev`: files, folders, addresses, videos and webcams in; overlays, COCO file, table and zip out."
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from poet_nb import cli, predict, results, video
from poet_nb.coco import open_coco
from poet_nb.config import ConfigError, DataConfig, DataError, ModelConfig, PoetError, preset, replace
from poet_nb.keypoints import Skeleton
from poet_nb.poet import PostProcess, build_poet
from poet_nb.predict import PredictOptions, download, iter_predictions, load_image, stream_predictions, url_name
from poet_nb.results import Predictions, ResultsWriter, to_supervision
from poet_nb.synth import SynthConfig, make_synth, render_scene
from poet_nb.video import VideoFacts, VideoWriter, read_video

pytest.importorskip("av")
ROOT = Path(__file__).resolve().parents[1]
SMALL = replace(preset("poet_tiny"), model=ModelConfig(backbone="resnet_tiny", stride=16, hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2, dim_feedforward=16, num_queries=25, num_keypoints=17, frozen_stages=0),
                data=DataConfig(scales=(64,), eval_scale=64, max_size=96, pad_multiple=16))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    "A run folder of random weights."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "small"
    build_poet(SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def poet(poet, run):
    "`poet` with predictions of the small run, without bars."
    return lambda name, *words: poet(name, *words, "--run", run, "--quiet")


def picture(seed=0, height=48, width=64): return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(path, frames=5):
    "A short video, 100 ms a frame."
    with VideoWriter(path, VideoFacts(Fraction(1, 1000), Fraction(10))) as out:
        for i in range(frames): out.write(picture(i), 100 * i)
    return path


def content(folder="predictions") -> dict: return json.loads((Path(folder) / "predictions.json").read_text())


def same_numbers(folder="predictions"):
    "The table holds what the COCO file holds."
    found, table = content(folder), pd.read_csv(Path(folder) / "predictions.csv")
    images = {image["id"]: image for image in found["images"]}
    assert table.image_id.tolist() == [a["image_id"] for a in found["annotations"]] and table.score.tolist() == [a["score"] for a in found["annotations"]]
    assert table.iloc[:, 8:].to_numpy().tolist() == [a["keypoints"] for a in found["annotations"]]
    assert table.track.fillna(0).tolist() == [a.get("track", 0) for a in found["annotations"]]
    assert table.file_name.tolist() == [images[a["image_id"]]["file_name"] for a in found["annotations"]] and set(table.category) == {"person"}
    for field in ("frame", "time"):
        for here, there in zip(table[field], (images[a["image_id"]].get(field) for a in found["annotations"])): assert here == there or np.isnan(here) and there is None
    return found, table


# ---- images and videos

def test_images_and_videos_in_one_go(poet):
    Path("album").mkdir()
    for i in range(2): Image.fromarray(picture(i)).save(f"album/{i}.png")
    clip("album/party.mp4")
    Path("album/notes.txt").write_text("no picture")
    Image.fromarray(picture(9)).save("0.png")
    code, out, err = poet("predict", "album", "*.png", "--threshold", 0, "--csv", "--batch", 2)
    assert code == 0 and err == "" and out == "200 people in 3 images and 5 frames; pictures, predictions.json, predictions.csv: predictions\n"
    found, table = same_numbers()
    assert [(Path(i["file_name"]).name, i.get("frame"), i.get("time")) for i in found["images"]] == [("0.png", None, None), ("1.png", None, None), *(("party.mp4", i, .1 * i if i != 3 else .3) for i in range(5)), ("0.png", None, None)]
    assert [i["id"] for i in found["images"]] == list(range(1, 9)) and {(i["width"], i["height"]) for i in found["images"]} == {(64, 48)}
    assert sorted(os.listdir("predictions")) == ["0_poses.jpg", "0_poses_2.jpg", "1_poses.jpg", "party_poses.mp4", "predictions.csv", "predictions.json"]
    assert [round(1000 * f.time) for f in read_video("predictions/party_poses.mp4")] == [0, 100, 200, 300, 400]
    assert table.person.tolist() == list(range(1, 26)) * 8


def test_people_are_followed_in_videos_alone_and_only_if_wanted(poet):
    Image.fromarray(picture()).save("a.png")
    with VideoWriter("still.mp4", VideoFacts(Fraction(1, 1000), Fraction(10))) as out:
        for i in range(3): out.write(picture(), 100 * i)
    assert poet("predict", "a.png", "still.mp4", "--threshold", 0, "--csv")[0] == 0
    found, table = same_numbers()
    assert [a.get("track") for a in found["annotations"]][:50] == [None] * 25 + list(range(1, 26))
    for _, frame in table.iloc[25:].groupby("frame"): assert frame.track.nunique() == 25                       # nobody has another's number
    assert poet("predict", "still.mp4", "--threshold", 0, "--csv", "--no-track", "--out", "b")[0] == 0
    found, table = same_numbers("b")
    assert len(table) == 75 and table.track.isna().all() and not any("track" in a for a in found["annotations"])


def test_a_frame_is_predicted_as_an_image(poet):
    "Frames go the way of images: same pixels, same poses."
    frames = [f.image for f in read_video(clip("a.mp4"))]
    for i, image in enumerate(frames): Image.fromarray(image).save(f"{i}.png")
    assert poet("predict", "a.mp4", "--threshold", 0, "--no-overlays", "--out", "v")[0] == poet("predict", "*.png", "--threshold", 0, "--no-overlays", "--out", "i")[0] == 0
    for a, b in zip(content("v")["annotations"], content("i")["annotations"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4) and a["keypoints"] == pytest.approx(b["keypoints"], abs=.02)
    assert os.listdir("v") == ["predictions.json"]


def test_layers(poet, run):
    Image.fromarray(picture()).save("a.png")
    model = build_poet(run)
    for layer in (1, 2):
        assert poet("predict", "a.png", "--threshold", 0, "--layer", layer, "--out", str(layer))[0] == 0
        *_, found = next(stream_predictions(model, "a.png", PredictOptions(0., layer=layer)))
        assert [a["keypoints"] for a in content(str(layer))["annotations"]] == pytest.approx(found["keypoints"].flatten(1).numpy(), abs=.01)
    assert content("1")["annotations"] != content("2")["annotations"]
    for layer in (0, 3):
        code, _, err = poet("predict", "a.png", "--layer", layer)
        assert code == 2 and f"--layer {layer}: this model has decoder layers 1 to 2" in err
    with pytest.raises(ConfigError, match="layer 3"): model.predict("a.png", layer=3)


def test_the_help_says_what_a_threshold_means(poet):
    code, out, _ = poet("predict", "--help")
    assert code == 0 and "0.9 keeps what is more likely a person than not (notebook 32), 0.5 also shows doubtful ones (default: 0.5)" in " ".join(out.split())


def test_only_some_frames(poet):
    clip("a.mp4"), clip("b.mp4", 2)
    code, out, _ = poet("predict", "a.mp4", "b.mp4", "--threshold", 0, "--max-frames", 3)
    assert code == 0 and "in 5 frames" in out and [len(list(read_video(f"predictions/{n}_poses.mp4"))) for n in "ab"] == [3, 2]


def test_the_trained_model_finds_people_in_a_video(tmp_path, capfd, monkeypatch):
    if not (ROOT / "data/runs/tiny/model.safetensors").is_file(): pytest.skip("there is no run")
    monkeypatch.chdir(tmp_path)
    scene = next(image for image, people in (render_scene(SynthConfig(size=192), seed) for seed in range(20)) if len(people) == 2)
    with VideoWriter("a.mp4", VideoFacts(Fraction(1, 1000), Fraction(10))) as out:
        for i in range(2): out.write(scene, 100 * i)
    assert cli.main(["predict", "a.mp4", "--run", str(ROOT / "data/runs/tiny"), "--quiet", "--threshold", ".9"]) == 0
    assert {a["image_id"] for a in content()["annotations"]} == {1, 2}


# ---- what can't be read

def test_a_broken_source_among_others_is_a_warning(poet):
    Image.fromarray(picture()).save("a.png")
    Path("b.jpg").write_bytes(b"\xff\xd8 no picture")
    Path("c.mp4").write_bytes(b"no video")
    code, out, err = poet("predict", "a.png", "b.jpg", "c.mp4", "--threshold", 0)
    assert code == 0 and out.startswith("25 people in 1 images") and out.rstrip().endswith("2 of 3 sources can't be read, see above")
    assert [line.split(": ")[:3] for line in err.splitlines()] == [["poet", "warning", "b.jpg"], ["poet", "warning", "c.mp4"]]


@pytest.mark.parametrize("names", [["b.jpg"], ["c.mp4"], ["d.mkv"], ["b.jpg", "c.mp4"]])
def test_nothing_that_can_be_read_is_an_error(poet, names):
    for name in ("b.jpg", "c.mp4"): Path(name).write_bytes(b"broken")
    Path("d.mkv").write_bytes(b"")
    code, out, err = poet("predict", *names)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("poet: error: ") and names[0] in err.splitlines()[-1]
    assert os.listdir("predictions") == []


def test_an_overlay_never_replaces_a_source(poet):
    Path("ph").mkdir()
    for i, name in enumerate(("a.png", "a_poses.jpg")): Image.fromarray(picture(i)).save(f"ph/{name}")
    before = Path("ph/a_poses.jpg").read_bytes()
    assert poet("predict", "ph", "--out", "ph", "--threshold", 0)[0] == 0
    assert Path("ph/a_poses.jpg").read_bytes() == before and {p.name for p in Path("ph").iterdir()} == {"a.png", "a_poses.jpg", "a_poses_2.jpg", "a_poses_poses.jpg", "predictions.json"}


def test_subfolders_are_sources_and_equal_names_stay_apart(poet):
    for i, name in enumerate(("1.png", "mon/1.png", "tue/1.png", "tue/.cache/1.png")):
        Path("days", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(f"days/{name}")
    for _ in range(2): assert poet("predict", "days", "--threshold", 0, "--out", "days/found")[0] == 0       # the second time there are overlays in the folder
    assert [i["file_name"] for i in content("days/found")["images"]] == ["days/1.png", "days/mon/1.png", "days/tue/1.png"]
    assert sorted(p.relative_to("days/found").as_posix() for p in Path("days/found").rglob("*.jpg")) == ["1_poses.jpg", "mon/1_poses.jpg", "tue/1_poses.jpg"]
    assert [name for name, _ in iter_predictions(build_poet(SMALL), "days/tue")] == ["days/tue/1.png"]
    assert poet("predict", "days/mon", "days/tue", "--threshold", 0, "--out", "both")[0] == 0
    assert sorted(p.name for p in Path("both").glob("*.jpg")) == ["1_poses.jpg", "1_poses_2.jpg"]


def test_what_came_from_an_address_is_no_label():
    images = [dict(id=i, file_name=name, width=9, height=9) for i, name in enumerate(("a.jpg", "http://a.org/b.jpg", "HTTPS://a.org/b.jpg"))]
    assert results.to_labels(dict(images=images, annotations=[], categories=[]))["images"] == images[:1]


def test_labels_are_annotations_that_can_be_divided_and_learnt(poet, run, monkeypatch):
    for i in range(4):
        Path(f"new/day {i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(f"new/day {i % 2}/{i}.png")
    clip("new/walk.mp4")
    sure = lambda self, outputs, sizes, of=PostProcess.forward: [p | dict(keypoints=p["keypoints"].clone().index_fill_(2, torch.tensor(2), .9)) for p in of(self, outputs, sizes)]
    monkeypatch.setattr(PostProcess, "forward", sure)
    code, out, err = poet("predict", "new", "--threshold", 0, "--no-overlays", "--labels", "labels.json")
    labels, found = json.loads(Path("labels.json").read_text()), content()
    again = poet("predict", "new", "--no-overlays", "--labels", "labels.json")
    assert again[0] == 2 and "labels.json: is there already" in again[2] and json.loads(Path("labels.json").read_text()) == labels
    assert code == 0 and "in 4 images as annotations: labels.json; file names begin below" in out, err
    assert [i["file_name"] for i in labels["images"]] == ["day 0/0.png", "day 0/2.png", "day 1/1.png", "day 1/3.png"] and labels["categories"] == found["categories"]
    assert len(labels["annotations"]) > 20 and len(found["annotations"]) == 25 * 9
    for a in labels["annotations"]:
        joints = np.array(a["keypoints"]).reshape(-1, 3)
        seen, (x, y, w, h) = joints[joints[:, 2] > 0], a["bbox"]
        assert set(joints[:, 2]) <= {0, 2} and a["num_keypoints"] == len(seen) >= 2 and a["area"] == pytest.approx(.53 * w * h, abs=.02)
        assert np.allclose(seen[:, :2].min(0), [x, y], atol=.02) and np.allclose(seen[:, :2].max(0), [x + w, y + h], atol=.02) and (seen[:, :2] >= 0).all() and (seen[:, :2] <= [64, 48]).all()
    assert cli.main("data split new labels.json --out mine --group folder".split()) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(len(open_coco("mine", split)) for split in ("train2017", "val2017")) == [2, 2]
    for wrong in ("new", "predictions/predictions.json"): assert "name another file" in poet("predict", "new", "--labels", wrong)[2]


def test_a_prediction_is_drawn_with_its_own_skeleton(tmp_path, monkeypatch):
    "An animal with 17 joints is no person; a plain dict can't know."
    animal = dict(id=1, name="cat", keypoints=[f"{side}_{i}" for i in range(8) for side in ("left", "right")] + ["tail"], skeleton=[[1, 2], [2, 3]])
    model, image = build_poet(SMALL), picture()
    assert model.skeleton.name == "person"
    model.categories = [animal]
    found = model.predict(image, threshold=0.)
    assert model.skeleton.name == found.skeleton.name == found[0].skeleton.name == "cat" and found[:1][0].skeleton.limbs == ((0, 1), (1, 2))
    drawn, plain = [], video.overlay_poses
    monkeypatch.setattr(predict, "draw_poses", lambda image, poses, skeleton, *more, **options: drawn.append(skeleton.name))
    monkeypatch.setattr(video, "overlay_poses", lambda image, poses, skeleton, *more, **options: drawn.append(skeleton.name) or plain(image, poses, skeleton, *more, **options))
    for prediction in (found[0], dict(found[0])): predict.draw_predictions(image, prediction)
    video.annotate_video(model, read_video(clip(tmp_path / "a.mp4", 2)), video.video_facts(tmp_path / "a.mp4"), tmp_path / "b.mp4", PredictOptions(0.))
    assert drawn == ["cat", "person", "cat", "cat"]
    with pytest.raises(PoetError, match="the prediction has 17 joints, skeleton 'rod' has 1; give skeleton=model.skeleton"): predict.draw_predictions(image, found[0], skeleton=Skeleton("rod", ("tip",), (), (), (.1,)))


def test_folders_without_pictures(poet):
    Path("empty").mkdir()
    code, _, err = poet("predict", "empty")
    assert code == 2 and "empty: no image and no video" in err


def test_without_any_source_there_is_usage(capfd):
    assert cli.main(["predict"]) == 2 and capfd.readouterr().err.startswith("poet: error: no SOURCE: give images")
    for words in (["predict", "--webcam"], ["predict", "--webcam", "x"]):
        assert cli.main(words) == 2 and capfd.readouterr().err.startswith("usage: poet predict")
    assert cli.make_parser().parse_args(["predict", "--webcam", "1"]).webcam == 1
    assert cli.make_parser().parse_args(["predict", "a.jpg", "--webcam", "1"]).sources == ["a.jpg"]


# ---- addresses

@pytest.fixture
def web(serve, tmp_path):
    "Address of a server with a picture, a video, half a file, a page, and one that sends without end."
    Image.fromarray(picture()).save(tmp_path / "a.png")
    files = {"/a.png": ("image/png", (tmp_path / "a.png").read_bytes()), "/show": ("image/png", (tmp_path / "a.png").read_bytes()), "/b.mp4": ("video/mp4", clip(tmp_path / "b.mp4", 3).read_bytes()),
             "/page.jpg": ("text/html", b"<html>sorry</html>"), "/broken.jpg": ("image/jpeg", b"no picture"), "/half.png": ("image/png", b"\x89PNG")}
    (tmp_path / "a.png").unlink(), (tmp_path / "b.mp4").unlink()
    def answer(handler):
        if handler.path == "/moved.png":
            handler.send_response(302); handler.send_header("Location", "/a.png"); handler.end_headers()
            return
        if handler.path not in files: return handler.send_error(404)
        kind, data = files[handler.path]
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data) + 99 * (handler.path == "/half.png")))
        handler.end_headers()
        handler.wfile.write(data)
    return serve(answer)


def test_pictures_and_videos_from_the_web(poet, web):
    code, out, err = poet("predict", f"{web}/a.png", f"{web}/show", f"{web}/b.mp4", f"{web}/moved.png", "--threshold", 0)
    assert code == 0 and err == "" and out.startswith("150 people in 3 images and 3 frames")
    assert [i["file_name"] for i in content()["images"]] == [f"{web}/a.png", f"{web}/show", *[f"{web}/b.mp4"] * 3, f"{web}/moved.png"]
    assert sorted(os.listdir("predictions")) == ["a_poses.jpg", "b_poses.mp4", "moved_poses.jpg", "predictions.json", "show_poses.jpg"] and sorted(os.listdir()) == ["predictions"]


@pytest.mark.parametrize("name, word", [("none.png", "404"), ("page.jpg", "this is a web page"), ("broken.jpg", "not a readable image"), ("half.png", "ended after 4 of 103 bytes")])
def test_addresses_that_do_not_hold_what_they_say(poet, web, name, word):
    code, _, err = poet("predict", f"{web}/{name}")
    assert code == 2 and len(err.splitlines()) == 1 and f"{web}/{name}" in err and word in err and str(Path("/tmp")) not in err.replace(web, "")
    code, out, err = poet("predict", f"{web}/{name}", f"{web}/a.png")
    assert code == 0 and "1 of 2 sources can't be read" in out and f"poet: warning: {web}/{name}" in err


def test_downloads_have_a_limit_and_an_end(web, serve, tmp_path):
    with pytest.raises(DataError, match="larger than"): download(f"{web}/a.png", tmp_path, limit=100)
    def silent(handler): handler.send_response(200); handler.end_headers(); import time; time.sleep(1)
    with pytest.raises(DataError, match="not downloaded"): download(serve(silent) + "/a.png", tmp_path, timeout=.2)
    with pytest.raises(DataError, match="not downloaded"): download("http://127.0.0.1:9/a.png", tmp_path, timeout=5)
    assert load_image(f"{web}/a.png").shape == (3, 48, 64)


@pytest.mark.parametrize("url, kind, name", [("http://a/b/c.jpg", "image/jpeg", "c.jpg"), ("http://a/../../etc/passwd", "image/png", "passwd.png"), ("http://a/%2e%2e%2f%2e%2e%2fx.png", "image/png", "x.png"),
                                             ("http://a", "video/mp4", "download.mp4"), ("http://a/" + "x" * 500 + ".jpg", "image/jpeg", "x" * 56 + ".jpg"), ("http://a/b?c=d.png", "text/plain", "b")])
def test_names_of_downloads_are_harmless(url, kind, name): assert url_name(url, kind) == name


# ---- stopped

def test_ctrl_c_in_a_video_loses_nothing(poet, monkeypatch):
    clip("a.mp4", 12)
    Image.fromarray(picture()).save("a.png")
    def interrupted(path):
        for frame in read_video(path):
            if frame.index == 9: raise KeyboardInterrupt
            yield frame
    monkeypatch.setattr(cli, "read_video", interrupted)
    code, out, err = poet("predict", "a.png", "a.mp4", "--threshold", 0, "--batch", 2, "--csv")
    assert code == 130 and out.startswith("225 people in 1 images and 8 frames") and err == "poet: stopped\n"
    assert [i.get("frame") for i in same_numbers()[0]["images"]] == [None, *range(8)]
    assert len(list(read_video("predictions/a_poses.mp4"))) == 8 and not [n for n in os.listdir("predictions") if n.endswith(".part")]


@pytest.mark.slow
def test_a_real_ctrl_c_in_another_process(tmp_path, run):
    clip(tmp_path / "a.mp4", 4000)
    command = [sys.executable, "-m", "poet_nb.cli", "predict", "a.mp4", "--run", str(run), "--threshold", "0"]
    work = subprocess.Popen(command, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        part = tmp_path / f"predictions/.predictions.images.{work.pid}.part"
        while work.poll() is None and not (part.exists() and part.stat().st_size > 10_000): __import__("time").sleep(.05)
        work.send_signal(signal.SIGINT)
        out, err = work.communicate(timeout=60)
    finally: work.kill()
    frames = len(content(tmp_path / "predictions")["images"])
    assert work.returncode == 130 and "Traceback" not in err and 50 < frames < 4000
    assert len(list(read_video(tmp_path / "predictions/a_poses.mp4"))) >= frames


class Camera:
    "Six frames, then Ctrl-C."
    def __init__(self, number): self.number, self.left = number, 6
    def isOpened(self): return self.number == 0
    def release(self): pass
    def read(self):
        self.left -= 1
        if self.left < 0: raise KeyboardInterrupt
        return True, picture(self.left)


def test_webcam_until_ctrl_c(poet, monkeypatch):
    monkeypatch.setattr(video.cv2, "VideoCapture", Camera)
    code, out, err = poet("predict", "--webcam", 0, "--threshold", 0, "--batch", 3)
    assert code == 0 and out.startswith("150 people in 6 frames") and "webcam ended" in err
    assert {i["file_name"] for i in content()["images"]} == {"webcam 0"} and len(list(read_video("predictions/webcam0_poses.mp4"))) == 6
    code, _, err = poet("predict", "--webcam", 2)
    assert code == 2 and "webcam 2: can't be opened" in err


# ---- results

@pytest.fixture
def found(run): return build_poet(run).predict([picture(i) for i in range(3)], threshold=0.)


def test_results_are_a_list_of_dicts_that_knows_more(found):
    assert isinstance(found, list) and [set(p) for p in found] == [{"scores", "labels", "keypoints"}] * 3
    assert [i["file_name"] for i in found.images] == ["image 0", "image 1", "image 2"]
    file, table = found.to_coco(), found.to_dataframe()
    assert table.iloc[:, 5:].to_numpy().tolist() == [a["keypoints"] for a in file["annotations"]]
    assert found[1:].to_coco()["annotations"] == [{**a, "id": a["id"] - 25} for a in file["annotations"][25:]]
    long = found.to_dataframe(rows="joints")
    assert len(long) == 3 * 25 * 17 and long[["x", "y", "visibility"]].to_numpy().reshape(75, 51).tolist() == [a["keypoints"] for a in file["annotations"]]
    with pytest.raises(PoetError, match="'people' or 'joints'"): found.to_dataframe(rows="both")
    assert Predictions([]).to_coco()["annotations"] == [] and type(found + []) is list


def test_results_can_be_scored(found, tmp_path):
    from poet_nb.coco_eval import evaluate_keypoints
    file = found.to_coco()
    truth = dict(images=file["images"], categories=file["categories"], annotations=[dict(id=1, image_id=1, category_id=1, keypoints=[10, 10, 2] * 17, num_keypoints=17, bbox=[5, 5, 20, 20], area=400, iscrowd=0)])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert 0 <= evaluate_keypoints(tmp_path / "truth.json", file["annotations"], verbose=False)["AP"] <= 1


def test_supervision_gets_what_we_have(found):
    sv = pytest.importorskip("supervision")
    for mine, theirs in zip(found, found.to_supervision()):
        assert isinstance(theirs, sv.KeyPoints) and len(theirs) == 25
        assert (theirs.xy == mine["keypoints"][..., :2].numpy()).all() and (theirs.keypoint_confidence == mine["keypoints"][..., 2].numpy()).all()
        assert (theirs.detection_confidence == mine["scores"].numpy()).all() and (theirs.visible == (mine["keypoints"][..., 2] >= .5).numpy()).all()
    drawn = sv.VertexAnnotator(radius=3).annotate(picture(), found.to_supervision(visibility=0.)[0])
    assert (np.asarray(drawn) != picture()).any()
    assert len(to_supervision({k: v[:0] for k, v in found[0].items()})) == 0


def test_supervision_is_imported_only_when_asked(found, monkeypatch):
    code = "import sys, poet_nb.cli, poet_nb.video; assert not {'supervision', 'av'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    def no(name): raise ImportError(name)
    monkeypatch.setattr(results, "import_module", no)
    with pytest.raises(PoetError, match="pip install --upgrade supervision"): found.to_supervision()


def test_a_writer_keeps_what_was_written_when_the_disk_is_not_full_but_the_work_fails(tmp_path, found):
    with pytest.raises(ZeroDivisionError), ResultsWriter(tmp_path, found.categories, table=True) as out:
        for _ in range(4): out.add("a, \"b\".png", (48, 64), found[0])
        1 / 0
    assert same_numbers(tmp_path)[0]["images"][3]["file_name"] == "a, \"b\".png" and len(content(tmp_path)["annotations"]) == 100


def test_two_processes_write_into_one_folder(tmp_path, found, monkeypatch):
    with ResultsWriter(tmp_path, found.categories, table=True) as one:
        one.add("a.png", (48, 64), found[0])
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: -1)
            with ResultsWriter(tmp_path, found.categories, table=True) as two:
                for _ in range(2): two.add("b.png", (48, 64), found[0])
        assert [i["file_name"] for i in same_numbers(tmp_path)[0]["images"]] == ["b.png"] * 2
        one.add("a.png", (48, 64), found[0])
    assert [i["file_name"] for i in same_numbers(tmp_path)[0]["images"]] == ["a.png"] * 2 and sorted(os.listdir(tmp_path)) == ["predictions.csv", "predictions.json"]


def test_earlier_results_stay_until_there_are_new_ones(poet):
    Path("predictions").mkdir()
    Path("predictions/predictions.json").write_text("{}")
    Path("b.jpg").write_bytes(b"broken")
    assert poet("predict", "b.jpg")[0] == 2 and content() == {}


# ---- test-dev

@pytest.fixture
def coco(tmp_path, run):
    "A dataset whose validation images are test images as well."
    make_synth(tmp_path / "coco", "val2017", 5, SynthConfig(size=64, clutter=0), seed=1, progress=False)
    shutil.copytree(tmp_path / "coco/val2017", tmp_path / "coco/test2017")
    images = json.loads((tmp_path / "coco/annotations/person_keypoints_val2017.json").read_text())["images"]
    (tmp_path / "coco/annotations/image_info_test-dev2017.json").write_text(json.dumps(dict(images=images[:4], categories=[])))
    return tmp_path / "coco"


@pytest.mark.parametrize("layer", [None, 1])
def test_the_zip_holds_what_evaluation_scores(poet, coco, layer):
    more = [] if layer is None else ["--layer", layer]
    code, out, _ = poet("eval", "--data", coco, "--split", "test-dev", "--name", "ours.v2", "--out", "up", *more)
    name = "person_keypoints_test-dev2017_ours.v2_results"
    assert code == 0 and "80 poses in 4 images" in out and "no scores" in out and os.listdir("up") == [f"{name}.zip"]
    with zipfile.ZipFile(f"up/{name}.zip") as file: assert file.namelist() == [f"{name}.json"]; handed_in = json.loads(file.read(f"{name}.json"))
    assert poet("eval", "--data", coco, "--split", "val2017", "--out", "scored.json", *more)[0] == 0
    scored = json.loads(Path("scored.json").read_text())
    assert len(handed_in) == 80 and set(handed_in[0]) == {"image_id", "category_id", "keypoints", "score"}
    for image in {r["image_id"] for r in handed_in}:
        mine, theirs = ([r for r in rows if r["image_id"] == image] for rows in (handed_in, scored))
        for a, b in zip(mine, sorted(theirs, key=lambda r: -r["score"])[:20], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-4) and a["keypoints"] == pytest.approx(b["keypoints"], abs=.11)


def test_the_name_is_that_of_the_configuration(poet, coco):
    assert poet("eval", "--data", coco, "--split", "test-dev2017")[0] == 0
    assert Path("person_keypoints_test-dev2017_poet-tiny_results.zip").is_file()


def test_test_dev_says_what_is_missing(poet, coco, tmp_path):
    def refused(*words):
        code, _, err = poet("eval", "--split", "test-dev", *words)
        assert code == 2 and len(err.splitlines()) == 1
        return err
    assert "image_info_test2017.zip" in refused("--data", tmp_path / "nowhere")
    assert "--name a/b" in refused("--data", coco, "--name", "a/b") and "give a folder" in refused("--data", coco, "--out", "x.zip")
    next((coco / "test2017").glob("*2.jpg")).unlink()
    err = refused("--data", coco)
    assert "1 of 4 images are not there" in err and "test2017.zip" in err
    for text in ("{", "[" * 100_000, "[]", '{"images": [{"id": 1}]}', '{"images": []}'):
        (coco / "annotations/image_info_test-dev2017.json").write_text(text)
        assert "image_info_test-dev2017.json" in refused("--data", coco)
