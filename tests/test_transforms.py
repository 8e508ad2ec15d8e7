"Transforms: rules that hold for every image, the faults of other programs, workers, and real images."
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from poet_nb.config import ConfigError, DataConfig, DataError, preset
from poet_nb.keypoints import COCO_PERSON, Skeleton
from poet_nb.buckets import planned_size
from poet_nb.transforms import (CoarseDropout, Fused, NestedTensor, Plan, RandomBlur, RandomColor, RandomCrop, RandomFlip, RandomResize, RandomRotation, Step, collate,
                                eval_transforms, flip_matrix, image_generator, normalize, pad_images, padded_size, rotation_matrix, scale_matrix,
                                shift_matrix, shortest_side, smaller, to_fractions, train_transforms, warp_image, warp_pixels, warp_points, warp_target)

PAPER = DataConfig()
TINY = replace(PAPER, scales=(112, 128, 144), max_size=256, eval_scale=128, rotation_degrees=15., dropout_prob=0., crop_resize=(128, 144, 160),
               crop_size=(104, 144))
fast = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
seeds = st.integers(0, 2**31)


def seeded(seed): return torch.Generator().manual_seed(seed)


def sample(size=(90, 120), people=3, K=17, seed=0, labelled=True):
    "Noise with random people; visibility 0, 1 and 2 all occur."
    generator = seeded(seed)
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    visibility = torch.randint(0, 3, (people, K), generator=generator) * labelled
    points = torch.rand(people, K, 2, generator=generator) * torch.tensor(size[::-1]) * (visibility > 0)[..., None]
    low = torch.rand(people, 2, generator=generator) * torch.tensor(size[::-1]) * .5
    return image, dict(image_id=torch.tensor(seed % 1000), labels=torch.arange(people) % 2, keypoints=tv_tensors.KeyPoints(points, canvas_size=size),
                       visibility=visibility, area=torch.rand(people, generator=generator) * 1000 + 1, iscrowd=torch.zeros(people, dtype=torch.long),
                       boxes=torch.cat([low, low * 1.5 + .1], 1), orig_size=torch.tensor(size), size=torch.tensor(size))


def check(image, target, orig_size):
    "What must hold of every sample that a model gets."
    P = len(target["labels"])
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and tuple(target["size"].tolist()) == image.shape[1:]
    assert tuple(target["orig_size"].tolist()) == orig_size and "boxes" not in target and type(target["keypoints"]) is torch.Tensor
    points, visibility = target["keypoints"], target["visibility"]
    assert points.shape == (P, visibility.shape[1], 2) and points.dtype == torch.float32 and torch.isfinite(points).all()
    assert visibility.shape[0] == P == len(target["area"]) == len(target["iscrowd"]) and visibility.dtype == torch.int64
    assert ((points >= 0) & (points <= 1)).all() and (points[visibility == 0] == 0).all() and (target["area"] >= 0).all()


# ---- rules for every image

@fast
@given(sizes, st.integers(0, 4), seeds, st.sampled_from([TINY, replace(PAPER, scales=(60, 90), max_size=200, crop_resize=(40, 70), crop_size=(30, 80))]))
def test_every_size_and_every_number_of_people(size, people, seed, config):
    before = sample(size, people, seed=seed)
    kept = {k: v.clone() for k, v in before[1].items()}, before[0].clone()
    image, target = train_transforms(config, COCO_PERSON)(*before, generator=seeded(seed))
    check(image, target, size)
    assert max(image.shape[1:]) <= config.max_size
    assert torch.equal(before[0], kept[1]) and all(torch.equal(before[1][k], v) for k, v in kept[0].items()), "the input was changed"


@fast
@given(sizes, seeds, st.integers(1, 5))
def test_flip_twice_is_the_identity(size, seed, K):
    skeleton = Skeleton("thing", tuple(map(str, range(K))), (), tuple((k, k + 1) for k in range(0, K - 1, 2)), (.05,) * K)
    image, target = sample(size, 2, K, seed)
    for steps in (Fused([RandomFlip(skeleton, 1)] * 2), v2.Compose([RandomFlip(skeleton, 1)] * 2)):
        again, back = steps(image, target)
        assert torch.equal(again, image) and len(back["labels"]) == len(target["labels"])
        assert all(torch.allclose(back[k].as_subclass(torch.Tensor).float(), target[k].as_subclass(torch.Tensor).float(), atol=1e-4) for k in target if k != "boxes")


@fast
@given(st.floats(-180, 180), st.tuples(st.integers(2, 500), st.integers(2, 500)))
def test_rotation_there_and_back(degrees, size):
    points = torch.rand(20, 2, generator=seeded(1)) * torch.tensor(size[::-1])
    there = warp_points(points, rotation_matrix(size, degrees))
    centre = torch.tensor(size[::-1]) / 2
    assert torch.allclose((there - centre).norm(dim=1), (points - centre).norm(dim=1).double(), atol=1e-4)
    assert torch.allclose(warp_points(there, rotation_matrix(size, -degrees)).float(), points, atol=1e-4)


@fast
@given(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), st.integers(1, 900), st.integers(1, 1400))
def test_resize_keeps_shortest_longest_and_shape(size, shortest, longest):
    out = shortest_side(size, shortest, longest)
    assert max(out) <= max(longest, 1) and min(out) <= max(shortest, 1) and min(out) >= 1
    assert min(out) == max(1, shortest) or abs(max(out) - longest) <= 1
    scale = min(shortest / min(size), longest / max(size))
    assert all(abs(o - s * scale) <= .5 + 1e-6 or o == 1 for o, s in zip(out, size))


@fast
@given(seeds)
def test_area_grows_with_the_square_of_the_scale(seed):
    image, target = sample(seed=seed)
    before = target["area"].clone()
    plan = Fused([RandomRotation(25, 1), RandomCrop((50, 80)), RandomResize([200])]).plan(Plan((90, 120), np.eye(3)), seeded(seed))
    out = warp_target(dict(target, visibility=torch.zeros_like(target["visibility"]), boxes=torch.zeros(3, 4)), plan)
    assert torch.allclose(out["area"] / before, torch.tensor(abs(np.linalg.det(plan.matrix)), dtype=torch.float32), rtol=1e-4) and len(out["area"]) == 3


@fast
@given(seeds, st.sampled_from([TINY, replace(PAPER, dropout_prob=0.)]))
def test_a_dot_lands_where_its_joint_lands(seed, config):
    x, y = (int(v) for v in torch.randint(60, 200, (2,), generator=seeded(seed + 1)))
    image = torch.zeros(3, 256, 256, dtype=torch.uint8)
    image[:, y - 3:y + 3, x - 3:x + 3] = 255
    _, target = sample((256, 256), 1)
    target |= dict(keypoints=tv_tensors.KeyPoints(torch.tensor([x, y]).float().expand(1, 17, 2), canvas_size=(256, 256)), visibility=torch.full((1, 17), 2))
    out, after = train_transforms(config, COCO_PERSON)(image, target, seeded(seed))
    light, size = out[0].double(), torch.tensor(out.shape[:0:-1])
    inside = len(after["labels"]) and not any(edge.any() for edge in (light[:2], light[-2:], light[:, :2], light[:, -2:]))
    if not inside: return
    v, u = (torch.arange(n).double() + .5 for n in light.shape)
    centre = torch.stack([(light * u).sum(), (light * v[:, None]).sum()]) / light.sum()
    assert (centre - after["keypoints"][0, 0] * size).norm() < .5 * max(1, size.min() / 256)


@fast
@given(seeds)
def test_fused_equals_one_after_another(seed):
    steps = [RandomFlip(COCO_PERSON), RandomRotation(25), Fused([RandomResize((100, 140)), RandomCrop((60, 100))], .5), RandomResize((80, 120), 150)]
    before = sample(seed=seed)
    torch.manual_seed(seed); image, one = v2.Compose([*steps, to_fractions])(*before)
    torch.manual_seed(seed); fused, two = Fused(steps, finish=to_fractions)(*before)
    assert image.shape == fused.shape and torch.equal(one["visibility"], two["visibility"])
    for name in ("keypoints", "area"): assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5)


@fast
@given(st.lists(sizes, min_size=1, max_size=5), st.integers(1, 40))
def test_batch_holds_every_image_and_nothing_else(shapes, multiple):
    images = [sample(size, 0, seed=i)[0] for i, size in enumerate(shapes)]
    batch = pad_images(images, multiple)
    assert all(side % multiple == 0 for side in batch.tensors.shape[2:]) and batch.sizes().tolist() == [list(s) for s in shapes]
    for image, tensor, mask in zip(images, batch.tensors, batch.mask):
        assert torch.equal(tensor[:, ~mask].reshape(3, -1), image.reshape(3, -1)) and not tensor[:, mask].any()
    assert not normalize(batch).tensors.permute(0, 2, 3, 1)[batch.mask].any()


# ---- faults that other programs have had

def test_flip_exchanges_left_and_right():
    image, target = sample()
    _, out = RandomFlip(COCO_PERSON, 1)(image, target)
    for k, name in enumerate(COCO_PERSON.keypoints):
        twin = COCO_PERSON.keypoints.index(name.replace("left", "#").replace("right", "left").replace("#", "right"))
        assert torch.equal(out["visibility"][:, k], target["visibility"][:, twin])
        seen = out["visibility"][:, k] > 0
        assert torch.allclose(out["keypoints"][seen, k, 0] + target["keypoints"][seen, twin, 0], torch.tensor(120.)), name


def test_joint_outside_the_crop_is_unlabelled_not_clamped():
    image, target = sample(people=1)
    target |= dict(keypoints=tv_tensors.KeyPoints(torch.tensor([[20., 20.]]).repeat(17, 1)[None], canvas_size=(90, 120)), visibility=torch.full((1, 17), 2))
    target["keypoints"][0, 3] = torch.tensor([100., 20.])
    out = warp_target(target, Plan((90, 120), np.eye(3)).move(shift_matrix(0, 0), (60, 60)))
    assert out["visibility"][0, 3] == 0 and out["keypoints"][0, 3].tolist() == [0, 0] and (out["visibility"][0] == 2).sum() == 16


def test_person_without_a_joint_left_goes_and_person_who_never_had_one_stays():
    image, target = sample(people=3)
    target["visibility"] = torch.tensor([[2] * 17, [0] * 17, [1] * 17])
    target["keypoints"] = tv_tensors.KeyPoints(torch.tensor([110., 10.]).expand(3, 17, 2) * torch.tensor([1, 0, .1])[:, None, None], canvas_size=(90, 120))
    target["boxes"] = torch.tensor([[100., 0, 120, 20], [5, 5, 9, 9], [0, 0, 20, 20]])
    target["labels"] = torch.tensor([7, 8, 9])
    plan = Plan((90, 120), np.eye(3)).move(shift_matrix(0, 0), (60, 60))
    assert warp_target(target, plan)["labels"].tolist() == [8, 9]
    del target["boxes"]
    assert warp_target(target, plan)["labels"].tolist() == [8, 9]
    target["boxes"] = torch.tensor([[100., 0, 120, 20], [70, 5, 90, 9], [0, 0, 20, 20]]) # now the second one's box is outside
    assert warp_target(target, plan)["labels"].tolist() == [9]


@pytest.mark.parametrize("config", [TINY, PAPER], ids=["tiny", "paper"])
def test_nobody_in_the_image(config):
    always = replace(config, flip_prob=1., rotation_prob=1., dropout_prob=1., crop_prob=1.)
    image, target = sample((200, 300), people=0)
    batch, targets = collate([train_transforms(always, COCO_PERSON)(image, target), eval_transforms(config)(image, target)])
    for t in targets: assert t["keypoints"].shape == (0, 17, 2) and t["visibility"].shape == (0, 17) and t["area"].shape == (0,)
    assert len(batch) == 2


def test_the_neighbours_in_a_batch_change_nothing():
    images = [sample(size, 0, seed=i)[0] for i, size in enumerate([(40, 50), (60, 30), (64, 64)])]
    alone, together = pad_images(images[:1], pad_to=(64, 64)), pad_images(images, pad_to=(64, 64))
    assert torch.equal(normalize(alone).tensors[0], normalize(together).tensors[0]) and torch.equal(alone.mask[0], together.mask[0])
    with pytest.raises(DataError, match="pad_to"): pad_images(images, pad_to=(64, 63))


def test_centres_cannot_be_stale():
    _, target = train_transforms(TINY, COCO_PERSON)(*sample((200, 200)))
    assert not [name for name in target if "cent" in name]


# ---- pixels

def test_padding_is_zero_after_normalisation_in_every_type():
    batch = pad_images([torch.full((3, 4, 6), 255, dtype=torch.uint8), torch.zeros(3, 8, 2, dtype=torch.uint8)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = normalize(batch, dtype=dtype).tensors
        assert x.dtype == dtype and not x.permute(0, 2, 3, 1)[batch.mask].any() and x[0, 0, 0, 0] > 2 and x[1, 0, 0, 0] < -2


def test_plain_plans_are_exact():
    image = sample((40, 60))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(warp_pixels(image, np.eye(3), (40, 60)), image)
    assert np.array_equal(warp_pixels(image, flip_matrix(60), (40, 60)), image[:, ::-1])
    assert np.array_equal(warp_pixels(image, shift_matrix(-7, -5), (20, 30)), image[5:25, 7:37])
    half = warp_pixels(image, scale_matrix((40, 60), (20, 30)), (20, 30)).astype(float)
    assert np.abs(half - image.reshape(20, 2, 30, 2, 3).mean((1, 3))).max() <= .51
    both = warp_pixels(image, flip_matrix(30) @ scale_matrix((40, 60), (20, 30)), (20, 30))
    assert np.array_equal(both, half[:, ::-1].astype(np.uint8))


def test_quarter_turn_moves_every_pixel():
    image = sample((50, 50))[0].permute(1, 2, 0).numpy()
    assert np.abs(warp_pixels(image, rotation_matrix((50, 50), 90), (50, 50)).astype(int) - np.rot90(image).astype(int)).max() <= 1


def test_a_crop_has_no_dark_border():
    white = torch.full((3, 100, 100), 255, dtype=torch.uint8)
    for seed in range(5):
        out, _ = Fused([RandomResize([150]), RandomCrop((60, 150)), RandomResize([170])])(white, sample((100, 100))[1], seeded(seed))
        assert (out == 255).all()


@pytest.mark.parametrize("scale", [.2, .35, .6])
def test_shrinking_does_not_alias(scale):
    noise = sample((300, 300))[0].permute(1, 2, 0).numpy()
    size = (round(300 * scale),) * 2
    turned = warp_pixels(noise, scale_matrix((300, 300), size) @ rotation_matrix((300, 300), 10), size)
    inner = turned[size[0] // 4:-size[0] // 4, size[0] // 4:-size[0] // 4]
    assert inner.std() < 1.15 * scale * noise.std() # the mean of 1 / scale^2 independent pixels


def test_dropout_is_coarse_in_range_and_by_channel_half_the_time():
    generator, shares, apart = seeded(0), [], []
    white = torch.full((3, 400, 600), 255, dtype=torch.uint8)
    for _ in range(40):
        plan = CoarseDropout(1).plan(Plan((400, 600), np.eye(3)), generator)
        (cells, matrix), = plan.dropped
        assert 6 <= cells.shape[0] <= 12 and 9 <= cells.shape[1] <= 18 and set(np.unique(cells)) <= {0, 255}
        out = warp_image(white, plan)
        assert (out != white).any()
        apart.append(not torch.equal(out[0], out[1]))
        assert torch.equal(out[0], out[2]) != apart[-1]
        share = (out == 0).float().mean().item()
        assert abs(share - (cells == 0).mean()) < .02
        shares.append(share)
    assert .01 < min(shares) and max(shares) < .3 and .09 < np.mean(shares) < .16 and 12 <= sum(apart) <= 28
    assert [CoarseDropout(1, by_channel=p).plan(Plan((64, 64), np.eye(3)), seeded(1)).dropped[0][0].std(2).any() for p in (0, 1)] == [False, True]


def test_dropout_turns_and_flips_with_what_follows():
    cells = np.full((4, 4, 3), 255, np.uint8)
    cells[0, 0] = 0                                                                     # the upper left sixteenth
    start = Plan((80, 80), np.eye(3), dropped=((cells, scale_matrix((4, 4), (80, 80))),))
    white = torch.full((3, 80, 80), 255, dtype=torch.uint8)
    assert (warp_image(white, start.move(flip_matrix(80)))[:, :20, 60:] == 0).all()
    out = warp_image(white, start.move(rotation_matrix((80, 80), 90)))                  # counter-clockwise: to the lower left
    assert (out[:, 61:, :19] == 0).all() and (out == 0).float().mean() == pytest.approx(1 / 16, abs=.01)


def test_tv_tensors_and_layout():
    image, target = sample((100, 130))
    out, after = Fused([RandomFlip(COCO_PERSON, 1), RandomResize([50])])(tv_tensors.Image(image), target)
    assert isinstance(out, tv_tensors.Image) and isinstance(after["keypoints"], tv_tensors.KeyPoints) and after["keypoints"].canvas_size == (50, 65)
    copy = image.contiguous(memory_format=torch.contiguous_format)
    config, generator = replace(TINY, dropout_prob=1.), lambda: seeded(4)
    assert torch.equal(train_transforms(config, COCO_PERSON)(image, target, generator())[0], train_transforms(config, COCO_PERSON)(copy, target, generator())[0])
    assert pad_images([image, copy]).tensors.is_contiguous(memory_format=torch.channels_last)
    colour = v2.Compose([RandomFlip(COCO_PERSON), v2.RandomPhotometricDistort(p=1), RandomCrop((60, 80)), RandomResize([64]), to_fractions])
    check(*[p.as_subclass(torch.Tensor) if isinstance(p, torch.Tensor) else p for p in colour(tv_tensors.Image(image), target)], (100, 130))


def test_errors_say_what_to_do():
    image, target = sample()
    for wrong in (image.float(), image[:1], image[0]):
        with pytest.raises(DataError, match="uint8"): RandomFlip(COCO_PERSON)(wrong, target)
    with pytest.raises(ConfigError, match="scales"): RandomResize([])
    for sides in ((0, 5), (9, 5)):
        with pytest.raises(ConfigError, match="crop_size"): RandomCrop(sides)
    with pytest.raises(DataError, match="at least one"): collate([])


# ---- colours, and pictures from above

COLOURS = dict(brightness=.4, contrast=.4, saturation=.4, blur=1.5)


@fast
@given(sizes, st.integers(0, 3), seeds)
def test_colours_change_pixels_and_nothing_else(size, people, seed):
    before = sample(size, people, seed=seed)
    kept = before[0].clone()
    plain, coloured = (train_transforms(config, COCO_PERSON)(*before, generator=seeded(seed)) for config in (TINY, replace(TINY, **COLOURS)))
    check(*coloured, size)
    assert torch.equal(before[0], kept) and coloured[0].shape == plain[0].shape and all(torch.equal(plain[1][k], coloured[1][k]) for k in plain[1])
    assert coloured[0].permute(1, 2, 0).is_contiguous()                                 # (H, W, 3) in memory, as a batch wants it
    assert size == (1, 1) or not torch.equal(plain[0], coloured[0])


@pytest.mark.parametrize("field, change", [("brightness", v2.functional.adjust_brightness), ("contrast", v2.functional.adjust_contrast), ("saturation", v2.functional.adjust_saturation)])
def test_each_factor_is_torchvisions_and_even_around_one(field, change):
    image, target = sample((8, 9))
    draws = [torch.rand((), generator=seeded(n)).item() for n in range(300)]
    factors = [1 + .4 * (2 * draw - 1) for draw in draws]
    for n in range(20): assert torch.equal(RandomColor(**{field: .4})(image, target, seeded(n))[0], change(image, factors[n]))
    assert .6 <= min(factors) < .62 and 1.38 < max(factors) <= 1.4 and abs(np.mean(factors) - 1) < .03
    assert RandomColor(**{field: 1.})(image, target, seeded(0))[0].dtype == torch.uint8
    with pytest.raises(ConfigError, match=f"{field} 1.5"): RandomColor(**{field: 1.5})


def test_what_is_off_draws_nothing_and_what_is_on_draws_after_the_plan():
    steps = [type(step).__name__ for step in train_transforms(PAPER, COCO_PERSON).steps]
    assert steps == ["RandomFlip", "RandomRotation", "CoarseDropout", "Fused", "RandomResize"]
    more = replace(PAPER, flip_vertical_prob=.5, affine_shift=.1, **COLOURS)
    assert [type(step).__name__ for step in train_transforms(more, COCO_PERSON).steps] == ["RandomFlip", *steps, "RandomZoom", "RandomBlur", "RandomColor"]
    before = sample((90, 120))
    for config in (TINY, replace(TINY, **COLOURS)):                                      # as buckets need it: the plan alone tells the size
        for i in range(30): assert train_transforms(config, COCO_PERSON)(*before, generator=image_generator(1, 2, i))[0].shape[1:] == planned_size(train_transforms(TINY, COCO_PERSON), (90, 120), 1, 2, i)
    assert smaller(replace(PAPER, blur=2., small_share=.25)).blur == .5


def test_a_blur_spreads_a_dot_and_keeps_its_light():
    image, target = torch.zeros(3, 41, 41, dtype=torch.uint8), sample((41, 41))[1]
    image[:, 20, 20] = 250
    wide = [RandomBlur(3.)(image, target, seeded(n))[0].float() for n in range(30)]
    assert all(abs(blurred.sum() / 750 - 1) < .6 and torch.allclose(blurred, blurred.flip(-1)) and torch.allclose(blurred, blurred.flip(-2)) for blurred in wide)
    assert len({blurred.max().item() for blurred in wide}) > 5
    assert torch.equal(RandomBlur(1e-4)(image, target, seeded(0))[0], image)


@fast
@given(sizes, seeds)
def test_a_vertical_flip_mirrors_pixels_joints_and_sides(size, seed):
    image, target = sample(size, seed=seed)
    out, after = RandomFlip(COCO_PERSON, 1, vertical=True)(image, target)
    assert torch.equal(out, image.flip(-2))
    swap, seen = list(COCO_PERSON.flip_permutation), target["visibility"][:, COCO_PERSON.flip_permutation] > 0
    keep = seen.any(1)
    assert torch.equal(after["visibility"][after["visibility"].sum(1) > 0], target["visibility"][keep][:, swap])
    expected = (target["keypoints"].as_subclass(torch.Tensor) * torch.tensor([1., -1.]) + torch.tensor([0., float(size[0])]))[keep][:, swap]
    assert torch.allclose(after["keypoints"].as_subclass(torch.Tensor)[after["visibility"].sum(1) > 0][seen[keep]], expected[seen[keep]], atol=1e-3)
    half = Fused([RandomFlip(COCO_PERSON, 1), RandomFlip(COCO_PERSON, 1, vertical=True)])(image, target)
    turned = RandomRotation(0., 1.).plan(Plan(size, np.eye(3))).move(rotation_matrix(size, 180))
    assert torch.equal(half[0], image.flip(-1, -2)) and torch.equal(half[1]["visibility"], warp_target(target, turned)["visibility"])   # nobody changes sides
    assert np.allclose(half[1]["keypoints"].as_subclass(torch.Tensor), warp_target(target, turned)["keypoints"].as_subclass(torch.Tensor), atol=1e-3)


def test_a_vertical_flip_has_its_own_chance():
    generator, config = seeded(0), replace(PAPER, flip_prob=.5, flip_vertical_prob=.2, rotation_prob=0.)
    plans = [train_transforms(config, COCO_PERSON).plan(Plan((480, 640), np.eye(3)), generator) for _ in range(1000)]
    down, across = (np.array([p.matrix[i, i] < 0 for p in plans]) for i in (1, 0))
    assert abs(down.mean() - .2) < .05 and abs(across.mean() - .5) < .06
    assert all((p.order in (None, tuple(range(17)))) == (a == d) for p, a, d in zip(plans, across, down))                              # mirrored once: sides exchanged


class OnlyCall(Step):
    def __call__(self, image, target, generator=None): return image // 2, target

class Dim(Step):
    def pixels(self, image, generator=None): return image // 2


def test_a_step_that_would_never_be_called_is_refused():
    for wrong, word in ((OnlyCall(), "neither"), (Step(), "neither"), (v2.ColorJitter(.4), "Compose"), (torch.nn.Identity(), "Step"), (type("Both", (OnlyCall, Dim), {})(), "__call__"),
                        (Fused([], finish=to_fractions), "outermost")):
        with pytest.raises(ConfigError, match=word): Fused([RandomFlip(COCO_PERSON), wrong])
    image, target = sample()
    assert torch.equal(Fused([Dim(), RandomFlip(COCO_PERSON, 1)])(image, target)[0], image.flip(-1) // 2)
    assert torch.equal(Fused([Fused([Dim()]), Dim()])(image, target)[0], image // 4) and torch.equal(Fused([Fused([Dim()], prob=0.)])(image, target)[0], image)
    wrapped = Fused([Dim(), RandomResize([50])])(tv_tensors.Image(image), target)[0]
    assert isinstance(wrapped, tv_tensors.Image) and wrapped.max() < 128


# ---- randomness

class Seeded(Dataset):
    "Samples that depend on seed, epoch and image only."
    def __init__(self, config=TINY): self.transform = train_transforms(config, COCO_PERSON)
    def __len__(self): return 12
    def __getitem__(self, i): return self.transform(*sample((150, 200), 2, seed=i), generator=image_generator(5, 1, i))


@pytest.mark.parametrize("config", [TINY, replace(TINY, flip_vertical_prob=.5, **COLOURS)])
def test_the_number_of_workers_changes_nothing(config):
    batches = [list(DataLoader(Seeded(config), 4, num_workers=n, collate_fn=collate)) for n in (0, 2)]
    for (a, s), (b, t) in zip(*batches):
        assert isinstance(a, NestedTensor) and torch.equal(a.tensors, b.tensors) and torch.equal(a.mask, b.mask)
        assert all(torch.equal(x[k], y[k]) for x, y in zip(s, t) for k in x)


def test_the_global_generator_is_used_without_one_and_left_alone_with_one():
    transform, before = train_transforms(replace(TINY, dropout_prob=.5), COCO_PERSON), sample((150, 200))
    torch.manual_seed(1); a = transform(*before)[0]
    torch.manual_seed(1); b = transform(*before)[0]
    state = torch.get_rng_state()
    transform(*before, generator=seeded(3))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), state)
    assert len({tuple(transform(*before, generator=seeded(n))[0].flatten()[::97].tolist()) for n in range(20)}) > 15


def test_image_generators_differ():
    draws = {torch.rand((), generator=image_generator(s, e, i)).item() for s in range(5) for e in range(5) for i in (1, 2, 139, 581929)}
    assert len(draws) == 100


def test_chances_are_the_configured_ones():
    generator = seeded(0)
    for config, share in ((replace(PAPER, flip_prob=.2, rotation_prob=.8, dropout_prob=.1), (.2, .8, .1)), (PAPER, (.5, .5, .5))):
        plans = [train_transforms(config, COCO_PERSON).plan(Plan((480, 640), np.eye(3)), generator) for _ in range(1000)]
        angle = [abs(math.atan2(p.matrix[0, 1], p.matrix[1, 1])) > 1e-9 for p in plans]
        seen = [p.order is not None for p in plans], angle, [bool(p.dropped) for p in plans]
        assert np.allclose([np.mean(s) for s in seen], share, atol=.06)


# ---- real images

@pytest.mark.skipif(not os.environ.get("POET_COCO"), reason="POET_COCO is not set to a folder with COCO images")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_images_augment(split):
    from poet_nb.coco import open_coco
    data = open_coco(os.environ["POET_COCO"], split)
    assert len(data) > 0
    for config in (preset("poet_tiny").data, replace(TINY, dropout_prob=.5), PAPER):
        transform, samples = train_transforms(config, data.skeleton), []
        for i in range(len(data)):
            image, target = data[i]
            for n in range(5 if config is not PAPER else 1):
                samples.append(transform(image, target, generator=image_generator(0, n, int(target["image_id"]))))
                check(*samples[-1], tuple(target["orig_size"].tolist()))
        batch, targets = collate(samples[:8], multiple_of=32)
        assert batch.sizes().tolist() == [t["size"].tolist() for t in targets]


@given(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), st.integers(1, 512))
def test_the_sides_of_a_batch_are_the_smallest_multiples(size, multiple_of):
    for side, padded in zip(size, padded_size([size], multiple_of)): assert padded % multiple_of == 0 and 0 <= padded - side < multiple_of


def where_it_lies(images):
    "A collate that says whether its batch is in shared memory."
    batch = pad_images(images, 4)
    return batch.tensors.is_shared(), batch.tensors


def test_a_loader_process_lays_its_batch_out_in_shared_memory():
    images = [torch.full((3, 5, 7), 9, dtype=torch.uint8), torch.full((3, 8, 3), 4, dtype=torch.uint8)]
    (shared, batch), = torch.utils.data.DataLoader(images, batch_size=2, num_workers=1, collate_fn=where_it_lies)
    here, plain = where_it_lies(images)
    assert shared and not here and torch.equal(batch, plain) and batch.stride() == plain.stride()


@pytest.mark.parametrize("change", [lambda x: x / 255, lambda x: x[:1], lambda x: x[:, 1:]], ids=["float", "one channel", "another size"])
def test_what_a_step_makes_of_the_colours_is_checked(change):
    class Odd(Step):
        "A step as one may write it by mistake."
        def pixels(self, image, generator=None): return change(image)
    with pytest.raises(DataError, match="a step's pixels gave .*it must give uint8"): warp_image(torch.zeros(3, 8, 8, dtype=torch.uint8), Odd().extend(Plan((8, 8), np.eye(3))))
