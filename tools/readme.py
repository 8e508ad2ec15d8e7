"""Write README.md from nbs/index.ipynb: the text, the code and what it printed; pictures are links to files in figures/."""
from __future__ import annotations

import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

import notebooks

NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n"
_LINK = re.compile(r"(\]\(|(?:src|href|srcset)=\")([^)\"\s]+)")


class EmbeddedPicture(ValueError):
    "A cell of the index draws a picture instead of linking one."


def _from_root(target: str) -> str:
    "A link as seen from nbs/, seen from the root of the repository."
    if re.match(r"[a-z]+:|#|/", target): return target
    return target.removeprefix("../") if target.startswith("../") else f"nbs/{target}"


def _shown(nb) -> None:
    "Drop hidden cells, hidden inputs and directive lines, in place."
    nb.cells = [c for c in nb.cells if not {"hide", "default_exp"} & notebooks.directives(c.source).keys()]
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        if any("image/" in mime for o in cell.outputs for mime in o.get("data", {})):
            raise EmbeddedPicture(f"cell {cell.id} holds a picture")
        silent = notebooks.directives(cell.source).get("echo", "").lower() == "false"
        cell.source = "" if silent else re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)


def render(index: Path) -> str:
    "The text of README.md."
    nb = notebooks.read(index)
    _shown(nb)
    nb.metadata.language_info = {"name": "python"}  # what code fences are called
    exporter = MarkdownExporter()
    for display in (exporter, *exporter._preprocessors): # plain text rather than HTML, which GitHub shows badly
        if display.has_trait("display_data_priority"): display.display_data_priority = ["text/markdown", "text/plain"]
    body, _ = exporter.from_notebook_node(nb)
    body = re.sub(r"```python\s*```", "", body)
    body = re.sub(r"\n{3,}", "\n\n", _LINK.sub(lambda m: m[1] + _from_root(m[2]), body))
    return NOTE + body.strip() + "\n"


def local_links(markdown: str) -> list[str]:
    "Files of the repository that a text points at."
    targets = (m[2].split("#")[0] for m in _LINK.finditer(markdown))
    return sorted({t for t in targets if t and not re.match(r"[a-z]+:|/", t)})


if __name__ == "__main__":
    path = notebooks.ROOT / "README.md"
    text = render(notebooks.ROOT / "nbs" / "index.ipynb")
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print("written README.md")
    sys.exit(0)
