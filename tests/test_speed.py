"""Speed without a clock: counts that make things fast, and that the measured numbers which are committed are complete, keep the claims, and are shown as they are."""
import json
import re
import sys
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poet_nb.backbone import Backbone, fold_batchnorm
from poet_nb.coco_eval import evaluate_keypoints, load_ground_truth, random_coco
from poet_nb.transformer import attend

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK, RECORD = ROOT / "nbs/71_speed.ipynb", ROOT / "data/speed.json"
STEP = "POET-R50 step, 512 x 512"
CLAIMS = {("loss and gradients, batch 16", "SetCriterion"): 8, ("loss and gradients, batch 64", "SetCriterion"): 25, ("evaluation, 5,000 images", "evaluate_keypoints"): 20,
          (STEP, "all three"): 2, (STEP, "all together"): 2.2, ("augmentation, longest side 512", "train_transforms"): 2, ("augmentation, longest side 1333", "train_transforms"): 2.3,
          ("JPEG to tensor, longest side 512", "read_image, train_transforms"): 2.3, ("JPEG to tensor, longest side 1333", "read_image, train_transforms"): 2.5}
SHORT = {(STEP, "all together")} # aims that the committed record misses; the test of one that is met fails as long as it stands here
PRODUCTS = ("3 x 3 convolution, 256 channels", "matrix product, 2,048 rows")
ABLATION = {"bf16", "channels last", "folded", "kept memory", "AdamW fused", "own dropout, attention", "all three", "all together", "all together, AdamW not fused",
            "all together, PyTorch's dropout, attention", "all together, no attention dropout", "all together, attention weights"}
LOADER = {"workers=1", "workers=2", "workers=2, buckets"}


class Count(TorchDispatchMode):
    "Counts the operations that reach a backend, and those that make a tensor as large as an activation."
    def __init__(self, numel=0): super().__init__(); self.ops, self.large, self.numel = Counter(), Counter(), numel

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        self.ops[name] += 1
        if isinstance(out, torch.Tensor) and out.dim() == 4 and out.numel() >= self.numel: self.large[name] += 1
        return out


def test_a_folded_batchnorm_touches_no_activation():
    images = torch.rand(2, 3, 256, 256)
    counts = {}
    for fold in (False, True):
        backbone = Backbone("resnet18")
        if fold: fold_batchnorm(backbone.body)
        with Count(numel=2 * 512 * 8 * 8) as count, torch.no_grad(): backbone(images)
        counts[fold] = count.large
    plain = counts[False]["mul"] + counts[False]["add"] + counts[False]["batch_norm"] + counts[False]["native_batch_norm"]
    assert plain >= 40                                            # twenty norms, a product and a sum each
    folded = {name: n for name, n in counts[True].items() if name in ("mul", "add", "sub", "div", "batch_norm", "native_batch_norm")}
    weights = 20                                                  # the only products left are those of the weights
    assert folded.get("mul", 0) <= weights and folded.get("add", 0) == 0, counts


def calls_of(f):
    "Number of Python and C functions that `f` calls."
    calls = [0]
    def spy(frame, event, arg): calls[0] += event in ("call", "c_call")
    sys.setprofile(spy)
    try: f()
    finally: sys.setprofile(None)
    return calls[0]


def test_evaluation_does_not_loop_over_images():
    calls = {}
    for images in (40, 160):
        truth, found = random_coco(images, seed=3)
        prepared = load_ground_truth(truth)
        calls[images] = calls_of(lambda: evaluate_keypoints(prepared, found, verbose=False))
    assert calls[160] < 1.3 * calls[40], calls


@pytest.mark.parametrize("tokens, dropout, fused", [(64, 0., False), (300, 0., True), (300, .1, False)])
def test_which_attention_runs_on_a_cpu(tokens, dropout, fused):
    q, k, v = torch.randn(3, 2, tokens, 32, requires_grad=True)
    with Count() as count: attend(q, k, v, 4, dropout=dropout)
    assert any("flash" in name for name in count.ops) == fused, count.ops


def test_no_time_is_measured_in_tests():
    "Cells that compare times or claim ratios are flagged, so that a busy machine fails nobody's tests."
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code" and not re.search(r"^#\|\s*slow\b", c.source, re.M)]
    for source in cells:
        for call in re.findall(r"\b(?:keep|draw|memory|seconds|perf_counter)\(.*", source): assert "def " in source, call
        for call in re.findall(r"\bcompare\(.*", source): assert "def compare" in source or "log.append" in call, call


@pytest.fixture(scope="module")
def record() -> dict:
    if not RECORD.exists(): pytest.skip("data/speed.json is not there: make execute NB=71 ALL=1 writes it")
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize("claim", [pytest.param(c, marks=[pytest.mark.xfail(strict=True, reason="notebook 71 says by how much")] * (c in SHORT), id=", ".join(c)) for c in CLAIMS])
def test_a_claim_is_kept(record, claim):
    assert next(r["ratio"] for r in record["comparisons"] if (r["what"], r["variant"]) == claim) >= CLAIMS[claim]


def test_what_misses_its_aim_gains_about_what_a_convolution_gains(record):
    "By bfloat16; most of a step's work is convolutions."
    ratios = {(r["what"], r["variant"]): r["ratio"] for r in record["comparisons"]}
    for claim in SHORT: assert ratios[claim] >= ratios["3 x 3 convolution, 256 channels", "bf16"], claim


def test_the_notebook_says_that_the_three_switches_alone_stay_below_two(record):
    ratios = {(r["what"], r["variant"]): r["ratio"] for r in record["comparisons"]}
    assert ratios[STEP, "all together, PyTorch's dropout, attention"] < 2
    assert any("stays below 2x" in c.source for c in nbformat.read(NOTEBOOK, 4).cells)


def test_the_notebook_says_which_aims_are_missed(record):
    said = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code" for o in c.outputs)
    if "aims are met" not in said: pytest.skip("the notebook was executed on another device")
    assert f"**{len(CLAIMS) - len(SHORT)} of {len(CLAIMS)} aims are met.**" in said
    for r in record["comparisons"]: assert (f"{r['what']}, {r['variant']}: {r['ratio']:.3g}x of" in said) == ((r["what"], r["variant"]) in SHORT), r


def test_committed_measurements_are_complete(record):
    rows = {(r["what"], r["variant"]): r for r in record["comparisons"]}
    assert {name: r["at_least"] for name, r in rows.items() if r["at_least"]} == CLAIMS
    assert record["compiling_seconds"] >= 0 and {(what, "bf16") for what in PRODUCTS} <= rows.keys()
    assert ABLATION <= {variant for what, variant in rows if what == STEP} and LOADER == {variant for what, variant in rows if what == "an epoch from JPEG files"}
    assert {"POET, float32", "POET, bf16", "Keypoint R-CNN, nobody"} <= {variant for what, variant in rows if what == "one image, 800 x 1066"}
    for r in record["comparisons"]:
        assert r["low"] <= r["ratio"] <= r["high"] and r["rounds"] >= 3 and r["seconds"] > 0
        assert np.isclose(r["reference_seconds"] / r["seconds"], r["ratio"], rtol=.3), r          # medians of ratios and of times tell the same story
    assert max(record["operations"]["criterion_forward"].values()) <= 300 and record["evaluation_difference"] < 1e-9
    assert {"plain", "all three"} <= record["memory_gib"].keys() and all(m["step"] > 0 for m in record["memory_gib"].values())
    assert {"commit", "cpu", "threads", "torch", "platform"} <= record["environment"].keys()


def test_the_notebook_shows_the_committed_measurements():
    "Those of the device that it was executed on: another one than the CPU has a record of its own, and claims nothing."
    outputs = [o for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code" for o in c.outputs]
    shown = "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/html", "")) for o in outputs)
    device = re.findall(r"'device': '(\w+)'", "\n".join("".join(o.get("data", {}).get("text/plain", "")) for o in outputs))[-1]
    path = RECORD if device == "cpu" else RECORD.with_name(f"speed_{device}.json")
    if not path.exists(): pytest.skip(f"{path.name} is not there: make execute NB=71 ALL=1 writes it")
    record = json.loads(path.read_text())
    assert record["environment"]["device"] == device
    for r in record["comparisons"]: assert f"{r['ratio']:.3g}" in shown, r
