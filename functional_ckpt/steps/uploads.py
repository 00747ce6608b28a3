"""Committed steps on their way to further tiers: promised, copied, verified, published.

What was promised is written down beside the steps before anything is pruned, so that a restart goes
on with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.policies import rules
from functional_ckpt.policies.base import KeepContext, KeepPolicy, SaveContext, StepInfo
from functional_ckpt.steps.directory import Steps
from functional_ckpt.steps.upload_step import Upload
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Lock

__all__ = ["FarTier", "Uploads"]

_STATE = "uploads.json"
_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 1.0, 60.0
_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FarTier:
    """A tier that steps are uploaded to.

    Attributes:
        steps: Its steps.
        rule: Which committed steps go there; None for all.
        keep: Which stay there; none for all.
        max_delay_seconds: How long a step may be late without an error; None for ever.
    """

    steps: Steps
    rule: rules.SaveRule | None
    keep: tuple[KeepPolicy, ...]
    max_delay_seconds: float | None


class Uploads:
    """The uploads from a first tier to others; on the primary of a writer.

    Args:
        near: The steps of the first tier.
        far: The others.
    """

    def __init__(self, near: Steps, far: Sequence[FarTier]) -> None:
        self._near = near
        self._far = tuple(far)
        self._locks: list[Lock] = []
        self._mutex = threading.Condition()
        self._alone = threading.Lock()
        # By root of the tier: steps that it was promised, and those that were decided about.
        self._promised: dict[str, list[int]] = {each.steps.root: [] for each in far}
        self._considered: dict[str, list[int]] = {each.steps.root: [] for each in far}
        self._failed: set[str] = set()
        self._error: errors.CheckpointError | None = None
        self._told: set[tuple[str, int]] = set()
        self._closing = False

    # ---------------------------------------------------------------------------- the caller's

    def begin(self) -> None:
        """Takes the tiers over, and goes on with what was promised."""
        self._read_state()
        here = {info.step for info in self._near.infos}
        for each in self._far:
            root = each.steps.root
            self._promised[root] = [step for step in self._promised[root] if step in here]
            each.steps.reload()
        for info in self._near.infos:
            self._consider(info)
        self._promise_metrics()
        self._write_state()
        for each in self._far:
            self._take_over(each)
        for each in self._far:
            work = functools.partial(self._work, each)
            threading.Thread(target=work, name="upload", daemon=True).start()

    def committed(self, info: StepInfo) -> None:
        """The first tier holds a step: promises it to those that want it."""
        with self._mutex:
            for considered in self._considered.values():
                if info.step in considered:  # it was overwritten
                    considered.remove(info.step)
            self._consider(info)
            self._promise_metrics()
            self._write_state()
            self._mutex.notify_all()

    def recorded(self) -> None:
        """Metrics were recorded, by whatever process: they go where their steps are."""
        with self._mutex:
            if self._promise_metrics():
                self._write_state()
                self._mutex.notify_all()

    @contextlib.contextmanager
    def still(self) -> Generator[set[int]]:
        """Whoever removes steps from the first tier, or records metrics of them, is alone.

        Yields:
            The steps that must not be removed yet.
        """
        with self._alone:
            with self._mutex:
                promised = {step for steps in self._promised.values() for step in steps}
            yield promised

    def held_elsewhere(self) -> list[int]:
        """The steps that further tiers hold, and say so now."""
        found: set[int] = set()
        for far in self._far:
            held = {info.step for info in far.steps.infos}
            steps = [info.step for info in self._near.infos if info.step in held]
            with contextlib.suppress(errors.CheckpointError):  # it cannot be asked now
                for step in steps:
                    if far.steps.storage.is_whole(far.steps.path(step)):
                        found.add(step)
        return sorted(found)

    def wait(self) -> None:
        """Waits until everything promised has arrived, or something has failed for good."""
        self.recorded()  # an evaluator beside this process may have
        with self._mutex:
            while self._error is None and not self._is_idle():
                self._mutex.wait(0.5)

    def raise_error(self) -> None:
        """Raises, once, why a tier has waited for longer than it may."""
        with self._mutex:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for what is under way; what fails now goes on when the directory is next opened."""
        with self._mutex:
            self._closing = True
            self._mutex.notify_all()
            while not self._is_idle():
                self._mutex.wait(0.5)
        self.release()

    def release(self) -> None:
        """Lets other writers into the tiers."""
        self._closing = True
        for lock in self._locks:
            lock.release()

    def _is_idle(self) -> bool:
        return all(
            not steps or (self._closing and root in self._failed)
            for root, steps in self._promised.items()
        )

    # ---------------------------------------------------------------------------- promises

    def _take_over(self, far: FarTier) -> None:
        storage, root, hidden = far.steps.storage, far.steps.root, far.steps.hidden
        commit.make_root(storage, hidden)
        self._locks.append(storage.lock(os.path.join(hidden, "lock")))
        promised = {os.path.basename(self._near.path(s)) for s in self._promised[root]}
        for line in commit.recover(storage, root, hidden, but=promised):
            _log.warning("%s: %s", root, line)

    def _consider(self, info: StepInfo) -> None:
        for far in self._far:
            root = far.steps.root
            if info.step in self._considered[root]:
                continue
            self._considered[root].append(info.step)
            if self._wants(far, info) and info.step not in self._promised[root]:
                self._promised[root].append(info.step)

    def _promise_metrics(self) -> bool:
        """Promises steps anew whose metrics are not where their copies are; whether there are."""
        infos, found = self._near.with_late_metrics(), False
        for far in self._far:
            promised = self._promised[far.steps.root]
            held = {(info.step, info.time): info for info in far.steps.infos}
            for info in infos:
                copy = held.get((info.step, info.time))
                if copy is not None and _lacks(copy, info) and info.step not in promised:
                    promised.append(info.step)
                    found = True
        return found

    def _wants(self, far: FarTier, info: StepInfo) -> bool:
        if far.rule is None:
            return True
        if (decided := far.rule.decide_step(info.step)) is not None:
            return decided
        promised = self._promised[far.steps.root]
        known = {each.step: each for each in self._near.infos if each.step in promised}
        known |= {each.step: each for each in far.steps.infos}
        known.pop(info.step, None)
        history = [known[step] for step in sorted(known)]
        return rules.decide_save(far.rule, info, history, context=SaveContext()) is not None

    def _read_state(self) -> None:
        path = os.path.join(self._near.hidden, _STATE)
        if not self._near.storage.exists(path):
            return
        try:
            record: Any = plain_json.parse(self._near.storage.read(path))
            promised, considered = (
                {
                    root: [int(step) for step in record[name].get(root, [])]
                    for root in self._promised
                }
                for name in ("promised", "considered")
            )
        except (errors.StorageError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning(
                "%s cannot be read (%s: %s): which steps go to further tiers is considered anew",
                path,
                type(error).__name__,
                error,
            )
        else:
            self._promised, self._considered = promised, considered

    def _write_state(self) -> None:
        here = {info.step for info in self._near.infos}
        for root, steps in self._considered.items():
            self._considered[root] = [step for step in steps if step in here]
        record = {"promised": self._promised, "considered": self._considered}
        path = os.path.join(self._near.hidden, _STATE)
        self._near.storage.replace(path, json.dumps(record).encode())

    # ---------------------------------------------------------------------------- the work

    def _work(self, far: FarTier) -> None:
        """Uploads what is promised to one tier, the oldest first, until the end."""
        root, wait, since = far.steps.root, _FIRST_WAIT_SECONDS, None
        while (step := self._next(root)) is not None:
            try:
                self._deliver(far, step)
            except Exception as error:  # noqa: BLE001 - told by a warning, or raised when it is too late
                since = since or time.monotonic()
                self._fail(far, step, error, time.monotonic() - since)
                if self._closing:
                    return
                time.sleep(wait)
                wait = min(2 * wait, _LAST_WAIT_SECONDS)
            else:
                wait, since = _FIRST_WAIT_SECONDS, None
                with self._mutex:
                    self._promised[root].remove(step)
                    self._promise_metrics()  # recorded while it was on its way
                    self._write_state()
                    self._mutex.notify_all()

    def _next(self, root: str) -> int | None:
        with self._mutex:
            while not self._promised[root] and not self._closing:
                self._mutex.wait()
            return next(iter(self._promised[root]), None)

    def _fail(self, far: FarTier, step: int, error: Exception, late_seconds: float) -> None:
        root = far.steps.root
        _log.warning("step %d is not in %s yet: %s", step, root, error)
        with self._mutex:
            if self._closing:
                self._failed.add(root)
                _log.warning("%s: the upload goes on when this run's manager is made again", root)
            is_damaged = isinstance(error, errors.CorruptCheckpointError)
            if is_damaged:
                self._promised[root].remove(step)  # never, and others are waiting behind it
                self._write_state()
            bound = far.max_delay_seconds
            is_late = bound is not None and late_seconds >= bound
            is_final = is_damaged or is_late or isinstance(error, errors.LockedError)
            if is_final and (root, step) not in self._told:
                self._told.add((root, step))
                self._error = errors.SaveError(
                    f"Step {step} cannot be copied to {root}: {error}", step=step, path=root
                )
                self._error.__cause__ = error
            self._mutex.notify_all()

    def _deliver(self, far: FarTier, step: int) -> None:
        source = self._near.path(step)
        if not self._near.storage.is_whole(source):
            return  # deleted by the user in the meantime
        final = os.path.join(far.steps.root, os.path.basename(source))
        started = time.monotonic()
        num_bytes = Upload(self._near, far.steps, source, final, step).run()
        is_new = True  # else it was there, and metrics of it are new
        for info in (each for each in self._near.infos if each.step == step):
            is_new = all((each.step, each.time) != (step, info.time) for each in far.steps.infos)
            far.steps.remember(info)
            far.steps.forget_late_metrics(step)
            if late := self._near.recorded(step):
                far.steps.record(step, late)
        far.steps.point_latest()
        if is_new:
            _tell(far, step, max(time.monotonic() - started, 1e-9), num_bytes)
        self._prune(far)

    def _prune(self, far: FarTier) -> None:
        if not far.keep:
            return
        known, now = far.steps.with_late_metrics(), datetime.datetime.now(datetime.UTC)
        for step in rules.steps_to_prune(far.keep, known, context=KeepContext(now=now)):
            far.steps.prune(step)


def _tell(far: FarTier, step: int, seconds: float, num_bytes: int) -> None:
    rate = num_bytes / 2**20 / seconds
    _log.info("step %d is in %s: %.1f MiB/s", step, far.steps.root, rate)
    far.steps.tell("uploaded", step, seconds=seconds, num_bytes=num_bytes)


def _lacks(copy: StepInfo, info: StepInfo) -> bool:
    """Whether a step has metrics that a copy of it has not, or others; nan is like nan."""
    there = copy.metrics or {}
    return any(
        name not in there or json.dumps(there[name]) != json.dumps(value)
        for name, value in (info.metrics or {}).items()
    )
