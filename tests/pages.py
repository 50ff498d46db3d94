"""Pages that are read back: a parser, the promises of every page with a graph, and the families they are shown for."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from catalogued import patchable_families

import controllability as ct
from controllability.components import Linear
from controllability.errors import NotControllable
from controllability.interfaces import Param, leaves
from controllability.rendering.svg import node_id

VOID = {"meta", "br", "hr", "img", "link", "input"}
BY_HAND = ("gemma3", "llama", "mixtral", "gptj", "deepseek_v3", "gpt_oss", "bert", "granitemoeshared", "dbrx")
up, gate, down = (Linear(Param(f"mlp.{n}.weight", s)) for n, s in (("up", ("h", "d")), ("gate", ("h", "d")), ("down", ("d", "h"))))  # fmt: skip


class Page(HTMLParser):
    """A page, read: raises at a tag that is closed wrongly; collects ids, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.svg = ElementTree.fromstring(found[0]) if (found := re.findall(r"<svg.*?</svg>", text, re.S)) else None
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.stack.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids[value or ""] += 1
            if name == "href":
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["style"], ["title"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        """Everything that is read, styles and tooltips aside."""
        return " ".join(" ".join(self.words).split())


def checked(text: str, block) -> Page:
    """The promises that every page with a graph makes."""
    page = Page(text)
    assert max(page.ids.values()) == 1, "an id is used twice"
    for link in page.links:
        assert link.startswith("#"), f"{link} leads out of the page"
        assert link[1:] in page.ids, f"{link} has no target"
    assert page.svg is not None
    drawn = Counter(a.get("href") for a in page.svg.iter("{http://www.w3.org/2000/svg}a"))
    for path, leaf in leaves(block):
        assert drawn[f"#{node_id(path)}"] == 1, f"{leaf.describe()} is drawn {drawn[f'#{node_id(path)}']} times"
    outside = re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", text)
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\((?!#)", outside), "something from outside"
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {a for a in page.attributes if a.startswith("on") or a in ("src", "style")}
    return page


def refused(block, **options) -> NotControllable:
    with pytest.raises(NotControllable) as error:
        ct.prove(block, **options)
    return error.value


def representative_names():
    """One family of each shape that has a proof, and those that are looked at by hand."""
    return sorted({*patchable_families(), *BY_HAND})
