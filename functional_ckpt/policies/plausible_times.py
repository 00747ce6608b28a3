"""Plausible commit times of steps, where clocks were wrong."""

from __future__ import annotations

import bisect
import dataclasses
import datetime
from collections.abc import Sequence

from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo


def with_plausible_times(
    history: Sequence[StepInfo], now: datetime.datetime
) -> tuple[StepInfo, ...]:
    """Returns the history with other times for steps whose own contradict those of most others.

    Times rise with the steps of a generation, and none is in the future. The longest run of steps
    for which that holds is believed; each other step gets the time of the believed one before it.

    Args:
        history: The steps in ascending order.
        now: The present time.
    """
    order = sorted(range(len(history)), key=lambda i: lines.age(history[i]))
    believed = _longest_rising([(i, history[i].time) for i in order if history[i].time <= now])
    times: dict[int, datetime.datetime] = {}
    earliest = min((history[i].time for i in believed), default=now)
    for index in order:
        earliest = times[index] = history[index].time if index in believed else earliest
    return tuple(
        info if times[index] == info.time else dataclasses.replace(info, time=times[index])
        for index, info in enumerate(history)
    )


def _longest_rising(timed: Sequence[tuple[int, datetime.datetime]]) -> set[int]:
    """The keys of a longest subsequence whose times do not fall."""
    ends: list[datetime.datetime] = []  # the earliest end of a rising subsequence of each length
    keys: list[int] = []
    before: dict[int, int | None] = {}
    for key, time in timed:
        place = bisect.bisect_right(ends, time)
        before[key] = keys[place - 1] if place else None
        ends[place : place + 1] = [time]
        keys[place : place + 1] = [key]
    found: set[int] = set()
    key = keys[-1] if keys else None
    while key is not None:
        found.add(key)
        key = before[key]
    return found
