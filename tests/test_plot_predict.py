"Drawing and prediction: odd images, odd poses, odd logs, and bytes that do not change."
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from poet_nb import cli
from poet_nb.config import DataConfig, DataError, ModelConfig, NonFiniteError, PoetError, preset, replace
from poet_nb.keypoints import Skeleton
from poet_nb.plot import (FALSE_COLOR, contact_sheet, draw_poses, gallery, join_logs, joint_states, lr_drops, overlay_poses, person_color, plot_losses, plot_map,
                          plot_predictions, read_metrics, run_caption, to_image)
from poet_nb.poet import build_poet
from poet_nb.predict import draw_predictions, iter_images, iter_predictions, load_image, predict
from poet_nb.quadruped import make_quadrupeds
from poet_nb.transforms import eval_transforms

PAIR = Skeleton("pair", ("a", "b"), ((0, 1),), (), (.1, .1))
SMALL = replace(preset("poet_tiny"), model=ModelConfig(backbone="resnet_tiny", stride=16, hidden_dim=32, nheads=2, enc_layers=1, dec_layers=2, dim_feedforward=32,
                                                       num_queries=6, num_keypoints=5, frozen_stages=0))


pytestmark = pytest.mark.usefixtures("close_figures")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_poet(SMALL)


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[:60, :90]
    return np.stack([2 * x, 4 * y, (x * y) % 256], -1).astype(np.uint8)


# ---- drawing

@settings(max_examples=40, deadline=None)
@given(hnp.arrays(st.sampled_from([np.uint8, np.float32, np.float64]), hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6),
                  elements=dict(min_value=0, max_value=1)))
def test_any_image_becomes_rgb_or_a_named_error(array):
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        with pytest.raises(PoetError): to_image(array)
    else:
        image = to_image(array)
        assert image.dtype == np.uint8 and image.shape == array.shape[:2] + (3,)
        if array.ndim == 2: assert (image == image[..., :1]).all()


@pytest.mark.parametrize("bad", [np.zeros((0, 4, 3), np.uint8), np.zeros((2, 2, 3), np.int32), torch.zeros(4, 4, 3, 3), np.full((2, 2, 3), np.nan), "x"])
def test_an_image_of_no_kind_is_refused(bad):
    with pytest.raises(PoetError): to_image(bad)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(0, 3), st.just(2), st.just(3)), elements=st.floats(allow_nan=True, allow_infinity=True)))
def test_poses_with_any_numbers_are_drawn_or_left_out(poses):
    points, state = joint_states(poses)
    assert np.isin(state, (0, 1, 2)).all() and not state[~np.isfinite(points).all(-1)].any()
    assert overlay_poses(np.zeros((20, 30, 3), np.uint8), poses, PAIR, scores=np.ones(len(poses))).shape == (20, 30, 3)


def test_pictures_follow_the_joints(picture):
    ax = draw_poses(picture, [[[10, 5, 2], [80, 50, 2]], [[20, 20, 1], [30, 30, 0]]], PAIR, scores=[.9, .8])
    assert [t.get_text() for t in ax.texts] == ["0.90", "0.80"]
    filled = [c for c in ax.collections if len(c.get_facecolors()) and tuple(c.get_facecolors()[0][:3]) == matplotlib.colors.to_rgb(person_color(0))]
    assert filled[-1].get_offsets().tolist() == [[10, 5], [80, 50]]
    drawn = overlay_poses(picture, [[[10, 5, 2], [80, 50, 2]]], PAIR)
    changed = np.argwhere((drawn != picture).any(-1))
    line = np.abs((changed[:, 0] - 5) * 70 - (changed[:, 1] - 10) * 45) / np.hypot(70, 45)
    assert line.max() < 4 and len(changed) > 60                                   # all that changed is near the limb


def test_overlay_and_draw_refuse_nothing_and_change_nothing(picture):
    kept = picture.copy()
    for poses in ([], np.zeros((0, 2, 3)), torch.zeros(0, 2, 3), [[[5, 5, 0], [6, 6, 0]]]):
        assert (overlay_poses(picture, poses, PAIR) == picture).all()
        assert not draw_poses(picture, poses, PAIR).texts
    overlay_poses(picture, [[[5, 5, 2], [6, 6, 2]]], PAIR)
    assert (picture == kept).all()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.floats(.2, 5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_rows_fill_the_width_and_do_not_overlap(rows):
    fig, axes = gallery(rows, width=5, max_height=100)
    try:
        for row, line in zip(rows, axes):
            boxes = [ax.get_position() for ax in line]
            assert boxes[-1].x1 == pytest.approx(1) and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
            assert [b.width * 5 / (b.height * fig.get_figheight()) for b in boxes] == pytest.approx(row)
        assert all(above[0].get_position().y0 >= below[0].get_position().y1 for above, below in zip(axes, axes[1:]))
    finally: plt.close(fig)


def test_sheets_and_rows_take_any_shapes(picture):
    assert len(contact_sheet([picture, picture[:20], picture[:, :30]] * 3, columns=4).axes) == 9
    fig = plot_predictions({"good": [dict(image=picture, keypoints=[])], "errors": []}, PAIR)
    assert len(fig.axes) == 1


def test_false_predictions_look_false(picture):
    poses = [[[10, 5, 2], [80, 50, 2]], [[20, 20, 1], [30, 30, 2]], [[5, 5, .9], [9, 9, .1]]]
    for false in ((), (1,), (0, 1, 2)):
        ax = plot_predictions({"row": [dict(image=picture, keypoints=poses[:2], scores=[.9, .8], false=[i for i in false if i < 2])]}, PAIR).axes[0]
        limbs = [(c, segment.tolist()) for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection) for segment in c.get_segments()]
        look = {tuple(map(tuple, segment)): (c.get_linestyle()[0][1] is not None, matplotlib.colors.to_hex(c.get_colors()[0]).upper()) for c, segment in limbs}
        for i, pose in enumerate(poses[:2]):
            wanted = (True, FALSE_COLOR.upper()) if i in false else (False, person_color(i))
            assert look[tuple(tuple(joint[:2]) for joint in pose)] == wanted
        assert sorted(t.get_text() for t in ax.texts) == ["0.80", "0.90"]


SAVE = """
import sys, numpy as np, matplotlib; matplotlib.use("Agg")
from poet_nb.keypoints import Skeleton
from poet_nb.plot import contact_sheet, save_fig
image = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
fig = contact_sheet([image, image[:, :20]], [[[[5, 5, 2], [30, 25, 1]]], []], ["a", "b"], columns=2, skeleton=Skeleton("pair", ("a", "b"), ((0, 1),), (), (.1, .1)))
save_fig(fig, "sheet", sys.argv[1], ("png", "svg", "pdf"))
"""


def test_a_figure_has_the_same_bytes_in_another_process(tmp_path):
    subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / "there")], check=True, env=os.environ | {"PYTHONHASHSEED": "7"}, cwd=Path(__file__).parents[1])
    argv, sys.argv = sys.argv, ["", str(tmp_path / "here")]
    try: exec(SAVE, {})
    finally: sys.argv = argv
    for kind in ("png", "svg", "pdf"):
        first, second = ((tmp_path / name / f"sheet.{kind}").read_bytes() for name in ("here", "there"))
        assert first == second and len(first) > 500
        assert matplotlib.__version__.encode() not in first


FIGURES = {"50_fig1_stride": "fig1_stride", "51_fig2_overview": "fig2_overview", "52_fig3_predictions": "fig3_predictions", "53_fig4_losses": "fig4_losses", "54_fig5_attention": "fig5_attention", "55_fig6_map": "fig6_map", "56_fig7_centers": "fig7_centers",
           "57_fig8_visibility": "fig8_visibility", "58_fig9_decoder_layers": "fig9_decoder_layers"}
TABLES = ["60_table1", "61_table2", "62_claims"]


def draw_figures(there, more=(), **environment):
    "Run the figure notebooks, and more, in a folder of their own; hashes of the files they wrote, by name."
    root = Path(__file__).parents[1]
    (there / "nbs").mkdir(parents=True); (there / "data").symlink_to(root / "data")
    for part in ("settings.ini", "poet_nb"): (there / part).symlink_to(root / part)
    for notebook in [*FIGURES, *more]: shutil.copy(root / f"nbs/{notebook}.ipynb", there / "nbs")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("POET_")} | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, root / "tools/execute.py", "--root", there, "--no-write"], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((there / "figures").iterdir())}


@pytest.mark.slow
def test_a_figure_notebook_writes_the_same_bytes_whenever_it_runs(tmp_path):
    "Those that only read logs, and those that run the model."
    if not (Path(__file__).parents[1] / "data/synth/val2017").is_dir(): pytest.skip("needs `make data`")
    written = [draw_figures(tmp_path / seed, PYTHONHASHSEED=seed, POET_IMAGES="60") for seed in ("1", "2")]
    assert written[0] == written[1] and {f"{name}.{kind}" for name in FIGURES.values() for kind in ("png", "svg")} <= written[0].keys()
    assert len(set(written[0].values())) == len(written[0])


@pytest.mark.slow
def test_figure_notebooks_take_a_run_of_another_kind(tmp_path):
    "Animals of 20 joints, three decoder layers, images half as wide again as they are high: trained for a moment, drawn without a hitch."
    root, run = tmp_path / "data", tmp_path / "run"
    for split, seed in (("train2017", 0), ("val2017", 1)):
        file = make_quadrupeds(root, split, n=12, seed=seed)
        truth = json.loads(file.read_text())
        for image in truth["images"]:
            path = root / split / image["file_name"]
            wide = Image.new("RGB", (image["width"] * 3 // 2, image["height"]), "gray")
            wide.paste(Image.open(path)); wide.save(path); image["width"] = wide.width
        file.write_text(json.dumps(truth))
    words = ["train", "--preset", "poet_tiny", "--data", root, "--run", run, "--quiet", "--set", "model.dec_layers=3", "model.enc_layers=2", "model.num_queries=8", "data.scales=[64]",
             "data.max_size=96", "data.eval_scale=64", "data.pad_multiple=32", "data.crop_resize=[64,80]", "data.crop_size=[48,64]", "train.epochs=2", "train.pretrain_epochs=1", "train.batch_size=4"]
    assert cli.main([str(w) for w in words]) == 0
    assert {f"{name}.png" for name in FIGURES.values()} <= draw_figures(tmp_path / "there", TABLES, POET_RUN=str(run), POET_DATA=str(root), POET_IMAGES="12").keys()


# ---- logs

def log(folder, lines):
    (folder / "metrics.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


def test_a_resumed_run_counts_each_epoch_once(tmp_path):
    table = read_metrics(log(tmp_path, [dict(epoch=1, lr=1., train=dict(loss=5.)), dict(epoch=2, lr=1., train=dict(loss=4.)), "",
                                        dict(epoch=2, lr=1., train=dict(loss=3.), coco=dict(AP=.1))]))
    assert table.epoch.tolist() == [1, 2] and table["train/loss"].tolist() == [5, 3] and np.isnan(table["coco/AP"][0])


@pytest.mark.parametrize("lines, word", [([dict(epoch=1), '{"epoch": 2,', dict(epoch=3)], "line 2"), ([dict(epoch=1), "7"], "line 2"), (["[]"], "line 1"),
                                         ([dict(step=1)], "line 1"), ([dict(epoch="x")], "line 1"), (['{"epo'], "no finished epoch"), ([], "no finished epoch")])
def test_broken_logs_name_file_and_line(tmp_path, lines, word):
    with pytest.raises(DataError, match=word) as error: read_metrics(log(tmp_path, lines))
    assert "metrics.jsonl" in str(error.value)


def test_a_torn_last_line_is_left_out(tmp_path):
    assert len(read_metrics(log(tmp_path, [dict(epoch=1), '{"epoch": 2, "tr']))) == 1


def test_figures_show_the_log(tmp_path):
    rng = np.random.default_rng(0)
    lines = [dict(epoch=e, lr=1e-3 * (.1 if e > 6 else 1), train=dict(loss_ce=rng.random(), loss_centers=rng.random(), loss_absolute=1.)) for e in range(1, 11)]
    for line in lines[::2]: line |= dict(val=dict(loss_ce=rng.random(), loss_centers=rng.random()), coco=dict(AP=rng.random(), APL=-1.))
    table = read_metrics(log(tmp_path, lines))
    assert [(epoch, round(by)) for epoch, by in lr_drops(table)] == [(6, 10)]
    axes = plot_losses(table).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["a) class", "b) centre", "c) absolute"]
    assert axes[1].get_lines()[0].get_ydata().tolist() == [line["train"]["loss_centers"] for line in lines]
    assert axes[1].get_lines()[1].get_ydata().tolist() == [line["val"]["loss_centers"] for line in lines[::2]]
    curve = plot_map(table).axes[0].get_lines()[0]
    assert curve.get_xdata().tolist() == [1, 3, 5, 7, 9] and curve.get_ydata().tolist() == [line["coco"]["AP"] for line in lines[::2]]


def test_a_run_that_went_on_from_another(tmp_path):
    parts = {}
    for name, first, epochs in (("a", 1, 4), ("b", 1, 3), ("c", 3, 2)):              # the last one's own log begins at epoch 3
        (tmp_path / name).mkdir()
        parts[name] = read_metrics(log(tmp_path / name, [dict(epoch=e, lr=1e-3 / e, train=dict(loss_ce=1. / e), coco=dict(AP=e / 10)) for e in range(first, first + epochs)]))
    joined, starts = join_logs(parts)
    assert joined.epoch.tolist() == [*range(1, 8), 10, 11] and starts == {1: "a", 5: "b", 10: "c"}
    for ax in (plot_map(joined, starts=starts).axes[0], plot_losses(joined, starts=starts).axes[0]):
        assert [t.get_text() for t in ax.texts][-3:] == ["a", "b", "c"] and [float(line.get_xdata()[0]) for line in ax.lines[-2:]] == [4.5, 9.5]
    assert joined["coco/AP"].tolist() == [e / 10 for e in (1, 2, 3, 4, 1, 2, 3, 3, 4)]


def test_smooth_schedules_have_no_drops(tmp_path):
    for lr in (.5 * (1 + np.cos(np.pi * np.arange(40) / 40)), np.concatenate([np.linspace(.1, 1, 5), .5 * (1 + np.cos(np.pi * np.arange(35) / 35))]), np.ones(10)):
        assert lr_drops(read_metrics(log(tmp_path, [dict(epoch=i + 1, lr=v) for i, v in enumerate(lr)]))) == []


def test_captions_of_damaged_runs(tmp_path):
    assert "seed unknown" in run_caption(tmp_path)
    (tmp_path / "environment.json").write_text("{")
    for text in ("{", "[" * 100_000, "[1]"):
        (tmp_path / "environment.json").write_text(text)
        with pytest.raises(DataError, match="environment.json"): run_caption(tmp_path)
    (tmp_path / "environment.json").write_text('{"seed": 3}', encoding="utf-8-sig")         # with a byte-order mark
    assert "seed 3" in run_caption(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + '\n{"epoch": 2}\n')
    with pytest.raises(DataError, match="metrics.jsonl: line 1"): read_metrics(tmp_path)


# ---- images in

STORED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
          7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_is_turned_upright(picture, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](picture))).save(tmp_path / "x.png", exif=exif)
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.open(tmp_path / "x.png")):
        assert (load_image(source).permute(1, 2, 0).numpy() == picture).all()


def test_every_mode_is_rgb(picture, tmp_path):
    rgb = Image.fromarray(picture)
    wide = Image.fromarray(picture[..., 0].astype(np.uint16) * 256)
    for name, image in dict(gray=rgb.convert("L"), cmyk=rgb.convert("CMYK"), palette=rgb.convert("P"), alpha=rgb.convert("RGBA"), bits=wide).items():
        suffix = "jpg" if name == "cmyk" else "png"
        image.save(tmp_path / f"{name}.{suffix}")
        from_file, in_memory = load_image(tmp_path / f"{name}.{suffix}"), load_image(image)
        assert from_file.shape == in_memory.shape == (3, 60, 90) and from_file.dtype == torch.uint8
        assert (from_file.int() - in_memory.int()).abs().float().mean() < 12       # JPEG loses a little
    assert (load_image(wide)[0].numpy() == picture[..., 0]).all()


def test_what_a_server_has(picture, tmp_path):
    "The content of a file, and an open file."
    file = tmp_path / "x.png"
    Image.fromarray(picture).save(file)
    with open(file, "rb") as opened:
        sources = [file.read_bytes(), io.BytesIO(file.read_bytes()), opened]
        assert [name for name, _ in iter_images(sources)] == ["image 0", "image 1", "image 2"]
        for source in sources: assert (load_image(source).permute(1, 2, 0).numpy() == picture).all()
    with pytest.raises(DataError, match="image 0: not a readable image"): predict(build_poet("poet_tiny"), b"no picture")


def test_a_wrapped_model_predicts_as_itself(picture):
    model = build_poet("poet_tiny")
    found, whole = predict(torch.nn.DataParallel(model), picture, threshold=0.), predict(model, picture, threshold=0.)
    assert found[0]["scores"].equal(whole[0]["scores"]) and found[0]["keypoints"].equal(whole[0]["keypoints"]) and found.categories == whole.categories


def test_threads_that_predict_with_one_model_leave_it_in_its_mode(picture):
    model = build_poet("poet_tiny").train()
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: predict(model, picture, threshold=0.)[0]["scores"], range(8)))
    assert model.training and all(scores.equal(found[0]) for scores in found), "no dropout, and in training again"


def test_a_stream_that_is_left_in_the_middle_holds_nothing(picture):
    model = build_poet("poet_tiny").train()
    stream = iter_predictions(model, [picture] * 9, batch_size=1)
    next(stream)
    assert model.training
    predict(model, picture)
    assert model.training


def test_half_precision_and_read_only_arrays(picture):
    locked = picture.copy()
    locked.flags.writeable = False
    assert load_image(torch.tensor(picture).permute(2, 0, 1).half() / 255).sub(load_image(locked).int()).abs().max() <= 1
    load_image(locked)[0, 0, 0] = 7                                                 # a copy: the caller's array stays
    assert (locked == picture).all()


def test_streams_of_mixed_images(picture, tmp_path):
    for name in ("b.png", "a.JPG", "c.txt"): Image.fromarray(picture).save(tmp_path / name, format="png")
    names = [name for name, _ in iter_images([picture, tmp_path, [torch.zeros(2, 3, 4, 4), picture]])]
    assert [Path(name).name for name in names] == ["image 0", "a.JPG", "b.png", "image 2 0 0", "image 2 0 1", "image 2 1"]
    for bad in (7, None, {"a": picture}, torch.zeros(3), torch.zeros(1, 1, 1, 1, 1)):
        with pytest.raises(PoetError): list(iter_images(bad))


# ---- poses out

def test_company_and_order_change_nothing(model, picture):
    images = [picture, picture[:40], picture[:, :50], picture[::-1].copy(), picture[:40, ::-1].copy()]
    alone = [predict(model, image, threshold=0.)[0] for image in images]
    for batch_size in (1, 2, 8):
        for order in (range(5), (4, 2, 0, 3, 1)):
            for i, found in zip(order, predict(model, [images[i] for i in order], threshold=0., batch_size=batch_size)):
                for key in found: torch.testing.assert_close(found[key], alone[i][key], rtol=0, atol=2e-3)


def test_prediction_equals_the_road_of_evaluation(model, picture):
    from poet_nb.poet import PostProcess
    from poet_nb.transforms import collate, normalize
    image = torch.tensor(picture).permute(2, 0, 1)
    target = dict(keypoints=torch.zeros(0, 5, 2), visibility=torch.zeros(0, 5, dtype=torch.int64), area=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    samples, _ = collate([eval_transforms(SMALL.data)(image, target)], SMALL.data.pad_multiple)
    with torch.no_grad(): expected = PostProcess()(model(normalize(samples)), torch.tensor([picture.shape[:2]]))[0]
    found = predict(model, image, threshold=0.)[0]
    order = expected["scores"].argsort(descending=True)
    for key in found: torch.testing.assert_close(found[key], expected[key][order], rtol=0, atol=1e-4)


def test_thresholds_cut_the_same_list(model, picture):
    everything = model.predict(picture, threshold=0.)[0]
    assert everything["keypoints"].shape == (6, 5, 3) and (everything["scores"].diff() <= 0).all()
    cut = everything["scores"].median().item()
    some = model.predict(picture, threshold=cut)[0]
    assert len(some["scores"]) == int((everything["scores"] >= cut).sum())
    assert model.predict(picture, threshold=1.1)[0]["keypoints"].shape == (0, 5, 3)
    assert predict(model, []) == [] and predict(model, iter([picture]))[0].keys() == {"scores", "labels", "keypoints"}


def test_bfloat16_is_close(model, picture):
    exact, rough = predict(model, picture, threshold=0.)[0], predict(model, picture, threshold=0., dtype=torch.bfloat16)[0]
    assert rough["keypoints"].dtype == torch.float32
    torch.testing.assert_close(rough["scores"], exact["scores"], rtol=0, atol=.05)


def test_weights_of_half_precision(model, picture):
    torch.manual_seed(0)
    half = build_poet(SMALL).to(torch.bfloat16)
    found = predict(half, picture, threshold=0.)[0]
    assert found["keypoints"].dtype == torch.float32 and found["keypoints"].isfinite().all()


def test_folders_stream_and_errors_name_the_file(model, picture, tmp_path):
    for i in range(6): Image.fromarray(picture).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"nothing")
    stream = iter_predictions(model, tmp_path, batch_size=1)                        # a window of four
    assert [Path(next(stream)[0]).name for _ in range(4)] == ["0.png", "1.png", "2.png", "3.png"]
    with pytest.raises(PoetError, match="5.png"): next(stream)
    with pytest.raises(PoetError, match="absent"): predict(model, tmp_path / "absent.jpg")
    with pytest.raises(PoetError, match="batch_size"): predict(model, picture, batch_size=0)


def test_modes_are_given_back(model, picture, tmp_path):
    for training in (True, False):
        model.train(training)
        predict(model, picture)
        assert model.training is training
        with pytest.raises(PoetError): predict(model, [picture, tmp_path / "absent.jpg"])
        assert model.training is training
        stream = iter_predictions(model, [picture] * 9, batch_size=1)
        next(stream)
        stream.close()
        assert model.training is training
    model.eval()


def test_nan_is_an_error_that_names_the_image(picture):
    torch.manual_seed(0)
    damaged = build_poet(SMALL)
    with torch.no_grad(): damaged.class_embed.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="image 0"): predict(damaged, [picture])


def test_predictions_are_drawn(model, picture):
    found = predict(model, picture, threshold=0.)[0]
    found["keypoints"][..., 2] = .9
    ax = draw_predictions(picture, found, threshold=found["scores"][2].item(), skeleton=Skeleton("five", tuple("abcde"), ((0, 1),), (), (.1,) * 5))
    assert len(ax.texts) == int((found["scores"] >= found["scores"][2]).sum())


@pytest.mark.skipif(not Path(os.environ.get("POET_COCO", "/nowhere")).is_dir(), reason="POET_COCO is not set")
def test_real_photographs(model):
    folder = Path(os.environ["POET_COCO"]) / "val2017"
    files = sorted(folder.glob("*.jpg"))[:4]
    for (name, found), file in zip(iter_predictions(model, files, threshold=0., data=DataConfig(eval_scale=64, max_size=128)), files):
        width, height = Image.open(file).size
        assert name == str(file) and found["keypoints"].shape == (6, 5, 3)
        assert (found["keypoints"][..., 0].abs() < 2 * width).all() and (found["keypoints"][..., 1].abs() < 2 * height).all()


def test_a_model_predicts_without_importing_anything_else():
    code = ("import torch, sys; from poet_nb.poet import build_poet; assert 'poet_nb.predict' not in sys.modules; "
            "print(len(build_poet('poet_tiny').predict(torch.rand(3, 64, 64), threshold=0.)[0]['scores']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["25"], done.stderr
