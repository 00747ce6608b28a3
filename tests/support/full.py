"""Which part of long tests runs by default: all of it where FUNCTIONAL_CKPT_FULL=1."""

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
    """One case of each `share`, the same in every run, or all of them.

    The names of those that are drawn have as many different words as possible, so that every value
    of every parameter is in one of them.

    Args:
        cases: All cases.
        share: How many cases there are for each that is drawn.
        name: Names a case, with a `-` between its parameters.
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
    """0, 1, 2, ... without end: one of each `share`, the same for the same seed, or all of them."""
    if IS_FULL:
        yield from itertools.count()
    draw = random.Random(str(seed))
    for block in itertools.count():
        yield block * share + draw.randrange(share)
