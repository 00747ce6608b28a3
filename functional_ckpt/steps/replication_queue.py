"""The steps that wait for copies on other nodes, and the messages of the heads about them."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from functional_ckpt.core.nodes.copies import Copy
from functional_ckpt.steps.node_copy import Outcome


@dataclasses.dataclass(slots=True)
class ReplicationQueue:
    """The steps to copy; the threads share it, and it keeps no manager alive.

    Attributes:
        changed: Guards it; notified of every change.
        fresh: Steps that were committed since, by commit id, the newest last.
        backlog: Commit ids of other steps that lack copies, in the order in which they are copied.
        is_busy: Whether an attempt is under way.
        has_failed: Whether the last attempt failed, and no step was committed since.
        is_draining: Whether the thread ends once it has no work, or an attempt fails.
        is_stopped: Whether it ends after the present attempt.
    """

    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    fresh: dict[str, tuple[int, int]] = dataclasses.field(
        default_factory=dict[str, tuple[int, int]]
    )
    backlog: list[str] = dataclasses.field(default_factory=list[str])
    is_busy: bool = False
    has_failed: bool = False
    is_draining: bool = False
    is_stopped: bool = False

    @property
    def has_work(self) -> bool:
        """Whether a step waits."""
        return bool(self.fresh or self.backlog)

    def wait_for_work(self) -> bool:
        """Waits for a step; returns False at the end."""
        with self.changed:
            while not self.is_stopped:
                if self.has_work and not (self.is_draining and self.has_failed):
                    self.is_busy = True
                    return True
                if self.is_draining:
                    return False
                self.changed.wait()
            return False

    def rest(self, seconds: float) -> None:
        """Waits before the next attempt, until a step is committed or the run ends."""
        deadline = time.monotonic() + seconds
        with self.changed:
            self.is_busy = False
            self.changed.notify_all()
            known = len(self.fresh)
            while not (self.is_draining or self.is_stopped or len(self.fresh) > known):
                if (left := deadline - time.monotonic()) <= 0:
                    return
                self.changed.wait(left)

    def end(self, *, at_once: bool) -> None:
        """Ends the thread: at once after the present attempt, or when it has no work."""
        with self.changed:
            self.is_draining = True
            self.is_stopped |= at_once
            self.changed.notify_all()


class RoundResult:
    """The result of all heads in one round.

    Attributes:
        missing: For each target, the files that it has not received.
        num_bytes: The bytes that were sent.
        failures: Why files are missing, one line for each node.
        is_lost: Whether a connection was lost.
        new_parts: The nodes that have a part of the step now.
    """

    def __init__(self, order: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> None:
        self.missing: dict[int, Collection[str]] = {
            node: report["missing"] for node, report in enumerate(reports)
        }
        self.new_parts = [node for node, report in enumerate(reports) if report["has_part"]]
        self.num_bytes = sum(report["num_bytes"] for report in reports)
        self.failures = [
            f"{name}: {report['error']}"
            for name, report in zip(order, reports, strict=True)
            if report["error"]
        ]
        self.is_lost = any(report["is_lost"] for report in reports)


def report_of(
    plan: Sequence[Copy], own: int, sent: Sequence[Outcome], received: Mapping[int, Outcome]
) -> dict[str, Any]:
    """Returns one head's part of the result, as JSON."""
    missing: list[str] = []
    for number, copy in enumerate(plan):
        if copy.target == own:
            missing += [name for name in copy.files if name not in received[number].files]
    outcomes = [*sent, *received.values()]
    return {
        "missing": missing,
        "has_part": any(each.files for each in received.values()),
        "num_bytes": sum(each.num_bytes for each in sent),
        "error": "; ".join(each.error for each in outcomes if each.error),
        "is_lost": any(each.is_lost for each in outcomes),
    }


def joined(reports: Sequence[bytes]) -> bytes:
    """Returns the reports of all heads as one JSON list."""
    return b"[" + b",".join(reports) + b"]"


def choose(values: Sequence[bytes]) -> bytes:
    """Chooses the newest step that every head has committed; else the first in every backlog."""
    found = [json.loads(value) for value in values]
    fresh: list[dict[str, int]] = [each["fresh"] for each in found]
    common = [key for key in fresh[0] if all(key in each for each in fresh)]
    chosen = max(common, key=lambda key: fresh[0][key], default="")
    if not chosen:
        backlogs = [each["backlog"] for each in found]
        chosen = next((key for key in backlogs[0] if all(key in b for b in backlogs)), "")
    has_link = all(each["has_link"] for each in found)
    return json.dumps({"commit_id": chosen, "has_link": has_link}).encode()
