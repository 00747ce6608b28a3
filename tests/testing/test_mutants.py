"""`scripts/mutants`: the changes it can make, and how it draws them."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("mutate_sites")
    sys.modules.pop("mutate_sites")


SOURCE = b'''"""A module."""
def f(a, b):
    """A function."""
    if a is None or b < 3:
        raise ValueError(f"{a + 1}")
    with lock:
        g(a, b)
    try:
        _log.info("said", a)
    finally:
        close()
    return min(a, b) + 1
'''


def test_each_kind_of_change_is_found_once_and_leaves_a_module(sites: object) -> None:
    found = sites.find("m.py", SOURCE)  # type: ignore[attr-defined]
    assert [(each.kind, each.line, each.new) for each in found] == [
        ("drop_if", 4, "False"),
        ("neg_if", 4, "not (a is None or b < 3)"),
        ("boolop", 4, "and"),
        ("cmp", 4, "is not"),
        ("cmp", 4, "<="),
        ("const_int", 4, "4"),
        ("del_raise", 5, "pass"),
        ("del_lock", 6, '__import__("contextlib").nullcontext()'),
        ("del_call", 7, "pass"),
        ("swap_args", 7, "b, a"),
        ("del_finally", 11, "pass"),
        ("del_call", 11, "pass"),
        ("ret_none", 12, "return None"),
        ("binop", 12, "-"),
        ("minmax", 12, "max"),
        ("const_int", 12, "2"),
    ]
    assert {each.function for each in found} == {"f"}
    for each in found:
        changed = each.apply(SOURCE)
        assert changed != SOURCE
        ast.parse(changed)


def test_a_draw_is_repeatable_and_repeats_nothing(sites: object) -> None:
    found = sites.find("m.py", SOURCE)  # type: ignore[attr-defined]
    drawn = sites.sample(found, 100, 7)  # type: ignore[attr-defined]
    assert drawn == sites.sample(list(found), 100, 7)  # type: ignore[attr-defined]
    assert sorted(drawn, key=str) == sorted(found, key=str)
    assert len(sites.sample(found, 3, 7)) == 3  # type: ignore[attr-defined]
