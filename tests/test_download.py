"""Downloading COCO from a server on this machine that does everything that servers do to people."""
import errno
import hashlib
import io
import json
import os
import re
import time
import zipfile
from dataclasses import dataclass, field
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from conftest import PERSON, person
from PIL import Image

from poet_nb.coco import COCO_SHA256, COCO_URL, Source, choose_subset, download_coco, extract, fetch, one_at_a_time, open_coco
from poet_nb.config import ConfigError, DataError
from poet_nb.engine import only_here

BYTES = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@dataclass
class Server:
    "Files by path, and how badly each request is treated."
    files: dict = field(default_factory=dict)   # path -> bytes
    ranges: bool = True                         # understands Range
    tag: str = '"one"'                          # ETag; "" sends none
    told_length: bool = True                    # sends Content-Length
    cut: dict = field(default_factory=dict)     # number of the request -> bytes after which it hangs up
    codes: dict = field(default_factory=dict)   # number of the request -> HTTP error
    silent: set = field(default_factory=set)    # numbers of requests that are never answered
    shift: int = 0                              # answers ranges that begin so many bytes late
    log: list = field(default_factory=list)     # (path, Range header, status)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler):
        number, wanted = len(self.log), handler.headers.get("Range")
        content, start, code = self.files.get(handler.path), 0, 200
        if number in self.silent: time.sleep(1.5)
        if content is None or number in self.codes: code = self.codes.get(number, 404)
        elif wanted and self.ranges and handler.headers.get("If-Range", self.tag) == self.tag:
            start, code = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) + self.shift, 206
            if start >= len(content): code = 416
        self.log.append((handler.path, wanted, code))
        handler.send_response(code)
        body = content[start:] if code in (200, 206) else b"<html>an error</html>"
        if code == 206: handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if code == 416: handler.send_header("Content-Range", f"bytes */{len(content)}")
        if self.tag and code in (200, 206): handler.send_header("ETag", self.tag)
        if self.told_length: handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:self.cut.get(number)])


@pytest.fixture
def server(monkeypatch, serve):
    "A server that behaves until it is told otherwise."
    monkeypatch.delenv("POET_COCO_URL", raising=False)
    state = Server(files={"/file": BYTES})
    state.url = serve(state.answer)
    return state


def patient(server, **options) -> Source: return Source(server.url, **{**dict(wait=.001, timeout=.5, retries=4, progress=False), **options})


def get(server, tmp_path, **options) -> bytes:
    "Fetch the file; nothing but the file may be left."
    path = fetch(f"{server.url}/file", tmp_path / "file", patient(server, **options))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    return path.read_bytes()


# ---- one file ----

def test_a_file_comes_whole_and_only_once(server, tmp_path):
    assert get(server, tmp_path) == BYTES == get(server, tmp_path) and len(server.log) == 1


def test_two_that_want_the_same_file_come_one_after_the_other(server, tmp_path):
    "As the processes of one run, or two runs started together, do with a file of weights."
    server.cut = {0: 100_000, 1: 50_000}
    with ThreadPoolExecutor(3) as pool: got = list(pool.map(lambda _: fetch(f"{server.url}/file", tmp_path / "file", patient(server)).read_bytes(), range(3)))
    assert got == [BYTES] * 3 and len(server.log) == 3, "one of them downloaded, in three pieces"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_goes_while_it_is_looked_at_is_made_anew(tmp_path, monkeypatch):
    "Whoever had it before removes it, at any moment."
    about, looked = os.fstat, []
    def fstat(number):
        looked.append(number)
        if len(looked) == 1: (tmp_path / "file.lock").unlink()
        return about(number)
    monkeypatch.setattr(os, "fstat", fstat)
    with one_at_a_time(tmp_path / "file"): assert len(looked) == 2 and [p.name for p in tmp_path.iterdir()] == ["file.lock"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_without_locks_of_the_system_nothing_is_left(tmp_path, monkeypatch, kind):
    "As on some network file systems."
    fcntl = pytest.importorskip("fcntl")
    def none(*_): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, kind, none)
    with one_at_a_time(tmp_path / "file") if kind == "flock" else only_here(tmp_path / "run"): pass
    assert not list(tmp_path.iterdir())


def test_a_full_quota_is_a_full_disk_whatever_its_number(server, tmp_path, monkeypatch):
    monkeypatch.setattr(errno, "EDQUOT", 69)                                 # as on macOS
    def full(*_): raise OSError(69, "Disc quota exceeded")
    monkeypatch.setattr("poet_nb.coco._attempt", full)
    with pytest.raises(DataError, match="no room left on the disk"): get(server, tmp_path)


def test_a_dropped_connection_goes_on_where_it_stopped(server, tmp_path):
    server.cut = {0: 100_000, 1: 50_000, 2: 0, 3: 7}
    assert get(server, tmp_path) == BYTES
    assert [wanted for _, wanted, _ in server.log] == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-", "bytes=150007-"]


@pytest.mark.parametrize("how", [dict(ranges=False), dict(tag=""), dict(tag='W/"weak"')])
def test_servers_of_all_kinds(server, tmp_path, how):
    for name, value in how.items(): setattr(server, name, value)
    server.cut = {0: 100_000, 1: 120_000}
    assert get(server, tmp_path) == BYTES and len(server.log) == 3


def test_a_server_without_ranges_that_always_hangs_up_is_given_up(server, tmp_path):
    server.ranges, server.cut = False, dict.fromkeys(range(50), 100_000)
    with pytest.raises(DataError, match="connection ended early.*run the same command again"): get(server, tmp_path)
    assert len(server.log) == 1 + 4  # the first brought something new


def test_an_interrupted_run_goes_on(server, tmp_path):
    server.cut = dict.fromkeys(range(1, 50), 0) | {0: 200_000}
    with pytest.raises(DataError): get(server, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file.part", "file.part.tag"} and (tmp_path / "file.part").stat().st_size == 200_000
    server.cut = {}
    assert get(server, tmp_path) == BYTES and server.log[-1][1] == "bytes=200000-"


def test_a_file_that_changed_in_between_comes_anew(server, tmp_path):
    server.cut = dict.fromkeys(range(1, 50), 0) | {0: 200_000}
    with pytest.raises(DataError): get(server, tmp_path)
    server.cut, server.tag, server.files["/file"] = {}, '"two"', BYTES[::-1]
    assert get(server, tmp_path) == BYTES[::-1] and server.log[-1][2] == 200


def test_a_part_without_a_tag_is_not_trusted(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"from somewhere else")
    assert get(server, tmp_path) == BYTES and server.log[0][1] is None


def test_a_whole_part_needs_only_its_name(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BYTES)
    (tmp_path / "file.part.tag").write_text(server.tag)
    assert get(server, tmp_path) == BYTES and [code for *_, code in server.log] == [416]


def test_a_part_longer_than_the_file_comes_anew(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BYTES + b"too much")
    (tmp_path / "file.part.tag").write_text(server.tag)
    assert get(server, tmp_path) == BYTES and [code for *_, code in server.log] == [416, 200]


def test_a_range_that_was_not_asked_for_is_not_glued_on(server, tmp_path):
    server.cut, server.shift = {0: 100_000}, 10
    assert get(server, tmp_path) == BYTES and [code for *_, code in server.log] == [200, 206, 200]


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_busy_server_is_asked_again(server, tmp_path, code):
    server.codes = {0: code, 1: code}
    assert get(server, tmp_path) == BYTES and len(server.log) == 3


@pytest.mark.parametrize("code", [404, 403, 410])
def test_a_final_answer_is_final(server, tmp_path, code):
    server.codes = {0: code}
    with pytest.raises(DataError, match=f"/file: the server says {code}"): get(server, tmp_path)
    assert len(server.log) == 1


def test_a_busy_server_is_given_up_in_the_end(server, tmp_path):
    server.codes = dict.fromkeys(range(50), 503)
    with pytest.raises(DataError, match="503.*again"): get(server, tmp_path)
    assert len(server.log) == 4


def test_a_silent_server_is_asked_again(server, tmp_path):
    server.silent = {0}
    assert get(server, tmp_path) == BYTES


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match="refused.*again"): fetch("http://127.0.0.1:9/file", tmp_path / "file", Source(wait=.001, retries=2, progress=False))


def test_without_a_length_the_end_is_the_end(server, tmp_path):
    server.told_length = False
    assert get(server, tmp_path) == BYTES


def test_wrong_content_is_fetched_once_more_and_then_refused(server, tmp_path):
    def check(part):
        if part.read_bytes() != BYTES: raise DataError(f"{part} is wrong")
    server.files["/file"] = b"<html>please log in</html>"
    with pytest.raises(DataError, match="its content is wrong"): fetch(f"{server.url}/file", tmp_path / "file", patient(server), check)
    assert len(server.log) == 2 and not (tmp_path / "file").exists()
    server.files["/file"] = BYTES
    assert fetch(f"{server.url}/file", tmp_path / "file", patient(server), check).read_bytes() == BYTES


def test_folders_that_cannot_be_written(server, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match="taken"): download_coco(tmp_path / "taken", ["val2017"], base_url=server.url, wait=.001, progress=False)


def test_a_full_disk_is_told_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr("poet_nb.coco.shutil.disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    with pytest.raises(DataError, match="needs 0.00 GB more.*make room"): get(server, tmp_path)


# ---- all of COCO ----

SPLITS = ("val2017", "train2017")


def zipped(members: dict) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, content in members.items(): z.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def coco(server):
    "The server offers a COCO of 12 images a split."
    jsons = {}
    for split, first in zip(SPLITS, (1, 101)):
        ids, members = range(first, first + 12), {}
        for i in ids:
            file = io.BytesIO()
            Image.fromarray(np.full((30, 40, 3), i, np.uint8)).save(file, "JPEG")
            members[f"{split}/{i:012d}.jpg"] = file.getvalue()
        server.files |= {f"/{name}": content for name, content in members.items()} | {f"/zips/{split}.zip": zipped(members | {"../evil.txt": b"x", "/evil.txt": b"x"})}
        images = [dict(id=i, width=40, height=30, file_name=f"{i:012d}.jpg", coco_url=f"{COCO_URL}/{split}/{i:012d}.jpg") for i in ids]
        jsons[f"annotations/person_keypoints_{split}.json"] = json.dumps(dict(info={}, images=images, annotations=[person(i, i) for i in ids], categories=[PERSON])).encode()
    server.files["/annotations/annotations_trainval2017.zip"] = zipped(jsons | {"annotations/captions_val2017.json": b"{}"})
    return server


def download(server, folder, splits=SPLITS, subset=None, **options) -> dict:
    return download_coco(folder, splits, subset, **{**dict(base_url=server.url, wait=.001, timeout=.5, retries=4, progress=False), **options})


def complete(folder: Path, split: str, count: int):
    data = open_coco(folder, split)
    assert len(data) == count and [len(t["labels"]) for _, t in data] == [1] * count
    for image, target in data: assert abs(image.float().mean() - int(target["image_id"])) < 2
    assert not list(folder.rglob("*.part*")) and not list(folder.glob("*.zip"))


def names(server) -> list[str]: return [path.rsplit("/", 1)[-1] for path, *_ in server.log]


def test_everything_once(coco, tmp_path):
    assert download(coco, tmp_path) == dict(val2017=12, train2017=12)
    assert names(coco) == ["annotations_trainval2017.zip", "val2017.zip", "train2017.zip"]
    for split in SPLITS: complete(tmp_path, split, 12)
    assert download(coco, tmp_path) == dict(val2017=0, train2017=0) and len(coco.log) == 3
    assert {p.name for p in tmp_path.rglob("*") if p.suffix in (".json", ".txt")} == {f"person_keypoints_{s}.json" for s in SPLITS}
    assert not list(tmp_path.parent.glob("evil.txt"))


def test_only_what_is_missing(coco, tmp_path):
    download(coco, tmp_path)
    (tmp_path / "val2017" / f"{5:012d}.jpg").unlink()
    assert download(coco, tmp_path) == dict(val2017=1, train2017=0)
    complete(tmp_path, "val2017", 12)


def test_connections_that_drop_all_the_time(coco, tmp_path):
    coco.cut = {i: 1500 for i in range(0, 200) if i % 4 != 3}
    assert download(coco, tmp_path, ["val2017"]) == dict(val2017=12)
    complete(tmp_path, "val2017", 12)


def test_a_subset_grows_and_becomes_the_whole(coco, tmp_path):
    assert download(coco, tmp_path, ["val2017"], 3) == dict(val2017=3)
    complete(tmp_path, "val2017", 3)
    first = open_coco(tmp_path).image_ids
    assert first == [int(i) + 1 for i in choose_subset(np.arange(1, 13), 3)]
    assert download(coco, tmp_path, ["val2017"], 3) == dict(val2017=0) and len(coco.log) == 4
    assert download(coco, tmp_path, ["val2017"], 5) == dict(val2017=2) and set(first) < set(open_coco(tmp_path).image_ids)
    assert download(coco, tmp_path, ["val2017"], 100) == dict(val2017=7)
    assert download(coco, tmp_path, ["val2017"]) == dict(val2017=0)
    complete(tmp_path, "val2017", 12)
    assert names(coco).count("annotations_trainval2017.zip") == 1 and "val2017.zip" not in names(coco)
    assert download(coco, tmp_path, ["val2017"], 4) == dict(val2017=0)  # and back, without losing the whole file
    complete(tmp_path, "val2017", 4)
    assert download(coco, tmp_path, ["val2017"]) == dict(val2017=0)
    complete(tmp_path, "val2017", 12)
    assert "segmentation" in json.loads(open_coco(tmp_path).annotations_file.read_text())["annotations"][0]


def test_a_subset_with_one_bad_image_keeps_the_others(coco, tmp_path):
    ids = [int(i) + 1 for i in choose_subset(np.arange(1, 13), 6)]
    bad = f"/val2017/{ids[2]:012d}.jpg"
    right, coco.files[bad] = coco.files[bad], b"<html>blocked</html>"
    with pytest.raises(DataError, match="1 of 6 images.*not a readable image"): download(coco, tmp_path, ["val2017"], 6)
    assert len(list((tmp_path / "val2017").glob("*.jpg"))) == 5
    with pytest.raises(DataError, match="no such file"): open_coco(tmp_path)  # a dataset that opens is complete
    coco.files[bad] = right
    assert download(coco, tmp_path, ["val2017"], 6) == dict(val2017=1)
    complete(tmp_path, "val2017", 6)


def test_a_server_that_has_no_images_is_given_up_soon(coco, tmp_path):
    for path in [p for p in coco.files if p.endswith(".jpg")]: del coco.files[path]
    with pytest.raises(DataError, match="of 12 images.*404"): download(coco, tmp_path, ["val2017"], 12, workers=2)


@pytest.mark.parametrize("what", ["/zips/val2017.zip", "/annotations/annotations_trainval2017.zip"])
def test_a_damaged_zip_is_removed_and_comes_anew(coco, tmp_path, what):
    right = coco.files[what]
    place = right.index(b"JFIF" if "zips" in what else b"width")
    coco.files[what] = right[:place] + b"oops" + right[place + 4:]
    with pytest.raises(DataError, match="broken zip.*CRC.*again"): download(coco, tmp_path, ["val2017"])
    assert not list(tmp_path.glob("*.zip")) and not (tmp_path / "annotations" / "person_keypoints_val2017.json").exists()
    coco.files[what] = right
    assert download(coco, tmp_path, ["val2017"])["val2017"] > 0
    complete(tmp_path, "val2017", 12)


@pytest.mark.parametrize("content", [b"<html>please log in</html>", b"", b"PK\x03\x04 cut off"])
def test_what_is_no_zip(coco, tmp_path, content):
    coco.files["/zips/val2017.zip"] = content
    with pytest.raises(DataError, match="val2017.zip.*not a zip file"): download(coco, tmp_path, ["val2017"])
    assert not list(tmp_path.glob("*.zip*"))


def test_checksums(coco, tmp_path):
    right = {path.rsplit("/", 1)[-1]: hashlib.sha256(content).hexdigest() for path, content in coco.files.items() if path.endswith(".zip")}
    with pytest.raises(DataError, match="val2017.zip.*SHA-256.*instead of 000"): download(coco, tmp_path, ["val2017"], sha256=right | {"val2017.zip": "0" * 64})
    assert download(coco, tmp_path, ["val2017"], sha256=right, keep_zips=True) == dict(val2017=12)
    assert (tmp_path / "val2017.zip").exists() and Source(base_url=COCO_URL).checksums == COCO_SHA256


def test_a_zip_that_lacks_an_image(coco, tmp_path):
    coco.files["/zips/val2017.zip"] = zipped({"val2017/other.jpg": b"x"})
    with pytest.raises(DataError, match="no item named.*000000000001.jpg"): download(coco, tmp_path, ["val2017"])


@pytest.mark.parametrize("name", ["../../evil.jpg", "/tmp/evil.jpg", "..", "a\\..\\evil.jpg", "sub/evil.jpg"])
def test_annotations_that_name_files_elsewhere(coco, tmp_path, name):
    bad = dict(images=[dict(id=1, width=40, height=30, file_name=name)], annotations=[], categories=[PERSON])
    coco.files["/annotations/annotations_trainval2017.zip"] = zipped({f"annotations/person_keypoints_{s}.json": json.dumps(bad) for s in SPLITS})
    for subset in (None, 1):
        with pytest.raises(DataError, match="file_name.*elsewhere"): download(coco, tmp_path, ["val2017"], subset)


def test_links_in_a_zip_become_plain_files(tmp_path):
    link = zipfile.ZipInfo("val2017/a.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z: z.writestr(link, "/etc/passwd")
    extract(tmp_path / "x.zip", {"val2017/a.jpg": tmp_path / "a.jpg"}, progress=False)
    assert not (tmp_path / "a.jpg").is_symlink() and (tmp_path / "a.jpg").read_text() == "/etc/passwd"


def test_wrong_requests(coco, tmp_path):
    for splits in (["test2017"], ["../x2017"], ["val2017", "val"]):
        with pytest.raises(ConfigError, match="splits"): download(coco, tmp_path, splits)
    for subset in (0, -1):
        with pytest.raises(ConfigError, match="subset"): download(coco, tmp_path, ["val2017"], subset)
    assert coco.log == [] and not os.listdir(tmp_path)


def test_the_address_may_come_from_the_environment(coco, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("POET_COCO_URL", coco.url + "/")
    assert download_coco(tmp_path, "val2017", 2, wait=.001) == dict(val2017=2)
    assert "images" in capfd.readouterr().err  # with bars


def test_an_own_copy_of_coco_is_left_alone(coco, tmp_path):
    download(coco, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    coco.log.clear()
    assert download(coco, tmp_path) == dict(val2017=0, train2017=0) and coco.log == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
