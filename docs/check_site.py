"""Looks at the built site: ``python docs/check_site.py build/docs``.

There are pages, every link and picture leads to a file and an anchor that are there, and nothing is
loaded from elsewhere: the site works from a folder, without a network.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["faults"]


class _Page(HTMLParser):
    """What a page links to, loads, and can be linked at."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the element refers to."""
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical",) and "href" in given:
            self.loads.append(given["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])


def faults(site: Path) -> list[str]:
    """Return a sentence for everything that is wrong."""
    pages: dict[Path, _Page] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text())
    found = [] if pages else [f"{site} holds no page; build the site first: make docs."]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads and parts.scheme != "data":
                    found.append(f"{name} loads {target} from elsewhere.")
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.exists():
                found.append(f"{name} refers to {target}, which is not there.")
            elif parts.fragment and there in pages:
                anchors = pages[there].anchors | {"", "top"}
                if unquote(parts.fragment) not in anchors:
                    found.append(f"{name} refers to {target}, which has no such place.")
    for style in site.rglob("*.css"):
        loaded = re.findall(r"(?:url\(|@import)\s*[\"']?(https?:[^\"')]+)", style.read_text())
        found += [f"{style.relative_to(site)} loads {one} from elsewhere." for one in loaded]
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or "Every link leads somewhere, and nothing is loaded from elsewhere.")
    sys.exit(bool(wrong))
