"""Build the site from the executed notebooks: pages, reference, search. Offline, and nothing in the site is fetched from elsewhere.

    python tools/docs.py                 writes _docs/ (settings.ini, doc_path)
    python tools/docs.py --site DIR      somewhere else

Each notebook becomes a page, named as its module is; each module a page of the reference (tools/reference.py). MkDocs with the theme
Material does the rest: docs/mkdocs.yml. At the end every link, anchor and picture is looked up (tools/links.py). Needs `pip install -e ".[docs]"`.
"""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import links
import notebooks
import reference
from pages import Site, page, title, write

SECTIONS = {0: "Data", 10: "Model", 20: "Learning", 30: "Running", 40: "Analysis", 50: "The paper", 70: "Beyond"}


def navigation(site: Site, entries: list[tuple[str, str]]) -> list:
    "What is where: the notebooks by number, the reference, the rest."
    sections: dict[str, list] = {}
    for path in site.books:
        if place := notebooks.number(path.stem):
            section = SECTIONS[max(n for n in SECTIONS if n <= place[0])]
            sections.setdefault(section, []).append({title(site, path): f"{site.names[path.stem]}.md"})
    return [{"Home": "index.md"}, *({name: pages} for name, pages in sections.items()),
            {"Reference": [{name: file} for name, file in entries]}, {"Contributing": "contributing.md"}]


def prepare(site: Site) -> list:
    "Write all that MkDocs reads; the navigation."
    shutil.copytree(site.root / "figures", site.pages / "figures")
    shutil.copy(site.root / "docs" / "style.css", site.pages)
    for path in site.books: page(site, path)
    write(site.pages / "contributing.md", list(site.text((site.root / "CONTRIBUTING.md").read_text(encoding="utf-8"), "")))
    return navigation(site, reference.pages(site))


def address(settings: dict[str, str]) -> str:
    "Where the site will live."
    return f"{settings['doc_host']}{settings['doc_baseurl']}/"


def build(root: Path, target: Path) -> None:
    "The whole site, in the folder `target`."
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config
    with tempfile.TemporaryDirectory(prefix="poet_nb-docs.") as folder:
        site = Site(root, Path(folder))
        nav = prepare(site)
        social = {"social": [{"icon": "fontawesome/brands/github", "link": site.settings["git_url"], "name": "The repository"}]}
        config = load_config(str(root / "docs" / "mkdocs.yml"), docs_dir=folder, site_dir=str(target), nav=nav, site_url=address(site.settings),
                             copyright=f"© {site.settings['copyright']}, Apache 2.0", extra=social)
        config.plugins.on_startup(command="build", dirty=False)
        try: mkdocs_build(config)
        finally: config.plugins.on_shutdown()


def main() -> int:
    "Command line."
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--site", type=Path, help="folder to write (default: doc_path of settings.ini)")
    options.add_argument("--root", type=Path, default=notebooks.ROOT, help="checkout to read (default: this one)")
    args = options.parse_args()
    settings = notebooks.settings(args.root)
    target = args.site or args.root / settings["doc_path"]
    if target.is_dir() and any(p.name[0] != "." for p in target.iterdir()) and not (target / "search" / "search_index.json").is_file():
        print(f"{target}: holds other things than a site, and they would be removed; name an empty folder", file=sys.stderr)
        return 2
    build(args.root.resolve(), target.resolve())
    wrong = links.problems(target, address(settings))
    for line in wrong: print(line, file=sys.stderr)
    if not wrong: print(f"{target}/index.html; with its search: {Path(sys.executable).name} -m http.server -d {target}")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
