"""The site: each link and picture leads somewhere, every notebook and public name is in it, nothing is fetched; the reference says what the comments say."""
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

for needed in ("material", "mkdocs", "latex2mathml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install -e '.[docs]'")

import docs
import links
import notebooks
import pages
import reference

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = docs.address(notebooks.settings(ROOT))
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
PROBE = r"""## How `it` works
Back to [settings](00_config.ipynb#Presets) and [home](index.ipynb); the [guide](../CONTRIBUTING.md), the [data](../data/README.md), ![a](../figures/a.png)

- an item right after text, with $\hat p_i < 3$ and `$HOME`

$$\sum_{i=1}^N \lVert x_i \rVert^2$$

| a | b |
|---|---|
| $V_1$ | `a` |

<details><summary>Answer</summary>
It is **seven**, $7 = 3 + 4$.
</details>"""


def probe() -> nbformat.NotebookNode:
    "A notebook with everything that pages have to cope with."
    cells = [new_markdown_cell("# A probe\n> One line."), new_code_cell("#| default_exp probe"), new_code_cell("#| hide\nsecret = 1"), new_markdown_cell(PROBE),
             new_code_cell("#| export\nOne, Two = 1, 2\ndef Twice(x): return 2 * x"), new_code_cell("#| slow\nprint('<b>')"), new_code_cell("#| echo: false\nunseen = 1"),
             new_code_cell("#| export\nclass Four: pass\ndef _five(self): return 5"), new_code_cell("#| exporti\ndef six(self): return 6\nFour.five, Four._six = _five, six")]
    cells[5].outputs = [new_output("stream", text="\x1b[31m<b>& done\x1b[0m\n"), new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"}),
                        new_output("display_data", {"text/html": "<table><tr><td>cell</td></tr></table>", "text/plain": "cell"}),
                        new_output("display_data", {"text/markdown": "see [settings](00_config.ipynb)", "text/plain": "m"})]
    return new_notebook(cells=cells, metadata={"kernelspec": notebooks.KERNEL})


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    "The site of a small project: two real notebooks, a probe and a home page."
    root = tmp_path_factory.mktemp("project")
    for name in ("nbs", "poet_nb", "docs", "figures"): (root / name).mkdir()
    for name in ("settings.ini", "docs/mkdocs.yml", "docs/style.css", "nbs/00_config.ipynb", "nbs/20_matcher.ipynb", "poet_nb/config.py", "poet_nb/matcher.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "figures/a.png").write_bytes(b"a picture")
    (root / "CONTRIBUTING.md").write_text("# Contributing\n\n## Setting up\n\n```sh\nmake\n```\n")
    (root / "poet_nb/probe.py").write_text('"""One line."""\n__all__ = ["One", "Two", "Twice", "Four"]\nOne, Two = 1, 2\ndef Twice(x): return 2 * x\n'
                                           'class Four: pass\ndef _five(self): return 5\ndef six(self): return 6\nFour.five, Four._six = _five, six\n')
    notebooks.write(probe(), root / "nbs/01_probe.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Home\n\n[the probe](01_probe.ipynb)")]), root / "nbs/index.ipynb")
    docs.build(root, root / "_docs")
    return root / "_docs"


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    "The site of this project."
    target = tmp_path_factory.mktemp("site")
    docs.build(ROOT, target)
    return target


def text(html: Path) -> str: return html.read_text(encoding="utf-8")


def main(html: Path) -> str: return re.search(r"<article.*?</article>", text(html), re.S)[0]


def test_links_of_a_small_site(small):
    assert links.problems(small, ADDRESS) == []


def test_page_of_a_notebook(small):
    shown = main(small / "probe.html")
    for link in ("config.html#presets", "index.html", "contributing.html", "https://github.com/poet-nb/poet_nb/blob/main/data/README.md", "figures/a.png", "api/probe.html#Twice", "api/probe.html#Four.five"):
        assert f'"{link}"' in shown, link
    assert "#six" not in shown and "#Four._six" not in shown
    assert "secret" not in shown and "unseen" not in shown and "#|" not in shown and "default_exp" not in shown
    assert "&lt;b&gt;&amp; done\n" in shown and "\x1b" not in shown and "<td>cell</td>" in shown
    assert shown.count("<math ") == 4 and shown.count('display="block"') == 1 and "<code>$HOME</code>" in shown
    assert re.search(r"<li>an item.*?<math", shown, re.S) and "<strong>seven</strong>" in shown and "<summary>Answer</summary>" in shown
    picture = re.search(r'src="(outputs/01_probe-[^"]+\.png)"', shown)[1]
    assert (small / picture).read_bytes()[:4] == b"\x89PNG"


def test_notebooks_of_one_name_have_pages_of_their_own(tmp_path):
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for stem in ("44_explore", "70_explore"): nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {stem}")]), tmp_path / f"nbs/{stem}.ipynb")
    site = pages.Site(tmp_path, tmp_path)
    assert [site.target(f"{s}.ipynb#A", "nbs") for s in ("44_explore", "70_explore")] == ["explore.html#a", "70_explore.html#a"]


def test_reference_has_parameters_and_links(small):
    shown = main(small / "api/matcher.html")
    source = (ROOT / "poet_nb/matcher.py").read_text().splitlines()
    line = next(i for i, l in enumerate(source, 1) if l.startswith("def pack_targets("))
    assert f"blob/main/poet_nb/matcher.py#L{line}" in shown and "../matcher.html#pack_targets" in shown
    remark = next(l.split("# ")[1] for l in source if l.strip().startswith("num_keypoints:int,"))
    assert f"<td><code>num_keypoints</code></td><td><code>int</code></td><td></td><td>{remark}</td>" in shown
    assert 'id="HungarianMatcher.forward"' in shown and "<code>_name</code>" not in shown
    assert 'id="PackedTargets"' in text(small / "matcher.html") and 'id="packedtargets"' in text(small / "matcher.html") # nbdev's own links


def test_methods_that_are_put_into_a_class_stand_below_it():
    below = lambda name, outer: reference.owned(reference.Module(name, (ROOT / f"poet_nb/{name}.py").read_text()).found, outer)
    assert {"CocoKeypoints.load", "CocoKeypoints.image_path", "CocoKeypoints.bad_images"} <= {*below("coco", "CocoKeypoints")}
    assert {"Skeleton.num_keypoints", "Skeleton.from_category", "Skeleton.to_category"} <= {*below("keypoints", "Skeleton")}
    assert "AssociativeEmbedding.people" in below("associative_embedding", "AssociativeEmbedding") and "Lab.raw" in below("explore", "Lab")


def test_search_knows_pages_sections_and_names(small):
    entries = json.loads((small / "search/search_index.json").read_text())["docs"]
    where = {e["location"]: e for e in entries}
    assert {"api/matcher.html#pack_targets", "api/probe.html#Two", "api/probe.html#Twice", "api/probe.html#Four.five"} <= where.keys() and "contributing.html#setting-up" in where and "probe.html" in where
    assert "seven" in where["probe.html#how-it-works"]["text"]


@pytest.mark.parametrize("spoil, says", [
    (lambda t: t.replace('href="config.html#presets"', 'href="config.html#nowhere"'), "config.html#nowhere: no such anchor"),
    (lambda t: t.replace('href="config.html#presets"', 'href="gone.html"'), "gone.html is not there"),
    (lambda t: re.sub(r'src="outputs/', 'src="lost/', t), "lost/"),
    (lambda t: t.replace("</head>", '<link rel="stylesheet" href="https://fonts.example/x.css"></head>'), "fetches https://fonts.example/x.css"),
    (lambda t: t.replace("</head>", '<script type="module">import m from "https://cdn.example/m.mjs"</script></head>'), "fetches https://cdn.example/m.mjs"),
    (lambda t: t.replace("</head>", "<style>@import url('//cdn.example/f.css');</style></head>"), "fetches //cdn.example/f.css")])
def test_faults_are_found(small, tmp_path, spoil, says):
    site = Path(shutil.copytree(small, tmp_path / "site"))
    before, page = text(site / "probe.html"), site / "probe.html"
    page.write_text(spoil(before), encoding="utf-8")
    assert page.read_text() != before
    assert any(line.startswith("probe.html: ") and says in line for line in links.problems(site, ADDRESS))


@pytest.mark.parametrize("name", ["config", "matcher", "keypoints"])
def test_comments_are_those_of_fastcore(name):
    from fastcore.docments import docments
    module, loaded = reference.Module(name, (ROOT / f"poet_nb/{name}.py").read_text()), importlib.import_module(f"poet_nb.{name}")
    seen = 0
    for public in module.public:
        node, thing = module.found[public], getattr(loaded, public)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        theirs = {k: v["docment"] or "" for k, v in docments(thing, full=True).items() if k != "self"}
        for parameter, ours in module.docments(node).items():
            if parameter.startswith("*") or parameter == "return" and (inspect.isclass(thing) or any(n.startswith("*") for n in module.docments(node))): continue # it overlooks **names
            assert ours == theirs[parameter].replace("\n", " "), f"{public}: {parameter}"
            seen += bool(ours)
    assert seen > 10


def test_quarto_settings_are_valid(tmp_path):
    "nbdev_docs would find what it needs: nbdev writes Quarto's project file from settings.ini."
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    code = "from nbdev.config import get_config; from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml(); print(get_config().doc_path)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "_docs"
    assert "output-dir: _docs" in "".join(p.read_text() for p in (tmp_path / "nbs").glob("*.yml"))


@pytest.mark.slow
def test_links_of_the_whole_site(whole):
    assert links.problems(whole, ADDRESS) == []


@pytest.mark.slow
def test_every_notebook_and_name_is_there(whole):
    found = {e["location"] for e in json.loads((whole / "search/search_index.json").read_text())["docs"]}
    for path, name in zip(notebooks.find(ROOT), pages.Site(ROOT, whole).names.values()):
        assert f"{name}.html" in found
        shown = main(whole / f"{name}.html")
        assert "#|" not in re.sub(r"<code>#\|.*?</code>", "", shown) or "nbdev" in shown, path.name
        pictures = sum(any(m in pages.PICTURES for m in o.get("data", {})) and "text/html" not in o["data"] for c in notebooks.read(path).cells
                       for o in c.get("outputs", []) if "hide" not in notebooks.directives(c.source))
        assert shown.count('<img src="outputs/') == pictures, path.name
    for path in sorted((ROOT / "poet_nb").glob("[!_]*.py")):
        for name in importlib.import_module(f"poet_nb.{path.stem}").__all__:
            assert f"api/{path.stem}.html#{name}" in found, f"{path.stem}.{name}"


@pytest.fixture
def browser():
    "A browser, if there is one."
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if program is None: pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(whole, browser, serve, scheme):
    "Nothing is asked of another server, no script fails, no page is wider than a telephone, and the search finds a function."
    def answer(request):
        file = whole / request.path.split("?")[0].lstrip("/")
        kind = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json", ".png": "image/png", ".svg": "image/svg+xml"}.get(file.suffix, "image/jpeg")
        request.send_response(200 if file.is_file() else 404)
        request.send_header("Content-Type", kind)
        request.end_headers()
        if file.is_file(): request.wfile.write(file.read_bytes())
    home, wrong = serve(answer), []
    page = browser.new_context(viewport=dict(width=400, height=800), color_scheme=scheme).new_page()
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((home, "data:")) else None)
    page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    for name in ("index", "matcher", "coco_eval", "synth", "table1", "questions", "api/index", "api/config", "api/cli"):
        page.goto(f"{home}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
    assert page.evaluate("document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]
    page.set_viewport_size(dict(width=1280, height=800))
    page.goto(f"{home}/index.html")
    page.fill("input.md-search__input", "HungarianMatcher")
    page.wait_for_selector(".md-search-result__link[href*='api/matcher.html']", timeout=20000)
    assert wrong == []
