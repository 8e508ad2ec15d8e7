"""Pre-training: owners and pose terms in padded batches, several classes, no people; a seeded decoder for any number of queries, groups and classes."""
import copy

import pytest
import torch

from poet_nb.config import override, preset
from poet_nb.criterion import TERMS
from poet_nb.poet import Poet
from poet_nb.pretrain import DensePretrainer, cell_owners, joint_list, seed_decoder
from poet_nb.transforms import NestedTensor, pad_images

TINY = override(preset("poet_tiny"), **{"model.hidden_dim": 16, "model.nheads": 2, "model.enc_layers": 1, "model.dec_layers": 2, "model.dim_feedforward": 32})


def image_of(people, size, K=17, labels=None, seed=0):
    "A target with so many people somewhere in an image."
    g = torch.Generator().manual_seed(seed)
    return dict(labels=torch.tensor(labels or [0] * people, dtype=torch.long), keypoints=torch.rand(people, K, 2, generator=g),
                visibility=torch.randint(0, 3, (people, K), generator=g), size=torch.tensor(size))


def answers(grid, C=1, K=17):
    "What the heads say at every cell, made up."
    g, shape = torch.Generator().manual_seed(1), (grid[0], grid[1] * grid[2])
    draw = lambda *s: torch.rand(*shape, *s, generator=g)
    return dict(pred_logits=draw(C + 1), pred_centers=draw(2), pred_offsets=draw(K, 2), pred_visibility=draw(K))


@pytest.fixture(scope="module")
def trainer():
    torch.manual_seed(0)
    return DensePretrainer(Poet(TINY), TINY.loss)


def test_the_owner_is_the_person_with_the_nearest_joint():
    target = image_of(4, (128, 128), seed=3)
    joints, seen, index = joint_list([target], torch.tensor([128, 128]))
    owner, cells = cell_owners(joints, seen, index, (1, 8, 8))
    for cell, mine in zip(cells, owner[0].tolist()):
        near = [min([((joints[p, k] - cell) * 8).norm().item() for k in range(17) if seen[p, k]], default=9.) for p in range(4)]
        best = min(range(4), key=near.__getitem__)
        assert mine == (best if near[best] < 1.5 else -1)


def test_pose_terms_are_those_of_the_image_without_its_padding(trainer):
    "An image of 64 x 128 fills the upper half of a batch of 128 x 128; its cells answer the same."
    target, K, frame, padded = image_of(2, (64, 128)), 17, torch.tensor([64, 128]), torch.tensor([128, 128])
    target["keypoints"][..., 1] *= .6                                              # nobody's reach ends in the padding
    alone = answers((1, 4, 8))
    rest = {k: torch.cat([v, torch.zeros_like(v)], 1) for k, v in alone.items()}
    inside, outside = (cell_owners(*joint_list([target], f), grid)[0] for f, grid in ((frame, (1, 4, 8)), (padded, (1, 8, 8))))
    assert torch.equal(outside[:, :32], inside) and (outside[:, 32:] < 0).all() and (inside >= 0).any()
    a = trainer.losses(torch.zeros(1, K, 16, 32), alone, [target], frame, (1, 4, 8))
    b = trainer.losses(torch.zeros(1, K, 32, 32), rest, [target], padded, (1, 8, 8))
    for term in TERMS[1:]: torch.testing.assert_close(a[term], b[term])


def test_labels_go_to_their_class(trainer):
    target, grid = image_of(2, (128, 128), labels=[2, 0]), (1, 8, 8)
    owner, _ = cell_owners(*joint_list([target], torch.tensor([128, 128])), grid)
    label = torch.where(owner[0] >= 0, target["labels"][owner[0].clamp(min=0)], 3)
    cells = answers(grid, C=3)
    right = cells | dict(pred_logits=60. * torch.nn.functional.one_hot(label, 4)[None].float())
    wrong = cells | dict(pred_logits=60. * torch.nn.functional.one_hot((label + 1) % 4, 4)[None].float())
    loss = lambda c: trainer.losses(torch.zeros(1, 17, 32, 32), c, [target], torch.tensor([128, 128]), grid)["loss_ce"]
    assert loss(right) < 1e-6 and torch.isclose(loss(wrong), torch.tensor(60.))


def test_every_person_counts_once_whatever_its_size(trainer):
    "The loss of a person's cells, all off by the same, is the same for a large and for a small person."
    grid, K = (1, 8, 8), 17
    spread = torch.rand(K, 2, generator=torch.Generator().manual_seed(0))
    losses = []
    for scale in (.9, .1):
        target = dict(labels=torch.zeros(1, dtype=torch.long), keypoints=(.05 + scale * spread)[None], visibility=torch.full((1, K), 2), size=torch.tensor([128, 128]))
        center = target["keypoints"].mean(1)
        cells = dict(pred_logits=torch.zeros(1, 64, 2), pred_centers=center.expand(1, 64, 2), pred_visibility=torch.ones(1, 64, K),
                     pred_offsets=(target["keypoints"] - center[:, None] + .01).expand(1, 64, K, 2))
        losses.append(trainer.losses(torch.zeros(1, K, 32, 32), cells, [target], torch.tensor([128, 128]), grid))
    torch.testing.assert_close(losses[0]["loss_keypoints"], torch.tensor(.01 * 2 * K), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[0]["loss_keypoints"], losses[1]["loss_keypoints"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("people", [(0, 0), (0, 3), (2, 1)])
def test_gradients_are_finite_and_reach_encoder_and_heads(trainer, people):
    model = copy.deepcopy(trainer)
    samples = pad_images([torch.rand(3, 128, 128), torch.rand(3, 96, 128)], 128)
    losses = model(NestedTensor(samples.tensors.float(), samples.mask), [image_of(people[0], (128, 128)), image_of(people[1], (96, 128), seed=1)])
    losses["loss"].backward()
    for name, p in model.named_parameters():
        if "decoder.layers" in name or "query_embed" in name: assert p.grad is None, f"{name}: the decoder has no part in this"
        elif "kpt_embed" not in name or sum(people): assert p.grad is not None and torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("changes", [{}, {"model.num_queries": 7, "model.query_groups": 3}, {"model.num_queries": 1}, {"model.positions": "layers"},
                                     {"model.stride": 32, "data.eval_scale": 100, "model.num_classes": 3}])
def test_a_seeded_decoder_passes_on_what_a_cell_says(changes):
    torch.manual_seed(0)
    model = Poet(override(TINY, **changes)).eval()
    seed_decoder(model)
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        out = model(image)
        hidden = model.transformer.encode(*model.features(NestedTensor(image, torch.zeros(1, 96, 96, dtype=torch.bool))))[0]
        cells = model.heads(model.transformer.decoder["norm"](hidden)[None])[0]
    low, high = (getattr(cells["pred_centers"], f)(1).values - s for f, s in (("min", .05), ("max", -.05)))
    for layer in (*out["aux_outputs"], out): assert (layer["pred_centers"] >= low[:, None]).all() and (layer["pred_centers"] <= high[:, None]).all()


def test_seeding_repeats_with_the_seed_and_tells_groups_apart():
    models = []
    for seed in (0, 0, 1):
        model = Poet(override(TINY, **{"model.query_groups": 2}))
        torch.manual_seed(seed)
        seed_decoder(model)
        models.append(model.query_embed.weight.detach())
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])
    a, b = models[0].chunk(2)
    assert 0 < (a - b).abs().max() < 1, "the same places, with some noise"
