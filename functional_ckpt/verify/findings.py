"""Findings and progress of a verification."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Literal, TypeAlias

from functional_ckpt import errors
from functional_ckpt.storage.base import Storage

Problem: TypeAlias = Literal[
    "missing",
    "unexpected",
    "size",
    "content",
    "swapped",
    "record",
    "unreadable",
    "mismatch",
    "no digests",
    "elsewhere",
]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes verified so far and the bytes there are to verify, from any thread."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it was written.

    Attributes:
        item: The item concerned; None for the checkpoint itself.
        leaves: Names of the leaves whose bytes are lost with it, sorted.
        file: The file concerned, relative to the checkpoint.
        problem: Its kind:

            - `missing` or `unexpected`: a file;
            - `size` or `content`: a file differs;
            - `swapped`: with another file, item or step;
            - `record`: a damaged native record;
            - `unreadable` or `mismatch`: arrays, where no damaged file explains it;
            - `no digests`: no damage. The checkpoint is foreign and has no digests;
            - `elsewhere`: no damage. Another node of a run with `NodeLocal` holds the file.
        expected: The expected value.
        got: The actual value.
        shared_with: Names of the other steps of the run that have the same file, by a hard link.
    """

    item: str | None
    leaves: tuple[str, ...] = ()
    file: str
    problem: Problem
    expected: str
    got: str
    shared_with: tuple[str, ...] = ()

    @property
    def is_damage(self) -> bool:
        """Whether it means that something was changed or lost."""
        return self.problem not in ("no digests", "elsewhere")

    def __str__(self) -> str:
        leaves = f" ({', '.join(self.leaves)})" if self.leaves else ""
        shared = f"; also in {', '.join(self.shared_with)}" if self.shared_with else ""
        return (
            f"{self.file}{leaves}: {self.problem}: expected {self.expected}, got {self.got}{shared}"
        )


class Verification:
    """A running verification: its paths, findings and progress."""

    def __init__(self, storage: Storage, path: str, progress: Progress | None) -> None:
        self.storage = storage
        self.path = path
        self.findings: list[Finding] = []
        self.total_bytes = 0
        self._done_bytes = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(
        self,
        item: str | None,
        file: str,
        problem: Problem,
        expected: str,
        got: str,
        leaves: tuple[str, ...] = (),
    ) -> None:
        """Notes a finding; safe from any thread."""
        self.findings.append(
            Finding(
                item=item, leaves=leaves, file=file, problem=problem, expected=expected, got=got
            )
        )

    def advance(self, size_bytes: int) -> None:
        """Adds to the number of verified bytes."""
        if self._progress is not None:
            with self._lock:
                self._done_bytes += size_bytes
                self._progress(self._done_bytes, self.total_bytes)


def reason(error: BaseException, path: str) -> str:
    """Returns the message of an error, without the parts that the finding has already."""
    text = error.message if isinstance(error, errors.CheckpointError) else str(error)
    return (text.removeprefix(f"{path}: ").rstrip(".")) or type(error).__name__
