"""The journal of a soak's processes, in one append-only file, and the state that it implies.

Every process appends a line before an operation and one after it. A line is one write of less than
a page to a file that was opened for appending, so lines are complete and in one order. Each key (a
step, or the path of a checkpoint without steps) is a register: its value must be the value of a
write that no later, reported write has replaced.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends lines, each of them durable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._count = 0

    def say(self, kind: str, **fields: Any) -> None:
        """Appends one line."""
        line = json.dumps({"kind": kind, "pid": os.getpid(), **fields}) + "\n"
        os.write(self._descriptor, line.encode())
        os.fsync(self._descriptor)

    def begin(self, what: str, key: str, **fields: Any) -> str:
        """Records the start of an operation; returns its name, for `end`."""
        self._count += 1
        name = f"{os.getpid()}.{self._count}"
        self.say("begin", what=what, key=key, name=name, **fields)
        return name

    def end(self, name: str, *, is_reported: bool, error: BaseException | None = None) -> None:
        """The operation is over: it was reported as done, or it failed."""
        self.say("end", name=name, is_reported=is_reported, error=describe(error))


def describe(error: BaseException | None) -> str | None:
    """The class and the start of the message."""
    return None if error is None else f"{type(error).__name__}: {str(error)[:300]}"


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines: the last one may be half written."""
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


@dataclasses.dataclass(slots=True)
class Interval:
    """An operation on a key, from line to line; one that was never heard of again ends nowhere.

    Attributes:
        begin: The line before it.
        end: The line after it, or that of its process's death.
        is_reported: Whether its success was reported to the caller.
        fields: The fields of its first line.
        outcome: The fields of its last line.
    """

    begin: int
    fields: Mapping[str, Any]
    end: float = math.inf
    is_reported: bool = False
    outcome: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclasses.dataclass(slots=True)
class Register:
    """What happened to one key."""

    writes: list[Interval] = dataclasses.field(default_factory=list[Interval])
    removals: list[Interval] = dataclasses.field(default_factory=list[Interval])
    metrics: list[Interval] = dataclasses.field(default_factory=list[Interval])
    reads: list[Interval] = dataclasses.field(default_factory=list[Interval])
    absences: list[Interval] = dataclasses.field(default_factory=list[Interval])

    def _is_past(self, interval: Interval) -> bool:
        """Whether a later write was reported, after which nothing of it can be left."""
        return any(w.is_reported and w.begin > interval.end for w in self.writes)

    @property
    def digests(self) -> dict[str, Interval]:
        """The values that may be there."""
        return {w.fields["digest"]: w for w in self.writes if not self._is_past(w)}

    @property
    def may_be_absent(self) -> bool:
        """Whether nothing was reported, or the reported value may have been removed since."""
        if not any(write.is_reported for write in self.writes):
            return True
        return any(not self._is_past(each) for each in self.removals)

    @property
    def is_damaged(self) -> bool:
        """Whether it was damaged since the last reported write."""
        damages = (each for each in self.removals if each.fields["what"] == "damage")
        return any(not self._is_past(each) for each in damages)

    @property
    def must_be_absent(self) -> bool:
        """Whether it was deleted, and no write has started since."""
        return any(
            removal.is_reported
            and removal.fields["what"] == "delete"
            and all(write.end < removal.begin for write in self.writes)
            for removal in self.removals
        )

    def wrong_reads(self) -> Iterator[str]:
        """Values that were read, but existed at no moment of the reading."""
        for read in self.reads:
            begun = [write for write in self.writes if write.begin < read.end]
            over = [w for w in begun if w.is_reported and w.end < read.begin]
            if read.is_reported:
                digest = read.outcome["digest"]
                known = [w for w in begun if w.fields["digest"] == digest]
                if not known:
                    yield "a reader got a value that was never saved"
                elif any(a.begin < read.end and a.end > read.begin for a in self.absences):
                    continue  # the directory was elsewhere: a remote tier may have an older version
                elif all(any(o.begin > w.end for o in over) for w in known):
                    yield f"a reader got version {known[0].fields['version']}, which was replaced"
                continue
            error = read.outcome.get("error") or ""
            last = max((w.begin for w in over), default=-1)
            is_excused = any(r.end > last and r.begin < read.end for r in self.removals)
            is_changing = any(w.begin < read.end and w.end > read.begin for w in self.writes)
            is_suspicious = "Corrupt" in error or (over and "Absent" in error)
            if is_suspicious and not is_excused and not is_changing:
                yield f"a reader got the error: {error}"

    def must_have_metrics(self, digest: str) -> dict[str, Any]:
        """The late metrics that were reported for the value with this digest."""
        found: dict[str, Any] = {}
        for each in self.metrics:
            if each.is_reported and each.fields["digest"] == digest:
                found |= each.fields["metrics"]
        return found


def registers(lines: list[dict[str, Any]]) -> dict[str, Register]:
    """Every key's history."""
    found: dict[str, Register] = collections.defaultdict(Register)
    running: dict[str, list[Interval]] = {}
    for number, line in enumerate(lines):
        if line["kind"] == "begin":
            interval = Interval(number, line)
            running.setdefault(line["name"], []).append(interval)
            register = found[line["key"]]
            what = {
                "write": register.writes,
                "metrics": register.metrics,
                "read": register.reads,
                "away": register.absences,
            }
            what.get(line["what"], register.removals).append(interval)
            for key in line.get("may_prune", ()):
                # A running save may prune these until it ends.
                pruning = Interval(number, {"what": "prune"})
                running[line["name"]].append(pruning)
                found[key].removals.append(pruning)
        elif line["kind"] == "end":
            for interval in running.pop(line["name"]):
                interval.end, interval.is_reported = number, line["is_reported"]
                interval.outcome = line
        elif line["kind"] == "dead":
            for name in [name for name in running if name.startswith(f"{line['of']}.")]:
                for interval in running.pop(name):
                    interval.end = number
    return dict(found)
