"""The word check finds phrases in prose, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest
from script_modules import load

ROOT = Path(__file__).parents[1]

words = load(ROOT / "scripts" / "words.py")


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        pytest.param("# What a crash left.\n", [1], id="comment"),
        pytest.param('"""A page.\n\nNobody is told.\n"""\n', [3, 3], id="docstring"),
        pytest.param('raise ValueError(f"{x} begins anew")\n', [1, 1], id="message"),
        pytest.param("place = begin(whole)\n", [], id="identifiers"),
        pytest.param('kind = "whole"\n', [], id="one-word-string"),
        pytest.param("# Says what to do; filled in place.\n", [], id="allowed-phrases"),
    ],
)
def test_findings_of_python_source_are_its_prose(source: str, lines: list[int]) -> None:
    assert [finding.line for finding in words.findings("module.py", source)] == lines


def test_findings_of_markdown_skip_inline_code() -> None:
    page = "Steps go on.\n\n`begin` is a name.\n"
    assert [finding.line for finding in words.findings("page.md", page)] == [1]


@pytest.mark.parametrize("name", list(words.PATTERNS))
def test_every_pattern_names_its_replacement(name: str) -> None:
    assert "(" in name


def test_clean_paths_exist() -> None:
    assert [path for path in words.CLEAN if not (ROOT / path).exists()] == []
