"""The project around the notebooks: what `make check` catches, how notebooks are executed, wheel and sdist, Makefile, CI."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import check
import notebooks
import readme

ROOT = Path(__file__).resolve().parents[1]
EXPORT = "#| hide\nimport nbdev; nbdev.nbdev_export()"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="


def book(module: str, imports: str, definition: str, example: str, printed: str) -> nbformat.NotebookNode:
    "A small notebook as this project wants it."
    cells = [new_markdown_cell(f"# {module.title()}\n> A module."), new_code_cell(f"#| default_exp {module}"), new_code_cell(f"#| export\n{imports}"),
             new_markdown_cell("## The idea"), new_code_cell(f"#| export\n{definition}"), new_code_cell(example), new_code_cell(EXPORT)]
    cells[5].outputs = [new_output("stream", name="stdout", text=printed)]
    return new_notebook(cells=cells)


def run(*command, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **kw)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    "A project of two modules and an index, without a fault."
    root = tmp_path_factory.mktemp("model")
    for name in ("nbs", "figures"): (root / name).mkdir()
    (root / "figures" / "a.svg").write_text("<svg/>")
    shutil.copy(ROOT / "settings.ini", root)
    notebooks.write(book("one", "import math", "def twice(x): return 2 * x", "assert twice(2) == 4; print(twice(2))", "4\n"), root / "nbs/00_one.ipynb")
    notebooks.write(book("two", "from poet_nb.one import twice", "def four(x): return twice(twice(x))", "assert four(1) == 4; print(four(1))", "4\n"), root / "nbs/01_two.ipynb")
    index = new_notebook(cells=[new_markdown_cell("# Title\n\n![a](../figures/a.svg) and [one](00_one.ipynb)"), new_code_cell("#| echo: false\nprint('hello')"), new_code_cell("#| hide\n1")])
    index.cells[1].outputs = [new_output("stream", name="stdout", text="hello\n")]
    notebooks.write(index, root / "nbs/index.ipynb")
    done = run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", cwd=root)
    assert done.returncode == 0, done.stderr
    (root / "README.md").write_text(readme.render(root / "nbs/index.ipynb"))
    return root


@pytest.fixture
def project(model, tmp_path) -> Path:
    "A copy of the model project, to spoil."
    return Path(shutil.copytree(model, tmp_path / "project"))


def spoil(project: Path, name: str, change) -> None:
    "Apply `change` to the JSON of a notebook."
    path = project / "nbs" / f"{name}.ipynb"
    raw = json.loads(path.read_text())
    change(raw["cells"])
    path.write_text(json.dumps(raw, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def found(project: Path, *only: str) -> str:
    "What the named checks have to say."
    return "\n".join(str(p) for _, problems in check.problems(project, list(only)) for p in problems)


def test_good_project_passes(project):
    done = run(sys.executable, ROOT / "tools/check.py", "--root", project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 notebooks: no problems." in done.stdout


def test_problems_are_printed_with_file_and_remedy_and_exit_code_1(project):
    (project / "poet_nb" / "one.py").unlink()
    done = run(sys.executable, ROOT / "tools/check.py", "--root", project, "--only", "sync", "ids")
    assert done.returncode == 1
    assert "poet_nb/one.py: is missing\n    -> make export" in done.stdout
    assert "1 problem(s)." in done.stdout


def test_orphan_module(project):
    (project / "poet_nb" / "orphan.py").write_text("x = 1\n")
    assert found(project, "sync").startswith("poet_nb/orphan.py: no notebook exports it")


def test_module_edited_by_hand(project):
    module = project / "poet_nb" / "one.py"
    module.write_text(module.read_text().replace("2 * x", "3 * x"))
    assert found(project, "sync").startswith("poet_nb/one.py: differs from its notebook")


def test_notebook_changed_and_not_exported(project):
    spoil(project, "00_one", lambda cells: cells[4].update(source="#| export\ndef twice(x): return x + x"))
    assert found(project, "sync").startswith("poet_nb/one.py: differs from its notebook")


def source(i, text): return lambda cells: cells[i].update(source=text)
def output(i, *outputs): return lambda cells: cells[i].update(outputs=list(outputs))
def stream(text): return new_output("stream", name="stdout", text=text)
def picture(data): return new_output("display_data", data={"image/png": data})


def lines(head: str, n: int) -> str:
    return f"#| export\n{head}\n" + "\n".join(f"    x{i} = {i}" for i in range(n - 1))


FAULTS = {
    "cell without id": ("ids", lambda cells: cells[3].pop("id"), "cell 3: has no id"),
    "id twice": ("ids", lambda cells: cells[3].update(id=cells[0]["id"]), "of an earlier cell"),
    "counter": ("clean", lambda cells: cells[5].update(execution_count=7), "counters"),
    "cell metadata": ("clean", lambda cells: cells[5].update(metadata={"scrolled": True}), "metadata"),
    "memory address": ("clean", output(5, stream("<object object at 0x7f00aa>\n")), "addresses"),
    "large notebook": ("sizes", output(5, stream("x" * 600_000)), "500 is the limit"),
    "large picture": ("sizes", output(5, picture("A" * 140_000)), "105 KB; 100 is the limit"),
    "long cell": ("cells", source(4, lines("def f():", 41)), "41 lines; 40 is the limit"),
    "long module": ("cells", source(4, lines("class A(nn.Module):", 61)), "61 lines; 60 is the limit"),
    "long cells all over": ("median", lambda cells: [cells[i].update(source=lines("def f():", 24)) for i in (2, 4)], "12.5 lines in the median; 12 is the limit"),
    "wrong module name": ("anatomy", source(1, "#| default_exp three"), "exports to three"),
    "no asserts": ("anatomy", source(5, "print(twice(2))"), "asserts nothing"),
    "last cell does not export": ("anatomy", source(6, "#| hide\n1"), "last cell"),
    "code without text": ("anatomy", lambda cells: cells.extend([new_code_cell(EXPORT)] * 4), "2 text cells to 9 code cells"),
    "error as output": ("outputs", output(5, new_output("error", ename="ValueError", evalue="", traceback=[])), "ends in ValueError"),
    "not executed": ("outputs", output(5), "has no outputs"),
    "progress bar": ("outputs", output(5, stream(" 10%|#         | 1/10")), "progress bar"),
    "path in output": ("words", output(5, stream("saved /home/me/x.png")), "contains /home/"),
    "path in source": ("words", source(5, "open('/tmp/x')"), "contains /tmp/"),
    "left undone": ("words", source(3, "TO" + "DO: explain"), "contains TO" + "DO"),
    "unsafe load": ("words", source(5, "torch.load(f, weights_only=" + "False)"), "weights_only=True"),
    "star import": ("imports", source(2, "#| export\nfrom math import *"), "imports *"),
    "upward import": ("imports", source(2, "#| export\nfrom poet_nb.two import four"), "poet_nb.two from number 1"),
    "upward import, other spellings": ("imports", source(5, "import poet_nb.two\nfrom poet_nb import two"), "not below 0"),
    "own module in exported cell": ("imports", source(2, "#| export\nfrom poet_nb.one import twice"), "not below 0"),
    "syntax": ("imports", source(5, "def f(:"), "is no Python"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_notebook(project, fault):
    name, change, expected = FAULTS[fault]
    assert found(project, name) == ""
    spoil(project, "00_one", change)
    assert expected in found(project, name)


def test_what_is_allowed(project):
    spoil(project, "00_one", source(4, lines("class A(torch.nn.Module):", 60)))
    assert found(project, "cells") == ""
    spoil(project, "00_one", source(5, "%matplotlib inline\nfrom poet_nb.one import twice\nassert twice(1) == 2"))
    assert found(project, "imports") == ""


def test_figure_notebooks_export_nothing(project):
    (project / "nbs/01_two.ipynb").rename(project / "nbs/50_two.ipynb")
    assert "notebooks from 50 on export nothing" in found(project, "anatomy")


def test_merge_marks_are_reported(project):
    path = project / "nbs/00_one.ipynb"
    path.write_text("<<<<<<< HEAD\n" + path.read_text())
    assert "can't be read" in found(project, "ids")


def test_readme_follows_the_index(project):
    text = (project / "README.md").read_text()
    assert "![a](figures/a.svg) and [one](nbs/00_one.ipynb)" in text
    assert "hello" in text and "print(" not in text and "#|" not in text
    spoil(project, "index", source(0, "# Other title"))
    assert "README.md: differs from nbs/index.ipynb" in found(project, "readme")


def test_readme_with_dead_link_or_embedded_picture(project):
    (project / "figures/a.svg").unlink()
    assert "points at figures/a.svg" in found(project, "readme")
    spoil(project, "index", output(1, picture(PIXEL)))
    assert "link a file in figures/" in found(project, "readme")


def test_cleaning_twice_and_cleaning_by_nbdev_change_nothing(tmp_path):
    from nbdev.clean import clean_nb
    nb = book("one", "import math", "x = 1", "print(x)", "1\n")
    nb.cells[5].outputs = [stream("a\n"), stream("b <f at 0x7f12>\n"), picture(PIXEL + "\n"), new_output("execute_result", data={"text/plain": "<A at 0x1>"}, execution_count=3)]
    nb.cells[5].metadata = {"tags": ["x"]}
    nb.metadata["language_info"] = {"name": "python"}
    path = tmp_path / "a.ipynb"
    assert notebooks.write(nb, path)
    outputs = notebooks.read(path).cells[5].outputs
    assert [o.get("text") for o in outputs] == ["a\nb <f>\n", None, None] and outputs[2].data["text/plain"] == "<A>"
    assert not notebooks.write(notebooks.read(path), path)
    before = json.loads(path.read_text())
    after = json.loads(path.read_text())
    clean_nb(after)
    assert after == before


@pytest.fixture
def runnable(project) -> Path:
    "A project whose second notebook has a flagged cell with outputs of its own."
    def change(cells):
        cells[5]["source"] = "assert four(1) == 4; print('fresh')"
        cells.insert(6, new_code_cell("#| slow\nprint(1 / 0)", outputs=[stream("kept\n")]))
    spoil(project, "01_two", change)
    return project


def execute(project: Path, *args: str) -> subprocess.CompletedProcess:
    return run(sys.executable, ROOT / "tools/execute.py", "--root", project, *args)


def said(project: Path, name: str) -> list[str]:
    return [o.text for c in notebooks.read(project / "nbs" / f"{name}.ipynb").cells for o in c.get("outputs", []) if o.output_type == "stream"]


def test_execute_writes_clean_outputs_and_keeps_those_of_flagged_cells(runnable):
    before = (runnable / "nbs/00_one.ipynb").read_text(), (runnable / "poet_nb/one.py").read_text()
    done = execute(runnable, "--no-write", "01")
    assert done.returncode == 0 and said(runnable, "01_two") == ["4\n", "kept\n"]
    done = execute(runnable, "--jobs", "2", "0*")
    assert done.returncode == 0, done.stderr
    assert said(runnable, "01_two") == ["fresh\n", "kept\n"]
    assert before == ((runnable / "nbs/00_one.ipynb").read_text(), (runnable / "poet_nb/one.py").read_text())
    assert found(runnable, "clean") == ""


def test_execute_names_the_failing_cell_and_leaves_the_notebook(runnable):
    before = (runnable / "nbs/01_two.ipynb").read_text()
    done = execute(runnable, "--all", "01_two")
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "01_two.ipynb: cell 6" in done.stderr and "2 | print(1 / 0)" in done.stderr and "ZeroDivisionError" in done.stderr
    assert (runnable / "nbs/01_two.ipynb").read_text() == before


def test_execute_knows_no_such_notebook(runnable):
    done = execute(runnable, "77")
    assert done.returncode == 1 and "called '77'; there are: 00_one, 01_two, index" in done.stderr


def test_number_orders_inserted_notebooks():
    stems = ["12_b", "12a_c", "02_a", "13_d"]
    assert sorted(stems, key=notebooks.number) == ["02_a", "12_b", "12a_c", "13_d"] and notebooks.number("index") is None


# ---- the package ----

@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "Folder with the sdist, and the wheel built from the sdist."
    source, out = tmp_path_factory.mktemp("source") / "poet_nb", tmp_path_factory.mktemp("dist")
    skipped = shutil.ignore_patterns(".git", ".venv", "venv", "synth", "coco", "runs", "figures", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, ignore=skipped)
    def build(what, cwd):
        done = run(sys.executable, "-c", f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])", out, cwd=cwd)
        assert done.returncode == 0, done.stderr[-2000:]
    build("sdist", source)
    with tarfile.open(next(out.glob("*.tar.gz"))) as tar: tar.extractall(out / "unpacked")
    build("wheel", next((out / "unpacked").iterdir()))
    return out


def test_sdist_holds_the_notebooks(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as tar: names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    expected = {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"}
    assert expected | {p.relative_to(ROOT).as_posix() for p in notebooks.find()} <= names
    assert not [n for n in names if n.startswith(("data/", "figures/")) and n != "data/README.md"]


def test_wheel_imports_away_from_the_checkout(built, tmp_path):
    wheel = next(built.glob("*.whl"))
    with zipfile.ZipFile(wheel) as z:
        assert {n.split("/")[0] for n in z.namelist()} == {"poet_nb", wheel.name.split("-py3")[0] + ".dist-info"}
        entry = z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt"))).decode()
        z.extractall(tmp_path / "site")
    assert "poet = poet_nb.cli:main" in entry
    modules = [f"poet_nb.{p.stem}" for p in (ROOT / "poet_nb").glob("[!_]*.py")]
    program = f"import importlib, poet_nb; [importlib.import_module(m) for m in {modules}]; from poet_nb.cli import main; print(poet_nb.__file__, callable(main))"
    done = run(sys.executable, "-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(tmp_path / "site/poet_nb/__init__.py"), "True"]


def canonical(name: str) -> str: return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_package_imports_is_required():
    required = {canonical(re.match(r"[\w.-]+", r)[0]) for r in notebooks.settings()["requirements"].split()}
    owners, local = packages_distributions(), set(sys.stdlib_module_names) | {"poet_nb"}
    for path in sorted((ROOT / "poet_nb").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            else: continue
            for top in {n.split(".")[0] for n in names} - local:
                assert required & {canonical(o) for o in owners.get(top, [])}, f"{path.name} imports {top}, which settings.ini does not require"


def test_known_bad_versions_are_excluded():
    development = notebooks.settings()["dev_requirements"]
    for bound in ("nbdev>=2.4.14,<3", "execnb>=0.1.12,<0.2", "fastcore>=1.12.3,<2", "ghapi>=1.0.3,<2"): assert bound in development


# ---- make and CI ----

def make(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return run("make", *args, cwd=cwd, env=clean)


def test_make_lists_its_targets():
    done = make()
    assert done.returncode == 0
    for target in ("figures", "test", "check", "execute", "readme", "export", "clean"): assert f"make {target} " in done.stdout


def fake_python(folder: Path, program: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("program, expected", [
    ('case "$2" in *version_info*) exit 1;; esac; echo Python 3.8.1', "Python 3.8.1 is too old"),
    ('case "$2" in *ensurepip*) exit 1;; esac', "sudo apt-get install python3-venv"),
])
def test_make_explains_what_is_missing(tmp_path, program, expected):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    done = make("install", f"PYTHON={fake_python(tmp_path, program)}", cwd=tmp_path)
    assert done.returncode != 0 and expected in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_make_without_any_python(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    done = make("install", "PYTHON=no-such-python", cwd=tmp_path)
    assert done.returncode != 0 and "no-such-python is not installed" in done.stdout


@pytest.mark.parametrize("failing", ["", "check", "test"])
def test_ci_runs_both_and_reports_the_first_failure(tmp_path, failing):
    "With a stand-in for make: the environment is fresh and gone at the end, and the last line is pytest's."
    clone, bin, log = tmp_path / "clone", tmp_path / "bin", tmp_path / "log"
    (clone / ".ci").mkdir(parents=True)
    (tmp_path / "shared/coco-mini").mkdir(parents=True)
    for folder in (bin, tmp_path / "tmp"): folder.mkdir()
    shutil.copy(ROOT / ".ci/run", clone / ".ci/run")
    stand_in = bin / "make"
    stand_in.write_text(f"""#!/bin/bash
what=${{@: -1}}
echo "$what $POET_COCO $1" >> {log}
if [ "$what" = test ]; then echo "===== 3 passed, 1 deselected in 0.10s ====="; fi
if [ "$what" = "{failing}" ]; then echo "make: *** [$what] Error 1" >&2; exit 2; fi
""")
    stand_in.chmod(0o755)
    done = run("bash", ".ci/run", cwd=clone, stdin=subprocess.DEVNULL, env={**os.environ, "CI": "true", "TMPDIR": str(tmp_path / "tmp"), "PATH": f"{bin}:{os.environ['PATH']}"})
    assert (done.returncode != 0) == bool(failing), done.stdout + done.stderr
    calls = [line.split() for line in log.read_text().splitlines()]
    assert [c[0] for c in calls] == ["install", "check", "test"]
    assert {c[1] for c in calls} == {str(tmp_path / "shared/coco-mini")} and len({c[2] for c in calls}) == 1 and str(tmp_path / "tmp") in calls[0][2]
    assert "3 passed" in done.stdout.splitlines()[-1]
    assert not list((tmp_path / "tmp").iterdir())
