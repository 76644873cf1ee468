"""Sphinx configuration. `make docs` builds with warnings as errors and every reference resolved (-W -n)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

project = "birkhoff"
author = "The birkhoff developers"
copyright = "2026, The birkhoff developers"
release = version = "0.1.0"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinxcontrib.bibtex",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_static"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"

myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

# Only this project's own names must resolve: the inventories of NumPy, SciPy and torch need a network.
nitpick_ignore_regex = [("py:.*", r"^(?!birkhoff|mhc_layers|proofs).*")]

trim_doctest_flags = True

html_theme = "pydata_sphinx_theme"
html_title = "birkhoff"
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
}
html_static_path = ["_static"]
html_show_sourcelink = False
if (HERE / "_static" / "mathjax" / "tex-chtml-full.js").exists():  # put there by fetch_mathjax.py: formulas offline
    mathjax_path = "mathjax/tex-chtml-full.js"
