"""The built site, read back: pages with their ids, links, headings and pictures; and looked at in a browser."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OUTSIDE = ("http:", "https:", "mailto:")


@dataclass
class SitePage(HTMLParser):
    """What one page promises."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    headings: list[int] = field(default_factory=list)
    pictures: list[str | None] = field(default_factory=list)
    title: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.inside = ""
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inside = tag
        self.ids |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        if tag in ("script", "img", "iframe", "source") and (link := given.get("src")):
            self.loads.append(link)
        if tag == "link" and given.get("rel") != "canonical" and (link := given.get("href")):
            self.loads.append(link)
        if tag == "img":
            self.pictures.append(given.get("alt"))
        if tag == "html":
            self.language = given.get("lang") or ""
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.headings.append(int(tag[1]))

    def handle_data(self, data: str) -> None:
        if self.inside == "title" and not self.title:
            self.title = data.strip()


def pages(site: Path) -> dict[Path, SitePage]:
    """Every page of a site, by its path."""
    return {path: SitePage(path) for path in sorted(site.rglob("*.html"))}


def broken(read: dict[Path, SitePage]) -> list[str]:
    """Links and loads that lead nowhere: no such file, or no such place on its page."""
    found = []
    for path, page in read.items():
        for link in (*page.links, *page.loads):
            if link.startswith((*OUTSIDE, "data:", "javascript:")):
                continue
            to, anchor = urldefrag(unquote(link))
            file = (path.parent / to).resolve() if to else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in read and anchor not in read[file].ids):
                found.append(f"{path.name}: {link}")
    return found


def unreached(read: dict[Path, SitePage], start: Path) -> list[str]:
    """Pages to which no chain of links leads from the first one."""
    seen, waiting = {start}, [start]
    while waiting:
        path = waiting.pop()
        for link in read[path].links:
            to = (path.parent / unquote(urldefrag(link)[0])).resolve()
            if to in read and to not in seen:
                seen.add(to)
                waiting.append(to)
    return sorted(path.name for path in set(read) - seen)


def axe(folder: Path) -> str | None:
    """The source of axe-core from npm, or None where there is no npm or it cannot be had."""
    if not (npm := shutil.which("npm")):
        return None
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core@4"]
    done = subprocess.run(command, capture_output=True, timeout=300)
    file = folder / "node_modules" / "axe-core" / "axe.min.js"
    return file.read_text(encoding="utf-8") if done.returncode == 0 and file.is_file() else None


ASK_AXE = """async () => (await axe.run(document, {preload: false, resultTypes: ["violations"]})).violations
  .filter(v => ["serious", "critical"].includes(v.impact)).flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 150)}`))"""


def look(browser: Any, page: Path, scheme: str, width: int, script: str | None = None) -> list[str]:
    """What is wrong with a page as a browser shows it from disk: requests that leave, errors, overflow, what axe-core finds."""
    found: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    try:
        tab = context.new_page()
        tab.on("console", lambda m: found.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: found.append(f"error: {error}"))
        tab.on("request", lambda r: found.append(f"request: {r.url}") if r.url.startswith(("http", "ws")) else None)
        tab.goto(page.as_uri(), wait_until="load")
        if (over := tab.evaluate("document.documentElement.scrollWidth - innerWidth")) > 0:
            found.append(f"overflow: {over} pixels at {width}")
        if script:
            tab.evaluate(
                "document.querySelectorAll('.katex').forEach(e => e.remove())"
            )  # KaTeX's own marks: seconds a page
            tab.evaluate(script)
            found += tab.evaluate(ASK_AXE)
    finally:
        context.close()
    return found
