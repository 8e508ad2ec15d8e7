"""The explorers without a browser: faults in words, odd images, other skeletons, and how quickly pages are drawn."""
import asyncio
import io
import json
import shutil
import statistics
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from poet_nb.config import override, preset
from poet_nb.explore import (WIDTH, AttentionExplorer, Board, Lab, MatchingExplorer, PredictionExplorer, TrainingExplorer, attention_board, curves,
                             layer_people, matching_board, nobody, open_lab, pair_columns, people_with_joints, prediction_board, readable)
from poet_nb.keypoints import COCO_PERSON, save_categories
from poet_nb.plot import read_metrics
from poet_nb.poet import build_poet, save_weights
from poet_nb.quadruped import QUADRUPED

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "data/runs/tiny"
KINDS = (AttentionExplorer, PredictionExplorer, MatchingExplorer)


@pytest.fixture(scope="module")
def lab() -> Lab:
    "The committed run and drawn scenes."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_lab(RUN, "no/such/folder")
    torch.set_num_threads(threads)


def file(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def uploaded(name: str, content: bytes) -> list:
    "What the upload button gives."
    return [dict(name=name, type="", size=len(content), content=memoryview(content), last_modified=datetime(2026, 1, 1))]


def moves(explorer) -> list[tuple[str, object, list]]:
    "Name, control and ten values of each control of an explorer."
    if isinstance(explorer, AttentionExplorer):
        return [("point", explorer.x, [*range(20, 120, 10)]), ("opacity", explorer.opacity, [i / 20 for i in range(10)]), ("person", explorer.person, [*range(2, 12)]),
                ("encoder layer", explorer.encoder[0], [1, 2, 3] * 3 + [1]), ("decoder head", explorer.decoder[1], [1, 2, 3, 4, 0] * 2), ("image", explorer.number, [*range(10, 20)])]
    if isinstance(explorer, PredictionExplorer):
        return [("threshold", explorer.threshold, [i / 20 for i in range(10)]), ("layer", explorer.layer, [1, 2, 3, 4, 5] * 2), ("query", explorer.query, [*range(10, 20)])]
    return [("drag", explorer.moves[0][0], [*range(3, 33, 3)]), ("loss", explorer.loss, ["official", "paper"] * 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_changes_the_page_within_300_ms(lab, kind):
    explorer = kind(lab)
    for name, control, values in moves(explorer):
        spent = []
        for value in values:
            before, start = explorer.picture.data, time.thread_time()             # what this thread computes: whoever else is busy does not count
            control.value = value
            spent.append(time.thread_time() - start)
            assert explorer.picture.data != before, (name, value, explorer.message.value)
        assert statistics.median(spent) < .3, (name, spent)


def test_a_new_epoch_is_shown_within_300_ms(lab):
    explorer = TrainingExplorer(lab, RUN)
    spent = []
    for epoch in range(5):
        explorer.watch.history, explorer.watch.stamp = {}, None
        start = time.thread_time()
        explorer.button.click()
        spent.append(time.thread_time() - start)
    assert list(explorer.watch.history) == [10] and statistics.median(spent) < .3, spent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"no image", file(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8))[:900]], ids=["empty", "text", "cut off"])
def test_a_file_that_is_no_image_is_said_in_words(lab, kind, content):
    explorer = kind(lab)
    page = explorer.picture.data
    explorer.upload.value = uploaded("holiday <1>.png", content)
    assert "holiday &lt;1&gt;.png: not a readable image" in explorer.message.value and "Traceback" not in explorer.message.value
    assert explorer.picture.data == page
    explorer.number.value = 1 if explorer.number.value == 0 else 0                # and it goes on
    assert explorer.picture.data != page and "readable" not in explorer.message.value


SHAPES = {"wide": (40, 400, 3), "tall": (400, 40, 3), "a pixel": (1, 1, 3), "gray": (50, 60), "transparent": (50, 60, 4), "large": (900, 1200, 3)}


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_any_shape(lab, shape):
    content = file(np.random.default_rng(0).integers(0, 256, SHAPES[shape], dtype=np.uint8))
    for kind in (AttentionExplorer, PredictionExplorer):
        explorer = kind(lab)
        explorer.upload.value = uploaded(f"{shape}.png", content)
        assert f"{shape}.png: " in explorer.message.value and "should not happen" not in explorer.message.value, explorer.message.value
        assert explorer.scene.seen.size == SHAPES[shape][:2] and explorer.board.pixels.shape[1] == WIDTH
    matching = MatchingExplorer(lab)
    matching.upload.value = uploaded(f"{shape}.png", content)
    assert "nobody is annotated" in matching.message.value


def test_every_press_anywhere_is_harmless(lab):
    for kind in KINDS:
        explorer, rng = kind(lab), np.random.default_rng(0)
        for i in range(25):
            x, y = rng.uniform(-50, [WIDTH + 50, len(explorer.board.pixels) + 50])
            explorer.picture.pointer = dict(kind=str(rng.choice(["down", "move", "up"])), x=float(x), y=float(y), count=i)
            assert "should not happen" not in explorer.message.value, explorer.message.value


def test_thumbnails_choose_layer_and_head(lab):
    explorer = AttentionExplorer(lab)
    for name in (("encoder", 0, None), ("encoder", 2, 3), ("decoder", 4, 0)):
        x, y, *_ = explorer.board.places[name]
        explorer.picture.pointer = dict(kind="down", x=x + 3, y=y + 3, count=id(name))
        layer, head = getattr(explorer, name[0])
        assert (layer.value - 1, None if head.value == 0 else head.value - 1) == name[1:]


def test_a_person_is_chosen_from_the_list(lab):
    explorer = AttentionExplorer(lab)
    people = [name for name in explorer.board.places if name[0] == "person"]
    x, y, *_ = explorer.board.places[people[-1]]
    explorer.picture.pointer = dict(kind="down", x=x + 3, y=y + 3, count=1)
    assert len(people) > 1 and explorer.scene.order[explorer.person.value - 1] == people[-1][1]


def test_a_dragged_pose_takes_its_person_along(lab):
    "Two poses that change places change their people under the official loss."
    explorer = MatchingExplorer(lab)
    explorer.loss.value = "official"
    explorer.reset.click()
    poses, pair = layer_people(explorer.scene)[1]["keypoints"], [c.value for c in explorer.pair]
    centers = layer_people(explorer.scene)[0]["pred_centers"][0, pair] * torch.tensor(explorer.scene.seen.size[::-1])
    for move, (dx, dy) in zip(explorer.moves, (centers[[1, 0]] - centers).round().int().tolist()):
        move[0].value, move[1].value = dx, dy
    changed = [text for _, _, text, *_ in explorer.board.words if "before: query" in text]
    assert len(changed) == 2 and all(str(q) in "".join(changed) for q in pair)


def test_image_without_anybody(lab):
    scene = lab.show("empty", np.full((64, 64, 3), 127, np.uint8), nobody(17))
    for board in (attention_board(scene, (3, 3), 0), prediction_board(scene, .5, 0)): assert board.pixels.shape[1] == WIDTH
    with pytest.raises(ValueError, match="nobody is annotated"): matching_board(scene, lab.model.config.loss, (0, 1), {})


def test_more_people_than_queries():
    config = override(preset("poet_tiny"), **{"model.num_queries": 3})
    lab = Lab(build_poet(config).eval(), made=1)
    rng = np.random.default_rng(0)
    points, flags = torch.from_numpy(rng.uniform(0, 60, (30, 17, 2))).float(), torch.full((30, 17), 2)
    people = people_with_joints(torch.zeros(30, dtype=torch.int64), points, flags, torch.full((30,), 100.), (64, 64))
    scene = lab.show("crowd", np.zeros((64, 64, 3), np.uint8), people)
    board = matching_board(scene, config.loss, (0, 1), {0: (.5, .5)})
    assert any("nobody" in text for _, _, text, *_ in board.words) and any("more people" in text for _, _, text, *_ in board.words)


@pytest.mark.parametrize("joints", [1, 4, 40])
def test_other_skeletons(joints, tmp_path):
    "Without COCO's joints nothing can be drawn by notebook 03, but images can be uploaded."
    config = override(preset("poet_tiny"), **{"model.num_keypoints": joints})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_weights(build_poet(config), tmp_path / "model.safetensors")
    lab = open_lab(tmp_path, tmp_path / "none")
    assert len(lab) == 0 and "Shown are images that you upload" in lab.message
    for kind in KINDS[:2]:
        explorer = kind(lab)
        assert "none: there is no such folder" in explorer.message.value
        explorer.upload.value = uploaded("a.png", file(np.zeros((60, 50, 3), np.uint8)))
        assert explorer.picture.data and "should not happen" not in explorer.message.value


def test_a_model_that_knows_its_skeleton_is_shown_with_it(tmp_path):
    config = override(preset("poet_tiny"), **{"model.num_keypoints": 20})
    model = build_poet(config)
    model.categories = [QUADRUPED.to_category()]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_weights(model, tmp_path / "model.safetensors")
    save_categories(model.categories, tmp_path / "skeleton.json")
    lab = open_lab(tmp_path, tmp_path / "none")
    assert lab.skeleton == QUADRUPED and lab.skeleton.limbs and lab.data is None
    assert Lab(None).skeleton == Lab(build_poet("poet_tiny")).skeleton == COCO_PERSON and Lab(None, joints=4).skeleton.num_keypoints == 4


def test_joints_of_model_and_data_differ(made, tmp_path):
    from conftest import person
    folder, annotations = made([person()])
    (folder / "annotations").mkdir(); (folder / "val2017").mkdir()
    shutil.copy(annotations, folder / "annotations/person_keypoints_val2017.json")
    for image in folder.glob("*.jpg"): shutil.copy(image, folder / "val2017")
    lab = open_lab(RUN, folder)
    assert "people have 3 joints" in lab.message and "predicts 17" in lab.message and lab.data is None


@pytest.mark.parametrize("fault", ["no folder", "no config", "no weights", "cut weights", "other weights"])
def test_faulty_runs_are_said_in_words(fault, tmp_path):
    run = tmp_path / "run"
    if fault != "no folder": run.mkdir()
    if fault not in ("no folder", "no config"): shutil.copy(RUN / "config.json", run)
    if fault == "cut weights": (run / "model.safetensors").write_bytes((RUN / "model.safetensors").read_bytes()[:5000])
    if fault == "other weights": save_weights(torch.nn.Linear(2, 2), run / "model.safetensors")
    lab = open_lab(run, "none")
    for kind in KINDS:
        text = kind(lab).message.value
        assert "run" in text and "POET_RUN" in text and "Traceback" not in text and "should not happen" not in text
    training = TrainingExplorer(lab, run)
    assert "no such file" in training.message.value and not training.picture.data


def test_baseline_has_no_queries_to_explore(tmp_path):
    config = override(preset("ae_r50"), **{"model.backbone": "resnet_tiny", "model.hidden_dim": 16})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_weights(build_poet(config), tmp_path / "model.safetensors")
    lab = open_lab(tmp_path, "none")
    assert "associative embedding" in lab.message
    shutil.copy(RUN / "metrics.jsonl", tmp_path)
    assert len(TrainingExplorer(lab, tmp_path).watch.history[10]) == 4            # a training is a training


def grow(run: Path, lines: list[str], number: int, weights) -> None:
    "A run folder after so many epochs."
    save_weights(weights, run / "model.safetensors")
    (run / "metrics.jsonl").write_text("\n".join(lines[:number]) + "\n")


def test_a_run_is_followed_epoch_by_epoch_and_anew(lab, tmp_path):
    lines = (RUN / "metrics.jsonl").read_text().splitlines()
    shutil.copy(RUN / "config.json", tmp_path)
    explorer = TrainingExplorer(lab, tmp_path)
    assert "no such file" in explorer.message.value
    seen = []
    for number in (1, 2, 4):
        torch.manual_seed(number)
        grow(tmp_path, lines, number, build_poet(lab.model.config) if number < 4 else lab.model)
        explorer.look()
        seen.append(explorer.picture.data)
    assert [v for _, v in explorer.epoch.options] == [1, 2, 4] and explorer.epoch.value == 4 and len({*seen}) == 3
    explorer.epoch.value = 1                                                      # whoever looks back is left there
    grow(tmp_path, lines, 5, lab.model); explorer.look()
    assert explorer.epoch.value == 1 and max(explorer.watch.history) == 5
    half = (tmp_path / "metrics.jsonl").read_text() + lines[5][:40]               # a line that is being written
    (tmp_path / "metrics.jsonl").write_text(half); explorer.look()
    assert max(explorer.watch.history) == 5 and "should not happen" not in explorer.message.value
    grow(tmp_path, lines, 1, lab.model); explorer.look()                          # the folder was begun anew
    assert [v for _, v in explorer.epoch.options] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "model.safetensors"] # nothing is written there


def test_a_run_is_followed_by_the_last_of_its_explorers(lab, tmp_path):
    shutil.copy(RUN / "config.json", tmp_path)
    async def twice():
        looks = []
        for i in range(2):
            explorer = TrainingExplorer(lab, tmp_path / "." if i else tmp_path, seconds=.01)
            explorer.look = lambda i=i: looks.append(i)
        TrainingExplorer(lab, tmp_path / "another", seconds=.01).look = lambda: looks.append("another")
        await asyncio.sleep(.3)
        return looks
    assert {*asyncio.run(twice())} == {1, "another"}


def test_a_run_without_weights_is_waited_for(lab, tmp_path):
    shutil.copy(RUN / "config.json", tmp_path)
    begun = open_lab(tmp_path, "none")
    assert begun.model is None and "wait for the first epoch" in AttentionExplorer(begun).message.value
    explorer = TrainingExplorer(begun, tmp_path)
    grow(tmp_path, (RUN / "metrics.jsonl").read_text().splitlines(), 1, lab.model)
    explorer.look()
    assert len(explorer.watch.history[1]) == 4 and len(explorer.watch.history[1][0]["scores"])


def test_epochs_without_evaluation_have_no_pictures(lab, tmp_path):
    shutil.copy(RUN / "config.json", tmp_path)
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()[:2]]
    for row in rows: row.pop("coco"); row.pop("val")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    explorer = TrainingExplorer(lab, tmp_path)
    assert explorer.watch.history == {} and explorer.picture.data and "should not happen" not in explorer.message.value


def test_curves_mark_the_epoch():
    metrics = read_metrics(RUN)
    assert (curves(metrics, 2) != curves(metrics, 9)).any() and curves(metrics).shape == (230, WIDTH, 3)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), max_size=8))
def test_labels_stay_apart_and_at_the_picture(points):
    board = Board(400)
    board.put(np.zeros((300, 400, 3), np.uint8), 0, 0, "all")
    board.label("all", [(x, y, "0.99", "#000000") for x, y in points])
    at = [(x, y) for x, y, *_ in board.words]
    assert all(0 < x < 400 and y > 0 for x, y in at)
    assert all(abs(a - c) > 30 or abs(b - d) >= 19 for i, (a, b) in enumerate(at) for c, d in at[:i])


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(2, 100), st.integers(0, 999))
def test_tables_have_the_moved_and_the_assigned(people, queries, seed):
    rng = np.random.default_rng(seed)
    cost, pair = torch.from_numpy(rng.random((people, queries))), tuple(rng.permutation(queries)[:2].tolist())
    chosen = rng.permutation(queries)[:people].tolist() + [-1] * max(0, people - queries)
    shown = pair_columns(cost, chosen, pair)
    assert {*pair} <= {*shown} and len(shown) == len({*shown}) == min(8, queries) and shown == sorted(shown)
    assert len({*shown} & {*chosen}) >= min(6, len({*chosen} - {-1} - {*pair}))


def test_text_is_readable_on_white():
    from poet_nb.plot import PALETTE
    light = lambda color: sum(w * v for w, v in zip((.299, .587, .114), bytes.fromhex(color[1:])))
    assert all(light(readable(color)) < 180 for color in PALETTE)
