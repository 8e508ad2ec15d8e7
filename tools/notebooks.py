"""Find, read, clean and write notebooks: the one way in which every tool of this project does it."""
from __future__ import annotations

import re
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
_DIRECTIVE = re.compile(r"^#\|\s*(\w+)[ \t]*:?[ \t]*(.*)$", re.M)
_ADDRESS = re.compile(r"(<[^<>\n]*?) at 0x[0-9a-fA-F]+(>)")


def settings(root: Path = ROOT) -> dict[str, str]:
    "What settings.ini says."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def find(root: Path = ROOT) -> list[Path]:
    "All notebooks in reading order."
    return sorted(p for p in (root / "nbs").glob("*.ipynb") if p.name[0] not in "_.")


def select(patterns: list[str], root: Path = ROOT) -> list[Path]:
    "The notebooks meant by `patterns`: a path, a name, a number (05) or a glob (5*); all of them if there is none."
    everything = find(root)
    if not patterns: return everything
    chosen = set()
    for pattern in patterns:
        stem = Path(pattern).name.removesuffix(".ipynb")
        hits = [p for p in everything if fnmatch(p.stem, stem) or p.stem.split("_")[0] == stem]
        if not hits: raise SystemExit(f"No notebook in {root / 'nbs'} is called {pattern!r}; there are: {', '.join(p.stem for p in everything)}")
        chosen.update(hits)
    return sorted(chosen)


def number(stem: str) -> tuple[int, str] | None:
    "Place in the reading order: '12a_x' -> (12, 'a'); None for a notebook without number, such as index."
    m = re.match(r"(\d+)([a-z]?)_", stem)
    return (int(m[1]), m[2]) if m else None


def module(stem: str) -> str:
    "The module that a notebook of this name exports."
    return re.sub(r"^\d+[a-z]?_", "", stem)


def directives(source: str) -> dict[str, str]:
    "The `#| name: value` lines of a cell."
    return {m[1]: m[2].strip() for m in _DIRECTIVE.finditer(source)}


def is_skipped(source: str, flags: set[str]) -> bool:
    "Cells that nobody runs unattended: flagged ones, `eval: false`, and the last one, which exports."
    found = directives(source)
    return bool(flags & found.keys()) or found.get("eval", "").lower() == "false" or "nbdev_export(" in source


def read(path: Path) -> nbformat.NotebookNode:
    "Read one notebook as format 4."
    return nbformat.read(path, as_version=4)


def _text_without_address(text: str) -> str: return _ADDRESS.sub(r"\1\2", text)


def _clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if "metadata" in output: output.metadata = {}
    if "execution_count" in output: output.execution_count = None
    if "text" in output: output.text = _text_without_address(output.text)
    data = output.get("data", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)  # points at a kernel that is gone
    for mime, value in data.items():
        if mime.startswith("text/"): data[mime] = _text_without_address(value)
        elif isinstance(value, str) and mime.startswith("image/") and "svg" not in mime: data[mime] = value.rstrip()
    return output


def _join_streams(outputs: list) -> list:
    "Where a stream is cut into messages depends on the hour: put neighbours together."
    joined = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name: last.text += output.text
        else: joined.append(output)
    return joined


def clean(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "Keep what was written and what came out; drop counters, metadata and memory addresses. Changes `nb`."
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen = set()
    for cell in nb.cells:
        cell.metadata = {}
        if not cell.get("id") or cell.id in seen: cell.id = nbformat.v4.new_code_cell().id
        seen.add(cell.id)
        if cell.cell_type != "code": continue
        cell.execution_count = None
        cell.outputs = [_clean_output(o) for o in _join_streams(cell.outputs)]
    return nb


def dumps(nb: nbformat.NotebookNode) -> str:
    "The text of a notebook file."
    return nbformat.writes(nb, version=4).rstrip("\n") + "\n"


def write(nb: nbformat.NotebookNode, path: Path) -> bool:
    "Write `nb` clean, if that changes the file; through a neighbour, so that no reader sees half of it."
    text = dumps(clean(nb))
    if path.exists() and path.read_text(encoding="utf-8") == text: return False
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return True


if __name__ == "__main__":
    import sys
    for path in select(sys.argv[1:]):
        if write(read(path), path): print(f"cleaned {path.relative_to(ROOT)}")
