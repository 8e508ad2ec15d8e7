"""The baseline: maps that are made by hand come back as the poses they encode, losses as they are on paper, runs as POET's do."""
import contextlib
import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from poet_nb import associative_embedding, engine
from poet_nb.associative_embedding import (AELoss, AEMethod, AssociativeEmbedding, complete, counted_cells, decode, find_peaks, full_maps, group, mirror_order, quarter,
                                           read_at, sigma_cells, tag_loss)
from poet_nb.cli import main
from poet_nb.coco import open_coco
from poet_nb.config import AEConfig, CheckpointError, ConfigError, override, preset
from poet_nb.engine import choose_device, evaluate, fit
from poet_nb.keypoints import COCO_PERSON, Skeleton
from poet_nb.poet import build_poet, load_weights, save_weights
from poet_nb.pretrain import draw_heatmaps
from poet_nb.synth import SynthConfig, make_synth
from poet_nb.transforms import NestedTensor, pad_images

K = 17
AE = AEConfig()
TINY = override(preset("ae_r50"), **{"model.backbone": "resnet_tiny", "model.hidden_dim": 16, "model.stride": 8, "train.init": "none", "train.epochs": 2, "train.batch_size": 8,
                                     "train.warmup_steps": 0, "train.device": "cpu", "data.scales": [64], "data.max_size": 64, "data.eval_scale": 64, "data.pad_multiple": 64,
                                     "data.affine_shift": .05, "data.workers": 0})


def maps_of(poses, tags, size=96, sigma=2.):
    "Heatmaps and tags (D = 1) that say these poses: K (x, y) pairs in pixels or None, and a tag for each person."
    joints = torch.tensor([[(p or (0, 0)) for p in pose] for pose in poses], dtype=torch.float32) / size
    seen = torch.tensor([[p is not None for p in pose] for pose in poses])
    heat = draw_heatmaps(joints, seen, torch.zeros(len(poses), dtype=torch.long), (1, size, size), sigma)[0]
    own = torch.full((len(poses[0]), size, size, 1), 50.)
    for pose, tag in zip(poses, tags):
        for k, p in enumerate(pose):
            if p is not None: own[k, max(int(p[1]) - 3, 0):int(p[1]) + 4, max(int(p[0]) - 3, 0):int(p[0]) + 4] = tag
    return heat, own


def assert_found(found, poses, tolerance=.5):
    "Every pose is among the people found, joint by joint; missing joints have confidence 0."
    _, xy, confidence = found
    assert len(xy) == len(poses)
    for pose in poses:
        there = torch.tensor([p is not None for p in pose])
        want = torch.tensor([p or (0., 0.) for p in pose])
        off = torch.where(there, (xy - want).abs().amax(-1), 0.).amax(1)
        best = int(off.argmin())
        assert off[best] <= tolerance and ((confidence[best] > 0) == there).all(), (off, confidence[best])


def pose_at(x, y, step=4.):
    "A made-up pose: joints on a zigzag."
    return [(x + step * (k % 5) + .3, y + step * (k // 5) + .6) for k in range(K)]


# ---- decoding -----------------------------------------------------------------------------------------------------------

def test_two_people_come_back_to_a_quarter_of_a_pixel():
    poses = [pose_at(10, 10), pose_at(60, 50)]
    scores, xy, confidence = decode(*maps_of(poses, [0., 3.]), AE)
    assert_found((scores, xy, confidence), poses)
    assert torch.allclose(scores, confidence.mean(1)) and (scores > .85).all()


def test_people_who_cross_are_told_apart_by_their_tags_alone():
    "Left wrists exactly where the other person's right wrists are, and hips between each other's."
    a, b = pose_at(20, 20), pose_at(26, 22)
    a[9], b[10], b[9], a[10] = (70.3, 30.6), (70.3, 30.6), (12.3, 60.6), (12.3, 60.6)
    assert_found(decode(*maps_of([a, b], [1., 4.]), AE), [a, b])


def test_people_who_touch():
    "Two people six pixels apart: neighbouring peaks of the same joint survive a window of five."
    poses = [pose_at(20, 20), pose_at(26, 20)]
    assert_found(decode(*maps_of(poses, [0., 3.], sigma=1.), AE), poses)


def test_a_joint_nobody_has_stays_missing_and_counts_in_the_score():
    poses = [pose_at(10, 10), pose_at(60, 50)]
    for pose in poses: pose[4] = None
    poses[0][0] = None
    scores, xy, confidence = decode(*maps_of(poses, [0., 3.]), AE)
    assert_found((scores, xy, confidence), poses)
    assert sorted((confidence > 0).sum(1).tolist()) == [15, 16] and (xy[confidence == 0] == 0).all()
    assert scores.max() < 16 / 17 + 1e-6


def test_a_joint_without_a_peak_is_filled_in_from_the_heatmap():
    "A joint too low to be a peak is found again where the tag fits; the score stays that of the peaks."
    heat, tags = maps_of([pose_at(20, 20)], [2.])
    heat[7] *= .08
    scores, xy, confidence = decode(heat, tags, AE)
    assert .05 < confidence[0, 7] < .1 and torch.allclose(xy[0, 7], torch.tensor(pose_at(20, 20)[7]), atol=.5)
    assert torch.isclose(scores[0], confidence[0][torch.arange(K) != 7].sum() / K)
    assert len(decode(heat * .01, tags, AE)[0]) == 0                                                # nothing above min_score: nobody


def test_more_than_thirty_people():
    "Thirty peaks a joint are looked at, the highest ones; nobody is merged."
    poses = [[(6.3 + 12 * (i % 8), 6.6 + 12 * (i // 8))] * 3 for i in range(40)]
    heat, tags = maps_of(poses, [3. * i for i in range(40)], sigma=1.)
    for i, pose in enumerate(poses):
        x, y = (int(v) for v in pose[0]); heat[:, y - 4:y + 5, x - 4:x + 5] *= 1 - i / 100
    scores, xy, confidence = decode(heat, tags, AE)
    assert len(scores) == 30 and (confidence > 0).all() and len({tuple(p) for p in xy[:, 0].round().tolist()}) == 30
    assert scores.min() > .69 * heat.max()


def test_fewer_pixels_than_peaks():
    assert find_peaks(torch.rand(2, 3, 3), 30, 5)[0].shape == (2, 9)


def test_peaks_are_the_highest_of_their_window():
    heat = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    scores, places = find_peaks(heat, 1000, 5)
    want = {(k, x, y) for k in range(3) for y in range(40) for x in range(50) if heat[k, y, x] == heat[k, max(y - 2, 0):y + 3, max(x - 2, 0):x + 3].max()}
    assert {(k, *places[k, m].tolist()) for k in range(3) for m in range(1000) if scores[k, m] > 0} == want
    assert (scores.diff(dim=1) <= 0).all()


def plain_group(scores, tags, ae):
    "Grouping by trying every assignment of a joint's peaks, for two people at most."
    from itertools import permutations
    people = []
    for k in range(len(scores)):
        good = [m for m in range(scores.shape[1]) if scores[k, m] > ae.min_score]
        means = [np.mean([tags[j, m] for j, m in p.items()], 0) for p in people]
        cost = lambda m, p: round(100 * float(np.linalg.norm(tags[k, m] - means[p]))) - scores[k, m]
        n = min(len(good), len(means))
        options = [(sum(cost(m, p) for m, p in zip(ms, ps)), list(zip(ms, ps))) for ms in permutations(good, n) for ps in permutations(range(len(means)), n)]
        options.sort(key=lambda o: o[0])
        rivals = [o for o in options if o[0] - options[0][0] < 1e-9 and set(o[1]) != set(options[0][1])]
        assume(not rivals)                                                                          # a tie has two right answers
        chosen = dict(options[0][1]) if options else {}
        for m in good:
            p = chosen.get(m)
            if p is None or np.linalg.norm(tags[k, m] - means[p]) >= ae.tag_distance: people.append({k: m})
            else: people[p][k] = m
    return sorted(tuple(p.get(k, -1) for k in range(len(scores))) for p in people)


@given(st.integers(0, 10**6))
def test_grouping_is_the_best_assignment_joint_by_joint(seed):
    rng = np.random.default_rng(seed)
    scores, tags = rng.random((4, 3)) * (rng.random((4, 3)) > .3), rng.integers(0, 3, (4, 3, 1)) * 2. + rng.random((4, 3, 1)) * .4
    assert sorted(map(tuple, group(scores, tags, AE).tolist())) == plain_group(scores, tags, AE)


def test_quarter_moves_towards_the_higher_neighbour_and_stays_at_the_border():
    heat = torch.zeros(1, 5, 5); heat[0, 2, 2], heat[0, 2, 3], heat[0, 1, 2] = 1, .5, .4
    assert quarter(heat, torch.tensor([[2, 2]])).tolist() == [[2.75, 2.25]]
    assert quarter(heat, torch.tensor([[4, 0]])).tolist() == [[4.25, .25]]


def test_complete_prefers_the_own_tag_to_the_higher_place():
    heat, tags = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, 1)
    heat[0, 1, 1], tags[0, 1, 1], heat[0, 3, 2], tags[0, 3, 2] = .9, 5., .4, 2.
    best, at = complete(heat, tags, torch.tensor([2.2]))
    assert at.tolist() == [[2, 3]] and torch.isclose(best[0], torch.tensor(.4))


# ---- targets and loss ---------------------------------------------------------------------------------------------------

def test_sigma_in_cells_and_on_the_image():
    for stride in (4, 8, 16, 32):
        assert sigma_cells(override(TINY, **{"model.stride": stride})) == 2
        assert sigma_cells(override(TINY, **{"model.stride": stride, "ae.sigma_unit": "pixels"})) * stride == 8


@given(st.integers(0, 10**6))
def test_tag_loss_is_the_formula(seed):
    rng = np.random.default_rng(seed)
    index = np.sort(rng.integers(0, 3, rng.integers(0, 7)))
    tags, seen = rng.normal(size=(len(index), 5)), rng.random((len(index), 5)) > .3
    push = pull = 0.
    for image in range(3):
        people = [tags[i, seen[i]] for i in np.flatnonzero(index == image) if seen[i].any()]
        P = len(people)
        if not P: continue
        pull += sum(((t - t.mean()) ** 2).mean() for t in people) / P
        if P > 1: push += (sum(math.exp(-(a.mean() - b.mean()) ** 2) for a in people for b in people) - P) * .5 / (P * (P - 1))
    got = tag_loss(torch.tensor(tags), torch.tensor(seen), torch.tensor(index), 3)
    assert torch.allclose(torch.stack(got), torch.tensor([push, pull], dtype=torch.float64) / 3)


def target_of(keypoints, visibility, size=64, **more):
    keypoints = torch.tensor(keypoints, dtype=torch.float32)
    return dict(image_id=torch.tensor(1), labels=torch.zeros(len(keypoints), dtype=torch.long), keypoints=keypoints, visibility=torch.tensor(visibility),
                size=torch.tensor([size, size]), orig_size=torch.tensor([size, size]), **more)


def test_the_loss_by_hand():
    "Two maps of 8 x 8 cells with one person: heatmap error, pull and push computed cell by cell."
    config = override(TINY, **{"model.num_keypoints": 2, "ae.flip_test": False})
    task = AELoss(AssociativeEmbedding(config), config)
    generator = torch.Generator().manual_seed(0)
    maps = {name: torch.rand(1, 2, 8, 8, generator=generator) for name in ("heatmaps", "tags")}
    target = target_of([[[.3, .4], [.7, .9]]], [[2, 1]], ignore=torch.tensor([[0., 0., .25, 1.]]))
    got = task.losses(maps, pad_images([torch.zeros(3, 64, 64)]), [target])
    error = 0.
    for k, (u, v) in enumerate([(.3, .4), (.7, .9)]):
        for y in range(8):
            for x in range(8):
                bumps = [math.exp(-((x + .5 - a * 8) ** 2 + (y + .5 - b * 8) ** 2) / 8) for a, b in ((.3, .4), (.7, .9))]
                if x + .5 > 2 or max(bumps) > .01: error += (maps["heatmaps"][0, k, y, x].item() - bumps[k]) ** 2 / 128
    tags = [maps["tags"][0, 0, 3, 2].item(), maps["tags"][0, 1, 7, 5].item()]
    pull = (tags[0] - tags[1]) ** 2 / 4
    assert got["loss_heatmaps"].item() == pytest.approx(error, rel=1e-4) and got["loss_pull"].item() == pytest.approx(pull, rel=1e-4) and got["loss_push"] == 0
    assert got["loss"].item() == pytest.approx(error + 1e-3 * pull, rel=1e-4)


def test_thirty_people_at_most_are_learnt():
    config = override(TINY, **{"ae.max_people": 2})
    task = AELoss(AssociativeEmbedding(config), config)
    batch = pad_images([torch.zeros(3, 64, 64)] * 2)
    poses = torch.rand(5, K, 2, generator=torch.Generator().manual_seed(0)).tolist()
    maps = {name: torch.rand(2, K, 8, 8, generator=torch.Generator().manual_seed(1)) for name in ("heatmaps", "tags")}
    five, two = (task.losses(maps, batch, [target_of(poses[:n], [[2] * K] * n), target_of(poses[:1], [[2] * K])]) for n in (5, 2))
    assert all(torch.equal(five[k], two[k]) for k in five)


def test_padding_and_ignored_boxes_do_not_count():
    batch = pad_images([torch.zeros(3, 64, 32), torch.zeros(3, 64, 64)])
    targets = [dict(size=torch.tensor([64, 32]), ignore=torch.tensor([[0., .5, 1., 1.]])), dict(size=torch.tensor([64, 64]))]
    cells = counted_cells(batch, targets, (8, 8))
    assert not cells[0, :, 4:].any() and cells[0, :4, :4].all() and not cells[0, 4:].any() and cells[1].all()


def test_an_image_of_nobody():
    config = TINY
    task = AELoss(AssociativeEmbedding(config), config)
    empty = target_of(torch.zeros(0, K, 2).tolist(), torch.zeros(0, K, dtype=torch.long).tolist()) | dict(keypoints=torch.zeros(0, K, 2), visibility=torch.zeros(0, K, dtype=torch.long))
    got = task(pad_images([torch.zeros(3, 64, 64)]), [empty])
    assert got["loss"].isfinite() and got["loss_push"] == 0 and got["loss_pull"] == 0
    got["loss"].backward()


def test_a_tag_is_read_in_the_cell_of_its_joint():
    maps = torch.arange(2 * 3 * 4 * 5.).view(2, 3, 4, 5)
    got = read_at(maps, torch.tensor([[[0., 0.], [.99, .99], [1., 1.]]]), torch.tensor([1]))
    assert got.tolist() == [[maps[1, 0, 0, 0], maps[1, 1, 3, 4], maps[1, 2, 3, 4]]]


# ---- the flip test ------------------------------------------------------------------------------------------------------

def test_a_padded_image_is_mirrored_within_itself():
    "The padding of a smaller image stays where it was, so its people are the same alone and in a batch."
    torch.manual_seed(0)
    model = AssociativeEmbedding(override(TINY, **{"model.stride": 4})).eval()
    for p in model.head.parameters(): torch.nn.init.normal_(p, std=.1)
    image = torch.randn(3, 64, 32)
    padded = full_maps(model, NestedTensor(torch.nn.functional.pad(image, (0, 32))[None], torch.arange(64)[None, None].ge(32).expand(1, 64, 64)))
    assert (padded[0][..., 32:] == 0).all()
    mirrored = full_maps(model, NestedTensor(torch.nn.functional.pad(image.flip(-1), (0, 32))[None], torch.arange(64)[None, None].ge(32).expand(1, 64, 64)))
    order = list(COCO_PERSON.flip_permutation)
    assert torch.allclose(mirrored[0][..., :32].flip(-1)[:, order], padded[0][..., :32], atol=1e-5)
    assert torch.allclose(mirrored[1][..., :32, :].flip(-2)[:, order].flip(-1), padded[1][..., :32, :], atol=1e-5)


# ---- through the engine -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for split, n in (("train2017", 16), ("val2017", 4)): make_synth(root, split, n=n, config=SynthConfig(), seed=3, workers=1, progress=False)
    return root


def test_train_stop_resume_and_eval_as_for_poet(scenes, tmp_path, capsys, monkeypatch):
    config = override(TINY, **{"data.root": str(scenes)})
    log = fit(config, tmp_path / "run", progress=False)
    assert [line["epoch"] for line in log] == [1, 2] and {"loss_heatmaps", "loss_push", "loss_pull"} <= log[0]["train"].keys() and "AP" in log[1]["coco"]
    model = build_poet(tmp_path / "run")
    again = evaluate(model, config, choose_device("cpu"), progress=False)
    assert again[0]["AP"] == pytest.approx(log[1]["coco"]["AP"], abs=.02)                            # the stored weights are 16-bit
    stop = threading.Event(); stop.set()
    with monkeypatch.context() as m:
        m.setattr(engine, "stop_requests", lambda: contextlib.nullcontext(stop))                     # Ctrl-C in the first step
        assert fit(config, tmp_path / "half", progress=False) == [] and not (tmp_path / "half/metrics.jsonl").exists()
    resumed = fit(config, tmp_path / "half", progress=False, resume=True)
    assert [line["train"] for line in resumed] == [line["train"] for line in log] and resumed[-1]["coco"] == log[-1]["coco"]
    assert main(["eval", "--run", str(tmp_path / "run"), "--json", "--quiet"]) == 0
    assert "AP" in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["eval", "--run", str(tmp_path / "run"), "--layer", "2"]) == 2 and "no decoder layers" in capsys.readouterr().err
    image = open_coco(scenes, "val2017").image_path(0)
    assert main(["predict", str(image), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--threshold", "0"]) == 0


@pytest.mark.parametrize("flip", [False, True])
def test_the_network_is_asked_once_for_losses_and_people(flip):
    torch.manual_seed(0)
    config = override(TINY, **{"ae.flip_test": flip})
    model, asked = AssociativeEmbedding(config).eval(), []
    for p in model.head.parameters(): torch.nn.init.normal_(p, std=.3)
    batch = pad_images([torch.randn(3, 64, 48), torch.randn(3, 64, 64)])
    targets = [target_of(pose, [[2] * K] * len(pose)) | dict(size=torch.tensor(size), orig_size=torch.tensor(size)) for pose, size in ((torch.rand(1, K, 2).tolist(), (64, 48)), (torch.rand(2, K, 2).tolist(), (64, 64)))]
    losses, people = AELoss(model, config)(batch, targets, None, 4), model.people(batch, torch.tensor([[64, 48], [64, 64]]))
    model.backbone.register_forward_hook(lambda *_: asked.append(1))
    got, found = AEMethod.judge(model, config)(batch, targets, 3, 4)
    assert len(asked) == 1 + flip and all(len(p["scores"]) for p in found)
    assert got.keys() == losses.keys() and all(torch.equal(got[k], losses[k]) for k in losses)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(found, people) for k in ("scores", "labels", "keypoints"))


def test_weights_of_the_other_method_are_refused(scenes, tmp_path):
    save_weights(build_poet(override(preset("poet_tiny"), **{"train.init": "none"})), tmp_path / "poet.safetensors")
    with pytest.raises(CheckpointError): load_weights(AssociativeEmbedding(TINY), tmp_path / "poet.safetensors")


@pytest.mark.parametrize("changes, words", [({"model.num_classes": 2}, "num_classes"), ({"model.num_keypoints": 4}, "flip_test"), ({"train.pretrain_epochs": 1}, "pretrain_epochs")])
def test_what_it_cannot_do_is_refused_before_it_begins(scenes, tmp_path, changes, words):
    config = override(TINY, **{"data.root": str(scenes)} | changes)
    with pytest.raises(ConfigError, match=words): AEMethod.check(config)
    with pytest.raises(ConfigError): fit(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_stride_four_is_not_for_poet():
    with pytest.raises(ConfigError, match="model.stride"): override(preset("poet_r50"), **{"model.stride": 4})


# ---- seventeen joints of somebody else ------------------------------------------------------------------------------------

ANT = [f"left_{k}" for k in range(8)] + [f"right_{k}" for k in range(8)] + ["head"]
ANT_ORDER = [*range(8, 16), *range(8), 16]


@pytest.fixture(scope="module")
def ants(tmp_path_factory):
    "Scenes whose joints have other names than COCO's, and so other twins."
    root = tmp_path_factory.mktemp("ants")
    for split, n in (("train2017", 8), ("val2017", 4)): make_synth(root, split, n=n, config=SynthConfig(size=128), seed=3, workers=1, progress=False)
    for file in (root / "annotations").glob("*.json"):
        coco = json.loads(file.read_text())
        coco["categories"] = [dict(id=1, name="ant", keypoints=ANT, skeleton=[[1, 2]])]
        file.write_text(json.dumps(coco))
    return root


def test_the_mirror_exchanges_the_joints_of_the_data_and_of_the_run(ants, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(associative_embedding, "mirror_order", lambda *args: asked.append(mirror_order(*args)) or asked[-1])
    def orders(f): asked.clear(); f(); return {tuple(order) for order in asked}
    config = override(TINY, **{"data.root": str(ants), "train.epochs": 1})
    assert orders(lambda: fit(config, tmp_path / "run", progress=False)) == {tuple(ANT_ORDER)}         # training: the data's
    model, image = build_poet(tmp_path / "run"), open_coco(ants, "val2017").image_path(0)
    assert orders(lambda: model.predict(image)) == {tuple(ANT_ORDER)}                                 # prediction: the run's skeleton.json
    assert orders(lambda: evaluate(AssociativeEmbedding(config), config, choose_device("cpu"), progress=False)) == {tuple(ANT_ORDER)} # a network that was told nothing
    (tmp_path / "run/skeleton.json").unlink()
    assert orders(lambda: build_poet(tmp_path / "run").predict(image)) == {COCO_PERSON.flip_permutation}


def test_maps_of_the_mirrored_image_by_the_joints_of_the_model():
    torch.manual_seed(0)
    model, image = AssociativeEmbedding(TINY).eval(), torch.randn(1, 3, 64, 64)
    for p in model.head.parameters(): torch.nn.init.normal_(p, std=.1)
    maps = lambda x: full_maps(model, NestedTensor(x, torch.zeros(1, 64, 64, dtype=torch.bool)))[0]
    person = maps(image)
    model.categories = [dict(id=1, name="ant", keypoints=ANT, skeleton=[])]
    assert torch.allclose(maps(image.flip(-1)).flip(-1)[:, ANT_ORDER], maps(image), atol=1e-5) and not torch.allclose(maps(image), person, atol=1e-3)


def test_as_many_joints_as_the_skeleton_has():
    five = Skeleton.from_category(dict(name="star", keypoints=["left_arm", "right_arm", "left_leg", "right_leg", "head"]))
    assert mirror_order(override(TINY, **{"model.num_keypoints": 5}), None, five) == [1, 0, 3, 2, 4]
    AEMethod.check(override(TINY, **{"model.num_keypoints": 5}), five)
    with pytest.raises(ConfigError, match="ae.flip_test.*17 joints.*'star' has 5"): AEMethod.check(TINY, five)
    AEMethod.check(override(TINY, **{"ae.flip_test": False}), five)
