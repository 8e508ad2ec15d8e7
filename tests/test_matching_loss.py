"""Matcher and criterion: brute force, a plain reference, rules that hold for all inputs, faults, broken input, and how much they launch."""
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from poet_nb.config import ConfigError, DataError, LossConfig, NonFiniteError
from poet_nb.criterion import TERMS, SetCriterion, loss_weights
from poet_nb.matcher import PREDICTIONS, HungarianMatcher, assign, pack_targets, pose_cost, stack_outputs

SETTINGS = [LossConfig.paper(), LossConfig.official(), LossConfig.paper(visible="visible"), LossConfig.paper(matcher_norm="plain"),
            LossConfig.official(visible="labelled", aux_loss=False), LossConfig.paper(eos_coef=.7, cost_class=2., class_loss_coef=.5)]


def make_batch(sizes, Q=5, K=4, L=2, C=1, seed=0, dtype=torch.float64, spread=1.):
    "Random model outputs (leaves that record gradients) and targets; image ids are 100, 101, ..."
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)
    B = len(sizes)
    targets = [dict(image_id=torch.tensor(100 + i), labels=torch.randint(C, (P,), generator=g), keypoints=rand(P, K, 2),
                    visibility=torch.randint(3, (P, K), generator=g)) for i, P in enumerate(sizes)]
    layer = lambda: {name: x.requires_grad_() for name, x in dict(
        pred_logits=3 * rand(B, Q, C + 1), pred_centers=spread * rand(B, Q, 2),
        pred_offsets=spread * (rand(B, Q, K, 2) - .5), pred_visibility=rand(B, Q, K)).items()}
    *aux, last = [layer() for _ in range(L)]
    return last | dict(aux_outputs=aux), targets


def each_layer(change, outputs):
    "Apply `change` to every prediction of every layer."
    one = lambda layer: {name: change(layer[name]) for name in PREDICTIONS}
    return one(outputs) | dict(aux_outputs=[one(layer) for layer in outputs["aux_outputs"]])


def leaves(outputs):
    return [layer[name] for layer in [*outputs["aux_outputs"], outputs] for name in PREDICTIONS]


def plain_pair(layer, i, q, target, p, loss):
    "Class probability and the four pose terms of query q and person p of image i, in plain words; class only without joints."
    v = target["visibility"][p] > (0 if loss.visible == "labelled" else 1)
    probability = layer["pred_logits"][i, q].softmax(-1)[target["labels"][p]]
    if not v.any(): return probability, None
    z, c, w = layer["pred_offsets"][i, q], layer["pred_centers"][i, q], layer["pred_visibility"][i, q]
    center = target["keypoints"][p][v].mean(0)
    return probability, [(z - target["keypoints"][p] + center)[v].abs().sum(), ((w - v.to(w))**2).sum(),
                         ((c - center)**2).sum(), (c + z - target["keypoints"][p])[v].abs().sum()]


def plain_cost(probability, terms, loss):
    cost = -loss.cost_class * probability
    if terms is None: return cost
    root = (lambda x: x) if loss.matcher_norm == "squared" else torch.sqrt
    z, v, c, a = terms
    return (cost + loss.keypoints_loss_coef * z + loss.visibility_loss_coef * root(v) + loss.centers_loss_coef * root(c)
            + loss.absolute_loss_coef * a)


def cheapest(cost):
    "Brute force: (rows, columns) of the cheapest one-to-one assignment; extra rows go without."
    P, Q = len(cost), len(cost[0])
    choices = ((list(zip(range(P), c)) for c in itertools.permutations(range(Q), P)) if P <= Q else
               (list(zip(r, range(Q))) for r in itertools.permutations(range(P), Q)))
    return min(choices, key=lambda pairs: sum(cost[p][q] for p, q in pairs))


def plain_loss(outputs, targets, loss):
    "Equations 1 to 4 with brute force and loops."
    people, total = max(sum(len(t["labels"]) for t in targets), 1), 0.
    for layer in [*(outputs["aux_outputs"] if loss.aux_loss else []), outputs]:
        B, Q, classes = layer["pred_logits"].shape
        slots = torch.full((B, Q), classes - 1)
        for i, target in enumerate(targets):
            table = [[plain_pair(layer, i, q, target, p, loss) for q in range(Q)] for p in range(len(target["labels"]))]
            for p, q in cheapest([[float(plain_cost(*x, loss).detach()) for x in row] for row in table]) if table else []:
                slots[i, q], terms = target["labels"][p], table[p][q][1]
                if terms is not None: total = total + sum(w * t for w, t in zip(list(loss_weights(loss).values())[1:], terms)) / people
        weight = torch.ones(classes, dtype=layer["pred_logits"].dtype)
        weight[-1] = loss.eos_coef
        total = total + loss.class_loss_coef * F.cross_entropy(layer["pred_logits"].flatten(0, 1), slots.flatten(), weight)
    return total


shapes = dict(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4), Q=st.integers(1, 4), K=st.integers(1, 5),
              L=st.integers(1, 3), C=st.integers(1, 3), seed=st.integers(0, 10**6))


# the same as brute force and loops --------------------------------------------------------------

@settings(max_examples=40)
@given(**shapes, loss=st.sampled_from(SETTINGS))
def test_loss_and_gradients_equal_brute_force(sizes, Q, K, L, C, seed, loss):
    outputs, targets = make_batch(sizes, Q, K, L, C, seed)
    fast, plain = SetCriterion(loss, C)(outputs, targets)["loss"], plain_loss(outputs, targets, loss)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(x, leaves(outputs), allow_unused=True, materialize_grads=True) for x in (fast, plain)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), Q=st.integers(1, 6), L=st.integers(1, 3), levels=st.integers(1, 4),
       seed=st.integers(0, 10**6))
def test_assign_is_optimal_with_ties_and_clashes(sizes, Q, L, levels, seed):
    cost = np.random.default_rng(seed).integers(0, levels, (sum(sizes), L, Q)).astype(np.float32)
    query, start = assign(cost, sizes), 0
    assert np.array_equal(query, assign(cost.copy(), sizes)), "ties must be settled the same way each time"
    for P in sizes:
        for l in range(L if P else 0):
            mine, block = query[start:start + P, l], cost[start:start + P, l]
            got = [(p, q) for p, q in enumerate(mine) if q >= 0]
            assert len(got) == min(P, Q) == len({q for _, q in got})
            assert sum(block[p, q] for p, q in got) == sum(block[p, q] for p, q in cheapest(block.tolist()))
        start += P


@pytest.mark.parametrize("loss", SETTINGS, ids=range(len(SETTINGS)))
def test_gradcheck(loss):
    outputs, targets = make_batch([2, 0, 1], Q=3, K=2, seed=3)

    def run(*x): return SetCriterion(loss, 1)(dict(zip(PREDICTIONS, x[4:])) | dict(aux_outputs=[dict(zip(PREDICTIONS, x[:4]))]), targets)["loss"]
    assert torch.autograd.gradcheck(run, leaves(outputs))


def test_two_people_by_hand():
    "Equation 3 with numbers: 4 * 0.35 / 2 + 0.2 * 0.3 / 2 + 0.5 * 0.02 / 2 for people that are certain to be matched as they lie."
    target = dict(image_id=torch.tensor(1), labels=torch.tensor([0, 0]), visibility=torch.tensor([[2, 1], [2, 0]]),
                  keypoints=torch.tensor([[[.1, .1], [.3, .1]], [[.7, .7], [9., 9.]]]))
    outputs = dict(pred_logits=torch.zeros(1, 2, 2), pred_centers=torch.tensor([[[.3, .1], [.7, .8]]]),
                   pred_offsets=torch.tensor([[[[-.1, .1], [.2, 0.]], [[0., .15], [5., 5.]]]]),
                   pred_visibility=torch.tensor([[[1., .5], [.8, .1]]]))
    got = SetCriterion(LossConfig.paper(), 1)(outputs, [target])
    # A: centre (.2, .1), offsets (-.1, 0), (.1, 0); B: centre (.7, .7), offset (0, 0)
    want = dict(loss_keypoints=(.1 + .1 + .15) / 2, loss_visibility=(.25 + .04 + .01) / 2, loss_centers=(.01 + .01) / 2,
                loss_ce=np.log(2), loss_absolute=(.1 + .1 + .2 + .25) / 2)
    for name, value in want.items(): assert float(got[name]) == pytest.approx(value, abs=1e-6), name
    assert float(got["loss"]) == pytest.approx(np.log(2) + 4 * .175 + .2 * .15 + .5 * .01, abs=1e-6)


# rules ------------------------------------------------------------------------------------------

@settings(max_examples=40)
@given(**shapes, loss=st.sampled_from(SETTINGS))
def test_order_of_people_queries_and_images_is_no_matter(sizes, Q, K, L, C, seed, loss):
    outputs, targets = make_batch(sizes, Q, K, L, C, seed)
    g = torch.Generator().manual_seed(seed)
    images, queries = torch.randperm(len(sizes), generator=g), torch.randperm(Q, generator=g)
    moved = []
    for i in images.tolist():
        order = torch.randperm(sizes[i], generator=g)
        moved.append({name: x[order] if x.dim() else x for name, x in targets[i].items()})
    criterion = SetCriterion(loss, C)
    before, after = criterion(outputs, targets), criterion(each_layer(lambda x: x[images][:, queries], outputs), moved)
    assert before.keys() == after.keys()
    for name in before: torch.testing.assert_close(before[name], after[name], msg=name, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(**shapes, loss=st.sampled_from(SETTINGS))
def test_pose_terms_of_a_batch_are_the_sums_of_its_images(sizes, Q, K, L, C, seed, loss):
    outputs, targets = make_batch(sizes, Q, K, L, C, seed)
    criterion, people = SetCriterion(loss, C), torch.tensor(max(sum(sizes), 1))
    whole = criterion(outputs, targets)
    parts = [criterion(each_layer(lambda x: x[i:i + 1], outputs), targets[i:i + 1], num_people=people) for i in range(len(sizes))]
    for name in TERMS[1:]: torch.testing.assert_close(sum(p[name] for p in parts), whole[name])


@pytest.mark.parametrize("sizes", [[1, 0, 0, 0], [0, 2, 1, 0, 0], [0, 0]])
@pytest.mark.parametrize("number", [float, torch.tensor])
def test_parts_with_fewer_people_than_parts_have_the_mean_of_the_whole(sizes, number):
    "Their mean number of people lies between 0 and 1."
    outputs, targets = make_batch(sizes, 5, 4, 2, 1, 0)
    criterion, per_part = SetCriterion(LossConfig.official(), 1), number(sum(sizes) / len(sizes))
    whole = criterion(outputs, targets)
    parts = [criterion(each_layer(lambda x: x[i:i + 1], outputs), targets[i:i + 1], num_people=per_part, num_images=1.) for i in range(len(sizes))]
    for name in TERMS: torch.testing.assert_close(sum(p[name] for p in parts) / len(parts), whole[name])


@settings(max_examples=20)
@given(**shapes, loss=st.sampled_from(SETTINGS))
def test_total_is_the_weighted_sum_of_what_is_reported(sizes, Q, K, L, C, seed, loss):
    outputs, targets = make_batch(sizes, Q, K, L, C, seed)
    got, weights = SetCriterion(loss, C)(outputs, targets), loss_weights(loss)
    suffixes = [f"_{l}" for l in range(L - 1)] if loss.aux_loss else []
    torch.testing.assert_close(got["loss"].detach(), sum(weights[name] * got[name + s] for name in TERMS for s in [*suffixes, ""]))
    assert set(got) == {"loss", "class_error", "cardinality_error"} | {name + s for name in TERMS for s in [*suffixes, ""]}
    assert got["loss"].requires_grad and not any(x.requires_grad for name, x in got.items() if name != "loss")
    assert all(x.dim() == 0 and x.isfinite() for x in got.values())


@settings(max_examples=20)
@given(**shapes)
def test_perfect_predictions_have_no_pose_loss_and_find_their_people(sizes, Q, K, L, C, seed):
    sizes = [min(P, Q) for P in sizes]
    outputs, targets = make_batch(sizes, Q, K, L, C, seed)
    packed, start = pack_targets(targets, K), 0
    with torch.no_grad():
        for i, P in enumerate(sizes):
            for layer in [outputs, *outputs["aux_outputs"]]:
                layer["pred_logits"][i] = torch.eye(C + 1, dtype=torch.float64)[C] * 9
                for name, x in (("centers", packed.centers), ("offsets", packed.offsets), ("visibility", packed.visibility)):
                    layer[f"pred_{name}"][i, :P] = x[start:start + P]
                layer["pred_logits"][i, :P] = torch.eye(C + 1, dtype=torch.float64)[packed.labels[start:start + P]] * 9
            start += P
    got = SetCriterion(LossConfig.official(visible="labelled"), C)(outputs, targets)
    for name in TERMS[1:]: assert float(got[name]) == pytest.approx(0, abs=1e-9)
    assert got["class_error"] == 0 and got["cardinality_error"] == 0


def test_nothing_that_is_passed_in_is_written_to():
    outputs, targets = make_batch([3, 0, 7])
    old = [x.detach().clone() for x in leaves(outputs)], [{k: v.clone() for k, v in t.items()} for t in targets]
    SetCriterion(LossConfig.official(), 1)(outputs, targets)["loss"].backward()
    assert all(torch.equal(a, b) for a, b in zip(old[0], leaves(outputs)))
    assert all(torch.equal(t[k], o[k]) for t, o in zip(targets, old[1]) for k in t)


def test_class_and_cardinality_error_of_the_last_layer():
    outputs, targets = make_batch([2, 1], Q=3, C=2)
    for t in targets: t["labels"] = torch.zeros_like(t["labels"])
    with torch.no_grad():
        outputs["pred_logits"][:] = torch.tensor([0., 5., 0.])         # everybody says class 1
    got = SetCriterion(LossConfig.paper(), 2)(outputs, targets)
    assert got["class_error"] == 100 and got["cardinality_error"] == pytest.approx((1 + 2) / 2)
    with torch.no_grad(): outputs["pred_logits"][:] = torch.tensor([5., 0., 0.])
    assert SetCriterion(LossConfig.paper(), 2)(outputs, targets)["class_error"] == 0


def test_plain_and_squared_norm_can_choose_differently():
    "A centre 0.9 away costs 0.9 or 0.81 (times 10): against a visibility of 0.84 = 0.916 squared, the order turns round."
    target = dict(image_id=torch.tensor(1), labels=torch.tensor([0]), keypoints=torch.zeros(1, 1, 2), visibility=torch.tensor([[2]]))
    outputs = dict(pred_logits=torch.zeros(1, 2, 2), pred_centers=torch.tensor([[[.6, .0], [0., 0.]]]),
                   pred_offsets=torch.zeros(1, 2, 1, 2), pred_visibility=torch.tensor([[[1.], [.55]]]))
    loss = LossConfig.paper(visibility_loss_coef=1.5, centers_loss_coef=1.)
    chosen = [int(HungarianMatcher(replace(loss, matcher_norm=norm))(outputs, [target]).query) for norm in ("squared", "plain")]
    assert chosen == [1, 0]                                            # 0.36 against 0.304; 0.6 against 0.675


# known faults of others -------------------------------------------------------------------------

@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), place=st.integers(0, 3), loss=st.sampled_from(SETTINGS))
def test_a_person_without_keypoints_changes_nobodys_cost(seed, place, loss):
    outputs, targets = make_batch([3, 2], seed=seed)
    ghost = dict(labels=torch.zeros(1, dtype=torch.int64), keypoints=torch.rand(1, 4, 2, dtype=torch.float64), visibility=torch.zeros(1, 4, dtype=torch.int64))
    haunted = [t | {name: torch.cat([t[name][:place], x, t[name][place:]]) for name, x in ghost.items()} for t in targets]
    stacked, plain, more = stack_outputs(outputs), pack_targets(targets, 4, loss.visible), pack_targets(haunted, 4, loss.visible)
    is_ghost = torch.zeros(7, dtype=torch.bool)
    is_ghost[[place, 4 + min(place, 2)]] = True
    cost = pose_cost(stacked, more, loss)
    assert torch.equal(cost[~is_ghost], pose_cost(stacked, plain, loss)) and (cost[is_ghost] == 0).all()


@pytest.mark.parametrize("loss", SETTINGS, ids=range(len(SETTINGS)))
def test_people_without_keypoints_have_a_class_loss_only(loss):
    outputs, targets = make_batch([2, 1])
    for t in targets: t["visibility"] = torch.zeros_like(t["visibility"])
    got = SetCriterion(loss, 1)(outputs, targets)
    assert all(got[name] == 0 for name in TERMS[1:])
    nobody = SetCriterion(loss, 1)(outputs, make_batch([0, 0])[1])
    assert got["loss_ce"] != nobody["loss_ce"], "they are people for the class"
    got["loss"].backward()
    assert (outputs["pred_offsets"].grad == 0).all() and (outputs["pred_visibility"].grad == 0).all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_positions_of_unlabelled_joints_are_never_read(garbage):
    outputs, targets = make_batch([2, 0, 3])
    loss = SetCriterion(LossConfig.official(visible="labelled"), 1)
    dirty = [t | dict(keypoints=torch.where(t["visibility"][..., None] > 0, t["keypoints"], garbage)) for t in targets]
    assert torch.equal(loss(outputs, dirty)["loss"], loss(outputs, targets)["loss"])


@pytest.mark.parametrize("loss", SETTINGS, ids=range(len(SETTINGS)))
def test_nobody_at_all(loss):
    "All images empty, as after dropping crowd annotations: a class loss, zero pose losses, and gradients that exist."
    outputs, targets = make_batch([0, 0, 0])
    targets[1]["keypoints"] = torch.zeros(0)                           # some loaders write an empty list
    got = SetCriterion(loss, 1)(outputs, targets)
    got["loss"].backward()
    assert all(got[name] == 0 for name in TERMS[1:]) and got["loss_ce"] > 0
    for name in PREDICTIONS: assert outputs[name].grad is not None and outputs[name].grad.isfinite().all()
    assert len(HungarianMatcher(loss)(outputs, targets).query) == 0


def test_more_people_than_queries():
    outputs, targets = make_batch([9, 1, 0], Q=3, L=3)
    pairs = HungarianMatcher(LossConfig.paper())(outputs, targets)
    assert len(pairs.query) == 3 * (3 + 1)
    for l in range(3):
        here = (pairs.layer == l) & (pairs.image == 0)
        assert sorted(pairs.query[here].tolist()) == [0, 1, 2] and len(set(pairs.target[here].tolist())) == 3
    assert SetCriterion(LossConfig.paper(), 1)(outputs, targets)["loss"].isfinite()


# broken input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("image", [0, 1])
def test_broken_predictions_are_named(value, name, layer, image):
    "In an image with or without people, in any layer, at a joint that nobody labelled."
    outputs, targets = make_batch([2, 0, 1], L=3)
    with torch.no_grad(): [*outputs["aux_outputs"], outputs][layer][name][image, 3].view(-1)[-1] = value
    with pytest.raises(NonFiniteError) as e: SetCriterion(LossConfig.paper(), 1)(outputs, targets)
    term = {"pred_logits": "class"}.get(name, name.removeprefix("pred_"))
    assert f"image {100 + image}:" in str(e.value) and f"prediction of {term} is" in str(e.value) and f"decoder layer {layer + 1} of 3" in str(e.value)


def test_everything_broken_is_told_in_one_line():
    outputs, targets = make_batch([1] * 20)
    with torch.no_grad():
        for x in leaves(outputs): x.fill_(float("nan"))
    with pytest.raises(NonFiniteError) as e: HungarianMatcher(LossConfig.paper())(outputs, targets)
    assert "images 100, 101, 102, 103, 104, 105, 106, 107 and 12 more" in str(e.value) and "class, centers, offsets, visibility" in str(e.value)


def test_large_but_finite_predictions():
    "Where nobody is matched, large values are no error, even if their sum overflows; in a cost they are one."
    outputs, targets = make_batch([1, 0], dtype=torch.float32)
    targets[0]["visibility"][:] = 2
    with torch.no_grad(): outputs["pred_offsets"][1] = 1e38
    assert SetCriterion(LossConfig.paper(), 1)(outputs, targets)["loss"].isfinite()
    with torch.no_grad(): outputs["pred_offsets"][0] = 1e38
    with pytest.raises(NonFiniteError, match="image 100: matching cost overflows"): SetCriterion(LossConfig.paper(), 1)(outputs, targets)


def break_field(field, change):
    def f(t): t[field] = change(t[field])
    return f


@pytest.mark.parametrize("damage, words", [
    (lambda t: t.pop("visibility"), "image 102: the target has no field 'visibility'"),
    (lambda t: t.pop("labels"), "image 102: the target has no field 'labels'"),
    (break_field("keypoints", lambda x: x[:, :3]), "image 102: field 'keypoints' has shape .* expected"),
    (break_field("keypoints", lambda x: x[:1]), "image 102: field 'keypoints' has shape .* expected"),
    (break_field("keypoints", lambda x: x[:0]), "image 102: field 'keypoints' has shape .* expected"),
    (break_field("visibility", lambda x: x[:, None]), "image 102: field 'visibility' has shape .* expected"),
    (break_field("labels", lambda x: x + 1), "image 102: field 'labels' holds 1, .* classes 0 to 0"),
    (break_field("labels", lambda x: x - 5), "image 102: field 'labels' holds -5"),
    (lambda t: t.update(keypoints=torch.full_like(t["keypoints"], torch.nan), visibility=torch.ones_like(t["visibility"])), "image 102: field 'keypoints' of the target is NaN")])
def test_broken_targets_are_named(damage, words):
    outputs, targets = make_batch([2, 0, 2, 1])
    damage(targets[2])
    with pytest.raises(DataError, match=words): SetCriterion(LossConfig.paper(), 1)(outputs, targets)


def test_wrong_numbers_of_targets_and_classes():
    outputs, targets = make_batch([2, 1])
    with pytest.raises(DataError, match="1 targets for 2 images"): SetCriterion(LossConfig.paper(), 1)(outputs, targets[:1])
    with pytest.raises(ConfigError, match="num_classes"): SetCriterion(LossConfig.paper(), 3)(outputs, targets)
    for loss in (LossConfig(loss="official"), LossConfig(loss="paper", absolute_loss_coef=1.)):
        with pytest.raises(ConfigError, match="absolute_loss_coef"): SetCriterion(loss, 1)


# 16 bits ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", SETTINGS, ids=range(len(SETTINGS)))
def test_16_bit_predictions_are_compared_in_float32(dtype, loss):
    outputs, targets = make_batch([3, 0, 5], K=17, dtype=torch.float32)
    low = each_layer(lambda x: x.detach().to(dtype).requires_grad_(), outputs)
    with torch.autocast("cpu", torch.bfloat16): got = SetCriterion(loss, 1)(low, targets)
    want = SetCriterion(loss, 1)(each_layer(lambda x: x.detach().float(), low), targets)
    for name in want: assert got[name].dtype == torch.float32 and torch.equal(got[name], want[name]), name
    got["loss"].backward()
    assert low["pred_offsets"].grad.dtype == dtype and low["pred_offsets"].grad.isfinite().all()


def test_fp16_overflow_is_reported():
    outputs, targets = make_batch([1], dtype=torch.float32)
    low = each_layer(lambda x: (x.detach() * 1e6).half(), outputs)
    with pytest.raises(NonFiniteError, match="image 100"): SetCriterion(LossConfig.paper(), 1)(low, targets)


# how much is launched ---------------------------------------------------------------------------

class Count(TorchDispatchMode):
    "Counts the aten operations that reach a backend."
    def __init__(self): super().__init__(); self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def count_forward(sizes, loss, **kwargs):
    outputs, targets = make_batch(sizes, Q=25, K=17, L=6, dtype=torch.float32, **kwargs)
    criterion = SetCriterion(loss, 1)
    with Count() as count: criterion(outputs, targets)
    return count.ops


@pytest.mark.parametrize("loss", [LossConfig.paper(), LossConfig.official()], ids=["paper", "official"])
def test_forward_launches_at_most_300_operations_whatever_the_batch(loss):
    people = lambda B, most: np.random.default_rng(B).integers(0, most + 1, B).tolist()
    totals = {name: sum(count_forward(sizes, loss).values()) for name, sizes in dict(
        one=[1], sixteen=people(16, 5), many=people(64, 5), crowded=people(64, 30), empty=[0] * 16, alone=[1] * 128).items()}
    assert max(totals.values()) <= 300, totals
    assert max(totals.values()) - min(totals.values()) <= 8, totals         # one image spares a few copies, nothing grows
    assert sum(count_forward([3] * 32, loss, spread=0.).values()) <= 300   # an untrained model: all queries alike, every image clashes


def test_one_transfer_and_no_operation_that_waits_for_the_device(monkeypatch):
    ops = count_forward([3, 0, 7, 1], LossConfig.official())
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "bincount", "index")
    assert not [name for name in ops if name.split(".")[-1] in waits], ops
    calls = Counter()
    for name in ("cpu", "numpy", "item", "tolist", "__bool__", "__int__", "__float__"):
        def spy(self, *args, _name=name, _real=getattr(torch.Tensor, name), **kwargs):
            calls[_name] += 1
            return _real(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, spy)
    outputs, targets = make_batch([3, 0, 7, 1], L=6)
    SetCriterion(LossConfig.official(), 1)(outputs, targets)
    assert calls == {"cpu": 1, "numpy": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_on_cuda():
    outputs, targets = make_batch([3, 0, 7, 1], L=6)
    got = SetCriterion(LossConfig.official(), 1)(each_layer(lambda x: x.detach().cuda(), outputs), targets)
    for name, x in SetCriterion(LossConfig.official(), 1)(outputs, targets).items(): torch.testing.assert_close(got[name].cpu(), x.detach())
