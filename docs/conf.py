"""How Sphinx builds the site: `make docs` writes docs/_build/html, which works from the file system.

Nothing is loaded from elsewhere: formulas are MathML, fonts are the system's, and no other project's pages are asked.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext")]

import calibrant  # noqa: E402  (after the folder of extensions)

project = "calibrant"
author = "The calibrant developers"
copyright = author
release = calibrant.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "api_pages",
    "execution",
    "llms",
]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
myst_update_mathjax = False
html_math_renderer = "mathml"

# A page is executed once for its text and the package's code; an error in a cell ends the build.
nb_execution_mode = "cache"
nb_execution_timeout = 300  # seconds of a cell on a busy machine; execution.py limits the processor time of a page
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_ipywidgets_js = {}
nb_merge_streams = True

default_role = "code-or-name"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "calibrant"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
smartquotes = False  # options are written with two hyphens
pygments_style = "default"
pygments_dark_style = "monokai"
