"""Look through a built site: does every link, anchor and picture lead somewhere, and is nothing fetched from elsewhere?"""
from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "source": "src", "video": "src", "iframe": "src", "embed": "src", "object": "data", "link": "href"}
_IN_CSS = re.compile(r"(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"')\s]+)")
_IN_SCRIPT = re.compile(r"(?:\bfrom|\bimport\s*\(?|\.src\s*=)\s*[\"']((?:https?:)?//[^\"']+)")


class Page(HTMLParser):
    "What a page offers and what it asks for."

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        self.inside = tag
        if tag == "a" and found.get("href"): self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("canonical", "prev", "next", "alternate"): return
        if found.get(FETCHED.get(tag, "")): self.fetched.append(found[FETCHED[tag]])
        for word in (found.get("srcset") or "").split(","):
            if word.strip(): self.fetched.append(word.split()[0])
        self.fetched += _IN_CSS.findall(found.get("style") or "")

    def handle_data(self, data: str) -> None:
        if self.inside == "style": self.fetched += _IN_CSS.findall(data)
        if self.inside == "script": self.fetched += _IN_SCRIPT.findall(data)

    def handle_endtag(self, tag: str) -> None: self.inside = ""


def local(link: str, address: str) -> str | None:
    "A link without the site's own address; None if it leads elsewhere."
    if address and link.startswith(address): return "/" + link[len(address):].lstrip("/")
    base = urlsplit(address).path
    if base and link.startswith(base): return "/" + link[len(base):].lstrip("/")
    return None if re.match(r"[a-z][a-z0-9+.-]*:|//", link) else link


def lost(link: str, page: Path, site: Path, pages: dict[Path, Page]) -> str | None:
    "What is wrong with a link within the site."
    path, _, anchor = link.partition("#")
    path = unquote(path.split("?")[0])
    target = page if not path else ((site / path.lstrip("/")) if path.startswith("/") else page.parent / path).resolve()
    if target.is_dir(): target = target / "index.html"
    if not target.is_file(): return f"{link} is not there"
    if anchor and target in pages and unquote(anchor) not in pages[target].ids: return f"{link}: no such anchor"
    return None


def problems(site: Path, address: str = "") -> list[str]:
    "Everything wrong with a site that will live at `address`, as lines 'page: what'."
    site = site.resolve()
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links + page.fetched):
            inner = local(link, address)
            if inner is not None: what = lost(inner, path, site, pages)
            else: what = f"fetches {link}" if link in page.fetched and not link.startswith("data:") else None
            if what: found.append(f"{path.relative_to(site)}: {what}")
    for path in sorted(site.rglob("*.css")):
        found += [f"{path.relative_to(site)}: fetches {u}" for u in _IN_CSS.findall(path.read_text(encoding="utf-8"))]
    return found


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines))
    sys.exit(bool(lines))
