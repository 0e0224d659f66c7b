"""The site: `make docs`."""

import cdkd_edge

project = "cdkd-edge"
author = "The cdkd-edge authors"
version = release = cdkd_edge.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]  # types of other packages have no page here
autodoc_typehints = "description"
html_theme = "furo"
html_title = f"cdkd-edge {version}"
html_static_path = []
