"""The quality head: off it changes nothing; on it learns the OKS of matched queries, alone, and its answer is in every score."""
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from test_engine import SMALL
from test_matching_loss import Count, make_batch

from poet_nb import cli
from poet_nb.config import CheckpointError, ConfigError, DataError, LossConfig, load_config, override, preset
from poet_nb.criterion import SetCriterion, query_slots
from poet_nb.engine import PoetLoss, fit, read_checkpoint, start_phase
from poet_nb.keypoints import COCO_PERSON, OKS_SIGMAS, oks
from poet_nb.matcher import HungarianMatcher, pack_targets, stack_outputs
from poet_nb.poet import Poet, PostProcess, build_poet, fit_state, save_weights
from poet_nb.synth import SynthConfig, make_synth
from poet_nb.weights import poet_from, start_from

pytestmark = pytest.mark.usefixtures("one_thread")
OFF = override(preset("poet_tiny"), **SMALL)
ON = override(OFF, **{"model.quality": True})
CPU = torch.device("cpu")


def batch(sizes, K=17, Q=25, L=3, seed=0, **kwargs):
    "Outputs with a quality head, and targets with size and area."
    outputs, targets = make_batch(sizes, Q=Q, K=K, L=L, dtype=torch.float32, **kwargs)
    g = torch.Generator().manual_seed(seed)
    for layer in (outputs, *outputs["aux_outputs"]): layer["pred_quality"] = torch.randn(len(sizes), Q, generator=g).requires_grad_()
    for t in targets: t |= dict(size=torch.tensor([120, 160]), area=500 + 2000 * torch.rand(len(t["labels"]), generator=g))
    return outputs, targets


def by_pairs(outputs, targets, loss, sigmas):
    "loss_quality of each layer, pair by pair, with COCO's own formula."
    layers, K = ([*outputs["aux_outputs"], outputs] if loss.aux_loss else [outputs]), outputs["pred_offsets"].shape[2]
    people, where = [(i, p) for i, t in enumerate(targets) for p in range(len(t["labels"]))], HungarianMatcher(loss)(stack_outputs(outputs, loss.aux_loss), pack_targets(targets, K, loss.visible))
    sums = [0.] * len(layers)
    for layer, image, query, t in zip(*(x.tolist() for x in (where.layer, where.image, where.query, where.target))):
        target, p, out = targets[image], people[t][1], layers[layer]
        seen = target["visibility"][p] > 0
        if not seen.any(): continue
        sides = target["size"].flip(0).float()
        found = (out["pred_centers"][image, query] + out["pred_offsets"][image, query]).detach() * sides
        d2 = (found - target["keypoints"][p] * sides).square().sum(-1)
        e = torch.exp(-d2 / (2 * target["area"][p] * (2 * torch.tensor(sigmas)) ** 2))[seen].mean().item()
        q = out["pred_quality"][image, query].sigmoid().item()
        sums[layer] += -(e * math.log(q) + (1 - e) * math.log(1 - q))
    return [s / max(len(people), 1) for s in sums]


@pytest.mark.parametrize("loss", [LossConfig.paper(), LossConfig.official(), LossConfig.official(visible="labelled"), LossConfig.paper(aux_loss=False)], ids=range(4))
def test_the_term_is_that_of_every_pair(loss):
    outputs, targets = batch([3, 0, 5, 1])
    targets[0]["visibility"][1] = 0                                                          # somebody without a labelled joint
    targets[2]["visibility"][2] = 1                                                          # and somebody whose joints are all covered
    with torch.no_grad():
        for layer in (outputs, *outputs["aux_outputs"]): layer["pred_offsets"].mul_(.1); layer["pred_centers"].mul_(.2).add_(.4)
        for t in targets: t["keypoints"].mul_(.2).add_(.4)                                   # near enough for an OKS
    got, want = SetCriterion(loss, 1, OKS_SIGMAS)(outputs, targets), by_pairs(outputs, targets, loss, OKS_SIGMAS)
    names = [f"loss_quality_{i}" for i in range(len(want) - 1)] + ["loss_quality"]
    assert [got[n].item() for n in names] == pytest.approx(want, rel=1e-4) and len(set(want)) == len(want)
    without = SetCriterion(loss, 1)(outputs, targets)
    assert got["loss"].item() == pytest.approx(without["loss"].item() + sum(want), rel=1e-5)
    assert all(torch.equal(without[n], got[n]) for n in without if n != "loss") and got.keys() - without.keys() == set(names)
    double = SetCriterion(replace(loss, quality_loss_coef=2.), 1, OKS_SIGMAS)(outputs, targets)
    assert double["loss"].item() == pytest.approx(without["loss"].item() + 2 * sum(want), rel=1e-5) and torch.equal(double["loss_quality"], got["loss_quality"])


def test_the_gradient_of_the_term_is_the_heads_alone():
    outputs, targets = batch([3, 0, 5, 1])
    layers = [outputs, *outputs["aux_outputs"]]
    leaves = [layer[name] for layer in layers for name in layer if name.startswith("pred_")]
    on, off = (torch.autograd.grad(SetCriterion(LossConfig.paper(), 1, s)(outputs, targets)["loss"], leaves, allow_unused=True) for s in (OKS_SIGMAS, None))
    for name, a, b in zip([name for layer in layers for name in layer if name.startswith("pred_")], on, off):
        assert (a.abs().sum() > 0 and b is None) if name == "pred_quality" else torch.equal(a, b), name
    matched = torch.zeros(len(layers) * 4 * 25, dtype=torch.bool)
    stacked = stack_outputs(outputs)
    matched[query_slots(HungarianMatcher(LossConfig.paper())(stacked, pack_targets(targets, 17)), stacked["pred_logits"].shape)] = True
    touched = torch.stack([on[i] for i, x in enumerate(leaves) if any(x is layer["pred_quality"] for layer in [*layers[1:], layers[0]])])
    order = [*range(1, len(layers)), 0]                                                      # earlier layers first
    assert torch.equal(touched[order].flatten() != 0, matched)


def test_nobody_and_nobody_with_joints():
    outputs, targets = batch([0, 0])
    result = SetCriterion(LossConfig.paper(), 1, OKS_SIGMAS)(outputs, targets); result["loss"].backward()
    assert result["loss_quality"] == 0 and (outputs["pred_quality"].grad == 0).all()
    outputs, targets = batch([2, 1])
    for t in targets: t["visibility"] = torch.zeros_like(t["visibility"])
    result = SetCriterion(LossConfig.paper(), 1, OKS_SIGMAS)(outputs, targets); result["loss"].backward()
    assert result["loss_quality"] == 0 and (outputs["pred_quality"].grad == 0).all() and result["loss"].isfinite()


def test_enlarging_the_image_changes_nothing():
    outputs, targets = batch([3, 2])
    larger = [t | dict(size=t["size"] * 3, area=t["area"] * 9) for t in targets]
    a, b = (SetCriterion(LossConfig.paper(), 1, OKS_SIGMAS)(outputs, t)["loss_quality"] for t in (targets, larger))
    assert torch.allclose(a, b)
    assert not torch.allclose(a, SetCriterion(LossConfig.paper(), 1, OKS_SIGMAS)(outputs, [t | dict(area=t["area"] * 9) for t in targets])["loss_quality"])


@pytest.mark.parametrize("field", ["size", "area"])
def test_targets_that_lack_what_oks_needs_are_named(field):
    outputs, targets = batch([2, 1])
    del targets[1][field]
    SetCriterion(LossConfig.paper(), 1)(outputs, targets)
    with pytest.raises(DataError, match=f"image 101: field '{field}'"): SetCriterion(LossConfig.paper(), 1, OKS_SIGMAS)(outputs, targets)
    targets[1][field] = torch.ones(7)
    with pytest.raises(DataError, match=f"image 101: field '{field}'"): SetCriterion(LossConfig.paper(), 1, OKS_SIGMAS)(outputs, targets)


@pytest.mark.parametrize("loss", [LossConfig.paper(), LossConfig.official()], ids=["paper", "official"])
def test_how_many_operations_it_launches(loss):
    counts = []
    for sizes in ([1], [3] * 16, [0, 2] * 64):
        outputs, targets = batch(sizes, L=6)
        for sigmas in (None, OKS_SIGMAS):
            with Count() as count: SetCriterion(loss, 1, sigmas)(outputs, targets)
            counts.append(sum(count.ops.values()))
            waits = [name for name in count.ops if name.split(".")[-1] in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "bincount", "index")]
            assert not waits, waits
    assert max(counts) <= 300 and max(b - a for a, b in zip(counts[::2], counts[1::2])) <= 80, counts
    assert max(counts[1::2]) - min(counts[1::2]) <= 8, counts                                # nothing grows with the batch


# the model --------------------------------------------------------------------------------------

def test_off_there_is_no_trace_of_it():
    torch.manual_seed(3); off = Poet(OFF).train(); state = torch.get_rng_state()
    torch.manual_seed(3); on = Poet(ON).train()
    assert not [k for k in off.state_dict() if "quality" in k] and [k for k in on.state_dict() if k not in off.state_dict()] == [f"quality_embed.layers.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")]
    assert all(torch.equal(v, on.state_dict()[k]) for k, v in off.state_dict().items()) and not torch.equal(state, torch.get_rng_state())
    images = torch.randn(2, 3, 48, 48)
    a, b = off(images), on(images)
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("pred_")) and set(b) - set(a) == {"pred_quality"} and list(a) == ["pred_logits", "pred_centers", "pred_offsets", "pred_visibility", "aux_outputs"]
    people = PostProcess()(a, torch.tensor([[48, 48]] * 2))
    assert torch.equal(people[0]["scores"], a["pred_logits"].softmax(-1)[0, :, 0])
    judged = PostProcess()(b, torch.tensor([[48, 48]] * 2))
    assert torch.allclose(judged[0]["scores"], people[0]["scores"] * b["pred_quality"][0].sigmoid() ** .5)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(people, judged) for k in ("labels", "keypoints"))


def test_float32_inside_autocast():
    on = Poet(ON).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): found = on.heads(torch.randn(2, 1, 6, 16).bfloat16())
    assert all(layer["pred_quality"].dtype == torch.float32 for layer in found)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_trains_the_head_by_its_term_alone(groups):
    losses, grads = {}, {}
    for name, config in dict(off=OFF, on=ON).items():
        config = override(config, **{"model.query_groups": groups})
        torch.manual_seed(0); model = Poet(config).train()
        targets = [dict(image_id=torch.tensor(i), labels=torch.zeros(i + 1, dtype=torch.int64), keypoints=torch.rand(i + 1, 17, 2, generator=torch.Generator().manual_seed(i)),
                        visibility=torch.full((i + 1, 17), 2), size=torch.tensor([48, 48]), area=torch.full((i + 1,), 900.)) for i in range(2)]
        losses[name] = PoetLoss(model, config)(torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(9)), targets)
        losses[name]["loss"].backward()
        grads[name] = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(v, losses["on"][k]) for k, v in losses["off"].items() if k != "loss") and losses["on"]["loss_quality"] > 0
    assert all(torch.equal(v, grads["on"][k]) for k, v in grads["off"].items()) and all(grads["on"][k].abs().sum() > 0 for k in grads["on"] if k.startswith("quality_embed."))


def test_refused():
    with pytest.raises(ConfigError, match="model.quality.*ae"): override(preset("ae_r50"), **{"model.quality": True})


# weights ----------------------------------------------------------------------------------------

def test_weights_with_and_without(tmp_path):
    off, on = Poet(OFF).eval(), Poet(ON).eval()
    save_weights(off, tmp_path / "off.safetensors"); save_weights(on, tmp_path / "on.safetensors")
    with pytest.raises(CheckpointError, match="quality_embed.layers.0.weight is missing"): poet_from(tmp_path / "off.safetensors", ON)
    with pytest.raises(CheckpointError, match="quality_embed.layers.0.weight is not part of this model"): poet_from(tmp_path / "on.safetensors", OFF)
    model, told = start_from(tmp_path / "off.safetensors", ON)
    assert told == ["quality head"] and all(torch.equal(v, model.state_dict()[k]) for k, v in off.state_dict().items())
    same, told = start_from(tmp_path / "on.safetensors", ON)
    assert told == [] and all(torch.equal(v, same.state_dict()[k]) for k, v in on.state_dict().items())
    with pytest.warns(UserWarning, match="quality head is left out"): less, told = start_from(tmp_path / "on.safetensors", OFF)
    assert told == [] and less.quality_embed is None and all(torch.equal(v, on.state_dict()[k]) for k, v in less.state_dict().items())
    more, told = start_from(tmp_path / "on.safetensors", override(ON, **{"model.num_keypoints": 5}))  # other joints: the head, whose input is the same, is kept
    assert len(told) == 1 and "joints" in told[0] and torch.equal(more.quality_embed.layers[1].weight, on.quality_embed.layers[1].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "saved")
        again = Poet.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


# runs -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for split, n in (("train2017", 13), ("val2017", 5)): make_synth(root, split, n=n, config=SynthConfig(size=64), seed=1, progress=False)
    return root


FREEZE = ["backbone", "input_proj", "transformer", "query_embed", "class_embed", "kpt_embed"]


def test_a_run_that_begins_without_it(scenes, tmp_path, capsys):
    changes = {"data.root": str(scenes), "train.pretrain_epochs": 0}
    fit(override(OFF, **changes), tmp_path / "off", progress=False)
    words = [f"{k}={json.dumps(v) if isinstance(v, (list, bool)) else v}" for k, v in (SMALL | changes | {"model.quality": True, "train.freeze": FREEZE}).items()]
    assert cli.main(["train", "--preset", "poet_tiny", "--init", str(tmp_path / "off"), "--run", str(tmp_path / "on"), "--set", *words]) == 0
    assert "new ones for quality head" in capsys.readouterr().out
    before, after = build_poet(tmp_path / "off"), build_poet(tmp_path / "on")
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items()) and after.config.model.quality
    lines = [json.loads(l) for l in (tmp_path / "on/metrics.jsonl").read_text().splitlines()]
    assert all("loss_quality" in line[part] for line in lines for part in ("train", "val")) and lines[-1]["train"]["loss_quality"] < lines[0]["train"]["loss_quality"]


def test_stopped_and_gone_on_with(scenes, tmp_path, monkeypatch):
    "With pre-training and query groups; the resumed run ends as the one that was not stopped."
    config = override(ON, **{"data.root": str(scenes), "train.pretrain_epochs": 1, "model.query_groups": 2, "train.ema_decay": .9})
    whole = fit(config, tmp_path / "whole", progress=False)
    class Enough(Exception): pass
    def stop(phase, line):
        if phase == "poet": raise Enough
    with pytest.raises(Enough): fit(config, tmp_path / "parts", progress=False, after_epoch=stop)
    assert read_checkpoint(tmp_path / "parts")["epoch"] == 1
    parts = fit(config, tmp_path / "parts", resume=True, progress=False)
    plain = lambda log: [{k: v for k, v in line.items() if k != "seconds"} for line in log]
    assert plain(whole) == plain(parts) and "loss_quality_0" in whole[0]["train"]
    with pytest.raises(CheckpointError, match="model.quality: True -> False"): fit(override(config, **{"model.quality": False, "train.epochs": 2}), tmp_path / "parts", resume=True, progress=False)


def test_sigmas_are_those_of_the_data(scenes):
    config = override(ON, **{"data.root": str(scenes)})
    model = Poet(config)
    model.categories = [COCO_PERSON.to_category() | dict(sigmas=[.3] * 17)]
    assert start_phase("poet", model, config, CPU).task.criterion.sigmas.tolist() == pytest.approx([.3] * 17)


def test_an_exported_file_scores_as_the_model(tmp_path):
    pytest.importorskip("onnx"); pytest.importorskip("onnxruntime"); pytest.importorskip("onnxscript")
    from poet_nb.export import check_export, export_onnx, load_onnx
    from poet_nb.predict import predict
    model = build_poet(override(preset("poet_tiny"), **{"model.quality": True, "model.enc_layers": 1, "model.dec_layers": 2}))
    model.categories = [COCO_PERSON.to_category()]
    file = load_onnx(export_onnx(model, tmp_path / "judging.onnx"), threads=1)
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    ours, theirs = predict(model, image, threshold=0.)[0], file.predict(image, threshold=0.)[0]
    assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-4) and ours["scores"].max() > 0
    plain = build_poet(override(model.config, **{"model.quality": False})); fit_state(plain, {k: v for k, v in model.state_dict().items() if "quality" not in k}, "a model")
    assert (predict(plain, image, threshold=0.)[0]["scores"] - ours["scores"]).abs().max() > 1e-2
    check_export(model, file)
