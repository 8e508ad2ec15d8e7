"""Configuration: whatever is valid survives every road, whatever is not is refused with the field's name."""
import dataclasses
import json
import os
import typing
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poet_nb import config
from poet_nb.config import (AEConfig, Config, ConfigError, DataConfig, DataError, LossConfig, ModelConfig, PoetError, TrainConfig, config_from_dict, load_config, override,
                            preset, save_config, write_atomic)

PARTS = dict(model=ModelConfig, loss=LossConfig, data=DataConfig, train=TrainConfig, ae=AEConfig)
PRESETS = ["poet_r50", "poet_dc5_r50", "poet_tiny", "poet_tiny_192", "poet_tiny_growing", "ae_r50"]
FIELDS = [(part, f.name) for part, cls in PARTS.items() for f in dataclasses.fields(cls)]
KINDS = {(part, name): kind for part, cls in PARTS.items() for name, kind in typing.get_type_hints(cls).items()}
CHOICES = {"unposed": ("person", "nobody"), "bits": (8, 10, 12, 14, 16), "stride": (8, 16, 32), "method": ("poet", "ae"), "sigma_unit": ("cells", "pixels"), "positions": ("layers", "input", "both"), "backbone_norm": ("frozen", "batch"), "loss": ("paper", "official"), "visible": ("labelled", "visible"),
           "matcher_norm": ("squared", "plain"), "schedule": ("step", "cosine"), "keep": ("last", "best"), "amp": ("none", "bf16", "fp16", "auto")}
TOGETHER = {"hidden_dim": st.just(24), "nheads": st.sampled_from([1, 2, 3, 4, 6]), "batch_size": st.just(12), "accumulate": st.sampled_from([1, 2, 3, 4, 6, 12]),
            "crop_size": st.tuples(st.integers(1, 50), st.integers(50, 99)), "affine_scale": st.tuples(st.floats(.1, 1), st.floats(1, 2)),
            "nms": st.sampled_from([1, 3, 5, 7])}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def values(part, name):
    "Valid values of a field."
    kind = KINDS[part, name]
    if name in CHOICES: return st.sampled_from(CHOICES[name])
    if name in TOGETHER: return TOGETHER[name]
    if kind == tuple[str, ...]: return st.lists(TEXT.filter(lambda t: t == t.strip() != "" and "," not in t), max_size=3).map(tuple)
    if typing.get_origin(kind) is tuple: return st.lists(st.integers(1, 2000), min_size=1, max_size=4).map(tuple)
    return {bool: st.booleans(), str: TEXT, int: st.integers(1, 1000), float: st.floats(1e-6, 1)}[kind]


CONFIGS = st.fixed_dictionaries({}, optional={f: values(*f) for f in FIELDS}).map(
    lambda chosen: Config(name="drawn", **{part: cls(**{n: v for (p, n), v in chosen.items() if p == part} | together(part, chosen)) for part, cls in PARTS.items()}))


def together(part, chosen):
    "Fields that bind each other are set as a pair."
    buckets = dict(pad_multiple=max(32, chosen.get(("data", "pad_multiple"), 32))) if chosen.get(("data", "buckets")) else {}
    quality = bool(chosen.get(("model", "quality"))) and chosen.get(("model", "method")) != "ae"
    return {"model": dict(hidden_dim=24, nheads=chosen.get(("model", "nheads"), 4), quality=quality), "train": dict(batch_size=12, accumulate=chosen.get(("train", "accumulate"), 1)), "data": buckets}.get(part, {})


JSON = st.recursive(st.none() | st.booleans() | st.integers(-10**20, 10**20) | st.floats() | TEXT, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=5)


# ---- what is valid ------------------------------------------------------------------------------------------------------

@given(CONFIGS)
def test_a_configuration_survives_dict_json_and_file(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.json"
    save_config(config, path)
    for back in (config_from_dict(config.to_dict()), config_from_dict(json.loads(json.dumps(config.to_dict()))), load_config(path), load_config(path.parent), load_config(str(path))):
        assert back == config and hash(back) == hash(config)
        assert all(type(getattr(getattr(back, p), n)) is type(getattr(getattr(config, p), n)) for p, n in FIELDS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_name_and_survive(name):
    assert preset(name).name == name and config_from_dict(preset(name).to_dict()) == preset(name) == preset(name)


@pytest.mark.parametrize("text, value", [(".5", .5), ("0.5", .5), ("5e-1", .5), ("1", 1.)])
def test_a_number_may_begin_with_its_point(text, value):
    assert override(Config(), **{"data.crop_prob": text}).data.crop_prob == value
    assert override(Config(), **{"data.affine_scale": f"[{text}, 2]"}).data.affine_scale == (value, 2.)


def test_a_point_in_a_name_stays_as_it_is():
    assert override(Config(), **{"data.root": "./v.5/.5x"}).data.root == "./v.5/.5x"
    assert override(Config(), **{"data.root": json.dumps("/mnt/.2/coco.2017")}).data.root == "/mnt/.2/coco.2017", "as --data gives it"
    assert override(Config(), **{"data.affine_scale": "[.5, 1]", "train.lr": ".5"}).data.affine_scale == (.5, 1.)


@given(st.sampled_from(FIELDS), st.data())
def test_override_changes_one_field_by_value_or_by_text(field, data):
    part, name = field
    value, base = data.draw(values(part, name)), preset("poet_tiny")
    if name == "hidden_dim": base = override(base, **{"model.nheads": 1})
    if name == "nheads": base = override(base, **{"model.hidden_dim": 24})
    if name in ("batch_size", "accumulate"): base = override(base, **{"train.batch_size": 12})
    changed = override(base, **{f"{part}.{name}": value})
    text = value if isinstance(value, str) else json.dumps(value)
    assert changed == override(base, **{f"{part}__{name}": value}) == override(base, **{f"{part}.{name}": text})
    assert getattr(getattr(changed, part), name) == value
    assert dataclasses.replace(changed, **{part: dataclasses.replace(getattr(changed, part), **{name: getattr(getattr(base, part), name)})}) == base


@pytest.mark.parametrize("folder", ["2017", "null", "true", "[1]", '"half', "1e3", "NaN", "data/a b", "9" * 5000, ""])
def test_text_stays_text_where_a_field_is_text(folder):
    assert override(preset("poet_tiny"), **{"data.root": folder}).data.root == folder
    assert override(preset("poet_tiny"), **{"data.root": json.dumps(folder)}).data.root == folder
    if folder: assert override(preset("poet_tiny"), name=folder).name == folder


def test_whole_numbers_do_for_real_ones_and_lists_for_tuples():
    config = override(preset("poet_tiny"), **{"train.lr": 1, "data.scales": [64, 96], "train.lr_drops": "[3, 5]"})
    assert type(config.train.lr) is float and config.data.scales == (64, 96) and config.train.lr_drops == (3, 5)


def test_no_drops_at_all_is_a_schedule():
    assert override(preset("poet_r50"), **{"train.lr_drops": []}).train.lr_drops == ()


def test_missing_fields_take_their_default_and_configurations_can_not_be_changed():
    assert config_from_dict({}) == Config() and config_from_dict({"model": {"num_queries": 7}}).model == ModelConfig(num_queries=7)
    with pytest.raises(dataclasses.FrozenInstanceError): preset("poet_tiny").train.lr = 1.


def test_the_two_losses_differ_in_the_absolute_term():
    assert LossConfig.paper() == LossConfig() and LossConfig.paper().absolute_loss_coef == 0
    official = LossConfig.official(visible="labelled")
    assert (official.absolute_loss_coef, official.keypoints_loss_coef, official.centers_loss_coef, official.visibility_loss_coef) == (4, .25, .5, .2)
    assert official.visible == "labelled" and LossConfig.official().visible == "visible" and issubclass(ConfigError, PoetError) and issubclass(DataError, ValueError)


# ---- what is not --------------------------------------------------------------------------------------------------------

@given(st.sampled_from(FIELDS), JSON)
def test_any_json_in_any_field_is_taken_or_refused_by_name(field, value):
    part, name = field
    try: config = config_from_dict({part: {name: value}}, "here.json")
    except ConfigError as error: assert f"{part}.{name}" in str(error) or "must divide" in str(error) or "divisible" in str(error)
    else:
        assert config == config, "no NaN gets in"
        json.dumps(config.to_dict(), allow_nan=False)
        assert config_from_dict(config.to_dict()) == config


@given(JSON)
def test_any_json_is_a_configuration_or_refused_with_the_files_name(d):
    try: config_from_dict(d, "here.json")
    except ConfigError as error: assert "here.json" in str(error)


@given(JSON.filter(lambda v: not isinstance(v, dict)), st.sampled_from(sorted(PARTS)))
def test_a_part_that_is_no_object_is_named(value, part):
    with pytest.raises(ConfigError, match=f"here.json.*{part}"): config_from_dict({part: value}, "here.json")


WRONG = {
    "model.stride": [4, 64, 0, "16"], "model.backbone_norm": ["group", ""], "model.hidden_dim": [0, -8, 250, 8.5, True, None], "model.nheads": [0, 7], "model.num_queries": [0, -1, "25"],
    "model.dropout": [-.1, 1.1, float("nan"), "a"], "model.enc_layers": [-1], "model.frozen_stages": [-1], "loss.loss": ["POET"], "loss.eos_coef": [-1, float("nan"), float("inf")],
    "data.scales": [[], [0], [-5], [480, "512"], 480, [1.5], [[480]], [True]], "data.crop_size": [[400], [1, 2, 3], [600, 384], [0, 5], []], "data.crop_resize": [[0]],
    "data.max_size": [0], "data.root": [3, None, ["a"]], "data.workers": [-1], "data.with_people_only": [1, "yes"], "data.rotation_degrees": [float("nan"), -1],
    "data.buckets": [True, "on"], "train.batch_size": [0, 1.5], "train.accumulate": [0, 5], "train.lr": [0, -1e-4, float("inf"), float("nan"), "fast"], "train.weight_decay": [-1, float("nan")],
    "train.schedule": ["linear"], "train.lr_drops": [[-1], 200], "train.amp": ["fp8"], "train.ema_decay": [1.5], "train.seed": [-1, .5, 2**32], "train.eval_every": [0], "train.epochs": [0],
    "train.pretrain_lr": [0, float("nan")], "train.nonfinite_patience": [0], "train.keep": ["first", True], "train.patience": [-1, .5], "train.freeze": [3, [1]],
}


@pytest.mark.parametrize("multiple", [1, 31, 32, 128])
def test_buckets_want_sides_that_are_rounded_up(multiple):
    want = lambda: override(preset("poet_r50"), **{"data.buckets": True, "data.pad_multiple": multiple})
    if multiple >= 32: assert want().data.buckets
    else:
        with pytest.raises(ConfigError, match=f"data.buckets: .*data.pad_multiple={multiple} "): want()
    assert not override(preset("poet_r50"), **{"data.pad_multiple": multiple}).data.buckets


@pytest.mark.parametrize("field, value", [(f, v) for f, vs in WRONG.items() for v in vs], ids=lambda x: str(x)[:24])
def test_a_wrong_value_is_refused_with_the_name_of_its_field(field, value):
    part, name = field.split(".")
    with pytest.raises(ConfigError, match=f"here.json.*{part}.{name}"): config_from_dict({part: {name: value}}, "here.json")
    if KINDS[part, name] is str or isinstance(value, str): return
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")): override(preset("poet_r50"), **{field: json.dumps(value)})


@pytest.mark.parametrize("name", ["", "  ", "/", "."])
def test_a_configuration_has_a_name_that_files_can_have(name):
    with pytest.raises(ConfigError, match="field name"): override(preset("poet_tiny"), name=name)
    assert override(preset("poet_tiny"), name="runs/mine", **{"train.seed": 2**32 - 1}).name == "runs/mine"


@given(st.sampled_from(FIELDS), st.sampled_from("abcxyz_"), st.integers(0, 30))
def test_a_slip_of_the_pen_gets_the_right_name(field, letter, place):
    part, name = field
    slip = name[:place] + letter + name[place:]
    with pytest.raises(ConfigError) as error: config_from_dict({part: {slip: 1}}, "here.json")
    assert repr(slip) in str(error.value) and "here.json" in str(error.value) and (repr(name) in str(error.value) or len(name) < 4 or "mean" in str(error.value))


@pytest.mark.parametrize("key", ["lr", "train", "train.", ".lr", "optim.lr", "train.lr.x", "train.Lr", ""])
def test_override_explains_how_a_field_is_written(key):
    with pytest.raises(ConfigError): override(preset("poet_tiny"), **{key: 1})


def test_unknown_presets_and_parts_are_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'poet_r52'.*poet_r50.*poet_tiny"): preset("poet_r52")
    with pytest.raises(ConfigError, match="'modle'.*'model'"): config_from_dict({"modle": {}})


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"model": 3}', '{"model": {"stride": 5}}', "\x00", '{"train": {"lr": NaN}}', "[" * 100_000, '{"train": {"epochs": %s}}' % ("9" * 5000)], ids=lambda t: t[:20])
def test_a_bad_file_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error: load_config(path)
    assert str(path) in str(error.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match="nothing.json.*no such file"): load_config(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="config.json.*no such file"): load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="config.json.*not valid JSON"): load_config(tmp_path)
    with pytest.raises(ConfigError, match="train.lr"): override(Config(), **{"train.lr": "[" * 100_000})


# ---- writing ------------------------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    def full(*_): raise OSError(28, "No space left on device")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"): write_atomic(path, b"new")
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    write_atomic(path, b"new")
    assert path.read_text() == "new"


def test_on_windows_a_file_that_somebody_looks_at_is_asked_for_again(tmp_path, monkeypatch):
    (tmp_path / "part").write_text("new"); (tmp_path / "a.txt").write_text("old")
    asked, waited = [], []
    def held(times):
        def replace(part, path):
            asked.append(path)
            if len(asked) <= times: raise PermissionError(13, "Access is denied", str(part), 32)
            os.replace(part, path)
        return SimpleNamespace(name="nt", replace=replace)
    monkeypatch.setattr(config, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(config, "os", held(3))
    config.replace_file(tmp_path / "part", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "new" and len(asked) == 4 and len(waited) == 3
    asked.clear(); waited.clear()
    monkeypatch.setattr(config, "os", held(99))
    with pytest.raises(PermissionError): config.replace_file(tmp_path / "a.txt", tmp_path / "b.txt")
    assert 2 < sum(waited) < 10 and (tmp_path / "a.txt").exists()
