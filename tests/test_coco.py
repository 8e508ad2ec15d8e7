"""COCO files and images: whatever is wrong with them, the result is a right dataset or a DataError."""
import copy
import gc
import io
import json
import os
import pickle
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from conftest import PERSON, person
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from poet_nb import coco
from poet_nb.coco import CocoKeypoints, describe, image_target, index_coco, open_coco, open_split, read_image, splits_of
from poet_nb.coco_eval import evaluate_keypoints, load_ground_truth
from poet_nb.config import ConfigError, DataConfig, DataError
from poet_nb.keypoints import COCO_PERSON

pytestmark = pytest.mark.filterwarnings("ignore:.*(outside their image|num_keypoints|area 0|missing):UserWarning")


# ---- images ----

def smooth(height: int, width: int) -> np.ndarray:
    "A picture that JPEG keeps well."
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind, mode, options", [
    ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", dict(progressive=True)), ("JPEG", "RGB", dict(subsampling=2)),
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "LA", {}), ("PNG", "P", {}), ("PNG", "1", {}), ("PNG", "L", {}),
    ("BMP", "RGB", {}), ("GIF", "P", {}), ("TIFF", "CMYK", {}), ("TIFF", "YCbCr", {}), ("WEBP", "RGB", dict(lossless=True)), ("PPM", "RGB", {})])
def test_every_kind_of_image(tmp_path, kind, mode, options):
    picture = Image.fromarray(smooth(37, 53)).convert(mode)
    path = tmp_path / "picture"  # the content decides, not the name
    path.write_bytes(saved(picture, kind, **options))
    image = read_image(path, size=(37, 53))
    assert image.shape == (3, 37, 53) and image.dtype == torch.uint8
    expected = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < (3 if kind == "JPEG" else .5)


def test_what_helps_depends_on_whether_there_are_annotations(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for name, size, told in (("broken.jpg", None, "replace the file$"), ("broken.jpg", (5, 5), "or take it out of the annotations$"), ("no.jpg", None, "is the path right.$"), ("no.jpg", (5, 5), "mend field file_name")):
        with pytest.raises(DataError, match=told): read_image(tmp_path / name, size)


@pytest.mark.skipif(os.name == "nt", reason="there a backslash is what divides folders")
def test_names_that_windows_has_written_are_found(tmp_path):
    for name in ("day/a.jpg", "odd\\name.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(dict(images=[dict(id=i, width=9, height=9, file_name=n) for i, n in enumerate(("day\\a.jpg", "odd\\name.jpg", "day\\b.jpg"))], annotations=[person(id=1, image_id=0)], categories=[PERSON])))
    data = CocoKeypoints(tmp_path, file)
    assert [data.image_path(i) for i in range(2)] == [tmp_path / "day/a.jpg", tmp_path / "odd\\name.jpg"] and data.load(0)[0].shape == (3, 9, 9)
    assert coco.missing_images(data) == [tmp_path / "day/b.jpg"]


def test_what_a_file_manager_leaves_is_no_other_dataset(tmp_path):
    file = tmp_path / "all.json"
    for i in range(4):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / f"pictures/{i}.jpg")
    file.write_text(json.dumps(dict(images=[dict(id=i, width=9, height=9, file_name=f"{i}.jpg") for i in range(4)], annotations=[person(id=i, image_id=i) for i in range(1, 4)], categories=[PERSON])))
    (tmp_path / "out/train2017").mkdir(parents=True)
    (tmp_path / "out/train2017/.DS_Store").touch()
    assert sum(coco.lay_out(tmp_path / "pictures", file, tmp_path / "out").values()) == 4
    (tmp_path / "out/train2017/notes.txt").touch()
    with pytest.raises(DataError, match="notes.txt"): coco.lay_out(tmp_path / "pictures", file, tmp_path / "out")


def test_missing_images_are_found_by_one_look_into_each_folder(tmp_path, monkeypatch):
    names = ["a.jpg", "day 1/a.jpg", "day 1/b.jpg", "day 2/a.jpg", "größe.jpg"]
    for name in (names[0], names[2], names[4]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    file = tmp_path / "a.json"
    file.write_text(json.dumps(dict(images=[dict(id=i, width=9, height=9, file_name=n) for i, n in enumerate(names)], annotations=[person(id=1, image_id=2)], categories=[PERSON])))
    (tmp_path / "day 1/a.jpg").symlink_to("nowhere.jpg")
    looks, asked, scandir, exists = [], [], os.scandir, os.path.exists
    monkeypatch.setattr(os, "scandir", lambda folder: looks.append(folder) or scandir(folder))
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path) or exists(path))
    data = CocoKeypoints(tmp_path, file)
    assert [p.relative_to(tmp_path).as_posix() for p in coco.missing_images(data)] == ["day 1/a.jpg", "day 2/a.jpg"]
    assert len(looks) == 2 and len(asked) == 3, "a question for each folder, for each link, and for each image that is missing"
    assert coco.missing_images(CocoKeypoints(tmp_path, file, with_people_only=True)) == []


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_keep_their_upper_byte(tmp_path, mode):
    values = (smooth(20, 30)[..., 0].astype(np.uint16) << 8) + 77
    picture = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    picture.save(tmp_path / "deep.tif")
    assert Image.open(tmp_path / "deep.tif").mode == mode
    assert np.array_equal(read_image(tmp_path / "deep.tif").numpy(), np.stack([values >> 8] * 3))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_twelve_bits_in_sixteen(tmp_path, kind):
    "The setting makes them an image; without it they are black, which is said, once."
    values = smooth(20, 30)[..., 0].astype(np.uint16) << 4
    Image.fromarray(values).save(tmp_path / f"lab.{kind}")
    assert np.array_equal(read_image(tmp_path / f"lab.{kind}", bits=12).numpy(), np.stack([values >> 4] * 3))
    coco._tell_dark.cache_clear()
    with pytest.warns(UserWarning, match="uses 12 of them.*data.bits=12"): assert read_image(tmp_path / f"lab.{kind}").max() == values.max() >> 8 < 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / f"lab.{kind}")
    Image.fromarray(values << 4).save(tmp_path / f"lab.{kind}")
    with pytest.raises(DataError, match=rf"lab.{kind}.*need data.bits=16, not 12"): read_image(tmp_path / f"lab.{kind}", bits=12)


def test_the_bits_of_a_configuration_reach_the_pixels(made, tmp_path):
    made([person()])
    for name in ("annotations", "mice"): (tmp_path / name).mkdir()
    Image.fromarray(np.full((30, 40), 4080, np.uint16)).save(tmp_path / "mice/1.png")
    (tmp_path / "annotations/mice.json").write_text(json.dumps(dict(images=[dict(id=1, width=40, height=30, file_name="1.png")], annotations=[person()], categories=[PERSON])))
    assert open_split(DataConfig(root=str(tmp_path), bits=12), "mice")[0][0].unique().tolist() == [255]


def test_a_stack_is_refused_and_a_picture_with_a_small_copy_is_not(tmp_path):
    picture = Image.fromarray(smooth(20, 30))
    picture.save(tmp_path / "stack.tif", save_all=True, append_images=[picture, picture])
    with pytest.raises(DataError, match="stack.tif.*3 pages"): read_image(tmp_path / "stack.tif")
    picture.save(tmp_path / "copy.tif", save_all=True, append_images=[picture.resize((3, 2))])
    assert np.array_equal(read_image(tmp_path / "copy.tif").permute(1, 2, 0).numpy(), smooth(20, 30))


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="float.tif.*floating-point"): read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_obeyed_only_if_the_annotations_say_so(tmp_path, orientation, kind):
    stored, note = Image.fromarray(smooth(24, 40)), Image.Exif()
    note[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(saved(stored, kind, exif=note, **(dict(quality=95) if kind == "JPEG" else {})))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    near = lambda image, expected: np.abs(image.permute(1, 2, 0).numpy() - np.asarray(expected).astype(int)).mean() < 3
    assert near(read_image(path), upright)
    assert near(read_image(path, (24, 40)), stored)
    if orientation >= 5: assert near(read_image(path, (40, 24)), upright)
    else:
        with pytest.raises(DataError, match="40 x 24 pixels.*say 24 x 40"): read_image(path, (40, 24))


def test_no_truncated_jpeg_gets_through(tmp_path):
    whole = saved(Image.fromarray(smooth(60, 80)), "JPEG", quality=90)
    path = tmp_path / "cut.jpg"
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut.jpg"): read_image(path)


@settings(max_examples=100)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_damaged_images_are_read_or_refused(tmp_path_factory, kind, data):
    content = bytearray(saved(Image.fromarray(smooth(16, 24)), kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)): content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: image = read_image(path)
        except DataError as error: assert "damaged" in str(error)
        else: assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3


@settings(max_examples=60)
@given(st.binary(max_size=200).flatmap(lambda b: st.sampled_from([b, b"\xff\xd8" + b, b"\x89PNG\r\n\x1a\n" + b, b"GIF89a" + b])))
def test_noise_is_refused(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(noise)
    try: image = read_image(path)
    except DataError: return
    assert image.dtype == torch.uint8 and image.shape[0] == 3  # a few bytes can be a tiny bitmap


@pytest.mark.parametrize("path", ["nowhere.jpg", ".", "nul\0name"])
def test_paths_that_are_no_image(tmp_path, path):
    with pytest.raises(DataError): read_image(f"{tmp_path}/{path}")


# ---- annotations ----

def opened(made, *args, **kwargs) -> CocoKeypoints: return CocoKeypoints(*made(*args), **kwargs)


@pytest.mark.parametrize("changes, said", [
    (dict(keypoints=[1, 2, 2] * 2), "annotation 1: field 'keypoints' has 6 numbers; it must have 9"),
    (dict(keypoints=[1, 2, 2] * 2 + [1, float("nan"), 1]), "annotation 1: field 'keypoints'.*nan"),
    (dict(keypoints=[1, 2, 2] * 2 + [1, 2, 1.5]), "annotation 1: field 'keypoints' has a visibility other than 0, 1 or 2"),
    (dict(keypoints=[1, 2, 2] * 2 + [1, "2", 1]), "annotation 1: field 'keypoints'.*'2'"),
    (dict(keypoints=[[1, 2, 2]] * 3), "annotation 1: field 'keypoints'"),
    (dict(keypoints=None), "annotation 1: field 'keypoints' is missing"),
    (dict(keypoints={}), "annotation 1: field 'keypoints'"),
    (dict(bbox=[1, 2, -3, 4]), "annotation 1: field 'bbox' has a negative size"),
    (dict(bbox=[1, 2, 3]), "annotation 1: field 'bbox' has 3 numbers"),
    (dict(bbox=[1, 2, float("inf"), 4]), "annotation 1: field 'bbox'.*inf"),
    (dict(area=-1), "annotation 1: field 'area' is -1"),
    (dict(area=None, bbox=[]), "annotation 1: field 'bbox'"),
    (dict(bbox=None, keypoints=[0] * 9), "annotation 1: field 'bbox' is missing"),
    (dict(keypoints=[1, 2, 2, 3, 4, 2]), "annotation 1: field 'keypoints' has 6 numbers; it must have 9: x, y, visibility.*write a 2"),
    (dict(keypoints=[1, None, 2] + [0] * 6), "annotation 1: field 'keypoints' is missing .or null"),
    (dict(keypoints=[0, 0, None] + [0] * 6), "annotation 1: field 'keypoints' is missing .or null"),
    (dict(keypoints=[], num_keypoints=3), "annotation 1: field 'keypoints' has 0 numbers"),
    (dict(area=10**400), "annotation 1: field 'area'"),
    (dict(iscrowd=2), "annotation 1: field 'iscrowd' is 2"),
    (dict(iscrowd="no"), "annotation 1: field 'iscrowd'"),
    (dict(image_id=9), "annotation 1: field 'image_id' is 9, which is not among the images"),
    (dict(image_id="1"), "annotation 1: field 'image_id' is '1'; it must be a whole number without quotation marks"),
    (dict(category_id=7), "annotation 1: field 'category_id' is 7"),
    (dict(id=1.5), "annotation number 0 of the list.*field 'id' is 1.5"),
    (dict(id=2**70), "annotation.*field 'id'")])
def test_a_wrong_annotation_is_named(made, changes, said):
    with pytest.raises(DataError, match=rf"made\.json: {said}"): opened(made, [person(**changes), person(2)])


@pytest.mark.parametrize("field", ["id", "image_id", "category_id", "keypoints"])
def test_a_missing_field_is_named(made, field):
    wrong = person()
    del wrong[field]
    with pytest.raises(DataError, match=rf"made\.json: annotation.*field '{field}' is missing"): opened(made, [wrong, person(2)])


@pytest.mark.parametrize("changes, box, area, labelled, said", [
    (dict(bbox=None), [10, 8, 12, 9], 80, 2, "field bbox of annotations is missing 1 times"),
    (dict(area=None), [5, 5, 15, 17], .53 * 120, 2, "field area of annotations is missing 1 times: taken as 53%"),
    (dict(bbox=None, area=None), [10, 8, 12, 9], .53 * 2, 2, "field area of annotations is missing"),
    (dict(keypoints=[], num_keypoints=0), [5, 5, 15, 17], 80, 0, None),
    (dict(keypoints=None, num_keypoints=None), [5, 5, 15, 17], 80, 0, "field keypoints of annotations is missing 1 times"),
    (dict(keypoints=[10, 8, 2, 12, 9, 1, None, float("nan"), 0]), [5, 5, 15, 17], 80, 2, None),
    (dict(keypoints=[10, 8, 0, 12, 9, 0, 0, 0, 0], num_keypoints=2), [5, 5, 15, 17], 80, 0, "num_keypoints of 1 of 2 annotations"),
    (dict(area=0), [5, 5, 15, 17], 0, 2, "1 people with labelled joints have area 0.*poet data split --area")])
def test_what_follows_from_the_rest_is_filled_in_and_told(made, changes, box, area, labelled, said):
    folder, file = made([person(**changes), person(2)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        target = CocoKeypoints(folder, file).load(0)[1]
        reader = [str(w.message) for w in told]
        truth = load_ground_truth(file)
    assert [str(w.message) for w in told[len(reader):] if "sigmas" not in str(w.message)] == reader, "the evaluation says the same"
    assert reader == [] if said is None else any(re.search(said, line) for line in reader), reader
    assert target["boxes"][0].tolist() == box and target["area"][0].item() == pytest.approx(area) and int((target["visibility"][0] > 0).sum()) == labelled
    assert truth.areas[0] == pytest.approx(area) and (truth.keypoints[0, :, 2] > 0).sum() == labelled
    results = [dict(image_id=1, category_id=1, keypoints=[10, 8, 1, 12, 9, 1, 0, 0, 1], score=.5)]
    quiet = dict(sigmas=[.05] * 3, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert evaluate_keypoints(file, results, **quiet) == pytest.approx(evaluate_keypoints(file, results, engine="pycocotools", **quiet))


def test_sizes_that_are_missing_are_those_of_the_files(made):
    folder, file = made([person()], [dict(id=1, file_name="1.png"), dict(id=2, file_name="2.jpg", width=None, height=30)])
    note = Image.Exif()
    note[0x0112] = 6
    Image.fromarray(smooth(30, 40)).save(folder / "1.png")
    Image.fromarray(smooth(40, 30)).save(folder / "2.jpg", exif=note)
    with pytest.warns(UserWarning, match="width or height of images is missing 2 times"): data = CocoKeypoints(folder, file)
    assert data.index.images.sizes.tolist() == [[30, 40], [30, 40]] and data[1][0].shape == (3, 30, 40)
    with pytest.raises(DataError, match="image 1: field 'height' is missing"): index_coco(file)
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="image 1: field 'height' is missing"): CocoKeypoints(folder, file)


@pytest.mark.parametrize("changes, said", [
    (dict(width=0), "image 1: field 'width' is 0"), (dict(height=-3), "image 1: field 'height' is -3"), (dict(width=None), "image 1: field 'width' is missing"),
    (dict(width=40.5), "image 1: field 'width' is 40.5"), (dict(id=2), "image 2: field 'id' 2 is there twice"), (dict(file_name=""), "image 1: field 'file_name'"),
    (dict(file_name=5), "image 1: field 'file_name' is 5"), (dict(file_name="a\0b"), "image 1: field 'file_name'")])
def test_a_wrong_image_is_named(made, changes, said):
    images = [dict(dict(id=1, width=40, height=30, file_name="1.jpg"), **changes), dict(id=2, width=40, height=30, file_name="2.jpg")]
    with pytest.raises(DataError, match=rf"made\.json: {said}"): opened(made, [], images)


@pytest.mark.parametrize("categories, said", [
    ([], "no category has a field 'keypoints'"), ([dict(id=1, name="car")], "detection file"), ([dict(PERSON, skeleton=[[1, 9]])], "skeleton"),
    ([dict(PERSON, keypoints=["a", "a"])], "twice"), ([dict(PERSON, keypoints="nose")], "joint names"), ([PERSON, PERSON], "field 'id' 1 is there twice"),
    ([PERSON, dict(PERSON, id=2, keypoints=["a"], skeleton=[])], "differs between categories"), ([dict(PERSON, id="1")], "field 'id'")])
def test_a_wrong_category_is_named(made, categories, said):
    with pytest.raises(DataError, match=rf"made\.json.*{said}"): opened(made, [], None, categories)


def test_ids_that_are_there_twice(made):
    with pytest.raises(DataError, match="annotation 5: field 'id' 5 is there twice"): opened(made, [person(4), person(5), person(5, 2)])


def test_a_file_cut_anywhere_is_refused(made):
    _, file = made([person(), person(2, 2, iscrowd=1)])
    text = file.read_bytes()
    for length in range(0, len(text), 11):
        file.write_bytes(text[:length])
        with pytest.raises(DataError, match="made.json.*not valid JSON"): index_coco(file)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"a"', "{}", '{"images": {}, "annotations": [], "categories": []}', '{"images": [], "annotations": [3], "categories": []}',
                                  "[" * 100_000, '[{"image_id": 1, "keypoints": [], "score": 1}]', "\x00", '{"a": \xff}'])
def test_what_is_no_coco_file(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.json"): index_coco(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["person_keypoints_mice.json", "keypoints_mice.json", "mice.json"])
def test_annotations_have_one_of_three_names(made, tmp_path, name):
    folder, file = made([person()])
    for place in ("annotations", "mice"): (tmp_path / place).mkdir()
    for other in ("sigmas.json", "captions_mice.json"): (tmp_path / "annotations" / other).write_text("{}")
    os.rename(folder / "1.jpg", tmp_path / "mice/1.jpg")
    with pytest.raises(DataError, match="person_keypoints_mice.json.*no keypoints_mice.json or mice.json"): open_coco(tmp_path, "mice")
    os.rename(file, tmp_path / "annotations" / name)
    assert splits_of(tmp_path) == ["mice"] and len(open_coco(tmp_path, "mice")[0][1]["labels"]) == 1
    (tmp_path / "annotations/person_keypoints_mice.json").write_text("cut")                 # goes before the others
    with pytest.raises(DataError, match="person_keypoints_mice.json: not valid"): open_coco(tmp_path, "mice")


def test_files_that_are_not_there(tmp_path, made):
    folder, file = made([person()])
    for images, annotations in ((folder / "no", file), (folder, folder / "no.json"), (folder, folder)):
        with pytest.raises(DataError): CocoKeypoints(images, annotations)
    with pytest.raises(DataError, match="poet data"): open_coco(tmp_path / "nothing")
    with pytest.raises(DataError, match="person_keypoints_val2017.json"): open_coco(folder)
    with pytest.raises(ConfigError, match="on_bad_image"): CocoKeypoints(folder, file, on_bad_image="ignore")
    with pytest.raises(DataError, match="sigmas"): CocoKeypoints(folder, file, sigmas=(.1,))


JUNK = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([[]]),
                 st.lists(st.one_of(st.integers(-3, 60), st.floats(), st.text(max_size=2), st.none()), max_size=12))
VALID = dict(images=[dict(id=i, width=40, height=30, file_name=f"{i}.jpg") for i in (1, 2, 3)],
             annotations=[person(), person(2, 2, iscrowd=1), person(3, 3, keypoints=[0] * 9), person(4, 1, keypoints=[41, 5, 2, 3, -1, 1, 40, 30, 2])],
             categories=[PERSON, dict(id=2, name="car")])


def places(value, path=()):
    "The paths to all parts of a parsed json file."
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts: yield from places(part, (*path, key))


PLACES = [p for p in places(VALID) if p]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.one_of(st.just("remove"), JUNK)), min_size=1, max_size=3))
@example([(("annotations", 0, "keypoints", 1), 1e300)])
@example([(("images", 0, "id"), 2**62)])
@example([(("categories", 0, "id"), 1.0)])
@example([(("annotations", 0, "id"), True)])
@example([(("annotations", 0, "segmentation"), "[[1, 2]]")])
def test_malformed_files_give_a_right_dataset_or_a_data_error(tmp_path_factory, mutations):
    value = copy.deepcopy(VALID)
    for path, junk in mutations:
        part = value
        try:
            for key in path[:-1]: part = part[key]
            if junk == "remove": del part[path[-1]]
            else: part[path[-1]] = copy.deepcopy(junk)
        except (KeyError, IndexError, TypeError): continue  # an earlier mutation took the place away
    file = tmp_path_factory.getbasetemp() / "malformed.json"
    file.write_text(json.dumps(value))
    try: index = index_coco(file)
    except DataError as error:
        assert "malformed.json" in str(error) and len(str(error)) < 700
        return
    for row, (height, width) in enumerate(index.images.sizes):
        target = image_target(index, row)
        joints, visibility = torch.Tensor(target["keypoints"]), target["visibility"]
        P, K = len(target["labels"]), index.skeleton.num_keypoints
        assert joints.shape == (P, K, 2) and visibility.shape == (P, K) and target["boxes"].shape == (P, 4)
        assert all(torch.isfinite(target[f].float()).all() for f in ("keypoints", "area", "boxes")) and (target["labels"] < len(index.category_ids)).all()
        assert ((joints >= 0) & (joints <= torch.tensor([width, height]))).all() and set(visibility.unique().tolist()) <= {0, 1, 2}


OUTLINES = st.one_of(st.lists(st.lists(st.floats(allow_nan=False), max_size=6), max_size=3), st.just(dict(counts=[3, 4], size=[5, 6])), st.just(dict(counts="a]1[", size=[5, 6])),
                     st.just([]), st.none(), st.just([[1, 2], None]), st.just([["a"]]), st.just([[], [[1e-9, -2]]]))


@settings(max_examples=100)
@given(st.lists(OUTLINES, min_size=1, max_size=4), st.text(max_size=10), st.sampled_from([None, 1]), st.booleans())
@example([[[1.5, 2]]], '"segmentation": [[1]]', None, True)
def test_cutting_outlines_out_changes_nothing_else(tmp_path_factory, outlines, text, indent, last):
    records = [dict(id=i, note=text, keypoints=[[1, 2], i]) for i in range(len(outlines))]
    for record, outline in zip(records, outlines):
        record["segmentation"] = outline
        if not last: record["end"] = record.pop("note")
    file = tmp_path_factory.getbasetemp() / "outlines.json"
    file.write_text(json.dumps(dict(annotations=records), indent=indent))
    for record in records: del record["segmentation"]
    assert coco._parse(file.read_bytes()) == dict(annotations=records) and gc.isenabled()


# ---- targets ----

def test_targets_say_what_the_file_says(made):
    data = opened(made, [person(7, 3), person(3, 1, iscrowd=1), person(5, 3, keypoints=[0] * 9), person(6, 1, num_keypoints=0)])
    assert [len(t["labels"]) for _, t in data] == [1, 0, 2] and data.image_ids == [1, 2, 3] and data.index.people.crowds.tolist() == [1, 0, 0]
    assert [t["ignore"].tolist() for _, t in data] == [[[5, 5, 15, 17]], [], []]
    target = data[2][1]
    assert target["keypoints"].tolist() == [[[10, 8], [12, 9], [0, 0]], [[0, 0]] * 3] and target["visibility"].tolist() == [[2, 1, 0], [0, 0, 0]]
    assert target["boxes"].tolist() == [[5, 5, 15, 17]] * 2 and target["area"].tolist() == [80, 80] and target["iscrowd"].tolist() == [0, 0]
    assert target["orig_size"].tolist() == target["size"].tolist() == [30, 40] and int(target["image_id"]) == 3
    dtypes = dict(image_id=torch.int64, labels=torch.int64, keypoints=torch.float32, visibility=torch.int64, area=torch.float32, boxes=torch.float32,
                  ignore=torch.float32, iscrowd=torch.int64, orig_size=torch.int64, size=torch.int64)
    for _, t in data: assert {k: v.dtype for k, v in t.items()} == dtypes


def test_an_image_of_crowds_only_has_an_empty_target(made):
    data = opened(made, [person(i, 2, iscrowd=1) for i in (1, 2)])
    assert all(t["keypoints"].shape == (0, 3, 2) and t["visibility"].shape == (0, 3) and t["boxes"].shape == (0, 4) for _, t in data)
    assert len(opened(made, [person(1, 2, iscrowd=1)], with_people_only=True)) == 0


def test_a_crowd_may_leave_its_keypoints_out(made):
    crowd, nobody, forgotten = person(1, 1, iscrowd=1), person(2, 2, num_keypoints=0), person(3, 3)
    for record in (crowd, nobody, forgotten): del record["keypoints"]
    assert [len(t["labels"]) for _, t in opened(made, [crowd, nobody])] == [0, 1, 0]
    with pytest.raises(DataError, match="annotation 3: field 'keypoints' is missing"): opened(made, [crowd, forgotten])


def test_joints_outside_become_unlabelled_and_are_counted(made):
    with pytest.warns(UserWarning, match="made.json: 2 labelled joints"):
        data = opened(made, [person(keypoints=[40, 30, 2, 40.5, 3, 2, 5, -1, 1]), person(2, keypoints=[0, 0, 1, 900, 900, 0, 0, 0, 0])])
    target = data[0][1]
    assert target["visibility"].tolist() == [[2, 0, 0], [1, 0, 0]] and target["keypoints"][0].tolist() == [[40, 30], [0, 0], [0, 0]]
    assert describe(data)["keypoints_outside"] == 2


def test_several_categories(made):
    zoo = [dict(PERSON, id=4, name="cat"), dict(id=5, name="car"), dict(PERSON, id=9, name="dog")]
    records = [person(1, 1, category_id=9), person(2, 1, category_id=4), person(3, 2, category_id=5, keypoints=None)]
    both = opened(made, records, None, zoo)
    assert both.category_ids == [4, 9] and both[0][1]["labels"].tolist() == [1, 0] and len(both[1][1]["labels"]) == 0
    for category in (9, "dog", ["dog"], [9]):
        dogs = opened(made, records, None, zoo, category=category)
        assert dogs.category_ids == [9] and dogs.skeleton.name == "dog" and dogs[0][1]["labels"].tolist() == [0]
    with pytest.raises(DataError, match="no category 'cow'; there are: 4 cat, 5 car"): opened(made, records, None, zoo, category="cow")
    with pytest.raises(DataError, match="joint names"): opened(made, records, None, zoo, category="car")


def test_empty_file_and_image_in_subfolder(made, tmp_path):
    assert len(opened(made, [], [])) == 0 and describe(opened(made, [], []))["images"] == 0
    (tmp_path / "ä b").mkdir()
    Image.fromarray(smooth(30, 40)).save(tmp_path / "ä b" / "ü.png")
    data = opened(made, [person()], [dict(id=1, width=40, height=30, file_name="ä b/ü.png")])
    assert np.array_equal(data[0][0].permute(1, 2, 0).numpy(), smooth(30, 40))


def test_indices(made):
    data = opened(made, [person()])
    assert int(data[-1][1]["image_id"]) == 3 and int(data[np.int64(1)][1]["image_id"]) == 2
    for i in (3, -4):
        with pytest.raises(IndexError): data[i]


# ---- bad images and workers ----

class Doubled:
    "A transform that can be pickled."
    def __call__(self, image, target): return image, {"image_id": target["image_id"], "twice": torch.Tensor(target["keypoints"]) * 2}


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_bad_images_are_counted_in_worker_processes(made, context):
    if context == "fork" and sys.platform != "linux": pytest.skip("no fork")
    folder, file = made([person()])
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:300])
    data = CocoKeypoints(folder, file, Doubled(), on_bad_image="skip")
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=context, persistent_workers=True)
    for _ in range(2):
        assert [(int(t["image_id"]), len(t["twice"])) for _, t in loader] == [(1, 1), (3, 0), (3, 0)]
        assert data.bad_images() == [folder / "2.jpg"] == data.bad_images(forget=True) and data.bad_images() == []


def test_a_bad_image_in_a_worker_is_a_data_error(made):
    folder, file = made([person()])
    (folder / "2.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="2.jpg"): list(DataLoader(CocoKeypoints(folder, file), batch_size=None, num_workers=1))


def test_a_folder_of_bad_images_is_an_error(made):
    folder, file = made([])
    for i in (1, 2, 3): (folder / f"{i}.jpg").unlink()
    data = CocoKeypoints(folder, file, on_bad_image="skip")
    with pytest.raises(DataError, match="3 bad images in a row.*1.jpg"): data[1]
    assert len(data.bad_images()) == 3


def test_an_image_of_another_size_is_bad(made):
    folder, file = made([person()])
    Image.fromarray(smooth(60, 80)).save(folder / "1.jpg")
    with pytest.raises(DataError, match="1.jpg.*80 x 60 pixels.*say 40 x 30"): CocoKeypoints(folder, file)[0]
    assert int(CocoKeypoints(folder, file, on_bad_image="skip")[0][1]["image_id"]) == 2


def test_pickled_copies_count_for_their_own_workers(made):
    folder, file = made([person()])
    (folder / "1.jpg").write_bytes(b"")
    data = pickle.loads(pickle.dumps(CocoKeypoints(folder, file, on_bad_image="skip")))
    assert data._bad.is_shared() and [int(t["image_id"]) for _, t in DataLoader(data, batch_size=None, num_workers=1)] == [2, 2, 3]
    assert data.bad_images() == [folder / "1.jpg"]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def copied(work) -> float:
    "Megabytes that a forked process makes its own while it works."
    gc.collect()
    inside, outside = os.pipe()
    if os.fork() == 0:
        def dirty(): return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private_Dirty"))
        gc.disable()
        before = dirty()
        work()
        os.write(outside, str(dirty() - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(inside, 100)) / 1e3


def copied_by_readers(file) -> tuple[float, float]:
    "What reading every person copies: from our arrays, and from a list of dicts."
    parsed, index = coco.read_annotations(file), index_coco(file)
    return (copied(lambda: [image_target(index, row) and None for row in range(len(index.images.ids))]),
            copied(lambda: [sum(1 for _ in r["keypoints"]) for r in parsed["annotations"]]))


def test_workers_share_the_annotations(tmp_path):
    "A forked process that reads every target must not copy them page by page; with a list of dicts it does."
    n = 10_000
    images = [dict(id=i, width=640, height=480, file_name=f"{i:012d}.jpg") for i in range(n)]
    records = [person(i, i // 2, keypoints=[v for j in range(17) for v in ((i + j) % 400 + .5, j, 2)]) for i in range(2 * n)]
    file = tmp_path / "big.json"
    file.write_text(json.dumps(dict(images=images, annotations=records, categories=[COCO_PERSON.to_category()])))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh: arrays, dicts = fresh.submit(copied_by_readers, file).result() # a heap without other tests' leftovers
    assert dicts > 3 * arrays + 1, (arrays, dicts)


# ---- real COCO ----

@pytest.mark.parametrize("split, images, crowds", [("val2017", 10, 2), ("train2017", 24, 3)])
def test_coco_mini(coco_mini, split, images, crowds):
    from pycocotools.coco import COCO
    data = open_coco(coco_mini, split)
    truth = COCO(str(data.annotations_file))
    assert data.skeleton == COCO_PERSON and len(data) == images and data.image_ids == truth.getImgIds()
    for i, (image, target) in enumerate(data):
        about = truth.loadImgs(data.image_ids[i])[0]
        annotations = truth.loadAnns(truth.getAnnIds(data.image_ids[i], iscrowd=0))
        joints = torch.tensor([a["keypoints"] for a in annotations], dtype=torch.float).reshape(-1, 17, 3)
        assert image.shape == (3, about["height"], about["width"]) and image.float().std() > 10
        assert torch.equal(torch.Tensor(target["keypoints"]), joints[..., :2]) and torch.equal(target["visibility"], joints[..., 2].long())
        assert torch.equal(target["area"], torch.tensor([a["area"] for a in annotations]))
        box = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        assert torch.allclose(target["boxes"], torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1))
    counts, everybody = describe(data), truth.loadAnns(truth.getAnnIds())
    people = [a for a in everybody if not a["iscrowd"]]
    assert counts["people"] == len(people) and counts["crowds"] == len(everybody) - len(people) == crowds
    assert counts["people_without_keypoints"] == sum(a["num_keypoints"] == 0 for a in people)
    assert counts["keypoints_visible"] + counts["keypoints_hidden"] == sum(a["num_keypoints"] for a in people) and counts["keypoints_outside"] == 0
    with_people = open_coco(coco_mini, split, with_people_only=True)
    assert set(with_people.image_ids) == {a["image_id"] for a in people} and describe(with_people)["images_without_people"] == 0
