"""The explorers in a real browser: Debian's Chromium, driven by Playwright, opens JupyterLab and Voila, moves sliders, presses pictures, uploads an image, and looks at what changes."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def chromium() -> str:
    "Where Chromium is; installed with apt-get where this is root's machine, else the test is skipped."
    find = lambda: shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not find() and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", *command], capture_output=True, timeout=600, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    if not find(): pytest.skip("no Chromium here: apt-get install chromium (needs root)")
    return find()


@pytest.fixture(scope="module")
def browser(chromium):
    "A browser without a window."
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    with playwright.sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        yield window
        window.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(folder: Path, *command: str):
    "Start a server on this machine, wait until it answers, give its address, and end it with all its kernels."
    config = folder / "settings"
    for name, content in {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}.items():
        path = config / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    env = {**os.environ, "POET_RUN": str(ROOT / "data/runs/tiny"), "POET_DATA": "no-data", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
           "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "JUPYTER_DATA_DIR": str(folder / "data"), "JUPYTERLAB_SETTINGS_DIR": str(config)}
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}"], cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-3000:]
                try: urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/static/x", timeout=5)
                except urllib.error.HTTPError: break                              # it answers, if only that there is no such file
                except OSError: time.sleep(.5)
                else: break
            yield address
        finally:
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill(); process.wait()


@pytest.fixture
def place(tmp_path) -> Path:
    "A copy of the notebook, for JupyterLab writes into what it opens; without outputs, so that no picture is there before it is made."
    book = json.loads((ROOT / "nbs/70_explore.ipynb").read_text())
    for cell in book["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    (tmp_path / "70_explore.ipynb").write_text(json.dumps(book))
    y, x = np.mgrid[:300, :400]
    Image.fromarray(np.stack([x * 255 // 400, y * 255 // 300, (x + y) % 256], -1).astype(np.uint8)).save(tmp_path / "mine.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


SUM = "async e => { const b = new Uint8Array(await (await fetch(e.src)).arrayBuffer()); let s = b.length; for (const v of b) s = (s * 31 + v) % 1000000007; return s; }"


class Shown:
    "One explorer on a page."

    def __init__(self, page, name):
        self.page, self.picture = page, page.locator(f"img.poet-picture[alt={name}]")
        self.picture.wait_for(state="attached", timeout=120_000)
        self.picture.scroll_into_view_if_needed()
        self.box = self.picture.locator("xpath=ancestor::div[contains(@class, 'widget-vbox')][1]")
        self.bytes()

    def bytes(self) -> int:
        "A checksum of the file that the picture shows, once there is one."
        self.page.wait_for_function("e => e.complete && e.naturalWidth > 0", arg=self.picture.element_handle(), timeout=60_000)
        return self.picture.evaluate(SUM)

    def changed(self, before: int) -> float:
        "Wait until the picture is another one; how many seconds that took."
        start = time.perf_counter()
        while self.bytes() == before:
            assert time.perf_counter() - start < 20, "the picture does not change"
            time.sleep(.02)
        return time.perf_counter() - start

    def slide(self, name: str, key: str = "ArrowRight") -> float:
        "Move a slider by the keyboard."
        before, handle = self.bytes(), self.box.locator(".widget-inline-hbox", has_text=name).first.locator(".noUi-handle").first
        handle.scroll_into_view_if_needed()
        handle.press(key)
        return self.changed(before)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        "Press the picture and drag, in shares of its size."
        self.picture.scroll_into_view_if_needed()
        before, box = self.bytes(), self.picture.bounding_box()
        at = lambda p: (box["x"] + p[0] * box["width"], box["y"] + p[1] * box["height"])
        self.page.mouse.move(*at(start)); self.page.mouse.down()
        self.page.mouse.move(*at(end), steps=6); self.page.mouse.up()
        self.changed(before)

    def give(self, file: Path) -> None:
        "Upload a file."
        button = self.box.locator("button.jupyter-widget-upload, .widget-upload").first
        button.scroll_into_view_if_needed()
        with self.page.expect_file_chooser() as chooser: button.click()
        chooser.value.set_files(str(file))

    def says(self, text: str) -> None: self.box.locator(".widget-html", has_text=text).first.wait_for(timeout=20_000)


def explore(page, place: Path, where: str) -> list[float]:
    "Use every explorer as a person would, and keep screenshots; how long each slider took."
    seconds = []
    def keep(shown, name):
        "Pictures of what a person sees: the window, scrolled to the explorer."
        shown.box.scroll_into_view_if_needed()
        shown.box.screenshot(path=place / f"{where}_{name}.png")

    first = Shown(page, "attention")
    seconds += [first.slide("opacity", "ArrowLeft"), first.slide("encoder layer", "ArrowLeft"), first.slide("point x")]
    first.drag((.1, .2), (.2, .3))                                                # the point
    before = first.bytes()
    first.give(place / "mine.png")
    first.changed(before)
    first.says("mine.png")
    keep(first, "attention_upload")
    first.give(place / "notes.txt")
    first.says("not a readable image")
    seconds.append(first.slide("image"))
    first.says("drawn scene")
    keep(first, "attention")

    second = Shown(page, "predictions")
    seconds += [second.slide("threshold", "ArrowLeft"), second.slide("decoder layer", "ArrowLeft"), second.slide("query")]
    keep(second, "predictions")

    third = Shown(page, "matching")
    before = third.bytes()
    third.box.get_by_role("button", name="official").click()
    third.changed(before)
    seconds.append(third.slide("pose 1: x"))
    third.drag((.1, .4), (.25, .4))
    keep(third, "matching")
    keep(Shown(page, "training"), "training")
    return seconds


def faults(page) -> list[str]:
    "Keep what the browser complains about."
    found = []
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


def run_all(page) -> None:
    "Run all cells as soon as there is a kernel; on a busy machine JupyterLab may still ask which."
    page.get_by_text("(ipykernel) | Idle").wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    select, picture = page.locator(".jp-Dialog button.jp-mod-accept"), page.locator("img.poet-picture")
    select.or_(picture).first.wait_for(state="attached", timeout=120_000)
    if not picture.count(): select.click()


def test_jupyterlab_runs_the_notebook_and_pictures_answer(browser, place):
    with server(place, "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--allow-root", "--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={place}") as address:
        page = browser.new_page(viewport=dict(width=1500, height=1000))
        complaints = faults(page)
        page.goto(f"{address}/lab/tree/70_explore.ipynb", timeout=120_000)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
        run_all(page)
        seconds = explore(page, place, "lab")
        page.screenshot(path=place / "lab_page.png")
        assert not page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count()
        page.close()
    print("JupyterLab, seconds a slider:", np.round(seconds, 2))
    assert not complaints and np.median(seconds) < .3, seconds           # from the key to the new picture, on a machine that does nothing else


def test_voila_serves_the_same_as_an_app(browser, place):
    with server(place, "voila", "70_explore.ipynb", "--no-browser", "--Voila.ip=127.0.0.1") as address:
        page = browser.new_page(viewport=dict(width=1300, height=1000))
        complaints = faults(page)
        page.goto(address, timeout=180_000)
        seconds = explore(page, place, "voila")
        assert page.locator("text=open_lab(run, root)").count() == 0             # an app shows no code
        page.get_by_role("heading", name="Exploring a model by hand").scroll_into_view_if_needed()
        page.screenshot(path=place / "voila_page.png")
        page.close()
    print("Voila, seconds a slider:", np.round(seconds, 2))
    assert not complaints and np.median(seconds) < .3, seconds
