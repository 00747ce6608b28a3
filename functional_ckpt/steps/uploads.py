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

__all__ = ["UploadTarget", "Uploads"]

_STATE = "uploads.json"
_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 1.0, 60.0
_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UploadTarget:
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
        local: The steps of the first tier.
        remote: The others.
    """

    def __init__(self, local: Steps, remote: Sequence[UploadTarget]) -> None:
        self._local = local
        self._remote = tuple(remote)
        self._locks: list[Lock] = []
        self._mutex = threading.Condition()
        self._alone = threading.Lock()
        # By root of the tier: steps that it was promised, and those that were decided about.
        self._promised: dict[str, list[int]] = {each.steps.root: [] for each in remote}
        self._decided: dict[str, list[int]] = {each.steps.root: [] for each in remote}
        self._failed: set[str] = set()
        self._error: errors.CheckpointError | None = None
        self._reported: set[tuple[str, int]] = set()
        self._closing = False

    # ---------------------------------------------------------------------------- the caller's

    def begin(self) -> None:
        """Takes the tiers over, and goes on with what was promised."""
        self._read_state()
        here = {info.step for info in self._local.infos}
        for each in self._remote:
            root = each.steps.root
            self._promised[root] = [step for step in self._promised[root] if step in here]
            each.steps.reload()
        for info in self._local.infos:
            self._consider(info)
        self._promise_metrics()
        self._write_state()
        for each in self._remote:
            self._take_over(each)
        for each in self._remote:
            work = functools.partial(self._work, each)
            threading.Thread(target=work, name="upload", daemon=True).start()

    def committed(self, info: StepInfo) -> None:
        """The first tier holds a step: promises it to those that want it."""
        with self._mutex:
            for considered in self._decided.values():
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
    def exclusive(self) -> Generator[set[int]]:
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
        for remote in self._remote:
            held = {info.step for info in remote.steps.infos}
            steps = [info.step for info in self._local.infos if info.step in held]
            with contextlib.suppress(errors.CheckpointError):  # it cannot be asked now
                for step in steps:
                    if remote.steps.storage.is_committed(remote.steps.path(step)):
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

    def _take_over(self, remote: UploadTarget) -> None:
        storage, root, hidden = remote.steps.storage, remote.steps.root, remote.steps.hidden
        commit.makedirs_durable(storage, hidden)
        self._locks.append(storage.lock(os.path.join(hidden, "lock")))
        promised = {os.path.basename(self._local.path(s)) for s in self._promised[root]}
        for line in commit.recover(storage, root, hidden, but=promised):
            _log.warning("%s: %s", root, line)

    def _consider(self, info: StepInfo) -> None:
        for remote in self._remote:
            root = remote.steps.root
            if info.step in self._decided[root]:
                continue
            self._decided[root].append(info.step)
            if self._wants(remote, info) and info.step not in self._promised[root]:
                self._promised[root].append(info.step)

    def _promise_metrics(self) -> bool:
        """Promises steps anew whose metrics are not where their copies are; whether there are."""
        infos, found = self._local.with_late_metrics(), False
        for remote in self._remote:
            promised = self._promised[remote.steps.root]
            held = {(info.step, info.time): info for info in remote.steps.infos}
            for info in infos:
                copy = held.get((info.step, info.time))
                if copy is not None and _lacks(copy, info) and info.step not in promised:
                    promised.append(info.step)
                    found = True
        return found

    def _wants(self, remote: UploadTarget, info: StepInfo) -> bool:
        if remote.rule is None:
            return True
        if (decided := remote.rule.decide_step(info.step)) is not None:
            return decided
        promised = self._promised[remote.steps.root]
        known = {each.step: each for each in self._local.infos if each.step in promised}
        known |= {each.step: each for each in remote.steps.infos}
        known.pop(info.step, None)
        history = [known[step] for step in sorted(known)]
        return rules.decide_save(remote.rule, info, history, context=SaveContext()) is not None

    def _read_state(self) -> None:
        path = os.path.join(self._local.hidden, _STATE)
        if not self._local.storage.exists(path):
            return
        try:
            record: Any = plain_json.parse(self._local.storage.read(path))
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
            self._promised, self._decided = promised, considered

    def _write_state(self) -> None:
        here = {info.step for info in self._local.infos}
        for root, steps in self._decided.items():
            self._decided[root] = [step for step in steps if step in here]
        record = {"promised": self._promised, "considered": self._decided}
        path = os.path.join(self._local.hidden, _STATE)
        self._local.storage.replace(path, json.dumps(record).encode())

    # ---------------------------------------------------------------------------- the work

    def _work(self, remote: UploadTarget) -> None:
        """Uploads what is promised to one tier, the oldest first, until the end."""
        root, wait, since = remote.steps.root, _FIRST_WAIT_SECONDS, None
        while (step := self._next(root)) is not None:
            try:
                self._deliver(remote, step)
            except Exception as error:  # noqa: BLE001 - told by a warning, or raised when it is too late
                since = since or time.monotonic()
                self._fail(remote, step, error, time.monotonic() - since)
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

    def _fail(self, remote: UploadTarget, step: int, error: Exception, late_seconds: float) -> None:
        root = remote.steps.root
        _log.warning("step %d is not in %s yet: %s", step, root, error)
        with self._mutex:
            if self._closing:
                self._failed.add(root)
                _log.warning("%s: the upload goes on when this run's manager is made again", root)
            is_damaged = isinstance(error, errors.CorruptCheckpointError)
            if is_damaged:
                self._promised[root].remove(step)  # never, and others are waiting behind it
                self._write_state()
            bound = remote.max_delay_seconds
            is_late = bound is not None and late_seconds >= bound
            is_final = is_damaged or is_late or isinstance(error, errors.LockedError)
            if is_final and (root, step) not in self._reported:
                self._reported.add((root, step))
                self._error = errors.SaveError(
                    f"Step {step} cannot be copied to {root}: {error}", step=step, path=root
                )
                self._error.__cause__ = error
            self._mutex.notify_all()

    def _deliver(self, remote: UploadTarget, step: int) -> None:
        source = self._local.path(step)
        if not self._local.storage.is_committed(source):
            return  # deleted by the user in the meantime
        final = os.path.join(remote.steps.root, os.path.basename(source))
        started = time.monotonic()
        num_bytes = Upload(self._local, remote.steps, source, final, step).run()
        is_new = True  # else it was there, and metrics of it are new
        for info in (each for each in self._local.infos if each.step == step):
            is_new = all((each.step, each.time) != (step, info.time) for each in remote.steps.infos)
            remote.steps.remember(info)
            remote.steps.forget_late_metrics(step)
            if late := self._local.recorded(step):
                remote.steps.record(step, late)
        remote.steps.update_latest_link()
        if is_new:
            _tell(remote, step, max(time.monotonic() - started, 1e-9), num_bytes)
        self._prune(remote)

    def _prune(self, remote: UploadTarget) -> None:
        if not remote.keep:
            return
        known, now = remote.steps.with_late_metrics(), datetime.datetime.now(datetime.UTC)
        for step in rules.steps_to_prune(remote.keep, known, context=KeepContext(now=now)):
            remote.steps.prune(step)


def _tell(remote: UploadTarget, step: int, seconds: float, num_bytes: int) -> None:
    rate = num_bytes / 2**20 / seconds
    _log.info("step %d is in %s: %.1f MiB/s", step, remote.steps.root, rate)
    remote.steps.emit("uploaded", step, seconds=seconds, num_bytes=num_bytes)


def _lacks(copy: StepInfo, info: StepInfo) -> bool:
    """Whether a step has metrics that a copy of it has not, or others; nan is like nan."""
    there = copy.metrics or {}
    return any(
        name not in there or json.dumps(there[name]) != json.dumps(value)
        for name, value in (info.metrics or {}).items()
    )
