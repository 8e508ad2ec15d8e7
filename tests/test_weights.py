"""Weights of others: checkpoints of the authors' layout, DETR, MMPose, files behind an address, the hub; and what is refused."""
import json
import math
import pickle
import sys
import types
import warnings
import zipfile
from argparse import Namespace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.ops import FrozenBatchNorm2d

from poet_nb import poet, weights
from poet_nb.backbone import Backbone, load_backbone_weights, load_state_file, read_weights
from poet_nb.coco import Source
from poet_nb.coco_eval import to_coco_results
from poet_nb.config import CheckpointError, ConfigError, PoetError, load_config, override, preset
from poet_nb.poet import Poet, PostProcess, build_poet, count_parameters, load_weights, merge_nobody, save_weights
from poet_nb.transforms import pad_images

D, HEADS, FFN, K = 32, 8, 40, 17
SMALL = {"model.backbone": "resnet18", "model.hidden_dim": D, "model.dim_feedforward": FFN, "model.enc_layers": 1, "model.dec_layers": 2}


def named(shapes: dict, seed: int = 0) -> dict:
    "Random tensors, of a size that keeps activations of the order of one: weights by their inputs, norms near one."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda name, shape: torch.randn(shape, generator=generator) * (.1 if len(shape) == 1 else math.prod(shape[1:])**-.5) + (1 if "norm" in name and name.endswith("weight") else 0)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def detr_state(body=resnet18, queries=25, logits=3, enc=1, dec=2, head="kpt_embed", outputs=2 + 3 * K, channels=512, seed=0) -> dict:
    "A state dict of random tensors in DETR's layout, its names written out here."
    attention = {"in_proj_weight": (3 * D, D), "in_proj_bias": (3 * D,), "out_proj.weight": (D, D), "out_proj.bias": (D,)}
    norm = lambda n: {f"norm{n}.weight": (D,), f"norm{n}.bias": (D,)}
    ffn = {"linear1.weight": (FFN, D), "linear1.bias": (FFN,), "linear2.weight": (D, FFN), "linear2.bias": (D,)}
    layers = {"encoder": {f"self_attn.{k}": v for k, v in attention.items()} | ffn | norm(1) | norm(2),
              "decoder": {f"{a}.{k}": v for a in ("self_attn", "multihead_attn") for k, v in attention.items()} | ffn | norm(1) | norm(2) | norm(3)}
    shapes = {f"transformer.{part}.layers.{i}.{k}": v for part, n in (("encoder", enc), ("decoder", dec)) for i in range(n) for k, v in layers[part].items()}
    shapes |= {"transformer.decoder.norm.weight": (D,), "transformer.decoder.norm.bias": (D,), "query_embed.weight": (queries, D),
               "input_proj.weight": (D, channels, 1, 1), "input_proj.bias": (D,), "class_embed.weight": (logits, D), "class_embed.bias": (logits,)}
    shapes |= {f"{head}.layers.{i}.{k}": v for i, n in enumerate((D, D, outputs)) for k, v in (("weight", (n, D)), ("bias", (n,)))}
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.device("meta"): blocks = body(norm_layer=FrozenBatchNorm2d).state_dict()
    backbone = {}
    for name, tensor in blocks.items():
        uniform = torch.rand(tensor.shape, generator=generator)
        if name.startswith("fc."): continue
        if tensor.dim() == 4: backbone[name] = (uniform - .5) * (12 / math.prod(tensor.shape[1:]))**.5 * 1.4
        else: backbone[name] = uniform + .5 if "var" in name else (uniform - .5) * .2 + (.6 if name.endswith("weight") else 0)
    drawn = named(shapes, seed)
    for name, tensor in drawn.items(): # attention that prefers, queries that differ
        if "in_proj_weight" in name or name == "query_embed.weight": tensor.mul_(2 if "in_proj" in name else 6)
    return drawn | {f"backbone.0.body.{k}": v for k, v in backbone.items()}


def attention(state, prefix):
    "PyTorch's own attention with the tensors of a prefix."
    module = nn.MultiheadAttention(D, HEADS, batch_first=True).double().eval()
    module.load_state_dict({k: state[f"{prefix}.{k}"] for k in module.state_dict()})
    return lambda q, k, v, padding=None: module(q, k, v, key_padding_mask=padding, need_weights=False)[0]


def sines(height, width):
    "Positions (height * width, d) by the formula, number by number: half of them for y, half for x."
    out, half = torch.zeros(height, width, D, dtype=torch.float64), D // 2
    for y in range(height):
        for x in range(width):
            for begin, place in ((0, 2 * math.pi * (y + 1) / height), (half, 2 * math.pi * (x + 1) / width)):
                for i in range(half): out[y, x, begin + i] = (math.cos if i % 2 else math.sin)(place / 10000**(2 * (i // 2) / half))
    return out.flatten(0, 1)


def plain_forward(state, image, body):
    "The authors' network from paper and layout: of one image without padding its logits and vectors after each decoder layer."
    state = {k: v.double() for k, v in state.items()}
    linear = lambda name, x: x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    norm = lambda name, x: F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"])
    ffn = lambda name, x: linear(f"{name}.linear2", linear(f"{name}.linear1", x).relu())
    depth = lambda part: len({k.split(".")[3] for k in state if k.startswith(f"transformer.{part}.layers")})
    body = body.double().eval()
    body.load_state_dict({k.removeprefix("backbone.0.body."): v for k, v in state.items() if k.startswith("backbone.0.body.")}, strict=False)
    x = body.maxpool(body.relu(body.bn1(body.conv1(image[None].double()))))
    grid = F.conv2d(body.layer4(body.layer3(body.layer2(body.layer1(x)))), state["input_proj.weight"], state["input_proj.bias"])
    place, x, query = sines(*grid.shape[-2:])[None], grid.flatten(2).mT, state["query_embed.weight"][None]
    for i in range(depth("encoder")):
        p = f"transformer.encoder.layers.{i}"
        x = norm(f"{p}.norm1", x + attention(state, f"{p}.self_attn")(x + place, x + place, x))
        x = norm(f"{p}.norm2", x + ffn(p, x))
    memory, x, seen = x, torch.zeros_like(query), []
    for i in range(depth("decoder")):
        p = f"transformer.decoder.layers.{i}"
        x = norm(f"{p}.norm1", x + attention(state, f"{p}.self_attn")(x + query, x + query, x))
        x = norm(f"{p}.norm2", x + attention(state, f"{p}.multihead_attn")(x + query, memory + place, memory))
        x = norm(f"{p}.norm3", x + ffn(p, x))
        h = norm("transformer.decoder.norm", x)
        vector = linear("kpt_embed.layers.2", linear("kpt_embed.layers.1", linear("kpt_embed.layers.0", h).relu()).relu()).sigmoid()
        seen.append((linear("class_embed", h)[0], vector[0]))
    return seen


def written(path: Path, state: dict, **beside) -> Path:
    torch.save({"model": state, "epoch": 250, **beside}, path)
    return path


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    "A cache of its own, which a test that shall not use it leaves unmade."
    torch.manual_seed(0)
    monkeypatch.setenv("POET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def small() -> dict:
    "A small checkpoint's state dict; not to be changed."
    return detr_state()


# ---- the authors' checkpoint --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stride, queries, body, name", [(32, 25, resnet50, "resnet50"), (16, 50, resnet50, "resnet50"), (32, 50, resnet18, "resnet18")])
def test_a_checkpoint_gives_what_pytorchs_own_layers_give(tmp_path, stride, queries, body, name):
    state = detr_state(body, queries, enc=2, channels=2048 if body is resnet50 else 512)
    model = weights.load_official(written(tmp_path / "a.pth", state, args=Namespace(dilation5=stride == 16, dilation4=False, nheads=HEADS, lr=1e-4, output_dir="runs"))).double()
    m = model.config.model
    assert (m.stride, m.num_queries, m.backbone, m.hidden_dim, m.dim_feedforward, m.enc_layers, m.dec_layers, m.num_keypoints, m.num_classes, m.nheads) \
        == (stride, queries, name, D, FFN, 2, 2, K, 1, HEADS) and not model.training
    image, other = torch.randn(3, 40, 64), torch.randn(3, 70, 40) # in one batch each is padded
    with torch.no_grad():
        dc5 = dict(replace_stride_with_dilation=[False, False, True]) if stride == 16 else {}
        expected = plain_forward(state, image, body(norm_layer=FrozenBatchNorm2d, **dc5))
        alone = model(image.double())
    assert model.backbone(image[None].double()).shape[-2:] == (-(-40 // stride), 64 // stride)
    for ours, (logits, vector) in zip((*alone["aux_outputs"], alone), expected):
        joints = vector[:, 2:].view(queries, K, 3)
        torch.testing.assert_close(ours["pred_logits"][0].softmax(-1)[:, 0].double(), logits.softmax(-1)[:, 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours["pred_centers"][0].double(), vector[:, :2], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours["pred_offsets"][0].double(), 2 * (joints[..., :2] - .5), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours["pred_visibility"][0].double(), joints[..., 2], atol=1e-5, rtol=0)
    assert vector.std(0).max() > 1e-3 and (vector - expected[0][1]).abs().max() > .05, "queries and layers differ by far more than the tolerance"
    if stride == 32 and body is resnet18:
        with torch.no_grad(): assert model(pad_images([image.double(), other.double()]))["pred_logits"].shape == (2, queries, 2)


def test_every_tensor_of_a_checkpoint_reaches_the_model(small, tmp_path):
    model = weights.load_official(written(tmp_path / "a.pth", small), stride=32)
    ours = {k.replace("backbone.body.", "backbone.0.body."): v for k, v in model.state_dict().items()}
    for part in ("weight", "bias"): # person and no-object, and the class between them in the file's order: 0, 1, 2
        ours[f"class_embed.{part}"] = torch.cat([ours.pop(f"unposed_embed.{part}"), ours[f"class_embed.{part}"]])
    assert ours.keys() == small.keys() and all(torch.equal(v, small[k]) for k, v in ours.items())


def test_full_size_counts():
    with torch.device("meta"):
        for name in ("poet_r50", "poet_dc5_r50"):
            model = Poet(preset(name))
            model._load_from_state_dict({"unposed_embed.bias": torch.zeros(1), "unposed_embed.weight": torch.zeros(1, 256)}, "", {}, False, [], [], [])
            assert count_parameters(model) + sum(p.numel() for p in model.unposed_embed.parameters()) == 41_272_888


def test_any_of_both_names_loads_it(small, tmp_path):
    path = written(tmp_path / "a.pth", small)
    assert torch.equal(poet.load_official(path, stride=32).query_embed.weight, small["query_embed.weight"])
    assert torch.equal(poet.load_official(str(path), stride=16).query_embed.weight, small["query_embed.weight"])


@pytest.mark.parametrize("change", ["module", "bare", "state_dict", "counters", "half"])
def test_forms_that_files_of_this_layout_take(small, tmp_path, change):
    state = small
    if change == "module": state = {f"module.{k}": v for k, v in small.items()}
    if change == "counters": state = small | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(7), "backbone.0.body.fc.weight": torch.zeros(9, 9)}
    if change == "half": state = {k: v.half() for k, v in small.items()}
    torch.save({"bare": state, "state_dict": {"state_dict": state}}.get(change, {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": .1}]}}), tmp_path / "a.pth")
    model = weights.load_official(tmp_path / "a.pth", stride=32)
    assert model.input_proj.weight.dtype == torch.float32
    torch.testing.assert_close(model.input_proj.weight, small["input_proj.weight"], atol=1e-3, rtol=1e-3)


def test_a_safetensors_file_of_this_layout(small, tmp_path):
    from safetensors.torch import save_file
    save_file(small, tmp_path / "a.safetensors")
    assert torch.equal(weights.load_official(tmp_path / "a.safetensors", stride=32).input_proj.weight, small["input_proj.weight"])


# ---- its classes --------------------------------------------------------------------------------------------------------

def test_people_without_keypoints_are_exported_as_nothing():
    logits = torch.tensor([[[9., 0., 0.], [0., 9., 0.], [0., 0., 9.], [2., 3., 1.]]]) # of the file: without keypoints, person, none
    out = dict(pred_logits=merge_nobody(logits[..., 1:], logits[..., :1]), pred_centers=torch.full((1, 4, 2), .5),
               pred_offsets=torch.zeros(1, 4, K, 2), pred_visibility=torch.ones(1, 4, K))
    people = PostProcess()(out, torch.tensor([[100, 200]]))
    assert people[0]["labels"].tolist() == [0] * 4
    torch.testing.assert_close(people[0]["scores"], logits[0].softmax(-1)[:, 1])
    rows = to_coco_results([7], people)
    assert {r["category_id"] for r in rows} == {1} and [r["score"] > .5 for r in rows] == [False, True, False, True]


def test_merging_classes_is_exact_for_any_number_and_size():
    for seed in range(20):
        logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).double() * 10**(seed % 3)
        merged = merge_nobody(logits[:, [0, 1, 6]], logits[:, 2:6]).softmax(-1)
        torch.testing.assert_close(merged[:, :2], logits.softmax(-1)[:, :2])
        torch.testing.assert_close(merged[:, 2], logits.softmax(-1)[:, 2:].sum(-1))
    assert merge_nobody(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4]])).isfinite().all()


@pytest.mark.parametrize("logits, person, order", [(2, None, [0, 1]), (3, None, [1, 2, 0]), (3, 0, [0, 2, 1]), (4, 2, [2, 3, 0, 1])])
def test_class_counts_are_the_files(tmp_path, logits, person, order):
    state = detr_state(logits=logits)
    model = weights.load_official(written(tmp_path / "a.pth", state), stride=32, person=person)
    rows = [model.class_embed.bias] + ([model.unposed_embed.bias] if logits > 2 else [])
    assert torch.equal(torch.cat(rows), state["class_embed.bias"][order])


@pytest.mark.parametrize("logits, person", [(4, None), (3, 2), (3, 7), (3, -1), (1, None)])
def test_a_class_that_can_not_be_a_person(tmp_path, logits, person):
    path = written(tmp_path / "a.pth", detr_state(logits=logits))
    with pytest.raises(CheckpointError, match=rf"a.pth: class_embed.bias has {logits} logits.*person="): weights.load_official(path, stride=32, person=person)


def test_the_further_class_is_saved_copied_resumed_and_never_trained(small, tmp_path):
    model, image = weights.load_official(written(tmp_path / "a.pth", small), stride=32), torch.randn(1, 3, 64, 64)
    expected = model(image)["pred_logits"]
    save_weights(model, tmp_path / "b.safetensors")
    fresh = Poet(model.config).eval()
    load_weights(fresh, tmp_path / "b.safetensors")
    task = nn.ModuleDict({"poet": Poet(model.config).eval()}) # as training keeps its model
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])
    task.load_state_dict({f"poet.{k}": v for k, v in model.state_dict().items()})
    for twin in (fresh, task["poet"]): assert torch.equal(twin(image)["pred_logits"], expected)
    trainable = [p for p in task.parameters() if p.requires_grad]
    assert len(trainable) == len(optimizer.param_groups[0]["params"]), "made before loading, the optimiser has all that is trained"
    with pytest.raises(CheckpointError, match="unposed_embed.weight has shape"):
        state = dict(model.state_dict()); state["unposed_embed.weight"] = torch.zeros(2, D)
        torch.save(state, tmp_path / "c.pth"); load_weights(Poet(model.config), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="unposed_embed.weight is missing"):
        save_weights(Poet(model.config), tmp_path / "d.safetensors"); load_weights(fresh, tmp_path / "d.safetensors")


# ---- what is refused, by name -------------------------------------------------------------------------------------------

FAULTS = {
    "a tensor less": (lambda s: s.pop("transformer.decoder.layers.1.multihead_attn.in_proj_bias"), "multihead_attn.in_proj_bias is missing"),
    "a tensor more": (lambda s: s.update({"reference_points.weight": torch.zeros(2)}), "reference_points.weight is not part"),
    "another shape": (lambda s: s.update({"kpt_embed.layers.1.weight": torch.zeros(3, D)}), r"kpt_embed.layers.1.weight has shape \(3, 32\), expected \(32, 32\)"),
    "a deeper head": (lambda s: s.update({"kpt_embed.layers.3.bias": torch.zeros(3)}), "kpt_embed.layers.3.bias is not part"),
    "no poses": (lambda s: [s.pop(k) for k in list(s) if k.startswith("kpt_embed")], "kpt_embed.layers.2.bias is missing"),
    "no queries": (lambda s: s.pop("query_embed.weight"), "query_embed.weight is missing"),
    "no classes": (lambda s: s.pop("class_embed.bias"), "class_embed.bias is missing"),
    "no weights of classes": (lambda s: s.pop("class_embed.weight"), "class_embed.weight is missing"),
    "a number for a matrix": (lambda s: s.update({"query_embed.weight": torch.tensor(1.)}), "query_embed.weight .*no axis 0"),
    "half a pose": (lambda s: s.update({"kpt_embed.layers.2.bias": torch.zeros(52)}), r"has 52 numbers, which is not 2 \+ 3K"),
    "no backbone": (lambda s: [s.pop(k) for k in list(s) if k.startswith("backbone")], "backbone.body has .* blocks"),
    "a block less": (lambda s: [s.pop(k) for k in list(s) if k.startswith("backbone.0.body.layer3.1")], r"\(2, 2, 1, 2\) blocks"),
    "learned positions": (lambda s: s.update({"backbone.1.row_embed.weight": torch.zeros(50, 16)}), "backbone.1.row_embed.weight is not part"),
    "pre-norm": (lambda s: s.update({"transformer.encoder.norm.weight": torch.zeros(D)}), "transformer.encoder.norm.weight is not part"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_does_not_fit_is_named(small, tmp_path, fault):
    state, (spoil, said) = dict(small), FAULTS[fault]
    spoil(state)
    with pytest.raises(CheckpointError, match=f"(?s)bad.pth: .*{said}"): weights.load_official(written(tmp_path / "bad.pth", state), stride=32)


@pytest.mark.parametrize("args, options, said", [
    (None, {}, "does not tell its stride.*stride=32.*stride=16"), (Namespace(lr=1), {}, "does not tell its stride"), (Namespace(dilation=1), {}, "does not tell its stride"),
    (Namespace(dilation=True), dict(stride=32), "options say stride 16, not 32"), (Namespace(dilation=False, pre_norm=True), {}, "pre_norm"),
    (Namespace(dilation=False, position_embedding="learned"), {}, "position_embedding is 'learned'"),
    (Namespace(dilation5=True, dilation4=False), dict(stride=32), "options say stride 16, not 32"), (Namespace(dilation5=True, dilation4=True), dict(stride=16), "options say stride 8, not 16"),
    (Namespace(dilation5=False, dilation4=True), {}, "dilation4 is True")])
def test_options_that_are_missing_or_contradict(small, tmp_path, args, options, said):
    path = written(tmp_path / "a.pth", small, **({"args": args} if args else {}))
    with pytest.raises(CheckpointError, match=f"a.pth: .*{said}"): weights.load_official(path, **options)


def test_a_stride_that_no_backbone_has(small, tmp_path):
    with pytest.raises(ConfigError, match="model.stride: 7"): weights.load_official(written(tmp_path / "a.pth", small), stride=7)


class Touch:
    "Makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["args", "model", "inside the options"])
def test_code_in_a_checkpoint_is_refused_and_named(small, tmp_path, place):
    evil = Touch(tmp_path / "executed")
    content = {"model": small, "args": Namespace(dilation=False)} | ({"args": Namespace(dilation=evil)} if place == "inside the options" else {place: evil})
    torch.save(content, tmp_path / "bad.pth")
    for load in (weights.load_official, load_state_file, lambda path: build_poet("poet_r50", path)):
        with pytest.raises(CheckpointError, match="bad.pth: .*names .*pathlib.*could run code"): load(tmp_path / "bad.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="old.pth"): weights.load_official(tmp_path / "old.pth")
    assert not (tmp_path / "executed").exists()


def test_numpys_arrays_are_data_under_their_old_names_too(tmp_path):
    facts = {"sigmas": np.array([.026, .025]), "ids": np.arange(3), "names": np.array(["nose", "eye"]), "epoch": np.int64(3), "lr": np.float32(.5)}
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": facts}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for item in new.infolist(): old.writestr(item, new.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in (tmp_path / "old.pth").read_bytes()
    for name in ("new.pth", "old.pth"):
        meta = read_weights(tmp_path / name)["meta"]
        assert all(np.array_equal(meta[k], v) for k, v in facts.items()) and load_state_file(tmp_path / name)["a"].sum() == 2
    torch.save({"a": torch.ones(1), "b": np.array([Touch(tmp_path / "executed")], dtype=object)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="bad.pth"): read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


# ---- a start from others ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("queries, groups", [(25, 1), (25, 3), (60, 2)])
def test_detr_starts_all_but_the_heads(tmp_path, queries, groups):
    state = detr_state(queries=100, logits=92, head="bbox_embed", outputs=4)
    config = override(preset("poet_r50"), **SMALL, **{"model.num_queries": queries, "model.query_groups": groups})
    model = Poet(config)
    before, n = {k: v.clone() for k, v in model.state_dict().items()}, min(100, queries * groups)
    unused = weights.load_detr(model, written(tmp_path / "detr.pth", state))
    assert set(unused) == {k for k in state if k.startswith(("class_embed", "bbox_embed"))} | ({f"query_embed.weight[{n}:]"} if n < 100 else set())
    for name, tensor in model.state_dict().items():
        if name.startswith(("class_embed", "kpt_embed")): assert torch.equal(tensor, before[name]), name
        elif name == "query_embed.weight": assert torch.equal(tensor[:n], state[name][:n]) and torch.equal(tensor[n:], before[name][n:])
        else: assert torch.equal(tensor, state[name.replace("backbone.body", "backbone.0.body")]), name
    with pytest.warns(UserWarning, match="detr.pth: a DETR.*heads are random"): again = build_poet(config, tmp_path / "detr.pth")
    assert torch.equal(again.query_embed.weight[:n], state["query_embed.weight"][:n])


def test_a_detr_that_does_not_fit_changes_nothing(tmp_path):
    state = detr_state(queries=100, logits=92, head="bbox_embed", outputs=4)
    for changes, said in ((SMALL | {"model.enc_layers": 2}, "encoder.layers.1.self_attn.in_proj_weight is missing"), (SMALL | {"model.hidden_dim": 64}, "shape"),
                          (SMALL | {"model.backbone": "resnet34"}, "backbone.body.layer1.2.conv1.weight is missing")):
        model = Poet(override(preset("poet_r50"), **changes))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"detr.pth: .*{said}"): weights.load_detr(model, written(tmp_path / "detr.pth", state))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_backbones_of_others(small, tmp_path):
    trained, want = resnet18().state_dict(), small["backbone.0.body.layer3.1.conv2.weight"]
    files = {"mmpose": {"state_dict": {f"backbone.{k}": v for k, v in trained.items()} | {"keypoint_head.final_layer.bias": torch.zeros(K)}, "meta": {"sigmas": np.ones(K)}},
             "detr": {"model": small, "args": Namespace(dilation=False)}, "module": {f"module.{k}": v for k, v in trained.items()}}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        backbone = Backbone("resnet18")
        unused = load_backbone_weights(backbone, tmp_path / f"{name}.pth", "resnet18")
        assert torch.equal(backbone.body.layer3[1].conv2.weight, want if name == "detr" else trained["layer3.1.conv2.weight"])
        assert ("keypoint_head.final_layer.bias" in unused) == (name == "mmpose") and ("query_embed.weight" in unused) == (name == "detr")
    torch.save({k: v for k, v in trained.items()} | {"layer2.2.conv1.weight": torch.zeros(128, 128, 3, 3)}, tmp_path / "larger.pth")
    backbone = Backbone("resnet18")
    before = backbone.body.conv1.weight.clone()
    with pytest.raises(CheckpointError, match="larger.pth: of a larger ResNet.*layer2.2.conv1.weight"): load_backbone_weights(backbone, tmp_path / "larger.pth")
    assert torch.equal(backbone.body.conv1.weight, before)


# ---- build_poet ---------------------------------------------------------------------------------------------------------

def test_the_number_of_queries_is_the_files_for_a_preset_only(tmp_path, monkeypatch):
    monkeypatch.setattr(poet, "preset", lambda name: override(preset("poet_r50"), **SMALL))
    path = written(tmp_path / "a.pth", detr_state(queries=50))
    assert build_poet("poet_r50", path).config.model.num_queries == 50
    config = override(preset("poet_r50"), **SMALL)
    with pytest.raises(CheckpointError, match="a.pth: .*model.num_queries is 50, not 25.*load_official"): build_poet(config, path)
    assert build_poet(override(config, **{"model.num_queries": 50}), path).config == override(config, **{"model.num_queries": 50})


@pytest.mark.parametrize("change, said", [({"model.positions": "both"}, "model.positions is 'layers', not 'both'"), ({"model.query_groups": 2}, "model.query_groups is 1"),
                                          ({"model.backbone_norm": "batch"}, "model.backbone_norm"), ({"model.num_keypoints": 5}, "model.num_keypoints is 17, not 5")])
def test_a_configuration_of_another_network_is_refused(small, tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said): build_poet(override(preset("poet_r50"), **SMALL, **change), written(tmp_path / "a.pth", small))


def test_official_weights_are_looked_for_in_the_cache(small, home):
    config = override(preset("poet_r50"), **SMALL)
    with pytest.raises(CheckpointError, match="home.official.poet_r50.pth: no such file.*repository of the paper's authors.*put it there"): build_poet(config, "official")
    with pytest.raises(CheckpointError, match="poet_dc5_r50.pth.*stride 32. alone") as told: build_poet(override(config, **{"model.stride": 16}), "official")
    assert "zenodo" not in str(told.value)
    assert not home.exists()
    (home / "official").mkdir(parents=True)
    written(home / "official" / "poet_r50.pth", small)
    assert torch.equal(build_poet(config, "official").query_embed.weight, small["query_embed.weight"])


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert weights.cache_folder() == tmp_path / "home"
    monkeypatch.setenv("POET_HOME", "~/models")
    assert weights.cache_folder() == Path.home() / "models"
    monkeypatch.delenv("POET_HOME")
    assert weights.cache_folder() == Path.home() / ".cache" / "poet_nb"


# ---- downloads ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(serve):
    "files: path -> bytes; of each request in `cut` only so many bytes are sent; log: (path, Range)."
    state = types.SimpleNamespace(files={}, cut={}, log=[])

    def answer(handler):
        wanted, content, number = handler.headers.get("Range"), state.files.get(handler.path.split("?")[0]), len(state.log)
        state.log.append((handler.path, wanted))
        start = int(wanted[6:-1]) if wanted and content else 0
        handler.send_response(404 if content is None else 206 if start else 200)
        body = (content or b"")[start:]
        if start: handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:state.cut.get(number)])

    state.url = serve(answer)
    return state


QUICK = Source(retries=2, wait=.001, timeout=2, progress=False)


def test_an_address_is_downloaded_once_resumed_and_checked(small, tmp_path, home, server):
    content = written(tmp_path / "a.pth", small).read_bytes()
    server.files["/models/a.pth"], server.cut = content, {0: 100_000, 1: 50_000}
    checksum = sha256(content).hexdigest()
    config, url = override(preset("poet_r50"), **SMALL), f"{server.url}/models/a.pth?download=true#sha256={checksum.upper()}"
    path = weights.download_weights(url, QUICK)
    assert [wanted for _, wanted in server.log] == [None, "bytes=100000-", "bytes=150000-"] and path.read_bytes() == content
    assert path == home / "files" / f"{checksum[:12]}-a.pth" and [p.name for p in path.parent.iterdir()] == [path.name]
    assert torch.equal(build_poet(config, url).query_embed.weight, small["query_embed.weight"]) and len(server.log) == 3
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"{path.name} has SHA-256 .* instead of {checksum}; remove it"): build_poet(config, url)


def test_an_interrupted_download_goes_on_in_the_next_process(server):
    server.files["/a.pth"], server.cut = bytes(200_000), {0: 150_000} | dict.fromkeys(range(1, 9), 0)
    with pytest.raises(CheckpointError, match="connection ended early.*goes on where it stopped"): weights.download_weights(f"{server.url}/a.pth", QUICK)
    server.cut = {}
    assert weights.download_weights(f"{server.url}/a.pth", QUICK).read_bytes() == bytes(200_000) and server.log[-1][1] == "bytes=150000-"


@pytest.mark.parametrize("content, fragment, said", [
    (b"<!DOCTYPE html><p>Log in", "", "is a web page"), (b"\n <html>", "", "is a web page"), (b"", "", "is empty"), (b"weights", "#sha256=" + "0" * 64, "SHA-256 .* instead of 0000"),
    (None, "", "404")])
def test_what_is_not_the_file_is_not_kept(home, server, content, fragment, said):
    if content is not None: server.files["/a.pth"] = content
    with pytest.raises(CheckpointError, match=f"(?s){server.url}/a.pth: .*{said.replace('is a', 'a').replace('is e', 'e')}.*save it as .*files.*a.pth"):
        weights.download_weights(f"{server.url}/a.pth{fragment}", QUICK)
    assert not list(home.glob("files/*.pth"))


@pytest.mark.parametrize("fragment", ["sha256=12", "md5=" + "0" * 64, "sha256=" + "g" * 64, "readme"])
def test_a_checksum_that_is_none(fragment, home):
    with pytest.raises(CheckpointError, match="sha256= and 64"): build_poet("poet_tiny", f"http://127.0.0.1:9/a.pth#{fragment}")
    assert not home.exists()


def test_without_a_network_the_file_and_its_place_are_told(home):
    with pytest.raises(CheckpointError) as error: weights.download_weights("http://127.0.0.1:9/a.pth", QUICK)
    path = home / "files" / weights.cached_name("http://127.0.0.1:9/a.pth")[0]
    assert f"fetch http://127.0.0.1:9/a.pth by other means and save it as {path}" in str(error.value)
    path.write_bytes(b"by hand")
    assert weights.download_weights("http://127.0.0.1:9/a.pth", QUICK) == path


def test_names_in_the_cache_differ_and_stay_in_it(home):
    urls = ["http://a/x.pth", "http://b/x.pth", "http://a/x.pth#sha256=" + "0" * 64, "http://a/x.pth#sha256=" + "1" * 64, "http://a/", "http://a/%2e%2e/..", "http://a/b\\..\\c.pth"]
    names = [weights.cached_name(u)[0] for u in urls]
    assert len(set(names)) == len(urls) and all((home / n).parent == home and len(n) < 100 and "\\" not in n for n in names)


# ---- folders and the hub ------------------------------------------------------------------------------------------------

def test_what_is_saved_comes_back_from_a_folder(small, tmp_path):
    model, image = weights.load_official(written(tmp_path / "a.pth", small), stride=32), torch.randn(1, 3, 64, 64)
    assert model.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    for again in (Poet.from_pretrained(tmp_path / "new" / "folder"), weights.from_pretrained(str(tmp_path / "new" / "folder")), build_poet(tmp_path / "new" / "folder")):
        assert torch.equal(again(image)["pred_logits"], model(image)["pred_logits"]) and again.config == model.config and not again.training
    with pytest.raises(PoetError, match="revision"): Poet.from_pretrained(tmp_path / "new" / "folder", revision="v1")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="config.json"): Poet.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="nothing"): Poet.from_pretrained(tmp_path / "nothing")
    Poet(override(preset("poet_tiny"), **{"model.hidden_dim": 16})).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: no such file"): Poet.from_pretrained(tmp_path)


def test_an_address_is_one_however_it_is_written(monkeypatch):
    monkeypatch.setattr(weights, "download_weights", lambda url: f"downloaded {url}")
    for url in ("http://a.org/b.pth", "HTTPS://a.org/b.pth"): assert weights.find_weights(url) == f"downloaded {url}"


def test_without_the_package_the_hub_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = types.SimpleNamespace()
    for ask in (lambda: Poet.from_pretrained("owner/poet"), lambda: build_poet("poet_tiny", "owner/poet"), lambda: weights.push_to_hub(model, "owner/poet")):
        with pytest.raises(PoetError, match="owner/poet: .*pip install huggingface_hub"): ask()


def test_a_path_that_is_not_there_is_no_name_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for path in (Path("runs/none"), "runs/none.safetensors", "./runs/none", "a/b/c", "nothing"):
        with pytest.raises(CheckpointError, match="no such file"): build_poet("poet_tiny", path)


@pytest.fixture
def tiny():
    return Poet(override(preset("poet_tiny"), **{"model.hidden_dim": 16, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 1, "model.dim_feedforward": 16})).eval()


def test_what_the_hub_is_asked_for_and_sent(monkeypatch, tmp_path, tiny):
    "With a hub that is a folder: whatever version of its package is installed, or none."
    asked, tiny.config = [], override(tiny.config, **{"data.root": str(tmp_path / "faces")})

    def snapshot_download(repo, revision=None, allow_patterns=None):
        asked.append((repo, revision, allow_patterns))
        if not (tmp_path / repo).is_dir(): raise FileNotFoundError("404: no\nsuch repository")
        return str(tmp_path / repo)

    def upload_folder(repo_id, folder_path, commit_message):
        for file in Path(folder_path).iterdir(): (tmp_path / repo_id / file.name).write_bytes(file.read_bytes())
        return f"https://hub/{repo_id}/commit/1"

    def create_repo(repo, private=False, exist_ok=False):
        if repo.startswith("stranger/"): raise PermissionError("403")
        assert private and exist_ok
        (tmp_path / repo).mkdir(parents=True)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download, upload_folder=upload_folder, create_repo=create_repo))
    assert tiny.push_to_hub("owner/poet", private=True) == "https://hub/owner/poet/commit/1"
    again = Poet.from_pretrained("owner/poet", revision="v1")
    assert again.config == override(tiny.config, **{"data.root": "faces"}), "a path of this machine stays here"
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tiny.state_dict().items())
    assert asked == [("owner/poet", "v1", ["config.json", "model.safetensors", "skeleton.json"])]
    assert torch.equal(build_poet(again.config, "owner/poet").class_embed.weight, tiny.class_embed.weight)
    with pytest.raises(CheckpointError, match="owner/none: no such file or folder here, and the hub does not give it .FileNotFoundError: 404: no such repository"): Poet.from_pretrained("owner/none")
    with pytest.raises(PoetError, match="stranger/poet: not sent.*PermissionError.*logged in"): tiny.push_to_hub("stranger/poet")


def test_the_hubs_own_package_against_a_server_of_its_protocol(monkeypatch, tmp_path, tiny, serve):
    "The real package; the server answers as the hub does: the list of files of a commit, and each file with its ETag."
    hub = pytest.importorskip("huggingface_hub")
    commit, files = "0123456789abcdef0123456789abcdef01234567", {p.name: p.read_bytes() for p in tiny.save_pretrained(tmp_path / "saved").iterdir()} | {"README.md": b"not wanted"}
    asked = []

    def answer(handler):
        path = handler.path.split("?")[0]
        asked.append(path)
        name = path.rsplit("/", 1)[-1]
        body, code, more = b"{}", 404, {}
        if path.startswith("/api/models/owner/poet/revision/"):
            body, code = json.dumps(dict(id="owner/poet", modelId="owner/poet", sha=commit, private=False, tags=[], downloads=0, likes=0, siblings=[dict(rfilename=n) for n in files])).encode(), 200
        elif "/api/models/owner/poet/tree/" in path:
            body, code = json.dumps([dict(type="file", path=n, size=len(b), oid=sha256(b).hexdigest()[:40]) for n, b in files.items()]).encode(), 200
        elif path.startswith("/owner/poet/resolve/") and name in files:
            body, code, more = files[name], 200, {"ETag": f'"{sha256(files[name]).hexdigest()[:40]}"', "X-Repo-Commit": commit}
        handler.send_response(code)
        for k, v in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | more).items(): handler.send_header(k, v)
        handler.end_headers()
        if handler.command == "GET": handler.wfile.write(body)

    real, address = hub.snapshot_download, serve(answer)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: real(repo, endpoint=address, cache_dir=tmp_path / "cache", token=False, **options))
    again = Poet.from_pretrained("owner/poet", revision="main")
    with pytest.raises(CheckpointError, match="owner/none: .*the hub does not give it"): Poet.from_pretrained("owner/none")
    assert again.config == tiny.config and all(torch.equal(v, again.state_dict()[k]) for k, v in tiny.state_dict().items())
    assert not any(path.endswith("README.md") for path in asked), "only what a model needs is fetched"


def test_train_starts_from_an_address(tmp_path, serve, monkeypatch):
    "`poet train --init http://...`: downloaded once into the cache, then as any file."
    from poet_nb import cli
    from poet_nb.config import override, preset
    from poet_nb.poet import Poet, save_weights
    monkeypatch.setenv("POET_HOME", str(tmp_path / "home"))
    asked, config = [], override(preset("poet_tiny"), **{"model.hidden_dim": 16, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 1, "model.dim_feedforward": 16})
    save_weights(Poet(config), tmp_path / "small.safetensors")
    content = (tmp_path / "small.safetensors").read_bytes()

    def answer(request):
        asked.append(request.command)
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET": request.wfile.write(content)
    address = serve(answer) + "/small.safetensors"
    file = cli.weights_of(address)
    assert file.read_bytes() == content and file.is_relative_to(tmp_path / "home")
    assert cli.weights_of(address) == file and asked.count("GET") <= 2
    cli.build_poet(config, file)
    with pytest.raises(CheckpointError, match="official"): cli.weights_of(serve(lambda request: request.send_error(404)) + "/official.safetensors")


def test_training_from_weights_of_others_takes_the_preset_of_their_network(small, tmp_path, monkeypatch):
    from poet_nb import cli
    monkeypatch.chdir(tmp_path)
    save_weights(Poet(preset("poet_tiny")), tmp_path / "ours.safetensors")
    sources = dict(poet_tiny=["ours.safetensors", None], poet_r50=["official", str(written(tmp_path / "a.pth", small)), str(written(tmp_path / "b.pth", small, args=Namespace(dilation=False)))],
                   poet_dc5_r50=[str(written(tmp_path / "c.pth", small, args=Namespace(dilation=True)))])
    options = dict(run=tmp_path / "run", preset=None, config=None, resume=False, data=None, set=[], device=None)
    for name, inits in sources.items():
        for init in inits: assert cli.train_config(Namespace(init=init, **options)).name == name, init
    assert cli.train_config(Namespace(init="official", **options | dict(preset="poet_tiny"))).name == "poet_tiny"
    with pytest.raises(CheckpointError, match="poet_r50.pth: no such file.*zenodo"): cli.weights_of("official", 32)


def test_a_configuration_beside_weights_is_not_the_run(tmp_path, tiny):
    tiny.save_pretrained(tmp_path / "run")
    with pytest.warns(UserWarning, match="the weights are random; .*give the folder"): build_poet(tmp_path / "run" / "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_poet(str(tmp_path / "run" / "config.json"), tmp_path / "run" / "model.safetensors")
        (tmp_path / "run" / "model.safetensors").unlink()
        build_poet(str(tmp_path / "run" / "config.json"))


def test_a_mistyped_run_folder_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weights.is_hub_id("runs/typo")
    (tmp_path / "runs").mkdir()
    assert not weights.is_hub_id("runs/typo")
    with pytest.raises(CheckpointError, match="runs/typo: no such file or folder"): weights.find_weights("runs/typo")
