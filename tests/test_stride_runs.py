"""The committed runs of the stride experiment: fair to each other, and saying what their predictions say."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from poet_nb.coco_eval import METRICS, evaluate_keypoints
from poet_nb.config import load_config
from poet_nb.engine import config_differences
from poet_nb.plot import read_metrics

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "data/runs/stride").glob("*/config.json"))
MORE = sorted(path.parent for path in (ROOT / "data/runs/stride_more").glob("*/config.json"))
CENTERS = sorted(path.parent for path in (ROOT / "data/runs").glob("centers_*/config.json"))
TRUTH = ROOT / "data/synth/annotations/person_keypoints_val2017.json"
NETWORKS = {("poet", 32), ("poet", 16), ("poet", 8), ("ae", 32), ("ae", 16), ("ae", 8), ("ae", 4)}
METHOD = {"lr", "lr_backbone", "weight_decay", "clip_max_norm", "epochs", "pretrain_epochs", "seed"} # fields of train that may differ


def test_every_network_has_the_same_seeds():
    kinds = Counter((c.model.method, c.model.stride, c.train.seed) for c in map(load_config, FOLDERS))
    assert set(kinds.values()) == {1}
    seeds = {network: {s for *n, s in kinds if tuple(n) == network} for network in NETWORKS}
    assert {(m, s) for m, s, _ in kinds} == NETWORKS and len(next(iter(seeds.values()))) >= 2 and len({frozenset(s) for s in seeds.values()}) == 1, seeds


def test_networks_differ_in_what_is_compared_and_in_nothing_else():
    configs = [load_config(folder).to_dict() for folder in FOLDERS]
    for config in configs:
        assert config["data"] == configs[0]["data"] and config["ae"] == configs[0]["ae"]
        assert {k: v for k, v in config["train"].items() if k not in METHOD} == {k: v for k, v in configs[0]["train"].items() if k not in METHOD}
        assert {k: v for k, v in config["model"].items() if k not in ("method", "stride", "backbone_norm")} == {k: v for k, v in configs[0]["model"].items() if k not in ("method", "stride", "backbone_norm")}
    for method in ("poet", "ae"):
        rates = {tuple(c["train"][k] for k in ("lr", "lr_backbone", "weight_decay", "clip_max_norm")) for c in configs if c["model"]["method"] == method}
        assert len(rates) == 1, "one set of rates a method, not tuned by stride"


def test_the_budget_is_the_same():
    minutes = {}
    for folder in FOLDERS:
        logs = [read_metrics(folder / name) for name in ("pretrain.jsonl", "metrics.jsonl") if (folder / name).is_file()]
        config = load_config(folder)
        assert [len(log) for log in logs] == [n for n in (config.train.pretrain_epochs, config.train.epochs) if n], folder.name
        minutes[folder.name] = sum(len(log) * log["seconds"].min() for log in logs) / 60 # the least disturbed epoch: other work ran beside them
    assert max(minutes.values()) < 1.35 * min(minutes.values()), minutes


def test_the_further_runs_differ_as_their_names_say():
    assert {f.name for f in MORE} == {"poet_16_time3", "ae_4_time3", "ae_8_pixels", "ae_8_256px", "poet_32_256px", "poet_8_lr2"}
    for folder in MORE:
        network, what = folder.name.rsplit("_", 1)
        config, same = load_config(folder), load_config(ROOT / f"data/runs/stride/{network}_seed0")
        changed = {d.split(":")[0] for d in config_differences(same.to_dict(), config.to_dict())}
        if what == "pixels": assert changed == {"ae.sigma_unit"} and config.ae.sigma_unit == "pixels"
        elif what == "lr2":
            assert changed == {"train.lr", "train.lr_backbone"} and (config.train.lr, config.train.lr_backbone) == (2 * same.train.lr, 2 * same.train.lr_backbone)
        elif what == "256px":
            assert changed - {"train.epochs", "train.pretrain_epochs"} == {f"data.{k}" for k in ("scales", "max_size", "eval_scale", "crop_resize", "crop_size", "pad_multiple")}
            cells = load_config(ROOT / f"data/runs/stride/{config.model.method}_{config.model.stride // 2}_seed0") # the network with as many cells at 128 pixels, and as many epochs
            assert config.data.eval_scale == 2 * cells.data.eval_scale and (config.train.epochs, config.train.pretrain_epochs) == (cells.train.epochs, cells.train.pretrain_epochs)
        else:
            assert changed - {"train.pretrain_epochs"} == {"train.epochs", "train.eval_every"}
            assert (config.train.epochs, config.train.pretrain_epochs) == (3 * same.train.epochs, 3 * same.train.pretrain_epochs)
        assert len(read_metrics(folder)) == config.train.epochs


def test_the_runs_about_centres_differ_in_the_loss_alone():
    assert {f.name for f in CENTERS} == {"centers_official", "centers_paper", "centers_weighted", "centers_official_weighted", "centers_official_seed1", "centers_official_weighted_seed1"}
    configs = {f.name: load_config(f).to_dict() for f in CENTERS}
    changed = lambda a, b: {d.split(":")[0] for d in config_differences(configs[a], configs[b])}
    assert changed("centers_paper", "centers_official") == {"loss.loss", "loss.keypoints_loss_coef", "loss.absolute_loss_coef"}
    assert changed("centers_paper", "centers_weighted") == changed("centers_official", "centers_official_weighted") == {"loss.centers_loss_coef"}
    for name in ("centers_official", "centers_official_weighted"): assert changed(name, f"{name}_seed1") == {"train.seed"}
    for folder in CENTERS:
        config = load_config(folder)
        assert len(read_metrics(folder)) == config.train.epochs and len(read_metrics(folder / "pretrain.jsonl")) == config.train.pretrain_epochs


@pytest.mark.parametrize("folder", FOLDERS + MORE + CENTERS, ids=lambda f: f.name)
def test_the_log_says_what_the_predictions_score(folder):
    if not TRUTH.is_file(): pytest.skip("needs `make data`")
    last = read_metrics(folder).iloc[-1]
    found = evaluate_keypoints(TRUTH, folder / "predictions.json", verbose=False)
    np.testing.assert_allclose([found[name] for name in METRICS], [last[f"coco/{name}"] for name in METRICS], atol=1e-9)
