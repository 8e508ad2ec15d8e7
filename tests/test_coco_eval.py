"COCO evaluation against pycocotools, to the last bit, and what bad input gets."
import contextlib, copy, io, json, os, warnings
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from poet_nb.config import DataError, NonFiniteError
from poet_nb.coco_eval import (METRICS, best_oks, category_scores, evaluate_keypoints, joint_errors, load_ground_truth, load_results, pair_oks, pair_up, random_coco,
                               results_from_predictions, save_results, to_coco_results)
from poet_nb.keypoints import COCO_PERSON

MINI = Path(os.environ.get("POET_COCO", "missing"))
needs_mini = pytest.mark.skipif(not (MINI/"annotations").is_dir(), reason="POET_COCO is not set")
some = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

def reference(truth, results, sigmas=None, image_ids=None, category_ids=None):
    "pycocotools itself, called here without any code of ours: the ten numbers, and the COCOeval."
    truth = copy.deepcopy(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(); gt.dataset = truth; gt.createIndex()
        run = COCOeval(gt, gt.loadRes(copy.deepcopy(results)), "keypoints")
        if sigmas is not None: run.params.kpt_oks_sigmas = np.asarray(sigmas)
        if image_ids is not None: run.params.imgIds = list(image_ids)
        if category_ids is not None: run.params.catIds = list(category_ids)
        run.evaluate(), run.accumulate(), run.summarize()
    return dict(zip(METRICS, run.stats.tolist())), run

def quiet(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate_keypoints(*args, verbose=False, **kw)

def equal(truth, results, sigmas=None, **kw):
    ours = quiet(truth, results, sigmas, **kw)
    theirs, _ = reference(truth, results, sigmas)
    assert {m: ours[m] for m in METRICS} == theirs
    return ours

def person_file(num_images=2, people=((1, 100),), K=17, **category):
    "A small file: people (image, side of the square) with all joints in a row."
    annotations = [dict(id=i + 1, image_id=m, category_id=1, area=s*s, iscrowd=0, num_keypoints=K, bbox=[10, 10, s, s],
                        keypoints=[v for k in range(K) for v in (10 + s*k/K, 10 + s*k/K, 2)]) for i, (m, s) in enumerate(people)]
    return dict(images=[dict(id=i + 1) for i in range(num_images)], annotations=annotations, categories=[COCO_PERSON.to_category() | category])

def as_results(truth, **kw):
    return [dict(image_id=a["image_id"], category_id=a["category_id"], keypoints=list(a["keypoints"]), score=.5) | kw for a in truth["annotations"]]


# ---- equality

@some
@given(seed=st.integers(0, 10**6), images=st.integers(1, 12), detections=st.integers(1, 30), K=st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 18, 31]),
       people=st.sampled_from([1., 4., 12.]), annotated=st.sampled_from([.1, .6, 1.]), ties=st.booleans())
def test_random_sets_equal_to_the_last_bit(seed, images, detections, K, people, annotated, ties):
    truth, results = random_coco(images, detections, seed, K, people, annotated, ties)
    equal(truth, results.to_coco(), np.random.default_rng(seed).uniform(.02, .2, K))

person_strategy = st.fixed_dictionaries(dict(
    image_id=st.integers(1, 3), area=st.sampled_from([0, 1, 900, 1024, 1500.5, 9216, 20000]), iscrowd=st.sampled_from([0, 0, 0, 1]), num_keypoints=st.sampled_from([None, None, 0, 2]),
    bbox=st.sampled_from([[0, 0, 20, 20], [5, 5, 0, 0], [30, 10, 40, 40]]),
    keypoints=st.lists(st.tuples(st.sampled_from([0, 10, 12, 40]), st.sampled_from([0, 10, 40]), st.sampled_from([0, 1, 2])), min_size=3, max_size=3)))
result_strategy = st.fixed_dictionaries(dict(
    image_id=st.integers(1, 3), score=st.sampled_from([-1, 0, .25, .5, .5000001, 1]),
    keypoints=st.lists(st.tuples(st.sampled_from([0, 10, 12, 40, 1e4]), st.sampled_from([0, 10, 40]), st.sampled_from([0, 1])), min_size=3, max_size=3)))

@settings(some, max_examples=120)
@given(people=st.lists(person_strategy, max_size=8), found=st.lists(result_strategy, min_size=1, max_size=14), sigma=st.sampled_from([.02, .1, 1.]))
def test_made_of_ties(people, found, sigma):
    "Few possible values, so equal scores, equal OKS, OKS exactly 1 or 0.5, areas on the borders of the ranges, empty images and disagreeing num_keypoints are common."
    annotations = []
    for i, p in enumerate(people):
        joints = [v for joint in p["keypoints"] for v in joint]
        number = sum(v > 0 for v in joints[2::3]) if p["num_keypoints"] is None else p["num_keypoints"]
        annotations.append(p | dict(id=i + 1, category_id=1, keypoints=joints, num_keypoints=number))
    truth = dict(images=[dict(id=i) for i in (3, 1, 2)], annotations=annotations, categories=[dict(id=1, name="x")])
    equal(truth, [r | dict(category_id=1, keypoints=[v for joint in r["keypoints"] for v in joint]) for r in found], [sigma]*3)

def test_the_oks_of_every_pair_is_pycocotools_oks():
    truth, results = random_coco(30, 20, seed=3)
    _, run = reference(truth, results.to_coco())
    sigmas = COCOeval(iouType="keypoints").params.kpt_oks_sigmas
    ours = load_ground_truth(truth, sigmas)
    order = np.lexsort((-results.scores, results.image_ids))
    detection, person = pair_up(np.searchsorted(ours.image_ids, results.image_ids[order]), ours.cells)
    similarity = pair_oks(ours, results.keypoints, order[detection], person)
    theirs = np.concatenate([np.ravel(run.ious[i, 1]) for i in ours.image_ids.tolist()])
    assert len(theirs) > 500 and (similarity == theirs).all()

def test_default_sigmas_are_pycocotools_own():
    truth = person_file(2, [(1, 100), (1, 40), (2, 300)])
    results = [r | dict(keypoints=[v + 7*(k % 3 == 0) for k, v in enumerate(r["keypoints"])], score=s) for r, s in zip(as_results(truth), (.3, .2, .9))]
    equal(truth, results)
    assert (load_ground_truth(truth).sigmas == COCOeval(iouType="keypoints").params.kpt_oks_sigmas).all()
    nameless = truth | dict(categories=[dict(id=1, name="person")])
    assert quiet(nameless, results) == quiet(truth, results)

def test_a_person_of_area_zero_can_be_found_exactly():
    truth = person_file(2, [(1, 100), (2, 100)])
    for person in truth["annotations"]: person["area"] = 0
    results = as_results(truth)
    assert equal(truth, results)["AR"] == 1
    results[0]["keypoints"][0] += 1e-3 # OKS 16/17, below the threshold 0.95
    assert equal(truth, results)["AR"] == pytest.approx(.95) and equal(truth, [r | dict(keypoints=[v + 1e-3 for v in r["keypoints"]]) for r in results])["AR"] == 0

def test_several_categories_are_averaged_as_pycocotools_does():
    first, results = random_coco(15, 8, seed=4, num_keypoints=4)
    rng = np.random.default_rng(0)
    truth = first | dict(annotations=[a | dict(category_id=int(rng.choice([2, 5]))) for a in first["annotations"]], categories=[dict(id=5, name="b"), dict(id=2, name="a"), dict(id=9, name="never seen")])
    results = [r | dict(category_id=int(rng.choice([2, 5]))) for r in results.to_coco()]
    equal(truth, results, [.1]*4)
    for category in (2, 5):
        ours = quiet(truth, results, [.1]*4, category_id=category)
        assert {m: ours[m] for m in METRICS} == reference(truth, results, [.1]*4, category_ids=[category])[0]

def two_kinds(seed, K=4, images=15, ties=False):
    "A random exam of two categories, in COCO's format."
    first, results = random_coco(images, 12, seed, K, ties=ties)
    rng = np.random.default_rng(seed)
    kinds = [dict(id=i, name=name, keypoints=[f"joint_{k}" for k in range(K)]) for i, name in ((5, "b"), (2, "a"), (9, "never seen"))]
    truth = first | dict(annotations=[a | dict(category_id=int(rng.choice([2, 5]))) for a in first["annotations"]], categories=kinds)
    return truth, [r | dict(category_id=int(rng.choice([2, 5]))) for r in results.to_coco()]

@some
@given(seed=st.integers(0, 10**6), K=st.sampled_from([1, 4, 17]), ties=st.booleans())
def test_each_category_has_the_numbers_that_pycocotools_gives_it_alone(seed, K, ties):
    truth, results = two_kinds(seed, K, ties=ties)
    rows = category_scores(truth, results, [.1]*K)
    assert [row["category"] for row in rows] == ["a", "b", "never seen"] and rows[2]["people"] == 0 and rows[2]["AP"] == -1
    for row, category in zip(rows, (2, 5)):
        assert {m: row[m] for m in METRICS} == reference(truth, results, [.1]*K, category_ids=[category])[0]
        assert row["people"] == sum(a["category_id"] == category and a["num_keypoints"] > 0 and not a["iscrowd"] for a in truth["annotations"])

def errors_by_loops(truth, results, sigmas, threshold, share):
    "(category, joint) -> (distance, near) of each labelled joint, with pycocotools' own matches."
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(); gt.dataset = copy.deepcopy(truth); gt.createIndex()
        dt = gt.loadRes(copy.deepcopy(results)) if results else None
        run = COCOeval(gt, dt, "keypoints") if results else None
        if run: run.params.kpt_oks_sigmas, run.params.iouThrs = np.array(sigmas), np.array([threshold]); run.evaluate()
    taken = {id: int(m) for seen in (run.evalImgs if run else ()) if seen and seen["aRng"] == [0, 1e10] for id, m in zip(seen["gtIds"], seen["gtMatches"][0]) if m}
    table = {}
    for person in truth["annotations"]:
        if person["iscrowd"] or not person["num_keypoints"]: continue
        for k, (x, y, v) in enumerate(np.reshape(person["keypoints"], (-1, 3))):
            pose = dt.anns[taken[person["id"]]]["keypoints"] if person["id"] in taken else None
            d = np.hypot(pose[3*k] - x, pose[3*k + 1] - y) if pose else np.inf
            if v > 0: table.setdefault((person["category_id"], k), []).append((d, d <= share * max(person["bbox"][2:])))
    return table

@some
@given(seed=st.integers(0, 10**6), K=st.sampled_from([1, 4, 17]), ties=st.booleans(), threshold=st.sampled_from([.05, .3, .5, .75]), share=st.sampled_from([.05, .1, .5]), min_score=st.sampled_from([0., .4, .9]))
def test_joint_errors_are_those_of_a_plain_loop(seed, K, ties, threshold, share, min_score):
    truth, results = two_kinds(seed, K, ties=ties)
    rows = joint_errors(truth, results, min_score, threshold, share, [.1]*K)
    slow = errors_by_loops(truth, [r for r in results if r["score"] >= min_score], [.1]*K, threshold, share)
    assert [(row["category"], row["joint"]) for row in rows] == [(c, j) for c in ("a", "b", "never seen") for j in [*(f"joint_{k}" for k in range(K)), "all"]]
    for i, row in enumerate(rows):
        category, k = (2, 5, 9)[i // (K + 1)], i % (K + 1)
        pairs = [p for (c, j), some in slow.items() if c == category and k in (j, K) for p in some]
        if not pairs: assert row == dict(category=row["category"], joint=row["joint"], labelled=0, missed=None, median=None, rms=None, pck=None); continue
        d, near = map(np.array, zip(*pairs))
        there = d[np.isfinite(d)]
        assert row["labelled"] == len(d) and row["missed"] == pytest.approx(np.isinf(d).mean()) and row["pck"] == pytest.approx(near.mean())
        if not len(there): assert row["median"] is row["rms"] is None
        else: assert row["median"] == pytest.approx(np.median(there)) and row["rms"] == pytest.approx(np.sqrt((there**2).mean()))
    json.dumps(rows, allow_nan=False)

def test_joint_errors_by_hand():
    "Two people of 100 pixels: one pose is off by 3 and 4 pixels at the nose, the other person is found by nobody."
    truth = person_file(2, [(1, 100), (2, 100)])
    results = as_results(truth)[:1]
    results[0]["keypoints"][0] += 3; results[0]["keypoints"][1] += 4
    rows = {row["joint"]: row for row in joint_errors(truth, results)}
    assert rows["nose"] == dict(category="person", joint="nose", labelled=2, missed=.5, median=5, rms=5, pck=.5)
    assert rows["left_eye"]["rms"] == 0 and rows["all"]["labelled"] == 34 and rows["all"]["rms"] == pytest.approx(np.sqrt(25 / 17)) and rows["all"]["median"] == 0
    truth["annotations"][0]["keypoints"][2] = 1                                              # hidden joints count as visible ones do, unlabelled ones not
    assert joint_errors(truth, results)[0]["labelled"] == 2
    truth["annotations"][0]["keypoints"][2], truth["annotations"][0]["num_keypoints"] = 0, 16
    assert joint_errors(truth, results)[0] == dict(category="person", joint="nose", labelled=1, missed=1, median=None, rms=None, pck=0)
    assert joint_errors(truth, results, images=[2])[-1]["missed"] == 1 and joint_errors(truth, results, images=[1])[-1]["missed"] == 0
    assert joint_errors(truth, results, min_score=.6)[-1]["missed"] == 1
    assert [row["missed"] for row in joint_errors(truth, [])] == [1] * 18

def test_subsets_of_images():
    truth, results = random_coco(40, 10, seed=6)
    sigmas, results = [.07]*17, results.to_coco()
    annotated = sorted({a["image_id"] for a in truth["annotations"]})
    for images, ids in (("annotated", annotated), ([3, 7, 7, 1, 22], [1, 3, 7, 22]), (range(10, 30), range(10, 30))):
        ours = quiet(truth, results, sigmas, images=images)
        assert {m: ours[m] for m in METRICS} == reference(truth, results, sigmas, ids)[0] and ours["images"] == len(ids)
    assert quiet(truth, results, sigmas)["AP"] < quiet(truth, results, sigmas, images="annotated")["AP"]

def test_boxes_of_results_decide_their_size_as_in_pycocotools():
    truth, results = random_coco(20, 10, seed=7)
    rng = np.random.default_rng(0)
    results = [r | dict(bbox=rng.uniform(1, 150, 4).tolist()) for r in results.to_coco()]
    with_boxes = equal(truth, results, [.07]*17)
    assert with_boxes["APM"] != quiet(truth, [{k: v for k, v in r.items() if k != "bbox"} for r in results], [.07]*17)["APM"]

def test_annotation_id_zero_is_a_quirk_that_we_share_and_tell():
    truth, results = random_coco(10, 6, seed=8)
    for a in truth["annotations"]: a["id"] -= 1
    equal(truth, results.to_coco(), [.07]*17)
    with pytest.warns(UserWarning, match="annotation 0"): load_ground_truth(truth, [.07]*17)

def test_duplicates_of_results_are_false_positives():
    truth, results = random_coco(20, 5, seed=9)
    once, twice = results.to_coco(), results.to_coco()*2
    assert equal(truth, twice, [.07]*17)["AP"] < equal(truth, once, [.07]*17)["AP"]

def test_only_the_twenty_best_of_an_image_count():
    truth = person_file(1, [(1, 100)])
    wrong = as_results(truth)[0] | dict(keypoints=[0]*51)
    crowd_out = [wrong | dict(score=.9)]*20 + as_results(truth, score=.5)
    assert equal(truth, crowd_out)["AR"] == 0 and equal(truth, crowd_out[1:])["AR"] == 1

@pytest.mark.parametrize("offset", [.9, .999, 1.001, 1.1])
@pytest.mark.parametrize("K", [1, 8])
def test_people_at_the_edge_of_reach(offset, K):
    "Far pairs are dropped early, but none that reaches OKS 0.5: here the distance is that of OKS 0.5 times `offset`, along x and along y."
    truth = person_file(2, [(1, 100), (2, 100)], K, keypoints=[f"joint_{k}" for k in range(K)])
    for a in truth["annotations"]: a["keypoints"] = [50, 50, 2]*K
    reach = offset * 100 * .2 * np.sqrt(2*np.log(2))
    results = [r | dict(keypoints=[50 + dx*reach, 50 + dy*reach, 1]*K) for r, (dx, dy) in zip(as_results(truth), ((1, 0), (0, -1)))]
    assert equal(truth, results, [.1]*K)["AR50"] == (offset < 1)
    nobody = truth | dict(annotations=[a | dict(bbox=[40, 40, 10, 10], keypoints=[0]*3*K) for a in truth["annotations"]]) # one counts, by its num_keypoints, but is measured by its doubled box
    results = [r | dict(keypoints=[x, y, 1]*K) for r, (x, y) in zip(as_results(truth), ((60 + reach, 45), (45, 30 - reach)))]
    assert equal(nobody, results, [.1]*K)["AR50"] == (offset < 1)

def test_many_images_use_wide_cells():
    "More than 65,535 cells: another integer type sorts."
    truth = person_file(70_000, [(69_999, 100), (2, 100)])
    results = as_results(truth) + [as_results(truth)[0] | dict(image_id=65_540 + k, score=.1*k) for k in range(9)]
    ours = quiet(truth, results)
    assert {m: ours[m] for m in METRICS} == reference(truth, results, image_ids={r["image_id"] for r in results})[0] and ours["images"] == 70_000 and ours["AP"] < 1

@needs_mini
@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("noise", [0, .02, .1])
def test_coco_mini(split, noise):
    file = MINI/"annotations"/f"person_keypoints_{split}.json"
    truth, rng = json.loads(file.read_text()), np.random.default_rng(0)
    results = []
    for a in truth["annotations"]:
        for _ in range(3):
            joints = np.array(a["keypoints"], float).reshape(-1, 3)
            joints[:, :2] += rng.normal(size=(17, 2)) * noise * np.sqrt(a["area"])
            results.append(dict(image_id=a["image_id"], category_id=1, keypoints=joints.ravel().tolist(), score=round(float(rng.random()), 1)))
    ours = equal(truth, results)
    assert ours["images"] == len(truth["images"]) and quiet(file, results) == ours
    assert quiet(file, results, engine="pycocotools") == ours
    assert quiet(file, results, images="annotated")["images"] == len({a["image_id"] for a in truth["annotations"]}) < ours["images"]


# ---- the forms of input

def test_forms_of_results_and_truth_agree(tmp_path):
    truth, results = random_coco(20, 10, seed=10)
    sigmas = (.07,)*17
    expected = quiet(truth, results, sigmas)
    (tmp_path/"truth.json").write_text(json.dumps(truth))
    save_results(results, tmp_path/"results.json")
    prepared = load_ground_truth(tmp_path/"truth.json", sigmas)
    arrays = dict(image_ids=results.image_ids, scores=results.scores, keypoints=results.keypoints)
    for form in (results, results.to_coco(), arrays, arrays | dict(category_ids=results.category_ids), tmp_path/"results.json", str(tmp_path/"results.json"), tuple(results.to_coco())):
        assert quiet(prepared, form) == expected
    class Dataset: # what matters of CocoKeypoints
        image_ids, category_ids = [4, 9, 2], [1]
    Dataset.annotations_file = tmp_path/"truth.json"
    mine = [r for r in results.to_coco() if r["image_id"] in Dataset.image_ids]
    assert quiet(Dataset(), mine, sigmas) == quiet(truth, results, sigmas, images=[2, 4, 9])
    with pytest.raises(DataError, match="has no such image"): quiet(Dataset(), results, sigmas)
    assert quiet(load_ground_truth(truth, [.01]*17), results, sigmas) == expected

def test_inputs_are_left_as_they_were():
    truth, results = random_coco(10, 5, seed=11)
    before, found = copy.deepcopy(truth), results.to_coco()
    for engine in ("numpy", "pycocotools"): quiet(truth, found, [.07]*17, engine=engine)
    assert truth == before and found == results.to_coco()

def test_missing_optional_fields_are_computed():
    truth, results = random_coco(30, 5, seed=12, ties=True)
    bare = copy.deepcopy(truth)
    for a in bare["annotations"]:
        del a["num_keypoints"]
        if not a["iscrowd"]: del a["iscrowd"]
        if a.get("iscrowd") and not any(a["keypoints"][2::3]): del a["keypoints"]
    assert any("keypoints" not in a for a in bare["annotations"])
    for engine in ("numpy", "pycocotools"): assert quiet(bare, results, [.07]*17, engine=engine) == quiet(truth, results, [.07]*17)

def test_float32_predictions_survive_the_file(tmp_path):
    rng = np.random.default_rng(0)
    predictions = [dict(scores=rng.random(5, np.float32), labels=np.array([0, 0, 1, 2, -1]), keypoints=rng.random((5, 17, 3), np.float32)) for _ in range(3)]
    listed = to_coco_results([5, 6, 7], predictions, category_ids=(1, 3))
    save_results(listed, tmp_path/"r.json")
    again = load_results(tmp_path/"r.json")
    assert (again.keypoints.astype(np.float32) == np.concatenate([p["keypoints"][:3] for p in predictions])).all()
    assert again.category_ids.tolist() == [1, 1, 3]*3 and again.image_ids.tolist() == [5]*3 + [6]*3 + [7]*3

def test_prints_the_number_of_images(capsys):
    truth = person_file(5, [(1, 100), (2, 100)])
    evaluate_keypoints(truth, as_results(truth))
    assert "scored 5 images, 2 of them annotated" in capsys.readouterr().out
    evaluate_keypoints(truth, as_results(truth), images="annotated")
    assert "scored 2 images" in capsys.readouterr().out
    evaluate_keypoints(truth, as_results(truth), engine="pycocotools", verbose=False)
    assert capsys.readouterr().out == ""


# ---- nothing there

@pytest.mark.parametrize("engine", ["numpy", "pycocotools"])
def test_no_results(engine):
    truth = person_file(3, [(1, 200)])
    for nothing in ([], dict(image_ids=[], scores=[], keypoints=np.zeros((0, 17, 3)))):
        with pytest.warns(UserWarning, match="no results"): numbers = evaluate_keypoints(truth, nothing, engine=engine, verbose=False)
        assert [numbers[m] for m in METRICS] == [0, 0, 0, -1, 0, 0, 0, 0, -1, 0]

@pytest.mark.parametrize("engine", ["numpy", "pycocotools"])
def test_no_ground_truth(engine):
    truth = person_file(3, [(1, 200)])
    results = as_results(truth)
    for people in ([], [truth["annotations"][0] | dict(num_keypoints=0, keypoints=[0]*51)]):
        with pytest.warns(UserWarning, match="nobody with joints"): numbers = evaluate_keypoints(truth | dict(annotations=people), results, engine=engine, verbose=False)
        assert {numbers[m] for m in METRICS} == {-1}
    assert all(len(c) == 0 for c in best_oks(truth | dict(annotations=[]), results).values())

def test_results_only_for_images_that_are_not_scored():
    truth = person_file(3, [(1, 200), (2, 200)])
    only = as_results(truth)[1:]
    for engine in ("numpy", "pycocotools"): assert quiet(truth, only, images=[1], engine=engine)["AP"] == 0


# ---- faults, by name

def change(entries, i, **fields):
    entries = copy.deepcopy(entries)
    for f, v in fields.items():
        if v is ...: del entries[i][f]
        else: entries[i][f] = v
    return entries

@pytest.mark.parametrize("fields, words", [
    (dict(score=...), "'score' is missing"), (dict(score="0.5"), "'score'"), (dict(score=None), "'score'"), (dict(score=float("nan")), "'score'"), (dict(image_id=1.5), "'image_id'"),
    (dict(image_id=99), "'image_id' is 99"), (dict(keypoints=[1.]*50), "'keypoints' has 50.* 51"), (dict(keypoints=["1"]*51), "'keypoints'"), (dict(keypoints=[[1, 2, 3]]*17), "'keypoints'"),
    (dict(keypoints=[float("inf")]*51), "'keypoints'"), (dict(category_id=None), "'category_id'")])
def test_bad_results_are_named(tmp_path, fields, words):
    truth = person_file(2, [(1, 100)]*4)
    (tmp_path/"predictions.json").write_text(json.dumps(change(as_results(truth), 2, **fields)))
    with pytest.raises(DataError, match=words) as error: quiet(truth, tmp_path/"predictions.json")
    assert "predictions.json: entry number 2 of" in str(error.value)

@pytest.mark.parametrize("text, words", [("[{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("{}", "list of results"), ("[3]", "entry number 0"), ("[[1]]", "entry number 0"), ('[{"image_id": 1}]', "keypoints"), ('[{"keypoints": [1, 2]}]', "keypoints")])
def test_bad_result_files_are_named(tmp_path, text, words):
    (tmp_path/"predictions.json").write_text(text)
    with pytest.raises(DataError, match=words) as error: load_results(tmp_path/"predictions.json")
    assert "predictions.json" in str(error.value)
    with pytest.raises(DataError, match="can't be read"): load_results(tmp_path/"absent.json")

@pytest.mark.parametrize("fields, words", [
    (dict(area="big"), "annotation 2: field 'area' is or holds 'big'"), (dict(area=-1), "annotation 2: field 'area'"), (dict(area=float("nan")), "annotation 2: field 'area'"), (dict(keypoints=...), "annotation 2: field 'keypoints'"),
    (dict(keypoints=[1]*48), "annotation 2: field 'keypoints'"), (dict(id=1), "annotation 1: field 'id' occurs 2 times"), (dict(id="a"), "annotation a: field 'id'"), (dict(image_id=...), "annotation 2: field 'image_id'"),
    (dict(bbox=[1, 2, 3]), "annotation 2: field 'bbox'")])
def test_bad_annotations_are_named(tmp_path, fields, words):
    truth = person_file(2, [(1, 100)]*3)
    results = as_results(truth)
    truth["annotations"] = change(truth["annotations"], 1, **fields)
    (tmp_path/"truth.json").write_text(json.dumps(truth))
    with pytest.raises(DataError, match=words) as error: quiet(tmp_path/"truth.json", results)
    assert "truth.json" in str(error.value)

def test_other_faults_are_named():
    truth = person_file(2, [(1, 100)])
    results = as_results(truth)
    for arguments, words in ((dict(engine="matlab"), "engine"), (dict(images="some"), "images"), (dict(images=[]), "no images"), (dict(images=[77]), "no image 77"), (dict(category_id=4), "no category 4"),
                             (dict(sigmas=[.1]*5), "keypoints"), (dict(sigmas=[0.]*17), "sigmas"), (dict(sigmas=[float("nan")]*17), "sigmas")):
        with pytest.raises(DataError, match=words): quiet(truth, results, **arguments)
    for broken in (dict(images=[]), {}, [], {k: v for k, v in truth.items() if k != "annotations"}):
        with pytest.raises(DataError): quiet(broken, results)
    with pytest.raises(DataError, match="3 joints.*17"): quiet(truth, dict(image_ids=[1], scores=[.1], keypoints=np.zeros((1, 3, 3))))
    for arrays in (dict(image_ids=[1], scores=[.1]), dict(image_ids=[1, 2], scores=[.1], keypoints=np.zeros((1, 17, 3))), dict(image_ids=[1], scores=[np.nan], keypoints=np.zeros((1, 17, 3))), dict(image_ids=[1], scores=[.1], keypoints=np.zeros((1, 51)))):
        with pytest.raises(DataError): quiet(truth, arrays)
    two = truth | dict(categories=truth["categories"] + [dict(id=2, name="fish", keypoints=["nose", "tail"])])
    with pytest.raises(DataError, match="category_id"): quiet(two, results)
    assert quiet(two, results, category_id=1)["AP"] == pytest.approx(1)
    with pytest.raises(NonFiniteError, match="image 8"): results_from_predictions([7, 8], [dict(scores=np.array([s]), labels=np.array([0]), keypoints=np.zeros((1, 17, 3))) for s in (.5, np.nan)])

def test_what_is_left_out_is_counted():
    truth = person_file(2, [(1, 100)])
    with pytest.warns(UserWarning, match="1 results of categories other"): evaluate_keypoints(truth, as_results(truth) + as_results(truth, category_id=0), verbose=False)
    stray = truth | dict(annotations=truth["annotations"] + [truth["annotations"][0] | dict(id=50, image_id=1234)])
    with pytest.warns(UserWarning, match="1 annotations left out.*annotation 50"): evaluate_keypoints(stray, as_results(truth), verbose=False)
    fish = dict(images=[dict(id=1)], categories=[dict(id=3, name="fish", keypoints=["nose", "tail"], skeleton=[])], annotations=[dict(id=1, image_id=1, category_id=3, area=99, bbox=[1, 1, 4, 4], keypoints=[1, 1, 2, 5, 5, 2])])
    with pytest.warns(UserWarning, match="0.05"): assert evaluate_keypoints(fish, as_results(fish), verbose=False)["AP"] == pytest.approx(1)

def test_a_failed_save_leaves_the_old_file(tmp_path):
    truth = person_file(2, [(1, 100)])
    save_results(as_results(truth), tmp_path/"r.json")
    before = (tmp_path/"r.json").read_text()
    with pytest.raises(DataError): save_results(change(as_results(truth), 0, score=float("nan")), tmp_path/"r.json")
    assert (tmp_path/"r.json").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]


# ---- best_oks

@some
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_best_oks_tells_the_same_story_as_pycocotools(seed, ties):
    truth, results = random_coco(8, 12, seed, 5, ties=ties)
    _, run = reference(truth, results.to_coco(), [.1]*5)
    table = best_oks(truth, results, sigmas=[.1]*5)
    found = {}
    for e in run.evalImgs[:len(truth["images"])]: # area "all"; row 0 is OKS 0.5; loadRes numbers results from 1
        if e: found |= {g: int(d) - 1 for g, d, ignore in zip(e["gtIds"], e["gtMatches"][0], e["gtIgnore"]) if not ignore}
    assert sorted(found) == sorted(table["annotation_id"].tolist())
    for g, matched, r, similarity, score in zip(*(table[k].tolist() for k in ("annotation_id", "matched", "result", "oks", "score"))):
        assert matched == (found[g] >= 0) and (not matched or r == found[g])
        if r >= 0: assert score == results.scores[r] and (similarity >= .5 or not matched)

def test_sigmas_given_to_a_dataset_are_those_it_is_scored_with(tmp_path):
    from poet_nb.coco import CocoKeypoints
    truth, results = random_coco(20, 10, seed=10)
    names = [f"joint_{k}" for k in range(17)]
    truth["categories"] = [truth["categories"][0] | dict(keypoints=names, skeleton=[[1, 2]])]
    truth["images"] = [dict(width=640, height=480, file_name=f"{im['id']}.jpg") | im for im in truth["images"]]
    (tmp_path/"truth.json").write_text(json.dumps(truth))
    wide = (.3,)*17
    data = CocoKeypoints(tmp_path, tmp_path/"truth.json", sigmas=wide)
    assert data.skeleton.sigmas == wide and quiet(data, results) == quiet(truth, results, wide) != quiet(truth, results, (.05,)*17)
