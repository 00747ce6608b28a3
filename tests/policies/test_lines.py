"""Lines of training: which steps lead to the present one, and which a rollback left behind."""

from __future__ import annotations

import datetime

import pytest

from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo

START = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)


def info(step: int, generation: int = 0, ancestors: lines.Ancestors = ()) -> StepInfo:
    return StepInfo(step=step, time=START, generation=generation, ancestors=ancestors)


FIRST = [info(step) for step in (10, 20, 30, 40)]
BACK_TO_20 = ((0, 20),)
SECOND = [info(step, 1, BACK_TO_20) for step in (21, 22, 45)]
BACK_TO_22 = ((0, 20), (1, 22))


@pytest.mark.parametrize(
    ("infos", "latest", "abandoned"),
    [
        ([], None, []),
        (FIRST, 40, []),
        ([*FIRST, *SECOND], 45, [30, 40]),
        ([*FIRST, info(5, 1)], 5, [10, 20, 30, 40]),  # a line that started from scratch
        ([*FIRST, *SECOND, info(23, 2, BACK_TO_22)], 23, [30, 40, 45]),
        ([*FIRST, *SECOND, info(41, 2, ((0, 40),))], 41, [21, 22, 45]),  # back to the first line
        ([info(30), info(10, 1, BACK_TO_20)], 10, [30]),  # its parent is gone
    ],
)
def test_the_newest_step_says_which_others_were_abandoned(
    infos: list[StepInfo], latest: int | None, abandoned: list[int]
) -> None:
    newest = lines.newest(infos)
    assert (newest and newest.step) == latest
    marked = lines.marked(infos)
    assert [each.step for each in marked if each.is_abandoned] == abandoned
    assert lines.marked(marked) == marked
    assert lines.marked(lines.marked(FIRST)) == tuple(FIRST), "marks come off again"


@pytest.mark.parametrize(
    ("origin", "infos", "expected"),
    [
        (FIRST[3], FIRST, lines.Line()),  # the newest: nothing is left behind
        (FIRST[1], FIRST, lines.Line(1, BACK_TO_20)),
        (FIRST[1], [FIRST[0], FIRST[1]], lines.Line()),  # the later ones were deleted
        (SECOND[2], [*FIRST, *SECOND], lines.Line(1, BACK_TO_20)),
        (SECOND[1], [*FIRST, *SECOND], lines.Line(2, BACK_TO_22)),
        (FIRST[3], [*FIRST, *SECOND], lines.Line(2, ((0, 40),))),
        (FIRST[0], [], lines.Line()),  # nothing else is there
    ],
)
def test_save_after_a_restore_of_an_older_step_starts_a_line(
    origin: StepInfo, infos: list[StepInfo], expected: lines.Line
) -> None:
    assert lines.resumed(origin, infos) == expected


@pytest.mark.parametrize(
    ("step", "line", "is_after"),
    [
        (20, None, True),
        (21, None, False),
        (40, lines.Line(), True),
        (20, lines.Line(1), True),
        (21, lines.Line(1), False),
        (5, lines.Line(2), False),
    ],
)
def test_a_step_of_a_later_generation_comes_after_every_earlier_one(
    step: int, line: lines.Line | None, is_after: bool
) -> None:
    assert lines.is_after(SECOND[0], step, line) is is_after
