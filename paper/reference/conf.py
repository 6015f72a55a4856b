"""How Sphinx reads the docstrings. Nothing is fetched, neither to build nor to view; no date enters the pages."""

from __future__ import annotations

import adaptbatch

project = "adaptbatch"
author = "The adaptbatch authors"
project_copyright = author
version = release = adaptbatch.__version__

extensions = [
    *("sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"),
    *("paper.reference.mathml", "paper.reference.results"),
]
html_math_renderer = "mathml"
default_role = "literal"

# Overridden hooks of a trainer say nothing that is not in its own manual.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autosummary_generate = False
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
# Attributes like parameters, one line each: their types are in the signature above.
napoleon_custom_sections = ["Source", ("Attributes", "params_style")]
toc_object_entries_show_parents = "hide"

# Annotations name what others document; links out of these pages would need the network.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|contextlib|os|pathlib|types|typing)\..*"),
    ("py:.*", r"(accelerate|lightning|nn|pandas|pd|torch|transformers)\..*"),
    ("py:class", r"Axes|adaptbatch\.reporting\.html\.Tabular|adaptbatch\.loop\.Item|PendingResult|.*\bAnnotated"),
]

html_theme = "furo"
html_title = f"adaptbatch {release}"
html_static_path = ["static"]
html_css_files = ["reference.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
