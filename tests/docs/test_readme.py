"""The quickstart of README.md runs; the page shows its output and the listing of its steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_docs_examples import python_blocks

from functional_ckpt.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def fenced(kind: str, text: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def shape_of(listing: str) -> list[list[str]]:
    """The words of each line, with numbers, sizes and lines of a table alike."""
    lines = [re.sub(r"[\d.]+", "0", line).split() for line in listing.splitlines()]
    return [line for line in lines if line and not line[0].startswith(("/", "─"))]


def test_quickstart_prints_and_lists_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    ((line, code),) = python_blocks(README)
    program = compile("\n" * (line - 1) + code, "README.md", "exec")

    exec(program, {"__name__": "__main__"})
    assert capsys.readouterr().out == fenced("text", README)[0]

    (shown,) = [block for block in fenced("console", README) if block.startswith("$ fckpt ls")]
    command, _, listing = shown.partition("\n")
    assert main(command.split()[2:]) == 0
    listed = capsys.readouterr().out
    assert shape_of(listed) == shape_of(listing)
    assert " 99   latest" in listed and " 99   latest" in listing  # the trained model is saved

    exec(program, {"__name__": "__main__"})
    assert capsys.readouterr().out == "starting at step 100\n"


def test_readme_has_no_link_that_breaks_outside_of_the_checkout() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert all(target.startswith("https://") for target in targets)


def test_readme_names_files_that_exist() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"`((?:docs|scripts|examples)/[\w./-]*|[A-Z]+\.md)`", README)
    assert len(named) > 8
    assert [path for path in named if not (root / path).exists()] == []
