"""The reference: for each module its public names, with signature, a table of parameters made of their comments, and links to source and notebook."""
from __future__ import annotations

import ast
import html
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from pages import Site, assigned, colour, methods, write

WIDTH = 110 # characters of a signature before it goes one parameter a line
SHOWN = 12  # lines of a constant


def arguments(node: ast.FunctionDef) -> Iterator[tuple[str, ast.arg, ast.expr | None]]:
    "(name with stars, argument, default) of each parameter; self is left out."
    args = node.args
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    everything = [(a.arg, a, d) for a, d in zip(plain, defaults)]
    if args.vararg: everything.append((f"*{args.vararg.arg}", args.vararg, None))
    everything += [(a.arg, a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    if args.kwarg: everything.append((f"**{args.kwarg.arg}", args.kwarg, None))
    yield from (entry for entry in everything if entry[0] not in ("self", "cls"))


def fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign, ast.expr | None]]:
    "(name, declaration, default) of each field of a dataclass."
    yield from ((n.target.id, n, n.value) for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))


def is_dataclass(node: ast.ClassDef) -> bool: return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    "A method that is written in the class itself."
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def parameters(node: ast.AST) -> list[tuple]:
    "What a call takes."
    if isinstance(node, ast.FunctionDef): return list(arguments(node))
    if is_dataclass(node): return list(fields(node))
    init = method(node, "__init__")
    return list(arguments(init)) if init else []


def signature(node: ast.AST, name: str) -> str:
    "The call, as code."
    texts = [n + (f":{ast.unparse(a.annotation)}" if a.annotation is not None else "") + (f"={ast.unparse(d)}" if d is not None else "") for n, a, d in parameters(node)]
    returns = getattr(node, "returns", None)
    end = f") -> {ast.unparse(returns)}" if returns is not None else ")"
    line = f"{name}({', '.join(texts)}{end}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {t},\n" for t in texts) + end


@dataclass(frozen=True)
class Module:
    "The source of a module, read without importing it: comments by line, definitions by name."
    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module: return ast.parse(self.source)

    @cached_property
    def remarks(self) -> dict[int, tuple[str, bool]]:
        "Line -> (its comment, whether it stands alone)."
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        return {t.start[0]: (t.string.lstrip("# "), t.line.lstrip().startswith("#")) for t in tokens if t.type == tokenize.COMMENT}

    @cached_property
    def public(self) -> list[str]:
        "What `__all__` lists."
        return next((ast.literal_eval(n.value) for n in self.tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), [])

    @cached_property
    def found(self) -> dict[str, ast.AST]: return definitions(self.tree)

    def comment(self, line: int, start: int) -> str:
        "A docment: the comment on a line, or the lines of comment above it, down from the line where the definition starts."
        if line in self.remarks and not self.remarks[line][1]: return self.remarks[line][0]
        above = list(takewhile(lambda i: self.remarks.get(i, ("", False))[1], range(line - 1, start, -1)))
        return " ".join(self.remarks[i][0] for i in reversed(above))

    def docments(self, node: ast.AST) -> dict[str, str]:
        "Parameter -> comment, as fastcore.docments has it; the result under 'return'."
        start = (method(node, "__init__") or node).lineno if isinstance(node, ast.ClassDef) else node.lineno
        said = {n: self.comment(a.lineno, start) for n, a, _ in parameters(node)}
        returns = getattr(node, "returns", None)
        return said | ({"return": self.comment(returns.lineno, start)} if returns is not None else {})


def table(site: Site, node: ast.AST, said: dict[str, str]) -> str:
    "Parameters and result with type, default and comment."
    rows = []
    for name, argument, default in parameters(node):
        kind = f"<code>{html.escape(ast.unparse(argument.annotation))}</code>" if argument.annotation is not None else ""
        given = f"<code>{html.escape(ast.unparse(default))}</code>" if default is not None else ""
        rows.append(f"<tr><td><code>{name}</code></td><td>{kind}</td><td>{given}</td><td>{site.md.renderInline(said.get(name, ''))}</td></tr>")
    returns = getattr(node, "returns", None)
    if said.get("return") or returns is not None and ast.unparse(returns) != "None":
        kind = f"<code>{html.escape(ast.unparse(returns))}</code>" if returns is not None else ""
        rows.append(f"<tr><td><em>returns</em></td><td>{kind}</td><td></td><td>{site.md.renderInline(said.get('return', ''))}</td></tr>")
    head = "<tr><th>name</th><th>type</th><th>default</th><th>what</th></tr>"
    return f'<table class="parameters"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>' if rows else ""


def doc(node: ast.AST) -> str: return " ".join((ast.get_docstring(node) or "").split())


def entry(site: Site, module: Module, name: str, level: int = 2) -> Iterator[str]:
    "All about one name."
    node = module.found[name]
    yield f"{'#' * level} `{name}` {{#{name}}}"
    section = f' · <a href="../{module.name}.html#{name}">in the notebook</a>' if node in module.tree.body else ""
    yield f'<p class="links"><a href="{site.github(f"poet_nb/{module.name}.py", node.lineno)}">source</a>{section}</p>'
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield colour(signature(node, name.split(".")[-1]))
        yield f'<div class="text">{site.md.render(doc(node))}</div>' if doc(node) else ""
        yield table(site, node, module.docments(node))
    else:
        lines = ast.unparse(node).splitlines() if len(ast.unparse(node)) < 1000 else [f"{name} = ..."]
        yield colour("\n".join(lines[:SHOWN] + ["..."] * (len(lines) > SHOWN)))


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    "Name -> where the module defines it; methods as Class.method."
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
        found |= dict.fromkeys(assigned(node), node)
    return found | {name: found[function] for name, function in methods(tree).items() if isinstance(found.get(function), ast.FunctionDef)}


def owned(found: dict[str, ast.AST], name: str) -> list[str]:
    "The public methods of a class, in the order in which the module has them."
    return [n for n in found if n.startswith(f"{name}.") and not n.split(".")[-1].startswith("_")]


def module_page(site: Site, name: str) -> tuple[str, list[str]]:
    "What a module is for; its public names. Writes the page."
    module = Module(name, (site.root / "poet_nb" / f"{name}.py").read_text(encoding="utf-8"))
    links = f'<p class="links"><a href="{site.github(f"poet_nb/{name}.py")}">source</a> · <a href="../{name}.html">the notebook</a></p>'
    parts = [f"# `poet_nb.{name}` {{#top}}", links, f'<div class="text">{site.md.render(doc(module.tree))}</div>']
    names = [n for n in module.public if n in module.found]
    for outer in names:
        parts += entry(site, module, outer)
        for inner in owned(module.found, outer): parts += entry(site, module, inner, 3)
    foreign = {n.split(".")[0] for n in module.found if "." in n} - set(module.public)
    for inner in [n for f in sorted(foreign) if not f.startswith("_") for n in owned(module.found, f)]: parts += entry(site, module, inner) # into another module's class
    write(site.pages / "api" / f"{name}.md", parts)
    return doc(module.tree), names


def pages(site: Site) -> list[tuple[str, str]]:
    "Write the reference; (title, file) of its pages in reading order."
    modules = [m for m in site.names.values() if (site.root / "poet_nb" / f"{m}.py").exists()]
    parts, entries = ["# Reference", '<div class="text"><p>Everything public, module by module, in the order of the notebooks.</p></div>'], []
    for module in modules:
        what, names = module_page(site, module)
        listed = ", ".join(f'<a href="{module}.html#{n}"><code>{n}</code></a>' for n in names)
        parts += [f"## `poet_nb.{module}` {{#{module}}}", f'<div class="text">{site.md.render(what)}<p>{listed}</p></div>']
        entries.append((module, f"api/{module}.md"))
    write(site.pages / "api" / "index.md", parts)
    return [("Overview", "api/index.md"), *entries]
