"""How times and numbers are shown."""

from __future__ import annotations

import datetime

import pytest

from functional_ckpt.cli import output, verify
from functional_ckpt.verify.findings import Finding


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


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (1048063, "1023 KiB"),
        (1048064, "1.0 MiB"),  # 1023.5 KiB, which would be shown as "1024 KiB"
        (102348, "99.9 KiB"),
        (102349, "100 KiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_a_size_has_at_most_four_digits(num_bytes: int, shown: str) -> None:
    assert output.size(num_bytes) == shown


@pytest.mark.parametrize(
    ("num_leaves", "shown"),
    [
        (1, "1 leaf of m: l0"),
        (4, "4 leaves of m: l0, l1, l2, l3"),
        (6, "6 leaves of m: l0, l1, l2, l3 and 2 more"),
    ],
)
def test_the_first_lost_leaves_are_named_and_the_others_counted(
    num_leaves: int, shown: str
) -> None:
    leaves = tuple(f"l{number}" for number in range(num_leaves))
    finding = Finding(item="m", leaves=leaves, file="m/d/0", problem="size", expected="9", got="8")
    *_, last = verify._block(finding, None)
    assert str(last.renderable) == f"lost: {shown}"
