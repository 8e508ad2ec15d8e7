"Attention as numbers and as drawings: hand-made cases in which the right answer is known without a model, and small models of odd shapes."
import dataclasses

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from poet_nb.attention import (Observation, attention_share, box_coverage, cells_at, cells_near_joints, decoder_maps, encoder_locality,
                               encoder_maps, joint_groups, joint_indices, likely_people, matching_costs, observe, people_attention, trim_maps, upsample_maps)
from poet_nb.config import DataConfig, LossConfig, ModelConfig, PoetError, preset, replace
from poet_nb.keypoints import COCO_PERSON, Skeleton
from poet_nb.matcher import HungarianMatcher
from poet_nb.plot_attention import _boxes, arrange_points, columns_to_show, draw_map, plot_attention, plot_overview, pose_vector, vector_cells, window_around
from poet_nb.poet import build_poet

FISH = Skeleton("fish", ("snout", "left_eye", "fin", "tail"), ((0, 2), (2, 3)), (), (.1,) * 4)
SMALL = replace(preset("poet_tiny"), data=DataConfig(eval_scale=64, max_size=128, pad_multiple=16),
                model=ModelConfig(backbone="resnet_tiny", stride=16, hidden_dim=32, nheads=2, enc_layers=2, dec_layers=3, dim_feedforward=32,
                                  num_queries=6, num_keypoints=4, frozen_stages=0))


pytestmark = pytest.mark.usefixtures("close_figures")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_poet(SMALL)


@pytest.fixture(scope="module")
def picture():
    "Wide: 60 x 110 pixels, so that rows are not columns."
    return np.random.default_rng(0).integers(0, 256, (60, 110, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def seen(model, picture): return observe(model, picture)


def handmade(grid=(3, 5), cell=(10., 20.), queries=2, layers=2, heads=2, size=None):
    "An observation of uniform attention."
    rows, columns = grid
    size = size or (round(rows * cell[0]), round(columns * cell[1]))
    people = dict(scores=torch.linspace(.2, .9, queries), labels=torch.zeros(queries, dtype=torch.int64), keypoints=torch.zeros(queries, 4, 3))
    return Observation({}, people, torch.full((layers, heads, *grid, *grid), 1 / (rows * columns)), torch.full((layers, heads, queries, *grid), 1 / (rows * columns)),
                       size, cell, 10, {})


# ---- shares, with answers known beforehand

def test_uniform_attention_gives_the_share_of_the_box():
    boxes = torch.tensor([[20., 10, 60, 30], [0, 0, 100, 30], [5, 5, 15, 10], [33, 7, 71, 29]])
    inside, share = encoder_locality(handmade(), boxes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (30 * 100)
    assert torch.allclose(share, area) and torch.allclose(inside, area.expand(2, -1), atol=1e-6)


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), st.integers(1, 5), st.integers(1, 7))
def test_coverage_is_the_area_of_any_box(corners, rows, columns):
    x0, x1, y0, y1 = *sorted(corners[:2]), *sorted(corners[2:])
    one = handmade((rows, columns), (7., 13.))
    height, width = one.size
    cover = box_coverage([[x0 * width, y0 * height, x1 * width, y1 * height]], one)
    assert cover.shape == (1, rows, columns) and 0 <= cover.min() and cover.max() <= 1 + 1e-6
    assert cover.mean().item() == pytest.approx((x1 - x0) * (y1 - y0), abs=1e-5)


def test_attention_that_stays_in_its_cell_is_wholly_local_and_one_that_leaves_is_not():
    one = handmade(grid=(2, 3), cell=(10., 10.))
    stay = torch.eye(6).view(2, 3, 2, 3).expand(2, 2, -1, -1, -1, -1)
    leave = torch.zeros(6, 6); leave[:, 5] = 1
    leave = leave.view(2, 3, 2, 3).expand_as(stay)
    boxes = torch.tensor([[0., 0, 20, 10], [20, 10, 30, 20]])                    # two cells above; the cell in the corner, number 5
    assert torch.allclose(encoder_locality(dataclasses.replace(one, encoder=stay), boxes)[0], torch.ones(2, 2))
    assert torch.allclose(encoder_locality(dataclasses.replace(one, encoder=leave), boxes)[0], torch.tensor([[0., 1], [0, 1]]))


def test_a_cell_that_reaches_over_the_edge_counts_with_its_part_of_the_image():
    one = handmade(grid=(1, 2), cell=(10., 10.), size=(10, 12))                   # the second cell has 2 pixels of the image
    assert torch.allclose(box_coverage([[10., 0, 12, 10]], one), torch.tensor([[[0., 1]]]))
    assert torch.allclose(box_coverage([[10., 0, 11, 10]], one), torch.tensor([[[0., .5]]]))


def test_a_box_without_area_is_not_a_number_and_nobody_is_nothing():
    assert encoder_locality(handmade(), [[5., 5, 5, 9]])[0].isnan().all()
    inside, share = encoder_locality(handmade(), torch.zeros(0, 4))
    assert inside.shape == (2, 0) and share.shape == (0,)


def test_attention_at_the_head():
    one = handmade(grid=(3, 5), cell=(10., 20.))
    fish = torch.tensor([[[45., 15, 2], [50, 15, 1], [70, 15, 2], [90, 25, 2]]])   # snout and eye in row 1, column 2
    head = cells_near_joints(fish, joint_indices(FISH), one)
    assert head[0].nonzero().tolist() == [[1, 2]]
    there, elsewhere = torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)
    there[0, 1, 2], elsewhere[0, 2, 1] = 1, 1                                     # (2, 1): what swapped axes would hit
    assert attention_share(there, head)[0] == 1 and attention_share(elsewhere, head)[0] == 0
    assert torch.allclose(attention_share(decoder_maps(one, [0]), head)[0], torch.tensor(1 / 15))
    assert attention_share(there, head)[1].item() == pytest.approx(1 / 15)


def test_reach_counts_pixels_to_the_nearest_point_of_a_cell():
    one, dot = handmade(grid=(1, 4), cell=(10., 10.)), torch.tensor([[[15., 5, .9]]])
    cells = lambda reach: cells_near_joints(dot, [0], one, reach)[0, 0].tolist()
    assert cells(0) == cells(4.9) == [0, 1, 0, 0] and cells(5) == [1, 1, 1, 0] and cells(15) == [1, 1, 1, 1]
    assert cells_near_joints(torch.tensor([[[15., 5, .4]]]), [0], one, 99.).sum() == 0
    assert cells_near_joints(dot, [], one, 99.).sum() == 0


def test_joints_by_name_by_index_and_by_what_they_are_called():
    assert joint_indices(FISH) == [0, 1] and joint_indices(FISH, ["tail", 0]) == [3, 0]
    assert joint_indices(COCO_PERSON) == [0, 1, 2, 3, 4]
    assert joint_indices(Skeleton("rod", ("heart", "near", "forearm"), (), (), (.1,) * 3)) == []   # "ear" in it, and no ear
    assert joint_indices(Skeleton("hare", ("leftEar", "LEye", "nose.tip", "tail"), (), (), (.1,) * 4)) == [0, 1, 2]
    for bad in (["beard"], [4], [-1]):
        with pytest.raises(PoetError, match="no joint"): joint_indices(FISH, bad)


# ---- maps: axes, padding, layers, heads

def test_x_is_the_column_and_y_the_row():
    one = handmade(grid=(3, 5), cell=(10., 20.))
    assert cells_at([[25, 5], [5, 25], [100, 30]], one).tolist() == [[0, 1], [2, 0], [2, 4]]
    for bad in ([101, 5], [5, 31], [-1, 5], [float("nan"), 0]):
        with pytest.raises(PoetError, match="outside the image of 100 x 30"): cells_at([bad], one)
    marked = torch.zeros(1, 1, 3, 5, 3, 5); marked[0, 0, 0, 1, 2, 4] = 1            # cell (0, 1) looks at cell (2, 4)
    assert encoder_maps(dataclasses.replace(one, encoder=marked), [[25, 5]])[0].nonzero().tolist() == [[2, 4]]
    assert encoder_maps(dataclasses.replace(one, encoder=marked), [[5, 25]]).sum() == 0


def test_a_large_map_has_its_peak_where_the_small_one_has_it():
    spot = torch.zeros(1, 3, 5); spot[0, 2, 1] = 1
    large = upsample_maps(spot, (30, 100), (10., 20.))[0]
    row, column = divmod(int(large.argmax()), 100)
    assert large.shape == (30, 100) and 20 <= row < 30 and 20 <= column < 40
    ramp = torch.arange(5.).expand(1, 3, 5)                                       # linear stays linear, edges stay constant
    expected = ((torch.arange(100) + .5) / 20 - .5).clamp(0, 4)
    assert torch.allclose(upsample_maps(ramp, (30, 100), (10., 20.))[0, 7], expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 110), (110, 60), (64, 64), (47, 50)])
@pytest.mark.parametrize("multiple", [1, 16, 128])
def test_padding_has_no_mass(model, shape, multiple):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    one = observe(model, image, data=replace(SMALL.data, pad_multiple=multiple))
    assert all(side * (n - 1) < pixels <= side * n + 1e-3 for pixels, side, n in zip(shape, one.cell, one.grid))
    for weights in (one.encoder, one.decoder): assert torch.allclose(weights.sum((-2, -1)), torch.ones(()), atol=1e-5)
    assert one.encoder.shape == (2, 2, *one.grid, *one.grid) and one.decoder.shape == (3, 2, 6, *one.grid)


def test_trimmed_maps_are_rows_of_the_models_own_matrix(model, picture):
    from poet_nb.predict import load_image, resize_for_model
    from poet_nb.transforms import normalize, pad_images
    data = replace(SMALL.data, pad_multiple=160)
    one = observe(model, picture, data=data)
    with torch.no_grad(): raw = model(normalize(pad_images([resize_for_model(load_image(picture), data)], 160)), need_weights=True)
    wide = one.shapes["features"][3]
    assert wide > one.grid[1], "this image is padded"
    for row, column in ((0, 0), (1, 3), (one.grid[0] - 1, one.grid[1] - 1)):
        whole = raw["encoder_attention"][1, 0, :, row * wide + column].unflatten(-1, (-1, wide))
        assert torch.allclose(whole[:, :one.grid[0], :one.grid[1]], one.encoder[1, :, row, column], atol=1e-5)
        assert whole[:, one.grid[0]:].sum() == 0 and whole[:, :, one.grid[1]:].sum() == 0


def test_trimming_takes_the_upper_left_block():
    padding = torch.ones(2, 4, dtype=torch.bool); padding[:1, :3] = False
    assert trim_maps(torch.arange(8.)[None], padding).tolist() == [[[0, 1, 2]]]


def test_layers_and_heads(seen):
    point, grid = [[100, 10]], seen.grid
    (row, column), = cells_at(point, seen).tolist()
    assert torch.equal(encoder_maps(seen, point, 0, 1)[0], seen.encoder[0, 1, row, column])
    assert torch.allclose(encoder_maps(seen, point, 0)[0], (seen.encoder[0, 0, row, column] + seen.encoder[0, 1, row, column]) / 2)
    assert torch.equal(decoder_maps(seen, [3, 1], -3), decoder_maps(seen, torch.tensor([3, 1]), 0)) and decoder_maps(seen, [], 0).shape == (0, *grid)
    for bad in (dict(layer=2), dict(layer=-3), dict(head=2), dict(head=-3)):
        with pytest.raises(PoetError, match="there is no"): encoder_maps(seen, point, **bad)


def test_observing_leaves_the_model_as_it_was_even_after_an_error(model, picture):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    try:
        mean = observe(model, picture, heads="mean")
        assert model.training
        forward = model.transformer.encode
        model.transformer.encode = lambda *a: 1 / 0
        with pytest.raises(ZeroDivisionError): observe(model, picture)
        model.transformer.encode = forward
    finally: model.eval(); vars(model.transformer).pop("encode", None)
    assert mean.encoder.shape[1] == mean.decoder.shape[1] == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.allclose(mean.encoder[:, 0], observe(model, picture).encoder.mean(1), atol=1e-6)
    with pytest.raises(PoetError, match="'each' or 'mean'"): observe(model, picture, heads="all")


def test_likely_people_come_best_first():
    one = handmade(queries=4)
    assert likely_people(one, .6).tolist() == [3, 2] and likely_people(one, 2.).tolist() == []
    assert likely_people(one, 2., least=1).tolist() == [3] and likely_people(one, .6, least=9).tolist() == [3, 2, 1, 0]


def test_costs_are_those_of_the_matcher(seen):
    generator = torch.Generator().manual_seed(0)
    target = dict(image_id=torch.tensor(5), labels=torch.zeros(3, dtype=torch.int64), keypoints=torch.rand(3, 4, 2, generator=generator), visibility=torch.tensor([[2, 2, 1, 0]] * 3))
    for loss in (LossConfig.paper(), LossConfig.official()):
        cost, chosen = matching_costs(seen.outputs, target, loss)
        pairs = HungarianMatcher(loss)({k: v for k, v in seen.outputs.items() if k != "aux_outputs"}, [target])
        assert cost.shape == (3, 6) and chosen.tolist() == pairs.query.tolist() and len(set(chosen.tolist())) == 3
    crowd = {k: torch.cat([v] * 3) if v.dim() else v for k, v in target.items()}
    assert (matching_costs(seen.outputs, crowd, loss)[1] == -1).sum() == 3            # nine people, six queries


# ---- drawings

@settings(max_examples=60)
@given(st.floats(.3, 4), st.integers(1, 6), st.integers(1, 6))
def test_no_panel_lies_on_another_or_leaves_the_page(aspect, points, people):
    sides = [len(side) for side in arrange_points(np.random.default_rng(0).random((points, 2)))]
    boxes, height = _boxes(aspect, *sides, people, 7.)
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes.values()]
    assert len(boxes) == 1 + points + people and all(w > 0 and h > 0 and abs(w / h - aspect) < 1e-6 * aspect for _, _, w, h in boxes.values())
    assert all(c[0] >= 0 and c[2] <= 7 + 1e-9 and c[3] <= height + 1e-9 for c in corners)
    for i, a in enumerate(corners):
        for b in corners[:i]: assert a[2] <= b[0] + 1e-9 or b[2] <= a[0] + 1e-9 or a[3] <= b[1] + 1e-9 or b[3] <= a[1] + 1e-9


def test_a_map_is_drawn_where_it_belongs():
    one = handmade(grid=(3, 5), cell=(10., 20.), size=(28, 95))
    spot = torch.zeros(3, 5); spot[2, 1] = .4
    fig, (cells, large) = plt.subplots(1, 2)
    draw_map(cells, np.zeros((28, 95, 3), np.uint8), spot, one); draw_map(large, np.zeros((28, 95, 3), np.uint8), spot, one, smooth=True)
    assert tuple(cells.get_images()[1].get_extent()) == (0, 100, 30, 0) and cells.get_images()[1].get_array()[2, 1] == 1
    assert cells.get_xlim() == (0, 95) and cells.get_ylim() == (28, 0) and large.get_images()[1].get_array().shape == (28, 95)


def test_figures_of_a_fish_in_a_wide_image(seen, picture):
    queries = likely_people(seen, 2., least=2)
    fig = plot_attention(picture, seen, [[10, 10], [100, 50], [50, 30]], queries, FISH, layers=(0, 1))
    labels = [ax.get_label() for ax in fig.axes]
    assert labels.count("image") == 1 and {"encoder 0", "encoder 1", "encoder 2", "decoder 0", "decoder 1"} <= set(labels)
    first = next(ax for ax in fig.axes if ax.get_label() == "encoder 1").get_images()[1].get_array()
    wanted = encoder_maps(seen, [[100, 50]], 0)[0]
    assert np.allclose(first, wanted / wanted.max())
    assert any("layer 1 of 2" in t.get_text() for t in fig.texts) and any("layer 2 of 3" in t.get_text() for t in fig.texts)
    poses = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([110., 60, 0]) + torch.tensor([0., 0, 2])
    target = dict(labels=torch.zeros(2, dtype=torch.int64), keypoints=poses[..., :2] / torch.tensor([110., 60]), visibility=poses[..., 2].long())
    fig = plot_overview(picture, seen, queries, poses, *matching_costs(seen.outputs, target, SMALL.loss), FISH)
    assert {"image", "poses", "offsets", "vector", "pairs", "cost"} <= {ax.get_label() for ax in fig.axes}
    for call in (lambda: plot_attention(picture, seen, [], queries, FISH), lambda: plot_attention(picture, seen, [[1, 1]], [], FISH),
                 lambda: plot_overview(picture, seen, queries, poses[:0], torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), FISH)):
        with pytest.raises(PoetError, match="at least"): call()


def test_the_vector_has_the_papers_layout(seen):
    vector = pose_vector(seen, 2)
    assert len(vector) == 2 + 3 * 4
    dx, dy, v = (float(x) for x in (*seen.outputs["pred_offsets"][0, 2, 3], seen.outputs["pred_visibility"][0, 2, 3]))
    assert np.allclose(vector[-3:], (dx, dy, v)) and np.allclose(vector[:2], seen.outputs["pred_centers"][0, 2])
    cells = vector_cells(np.arange(2 + 3 * 7.), list("abcdefg"))
    assert [heading for heading, _ in cells] == ["centre", "a", "b", "c", "", "g"] and [value for *_, value in cells[-1][1]] == [20, 21, 22]


def test_chosen_queries_are_always_shown():
    cost = torch.arange(40.).view(2, 20)
    assert columns_to_show(cost, torch.tensor([19, -1]), 3) == [0, 1, 19]
    assert columns_to_show(cost, torch.tensor([19, 18]), 1) == [18, 19]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 90)), min_size=1, max_size=5), st.floats(.3, 3))
def test_the_window_has_the_points_in_it_and_the_shape_asked_for(points, aspect):
    points = np.array(points)
    x0, y0, x1, y1 = window_around(points, aspect, size=(90, 50))
    assert (x1 - x0) / (y1 - y0) == pytest.approx(aspect)
    assert ((points >= [x0 - 1e-6, y0 - 1e-6]) & (points <= [x1 + 1e-6, y1 + 1e-6])).all()


# ---- many people

PAIRED = Skeleton("paired", ("snout", "left_fin", "right_fin", "tail"), ((0, 3),), ((1, 2),), (.1,) * 4)


def scene(size, boxes, image_id, seed=0, flags=2):
    "An image and its people, with joints spread over their boxes."
    height, width = size
    boxes = torch.tensor(boxes).float().reshape(-1, 4)
    at = torch.tensor([[.5, .1], [.1, .5], [.9, .5], [.5, .9]])
    keypoints = boxes[:, None, :2] + at * (boxes[:, None, 2:] - boxes[:, None, :2])
    image = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))
    return image, dict(boxes=boxes, keypoints=keypoints, visibility=torch.full((len(boxes), 4), flags), labels=torch.zeros(len(boxes), dtype=torch.int64), image_id=torch.tensor(image_id))


def test_groups_of_joints():
    assert joint_groups(PAIRED) == {"head": [0], "fin": [1, 2], "tail": [3]}
    assert list(joint_groups(COCO_PERSON)) == ["head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"]
    names = ("front_left_paw", "front_right_paw", "back_left_paw", "back_right_paw")
    groups = joint_groups(Skeleton("paws", names, (), ((0, 1), (2, 3)), (.1,) * 4))
    assert groups == {"front_paw": [0, 1], "back_paw": [2, 3]}


def test_attention_of_people_is_that_of_each_image(model):
    "Boxes lie over the next image, the last image's over the first; an image without people holds boxes and has no row."
    scenes = [scene((60, 110), [[5, 5, 50, 50], [60, 20, 100, 58]], 7), scene((80, 64), [], 8, 1), scene((64, 64), [[0, 0, 64, 64]], 9, 2)]
    found = people_attention(model, iter(scenes), joint_groups(PAIRED))
    assert found.image_ids.tolist() == [7, 7, 9] and found.groups == ("head", "fin", "tail") and found.at.shape == (3, 3) and found.inside.shape == (3, 2)
    for rows, here, there in (((0, 1), 0, 1), ((2,), 2, 0)):
        (one, target), other = (observe(model, scenes[here][0]), scenes[here][1]), observe(model, scenes[there][0])
        inside, share = encoder_locality(one, target["boxes"])
        fractions = target["boxes"] / torch.tensor(one.size[::-1]).repeat(2)
        held, part = encoder_locality(other, fractions * torch.tensor(other.size[::-1]).repeat(2))
        np.testing.assert_allclose(found.inside[list(rows)], inside.T, atol=1e-4)
        np.testing.assert_allclose(found.own[list(rows)], (inside - share).T, atol=1e-4)
        np.testing.assert_allclose(found.elsewhere[list(rows)], (held - part).T, atol=1e-4)
    assert abs(found.inside[2] - 1).max() < 1e-4, "a box as large as the image is never left"
    assert np.nanmax(np.abs(found.beyond[2] - (found.at[2] - found.uniform[2]))) < 1e-4, "with the whole image as box, beyond the box is beyond the image"


def test_people_without_query_or_joint_are_not_counted(model):
    crowd = scene((64, 64), [[4 * i, 0, 4 * i + 30, 60] for i in range(8)], 1)                     # more people than the 6 queries
    crowd[1]["visibility"][0, 0] = 0                                                              # one without a labelled snout
    found = people_attention(model, [crowd], joint_groups(PAIRED))
    assert np.isfinite(found.at).all(1).sum() in (5, 6) and np.isnan(found.at[0, 0]) and np.isfinite(found.own).all()
    assert (np.isnan(found.peak) == np.isnan(found.at)).all() and set(np.unique(found.peak[np.isfinite(found.peak)])) <= {0, 1}
    with pytest.raises(PoetError, match="no person"): people_attention(model, [scene((64, 64), [[0, 0, 60, 60]], 1, flags=0)], joint_groups(PAIRED))


def test_the_positions_of_the_overview_are_those_of_the_model(picture):
    for positions in ("layers", "input", "both"):
        torch.manual_seed(0)
        assert observe(build_poet(replace(SMALL, model=replace(SMALL.model, positions=positions))), picture).positions == positions
