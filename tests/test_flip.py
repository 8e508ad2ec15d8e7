"The flip test: poses of an image and of its mirror image put together; through library, evaluation and command."
import copy
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretend_gpu
from poet_nb.config import ConfigError, DataConfig, ModelConfig, override, preset, replace
from poet_nb.engine import choose_device, evaluate, flip_order, merge_mirrored, mirrored
from poet_nb.keypoints import COCO_PERSON, Skeleton
from poet_nb.poet import build_poet, new_network
from poet_nb.predict import PredictOptions, predict, predict_batch, stream_predictions
from poet_nb.synth import SynthConfig, make_synth, render_scene
from poet_nb.transforms import NestedTensor, pad_images

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = replace(preset("poet_tiny"), model=ModelConfig(backbone="resnet_tiny", stride=16, hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2, dim_feedforward=16, num_queries=25, num_keypoints=17, frozen_stages=0),
                data=DataConfig(scales=(64,), eval_scale=64, max_size=96, pad_multiple=16))
RUN = Path(__file__).resolve().parents[1] / "data/runs/tiny"
HANDS = Skeleton("hands", ("left", "right"), ((0, 1),), ((0, 1),), (.1, .1))


class Hands(torch.nn.Module):
    "Finds the bright pixels of each image, the left hand at the right and the right one at the left; `bias` (fractions of the width) to the right of where they are."
    skeleton = HANDS
    def __init__(self, bias=0., scores=(2., 0.)):
        super().__init__()
        self.bias, self.zero, self.logits = bias, torch.nn.Parameter(torch.zeros(1)), torch.tensor([[s, 0.] for s in scores])

    def forward(self, samples):
        points = []
        for image, (h, w) in zip(samples.tensors, samples.sizes().tolist()):
            y, x = (image[0, :h, :w] > 2).nonzero().T
            ends = torch.stack([x.argmax(), x.argmin()])
            points.append(torch.stack([(x[ends] + .5) / w + self.bias, (y[ends] + .5) / h], -1))
        points = torch.stack(points)[:, None].expand(-1, 2, -1, -1)
        centers = points.mean(2)
        return dict(pred_logits=self.logits.expand(len(points), 2, 2), pred_centers=centers, pred_offsets=points - centers[:, :, None], pred_visibility=torch.ones(points.shape[:3]), aux_outputs=[])


def hands(height, width, left, right):
    "A black image with two bright pixels, (x, y) each."
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x, y in (left, right): image[:, y, x] = 255
    return image


def found(poses, scores, labels=None):
    return dict(scores=torch.tensor(scores), labels=torch.tensor(labels or [0] * len(scores)), keypoints=torch.tensor(poses, dtype=torch.float32).reshape(len(scores), -1, 3))


def test_merging_by_hand():
    "An image 100 wide; the mirrored answer comes in another order, and one of its people is nobody's partner."
    plain = found([[[20, 10, .5], [10, 30, .5]], [[70, 10, 1], [50, 10, 1]]], [.6, .9])
    other = found([[[49, 12, 0], [31, 10, 1]], [[5, 90, 1], [5, 60, 1]], [[90, 32, 1], [80, 12, 1]]], [.3, .9, .2])      # mirrored back and relabelled: (69, 10), (51, 12); ...; (20, 12), (10, 32)
    merged = merge_mirrored(plain, other, 100, (1, 0))
    assert torch.allclose(merged["keypoints"][0], torch.tensor([[20, 10.5, .625], [10, 30.5, .625]]))                      # a quarter of the way: .2 / (.6 + .2)
    assert torch.allclose(merged["keypoints"][1], torch.tensor([[69.75, 10, 1], [50.25, 10.5, .75]]))
    assert merged["scores"] is plain["scores"] and merged["labels"] is plain["labels"] and plain["keypoints"][0, 0, 2] == .5


def test_what_is_paired():
    "The surer of two poses at one place is the partner; neither what is far away, nor of another label, nor no number."
    plain = found([[[10, 10, 1], [10, 30, 1]]], [.9])
    back = lambda *rows: found([[[100 - x, y, 1] for x, y in row] for row in rows], [.9, .1][:len(rows)], None)
    near, far, shifted = [(12, 30), (12, 10)], [(16, 30), (16, 10)], [(10, 31), (10, 11)]
    at = lambda other: merge_mirrored(plain, other, 100, (1, 0))["keypoints"][0, 0, :2].tolist()
    assert at(back(near)) == pytest.approx([11, 10]) and at(back(near, shifted)) == pytest.approx([11, 10])
    assert at(back(far)) == [10, 10] and at(back(near) | dict(labels=torch.tensor([1]))) == [10, 10]
    assert at(found([[[float("nan")] * 3] * 2], [.9])) == [10, 10]
    assert at({k: v[:0] for k, v in back(near).items()}) == [10, 10]
    nobody = {k: v[:0] for k, v in plain.items()}
    assert len(merge_mirrored(nobody, back(near), 100, (1, 0))["scores"]) == 0
    point = found([[[10, 10, 1], [10, 10, 1]]], [0.])                                                # no size, no score
    assert torch.equal(merge_mirrored(point, found([[[90, 10, 1], [90, 10, 1]]], [0.]), 100, (1, 0))["keypoints"], point["keypoints"])


def test_a_batch_is_mirrored_image_by_image():
    torch.manual_seed(0)
    batch = pad_images([torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((5, 8), (7, 3), (2, 6))], 4)
    other = mirrored(batch)
    assert torch.equal(other.mask, batch.mask) and torch.equal(mirrored(other).tensors, batch.tensors)
    for image, back, (h, w) in zip(batch.tensors, other.tensors, batch.sizes().tolist()):
        assert torch.equal(back[:, :h, :w], image[:, :h, :w].flip(-1)) and not back[:, :, w:].any()


@pytest.mark.parametrize("bias", [0., .02])
def test_padding_does_not_matter(bias):
    "Images of different sizes in one padded batch, as each alone; what leans to the right leans no more."
    images, sizes = [hands(40, 64, (50, 10), (12, 20)), hands(64, 30, (20, 50), (3, 7))], torch.tensor([[80, 128], [64, 30]])
    model = Hands(bias)
    together = predict_batch(model, pad_images(images, 16), sizes, flip_test=True)
    for image, size, one, at in zip(images, sizes, together, ([[101, 21], [25, 41]], [[20.5, 50.5], [3.5, 7.5]])):
        alone = predict_batch(model, pad_images([image], 16), size[None], flip_test=True)[0]
        torch.testing.assert_close(one, alone)
        torch.testing.assert_close(one["keypoints"][0, :, :2], torch.tensor(at, dtype=torch.float32))
        plain = predict_batch(model, pad_images([image], 1), size[None])[0]
        assert torch.equal(plain["scores"], one["scores"])
        assert (plain["keypoints"] - one["keypoints"])[..., 0].abs().max().item() == pytest.approx(bias * size[1].item(), abs=1e-4)


def test_predictions_do_not_depend_on_their_company():
    model, scene = build_poet(RUN), render_scene(SynthConfig(), seed=1)[0]
    crops = [scene, scene[:200], scene[:, :180], scene[:, 50:], scene[:200, ::-1].copy()]
    together = predict(model, crops, threshold=0., batch_size=3, flip_test=True)
    plain = predict(model, crops, threshold=0., batch_size=3)
    for crop, one, before in zip(crops, together, plain):
        alone = predict(model, crop, threshold=0., flip_test=True)[0]
        for key in one: assert (one[key] - alone[key]).abs().max() < 2e-3
        assert torch.equal(one["scores"], before["scores"]) and torch.equal(one["labels"], before["labels"]) and not torch.equal(one["keypoints"], before["keypoints"])
    first = [f["keypoints"] for *_, f in stream_predictions(model, crops, PredictOptions(0., layer=1, flip_test=True))]
    assert not torch.equal(first[0], together[0]["keypoints"])


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_same_on_a_pretended_gpu(device, monkeypatch):
    model, pictures = build_poet(RUN), [render_scene(SynthConfig(), seed=i)[0] for i in range(3)]
    whole = predict(model, pictures, threshold=0., flip_test=True)
    with pretend_gpu.gpu(monkeypatch, device): there = predict(copy.deepcopy(model), pictures, threshold=0., device=device, flip_test=True)
    for a, b in zip(whole, there):
        for key in a: assert torch.equal(a[key], b[key])


def test_where_left_and_right_are_not_known(tmp_path):
    class Plain(Hands): skeleton = None
    image = hands(32, 32, (20, 5), (5, 5))
    with pytest.raises(ConfigError, match="without a skeleton"): predict(Plain(), image, flip_test=True)
    five = build_poet(override(SMALL, **{"model.num_keypoints": 5}))
    with pytest.raises(ConfigError, match="which joints of .* are left and right is not known; add flip_pairs"): five.predict(image, flip_test=True)
    assert flip_order(five, Skeleton("star", tuple("abcde"), (), ((0, 4),), (.1,) * 5)) == (4, 1, 2, 3, 0)               # the data know
    five.categories = [Skeleton("fish", tuple("abcde"), (), ((1, 2),), (.1,) * 5).to_category()]
    assert flip_order(five, Skeleton("star", tuple("abcde"), (), ((0, 4),), (.1,) * 5)) == (0, 2, 1, 3, 4) == flip_order(five)   # the model knows better
    assert flip_order(build_poet(SMALL)) == COCO_PERSON.flip_permutation
    for flip in (True, False):
        with pytest.raises(ConfigError, match=f"ae.flip_test, which is {str(flip).lower()}"): flip_order(new_network(override(preset("ae_r50"), **{"ae.flip_test": flip})))


# ---- the command

@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_synth(root, "val2017", 5, SynthConfig(), seed=1, workers=1, progress=False)
    return root


def test_evaluation_scores_what_is_predicted(data):
    "Its losses are those of the plain images; its results are the predictions, rounded."
    model = build_poet(RUN)
    (_, plain, before), (_, losses, results) = (evaluate(model, override(model.config, **{"data.root": str(data), "data.workers": 0, "train.amp": "none"}), choose_device("cpu"), progress=False, flip_test=flip) for flip in (False, True))
    assert plain == losses and [r["score"] for r in before] == [r["score"] for r in results] and before != results
    files = sorted((data / "val2017").iterdir())
    for file, one in zip(files, predict(model, files, threshold=0., flip_test=True), strict=True):
        mine, sure = sorted((r for r in results if r["image_id"] == int(file.stem)), key=lambda r: -r["score"]), one["scores"] > .5
        mine = mine[:int(sure.sum())]
        assert len(mine) == sure.sum() and [r["score"] for r in mine] == pytest.approx(one["scores"][sure].tolist(), abs=1e-3)
        rows = np.array([r["keypoints"] for r in mine]).reshape(len(mine), 17, 3)[..., :2]
        assert np.abs(rows - one["keypoints"][sure][..., :2].numpy()).max(initial=0) < .06


def test_eval(poet, data):
    outs = {}
    for name, words in dict(plain=(), flipped=("--flip-test",), first=("--flip-test", "--layer", 1)).items():
        code, out, _ = poet("eval", "--run", RUN, "--data", data, "--set", "data.workers=0", "--quiet", "--json", "--joints", "0", "--out", f"{name}.json", *words)
        assert code == 0 and len(json.loads(out)["joints"]) == 18
        outs[name] = json.loads(Path(f"{name}.json").read_text())
    assert [r["score"] for r in outs["plain"]] == [r["score"] for r in outs["flipped"]]
    assert [r["keypoints"] for r in outs["plain"]] != [r["keypoints"] for r in outs["flipped"]] != [r["keypoints"] for r in outs["first"]]
    code, _, err = poet("eval", "--results", "plain.json", "--annotations", "plain.json", "--flip-test")
    assert code == 2 and "--flip-test and --results: give one of the two" in err


def test_predict(poet):
    Image.fromarray(render_scene(SynthConfig(), seed=1)[0]).save("a.png")
    assert poet("predict", "a.png", "--run", RUN, "--quiet", "--threshold", 0, "--flip-test", "--out", "out")[0] == 0
    wanted = build_poet(RUN).predict("a.png", threshold=0., flip_test=True)[0]
    people = json.loads(Path("out/predictions.json").read_text())["annotations"]
    assert [a["keypoints"] for a in people] == pytest.approx(wanted["keypoints"].flatten(1).numpy(), abs=.01)


def test_the_zip_for_the_server(poet, data, tmp_path):
    shutil.copytree(data, tmp_path / "coco")
    (tmp_path / "coco/val2017").rename(tmp_path / "coco/test2017")
    images = json.loads((data / "annotations/person_keypoints_val2017.json").read_text())["images"]
    (tmp_path / "coco/annotations/image_info_test-dev2017.json").write_text(json.dumps(dict(images=images, categories=[])))
    rows = []
    for flip in ((), ("--flip-test",)):
        assert poet("eval", "--run", RUN, "--data", tmp_path / "coco", "--split", "test-dev", "--out", f"up{len(flip)}", "--quiet", *flip)[0] == 0
        with zipfile.ZipFile(next(Path(f"up{len(flip)}").iterdir())) as file: rows.append(json.loads(file.read(file.namelist()[0])))
    plain, flipped = rows
    assert [r["score"] for r in plain] == [r["score"] for r in flipped] and [r["keypoints"] for r in plain] != [r["keypoints"] for r in flipped]


def test_refused_before_anything_is_written(poet, tmp_path):
    build_poet(override(SMALL, **{"model.num_keypoints": 5})).save_pretrained(tmp_path / "five")
    new_network(override(SMALL, **{"model.method": "ae", "model.stride": 8, "model.backbone_norm": "batch"})).save_pretrained(tmp_path / "ae")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("a.png")
    for name, words in (("five", "left and right is not known"), ("ae", "ae.flip_test, which is true")):
        code, _, err = poet("predict", "a.png", "--run", tmp_path / name, "--flip-test", "--out", "out", "--quiet")
        assert code == 2 and len(err.splitlines()) == 1 and re.search(words, err) and not os.path.exists("out")
