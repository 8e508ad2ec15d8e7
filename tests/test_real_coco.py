"""Real photographs of COCO: every one loads, augments, batches and is scored; and eight of them can be learnt by heart."""
import json
import math
import os
from pathlib import Path

import pytest
import torch

from poet_nb.coco import open_coco
from poet_nb.coco_eval import METRICS, evaluate_keypoints
from poet_nb.config import override, preset
from poet_nb.engine import EpochBatches, eval_loader, evaluate, fit, train_loader
from poet_nb.poet import Poet, build_poet
from poet_nb.transforms import normalize

CPU = torch.device("cpu")


def tiny(root, **changes):
    "poet_tiny on real images, small and narrow."
    return override(preset("poet_tiny"), **({
        "data.root": str(root), "data.workers": 0, "data.scales": [64, 96], "data.max_size": 160, "data.eval_scale": 96, "data.crop_resize": [96, 128], "data.crop_size": [64, 128],
        "data.pad_multiple": 32, "data.dropout_prob": .5, "model.hidden_dim": 32, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 32,
        "model.query_groups": 1, "train.batch_size": 4, "train.device": "cpu"} | changes))


def test_every_training_image_is_augmented_and_batched(coco_mini):
    config = tiny(coco_mini, **{"train.batch_size": 6})
    loader, batches = train_loader(config, CPU)
    data, seen, angles = loader.dataset.dataset, [], set()
    assert len(data) == 24 and isinstance(batches, EpochBatches)
    for batches.epoch in range(3):
        for samples, targets in loader:
            assert samples.tensors.dtype == torch.uint8 and len(samples.tensors) == len(targets) == 6 and all(s % 32 == 0 for s in samples.tensors.shape[-2:])
            pixels = normalize(samples).tensors
            assert pixels.isfinite().all() and (pixels * samples.mask[:, None]).eq(0).all()
            for target, image, mask in zip(targets, pixels, samples.mask):
                seen.append(int(target["image_id"]))
                assert torch.tensor([(~mask).any(1).sum(), (~mask).any(0).sum()]).equal(target["size"]) and image.std() > .05
                points, labelled = torch.Tensor(target["keypoints"]), target["visibility"] > 0
                assert ((points >= 0) & (points <= 1)).all() and points[~labelled].eq(0).all() and len(points) == len(target["labels"])
                angles.add(tuple(target["size"].tolist()))
    assert sorted(seen) == sorted(data.image_ids * 3) and not data.bad_images(), "every image once an epoch, none of them bad"
    assert len(angles) > 10, "crops and sizes vary"


def test_images_are_scored_in_few_batches_and_padded_as_if_alone(coco_mini):
    config = tiny(coco_mini, **{"data.val": "train2017", "data.pad_multiple": 64})
    loader = eval_loader(config, CPU)
    originals = {tuple(size) for size in loader.dataset.index.images.sizes[loader.dataset.rows].tolist()}
    shapes, seen = {}, []
    for samples, targets in loader:
        shape = tuple(samples.tensors.shape[-2:])
        shapes[shape] = shapes.get(shape, 0) + 1
        for target in targets:
            seen.append(int(target["image_id"]))
            assert shape == tuple(-(-side // 64) * 64 for side in target["size"].tolist()), "padding that the image would not have alone"
    assert sorted(seen) == sorted(loader.dataset.image_ids) and len(shapes) < len(originals) / 2


def test_every_validation_image_is_scored(coco_mini):
    config = tiny(coco_mini)
    torch.manual_seed(0)
    numbers, losses, results = evaluate(Poet(config), config, CPU, progress=False)
    truth = coco_mini / "annotations/person_keypoints_val2017.json"
    assert numbers["images"] == 10 and set(METRICS) <= numbers.keys() and 0 <= numbers["AP"] < .2, "nothing is learnt yet"
    assert all(math.isfinite(v) for v in losses.values()) and 0 < len(results) <= 10 * config.model.num_queries
    sizes = {im["id"]: (im["width"], im["height"]) for im in json.loads(truth.read_text())["images"]}
    assert {r["image_id"] for r in results} == set(sizes) and {r["category_id"] for r in results} == {1}
    for r in results: # centre and offset are bounded, in pixels of the original image
        assert all(-.5 * w <= x <= 1.5 * w for w in sizes[r["image_id"]][:1] for x in r["keypoints"][0::3])
        assert all(-.5 * h <= y <= 1.5 * h for h in sizes[r["image_id"]][1:] for y in r["keypoints"][1::3])
    theirs = evaluate_keypoints(truth, results, engine="pycocotools", verbose=False)
    assert all(math.isclose(numbers[k], theirs[k], abs_tol=1e-9) for k in METRICS)


def test_perfect_answers_at_the_networks_own_resolution_score_one(coco_mini):
    config, post = tiny(coco_mini), []
    for samples, targets in eval_loader(config, CPU):
        for t in targets: # back from fractions to pixels, as PostProcess does
            size, labelled = t["orig_size"].flip(0), (t["visibility"] > 0).any(1)
            points = torch.cat([torch.Tensor(t["keypoints"]) * size, torch.ones(*t["visibility"].shape, 1)], -1)[labelled]
            post += [dict(image_id=int(t["image_id"]), category_id=1, keypoints=p.flatten().tolist(), score=1.) for p in points]
    numbers = evaluate_keypoints(coco_mini / "annotations/person_keypoints_val2017.json", post, verbose=False)
    assert len(post) > 10 and numbers["AP"] > .999 and numbers["AR"] > .999


# ---- learning eight of them by heart ------------------------------------------------------------------------------------

def eight(coco_mini, folder, copies=1) -> Path:
    "The first 8 training images by id with a person of at least 5 labelled joints: once to be scored, `copies` times to train on, so that an epoch has as many steps."
    coco = json.loads((coco_mini / "annotations/person_keypoints_train2017.json").read_text())
    wanted = sorted({a["image_id"] for a in coco["annotations"] if a["num_keypoints"] >= 5 and not a["iscrowd"]})[:8]
    (folder / "annotations").mkdir(parents=True)
    for split, n in (("train2017", copies), ("val2017", 1)):
        (folder / split).mkdir()
        rows = dict(images=[], annotations=[])
        for kind, key in (("images", "id"), ("annotations", "image_id")):
            for copy in range(n):
                for old in coco[kind]:
                    if old[key] not in wanted: continue
                    rows[kind].append(old | {key: copy * 10**7 + old[key]} | (dict(id=len(rows[kind]) + 1) if kind == "annotations" else {}))
        (folder / f"annotations/person_keypoints_{split}.json").write_text(json.dumps(coco | rows))
        for name in {im["file_name"] for im in rows["images"]}: os.symlink((coco_mini / "train2017" / name).resolve(), folder / split / name)
    return folder


def test_the_eight_are_chosen_by_their_rule(coco_mini, tmp_path):
    folder, whole = eight(coco_mini, tmp_path / "eight", copies=3), open_coco(coco_mini, "train2017")
    posed = [int(t["image_id"]) for _, t in (whole[i] for i in range(len(whole))) if ((t["visibility"] > 0).sum(1) >= 5).any()]
    train, val = open_coco(folder, "train2017"), open_coco(folder, "val2017")
    assert sorted(val.image_ids) == sorted(posed)[:8] and len(train) == 24 and len(set(train.image_ids)) == 24
    for i in range(24):
        (image, target), (same, expected) = train[i], val[i % 8]
        assert torch.equal(image, same) and torch.equal(target["keypoints"], expected["keypoints"]) and torch.equal(target["area"], expected["area"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_real_images_are_learnt_by_heart(coco_mini, tmp_path):
    """AP on the very images that were trained on, all of their people counted: 1,000 small steps at 160 pixels, AP 0.991; 21 minutes on two cores beside other work.

    Nine of the 32 people there have no labelled joints. With data.unposed="person" they are learnt too, as people somewhere: AR reaches 0.974 but AP only 0.80 to 0.85,
    because nothing has taught the network where their joints are, so each of them is a confident false positive."""
    config = override(preset("poet_tiny"), **{
        "data.root": str(eight(coco_mini, tmp_path / "eight", copies=25)), "data.workers": 0, "data.scales": [160], "data.max_size": 256, "data.eval_scale": 160,
        "data.flip_prob": 0., "data.rotation_prob": 0., "data.dropout_prob": 0., "data.crop_prob": 0., "data.pad_multiple": 32, "data.unposed": "nobody",
        "train.batch_size": 8, "train.pretrain_epochs": 6, "train.epochs": 40, "train.eval_every": 40, "train.ema_decay": 0., "train.warmup_steps": 20, "train.amp": "none",
        "train.checkpoint_minutes": 60., "train.device": "cpu"})
    log = fit(config, tmp_path / "run", progress=False)
    numbers, begun = log[-1]["coco"], log[0]["train"]["loss"]
    print(f"AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}, AP75 {numbers['AP75']:.3f}, AR {numbers['AR']:.3f}; loss {begun:.2f} -> {log[-1]['train']['loss']:.3f}")
    assert numbers["images"] == 8 and numbers["AP"] >= .9
    again, _, _ = evaluate(build_poet(tmp_path / "run"), config, CPU, progress=False)
    assert again["AP"] >= .85, "the weights on disk, rounded to 16 bits, know it too"
