"Centres, visibilities, layers: hand-made cases whose numbers are known."
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.stats import mannwhitneyu

from poet_nb.analysis import (QUADRANTS, ap_by_layer, auc, bootstrap_interval, calibration_error, calibration_table, match_people, people_of,
                              quadrant_shares, rank_images, run_layers, saturation_layer, visibility_quantiles)
from poet_nb.coco import open_coco
from poet_nb.coco_eval import load_ground_truth
from poet_nb.config import DataConfig, DataError, LossConfig, ModelConfig, NonFiniteError, PoetError, preset, replace
from poet_nb.plot_analysis import plot_centers, plot_decoder_layers, plot_stride, plot_visibility, symmetric_limit, violin_outline
from poet_nb.poet import build_poet

SIGMAS = (.1,) * 4
KITE = dict(id=1, name="kite", keypoints=["top", "left", "right", "tail"], skeleton=[[1, 2], [1, 3], [2, 4]])
TINY = preset("poet_tiny")


def kite(id, image_id, x, y, flags=(2, 2, 2, 2), **changes):
    "Four joints around (x, y) in a box of 30 x 40 pixels: a diagonal of 50."
    joints = [(x, y - 20), (x - 15, y), (x + 15, y), (x, y + 20)]
    return dict(id=id, image_id=image_id, category_id=1, bbox=[x - 15, y - 20, 30, 40], area=1200., iscrowd=0, num_keypoints=sum(v > 0 for v in flags),
                keypoints=[n for (px, py), v in zip(joints, flags) for n in ((px, py, v) if v else (0, 0, 0))]) | changes


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def kites(tmp_path):
    "kites(people, sizes): a data set with these annotations; image i (from 1) has sizes[i - 1] = (width, height)."
    def make(people, sizes=((80, 60),)):
        for folder in ("val2017", "annotations"): (tmp_path / folder).mkdir()
        images = [dict(id=i, width=w, height=h, file_name=f"{i}.png") for i, (w, h) in enumerate(sizes, 1)]
        for image in images: Image.new("RGB", (image["width"], image["height"]), (image["id"] * 10,) * 3).save(tmp_path / "val2017" / image["file_name"])
        (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(dict(images=images, annotations=people, categories=[KITE])))
        return open_coco(tmp_path, sigmas=SIGMAS)
    return make


class Fixed(torch.nn.Module):
    "Recognises an image by its gray value and gives what it was told: one list of (x, y, joints (K, 2), visibility, logit) in pixels a layer and image."
    def __init__(self, data, layers, queries=3, loss=LossConfig()):
        super().__init__()
        self.zero, self.data, self.layers, self.queries = torch.nn.Parameter(torch.zeros(1)), data, layers, queries
        self.config = replace(TINY, data=DataConfig(eval_scale=60, max_size=200), loss=loss, train=replace(TINY.train, amp="none", channels_last=False))

    def one(self, layer, image_id):
        width, height = (float(x) for x in self.data.index.images.sizes[self.data.image_ids.index(image_id)][::-1])
        K, scale = self.data.skeleton.num_keypoints, torch.tensor([width, height])
        out = dict(pred_logits=torch.tensor([[-3., 3.]]).repeat(self.queries, 1), pred_centers=torch.full((self.queries, 2), .99), pred_offsets=torch.zeros(self.queries, K, 2),
                   pred_visibility=torch.full((self.queries, K), .5))
        for q, (x, y, joints, visibility, logit) in enumerate(layer.get(image_id, [])):
            out["pred_logits"][q, 0], out["pred_centers"][q] = logit, torch.tensor([x, y]) / scale
            out["pred_offsets"][q], out["pred_visibility"][q] = (torch.tensor(joints) - torch.tensor([x, y])) / scale, torch.tensor(visibility)
        return out

    def forward(self, samples):
        gray = samples.tensors[:, 0, 5, 5] * .229 + .485
        ids = [min(self.data.image_ids, key=lambda i: abs(i * 10 / 255 - float(g))) for g in gray]
        *aux, last = [{k: torch.stack([self.one(layer, i)[k] for i in ids]) for k in self.one(layer, ids[0])} for layer in self.layers]
        return last | dict(aux_outputs=aux)


def seen(x, y, dx=0., dy=0., visibility=(.9, .9, .9, .9), logit=3., off=0.):
    "A prediction of the kite at (x, y) with its joints `off` pixels to the right and its centre (dx, dy) from the right one."
    return (x + dx, y + dy, [[x + off, y - 20.], [x - 15. + off, y], [x + 15. + off, y], [x + off, y + 20.]], visibility, logit)


# ---- pairs

def test_errors_in_pixels_and_diagonals_for_images_of_any_size(kites):
    data = kites([kite(1, 1, 30, 30), kite(2, 2, 40, 100), kite(3, 2, 70, 50)], [(80, 60), (90, 140)])
    model = Fixed(data, [{1: [seen(30., 30., -5., 10.)], 2: [seen(70., 50., 10., 0.), seen(40., 100., 0., -20.)]}])
    run = run_layers(model, data)
    assert run.image_ids == [1, 2] and run.pairs.annotation_ids.tolist() == [1, 2, 3] and run.pairs.queries.tolist() == [0, 1, 0]
    np.testing.assert_allclose(run.pairs.errors, [[-.1, .2], [0, -.4], [.2, 0]], atol=1e-5)
    np.testing.assert_allclose(run.pairs.true_centers, [[30, 30], [40, 100], [70, 50]], atol=1e-4)
    np.testing.assert_allclose(run.pairs.oks, 1, atol=1e-6)
    np.testing.assert_allclose(run.pairs.scores, .5, atol=1e-6)                                       # logits 3 and 3
    np.testing.assert_allclose(run.pairs.keypoints[1], [[40, 80], [25, 100], [55, 100], [40, 120]], atol=1e-4)


def test_hidden_joints_count_as_the_loss_says(kites):
    data = kites([kite(1, 1, 30, 30, (2, 1, 2, 0))])
    prediction = {1: [seen(30., 30.)]}
    labelled = run_layers(Fixed(data, [prediction]), data).pairs
    visible = run_layers(Fixed(data, [prediction], loss=LossConfig(visible="visible")), data).pairs
    assert labelled.labelled.tolist() == [[True, True, True, False]] and visible.labelled.tolist() == [[True, False, True, False]]
    np.testing.assert_allclose(labelled.true_centers, [[30, (10 + 30 + 30) / 3]], atol=1e-4)
    np.testing.assert_allclose(visible.true_centers, [[(30 + 45) / 2, 20]], atol=1e-4)


def test_oks_of_a_pair_is_that_of_the_formula(kites):
    data = kites([kite(1, 1, 30, 30)])
    pairs = run_layers(Fixed(data, [{1: [seen(30., 30., off=6.)]}]), data).pairs
    np.testing.assert_allclose(pairs.oks, np.exp(-36 / (2 * 1200 * .2**2)), rtol=1e-4)


def test_people_without_joints_take_a_query_but_give_no_row(kites):
    data = kites([kite(1, 1, 30, 30), kite(2, 1, 60, 30, (0, 0, 0, 0)), kite(3, 1, 60, 30, iscrowd=1)])
    run = run_layers(Fixed(data, [{1: [seen(30., 30.)]}]), data)
    assert run.pairs.annotation_ids.tolist() == [1] and run.people == 1


@pytest.mark.parametrize("people", [[], [kite(1, 1, 30, 30, (0, 0, 0, 0))]])
def test_nobody(kites, people):
    data = kites(people)
    run = run_layers(Fixed(data, [{}, {}]), data)
    assert len(run.pairs) == 0 and run.people == 0 and len(run.layers) == 2
    assert run.pairs.errors.shape == (0, 2) and run.pairs.visibility.shape == (0, 4) and np.isnan(list(quadrant_shares(run.pairs.errors).values())).all()
    with pytest.raises(PoetError): plot_centers(np.zeros((60, 80, 3), np.uint8), np.zeros((0, 2)), np.zeros((0, 4, 3)), run.pairs.errors)
    with pytest.raises(PoetError): plot_visibility(run.pairs.visibility, run.pairs.labelled)
    with pytest.raises(PoetError): bootstrap_interval(lambda rows: 0., run.pairs.image_ids)
    with pytest.warns(UserWarning): table = ap_by_layer(load_ground_truth(data, SIGMAS), run)
    with pytest.raises(PoetError): plot_decoder_layers(table)


def test_more_people_than_queries(kites):
    data = kites([kite(i, 1, 20 + 10 * i, 30) for i in (1, 2, 3)])
    run = run_layers(Fixed(data, [{1: [seen(40., 30.)]}], queries=1), data)
    assert run.people == 3 and run.pairs.annotation_ids.tolist() == [2]


def test_box_without_extent_gives_no_error_and_no_crash(kites):
    data = kites([kite(1, 1, 30, 30, bbox=[30, 30, 0, 0]), kite(2, 1, 60, 30)])
    pairs = run_layers(Fixed(data, [{1: [seen(30., 30., 5.), seen(60., 30., 5., -5.)]}]), data).pairs
    assert np.isnan(pairs.errors[0]).all() and np.allclose(pairs.errors[1], [.1, -.1])
    assert quadrant_shares(pairs.errors)["upper right"] == 1
    plot_centers(np.zeros((60, 80, 3), np.uint8), pairs.centers, np.concatenate([pairs.keypoints, pairs.visibility[..., None]], -1), pairs.errors)


def test_faulty_models_get_named_errors(kites):
    data = kites([kite(1, 1, 30, 30)])
    target, model = people_of(data, 0)[1], Fixed(data, [{1: [seen(30., 30.)]}])
    outputs = {k: v[None] for k, v in model.one(model.layers[0], 1).items()}
    with pytest.raises(NonFiniteError): match_people(outputs | dict(pred_centers=outputs["pred_centers"] * float("nan")), [target], LossConfig(), SIGMAS)
    with pytest.raises(DataError, match="keypoints"): match_people(outputs | dict(pred_offsets=torch.zeros(1, 3, 17, 2), pred_visibility=torch.zeros(1, 3, 17)), [target], LossConfig(), SIGMAS)
    with pytest.raises(PoetError, match="no image"): run_layers(model, data, limit=0)


def test_the_model_is_left_as_it_was_and_a_real_one_runs(kites):
    torch.manual_seed(0)
    config = replace(TINY, data=DataConfig(eval_scale=48, max_size=96), train=replace(TINY.train, amp="none"),
                     model=ModelConfig(backbone="resnet_tiny", stride=16, hidden_dim=32, nheads=2, enc_layers=1, dec_layers=3, dim_feedforward=32, num_queries=6, num_keypoints=4, frozen_stages=0))
    model, data = build_poet(config).train(), kites([kite(1, 1, 30, 30), kite(2, 2, 60, 30)], [(80, 60), (100, 70)])
    run = run_layers(model, data)
    assert model.training and len(run.layers) == 3 and len(run.pairs) == 2 and run.pairs.keypoints.shape == (2, 4, 2)
    table = ap_by_layer(load_ground_truth(data, SIGMAS), run)
    assert table.index.tolist() == [1, 2, 3] and table.shape[1] == 10
    plot_decoder_layers(table)


# ---- quadrants

@pytest.mark.parametrize("point, quadrant", [((-1, -1), "upper left"), ((1, -1), "upper right"), ((-1, 1), "lower left"), ((1, 1), "lower right")])
def test_up_is_negative_y(point, quadrant):
    assert quadrant_shares(np.array([point])) == {name: float(name == quadrant) for name in QUADRANTS}


@settings(max_examples=25)
@given(hnp.arrays(float, st.tuples(st.integers(1, 30), st.just(2)), elements=st.integers(-3, 3)))
def test_shares_add_up_and_follow_a_mirror(errors):
    shares, mirrored = quadrant_shares(errors), quadrant_shares(errors * [-1, 1])
    assert np.isclose(sum(shares.values()), 1)
    assert np.isclose(shares["upper left"], mirrored["upper right"]) and np.isclose(shares["lower left"], mirrored["lower right"])


# ---- visibility

@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40).filter(lambda pairs: len({t for _, t in pairs}) == 2))
def test_auc_is_that_of_the_rank_test(pairs):
    values, true = np.array([v for v, _ in pairs]) / 5, np.array([t for _, t in pairs])
    assert np.isclose(auc(values, true), mannwhitneyu(values[true], values[~true]).statistic / (true.sum() * (~true).sum()))


@pytest.mark.parametrize("values, true, expected", [([.1, .2, .8, .9], [0, 0, 1, 1], 1), ([.9, .8, .2, .1], [0, 0, 1, 1], 0), ([.5] * 4, [0, 0, 1, 1], .5), ([.1, .6, .5, .9], [0, 0, 1, 1], .75)])
def test_auc_of_known_cases(values, true, expected):
    assert auc(np.array(values), np.array(true)) == expected
    assert auc(np.array(values).reshape(2, 2), np.array(true).reshape(2, 2)) == expected


def test_quantiles_and_calibration_with_gaps():
    table = visibility_quantiles(np.array([[.2, .4], [.6, 1.]]), np.array([[0, 0], [0, 1]]))
    assert table["n"].tolist() == [3, 1] and table.loc[False, .5] == .4 and table.loc[True, .25] == 1
    bins = calibration_table(np.array([0., .1, 1., 1.]), np.array([0, 1, 1, 0]), bins=4)
    assert bins["n"].tolist() == [2, 0, 0, 2] and np.isnan(bins["observed"][1]) and bins["observed"].dropna().tolist() == [.5, .5]
    assert np.isclose(calibration_error(bins), (2 * .45 + 2 * .5) / 4) and np.isnan(calibration_error(calibration_table(np.zeros(0), np.zeros(0))))


# ---- layers

def test_ap_of_each_layer_of_known_poses(kites):
    data = kites([kite(1, 1, 30, 30), kite(2, 2, 40, 30, area=20000.)], [(80, 60), (80, 60)])
    layers = [{}, {1: [seen(30., 30., off=200.)], 2: [seen(40., 30.)]}, {1: [seen(30., 30.)], 2: [seen(40., 30.)]}]
    with pytest.warns(UserWarning, match="no results"): table = ap_by_layer(load_ground_truth(data, SIGMAS), run_layers(Fixed(data, layers), data))
    np.testing.assert_allclose(table[["AP", "APL", "APM"]].iloc[[0, 2]], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_allclose(table[["APL", "APM"]].iloc[1], [1, 0])
    assert 0 < table["AP"].iloc[1] < 1
    np.testing.assert_allclose([line.get_ydata() for line in plot_decoder_layers(table).axes[0].lines], table[["APL", "AP", "APM"]].T)


@pytest.mark.parametrize("values, layer", [([.1, .5, .5], 2), ([.5, .2, .5], 3), ([.6, .55, .5], 1), ([.2], 1), ([0., 0.], None), ([.4, -1.], None)])
def test_saturation(values, layer):
    assert saturation_layer(values) == layer
    plot_decoder_layers(pd.DataFrame(dict(AP=np.abs(values)), index=range(1, len(values) + 1)), mark=layer)


# ---- intervals

def test_bootstrap_draws_whole_images():
    groups, drawn = np.array([5, 7, 5, 9, 5]), []
    bootstrap_interval(lambda rows: drawn.append(np.bincount(rows, minlength=5)) or 0., groups, samples=50)
    assert all(n[0] == n[2] == n[4] and n[0] + n[1] + n[3] == 3 for n in drawn) and len({tuple(n) for n in drawn}) > 3


def test_interval_of_one_image_is_a_point():
    low, high = bootstrap_interval(lambda rows: rows.mean(), np.zeros(4), samples=20)
    assert low == high == 1.5


# ---- drawing

def test_a_direction_cannot_come_from_the_axes():
    errors = np.array([[.1, .02], [.3, -.01], [.2, .01]])
    ax = plot_centers(np.zeros((60, 80, 3), np.uint8), np.zeros((0, 2)), np.zeros((0, 4, 3)), errors).axes[1]
    assert ax.get_xlim() == ax.get_ylim()[::-1] and ax.get_xlim()[0] == -ax.get_xlim()[1]
    assert ax.get_xlim()[1] >= symmetric_limit(errors) and "beyond" not in ax.figure.axes[0].get_title(loc="left")


@settings(max_examples=25)
@given(hnp.arrays(float, st.integers(1, 50), elements=st.floats(0, 1)))
def test_violins_lose_nothing_at_the_ends(values):
    place, density = violin_outline(values)
    assert np.isclose(density.mean(), 1) and (density >= 0).all() and 0 < place[0] < place[-1] < 1


# ---- images by quality

def test_images_are_ranked_by_what_is_right_missed_and_false():
    images = [dict(id=i, width=200, height=60) for i in range(1, 6)]
    people = [kite(1, 1, 30, 30), kite(2, 1, 120, 30), kite(3, 2, 30, 30), kite(4, 3, 30, 30), kite(5, 4, 30, 30), kite(6, 4, 90, 30, iscrowd=1), kite(7, 5, 30, 30)]
    truth = load_ground_truth(dict(images=images, annotations=people, categories=[KITE]), SIGMAS)
    shown = lambda image, x, score: dict(image_id=image, category_id=1, keypoints=kite(0, image, x, 30)["keypoints"], score=score)
    results = [shown(1, 30, .9), shown(1, 120, .8), shown(2, 30, .9), shown(2, 150, .8), shown(3, 150, .95), shown(4, 30, .9)]
    table, rows = rank_images(truth, results, [1, 2, 3, 4, 5])
    assert table["quality"].to_dict() == {1: 1, 4: 1, 2: .5, 5: 0, 3: 0}                                # of those that score 0 the surest is the last
    assert list(table.index) == [4, 1, 2, 5, 3] or list(table.index) == [1, 4, 2, 5, 3]
    assert list(table.index[-2:]) == [5, 3]
    assert table.loc[2, ["people", "found", "shown", "false"]].tolist() == [1, 1, 2, 1] and table.loc[5, ["people", "found", "shown", "false"]].tolist() == [1, 0, 0, 0]
    assert table["clear"].to_dict() == {1: True, 2: True, 3: True, 4: False, 5: True}
    assert len(rows) == 6 and rows["matched"].sum() == 4
    assert list(rank_images(truth, results, [2, 3])[0].index) == [2, 3]


def test_images_are_ranked_beside_annotations_that_have_no_joints():
    ball = dict(id=2, image_id=1, category_id=2, bbox=[0, 0, 9, 9], area=81., iscrowd=0)
    truth = dict(images=[dict(id=1, width=200, height=60)], annotations=[kite(1, 1, 30, 30), ball], categories=[KITE | dict(sigmas=list(SIGMAS)), dict(id=2, name="ball")])
    table = rank_images(truth, [dict(image_id=1, category_id=1, keypoints=kite(0, 1, 30, 30)["keypoints"], score=.9)], [1])[0]
    assert table["quality"].to_dict() == {1: 1} and table["clear"].to_dict() == {1: True}


def test_each_panel_of_figure_1_has_its_own_scale():
    fig = plot_stride({"AE": {4: .5}}, {"POET": {16: [.1, .12]}}, {"64 px": {4: .9, 8: .1}, "128 px": {4: 1., 8: .8}})
    assert [round(ax.get_ylim()[1], 2) for ax in fig.axes] == [.56, .13, 1.45]
    assert [line.get_label() for line in fig.axes[2].lines] == ["64 px", "128 px"]
    assert len(plot_stride({"AE": {4: .5}}, {}).axes) == 2
