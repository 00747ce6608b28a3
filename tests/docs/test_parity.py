"""docs/parity.md: every row is there, and every test that it names exists and is collected."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| .* \| .* \| (.*) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[^`]+\.py)::(\w+)`")


def rows() -> dict[int, str]:
    """Number of a row -> the tests that it names."""
    found = ROW.findall((ROOT / "docs" / "parity.md").read_text(encoding="utf-8"))
    assert len(found) == len(dict(found)), "a row is there twice"
    return {int(number): proof for number, proof in found}


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """The names at the top of a test file that pytest collects."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return frozenset(name for name in names | assigned if name.startswith(("test_", "Test")))


def test_every_row_is_there() -> None:
    assert sorted(rows()) == list(range(1, 35))


@pytest.mark.parametrize("number", sorted(rows()))
def test_every_named_test_exists(number: int, request: pytest.FixtureRequest) -> None:
    named = TEST.findall(rows()[number])
    assert named, "no test proves this row"
    collected = {item.nodeid.partition("[")[0] for item in request.session.items}
    files = {nodeid.partition("::")[0] for nodeid in collected}
    for path, name in named:
        assert Path(path).name.startswith("test_"), path
        assert (ROOT / path).is_file(), path
        assert name in names_in(path), f"{path} has no {name}"
        # If this run has the file without deselection, the test is in it.
        if path in files and not request.config.option.keyword and not _is_narrowed(request):
            assert any(nodeid.startswith(f"{path}::{name}") for nodeid in collected), name


def _is_narrowed(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.option.markexpr) or any("::" in each for each in request.config.args)
