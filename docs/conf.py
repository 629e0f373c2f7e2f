"""How Sphinx builds the site: ``make docs``. Read, it fetches nothing from elsewhere."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from cli_reference import reference  # noqa: E402 - a neighbour of this file

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "amips-plugins"
author = "the amips-plugins authors"
copyright = author  # noqa: A001 - Sphinx's name for it
release = version = version_of("amips-plugins")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_*"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"amips-plugins {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_theme_options: dict[str, Any] = {
    "light_css_variables": {
        "color-brand-primary": "#0b6b62",
        "color-brand-content": "#0b6b62",
        "color-brand-visited": "#55508f",
    },
    "dark_css_variables": {
        "color-brand-primary": "#5fd0c1",
        "color-brand-content": "#5fd0c1",
        "color-brand-visited": "#b9b2f0",
    },
}


def _fill_in(_: Sphinx, docname: str, source: list[str]) -> None:
    """Write the command reference behind the words of its page; close slots that are empty."""
    if docname == "cli":
        source[0] += reference()
    if docname == "index":  # `name*` stands for pages that may not be written yet
        lines = source[0].splitlines()
        kept = (one for one in lines if not one.endswith("*") or any(HERE.glob(f"{one}.md")))
        source[0] = "\n".join(kept)


def _inline(app: Sphinx, doctree: nodes.document) -> None:
    """Put SVG figures into the page itself, so that they follow its light or dark colours."""
    for image in list(doctree.findall(nodes.image)):
        uri = str(image["uri"])
        if uri.endswith(".svg") and "://" not in uri:
            drawn = (Path(app.srcdir) / uri).read_text()
            image.replace_self(nodes.raw("", f'<div class="figure">{drawn}</div>', format="html"))


def setup(app: Sphinx) -> None:
    """Call the two functions above while the site is built."""
    app.connect("source-read", _fill_in)
    app.connect("doctree-read", _inline)
