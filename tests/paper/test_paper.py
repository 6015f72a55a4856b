"""The paper: no typed number, none undefined or unused, no picture without its data, the same bytes every time."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest

import adaptbatch as ab
from adaptbatch import estimate
from adaptbatch.reporting.history import COLUMNS
from paper import build, contents, method
from paper.ledger import Ledger, LedgerError, holds, shown
from studies.engine import provenance
from studies.engine.results import RESULTS, write_atomically
from studies.questions import depth, momentum

PAPER = Path(build.__file__).parent
TEXTS = sorted(PAPER.glob("sections/*.typ"))
# Names of releases and what they are cited as; nothing that was measured.
VERSIONS = re.compile(r"(?:fairscale|adaptdl|torch-gqc|gns-pytorch) \d[\d.]*")


def text(path: Path) -> str:
    """A section without comments, code and names of releases."""
    whole = re.sub(r"^//.*$", "", path.read_text(), flags=re.MULTILINE)
    return VERSIONS.sub("", re.sub(r"```.*?```", "", whole, flags=re.DOTALL))


def used(kind: str) -> set[str]:
    return {name for path in TEXTS for name in re.findall(rf'#?\b{kind}\("([^"]+)"', text(path))}


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    found = Ledger()
    contents.fill(found)
    return found


class TestText:
    @pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
    def test_no_measured_number_is_typed(self, path):
        prose = re.sub(r'#(?:n|results|picture|image)\("[^"]*"', "", text(path))
        prose = re.sub(r"\b\d+(?:\.\d+)?(?:pt|em|cm|fr|%(?=[,)]))", "", prose)  # layout
        assert re.findall(r"\d+\.\d+", prose) == []
        # Whole percentages too, but for the confidence level.
        assert [found for found in re.findall(r"(\d+) ?%", prose) if found != "95"] == []

    @pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
    def test_no_semicolon_is_swallowed(self, path):
        """Right after a call in the text a semicolon ends the call and is not printed."""
        assert re.findall(r'#n\("[^"]+"\);', path.read_text()) == []

    def test_a_typed_number_would_be_found(self, tmp_path):
        path = tmp_path / "section.typ"
        path.write_text("The loss is 1.37 of it, in 12 % of the runs.")
        with pytest.raises(AssertionError):
            self.test_no_measured_number_is_typed(path)

    def test_every_number_is_defined_and_used(self, ledger):
        assert used("n") == set(ledger.numbers)

    def test_every_table_is_defined_and_used(self, ledger):
        assert used("results") == set(ledger.tables)

    def test_every_picture_has_its_data(self):
        places = used("picture") | {p.removeprefix("/studies/results/") for p in used("image")}
        assert places
        for place in places:
            assert list((RESULTS / place).parent.glob("*.parquet")), place
            assert list((RESULTS / place).parent.glob(f"{Path(place).stem}.p[dn][fg]")), place

    def test_every_source_of_the_bibliography_is_cited(self):
        keys = set(re.findall(r"^@\w+\{(\w+),", (PAPER / "references.bib").read_text(), flags=re.MULTILINE))
        labels = {label for path in TEXTS for label in re.findall(r"<([\w-]+)>", path.read_text())}
        cited = {name for path in TEXTS for name in re.findall(r"(?<![\w\"@./])@([a-z][\w-]*)", text(path))}
        assert cited - labels == keys


class TestNumbers:
    def test_constants_are_the_codes(self):
        rule, limits = ab.RelativeStandardError(), ab.Limits()
        found = {"z grow": rule.z_grow, "z shrink": rule.z_shrink, "max shrink": limits.max_shrink}
        assert found == method.CONSTANTS

    def test_what_the_depth_study_looked_at_is_the_codes(self, ledger):
        assert ledger.numbers["depth.examples"].text == str(depth.SCALES["laptop"].examples)

    def test_when_a_rate_works_is_the_codes(self, ledger):
        assert ledger.numbers["momentum.works"].text == f"{momentum.WORKS:g}"

    def test_symbols_are_the_codes(self):
        names = re.findall(r'raw\("([\w.]+)"\)', (PAPER / "sections" / "loop.typ").read_text())
        assert names
        for name in names:
            assert name in COLUMNS or hasattr(estimate, name.removeprefix("estimate."))

    def test_a_number_is_the_cell_its_source_names(self, ledger):
        cells = [number for number in ledger.numbers.values() if number.cell is not None]
        assert len(cells) > 15
        for number in cells:
            place, where, column = number.cell
            frame = pd.read_parquet(RESULTS / f"{place}.parquet")
            for name, value in where.items():
                frame = frame[frame[name] == value]
                assert str(value) in number.source
            assert (len(frame), place in number.source, column in number.source) == (1, True, True)
            value, first = frame.iloc[0][column], number.text.split(" (")[0].replace("−", "-").replace(",", "")
            if first.endswith("%"):
                assert float(first[:-1]) == pytest.approx(100 * value, abs=0.51)
            elif first == "∞":
                assert value == float("inf")
            else:
                assert float(first) == pytest.approx(value, abs=0.51 * 10.0 ** -len(first.partition(".")[2]))

    def test_a_row_must_be_one(self, tmp_path):
        write_atomically(pd.DataFrame({"arm": ["a", "a"], "x": [1.0, 2.0]}), tmp_path / "study" / "t.parquet")
        ledger = Ledger(tmp_path)
        with pytest.raises(LedgerError, match=r"must have one row where \{'arm': 'a'\}, it has 2"):
            ledger.cell("x", "study/t", "x", ".1f", arm="a")
        with pytest.raises(LedgerError, match="must have the column 'network'"):
            ledger.cell("x", "study/t", "x", ".1f", network="a")
        with pytest.raises(LedgerError, match="python -m studies run other"):
            ledger.frame("other/t")

    def test_a_name_must_be_new(self):
        ledger = Ledger()
        ledger.add("x", "1", "here")
        with pytest.raises(LedgerError, match="name must be new, got 'x' again"):
            ledger.add("x", "2", "there")

    def test_a_sentence_that_fails_stops_the_build(self):
        holds("one is one", True)
        with pytest.raises(LedgerError, match="do not say that it helps"):
            holds("it helps", False)

    def test_minus_signs_are_minus_signs(self):
        assert shown(-1.25, ".1f") == "−1.2"


@pytest.fixture(scope="module")
def built() -> list[bytes]:
    return build.compile_paper()


class TestPdf:
    def test_it_is_built_the_same_again(self, built):
        assert build.compile_paper() == built

    def test_its_pages_can_be_read(self, built):
        from pypdf import PdfReader

        reader = PdfReader(io.BytesIO(built[0]))
        whole = " ".join("\n".join(page.extract_text() for page in reader.pages).split())
        assert "Where every number" in whole or "where every number" in whole
        assert "??" not in whole
        for number in json.loads(build.inputs()["data"])["numbers"].values():
            assert number.split()[0] in whole
        # The closed loop's are a table and a picture.
        for study, times in (("closed-loop", 2), ("calibration", 1), ("overhead", 1)):
            assert whole.count(provenance.caption(study)) >= times, study
