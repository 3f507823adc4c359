"""Check a built site without a network: links lead to files and anchors that exist, pages load nothing of other hosts.

python scripts/check_links.py build/site
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes through which a page loads something as it is shown; an `href` of `a` only leads somewhere.
_LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src"), ("video", "src")}


@dataclass
class Page(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    anchors: set[str] = field(default_factory=set)
    links: list[tuple[str, bool]] = field(default_factory=list)  # (address, whether it is loaded)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect anchors and addresses."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif (tag, name) in _LOADS or (tag, name) == ("a", "href"):
                self.links.append((value, tag != "a"))


@cache
def read(file: Path) -> Page:
    """The page in ``file``."""
    page = Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def fault(root: Path, file: Path, address: str, loaded: bool) -> str | None:
    """What is wrong with ``address`` on the page ``file``, or None."""
    parts = urlsplit(address)
    if parts.scheme in ("http", "https") or parts.netloc:
        return "is loaded from another host" if loaded else None
    if parts.scheme in ("mailto", "data"):
        return None
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not target.is_relative_to(root):
        return "leads out of the site"
    if not target.is_file():
        return "does not exist"
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).anchors:
        return "has no such anchor"
    return None


def faults(root: Path) -> list[str]:
    """A line for each link of the site in ``root`` that is wrong."""
    root = root.resolve()
    lines = []
    for file in sorted(root.rglob("*.html")):
        for address, loaded in read(file).links:
            why = fault(root, file, address, loaded)
            if why is not None:
                lines.append(f"{file.relative_to(root)}: {address} {why}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the faults; the exit status is 1 if there are any, or no pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    site = parser.parse_args(argv).site
    pages = len(list(site.rglob("*.html")))
    lines = faults(site)
    print(*lines, f"{site}: {pages} pages, {len(lines)} faulty links", sep="\n")
    return 1 if lines or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
