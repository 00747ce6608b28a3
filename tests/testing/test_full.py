"""`full`: which cases of a matrix run by default."""

from __future__ import annotations

import itertools

import full
import pytest


def test_a_draw_holds_every_value_of_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "IS_FULL", False)
    cases = [f"{a}-{b}" for a in range(8) for b in range(6)]
    chosen = full.drawn(cases, 4)
    assert len(chosen) == 12 and chosen == full.drawn(cases, 4)
    assert [len({each.split("-")[at] for each in chosen}) for at in (0, 1)] == [8, 6]
    assert len(full.drawn(cases, 5)) == 10
    numbers = list(itertools.islice(full.drawn_numbers("x", 3), 5))
    assert [number // 3 for number in numbers] == [0, 1, 2, 3, 4]


def test_all_cases_run_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "IS_FULL", True)
    assert full.drawn(range(7), 3) == list(range(7))
    assert list(itertools.islice(full.drawn_numbers("x", 3), 4)) == [0, 1, 2, 3]
