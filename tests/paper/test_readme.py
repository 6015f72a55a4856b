"""README.md and the manual: their programs run, their numbers are the committed results', nothing links to nowhere."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
from pathlib import Path
from textwrap import dedent
from typing import get_args

import pytest
import torch

import adaptbatch as ab
from adaptbatch.records import Reason
from adaptbatch.reporting.history import COLUMNS
from studies.output import readme
from tests.processes import start

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
MANUAL = {path.stem: path.read_text() for path in sorted((ROOT / "paper" / "reference" / "manual").glob("*.rst"))}


def programs(page: str) -> list[str]:
    """The Python blocks of a page of the manual: those of one page are run one after the other, as they are read."""
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:(?:   .*)?\n)+)", page, re.MULTILINE)
    assert len(blocks) == page.count("code-block:: python")
    return [dedent(block) for block in blocks]


def test_the_loop_runs_and_every_example_is_used():
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {}
    exec(program, names)
    table = names["df"]
    assert table["examples_seen"].iloc[-1] == 3 * 4096
    assert table["backward_passes"].iloc[-1] == 3 * 128
    assert table["reason"].notna().all()
    assert (table["applied_grad_norm"] <= 1.0 + 1e-5).all()


def test_the_loop_in_parts_counts_every_token():
    names: dict[str, object] = {}
    exec(programs(MANUAL["loop"])[0], names)
    table = names["controller"].history.to_pandas()
    assert table["examples_seen"].iloc[-1] == (names["tokens"][:, 1:] != 0).sum()
    assert table["backward_passes"].iloc[-1] == 9
    assert not any(p._backward_hooks for p in names["model"].parameters())


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("name", [name for name, page in MANUAL.items() if programs(page)])
def test_the_programs_of_a_page_run_in_their_order(name, tmp_path, monkeypatch):
    # Some write where they are.
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for index, program in enumerate(programs(MANUAL[name])):
        exec(compile(program, f"<{name}, program {index + 1}>", "exec"), names)


def _run(folder: str) -> None:
    """The script in a folder, as the command line runs it; what it says on stderr goes beside it."""
    os.chdir(folder)
    with open("stderr.txt", "w") as file, contextlib.redirect_stderr(file):
        runpy.run_path("script.py", run_name="__main__")


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_a_trainers_script_is_as_it_was_but_for_the_meters_lines(trainer, tmp_path):
    """With them and without, each in a process of its own: the same parameters to the bit, and a page that advises."""
    (program,) = [
        block for block in programs(MANUAL["meter"]) if f"import {trainer}" in block or f"from {trainer}" in block
    ]
    without = "".join(line for line in program.splitlines(keepends=True) if not re.search(r"\bab\b", line))
    assert program.count("\n") - without.count("\n") == 3
    assert "adaptbatch" not in without
    for name, text in (("with", program), ("without", without)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "script.py").write_text(text + 'torch.save(model.state_dict(), "model.pt")\n')
        process = start(_run, str(tmp_path / name))
        process.join()
        said = (tmp_path / name / "stderr.txt").read_text()
        assert process.exitcode == 0, said
        assert "NoiseMeter" not in said
    ours, theirs = (torch.load(tmp_path / name / "model.pt") for name in ("with", "without"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    page = (tmp_path / "with" / "noise.html").read_text()
    assert re.search(r"Take [\d,]+ examples a step \(k = \d+ on 1 device\)", page)


def test_readme_is_two_screens():
    assert TEXT.count("\n") < 200
    assert len(TEXT.encode()) < 12_000


def test_every_link_leads_somewhere():
    links = [link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT)]
    assert len(links) > 15
    for place, _, title in links:
        assert (ROOT / place).exists(), place
        assert not title or re.search(rf"^{title}$", (ROOT / place).read_text(), re.MULTILINE | re.IGNORECASE), title
    assert set(MANUAL) <= {Path(place).stem for place, _, _ in links}


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_numbers_are_the_committed_results(page):
    text = (ROOT / page).read_text()
    assert readme.fill(text, page) == text, "run `python -m studies readme`"


def test_every_section_is_in_the_manual():
    reference = "".join(MANUAL.values()) + (ROOT / "paper" / "reference" / "index.rst").read_text()
    assert sorted(name for names in readme.PAGES.values() for name in names) == sorted(readme.SECTIONS)
    for name in readme.SECTIONS:
        assert f".. results:: {name}\n" in reference


@pytest.mark.parametrize("page", readme.PAGES)
def test_a_missing_section_is_refused(page):
    with pytest.raises(ValueError, match=rf"{page} must have the markers of the section '{readme.PAGES[page][0]}'"):
        readme.fill("no markers here", page)


def test_the_columns_and_reasons_are_documented():
    for name in COLUMNS:
        assert f"``{name}``" in MANUAL["history"]
    for reason in get_args(Reason):
        assert f"``{reason}``" in MANUAL["history"]


def test_every_rule_is_in_the_table():
    for name in (*ab.rules.__all__, "RelativeStandardError"):
        if name not in ("Rule", "decide", "Limits", "Guard"):
            assert re.search(rf"^   \* - :class:`{name}\(.*\) <adaptbatch\.", MANUAL["rules"], re.MULTILINE), name


def test_every_public_name_is_in_the_manual():
    for name in ab.__all__:
        assert any(re.search(rf"adaptbatch\.{name}[`>.]", page) for page in MANUAL.values()), name


def test_every_option_names_a_test_that_is_there():
    table = MANUAL["distributed"].split("list-table::")[1]
    named = re.findall(r"^     - ``(test_\w+)``$", table, re.MULTILINE)
    assert len(named) == table.count("   * - ") - 1
    pages = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    there = set(re.findall(r"def (test_\w+)\(", "".join(pages)))
    assert set(named) <= there
