"""What all tests share: examples drawn by hypothesis are the same every time, a busy machine fails none of them, and small datasets."""
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

settings.register_profile("repeat", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeat")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    "A folder with real COCO images, named by POET_COCO."
    root = Path(os.environ.get("POET_COCO", ""))
    if not os.environ.get("POET_COCO") or not (root / "annotations").is_dir(): pytest.skip("POET_COCO names no folder in COCO's layout")
    return root


@pytest.fixture
def one_thread():
    "Sums that repeat, and no fight over the cores; a file of tests asks for it with `pytestmark`."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poet(capfd, monkeypatch, tmp_path):
    "poet(words): (exit code, standard output, standard error) of the program, in an empty folder; never a traceback."
    from poet_nb import cli
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POET_TRACEBACK", raising=False)

    def call(*words):
        capfd.readouterr()
        code = cli.main([str(w) for w in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err
    return call


@pytest.fixture
def close_figures():
    "Figures that a test leaves open are closed behind it."
    yield
    import matplotlib.pyplot as plt
    plt.close("all")


@pytest.fixture
def serve(monkeypatch):
    "serve(answer): address of a web server on this machine that answers each GET and HEAD by calling `answer` with the handler."
    for name in ("no_proxy", "NO_PROXY"): monkeypatch.setenv(name, "127.0.0.1")
    servers = []

    def start(answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                try: answer(self)
                except (ConnectionError, BrokenPipeError): pass
            do_HEAD = do_GET
            def log_message(self, *args): pass

        web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        web.daemon_threads = True
        threading.Thread(target=web.serve_forever, daemon=True, kwargs=dict(poll_interval=.02)).start()
        servers.append(web)
        return f"http://127.0.0.1:{web.server_port}"
    yield start
    for web in servers: web.shutdown(); web.server_close()


PERSON = dict(id=1, name="person", supercategory="person", skeleton=[[1, 2], [1, 3]], keypoints=["nose", "left_hand", "right_hand"])


def person(id: int = 1, image_id: int = 1, **changes) -> dict:
    "An annotation with three joints: visible, hidden, not labelled."
    return {**dict(id=id, image_id=image_id, category_id=1, keypoints=[10, 8, 2, 12, 9, 1, 0, 0, 0], num_keypoints=2, bbox=[5., 5., 10., 12.],
                   area=80., iscrowd=0, segmentation=[[5, 5, 15, 5, 15, 17.5]]), **changes}


@pytest.fixture
def made(tmp_path):
    "made(annotations, images=None, categories=None): folder of images and file of a small dataset, 3 images of 40 x 30 pixels unless told otherwise."
    def make(annotations, images=None, categories=None):
        if images is None:
            images = [dict(id=i, width=40, height=30, file_name=f"{i}.jpg") for i in (1, 2, 3)]
            pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
            for i in (1, 2, 3): Image.fromarray(pixels[i - 1]).save(tmp_path / f"{i}.jpg", quality=95)
        file = tmp_path / "made.json"
        file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=[PERSON] if categories is None else categories)))
        return tmp_path, file
    return make
