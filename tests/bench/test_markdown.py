"""Tables in text, and the section of a document that a command renews."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from graphopt.bench import markdown
from graphopt.errors import BenchmarkError


def test_a_table_aligns_names_left_and_figures_right() -> None:
    assert markdown.table(["model", "ms"], [["a", "1.00"], ["longer", "12.34"]]) == [
        "| model  |    ms |",
        "| :----- | ----: |",
        "| a      |  1.00 |",
        "| longer | 12.34 |",
    ]
    assert markdown.table(["a"], []) == ["| a   |", "| :-- |"]


def test_a_section_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("x\n<!-- begin a -->\n1\n<!-- end a -->\ny\n<!-- begin b -->\n<!-- end b -->\n")
    markdown.replace_section(path, "a", ["2", "3"])
    markdown.replace_section(path, "b", ["4"])
    assert path.read_text() == (
        "x\n<!-- begin a -->\n2\n3\n<!-- end a -->\ny\n<!-- begin b -->\n4\n<!-- end b -->\n"
    )


def test_the_command_is_shown_without_where_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "x.py",
        "--fresh",
        "--isa",
        "avx2",
        "--document",
        "a b.md",
        "--output=c",
        "--dtype",
        "int8",
    ]
    monkeypatch.setattr(sys, "argv", given)
    assert markdown.command_line("b/x.py") == "`python b/x.py --isa avx2 --dtype int8`"


def test_a_document_without_the_section_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    with pytest.raises(BenchmarkError) as caught:
        markdown.replace_section(path, "a", [])
    assert str(caught.value) == (
        f"{path} has no section 'a'; add the lines '<!-- begin a -->' and '<!-- end a -->' "
        "where the table belongs"
    )
    assert not path.exists()
