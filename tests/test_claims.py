"Estimates, verdicts and the AP of drawn images: cases whose numbers are worked out by hand, or by the ordinary evaluation."
import json
import re
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from poet_nb.analysis import Estimate, bootstrap_interval, drawn_ap, estimate, judge_results, verdict
from poet_nb.coco_eval import AREA_RANGES, evaluate_keypoints, load_ground_truth, random_coco
from poet_nb.config import DataError, PoetError

SIGMAS = np.full(2, .1)
PAIR = dict(id=1, name="pair", keypoints=["a", "b"], skeleton=[])


def person(id, image_id, x, area=2000., **changes):
    "Two joints 20 pixels apart; medium size unless told otherwise."
    return dict(id=id, image_id=image_id, category_id=1, keypoints=[x, 10, 2, x + 20, 10, 2], num_keypoints=2, bbox=[x, 0, 20, 20], area=area, iscrowd=0) | changes


def result(image_id, x, score, category_id=1): return dict(image_id=image_id, category_id=category_id, keypoints=[x, 10, 1, x + 20, 10, 1], score=score)


def dataset(people, categories=(PAIR,)):
    return dict(images=[dict(id=i + 1, width=400, height=40) for i in (0, 1)], annotations=people, categories=list(categories))


def judge(people, results, **kw): return judge_results(load_ground_truth(dataset(people), SIGMAS), results, **kw)


# ---- AP of drawn images

TWO = [person(1, 1, 10), person(2, 2, 10)]


def test_ap_by_hand():
    "One person each; image 1 a hit, image 2 a worse-scored miss: half of the recalls at precision 1, the others never."
    judged = judge(TWO, [result(1, 10, .9), result(2, 300, .8)])
    half = 51 / 101                                                        # recalls 0, 0.01, ..., 0.5 of 101
    drawn = [drawn_ap(judged, np.array(times)) for times in ([1, 1], [2, 0], [0, 2], [3, 1])]
    assert np.allclose([drawn_ap(judged), *drawn], [half, half, 1, 0, 76 / 101]) # the last: three of four people


def test_a_better_scored_miss_weighs_as_often_as_its_image_is_drawn():
    judged = judge(TWO, [result(1, 10, .8), result(2, 300, .9)])
    for hits, misses in product((1, 2, 5), (0, 1, 3)):
        precision, recalls = hits / (hits + misses), np.floor(100 * hits / (hits + misses) + 1e-9) + 1
        assert np.isclose(drawn_ap(judged, np.array([hits, misses])), precision * recalls / 101)


def test_crowd_and_size_do_not_count():
    "A result on a crowd is neither hit nor miss; a large person is nobody among the medium ones."
    people = [person(1, 1, 10), person(2, 1, 200, iscrowd=1), person(3, 2, 10, area=20000.)]
    results = [result(1, 10, .5), result(1, 200, .9), result(2, 10, .9)]
    judged = judge(people, results)
    assert np.isclose(drawn_ap(judged), 1) and judged.people.tolist() == [[1, 1]] and judged.counted.sum(1).tolist() == [2] * 10
    assert judge(people, results, area="medium").people.tolist() == [[1, 0]] and judge(people, results, area="large").people.tolist() == [[0, 1]]


def test_nobody_to_find_and_nothing_found():
    assert np.isnan(drawn_ap(judge([], [result(1, 10, .9)]))) and drawn_ap(judge(TWO, [])) == 0
    assert np.isnan(drawn_ap(judge(TWO, [result(1, 10, .9)], area="large")))


def test_only_some_images():
    judged = judge(TWO, [result(1, 10, .9), result(2, 300, .8)], images=[2])
    assert judged.image_ids.tolist() == [2] and drawn_ap(judged) == 0 and judged.image.tolist() == [0]


def test_faults_have_names():
    with pytest.raises(PoetError, match="all, medium, large"): judge(TWO, [], area="small")
    with pytest.raises(DataError, match="no image 9"): judge(TWO, [], images=[9])
    with pytest.raises(DataError, match="image_id"): judge(TWO, [result(7, 10, .9)])


def copies(data, results, times):
    "The same with images made as often as they were drawn, under new ids."
    made = [(image, 1000 * (copy + 1) + image["id"]) for image, often in zip(data["images"], times) for copy in range(often)]
    people = [a | dict(image_id=new) for image, new in made for a in data["annotations"] if a["image_id"] == image["id"]]
    return (data | dict(images=[image | dict(id=new) for image, new in made], annotations=[a | dict(id=n + 1) for n, a in enumerate(people)]),
            [r | dict(image_id=new) for image, new in made for r in results if r["image_id"] == image["id"]])


@pytest.mark.filterwarnings("ignore:.*nobody with joints")
@settings(max_examples=10)
@given(st.integers(0, 1000), st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(any))
def test_counting_copies_is_making_copies(seed, times):
    data, results = random_coco(12, 8, seed, num_keypoints=3, annotated=.8)
    sigmas, truth = np.full(3, .1), load_ground_truth(data, np.full(3, .1))
    drawn, twins = copies(data, results.to_coco(), times)
    by_copies = evaluate_keypoints(drawn, twins, sigmas, engine="pycocotools", verbose=False)
    for area, name in zip(AREA_RANGES, ("AP", "APM", "APL")):
        ours = drawn_ap(judge_results(truth, results, area=area), np.array(times))
        assert np.isnan(ours) if by_copies[name] == -1 else np.isclose(ours, by_copies[name]), (area, ours, by_copies[name])


def test_several_categories_are_averaged():
    other = PAIR | dict(id=2, name="other")
    people = [person(1, 1, 10), person(2, 2, 10, category_id=2)]
    data = dataset(people, categories=(PAIR, other))
    judged = judge_results(load_ground_truth(data, SIGMAS), [result(1, 10, .9), result(2, 300, .9, 2)])
    assert np.allclose([drawn_ap(judged), drawn_ap(judged, np.array([1, 0])), drawn_ap(judged, np.array([0, 1]))], [.5, 1, 0])


# ---- estimates

def test_an_estimate_is_the_statistic_and_its_interval():
    values, images = np.array([1., 5, 2, 4, 9]), [3, 3, 4, 4, 8]
    number = estimate(lambda rows: values[rows].mean(), images, samples=50, seed=2)
    assert number.value == 4.2 and number.images == 3
    assert (number.low, number.high) == bootstrap_interval(lambda rows: values[rows].mean(), images, 50, seed=2)
    assert json.dumps(vars(number))                                        # plain numbers


def test_an_interval_covers_as_often_as_it_says():
    "200 experiments of 60 images with the mean known: about 95 % of the intervals contain it."
    rng = np.random.default_rng(0)
    def covered():
        x = rng.normal(size=60)
        number = estimate(lambda rows: x[rows].mean(), np.arange(60), samples=150)
        return number.low <= 0 <= number.high
    assert .89 <= np.mean([covered() for _ in range(200)]) <= .99


def test_nothing_to_measure():
    for number in (estimate(lambda rows: 1., []), estimate(lambda rows: np.nan, [1, 2])):
        assert np.isnan([number.value, number.low, number.high]).all() and verdict(number, least=0) == "not measured here"
    assert estimate(lambda rows: np.nan, [1, 2]).images == 2


# ---- verdicts

@pytest.mark.parametrize("low, high, least, most, said", [
    (.1, .2, 0, np.inf, "holds"), (-.1, .2, 0, np.inf, "undecided"), (-.2, -.1, 0, np.inf, "does not hold"), (-.2, 0, 0, np.inf, "does not hold"),
    (.1, .2, -np.inf, .5, "holds"), (.4, .6, -np.inf, .5, "undecided"), (.5, .6, -np.inf, .5, "does not hold"),
    (3, 5, 2, 6, "holds"), (2, 4, 2, 6, "undecided"), (1, 2, 2, 6, "does not hold"), (6, 6, 2, 6, "does not hold"), (1, 7, 2, 6, "undecided")])
def test_verdict(low, high, least, most, said):
    assert verdict(Estimate((low + high) / 2, low, high, 500), least, most) == said
    assert verdict(Estimate((low + high) / 2, low, high, 3), least, most) == "undecided"


@given(*[st.floats(-1, 1)] * 3)
def test_a_claim_and_its_opposite(a, b, bound):
    number = Estimate(a, min(a, b), max(a, b), 100)
    above, below = verdict(number, least=bound), verdict(number, most=bound)
    if number.low <= bound <= number.high: assert "holds" not in (above, below)
    else: assert {above, below} == {"holds", "does not hold"}


# ---- what the notebooks say

ROOT = Path(__file__).parents[1]


def printed(notebook):
    "All that a notebook's cells have printed."
    outputs = [o for cell in json.loads((ROOT / f"nbs/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"] for o in cell.get("outputs", [])]
    return "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)


def table():
    "Name of each claim -> (where, number, verdict), of the committed notebook."
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|[^|]+\| ([^|]+) \| \*\*(.+)\*\* \|$", printed("62_claims"), flags=re.M)
    assert len(rows) == len({name for name, *_ in rows}) > 20
    return {name: tuple(rest) for name, *rest in rows}


def test_readme_says_of_the_claims_what_the_notebook_says():
    rows, readme = table(), " ".join((ROOT / "README.md").read_text().split())
    verdict = {name: said for name, (_, _, said) in rows.items()}
    for name, said, words in (("face", "holds", "attends to the head more than to the image at large"), ("face_most", "does not hold", "shoulders get more"), ("individual_most", "does not hold", "a third of that is the individual's"),
                              ("joints_fail_official", "does not hold", "a third of the AP, not the half"), ("joints_fail", "not measured here", "could not be measured"), ("ae_8", "holds", "ahead of AE at stride 8"),
                              ("ae_4", "does not hold", "at stride 16 beats AE at stride 4 did not come out")):
        assert verdict[name] == said and words in readme, (name, verdict[name])
    assert {verdict[f"ae_{s}"] for s in (16, 32)} == {"holds, AE has no AP at 128 pixels"} and "trivially at 16 and 32" in readme
    assert 60 <= 100 * float(rows["joints_fail_official"][1].split()[0]) <= 70 and .3 <= float(rows["individual_most"][1].split()[0]) <= .37


def test_the_papers_claims_are_counted_apart_from_ours():
    rows, text = table(), printed("62_claims")
    ours = sum(where.startswith("ours") for where, *_ in rows.values())
    assert f"{len(rows) - ours} claims of the paper: " in text and f"{ours} additions of ours: " in text
    counts = re.search(r"claims of the paper: (.+?)\. \d+ additions of ours: (.+?)\. \d", text)
    for said, sign in zip(counts.groups(), (False, True)):
        mine = [verdict for where, _, verdict in rows.values() if where.startswith("ours") == sign]
        assert int(re.search(r"(\d+) hold", said)[1]) == sum(v.startswith("holds") for v in mine)
        assert int(re.search(r"(\d+) do(es)? not hold", said)[1]) == sum(v.startswith("does not hold") for v in mine)


def test_what_did_not_reproduce_is_named_with_a_reason():
    "Each verdict of notebook 62 is in 63, and each that does not hold has a reason."
    lines = re.findall(r"^\| 62_claims \| ([^|]+) \| ([^|]+) \| ([^|]*) \|$", printed("63_reproduce"), flags=re.M)
    assert [finding.split(" (")[0] for _, finding, _ in lines] == [verdict for *_, verdict in table().values()], "63 was executed after another 62"
    for statement, finding, why in lines: assert bool(why.strip()) == bool(re.match("does not hold|undecided", finding)), statement
    assert "no run was made, so that goal has not been tried" in printed("63_reproduce")


def test_the_flip_tests_numbers_on_the_first_page_are_those_of_the_table():
    "The cell of notebook 60 takes minutes, so the first page has its numbers typed."
    text = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in nbformat.read(ROOT / "nbs/60_table1.ipynb", 4).cells if c.cell_type == "code" and "flipped" in c.source for o in c.outputs)
    rows = {row[0]: row[2:4] for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|"))}
    readme = (ROOT / "README.md").read_text()
    sentence = readme[readme.index("With a flip test, ours too"):].split("(notebook 60)")[0]
    for run in ("tiny", "growing", "tiny_128", "quality"): assert " to ".join(rows[run]) in sentence, run
    assert sentence.count(" from ") == 4
