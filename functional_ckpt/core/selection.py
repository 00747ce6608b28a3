"""Which items and leaves a restore is about: shell patterns on `item` or `item.leaf.name`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeAlias

from functional_ckpt import errors

__all__ = ["Selection", "Selects"]

Selects: TypeAlias = Callable[[str], bool]


class Selection:
    """Says what is wanted, and remembers what it was asked about: a typo must not pass in silence.

    Args:
        patterns: Shell patterns; a `*` also matches dots. None wants everything.
    """

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._patterns = patterns
        self._used: set[str] = set()
        self._found: set[str] = set()

    def wants_whole(self, item: str) -> bool:
        """Whether a pattern names the item itself."""
        if self._patterns is None:
            return True
        return self._is_matched(item, item)

    def may_want(self, item: str) -> bool:
        """Whether a pattern names the item, or could name a leaf of it."""
        if self._patterns is None or self.wants_whole(item):
            return True
        # A part of a pattern that stands for "item." may end within a star.
        return any(
            fnmatch.fnmatchcase(f"{item}.", pattern[:end])
            for pattern in self._patterns
            for end in range(1, len(pattern) + 1)
        )

    def leaves_of(self, item: str) -> Selects:
        """Which leaves of an item are wanted, by name."""
        if self.wants_whole(item):
            return lambda name: True
        return lambda name: self._is_matched(f"{item}.{name}", item)

    def found(self, item: str) -> bool:
        """Whether the item, or a leaf of it that was asked about, is wanted."""
        return self._patterns is None or item in self._found

    def check_used(self) -> None:
        """Raises `UsageError` for a pattern that matched nothing, once all was asked about."""
        unused = [pattern for pattern in self._patterns or () if pattern not in self._used]
        if unused or self._patterns == ():
            raise errors.UsageError(
                f"only={list(self._patterns or ())!r}: "
                f"{', '.join(map(repr, unused)) or 'no pattern'} matches no item and no leaf. A "
                "pattern is matched with the item's name and with 'item.leaf.name'."
            )

    def _is_matched(self, name: str, item: str) -> bool:
        matching = [p for p in self._patterns or () if fnmatch.fnmatchcase(name, p)]
        self._used.update(matching)
        if matching:
            self._found.add(item)
        return bool(matching)
