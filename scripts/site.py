#!/usr/bin/env python3
"""Check the built documentation site: links, requests, search and rendering.

Run ``python scripts/site.py [FOLDER]`` after ``mkdocs build``; it prints one line for each problem
and exits 1 if there is any. mkdocs itself reports broken links and anchors.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

SEARCHES: Mapping[str, str] = {
    "install": "learn/install/",
    "tutorial": "learn/tutorial/",
    "HF Trainer": "howto/hf_trainer/",
    "Lightning": "howto/lightning/",
    "accelerate": "howto/accelerate/",
    "Ray": "howto/ray/",
    "FSDP2": "howto/fsdp2/",
    "torchtitan": "howto/fsdp2/",
    "LoRA": "howto/lora/",
    "EMA": "howto/ema/",
    "S3": "object_stores/",
    "flags": "flags/",
    "glossary": "glossary/",
    "CheckpointManager": "api/#functional_ckpt.manager.CheckpointManager",
    "Another live writer holds": "troubleshooting/",
}
"""Query -> the start of a location whose title must have all of its words."""

UNLINKED = {"404.html", "parity/index.html"}
"""Pages that need no link: the page of errors, and one for contributors."""

_REQUESTS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class _Page(HTMLParser):
    """The links of a page, the files that it requests, and its text outside of code."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.requests: list[str] = []
        self.text: list[str] = []
        self._code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and (href := values.get("href")):
            self.links.append(href)
        is_canonical = tag == "link" and values.get("rel") in ("canonical", "prev", "next")
        if tag in _REQUESTS and not is_canonical and (url := values.get(_REQUESTS[tag])):
            self.requests.append(url)
        self._code += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.text.append(data)


def read(site: Path) -> dict[str, _Page]:
    """Returns the pages by their paths below the site."""
    pages: dict[str, _Page] = {}
    for path in sorted(site.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        pages[path.relative_to(site).as_posix()] = page
    return pages


def unreachable(pages: Mapping[str, _Page]) -> set[str]:
    """Returns the pages to which no chain of links leads from the home page."""
    seen, queue = {"index.html"}, collections.deque(["index.html"])
    while queue:
        here = queue.popleft()
        for href in pages[here].links:
            path = urlsplit(urljoin(f"/{here}", href)).path.lstrip("/")
            path += "index.html" if path.endswith("/") or not path else ""
            if path in pages and path not in seen:
                seen.add(path)
                queue.append(path)
    return set(pages) - seen - UNLINKED


def missed_searches(documents: list[Mapping[str, str]]) -> Iterator[str]:
    """Yields the searches of `SEARCHES` whose page has no title with the words."""
    for query, expected in SEARCHES.items():
        found = [
            document["location"]
            for document in documents
            if all(word.lower() in document["title"].lower() for word in query.split())
        ]
        if not any(location.startswith(expected) for location in found):
            yield f"search for {query!r}: no title of {expected} matches; found {found[:5]}"


def problems(site: Path) -> Iterator[str]:
    """Yields the problems of a built site."""
    pages = read(site)
    if "index.html" not in pages:
        yield f"{site}: no index.html; run mkdocs build first"
        return
    yield from (f"{path}: no link leads there" for path in sorted(unreachable(pages)))
    for path, page in pages.items():
        for url in page.requests:
            if urlsplit(url).netloc:
                yield f"{path}: requests {url}"
        if found := re.search(r"```|--8<--|~~~", "".join(page.text)):
            yield f"{path}: {found[0]} is not rendered"
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    yield from missed_searches(index["docs"])


def main() -> int:
    """Prints the problems; the exit code says if there are any."""
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "site"
    found = list(problems(site))
    print("\n".join(found) or "site: no problems")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
