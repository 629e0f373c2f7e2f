"""Draws the figures of the pages: ``python docs/make_figures.py`` writes docs/figures/*.svg.

Each is plain SVG whose colours are CSS variables with defaults for light and dark: as an image it
follows the reader's system; the site puts it into the page, where it follows the chosen theme.
The shares in cost.svg are read from the table in method.md.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

FIGURES = Path(__file__).parent / "figures"
METHOD = Path(__file__).with_name("method.md")

_STYLE = """
svg.amips{color:#1f2933;font:14px system-ui,sans-serif;width:100%;height:auto}
svg.amips text{fill:currentColor}
svg.amips .small{font-size:12px}
svg.amips .strong{font-weight:600}
svg.amips .middle{text-anchor:middle}
svg.amips .end{text-anchor:end}
svg.amips .line{fill:none;stroke:currentColor;stroke-width:1.4}
svg.amips .dash{stroke-dasharray:5 4}
svg.amips .head{fill:currentColor}
svg.amips .box{fill:var(--paper,#fff);stroke:currentColor;stroke-width:1.2}
svg.amips .on{fill:var(--accent,#0b6b62)}
svg.amips text.inside{fill:var(--paper,#fff)}
svg.amips .soft{fill:var(--soft,#d9efec)}
svg.amips .warm{fill:var(--warm,#9a4b00)}
svg.amips .off{fill:currentColor;opacity:.14}
@media(prefers-color-scheme:dark){svg.amips{color:var(--color-foreground-primary,#d8dee4)}
svg.amips .box{fill:var(--paper,#131416)}svg.amips .on{fill:var(--accent,#5fd0c1)}
svg.amips text.inside{fill:var(--paper,#131416)}svg.amips .soft{fill:var(--soft,#17423d)}
svg.amips .warm{fill:var(--warm,#f2b066)}}
"""


class Drawing:
    """An SVG that grows shape by shape; units are pixels of a page of the usual width."""

    def __init__(self, title: str, height: int) -> None:
        self._parts = [
            f'<svg class="amips" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" '
            f'role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
            f"<style>{' '.join(_STYLE.split())}</style>"
        ]

    def rect(self, x: float, y: float, w: float, h: float, kind: str = "box", r: int = 6) -> None:
        """Draw a rectangle."""
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r}"/>'
        )

    def text(self, x: float, y: float, said: str, kind: str = "") -> None:
        """Write one line."""
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(said)}</text>')

    def box(self, x: float, y: float, w: float, h: float, *lines: str, kind: str = "box") -> None:
        """Draw a box with a strong first line, and others below it, in its middle."""
        self.rect(x, y, w, h, kind)
        top = y + h / 2 - 9 * (len(lines) - 1) + 5
        for at, line in enumerate(lines):
            shown = "middle strong" if at == 0 else "middle small"
            self.text(x + w / 2, top + 18 * at, line, shown)

    def arrow(self, points: list[tuple[float, float]], kind: str = "line") -> None:
        """Draw a line through points, with a head at the last; the last leg is straight."""
        self._parts.append(
            f'<polyline class="{kind}" points="{" ".join(f"{x:g},{y:g}" for x, y in points)}"/>'
        )
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        back = [(x1 - 9 * dx + 4 * s * dy, y1 - 9 * dy + 4 * s * dx) for s in (-1, 1)]
        head = " ".join(f"{x:g},{y:g}" for x, y in [(x1, y1), *back])
        self._parts.append(f'<polygon class="head" points="{head}"/>')

    def save(self, name: str) -> None:
        """Write the file, or find out whether it is up to date."""
        drawn = "\n".join([*self._parts, "</svg>"]) + "\n"
        path = FIGURES / name
        if "--check" not in sys.argv[1:]:
            path.write_text(drawn)
        elif not path.exists() or path.read_text() != drawn:
            sys.exit(f"{path} is not what this script draws: python docs/make_figures.py")


def search() -> None:
    """Draw one search: query, model, a few cells and the overflow, hits."""
    d = Drawing(
        "A search: the model picks three of 48 cells; they and the overflow are scanned", 270
    )
    d.box(8, 92, 104, 56, "your query", "a vector")
    d.arrow([(112, 120), (158, 120)])
    d.box(158, 80, 134, 80, "router", "a small model", "about 30 µs")
    d.arrow([(292, 120), (338, 120)])
    d.text(315, 108, "cells", "middle small")
    d.rect(340, 20, 236, 218)
    d.text(350, 40, "the collection, in its cells", "small")
    chosen = {11, 12, 28}
    for cell in range(48):
        column, row = cell % 8, cell // 8
        kind = "on" if cell in chosen else "off"
        d.rect(350 + 27.2 * column, 52 + 25 * row, 23, 21, kind, 3)
    d.rect(350, 206, 213, 22, "warm", 3)
    d.text(456, 222, "overflow: keys without a cell", "middle small inside")
    d.arrow([(576, 120), (620, 120)])
    d.box(620, 80, 92, 80, "hits", "scored with", "your query")
    d.arrow([(225, 80), (225, 8), (458, 8), (458, 18)], "line dash")
    d.text(232, 24, "any doubt: the", "small")
    d.text(232, 40, "database's own", "small")
    d.text(232, 56, "search", "small")
    d.text(350, 260, "scanned: the coloured keys only", "small")
    d.save("search.svg")


def life() -> None:
    """Draw the commands in their order, and the log that feeds the next training."""
    d = Drawing("snapshot, train, publish, layout, then searches whose queries train the next", 210)
    names = [
        ("snapshot", "ids and vectors,", "read once"),
        ("train", "cells and model,", "on your queries"),
        ("publish", "a checked bundle", "with a version"),
        ("layout", "each key into its", "cell, in service"),
        ("search", "routed, watched,", "never worse"),
    ]
    for at, (name, *about) in enumerate(names):
        x = 8 + 144 * at
        d.box(x, 30, 124, 84, name, *about, kind="box soft" if name == "search" else "box")
        if at:
            d.arrow([(x - 20, 72), (x, 72)])
    d.arrow([(646, 114), (646, 166), (214, 166), (214, 114)], "line dash")
    d.text(430, 158, "query log: what is really asked", "middle small")
    d.text(430, 186, "train anew when keys or questions have changed", "middle small")
    d.save("life.svg")


def cost() -> None:
    """Draw what recall@10 of .90 costs with 512 cells, from the table in method.md."""
    rows = re.findall(
        r"^\| 512 +\| (\S+) +\| (centroids|linear) +\|(.*)\|$",
        METHOD.read_text().split("**Thresholds carry over.**")[0],
        re.MULTILINE,
    )
    total = {
        (layout, router): float(cells.split("|")[4].split("±")[0]) for layout, router, cells in rows
    }
    bars = [
        ("nearest centroids", total["native", "centroids"], "off"),
        ("learned router, same cells", total["native", "linear"], "soft"),
        ("learned router, query-aware cells", total["query-aware", "linear"], "on"),
    ]
    d = Drawing(
        "Keys scanned for recall@10 of .90: " + ", ".join(f"{n} {s:.1%}" for n, s, _ in bars),
        176,
    )
    d.text(8, 20, "Keys scanned for recall@10 of .90, the model's own cost included", "strong")
    for at, (name, scanned, kind) in enumerate(bars):
        y = 36 + 38 * at
        d.text(238, y + 20, name, "end")
        d.rect(250, y, 2600 * scanned, 28, kind, 3)
        d.text(258 + 2600 * scanned, y + 20, f"{scanned:.1%}", "strong")
    d.text(
        8,
        168,
        "100,000 keys, 512 cells, unseen queries from another corpus than the keys",
        "small",
    )
    d.save("cost.svg")


def generations() -> None:
    """Draw how a Milvus collection gets its cells while the alias leads readers."""
    d = Drawing(
        "docs is copied to docs__g2 while the alias serves docs; then the alias moves",
        230,
    )
    steps = [
        "1. copy",
        "2. catch up, compare",
        "3. the alias moves",
        "4. drop-old",
    ]
    for at, step in enumerate(steps):
        x = 8 + 180 * at
        d.text(x + 82, 20, step, "middle strong")
        serves_new = at > 1
        d.box(x + 32, 36, 100, 28, "docs_live", kind="box soft")
        if at < 3:
            d.box(x, 106, 78, 50, "docs", "as it was")
        else:
            d.rect(x, 106, 78, 50, "box dash")
            d.text(x + 39, 136, "gone", "middle small")
        d.box(x + 86, 106, 78, 50, "docs__g2", "cells" if at else "filling")
        d.arrow([(x + (112 if serves_new else 52), 64), (x + (112 if serves_new else 52), 106)])
        if at < 2:
            d.arrow([(x + 39, 156), (x + 39, 182), (x + 125, 182), (x + 125, 156)], "line dash")
    d.text(
        12,
        216,
        "until step 4 rollback moves the alias back, with what was written since",
        "small",
    )
    d.save("generations.svg")


def states() -> None:
    """Draw the states of the never-worse gate."""
    d = Drawing(
        "healthy: as planned; widened: up to four times the keys; native: the database's own",
        190,
    )
    for at, (name, about, kind) in enumerate(
        [
            ("healthy", "as planned", "box soft"),
            ("widened", "up to four times the keys", "box"),
            ("native", "the database's own search", "box"),
        ]
    ):
        d.box(8 + 256 * at, 66, 192, 58, name, about, kind=kind)
    for at in (0, 1):
        x = 200 + 256 * at
        d.arrow([(x, 82), (x + 64, 82)])
        d.arrow([(x + 64, 110), (x, 110)])
    d.text(232, 44, "recall is below target", "middle small")
    d.text(488, 44, "still below, or too much overflow", "middle small")
    d.text(
        360,
        160,
        "back, once samples off the callers' path show that it would keep the promise",
        "middle small",
    )
    d.save("states.svg")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for draw in (search, life, cost, generations, states):
        draw()
