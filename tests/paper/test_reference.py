"""paper/reference: the pages build without a warning, hold every public name, and fetch nothing when they are read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import adaptbatch as ab
from paper import reference

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}


class Page(HTMLParser):
    """The anchors of a page, what it loads, and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.loads: list[str] = []
        self.links: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors.add(found.get("id", ""))
        if tag in LOADED and LOADED[tag] in found:
            self.loads.append(found[LOADED[tag]])
        if tag == "a":
            self.links.add(found.get("href", ""))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    pytest.importorskip("sphinx", reason="needs the docs extra")
    return reference.build(tmp_path_factory.mktemp("reference") / "html")


def test_every_public_name_has_its_place_and_stands_on_the_first_page(built):
    anchors = set().union(*(Page(path).anchors for path in built.parent.glob("*.html")))
    links = {link.partition("#")[2] for link in Page(built).links}
    names = {f"adaptbatch.{name}" for name in ab.__all__}
    assert not names - anchors
    assert not names - links


@pytest.mark.parametrize("kind", ["lightning.AdaptiveAccumulation", "transformers.AdaptiveAccumulationMixin"])
def test_the_integrations_are_there(built, kind):
    assert f"adaptbatch.integrations.{kind}" in Page(built.with_name("integrations.html")).anchors


def test_reading_needs_no_network(built):
    pages = list(built.parent.rglob("*.html"))
    assert len(pages) > 18
    loads = [load for page in pages for load in Page(page).loads]
    assert len(loads) > len(pages)
    assert not [load for load in loads if re.match(r"(https?:)?//", load)]
    styles = [path.read_text() for path in built.parent.rglob("*.css")]
    assert styles
    assert not [found for style in styles for found in re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style)]


@pytest.mark.parametrize("page", ["index", "manual/batch", "manual/plan", "manual/rules", "manual/history"])
def test_equations_are_typeset_without_a_script(built, page):
    path = built.parent / f"{page}.html"
    assert "<math" in path.read_text()
    assert r":math:" not in path.read_text()
    assert not [load for load in Page(path).loads if "mathjax" in load.lower()]


def test_an_equation_that_cannot_be_read_ends_the_build(tmp_path, monkeypatch):
    (tmp_path / "conf.py").write_text('extensions = ["paper.reference.mathml"]\nhtml_math_renderer = "mathml"\n')
    (tmp_path / "index.rst").write_text("A title\n=======\n\n.. math::\n\n   \\squareroot{n}\n")
    monkeypatch.setattr(reference, "SOURCE", tmp_path)
    with pytest.raises(RuntimeError, match=r"index.rst:4: WARNING: no MathML of .*squareroot"):
        reference.build(tmp_path / "html")


def test_the_tables_of_results_are_in_the_manual(built):
    page = (built.parent / "manual" / "trust.html").read_text()
    assert page.count('class="numbers') == 3
    assert "torch-gqc" in page


def test_a_section_that_no_page_has_is_refused():
    results = pytest.importorskip("paper.reference.results", reason="needs the docs extra")
    with pytest.raises(LookupError, match="no generated section 'weather'"):
        results.section("weather")


def test_what_sphinx_says_is_told(tmp_path, monkeypatch):
    (tmp_path / "conf.py").write_text("")
    (tmp_path / "index.rst").write_text("A title\n=====\n")
    monkeypatch.setattr(reference, "SOURCE", tmp_path)
    with pytest.raises(RuntimeError, match=r"the reference was not built:\n.*Title underline too short"):
        reference.build(tmp_path / "html")
