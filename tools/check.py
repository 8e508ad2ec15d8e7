"""Check what a person forgets: clean and executed notebooks, modules in sync, sizes, names, directions of imports, README.

    python tools/check.py                    everything
    python tools/check.py --only sync readme some
    python tools/check.py --root DIR         another checkout

Prints each problem with its file and remedy; exit code 1 if there is any.
"""
from __future__ import annotations

import argparse
import ast
import base64
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import notebooks
import readme

NOTEBOOK_BYTES = 500_000
PICTURE_BYTES = 100_000
CELL_LINES, MODULE_LINES, MEDIAN_LINES = 40, 60, 12
LEAST_TEXT = 0.4  # markdown cells to code cells
FIRST_WITHOUT_EXPORTS = 50  # notebooks from here on draw figures and explore: nothing imports them
FOREIGN_PATHS = tuple(f"/{name}/" for name in ("work", "tmp", "root", "home", "Users"))
UNWANTED = {"TO" + "DO": "do it, or file an issue", "FIX" + "ME": "mend it, or file an issue",
            "weights_only=" + "False": "files from others must not run code: load with weights_only=True",
            ".cuda" + "(": "use .to(device): not everybody has CUDA"}
BAR = re.compile(r"\r|\d+%\|")


@dataclass(frozen=True)
class Problem:
    "Something to mend."
    where: str
    what: str
    remedy: str

    def __str__(self) -> str: return f"{self.where}: {self.what}\n    -> {self.remedy}"


class Book:
    "A notebook as its file has it, read without nbformat's silent repairs."

    def __init__(self, path: Path, root: Path):
        self.path, self.root, self.name = path, root, path.relative_to(root).as_posix()
        self.raw = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [{**c, "source": "".join(c["source"])} for c in self.raw["cells"]]
        self.code = [c for c in self.cells if c["cell_type"] == "code"]
        self.exports = [c for c in self.code if {"export", "exports", "exporti"} & notebooks.directives(c["source"]).keys()]

    def where(self, cell: dict) -> str:
        place = next(i for i, c in enumerate(self.cells) if c is cell)
        return f"{self.name}, cell {place} (id {cell.get('id')})"

    def outputs(self) -> Iterator[tuple[dict, dict]]:
        for cell in self.code:
            for output in cell.get("outputs", []): yield cell, output

    def default_exp(self) -> str | None:
        return next((d["default_exp"] for c in self.code if "default_exp" in (d := notebooks.directives(c["source"]))), None)


def text(lines: str | list[str]) -> str: return "".join(lines)


def output_text(output: dict) -> str:
    "What can be read in an output; pictures and their base64 left out."
    data = output.get("data", {})
    return "\n".join([text(output.get("text", "")), *(text(v) for k, v in data.items() if k.startswith("text/"))])


# ---- one notebook ----

def check_clean(book: Book) -> Iterator[Problem]:
    "The file is just what cleaning would write."
    if notebooks.dumps(notebooks.clean(notebooks.read(book.path))) != book.path.read_text(encoding="utf-8"):
        yield Problem(book.name, "has counters, metadata or memory addresses in it", f"make tidy NB={book.path.stem}")


def check_ids(book: Book) -> Iterator[Problem]:
    "Every cell has an id of its own: export writes them into the modules."
    seen: set[str] = set()
    for i, cell in enumerate(book.cells):
        id = cell.get("id")
        if not id or id in seen:
            what = f"has the id {id} of an earlier cell" if id else "has no id"
            yield Problem(f"{book.name}, cell {i}", what, f"make tidy NB={book.path.stem}")
        seen.add(id)


def picture_bytes(mime: str, data: str | list[str]) -> int:
    return len(text(data).encode()) if "svg" in mime else len(base64.b64decode(text(data)))


def check_sizes(book: Book) -> Iterator[Problem]:
    "Notebooks and pictures small enough for a repository and a browser."
    size = book.path.stat().st_size
    if size > NOTEBOOK_BYTES:
        yield Problem(book.name, f"{size / 1000:.0f} KB; {NOTEBOOK_BYTES // 1000} is the limit", "fewer or smaller pictures")
    for cell, output in book.outputs():
        for mime, data in output.get("data", {}).items():
            if mime.startswith("image/") and (n := picture_bytes(mime, data)) > PICTURE_BYTES:
                yield Problem(book.where(cell), f"picture of {n / 1000:.0f} KB; {PICTURE_BYTES // 1000} is the limit", "a smaller figsize or dpi")


def code_lines(cell: dict) -> int:
    "Lines of a cell, directives and blank ends left out."
    return len([line for line in cell["source"].strip().splitlines() if not line.startswith("#|")])


def is_nn_module(cell: dict) -> bool:
    "Does the cell define a class that derives from something called Module?"
    classes = [n for n in ast.parse(cell["source"]).body if isinstance(n, ast.ClassDef)]
    return any(ast.unparse(base).split(".")[-1] == "Module" for c in classes for base in c.bases)


def check_cells(book: Book) -> Iterator[Problem]:
    "Exported cells are short enough to be explained one by one."
    for cell in book.exports:
        n = code_lines(cell)
        limit = MODULE_LINES if n > CELL_LINES and is_nn_module(cell) else CELL_LINES
        if n > limit: yield Problem(book.where(cell), f"exported cell of {n} lines; {limit} is the limit", "split it (@patch splits a class)")


def check_anatomy(book: Book) -> Iterator[Problem]:
    "Name, text, asserts and last cell of a notebook (CONTRIBUTING.md, 'A notebook')."
    place, exp = notebooks.number(book.path.stem), book.default_exp()
    if book.exports and exp != notebooks.module(book.path.stem):
        yield Problem(book.name, f"exports to {exp}", f"#| default_exp {notebooks.module(book.path.stem)}: a module is called as its notebook")
    if book.exports and place and place[0] >= FIRST_WITHOUT_EXPORTS:
        yield Problem(book.where(book.exports[0]), f"notebooks from {FIRST_WITHOUT_EXPORTS} on export nothing", "move it to a notebook with a lower number")
    if book.exports and not any("assert" in c["source"] or "test_" in c["source"] for c in book.code if c not in book.exports):
        yield Problem(book.name, "exports, and asserts nothing", "an assert in the cell after each definition")
    last = book.cells[-1]["source"] if book.cells else ""
    if book.exports and not ("hide" in notebooks.directives(last) and "nbdev_export(" in last):
        yield Problem(book.name, "the last cell does not export", "#| hide and import nbdev; nbdev.nbdev_export()")
    texts = len(book.cells) - len(book.code)
    if len(book.code) > 5 and texts < LEAST_TEXT * len(book.code):
        yield Problem(book.name, f"{texts} text cells to {len(book.code)} code cells", "explain each step where it is taken")


def check_outputs(book: Book) -> Iterator[Problem]:
    "Executed, without an error, without traces of the machine it ran on."
    visible = [c for c in book.code if c not in book.exports and "hide" not in notebooks.directives(c["source"]) and "default_exp" not in notebooks.directives(c["source"])]
    execute = f"make execute NB={book.path.stem}"
    if visible and not any(c.get("outputs") for c in book.code): yield Problem(book.name, "has no outputs", execute)
    for cell, output in book.outputs():
        if output["output_type"] == "error": yield Problem(book.where(cell), f"ends in {output.get('ename')}", f"mend it, then {execute}")
        if BAR.search(output_text(output)): yield Problem(book.where(cell), "a progress bar in the output", f"{execute} leaves bars out; print no \\r")


def check_words(book: Book) -> Iterator[Problem]:
    "No path of anybody's machine, nothing left undone."
    for cell in book.cells:
        said = "\n".join([cell["source"], *(output_text(o) for o in cell.get("outputs", []))])
        for word in FOREIGN_PATHS:
            if word in said: yield Problem(book.where(cell), f"contains {word}", "a path relative to the repository, or tempfile with its name not printed")
        for word, remedy in UNWANTED.items():
            if word in cell["source"]: yield Problem(book.where(cell), f"contains {word}", remedy)


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str | None, list[str]]]:
    "(module of the package or None for foreign, names) of every import."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, _, tail = alias.name.partition(".")
                yield (tail if head == package and tail else None), [alias.asname or alias.name]
        if isinstance(node, ast.ImportFrom):
            head, _, tail = (node.module or "").partition(".")
            names = [alias.name for alias in node.names]
            if head == package and not tail: yield from ((name, [name]) for name in names)
            else: yield (tail if head == package else None), names


def check_imports(book: Book) -> Iterator[Problem]:
    "Imports by name, from notebooks with lower numbers only; outside exported cells a notebook may import its own module."
    package = notebooks.settings(book.root)["lib_path"]
    places = {notebooks.module(p.stem): notebooks.number(p.stem) for p in notebooks.find(book.root)}
    own = notebooks.number(book.path.stem)
    for cell in book.code:
        try: tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell["source"], flags=re.M))
        except SyntaxError as error:
            yield Problem(book.where(cell), f"is no Python: {error.msg}", "mend it")
            continue
        for name, names in imported(tree, package):
            if "*" in names: yield Problem(book.where(cell), "imports *", "name what you import")
            place = places.get(name)
            if own and place and (place > own or place == own and cell in book.exports):
                yield Problem(book.where(cell), f"imports {package}.{name} from number {place[0]}{place[1]}, not below {own[0]}{own[1]}", "move the shared part to a lower number")


# ---- the whole project ----

def check_median(root: Path) -> Iterator[Problem]:
    "Most exported cells fit into one look."
    lines = {p.stem: [code_lines(c) for c in Book(p, root).exports] for p in notebooks.find(root)}
    everything = [n for of_one in lines.values() for n in of_one]
    if everything and (median := statistics.median(everything)) > MEDIAN_LINES:
        worst = sorted(((statistics.median(of_one), stem) for stem, of_one in lines.items() if of_one), reverse=True)[:5]
        yield Problem("nbs", f"exported cells have {median:g} lines in the median; {MEDIAN_LINES} is the limit",
                      "define less per cell, first in " + ", ".join(f"{stem} ({n:g})" for n, stem in worst))


def check_sync(root: Path) -> Iterator[Problem]:
    "The package is just what nbdev_export makes of the notebooks: nothing edited by hand, forgotten or left over."
    package = root / notebooks.settings(root)["lib_path"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root / "nbs", copy / "nbs", ignore=lambda d, names: [n for n in names if not n.endswith(".ipynb") and Path(d, n).is_file()])
        shutil.copy(root / "settings.ini", copy)
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        done = subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"], cwd=copy, env=env, capture_output=True, text=True)
        if done.returncode:
            yield Problem("nbs", f"nbdev_export fails: {done.stderr.strip()[-500:]}", "mend the notebook it names")
            return
        fresh, here = ({p.relative_to(f).as_posix(): p for p in f.rglob("*.py")} for f in (copy / package.name, package))
        for name in sorted(fresh.keys() | here.keys()):
            where = f"{package.name}/{name}"
            if name not in fresh: yield Problem(where, "no notebook exports it", "delete it, or write its notebook")
            elif name not in here: yield Problem(where, "is missing", "make export")
            elif fresh[name].read_bytes() != here[name].read_bytes(): yield Problem(where, "differs from its notebook", "change the notebook, then make export")


def check_readme(root: Path) -> Iterator[Problem]:
    "README.md is nbs/index.ipynb, and the files it points at exist."
    index, path = root / "nbs" / "index.ipynb", root / "README.md"
    if not index.exists():
        yield Problem("nbs/index.ipynb", "is missing", "write it: README.md is made from it")
        return
    try: fresh = readme.render(index)
    except readme.EmbeddedPicture as error:
        yield Problem("nbs/index.ipynb", str(error), "link a file in figures/: ![](../figures/name.png)")
        return
    if not path.exists() or path.read_text(encoding="utf-8") != fresh: yield Problem("README.md", "differs from nbs/index.ipynb", "make readme")
    for target in readme.local_links(fresh):
        if not (root / target).exists(): yield Problem("README.md", f"points at {target}, which is not there", "mend the link in nbs/index.ipynb")


EACH = {"clean": check_clean, "ids": check_ids, "sizes": check_sizes, "cells": check_cells, "anatomy": check_anatomy,
        "outputs": check_outputs, "words": check_words, "imports": check_imports}
WHOLE = {"median": check_median, "sync": check_sync, "readme": check_readme}


def problems(root: Path, only: list[str]) -> Iterator[tuple[str, list[Problem]]]:
    "For each check its name and what it found."
    try: books = [Book(p, root) for p in notebooks.find(root)]
    except (json.JSONDecodeError, KeyError) as error:
        yield "read", [Problem("nbs", f"a notebook can't be read: {error!r}", "git diff nbs: a merge may have left its marks")]
        return
    for name, check in EACH.items():
        if name in only: yield name, [p for book in books for p in check(book)]
    for name, check in WHOLE.items():
        if name in only: yield name, list(check(root))


def main() -> int:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=notebooks.ROOT, help="checkout to look at (default: this one)")
    parser.add_argument("--only", nargs="+", choices=[*EACH, *WHOLE], default=[*EACH, *WHOLE], help="checks to make (default: all)")
    args = parser.parse_args()
    count = 0
    for name, found in problems(args.root.resolve(), args.only):
        print(f"{name:10} {len(found) or 'ok'}", flush=True)
        for problem in found: print(f"  {problem}")
        count += len(found)
    print(f"{count} problem(s)." if count else f"{len(notebooks.find(args.root))} notebooks: no problems.")
    return bool(count)


if __name__ == "__main__": sys.exit(main())
