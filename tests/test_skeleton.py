"Any skeleton: 4, 20 and 38 joints, several categories, no left and right, own sigmas; from `poet train --data` to predictions, without a setting."
import json
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from poet_nb.coco import open_coco, open_split
from poet_nb.coco_eval import evaluate_keypoints, load_ground_truth
from poet_nb.config import ConfigError, load_config
from poet_nb.keypoints import COCO_PERSON, Skeleton, _flip_pairs, lone_sides, visibility_mask
from poet_nb.poet import Poet, build_poet
from poet_nb.predict import categories_of
from poet_nb.transforms import RandomFlip

TINY = shlex.split("model.hidden_dim=16 model.nheads=2 model.enc_layers=1 model.dec_layers=2 model.dim_feedforward=16 data.scales=[64] data.max_size=64 data.eval_scale=64 "
                   "data.crop_prob=0 data.pad_multiple=64 data.workers=0 train.pretrain_epochs=0 train.batch_size=4 train.epochs=1 train.amp=none train.ema_decay=0 train.device=cpu")
SIDES = [f"{side}_{part}" for part in ("eye", "ear", "paw") for side in ("left", "right")]
NAMES = {4: ["head", "neck", "middle", "end"], 20: ["nose", "tail", *SIDES, *(f"spine{k}" for k in range(12))], 38: [f"p{k}" for k in range(38)]}


pytestmark = pytest.mark.usefixtures("one_thread")


def category(K: int, id: int = 3, name: str = "beast", **more) -> dict:
    return dict(id=id, name=name, keypoints=NAMES[K], skeleton=[[k, k + 1] for k in range(1, K)]) | more


def learnt(run: Path) -> list[dict]:
    "The categories of a run's model."
    return categories_of(build_poet(run))


def make(root: Path, categories: list[dict], images: int = 8) -> Path:
    "A dataset of creatures that are dotted lines, of each category in turn."
    rng = np.random.default_rng(0)
    for split, n in (("train2017", images), ("val2017", 4)):
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        people, records = [], []
        for i in range(1, n + 1):
            c = categories[i % len(categories)]
            K = len(c["keypoints"])
            pixels = np.full((64, 64, 3), 200, np.uint8)
            x, y = np.linspace(8, 56, K).round(), rng.integers(8, 56) + np.zeros(K)
            for a, b in zip(x, y): pixels[int(b) - 1:int(b) + 2, int(a) - 1:int(a) + 2] = 20
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            records.append(dict(id=i, file_name=f"{i}.png", width=64, height=64))
            joints = np.stack([x, y, np.full(K, 2)], 1)
            people.append(dict(id=i, image_id=i, category_id=c["id"], keypoints=joints.ravel().tolist(), num_keypoints=K, bbox=[8, float(y[0]) - 4, 48, 8], area=2000., iscrowd=0))
        (root / f"annotations/person_keypoints_{split}.json").write_text(json.dumps(dict(images=records, annotations=people, categories=categories)))
    return root


@pytest.fixture
def poet(poet):
    "poet(line): the words of a line, and more."
    return lambda line, *more: poet(*shlex.split(line), *more)


def done(result) -> str:
    "What a command that went well has printed, errors and warnings included."
    code, out, err = result
    assert code == 0, err
    return out + err


KINDS = {"four": [category(4)], "twenty": [category(20)], "thirty-eight": [category(38)], "two categories": [category(4, 3, "adder"), category(4, 7, "viper")]}


@pytest.mark.parametrize("kind", KINDS)
def test_any_skeleton_takes_the_whole_road(kind, poet, tmp_path):
    categories, K = KINDS[kind], len(KINDS[kind][0]["keypoints"])
    data, run = make(tmp_path / "data", categories), tmp_path / "run"
    said = done(poet("train --data data --run run --set", *TINY))
    assert f"model.num_keypoints={K}" in said and said.count("model.num_keypoints") == 1 and categories[0]["name"] in said
    assert ("model.num_classes=2" in said) == (len(categories) == 2)
    assert "no OKS sigmas are given" in said                                                       # at the first score, and then no more
    assert said.count("no OKS sigmas are given") == 1
    config = load_config(run)
    assert (config.model.num_keypoints, config.model.num_classes) == (K, len(categories))
    kept = json.loads((run / "skeleton.json").read_text())["categories"]
    assert [(c["id"], c["name"], c["keypoints"], c["skeleton"]) for c in kept] == [(c["id"], c["name"], c["keypoints"], c["skeleton"]) for c in categories]
    assert Skeleton.from_category(learnt(run)[0]).limbs == tuple((a - 1, b - 1) for a, b in categories[0]["skeleton"])
    results = json.loads((run / "predictions.json").read_text())
    assert results and {len(r["keypoints"]) for r in results} == {3 * K} and {r["category_id"] for r in results} <= {c["id"] for c in categories}

    done(poet("train --run run --resume --set", *(["train.epochs=1"])))                            # complete: nothing to do, nothing adapted
    assert "scored 4 images, 4 of them annotated" in done(poet("eval --run run --quiet"))
    done(poet("predict data/val2017 --run run --threshold 0 --out found --quiet"))
    found = json.loads(Path("found/predictions.json").read_text())
    assert found["categories"] == kept and {a["category_id"] for a in found["annotations"]} <= {c["id"] for c in categories}
    assert len(found["annotations"]) == 4 * 25 and all(len(a["keypoints"]) == 3 * K for a in found["annotations"])
    assert len(list(Path("found").glob("*_poses.jpg"))) == 4


def test_each_category_is_learnt_as_a_class_of_its_own(tmp_path):
    data = open_coco(make(tmp_path / "data", KINDS["two categories"]))
    assert data.category_ids == [3, 7] and sorted({int(t["labels"][0]) for _, t in map(data.load, range(4))}) == [0, 1]
    perfect = lambda swap: [dict(image_id=a["image_id"], category_id=10 - a["category_id"] if swap else a["category_id"], keypoints=a["keypoints"], score=1.)
                            for a in json.loads(data.annotations_file.read_text())["annotations"]]
    with pytest.warns(UserWarning, match="estimated"):
        assert evaluate_keypoints(data, perfect(False), verbose=False)["AP"] == pytest.approx(1) and evaluate_keypoints(data, perfect(True), verbose=False)["AP"] == 0


def test_an_interrupted_run_goes_on_with_the_same_line(poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    line = "train --preset poet_tiny --data data --run run"
    done(poet(line, "--set", *TINY, "train.epochs=2"))
    (tmp_path / "run/metrics.jsonl").write_text((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0] + "\n")
    shutil.copy(tmp_path / "run/checkpoint.prev.pt", tmp_path / "run/checkpoint.pt")              # the epoch's end, before its evaluation
    assert "2 of 2 epochs" in done(poet(line + " --resume", "--set", *TINY, "train.epochs=2"))
    make(tmp_path / "other", [category(20)])
    code, _, err = poet("train --run run --resume --data other")
    assert code == 2 and "model.num_keypoints: the model has 4" in err and "has 20" in err


def test_the_doctor_says_what_it_takes_the_creatures_for(poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    code, out, _ = poet("doctor --data data")
    assert code == 0 and out.count("4 joints, 3 limbs, 0 mirror pairs: no name says left or right") == 2 and "estimated for head, neck, middle, end" in out and "8 of beast" in out
    Image.new("RGB", (60, 60)).save(tmp_path / "data/val2017/2.png")
    code, out, _ = poet("doctor --data data")
    assert code == 2 and "2.png: the image has 60 x 60 pixels" in out and out.count("4 joints") == 1
    assert poet("doctor --data nothing")[0] == 2


def spoil(data: Path, change, split: str = "val2017"):
    "Change the annotations of a split in place, or its whole file."
    file = data / f"annotations/person_keypoints_{split}.json"
    coco = json.loads(file.read_text())
    for a in coco["annotations"]: change(a)
    file.write_text(json.dumps(coco))


def unlabel(a): a["keypoints"][2::3] = [0] * (len(a["keypoints"]) // 3)
def fractions(a): a["keypoints"] = [v if i % 3 == 2 else v / 64 for i, v in enumerate(a["keypoints"])]
def elsewhere(a): a["bbox"] = [0, 0, 5, 5]
def shrink(a): a.update(keypoints=[v if i % 3 == 2 else 8 + v / 8 for i, v in enumerate(a["keypoints"])], bbox=[8, 8, 8, 8])
def flat(a): a["area"] = 0


@pytest.mark.parametrize("change, level, parts", [
    (unlabel, "error", ["none of its 4 people has a joint with v > 0", "num_keypoints of 4 of 4"]), (fractions, "error", ["between 0 and 1", "pixels"]),
    (elsewhere, "warning", ["of the labelled ones lie far outside the box of their own beast"]), (flat, "warning", ["4 people with labelled joints have area 0", "poet data split --area"]),
    (shrink, "warning", ["the median beast has 8 x 8 pixels", "data.eval_scale=64", "0.5 x 0.5 cells of stride 16", "data.scales"])])
def test_the_doctor_finds_what_makes_training_useless(change, level, parts, poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    words = ("doctor --data data --set", "data.eval_scale=64", "data.max_size=64")
    code, before, _ = poet(*words)
    assert code == 0 and "warning  size" not in before and parts[0] not in before
    spoil(tmp_path / "data", change)
    code, out, err = poet(*words)
    assert code == (2 if level == "error" else 0) and err == ""
    for part in parts: assert any(line.startswith(level) or line.startswith("warning") and level == "error" for line in out.splitlines() if part in line) and part in out, (part, out)


def test_a_split_without_anybody_labelled_is_refused_before_training(poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    spoil(tmp_path / "data", unlabel)
    code, _, err = poet("train --data data --run run --set", *TINY)
    assert code == 2 and "none of its 4 people has a joint with v > 0" in err and not (tmp_path / "run").exists()
    file = tmp_path / "data/annotations/person_keypoints_val2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(annotations=[])))
    code, _, err = poet("train --data data --run run --set", *TINY)
    assert code == 2 and "nobody is annotated in its 4 images" in err and not (tmp_path / "run").exists()
    assert "nobody is annotated" in poet("doctor --data data")[1]


def test_the_doctor_lists_sides_without_a_twin(poet, tmp_path):
    names = ["snout", "FL_paw", "FR_paw", "leftear"]
    make(tmp_path / "data", [category(4) | dict(keypoints=names)])
    out = poet("doctor --data data")[1]
    assert "1 mirror pairs; no twin is found for leftear" in out and "no name says left or right" not in out


def test_the_doctor_opens_what_training_opens(poet, tmp_path):
    make(tmp_path / "data", [category(4, 1, "worm"), category(20, 2, "dog")])
    code, out, _ = poet("doctor --data data")
    assert code == 2 and "--set data.categories=NAME" in out
    code, out, _ = poet("doctor --data data --set data.categories=dog")
    assert code == 0 and "4 of dog" in out and "20 joints" in out
    (tmp_path / "data/annotations/s.json").write_text(json.dumps([.1] * 4))
    assert "sigmas" not in poet("doctor --data data --set data.categories=worm data.sigmas=s.json")[1]
    for words in ("--set data.sigmas=s.json", "--preset poet_r50"): assert poet(f"doctor {words}")[0] == 2
    assert "as poet_r50 sees it (data.eval_scale=800)" in poet("doctor --data data --preset poet_r50 --set data.categories=dog")[1]


@pytest.mark.parametrize("pattern", ["keypoints_{}.json", "{}.json"])
def test_annotations_of_other_names_take_the_whole_road(pattern, poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    for split in ("train2017", "val2017"): (tmp_path / f"data/annotations/person_keypoints_{split}.json").rename(tmp_path / "data/annotations" / pattern.format(split))
    (tmp_path / "data/annotations/sigmas.json").write_text(json.dumps([.1] * 4))
    assert "8 images, 8 of beast" in done(poet("doctor --data data"))
    said = done(poet("train --data data --run run --set", *TINY))
    assert said.count("no OKS sigmas are given") == 1
    assert done(poet("eval --run run")).count("no OKS sigmas are given") == 1


@pytest.mark.parametrize("names, pairs", [
    ("leftear rightear nose", [(0, 1)]), ("lefteye righteye", [(0, 1)]), ("Lear Rear", [(0, 1)]), ("FL_paw FR_paw HL_paw HR_paw", [(0, 1), (2, 3)]), ("L1 L2 R1 R2", [(0, 2), (1, 3)]),
    ("forepawL1 forepawR1 hindpawL1", [(0, 1)]), ("RL RR FL FR", [(0, 1), (2, 3)]), ("LF LR RF RR", [(0, 2), (1, 3)]), ("frontleftpaw frontrightpaw", [(0, 1)]), ("earL earR", [(0, 1)]),
    ("rear lip tail heel upper", []), ("lear rear left_ear right_ear", [(0, 1), (2, 3)]), ("LL LR RL RR", [])])
def test_twins_are_found_by_their_names(names, pairs):
    kinds = Skeleton.from_category(dict(id=1, name="x", keypoints=names.split(), skeleton=[]))
    assert kinds.flip_pairs == tuple(pairs)
    assert Skeleton.from_category(kinds.to_category()) == kinds


def test_sides_that_are_alone():
    lone = lambda *names: lone_sides(Skeleton("x", names, (), _flip_pairs(names), (.1,) * len(names)))
    assert lone("left_eye", "rightear", "eyeleft", "FL_paw", "R2", "ear_l") == ("left_eye", "rightear", "eyeleft", "FL_paw", "R2", "ear_l")
    assert lone("nose", "rear", "lip", "tail", "leftEye", "rightEye", "frontal", "collar") == ()


def test_joints_that_count_in_tensors_and_arrays():
    assert visibility_mask(np.array([0, 1, 2])).tolist() == [False, True, True] and visibility_mask(torch.tensor([0, 1, 2]), "visible").tolist() == [False, False, True]
    with pytest.raises(ConfigError, match="'annotated'"): visibility_mask(torch.tensor([2]), "annotated")


def test_what_set_says_is_meant(poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    for field in ("model.num_keypoints=5", "model.num_classes=2"):
        code, _, err = poet("train --data data --run run --set", *TINY, field)
        assert code == 2 and field.partition("=")[0] in err and not (tmp_path / "run").exists()


def test_categories_of_different_joints_are_refused_until_one_is_chosen(poet, tmp_path):
    make(tmp_path / "data", [category(4, 1, "worm"), category(20, 2, "dog")])
    code, _, err = poet("train --data data --run run --set", *TINY)
    assert code == 2 and "1 worm, 2 dog" in err and "--set data.categories=" in err and not (tmp_path / "run").exists()
    assert "dog of 20 joints" in done(poet("train --data data --run run --set", *TINY, "data.categories=dog"))
    assert [c["name"] for c in learnt(tmp_path / "run")] == ["dog"]
    assert "2 of them annotated" in done(poet("eval --run run --quiet"))
    code, _, err = poet("train --data data --run new --set", *TINY, "data.categories=cat")
    assert code == 2 and "'cat'" in err and "1 worm, 2 dog" in err


def test_splits_that_speak_of_other_things_are_refused(poet, tmp_path):
    data = make(tmp_path / "data", KINDS["two categories"])
    file = data / "annotations/person_keypoints_val2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(categories=KINDS["two categories"][::-1])))
    code, _, err = poet("train --data data --run run --set", *TINY)
    assert code == 2 and "viper, adder" in err and "same order" in err


# ---- sigmas ----

def sigma_datasets(root: Path):
    "The same data with sigmas from four sources -> what they are."
    given = [.1, .2, .3, .4]
    make(root / "rule", [category(4)])
    make(root / "category", [category(4, sigmas=given)])
    shutil.copytree(root / "rule", root / "file")
    (root / "file/annotations/sigmas.json").write_text(json.dumps(dict(zip(NAMES[4], given))))
    return {"rule": ("", [.05, .035, .05, .05]), "category": ("", given), "file": ("sigmas.json", given)}


def test_sigmas_reach_every_score(poet, tmp_path):
    scores = {}
    for name, (file, sigmas) in sigma_datasets(tmp_path).items():
        extra = [f"data.sigmas={file}"] if file else []
        said = done(poet(f"train --data {name} --run run_{name} --set", *TINY, *extra))
        assert ("estimated for 4 joints (head 0.05, neck 0.035" in said) == (name == "rule")
        config = load_config(tmp_path / f"run_{name}")
        assert Skeleton.from_category(learnt(tmp_path / f"run_{name}")[0]).sigmas == tuple(sigmas)
        data, results = open_split(config.data, "val2017"), json.loads((tmp_path / f"run_{name}/predictions.json").read_text())
        expected = evaluate_keypoints(data.annotations_file, results, sigmas=sigmas, verbose=False)
        log = json.loads((tmp_path / f"run_{name}/metrics.jsonl").read_text().splitlines()[-1])["coco"]
        assert log == pytest.approx(expected)
        scores[name] = json.loads(poet(f"eval --run run_{name} --json --quiet")[1])
        assert load_ground_truth(data).sigmas == pytest.approx(sigmas) and data.skeleton.sigmas == tuple(sigmas)
    assert scores["category"] == scores["file"] and scores["category"]["AR50"] > scores["rule"]["AR50"], "wide sigmas forgive more"


def test_faulty_sigmas_are_refused(poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    for text, words in (("[.1", "not valid JSON"), ("[0.1]", "4 positive numbers"), ('{"head": 0.1}', "lack joint 'neck'"), ("3", "list of sigmas"), (None, "can't be read")):
        if text is not None: Path("s.json").write_text(text)
        code, _, err = poet("train --data data --run run --set", *TINY, f"data.sigmas={'s.json' if text else 'none.json'}")
        assert code == 2 and words in err and not (tmp_path / "run").exists(), err


def test_person_keeps_cocos_sigmas_to_the_last_bit_and_without_a_word(tmp_path):
    from pycocotools.cocoeval import COCOeval
    data = make(tmp_path / "data", [COCO_PERSON.to_category()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truth = load_ground_truth(open_coco(data))
    assert (truth.sigmas == COCOeval(iouType="keypoints").params.kpt_oks_sigmas).all() and open_coco(data).skeleton == COCO_PERSON


# ---- mirrors ----

@pytest.mark.parametrize("more, order", [({}, [0, 1, 2, 3]), (dict(flip_pairs=[[1, 4]]), [3, 1, 2, 0])])
def test_a_mirror_without_left_and_right_moves_joints_and_keeps_their_labels(more, order, tmp_path):
    data = open_coco(make(tmp_path / "data", [category(4, **more)]))
    image, target = data[0]
    flipped, mirrored = RandomFlip(data.skeleton, 1.)(image, target, torch.Generator().manual_seed(0))
    assert torch.equal(flipped, image.flip(-1))
    expected = target["keypoints"][:, order] * torch.tensor([-1., 1.]) + torch.tensor([64., 0.])
    assert torch.allclose(torch.as_tensor(mirrored["keypoints"]), torch.as_tensor(expected))


# ---- weights of another skeleton ----

def test_training_goes_on_from_a_run_with_other_joints_and_classes(poet, tmp_path):
    make(tmp_path / "people", [COCO_PERSON.to_category()])
    make(tmp_path / "dogs", [category(20, 3, "dog"), category(20, 4, "cat")])
    done(poet("train --data people --run people_run --quiet --set", *TINY))
    said = done(poet("train --data dogs --run dogs_run --init people_run --set train.lr=0.0000001 train.lr_backbone=0.0000001 train.warmup_steps=0"))
    assert "pose head: 15 of 20 joints (tail, left_paw, right_paw, spine0" in said and "class head: 2 classes instead of 1" in said
    old, new = build_poet(tmp_path / "people_run"), build_poet(tmp_path / "dogs_run")
    assert torch.allclose(old.query_embed.weight, new.query_embed.weight, atol=1e-3) and torch.allclose(old.backbone.body.conv1.weight, new.backbone.body.conv1.weight, atol=1e-3)
    rows = lambda m, k: m.kpt_embed.layers[2].weight[2 + 3 * k:5 + 3 * k]
    assert torch.allclose(rows(new, NAMES[20].index("left_ear")), rows(old, COCO_PERSON.keypoints.index("left_ear")), atol=1e-3)
    assert not any(torch.allclose(rows(new, 1), rows(old, k), atol=1e-3) for k in range(17)), "a tail is no joint of a person"
    assert new.categories and [c["name"] for c in new.categories] == ["dog", "cat"]
    new.save_pretrained(tmp_path / "sent")
    assert Poet.from_pretrained(tmp_path / "sent").categories == new.categories


def test_as_many_joints_are_not_the_same_joints(poet, tmp_path):
    make(tmp_path / "people", [COCO_PERSON.to_category()])
    animal = category(20) | dict(keypoints=NAMES[20][:17], skeleton=[])
    make(tmp_path / "dogs", [animal])
    done(poet("train --data people --run people_run --quiet --set", *TINY))
    assert "pose head: 12 of 17 joints" in done(poet("train --data dogs --run dogs_run --init people_run"))
    assert Skeleton.from_category(learnt(tmp_path / "dogs_run")[0]).keypoints == tuple(NAMES[20][:17])
    code, _, err = poet("eval --run people_run --data dogs --quiet")
    assert code == 2 and "are not those that the run has learnt (nose, left_eye" in err


def test_a_run_that_does_not_name_its_joints_says_what_they_are_taken_for(poet, tmp_path):
    make(tmp_path / "people", [COCO_PERSON.to_category()])
    make(tmp_path / "dogs", [category(20) | dict(keypoints=NAMES[20][:17], skeleton=[])])
    make(tmp_path / "worms", [category(4)])
    done(poet("train --data people --run people_run --quiet --set", *TINY))
    (tmp_path / "people_run/skeleton.json").unlink()
    assert "skeleton.json" not in done(poet("eval --run people_run --quiet"))
    code, _, err = poet("eval --run people_run --data dogs --quiet")
    assert code == 2 and "are not those that the run has learnt (nose, left_eye" in err and "no skeleton.json, so its 17 joints count as COCO's person's" in err
    assert "names its 17 joints, so they count as those of COCO's person" in done(poet("train --data dogs --run dogs_run --init people_run"))
    assert "skeleton.json" not in done(poet("train --data people --run again --init people_run"))
    done(poet("train --data worms --run worms_run --quiet --set", *TINY))
    assert "joint 1" not in done(poet("train --data worms --run a --init worms_run"))
    (tmp_path / "worms_run/skeleton.json").unlink()
    assert done(poet("train --data worms --run b --init worms_run")).count("joint 1 becomes joint 1 (head)") == 1


def test_a_skeleton_file_that_is_not_the_models_is_refused(poet, tmp_path):
    make(tmp_path / "data", [category(4)])
    done(poet("train --data data --run run --quiet --set", *TINY))
    for text, words in (("{", "skeleton.json"), (json.dumps(dict(categories=[category(20)])), "of 20 joints"), ("{}", "skeleton.json")):
        (tmp_path / "run/skeleton.json").write_text(text)
        code, _, err = poet("predict data/val2017 --run run")
        assert code == 2 and words in err
    (tmp_path / "run/skeleton.json").unlink()                                                      # as runs from before that file
    done(poet("predict data/val2017 --run run --threshold 0 --quiet"))
    assert json.loads(Path("predictions/predictions.json").read_text())["categories"][0]["keypoints"] == [f"joint_{k}" for k in range(4)]
