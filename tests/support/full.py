"""The part of long tests that runs by default; FUNCTIONAL_CKPT_FULL=1 runs everything."""

from __future__ import annotations

import itertools
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

IS_FULL = os.environ.get("FUNCTIONAL_CKPT_FULL") == "1"

T = TypeVar("T")


def drawn(cases: Sequence[T], share: int, name: Callable[[T], str] = str) -> list[T]:
    """Returns one case of each `share`, the same in every run; in a full run all of them.

    The names of the drawn cases have as many different words as possible, so that every value of
    every parameter occurs.

    Args:
        cases: All cases.
        share: The number of cases for each drawn one.
        name: Returns the name of a case, with a `-` between its parameters.
    """
    if IS_FULL:
        return list(cases)
    words = [set(enumerate(re.split(r"[-\[\]]", name(case)))) for case in cases]
    left = sorted(range(len(cases)), key=lambda at: zlib.crc32(name(cases[at]).encode()))
    chosen, seen = list[int](), set[tuple[int, str]]()
    while len(chosen) * share < len(cases):
        chosen.append(max(left, key=lambda at: len(words[at] - seen)))
        left.remove(chosen[-1])
        seen |= words[chosen[-1]]
    return [cases[at] for at in sorted(chosen)]


def drawn_numbers(seed: Any, share: int) -> Iterator[int]:
    """Yields 0, 1, 2, ...: one number of each `share`, the same for the same seed, or all."""
    if IS_FULL:
        yield from itertools.count()
    draw = random.Random(str(seed))
    for block in itertools.count():
        yield block * share + draw.randrange(share)
