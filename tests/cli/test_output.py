"""How times and numbers are shown."""

from __future__ import annotations

import datetime

import pytest

from functional_ckpt.cli import output


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1, "in the future"),
        (0, "0 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (3600, "1 h ago"),
        (86399, "23 h ago"),
        (86400, "1 d ago"),
    ],
)
def test_an_age_is_in_its_largest_unit(seconds: int, shown: str) -> None:
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    assert output.age(now - datetime.timedelta(seconds=seconds), now) == shown
