"""Lines of training: which steps lead to the present one, and which a rollback left behind.

A run that restores an earlier step and saves again starts a new *generation*. Each step records its
generation and its *ancestors*: for every earlier generation, the last of its steps that led here.
So the newest step of a directory, the highest one of its highest generation, says by itself which
of the others belong to its line. The others were abandoned: they stay until a policy or the user
removes them.

    generation 0:  10 - 20 - 30 - 40       30 and 40 are abandoned
                         |
    generation 1:        + - 21 - 22       ancestors ((0, 20),); the line is 10, 20, 21, 22
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from functional_ckpt.policies.base import StepInfo

Ancestors: TypeAlias = tuple[tuple[int, int], ...]
"""For each earlier generation of a line, its number and the last step of it on the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line of training.

    Attributes:
        generation: The number of rollbacks that led here.
        ancestors: The steps of earlier generations that belong to the line.
    """

    generation: int = 0
    ancestors: Ancestors = ()

    def holds(self, info: StepInfo) -> bool:
        """Returns whether a step belongs to the line."""
        if info.generation == self.generation:
            return True
        return any(
            info.generation == generation and info.step <= last
            for generation, last in self.ancestors
        )


def line_of(info: StepInfo) -> Line:
    """Returns the line that a step was saved on."""
    return Line(info.generation, info.ancestors)


def newest(infos: Iterable[StepInfo]) -> StepInfo | None:
    """Returns the step that a run resumes from: the highest one of the highest generation."""
    return max(infos, key=age, default=None)


def present(infos: Iterable[StepInfo]) -> Line:
    """Returns the line of the newest step."""
    found = newest(infos)
    return Line() if found is None else line_of(found)


def resumed(origin: StepInfo, infos: Iterable[StepInfo]) -> Line:
    """Returns the line of the steps that are saved after `origin` was restored.

    Args:
        origin: The step that was restored.
        infos: Every step there is. Nothing newer among them: the line of `origin` continues.
    """
    others = [info for info in infos if info.step != origin.step]
    if all(age(info) < age(origin) for info in others):
        return line_of(origin)
    generation = 1 + max(origin.generation, *(info.generation for info in others))
    return Line(generation, (*origin.ancestors, (origin.generation, origin.step)))


def is_after(info: StepInfo, step: int, line: Line | None) -> bool:
    """Returns whether a step came after another one, whose line may be unknown."""
    if line is None:
        return info.step > step
    return age(info) > (line.generation, step)


def marked(infos: Sequence[StepInfo], line: Line | None = None) -> tuple[StepInfo, ...]:
    """Returns the steps with `is_abandoned` set on those beside a line, the present one if None."""
    line = present(infos) if line is None else line
    return tuple(
        info
        if info.is_abandoned is not line.holds(info)
        else dataclasses.replace(info, is_abandoned=not info.is_abandoned)
        for info in infos
    )


def age(info: StepInfo) -> tuple[int, int]:
    """Returns the key by which steps are ordered from the oldest to the newest."""
    return info.generation, info.step
