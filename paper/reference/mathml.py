"""Equations as MathML, which browsers show by themselves: no script, no font, no network."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def markup(node: nodes.math | nodes.math_block) -> str:
    """The MathML of an equation; what cannot be read is a warning, and a warning ends the build.

    Example:
        >>> markup(nodes.math("", "n"))
        '<math xmlns="http://www.w3.org/1998/Math/MathML">\\n  <mi>n</mi>\\n</math>'
    """
    try:
        return tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    except MathError as problem:
        logger.warning("no MathML of %r: %s", node.astext(), problem, location=node)
        return ""


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    """An equation in a sentence."""
    translator.body.append(markup(node))
    raise nodes.SkipNode


def display(translator: HTML5Translator, node: nodes.math_block) -> None:
    """An equation on lines of its own."""
    translator.body.append(f"{translator.starttag(node, 'div', CLASS='math')}{markup(node)}</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True}
