"""What a study measured: told from the code as Python runs it, and said wherever its numbers are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adaptbatch
from paper import build
from studies.engine import provenance
from studies.output import readme

CODE = '''"""A module."""

from package.records import Measurement

LIMIT = 2.0  # twice


def half(x: float) -> float:
    """Half of it."""
    return x / LIMIT
'''


def package(folder: Path, code: str, name: str = "noise.py") -> Path:
    path = folder / "adaptbatch" / name
    path.parent.mkdir(parents=True)
    path.write_text(code)
    return folder / "adaptbatch"


def digest(folder: Path, code: str, name: str = "noise.py") -> str:
    return provenance.digest([name], package(folder, code, name))


class TestDigest:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("  # twice", ""),
            ('"""Half of it."""', '"""x / 2."""'),
            ('    """Half of it."""\n', ""),
            ('"""A module."""', ""),
            ("x / LIMIT", "(x\n        / LIMIT)"),
            ("LIMIT = 2.0", "LIMIT = 2.00"),
        ],
    )
    def test_what_python_does_not_run_keeps_it(self, tmp_path, old, new):
        assert old in CODE
        assert digest(tmp_path / "a", CODE) == digest(tmp_path / "b", CODE.replace(old, new))

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("2.0", "3.0"),
            ("2.0", "2"),
            ("x / LIMIT", "x * LIMIT"),
            ("x / LIMIT", "LIMIT / x"),
            ("LIMIT = 2.0", "LIMIT = None"),
            ("    return", "    x += 1\n    return"),
            ("package.records", "math"),
        ],
    )
    def test_what_it_runs_changes_it(self, tmp_path, old, new):
        assert old in CODE
        assert digest(tmp_path / "a", CODE) != digest(tmp_path / "b", CODE.replace(old, new))

    def test_a_module_may_move(self, tmp_path):
        """Its place counts no more than its imports from the package, which say where others lie."""
        here, there = (f"from adaptbatch{place} import x\n{CODE}" for place in (".noise", ".measure.noise"))
        assert digest(tmp_path / "a", here) == digest(tmp_path / "b", there, "measure/noise.py")

    def test_one_module_in_two_globs_counts_once(self, tmp_path):
        root = package(tmp_path, CODE)
        assert provenance.digest(["*.py", "noise.py"], root) == provenance.digest(["noise.py"], root)

    def test_a_missing_module_is_named(self, tmp_path):
        with pytest.raises(provenance.ProvenanceError, match=r"must be of adaptbatch, got 'rules/\*\.py'; name"):
            provenance.digest(["noise.py", "rules/*.py"], package(tmp_path, CODE))


@pytest.mark.parametrize("study", provenance.MEASURED)
def test_every_module_that_a_study_names_is_there(study):
    for module in provenance.MEASURED[study]:
        provenance.digest([module])


@pytest.fixture
def measured(tmp_path, monkeypatch) -> Path:
    """A study of one module, whose results were just written."""
    monkeypatch.setattr(provenance, "MEASURED", {"quick": ("noise.py",)})
    provenance.record("quick", tmp_path / "quick", package(tmp_path, CODE))
    return tmp_path


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The caption, and what a build says on stderr."""
    provenance.warn(folder, folder / "adaptbatch")
    return provenance.caption("quick", folder, folder / "adaptbatch"), capsys.readouterr().err


class TestCaption:
    def test_of_the_code_as_it_is(self, measured, capsys):
        assert said(measured, capsys) == (f"Measured on {adaptbatch.__version__}.", "")
        assert provenance.is_current("quick", measured, measured / "adaptbatch")

    def test_of_code_that_has_changed_since(self, measured, capsys):
        (measured / "adaptbatch" / "noise.py").write_text(CODE.replace("2.0", "3.0"))
        caption, warning = said(measured, capsys)
        assert caption == f"Measured on {adaptbatch.__version__}; the code that it measures has changed since."
        assert warning == f"warning: quick: {caption}\n"

    def test_of_code_that_nobody_knows(self, measured, capsys):
        path = measured / "quick" / provenance.FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"release": "0.1.0", "digest": None}))
        caption, warning = said(measured, capsys)
        assert caption == "Measured on 0.1.0; whether the code that it measures has changed since is not known."
        assert caption in warning
        path.unlink()
        assert said(measured, capsys)[0].startswith("Measured on an unknown release; whether")


class TestShown:
    def test_the_committed_results_say_it(self):
        for study in provenance.MEASURED:
            kept = json.loads((provenance.RESULTS / study / provenance.FILE).read_text())
            assert kept["release"].startswith("0.1.0")
            assert len(kept["digest"]) == 64

    @pytest.mark.parametrize(
        ("study", "section"),
        [
            ("quick", readme.quick_section),
            ("closed-loop", readme.loop_section),
            ("calibration", readme.calibration_section),
            ("overhead", readme.overhead_section),
        ],
    )
    def test_in_the_readme(self, study, section):
        assert section().endswith(provenance.caption(study))

    def test_both_builds_warn(self, tmp_path, monkeypatch, capsys):
        for page in readme.PAGES:
            (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / page).write_text("")
        monkeypatch.setattr(readme, "ROOT", tmp_path)
        monkeypatch.setattr(readme, "fill", lambda text, _: text)
        monkeypatch.setattr(provenance, "is_current", lambda *_: False)
        monkeypatch.setattr(build, "compile_paper", lambda: [b""])
        for write in (readme.write, lambda: build.build(tmp_path)):
            write()
            assert capsys.readouterr().err.count("warning: ") == len(provenance.MEASURED)
