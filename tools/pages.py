"""Notebooks as pages of the site: what a reader should see of each cell, as text for MkDocs."""
from __future__ import annotations

import ast
import base64
import html
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from latex2mathml.converter import convert as mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

import notebooks

PICTURES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp"}
_LINK = re.compile(r'(<(?:a|img|source|video|object)\b[^>]*?\s(?:href|src|srcset|data)=")([^"]*)(")')
_PLAIN = re.compile(r'<span class="(?:n|p|w)">([^<]*)</span>') # names, brackets and blanks look like the text around them
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def slug(text: str) -> str:
    "The anchor of a heading, as GitHub and Jupyter would write it, in lower case."
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s.-]", "", text.lower())).strip("-")


def colour(source: str, language: str = "python") -> str:
    "Code with its syntax in classes that the theme knows."
    try: lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound: lexer = get_lexer_by_name("text", stripnl=False)
    plain = _PLAIN.sub(r"\1", highlight(source, lexer, HtmlFormatter(nowrap=True)))
    return f'<div class="language-{language} highlight"><pre><span></span><code>{plain}</code></pre></div>'


def equation(renderer, tokens: list, i: int, options: dict, env: dict) -> str:
    "LaTeX to MathML, which browsers draw without a script."
    drawn = mathml(tokens[i].content.strip(), display="inline" if tokens[i].type == "math_inline" else "block")
    return re.sub(r"<mo>(&#x0005E;(?=</mo></mover>)|&#x02016;)", r'<mo stretchy="false">\1', drawn) # a hat is no roof, a norm as high as its text


def parser() -> MarkdownIt:
    "Markdown as Jupyter and GitHub read it: CommonMark, tables, dollars for equations."
    md = MarkdownIt("commonmark", {"html": True})
    md.enable(["table", "strikethrough"]).use(dollarmath_plugin, double_inline=True)
    for kind in ("math_inline", "math_inline_double", "math_block"): md.add_render_rule(kind, equation)
    md.add_render_rule("fence", lambda renderer, tokens, i, options, env: colour(tokens[i].content, tokens[i].info.strip() or "text"))
    return md


@dataclass
class Site:
    "What all pages share: where sources are, what pages there are."
    root: Path
    pages: Path # a folder for what MkDocs reads
    md: MarkdownIt = field(default_factory=parser)

    def __post_init__(self):
        self.settings = notebooks.settings(self.root)
        self.books = notebooks.find(self.root)
        self.names: dict[str, str] = {} # notebook -> page: as its module; a later one of the same name keeps its number
        for stem in (p.stem for p in self.books): self.names[stem] = stem if (name := notebooks.module(stem)) in self.names.values() else name
        self.read = cache(notebooks.read)

    def github(self, path: str, line: int | None = None) -> str:
        "A file of the repository, on GitHub."
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"{self.settings['git_url']}/{kind}/{self.settings['branch']}/{path}" + (f"#L{line}" if line else "")

    def target(self, link: str, folder: str) -> str:
        "Where a link of a file in `folder` leads in the site."
        if re.match(r"[a-z]+:|//", link): return link
        path, _, anchor = html.unescape(link).partition("#")
        anchor = f"#{slug(anchor)}" if anchor else ""
        if not path: return anchor
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("nbs/") and Path(path).stem in self.names: return f"{self.names[Path(path).stem]}.html{anchor}"
        if path.startswith("figures/"): return path
        return {"CONTRIBUTING.md": "contributing.html", "README.md": "index.html"}.get(path, self.github(path)) + anchor

    def links(self, text: str, folder: str) -> str:
        "HTML with every link led to its page of the site."
        return _LINK.sub(lambda m: m[1] + html.escape(self.target(m[2], folder)) + m[3], text)

    def text(self, source: str, folder: str = "nbs") -> Iterator[str]:
        "Markdown to parts of a page: headings as Markdown, so that contents and search know them, all else as HTML."
        source = re.sub(r"</summary>[ \t]*\n?", "</summary>\n\n", re.sub(r"\n?</details>", "\n\n</details>", source)) # Markdown inside, too
        tokens, env, rest = self.md.parse(source), {}, []
        for i, token in enumerate(tokens + [None]):
            if token is None or token.type == "heading_open" and token.level == 0:
                if rest: yield f'<div class="text">\n{self.links(self.md.renderer.render(rest, self.md.options, env), folder)}</div>'
                rest = []
                if token: yield f"{'#' * int(token.tag[1])} {tokens[i + 1].content} {{#{slug(tokens[i + 1].content)}}}"
            elif token.level == 0 and (token.type == "heading_close" or token.type == "inline"): continue
            elif not (token.type == "inline" and tokens[i - 1].type == "heading_open" and tokens[i - 1].level == 0): rest.append(token)


def assigned(node: ast.AST) -> list[str]:
    "The names that an assignment gives a value, also several at once."
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def methods(tree: ast.Module) -> dict[str, str]:
    "Class.method -> the function that becomes it, of lines such as `Lab.raw, Lab.show = raw, show` and `Skeleton.from_category = classmethod(f)`."
    found, several = {}, lambda node: getattr(node, "elts", [node])
    for node in (n for n in tree.body if isinstance(n, ast.Assign)):
        for target, value in zip(several(node.targets[0]), several(node.value)):
            value = value.args[0] if isinstance(value, ast.Call) and len(value.args) == 1 else value
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and isinstance(value, ast.Name): found[ast.unparse(target)] = value.id
    return found


def defined(source: str, exported: bool = True) -> list[str]:
    "Public names that a cell defines; a method that is put into a class as Class.method, also where the cell's own names stay private."
    tree, names = ast.parse(source), []
    for node in tree.body if exported else []:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.append(node.name)
        names += assigned(node)
    return [n for n in (*names, *methods(tree)) if not any(part.startswith("_") for part in n.split("."))]


def output(site: Site, data: dict, name: str) -> str:
    "One output of a cell; a picture becomes a file of its own."
    for mime, ending in PICTURES.items():
        if mime in data and "text/html" not in data:
            file = site.pages / "outputs" / f"{name}.{ending}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data[mime].encode() if ending == "svg" else base64.b64decode(data[mime]))
            return f'<img src="outputs/{file.name}" alt="What the cell above draws" loading="lazy">'
    if "text/html" in data: return site.links(data["text/html"], "nbs")
    if "text/markdown" in data: return site.links(site.md.render(data["text/markdown"]), "nbs")
    return f"<pre><samp>{html.escape(_COLOUR.sub('', data.get('text/plain', '')))}</samp></pre>"


def code(site: Site, cell: dict, module: str, stem: str) -> str:
    "A code cell with its outputs."
    found = notebooks.directives(cell.source)
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    parts = []
    if {"export", "exporti"} & found.keys() and (names := defined(source, "export" in found)):
        parts.append('<p class="names">' + ", ".join(f'<a id="{n}" href="api/{module}.html#{n}"><span id="{n.lower()}"></span><code>{n}</code></a>' for n in names) + "</p>")
    if source and found.get("echo", "").lower() != "false": parts.append(colour(source))
    for i, out in enumerate(cell.outputs):
        shown = output(site, out.get("data") or {"text/plain": out.get("text", "")}, f"{stem}-{cell.id}-{i}")
        parts.append(f'<div class="output">{shown}</div>')
    return '<div class="cell">\n' + "\n".join(parts) + "\n</div>" if parts else ""


def page(site: Site, path: Path) -> None:
    "The page of a notebook."
    nb, module = site.read(path), notebooks.module(path.stem)
    parts, titled = [], False
    for cell in nb.cells:
        found = notebooks.directives(cell.source) if cell.cell_type == "code" else {}
        if {"hide", "default_exp"} & found.keys(): continue
        if cell.cell_type == "code": parts.append(code(site, cell, module, path.stem))
        elif cell.cell_type == "markdown": parts += site.text(cell.source)
        if not titled and parts and path.stem != "index":
            more = f' · <a href="api/{module}.html">reference of <code>poet_nb.{module}</code></a>' if exports(nb) else ""
            parts.insert(1, f'<p class="links"><a href="{site.github(f"nbs/{path.name}")}">{path.name}</a> on GitHub{more}</p>')
            titled = True
    if path.stem == "index": parts.insert(0, "---\nhide: [navigation]\n---")
    write(site.pages / f"{site.names[path.stem]}.md", parts)


def exports(nb) -> bool:
    "Does a notebook make a module?"
    return any("default_exp" in notebooks.directives(c.source) for c in nb.cells if c.cell_type == "code")


def write(path: Path, parts: list[str]) -> None:
    "A page; of anchors that occur twice the first stays."
    seen: set[str] = set()
    def once(m: re.Match) -> str:
        first = m[2] not in seen
        seen.add(m[2])
        return m[0] if first else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(p for p in parts if p)
    for m in re.finditer(r"^#+ .* \{#([^}]*)\}$", text, re.M): seen.add(m[1])
    path.write_text(re.sub(r'( id="([^"]*)")', once, text) + "\n", encoding="utf-8")


def title(site: Site, path: Path) -> str:
    "The first heading of a notebook, with its number."
    first = next(c.source for c in site.read(path).cells if c.cell_type == "markdown")
    number = path.stem.split("_")[0] if notebooks.number(path.stem) else ""
    return f"{number} {first.lstrip('# ').splitlines()[0]}".strip().replace("`", "")
