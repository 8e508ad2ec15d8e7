"Exported files: equal to the model at many sizes, with padding; usable without torch; errors that say what to do."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from poet_nb import cli, export
from poet_nb.config import CheckpointError, ConfigError, PoetError, override, preset
from poet_nb.export import TOLERANCE, DeployedPoet, bake_batchnorm, check_export, check_target, describe, export_onnx, export_program, load_onnx, load_program, outside, trace
from poet_nb.keypoints import Skeleton
from poet_nb.poet import PostProcess, build_poet
from poet_nb.predict import predict
from poet_nb.transforms import NestedTensor, normalize

onnx, onnxruntime, _ = (pytest.importorskip(name) for name in ("onnx", "onnxruntime", "onnxscript"))
ROOT = Path(__file__).resolve().parents[1]
BEAST = Skeleton("beast", ("head", "tail", "left_paw", "right_paw", "back"), ((0, 4), (4, 1)), ((2, 3),), (.05,) * 5)
THIN = override(preset("poet_r50"), **{"model.backbone": "resnet18", "model.hidden_dim": 64, "model.nheads": 4, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 64,
                                       "model.num_queries": 9, "model.num_classes": 3, "model.num_keypoints": 5, "data.eval_scale": 64, "data.max_size": 96, "data.root": "/data/somebody/photos"})
SHAPES = [(1, 33, 33), (1, 64, 64), (2, 97, 50), (3, 128, 224), (5, 45, 160), (1, 400, 300), (2, 353, 1066)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def thin():
    "Random weights and statistics, three classes and two more without a pose, five joints; not to be changed."
    torch.manual_seed(0)
    model = build_poet(THIN)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, FrozenBatchNorm2d): m.running_mean.normal_(0, .2), m.running_var.uniform_(.5, 2), m.weight.uniform_(.5, 1.5), m.bias.normal_(0, .2)
    model.load_state_dict(model.state_dict() | {"unposed_embed.weight": torch.randn(2, 64), "unposed_embed.bias": torch.randn(2)})
    model.categories = [replace(BEAST, name=name).to_category(i) for i, name in enumerate(("lion", "bear", "wolf"), 1)]
    return model


@pytest.fixture(scope="module")
def files(thin, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return dict(onnx=export_onnx(thin, folder / "thin.onnx"), pt2=export_program(thin, folder / "thin.pt2"))


@pytest.fixture(scope="module")
def loaded(files): return dict(onnx=load_onnx(files["onnx"], threads=1), pt2=load_program(files["pt2"]))


@pytest.fixture(params=["onnx", "pt2"])
def exported(request, loaded): return loaded[request.param]


def batch(B, H, W, seed=0):
    "Noise, the first image as large as the batch, the others smaller, one of them a single pixel."
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.stack([torch.randint(1, side + 1, (B,), generator=generator) for side in (H, W)], 1)
    sizes[0] = torch.tensor([H, W])
    if B > 2: sizes[-1] = 1
    return torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8, generator=generator), sizes


def eager(model, images, sizes):
    "The model itself, with a mask of pixels, and its own post-processing in fractions."
    mask = torch.ones(len(images), *images.shape[2:], dtype=torch.bool)
    for padding, (h, w) in zip(mask, sizes.tolist()): padding[:h, :w] = False
    with torch.no_grad(): found = PostProcess()(model(normalize(NestedTensor(images, mask))), torch.ones(len(images), 2))
    return [torch.stack([image[name] for image in found]) for name in ("scores", "labels", "keypoints")]


def assert_equal(found, wanted):
    assert [tuple(a.shape) for a in found] == [tuple(b.shape) for b in wanted] and [a.dtype for a in found] == [torch.float32, torch.int64, torch.float32]
    assert torch.equal(found[1], wanted[1])
    for a, b in zip(found, wanted): assert (a - b).abs().max() < TOLERANCE


# ---- equal to the model ----

def test_equal_to_the_model_at_every_size(thin, exported):
    for shape in SHAPES:
        images, sizes = batch(*shape)
        assert_equal(exported.run(images, sizes), eager(thin, images, sizes))


def test_the_comparison_would_notice(thin, exported):
    images, sizes = batch(2, 128, 97)
    wanted = eager(thin, images, sizes)
    for wrong in ((images, sizes.flip(1).clamp(max=97)), (images.flip(1), sizes), (255 - images, sizes)):
        assert max((a - b).abs().max() for a, b in zip(exported.run(*wrong), wanted)) > TOLERANCE


def test_padding_is_not_looked_at(exported):
    images, sizes = batch(4, 100, 130)
    other = images.clone()
    for image, (h, w) in zip(other, sizes.tolist()): image[:, h:] = 200; image[:, :, w:] = 13
    assert not torch.equal(images, other)
    for a, b in zip(exported.run(images, sizes), exported.run(other, sizes)): assert torch.equal(a, b)


@pytest.mark.parametrize("side", [101, 533, 1066])
def test_an_image_may_end_at_any_pixel(side):
    "Masks of rows against those of the model, at sizes where ONNX's Resize rounds to another pixel."
    limits = torch.arange(1, side + 1)
    for stride in (8, 16, 32):
        cells = -(-side // stride)
        mask = (torch.arange(side) >= limits[:, None])[:, None, :, None].float()
        assert torch.equal(outside(limits, side, cells), nn.functional.interpolate(mask, size=(cells, 1))[:, 0, :, 0].bool())


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_baked_norms(norm):
    torch.manual_seed(1)
    body = build_poet(override(THIN, **{"model.backbone_norm": norm, "model.stride": 16})).backbone
    for m in body.modules():
        if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)): m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 80)
        wanted = body(x)
        bake_batchnorm(body)
        assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in body.modules())
        torch.testing.assert_close(body(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(thin):
    before = {k: v.clone() for k, v in thin.state_dict().items()}
    kinds, grads = [type(m) for m in thin.modules()], [p.requires_grad for p in thin.parameters()]
    DeployedPoet(thin.train())
    assert thin.training and kinds == [type(m) for m in thin.modules()] and grads == [p.requires_grad for p in thin.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in thin.eval().state_dict().items())


def test_predict_is_that_of_the_model(thin, exported):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((60, 90), (90, 60), (60, 90), (200, 310))]
    ours, theirs = exported.predict(images, threshold=0, batch_size=2), predict(thin, images, threshold=0, batch_size=2)
    assert [len(a["scores"]) for a in ours] == [9] * 4 and all((a["scores"].diff() <= 0).all() for a in ours)
    between = theirs[0]["scores"][3:5].mean().item()
    assert len(exported.predict(images[0], threshold=between)[0]["scores"]) == 4
    for a, b in zip(ours, theirs):
        assert torch.equal(a["labels"], b["labels"])
        assert (a["scores"] - b["scores"]).abs().max() < TOLERANCE and (a["keypoints"] - b["keypoints"]).abs().max() < 310 * TOLERANCE
    assert ours.to_coco()["categories"] == exported.categories and ours.to_coco()["images"][3]["width"] == 310
    with pytest.raises(PoetError, match="batch_size"): exported.predict(images, batch_size=0)


def test_a_check_refuses_a_file_of_other_weights(thin, exported):
    assert max(max(differences) for _, *differences in check_export(thin, exported)) < TOLERANCE
    other = build_poet(THIN)
    with pytest.raises(PoetError, match="differ"): check_export(other, exported)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_the_trained_run_at_every_size(kind, tmp_path):
    model = build_poet(ROOT / "data/runs/tiny")
    file = load_onnx(export_onnx(model, tmp_path / "tiny.onnx"), threads=1) if kind == "onnx" else load_program(export_program(model, tmp_path / "tiny.pt2"))
    for shape in SHAPES:
        images, sizes = batch(*shape)
        assert_equal(file.run(images, sizes), eager(model, images, sizes))


PAPER = [(1, 800, 1066), (2, 352, 320)] # of COCO's usual image at the paper's size, and smaller


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name, kind", [("poet_r50", "onnx"), ("poet_r50", "pt2"), ("poet_dc5_r50", "onnx")])
def test_the_models_of_the_paper_at_their_size(name, kind, tmp_path):
    "Random weights in the real networks. That the comparison would notice: other colours change the answer by more than the tolerance."
    torch.manual_seed(0)
    model = build_poet(preset(name))
    file = load_onnx(export_onnx(model, tmp_path / "real.onnx"), threads=1) if kind == "onnx" else load_program(export_program(model, tmp_path / "real.pt2"))
    rows = check_export(model, file, PAPER)
    print(f"\n{name} as {kind}: largest differences of scores, labels and keypoints {rows}")
    assert [row[0] for row in rows] == PAPER and max(max(row[1:]) for row in rows) <= TOLERANCE
    images, sizes = batch(*PAPER[1])
    assert all((a - b).abs().max() > TOLERANCE for a, b in zip(file.run(images, sizes)[::2], file.run(images.flip(1), sizes)[::2]))


@pytest.mark.slow
@pytest.mark.parametrize("opset", [19, 20, 21, 22])
def test_every_opset(opset, thin, tmp_path):
    path = export_onnx(thin, tmp_path / "thin.onnx", opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    check_export(thin, load_onnx(path, threads=1))


# ---- the file alone ----

def test_onnx_file_is_enough_without_torch(thin, files, tmp_path):
    images, sizes = batch(3, 70, 90)
    np.savez(tmp_path / "in.npz", images=images.numpy(), sizes=sizes.numpy())
    program = ("import json, sys, numpy as np, onnxruntime\n"
               f"session = onnxruntime.InferenceSession({str(files['onnx'])!r})\n"
               "print([(i.name, i.type, i.shape) for i in (*session.get_inputs(), *session.get_outputs())])\n"
               "np.savez('out.npz', *session.run(None, dict(np.load('in.npz'))))\n"
               "print(json.loads(session.get_modelmeta().custom_metadata_map['poet.categories'])[1]['name'])\n"
               "print([m for m in ('torch', 'poet_nb', 'onnx') if m in sys.modules])\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    shapes, name, modules = done.stdout.splitlines()
    assert eval(shapes) == [("images", "tensor(uint8)", ["batch", 3, "height", "width"]), ("sizes", "tensor(int64)", ["batch", 2]), ("scores", "tensor(float)", ["batch", 9]),
                            ("labels", "tensor(int64)", ["batch", 9]), ("keypoints", "tensor(float)", ["batch", 9, 5, 3])]
    assert (name, modules) == ("bear", "[]")
    assert_equal([torch.from_numpy(x) for x in np.load(tmp_path / "out.npz").values()], eager(thin, images, sizes))


def test_pt2_file_is_enough_without_this_project(thin, files, tmp_path):
    images, sizes = batch(2, 70, 90)
    torch.save((images, sizes), tmp_path / "in.pt")
    program = ("import sys, torch\n"
               f"found = torch.export.load({str(files['pt2'])!r}).module()(*torch.load('in.pt'))\n"
               "torch.save(found, 'out.pt'); print('poet_nb' in sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert_equal(torch.load(tmp_path / "out.pt"), eager(thin, images, sizes))


def test_a_check_refuses_what_is_no_number(thin, exported):
    broken = replace(exported, run=lambda *a: (lambda scores, labels, keypoints: (scores, labels, keypoints * float("nan")))(*exported.run(*a)))
    with pytest.raises(PoetError, match="differ"): check_export(thin, broken)


def test_what_the_file_says_about_itself(thin, files):
    props = {p.key: json.loads(p.value) for p in onnx.load(files["onnx"]).metadata_props}
    assert set(props) == {f"poet.{name}" for name in ("format", "preset", "categories", "config", "input", "output")}
    assert props["poet.preset"] == "poet_r50" and [c["name"] for c in props["poet.categories"]] == ["lion", "bear", "wolf"]
    assert props["poet.categories"][0]["keypoints"] == list(BEAST.keypoints) and props["poet.categories"][0]["skeleton"] == [[1, 5], [5, 2]]
    assert (props["poet.input"]["shortest_side"], props["poet.input"]["longest_side"]) == (64, 96)
    assert props["poet.config"]["model"] == THIN.to_dict()["model"]


def test_no_path_of_this_machine_is_in_a_file(files):
    for file in files.values():
        content = file.read_bytes()
        for word in ("somebody", str(ROOT), str(Path(torch.__file__).parent)): assert word.encode() not in content


def test_both_runners_know_configuration_and_categories(thin, exported):
    assert exported.config.model == THIN.model and exported.config.data.root == "photos"
    assert [Skeleton.from_category(c) for c in exported.categories] == [Skeleton.from_category(c) for c in thin.categories]


def test_no_norm_is_left_in_the_graph(files):
    kinds = {node.op_type for node in onnx.load(files["onnx"]).graph.node}
    assert "Conv" in kinds and not kinds & {"BatchNormalization", "Resize"}


# ---- faults ----

def test_places_where_nothing_can_be_written(thin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for write in (export_onnx, export_program):
        with pytest.raises(PoetError, match="this is a folder"): write(thin, tmp_path)
        with pytest.raises(PoetError, match="there is no folder"): write(thin, tmp_path / "none" / "a.onnx")
        with pytest.raises(PoetError, match="there is no folder"): write(thin, tmp_path / "file" / "a.onnx")
    monkeypatch.setattr(export.os, "access", lambda *_: False)
    with pytest.raises(PoetError, match="no permission"): check_target(tmp_path / "a.onnx")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    (tmp_path / "a.pt2").write_text("old")
    monkeypatch.setattr(export.os, "replace", full)
    with pytest.raises(PoetError, match="a.pt2: can't be written .No space left"): export._write(tmp_path / "a.pt2", b"new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("opset", [0, 7, 17, 23, 24, 99])
def test_other_opsets_are_refused_at_once(opset, thin, tmp_path):
    with pytest.raises(ConfigError, match=f"opset {opset}: .*18 to 22"): export_onnx(thin, tmp_path / "a.onnx", opset=opset)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, thin, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PoetError, match=r'package ' + package + r', .*pip install onnx onnxruntime onnxscript .*\.\[export\]'):
        load_onnx(files["onnx"]) if package == "onnxruntime" else export_onnx(thin, tmp_path / "a.onnx")


def test_associative_embedding_is_refused(tmp_path):
    model = build_poet(override(preset("ae_r50"), **{"model.backbone": "resnet18", "model.hidden_dim": 16}))
    for write in (export_onnx, export_program):
        with pytest.raises(ConfigError, match="model.method: 'ae'"): write(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_categories_that_are_not_the_models(thin):
    for wrong in (thin.categories[:2], [dict(thin.categories[0], keypoints=["a", "b"], skeleton=[])] * 3):
        with pytest.raises(ConfigError, match="categories"): describe(thin.config, wrong)


def test_files_that_are_none(thin, files, tmp_path):
    (tmp_path / "noise").write_bytes(b"no model" * 100)
    (tmp_path / "cut").write_bytes(files["onnx"].read_bytes()[:10_000])
    for load in (load_onnx, load_program):
        for name in ("noise", "cut", "absent"):
            with pytest.raises(CheckpointError, match=name): load(tmp_path / name)
    foreign = onnx.load(files["onnx"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match="foreign.onnx: does not say what it is"): load_onnx(tmp_path / "foreign.onnx")


def test_too_small_a_batch_is_refused_by_the_program(loaded):
    with pytest.raises(Exception, match="33"): loaded["pt2"].run(*batch(1, 20, 64))


# ---- the command ----

def test_command(thin, files, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    thin.save_pretrained("run")
    monkeypatch.setattr(cli, "export_onnx", lambda model, path, opset: path.write_bytes(files["onnx"].read_bytes()))
    assert cli.main(["export", "run", "--check"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("poet_r50.onnx: poet_r50, ") and out.count("keypoints") == 4 and "equal to the model's within 1e-04" in out and err == ""
    monkeypatch.setattr(cli, "export_program", lambda model, path: path.write_bytes(files["pt2"].read_bytes()))
    assert cli.main(["export", "run", "--out", "a.pt2"]) == 0 and Path("a.pt2").is_file()
    assert cli.main(["export", "poet_tiny", "--format", "pt2", "--out", "b"]) == 0
    assert "random weights" in capfd.readouterr().err
    assert cli.main(["export", "poet_tiny", "--out", "c.onnx", "--check"]) == 2                # the file of another model
    for words, told in ((["nothing"], "nothing: there is no such run folder"), (["run", "--opset", "5"], "opset 5"), (["run", "--out", "no/a.onnx"], "no/a.onnx"),
                        (["run", "--out", "m.pt"], "the ending .pt names no format"), (["run", "--out", "poet-1.2"], "--format")):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        assert cli.main(["export", *words]) == 2
        out, err = capfd.readouterr()
        assert out == "" and told in err and "Traceback" not in err


def test_a_pooling_that_can_not_be_recorded_is_replaced_by_an_equal_one(thin, monkeypatch):
    "As with PyTorch 2.11, which refuses a pooling with a stride in a network for images of any size."
    record, tried = torch.export.export, []
    def refuse_once(model, *args, **kwargs):
        tried.append(type(model.network.backbone.body.maxpool).__name__)
        if len(tried) == 1: raise torch._dynamo.exc.UserError(torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION, "refused")
        return record(model, *args, **kwargs)
    monkeypatch.setattr(torch.export, "export", refuse_once)
    program, images, sizes = trace(thin), torch.randint(0, 256, (1, 3, 97, 50), dtype=torch.uint8), torch.tensor([[97, 50]])
    assert tried == ["MaxPool2d", "ThinnedPool"]
    for a, b in zip(program.module()(images, sizes), DeployedPoet(thin)(images, sizes)): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
