"""Model: parameter counts, parity of attention and transformer with PyTorch's own layers, padding, query groups, folded BatchNorm, files of weights."""
import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from poet_nb.backbone import BACKBONES, Backbone, FoldedConv2d, fold_batchnorm, freeze_batchnorm, load_backbone_weights, load_state_file
from poet_nb.coco_eval import to_coco_results
from poet_nb.config import CheckpointError, ConfigError, override, preset, save_config
from poet_nb.poet import Poet, PostProcess, build_poet, count_parameters, load_weights, nested, save_weights
from poet_nb.position_encoding import sine_positions
from poet_nb.transformer import Attention, Transformer
from poet_nb.transforms import pad_images

TINY = override(preset("poet_tiny"), **{"model.hidden_dim": 16, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 32,
                                        "model.num_queries": 5, "model.query_groups": 3})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny() -> Poet:
    "A small model; not to be changed."
    torch.manual_seed(0)
    return Poet(TINY).eval()


def shake(module: nn.Module) -> nn.Module:
    "Give every parameter and statistic a value of its own, so that none can be forgotten unnoticed."
    with torch.no_grad():
        for p in module.parameters(): p.add_(.1 * torch.randn_like(p))
        for m in module.modules():
            if not isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)): continue
            m.weight.copy_(torch.rand_like(m.weight) + .5), m.bias.copy_(torch.randn_like(m.bias))
            m.running_mean.copy_(torch.randn_like(m.running_mean)), m.running_var.copy_(torch.rand_like(m.running_var) * 3 + .2)
    return module


def images(*sizes):
    return [torch.randn(3, *size) for size in sizes]


# ---- sizes --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["poet_r50", "poet_dc5_r50"])
@pytest.mark.parametrize("num_classes, trainable", [(1, 41_272_631), (2, 41_272_888)])
def test_parameter_counts_are_the_papers(name, num_classes, trainable):
    with torch.device("meta"): model = Poet(override(preset(name), **{"model.num_classes": num_classes}))
    assert count_parameters(model) == trainable and count_parameters(model, trainable=False) == 222_400


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_poet_r50_at_every_stride(stride):
    config = override(preset("poet_r50"), **{"model.stride": stride, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 64})
    with torch.device("meta"): model = Poet(config) # on the device without numbers: shapes at no cost
    out = model.to_empty(device="cpu").eval().apply(lambda m: [nn.init.normal_(p, std=.01) for p in m.parameters(recurse=False)])
    for name, buffer in out.named_buffers(): buffer.fill_(float(name.endswith("running_var")))
    samples = pad_images(images((70, 97), (64, 64)))
    with torch.no_grad():
        height, width = -(-70 // stride), -(-97 // stride)
        assert out.backbone(samples.tensors).shape == (2, 2048, height, width)
        source, positions, padding = out.features(samples)
        predictions = out(samples, need_weights=True)
    assert source.shape == positions.shape == (2, height * width, 256) and padding.shape == (2, height * width)
    inside = ~padding.view(2, height, width)
    assert inside[0].all() and inside[1].any() and not inside[1].all()
    shapes = dict(pred_logits=(2, 25, 2), pred_centers=(2, 25, 2), pred_offsets=(2, 25, 17, 2), pred_visibility=(2, 25, 17))
    assert len(predictions["aux_outputs"]) == 1
    for layer in (predictions, *predictions["aux_outputs"]): assert {k: tuple(layer[k].shape) for k in shapes} == shapes
    assert predictions["encoder_attention"].shape == (1, 2, 8, height * width, height * width)
    assert predictions["decoder_attention"].shape == (2, 2, 8, 25, height * width)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_every_backbone_has_the_stride_it_says(name, stride):
    with torch.device("meta"):
        backbone = Backbone(name, stride)
        for size in ((64, 96), (65, 33)):
            assert backbone(torch.empty(1, 3, *size)).shape == (1, backbone.num_channels, *(-(-s // stride) for s in size))


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages(frozen):
    backbone = Backbone("resnet18", 32, "batch", frozen)
    parts = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    still = {prefix for part in parts[:frozen] for prefix in part}
    assert all(p.requires_grad == (n.split(".")[0] not in still) for n, p in backbone.body.named_parameters())


def test_an_unknown_backbone_is_named():
    with pytest.raises(ConfigError, match="model.backbone.*'vgg'.*resnet50"): Backbone("vgg")


# ---- attention and transformer against PyTorch's own layers ---------------------------------------------------------------

def torch_attention(ours: Attention) -> nn.MultiheadAttention:
    "PyTorch's module with our weights."
    theirs = nn.MultiheadAttention(ours.out_proj.in_features, ours.nheads, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def random_padding(B, S):
    "Some cells of some images are padding, never all of one image."
    padding = torch.rand(B, S) < .4
    padding[:, 0], padding[0] = False, False
    return padding


SHAPES = dict(B=st.integers(1, 3), T=st.integers(1, 6), S=st.integers(1, 300), nheads=st.sampled_from([1, 2, 4]), padded=st.booleans(), seed=st.integers(0, 99))


@given(**SHAPES, grad=st.booleans())
@settings(max_examples=30)
def test_attention_equals_explicit_softmax_and_pytorchs_module(B, T, S, nheads, padded, seed, grad):
    torch.manual_seed(seed)
    ours, padding = shake(Attention(8, nheads)).requires_grad_(grad), random_padding(B, S) if padded else None
    query, key, value = torch.randn(B, T, 8), torch.randn(B, S, 8), torch.randn(B, S, 8)
    out, none = ours(query, key, value, padding)
    slow, weights = ours(query, key, value, padding, need_weights=True)
    expected, theirs = torch_attention(ours)(query, key, value, padding, average_attn_weights=False)
    assert none is None and weights.shape == (B, nheads, T, S)
    for a in (out, slow): torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights, theirs, atol=1e-5, rtol=1e-5)
    w, b = ours.in_proj_weight.view(3, 8, 8), ours.in_proj_bias.view(3, 8)
    for i in range(B): # in plain words
        for h in range(nheads):
            part = slice(h * 8 // nheads, (h + 1) * 8 // nheads)
            q, k = (query[i] @ w[0].T + b[0])[:, part], (key[i] @ w[1].T + b[1])[:, part]
            logits = q @ k.T / (8 / nheads)**.5
            if padded: logits[:, padding[i]] = -torch.inf
            torch.testing.assert_close(weights[i, h], logits.exp() / logits.exp().sum(1, keepdim=True), atol=1e-5, rtol=1e-5)


def plain_transformer(ours: Transformer, source, positions, queries, padding):
    "Paper and supplement in PyTorch's modules: (L, B, N, d)."
    x = source
    for layer in ours.encoder["layers"]:
        x = layer.norm1(x + torch_attention(layer.self_attn)(x + positions, x + positions, x, padding)[0])
        x = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
    memory, place, states = x, queries[None].repeat(len(source), 1, 1), []
    x = torch.zeros_like(place)
    for layer in ours.decoder["layers"]:
        x = layer.norm1(x + torch_attention(layer.self_attn)(x + place, x + place, x)[0])
        x = layer.norm2(x + torch_attention(layer.multihead_attn)(x + place, memory + positions, memory, padding)[0])
        x = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
        states.append(ours.decoder["norm"](x))
    return torch.stack(states)


@given(B=st.integers(1, 3), N=st.integers(1, 5), S=st.sampled_from([1, 7, 300]), layers=st.tuples(st.integers(0, 3), st.integers(1, 3)), padded=st.booleans(),
       train=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_transformer_equals_a_plain_one_of_pytorchs_modules(B, N, S, layers, padded, train, seed):
    torch.manual_seed(seed)
    ours = shake(Transformer(16, 4, *layers, 24, 0., 0.)).train(train)
    source, positions, queries = torch.randn(B, S, 16), torch.randn(B, S, 16), torch.randn(N, 16)
    padding = random_padding(B, S) if padded else None
    expected = plain_transformer(ours, source, positions, queries, padding)
    torch.testing.assert_close(ours(source, positions, queries, padding), expected, atol=1e-5, rtol=1e-5)
    if layers[0]: torch.testing.assert_close(ours(source, positions, queries, padding, need_weights=True)[0], expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_plain_one():
    ours = shake(Transformer(16, 4, 2, 2, 24, 0., 0.))
    source, positions, queries, padding = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(3, 16, requires_grad=True), random_padding(2, 9)
    twin, twins_queries = copy.deepcopy(ours), queries.detach().clone().requires_grad_()
    (ours(source, positions, queries, padding)**2).sum().backward()
    inside = {name: nn.Parameter(p.detach().clone()) for name, p in twin.named_parameters()}
    def attention(prefix, q, k, v, mask):
        "Multi-head attention by PyTorch's function, which keeps the gradients of the weights."
        w = {n: inside[f"{prefix}.{n}"] for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
        out, _ = F.multi_head_attention_forward(*(t.transpose(0, 1) for t in (q, k, v)), 16, 4, w["in_proj_weight"], w["in_proj_bias"], None, None, False, 0.,
                                                w["out_proj.weight"], w["out_proj.bias"], key_padding_mask=mask)
        return out.transpose(0, 1)
    norm = lambda p, x: F.layer_norm(x, (16,), inside[f"{p}.weight"], inside[f"{p}.bias"])
    linear = lambda p, x: F.linear(x, inside[f"{p}.weight"], inside[f"{p}.bias"])
    x = source
    for i in range(2):
        p = f"encoder.layers.{i}"
        x = norm(f"{p}.norm1", x + attention(f"{p}.self_attn", x + positions, x + positions, x, padding))
        x = norm(f"{p}.norm2", x + linear(f"{p}.linear2", F.relu(linear(f"{p}.linear1", x))))
    memory, place, total = x, twins_queries[None].repeat(2, 1, 1), 0
    x = torch.zeros_like(place)
    for i in range(2):
        p = f"decoder.layers.{i}"
        x = norm(f"{p}.norm1", x + attention(f"{p}.self_attn", x + place, x + place, x, None))
        x = norm(f"{p}.norm2", x + attention(f"{p}.multihead_attn", x + place, memory + positions, memory, padding))
        x = norm(f"{p}.norm3", x + linear(f"{p}.linear2", F.relu(linear(f"{p}.linear1", x))))
        total = total + (norm("decoder.norm", x)**2).sum()
    total.backward()
    torch.testing.assert_close(queries.grad, twins_queries.grad, atol=1e-4, rtol=1e-4)
    for name, p in ours.named_parameters(): torch.testing.assert_close(p.grad, inside[name].grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@given(S=st.sampled_from([3, 40, 280]), extra=st.integers(1, 30), seed=st.integers(0, 99), grad=st.booleans())
@settings(max_examples=20)
def test_padding_changes_nothing_whatever_is_in_it(S, extra, seed, grad):
    torch.manual_seed(seed)
    ours = shake(Transformer(16, 4, 2, 2, 24, 0., 0.)).requires_grad_(grad)
    source, positions, queries = torch.randn(2, S, 16), torch.randn(2, S, 16), torch.randn(3, 16)
    alone = ours(source, positions, queries)
    order = torch.randperm(S + extra)
    longer = lambda t, fill: torch.cat([t, fill(t.new_empty(2, extra, 16))], 1)[:, order]
    padding = (torch.arange(S + extra) >= S)[order].expand(2, -1)
    padded = ours(longer(source, lambda t: t.normal_(std=100)), longer(positions, lambda t: t.normal_(std=100)), queries, padding)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_padding_gets_no_attention(tiny):
    out = tiny(pad_images(images((64, 96), (40, 50))), need_weights=True)
    padding = tiny.features(pad_images(images((64, 96), (40, 50))))[2]
    assert padding[1].any()
    for name in ("encoder_attention", "decoder_attention"):
        assert out[name][:, 1, :, :, padding[1]].eq(0).all()
        torch.testing.assert_close(out[name].sum(-1), torch.ones(out[name].shape[:-1]))


def test_shapes_can_be_computed_without_memory():
    "On PyTorch's meta device, where there is no autocast: notebook 63 counts there what an image costs."
    with torch.device("meta"): found = Poet(override(preset("poet_tiny"), **{"model.num_queries": 7}))(torch.zeros(2, 3, 64, 96))
    assert found["pred_offsets"].shape == (2, 7, 17, 2) and found["pred_offsets"].is_meta


def test_order_of_the_queries_and_of_the_images_is_no_matter(tiny):
    batch = torch.randn(3, 3, 48, 48)
    out, order = tiny(batch), torch.randperm(5)
    other = copy.deepcopy(tiny)
    with torch.no_grad(): other.query_embed.weight[:5] = tiny.query_embed.weight[:5][order]
    for name in ("pred_logits", "pred_centers", "pred_offsets", "pred_visibility"):
        torch.testing.assert_close(other(batch)[name], out[name][:, order], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tiny(batch[[2, 0, 1]])[name], out[name][[2, 0, 1]], atol=1e-5, rtol=1e-4)


# ---- positions ----------------------------------------------------------------------------------------------------------

def test_positions_follow_the_formula_inside_the_mask():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 4:] = True, True # the second image has 3 x 4 cells
    ours = sine_positions(mask, 12)
    for image, (height, width) in enumerate(((4, 6), (3, 4))):
        for y in range(height):
            for x in range(width):
                for half, place in ((0, (y + 1) / height), (6, (x + 1) / width)):
                    for i in range(6):
                        angle = torch.tensor(2 * torch.pi * place / 10000**(2 * (i // 2) / 6), dtype=torch.float64)
                        expected = angle.sin() if i % 2 == 0 else angle.cos()
                        assert abs(ours[image, half + i, y, x] - expected) < 1e-5
    torch.testing.assert_close(ours[1, :, :3, :4], sine_positions(torch.zeros(1, 3, 4, dtype=torch.bool), 12)[0])


# ---- query groups -------------------------------------------------------------------------------------------------------

def test_every_group_answers_as_if_it_were_alone(tiny):
    model, batch = copy.deepcopy(tiny).train(), pad_images(images((48, 64), (64, 48)))
    together = model(batch)
    assert together["pred_logits"].shape == (6, 5, 2) and len(together["aux_outputs"]) == 1
    alone = copy.deepcopy(tiny).eval()
    for group in range(3):
        with torch.no_grad(): alone.query_embed.weight[:5] = tiny.query_embed.weight[group*5:(group + 1)*5]
        out = alone(batch)
        for ours, theirs in ((together, out), (together["aux_outputs"][0], out["aux_outputs"][0])):
            for name in ("pred_logits", "pred_centers", "pred_offsets", "pred_visibility"): # image by image, group by group
                torch.testing.assert_close(ours[name].unflatten(0, (2, 3))[:, group], theirs[name], atol=1e-5, rtol=1e-4)


def test_evaluation_uses_the_first_group_only(tiny):
    batch, other = torch.randn(2, 3, 48, 48), copy.deepcopy(tiny)
    with torch.no_grad(): other.query_embed.weight[5:] = torch.nan
    assert torch.equal(other(batch)["pred_logits"], tiny(batch)["pred_logits"])


def test_gradient_reaches_every_parameter_of_every_group(tiny):
    model = shake(copy.deepcopy(tiny)).train()
    out = model(torch.randn(1, 3, 64, 64))
    sum((layer[name] * torch.randn_like(layer[name])).sum() for layer in (out, *out["aux_outputs"]) for name in layer if name.startswith("pred")).backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() < 1e-5)] # 1e-5: rounding
    # the decoder's input is zeros, so the first self-attention mixes equal values: whatever its weights are, the outcome is the same
    assert dead == ["transformer.decoder.layers.0.self_attn.in_proj_weight"]
    assert model.query_embed.weight.grad.any(1).all(), "queries of every group learn"


# ---- inputs and outputs -------------------------------------------------------------------------------------------------

def test_all_forms_of_a_batch_give_the_same(tiny):
    a, b = images((48, 64), (48, 64))
    whole = tiny(torch.stack([a, b]))["pred_centers"]
    for form in ([a, b], (a, b), nested([a, b]), pad_images([a, b])): torch.testing.assert_close(tiny(form)["pred_centers"], whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tiny(a)["pred_centers"], whole[:1], atol=1e-6, rtol=1e-5)


def test_offsets_and_visibilities_stay_in_range_and_dropout_is_for_training(tiny):
    config = override(TINY, **{"model.dropout": .5, "model.attention_dropout": .5, "model.query_groups": 1})
    model, batch = shake(Poet(config)), torch.randn(1, 3, 48, 48) * 30
    model.eval()
    out = model(batch)
    assert torch.equal(out["pred_logits"], model(batch)["pred_logits"])
    assert out["pred_offsets"].abs().max() <= 1 and 0 <= out["pred_visibility"].min() and out["pred_visibility"].max() <= 1 and 0 <= out["pred_centers"].min()
    model.train()
    assert not torch.equal(model(batch)["pred_logits"], model(batch)["pred_logits"])


def test_post_processing_writes_nothing_into_the_outputs(tiny):
    out = tiny(torch.randn(2, 3, 48, 64))
    before = {k: v.clone() for k, v in out.items() if k.startswith("pred")}
    sizes = torch.tensor([[480, 640], [30, 50]])
    people = PostProcess()(out, sizes)
    for p in people: p["keypoints"].zero_(), p["scores"].zero_()
    assert all(torch.equal(out[k], v) for k, v in before.items()) and sizes.tolist() == [[480, 640], [30, 50]]


def test_every_class_is_exported_with_its_own_category():
    logits = torch.tensor([[[5., 0, 0], [0, 5, 0], [0, 0, 5]]]) # two classes and no-object
    out = dict(pred_logits=logits, pred_centers=torch.full((1, 3, 2), .5), pred_offsets=torch.zeros(1, 3, 4, 2), pred_visibility=torch.ones(1, 3, 4))
    people = PostProcess()(out, torch.tensor([[100, 200]]))
    assert people[0]["labels"].tolist()[:2] == [0, 1] and people[0]["scores"][2] < .01, "no-object is no class"
    rows = to_coco_results([7], people, (1, 18))
    assert [r["category_id"] for r in rows[:2]] == [1, 18] and rows[0]["keypoints"][:2] == [100., 50.]


# ---- BatchNorm, frozen and folded ---------------------------------------------------------------------------------------

def trained_backbone(name="resnet18", stride=16):
    "A backbone whose BatchNorms hold statistics of data and random affine parameters."
    backbone = Backbone(name, stride, "batch", 0).train()
    with torch.no_grad():
        for _ in range(3): backbone(torch.randn(2, 3, 64, 64) * 2 + 1)
        for m in backbone.modules():
            if isinstance(m, nn.BatchNorm2d): m.weight.uniform_(.5, 1.5), m.bias.normal_()
    return backbone.eval()


@pytest.mark.parametrize("name, stride", [("resnet18", 16), ("resnet50", 8), ("resnet_tiny", 32)])
def test_freezing_and_folding_keep_outputs_gradients_and_keys(name, stride):
    live, batch = trained_backbone(name, stride).double(), torch.randn(1, 3, 64, 64).double() # rounding depends on the processor's kernels: here there is little
    expected = live(batch)
    frozen = freeze_batchnorm(copy.deepcopy(live)).double()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    torch.testing.assert_close(frozen(batch), expected, atol=1e-6, rtol=1e-5)
    folded = copy.deepcopy(frozen)
    fold_batchnorm(folded.body)
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, FoldedConv2d) for m in convolutions), "every convolution of a ResNet has a norm behind it"
    scale = expected.abs().max()
    torch.testing.assert_close(folded(batch) / scale, expected / scale, atol=1e-5, rtol=1e-3)
    assert folded.state_dict().keys() == frozen.state_dict().keys()
    assert [n for n, _ in folded.named_parameters()] == [n for n, _ in frozen.named_parameters()]
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((m(batch) * weights).sum(), list(m.parameters())) for m in (frozen, folded)]
    for (n, _), a, b in zip(frozen.named_parameters(), *grads): assert (a - b).norm() <= 1e-3 * a.norm(), n
    fold_batchnorm(folded.body, fold=False)
    assert not any(isinstance(m, FoldedConv2d) for m in folded.modules())
    assert torch.equal(folded(batch), frozen(batch)), "unfolding brings the very same back"


def test_a_folded_model_can_be_copied_moved_and_loaded():
    frozen = freeze_batchnorm(trained_backbone())
    folded, batch = fold_batchnorm(copy.deepcopy(frozen)), torch.randn(1, 3, 64, 64)
    fold_batchnorm(folded.body)
    twin = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(batch), frozen(batch), atol=1e-4, rtol=1e-3)
    with torch.no_grad(): twin.body.bn1.running_mean.add_(1.)
    assert not torch.allclose(twin(batch), frozen(batch)), "a copy folds its own norms"
    torch.testing.assert_close(folded(batch), frozen(batch), atol=1e-4, rtol=1e-3)
    twin.load_state_dict(frozen.state_dict())
    torch.testing.assert_close(twin(batch), frozen(batch), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(folded.double()(batch.double()), frozen.double()(batch.double()))


def test_live_norms_are_not_folded():
    live = trained_backbone()
    fold_batchnorm(live.body)
    assert not any(isinstance(m, FoldedConv2d) for m in live.modules())


def test_a_folded_poet_answers_like_a_plain_one():
    model, batch = shake(Poet(TINY)).eval(), torch.randn(2, 3, 64, 64)
    folded = copy.deepcopy(model)
    fold_batchnorm(folded.backbone.body)
    assert any(isinstance(m, FoldedConv2d) for m in folded.modules())
    for name in ("pred_logits", "pred_offsets"): torch.testing.assert_close(folded(batch)[name], model(batch)[name], atol=1e-3, rtol=1e-3)


# ---- files of weights ---------------------------------------------------------------------------------------------------

def test_weights_come_back_as_they_were_saved(tmp_path):
    model = shake(Poet(override(TINY, **{"model.backbone_norm": "batch"}))).to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "a.safetensors")
    twin = build_poet(model.config, tmp_path / "a.safetensors")
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values()): assert a.dtype == b.dtype and torch.equal(a, b), name
    assert not twin.training
    save_weights(model, tmp_path / "half.safetensors", torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < .55 * (tmp_path / "a.safetensors").stat().st_size
    for (name, a), b in zip(model.state_dict().items(), build_poet(model.config, tmp_path / "half.safetensors").state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a.half().to(a.dtype) if a.is_floating_point() else a, b), name


def test_a_folded_models_weights_fit_a_plain_one(tmp_path):
    model = shake(Poet(TINY)).eval()
    fold_batchnorm(model.backbone.body)
    save_weights(model, tmp_path / "a.safetensors")
    batch = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(build_poet(TINY, tmp_path / "a.safetensors")(batch)["pred_logits"], model(batch)["pred_logits"], atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*the weights are random")
def test_pytorch_files_and_run_folders_are_read(tiny, tmp_path):
    for content in (tiny.state_dict(), {"model": tiny.state_dict()}, {"state_dict": tiny.state_dict()}):
        torch.save(content, tmp_path / "a.pt")
        assert torch.equal(build_poet(TINY, tmp_path / "a.pt").class_embed.weight, tiny.class_embed.weight)
    save_config(TINY, tmp_path / "config.json")
    save_weights(tiny, tmp_path / "model.safetensors")
    for source in (tmp_path, str(tmp_path)): assert torch.equal(build_poet(source).class_embed.weight, tiny.class_embed.weight)
    assert build_poet(tmp_path / "config.json").config == build_poet(str(tmp_path / "config.json")).config == TINY


def test_backbone_weights_are_read_with_or_without_prefix(tmp_path):
    source = shake(Backbone("resnet_tiny", 32, "batch", 0))
    for i, prefix in enumerate(("", "body.", "backbone.body.")):
        torch.save({f"{prefix}{k}": v for k, v in source.body.state_dict().items()} | {"fc.weight": torch.zeros(2)}, tmp_path / f"{i}.pt")
        backbone = Backbone("resnet_tiny", 16)
        left = load_backbone_weights(backbone, tmp_path / f"{i}.pt", "resnet_tiny")
        assert "fc.weight" in left and all(torch.equal(v, source.body.state_dict()[k]) for k, v in backbone.body.state_dict().items())
    torch.save({k: v for k, v in source.body.state_dict().items() if k != "layer3.0.conv1.weight"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt.*1 tensors.*layer3.0.conv1.weight"): load_backbone_weights(Backbone("resnet_tiny"), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="train.init"): load_backbone_weights(Backbone("resnet_tiny"), "imagenet", "resnet_tiny")


class Payload:
    "An object that makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("kind", ["code", "pickle", "empty", "noise", "cut", "list", "number", "text"])
def test_a_bad_file_of_weights_is_named_and_never_executed(tmp_path, name, kind):
    path, marker = tmp_path / name, tmp_path / "executed"
    if kind == "code": torch.save({"weight": Payload(marker)}, path)
    if kind == "pickle": path.write_bytes(pickle.dumps(Payload(marker)))
    if kind == "empty": path.write_bytes(b"")
    if kind == "noise": path.write_bytes(bytes(range(256)) * 9)
    if kind == "text": path.write_text("these are no weights\n")
    if kind == "list": torch.save([torch.zeros(2)], path)
    if kind == "number": torch.save({"epoch": 3}, path)
    if kind == "cut":
        save_weights(nn.Linear(9, 9), path) if name.endswith("safetensors") else torch.save(nn.Linear(9, 9).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError) as error: load_state_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not marker.exists()


def test_files_that_do_not_fit_are_told_with_names_and_shapes(tiny, tmp_path):
    state = dict(tiny.state_dict())
    state["class_embed.bias"], state["stranger"] = torch.zeros(9), torch.zeros(1)
    del state["query_embed.weight"]
    torch.save(state, tmp_path / "a.pt")
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    with pytest.raises(CheckpointError) as error: load_weights(tiny, tmp_path / "a.pt")
    said = str(error.value)
    for words in ("a.pt", "3 tensors", "query_embed.weight is missing", "stranger is not part", "class_embed.bias has shape (9,), expected (2,)"): assert words in said
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items()), "a refused file changes nothing"


def test_what_no_model_can_be_built_from(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.safetensors.*no such file"): build_poet(TINY, tmp_path / "nothing.safetensors")
    with pytest.raises(ConfigError, match="config.json"): build_poet(tmp_path)
    with pytest.raises(ConfigError, match="'poet_r51'.*poet_r50"): build_poet("poet_r51")
    with pytest.raises(ConfigError, match="dict"): build_poet({"model": {}})
    save_config(TINY, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="model.safetensors"): build_poet(tmp_path)
