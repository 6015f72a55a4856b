"""``.. results:: NAME``: a section of the pages that ``python -m studies readme`` writes, as part of the manual."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", ROOT / "studies" / "results" / "README.md")


def section(name: str) -> str:
    """The Markdown between the markers of a section.

    Raises:
        LookupError: If no page has it.
    """
    for page in PAGES:
        found = re.search(
            rf"<!-- {re.escape(name)}: begin -->\n(.*?)\n<!-- {re.escape(name)}: end -->", page.read_text(), re.S
        )
        if found:
            return found[1]
    raise LookupError(
        f"no generated section {name!r}: the pages are {[str(page.relative_to(ROOT)) for page in PAGES]}."
    )


def restructured(markdown: str) -> str:
    """Paragraphs, bullets and tables of a generated section in reStructuredText, where one backtick is a literal too.

    Example:
        >>> print(restructured("| a | b |\\n| --- | ---: |\\n| x | - |"))
        .. list-table::
           :header-rows: 1
           :class: numbers
        <BLANKLINE>
           * - a
             - b
           * - x
             - \\-
    """
    parts = (_table(part) if part.startswith("|") else part for part in markdown.split("\n\n"))
    return "\n\n".join(parts)


def _table(rows: str) -> str:
    lines = [".. list-table::", "   :header-rows: 1", "   :class: numbers", ""]
    for row in rows.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        if all(re.fullmatch(r"-{3}:?", cell) for cell in cells):
            continue
        # A dash alone would begin a list.
        cells = [r"\-" if cell == "-" else cell for cell in cells]
        lines += [f"   {'* -' if index == 0 else '  -'} {cell}" for index, cell in enumerate(cells)]
    return "\n".join(lines)


class Results(SphinxDirective):
    """A generated section."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """What stands there, parsed."""
        for page in PAGES:
            self.env.note_dependency(str(page))
        try:
            return self.parse_text_to_nodes(restructured(section(self.arguments[0])))
        except LookupError as problem:
            raise self.error(str(problem)) from problem


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
