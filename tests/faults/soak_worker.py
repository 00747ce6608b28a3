"""The processes of a soak: a writer that does whatever a writer can, evaluators, and savers.

Each of them is forked by `soak.py`, writes down what it does in the journal, and may be stopped or
killed at any instant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import soak_values
from soak_journal import Journal, describe

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.files import file_plan
from functional_ckpt.format import shared_files

# Longer than any operation of a soak takes on a busy machine.
_TIMEOUT_SECONDS = 120.0
_KEEP_BEST = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """One run's directories, and the settings that are the same for all writers.

    Attributes:
        folder: Of all of it.
        keep: How many of the latest steps the first tier keeps; None for all.
        keeps_best: Whether the best steps stay beside these.
        tiers: Path or URI of each remote tier, and how many steps it keeps; None for all.
        paths: Where checkpoints without steps are saved, below `folder`.
        operations: The writer's operations, by the names of `Writer`'s methods, and their
            frequency.
    """

    folder: Path
    keep: int | None
    keeps_best: bool
    tiers: tuple[tuple[str, int | None], ...]
    paths: tuple[str, ...]
    operations: tuple[tuple[str, int], ...]

    @property
    def run(self) -> Path:
        """The manager's directory."""
        return self.folder / "run"

    @property
    def num_kept(self) -> float:
        """How many of the latest steps are held by some tier."""
        return max(math.inf if keep is None else keep for keep in (self.keep, *self.keeps_of_tiers))

    @property
    def keeps_of_tiers(self) -> tuple[int | None, ...]:
        """How many steps each remote tier keeps."""
        return tuple(keep for _, keep in self.tiers)

    def further(self) -> list[fc.Tier]:
        """The remote tiers, for a manager."""
        latest = fc.policies.LatestN
        return [
            fc.Tier(path=path, keep=None if keep is None else latest(keep))
            for path, keep in self.tiers
        ]

    def near_steps(self) -> list[int]:
        """The first tier's steps, by its directory."""
        with contextlib.suppress(FileNotFoundError):  # it may have another name just now
            return [int(name) for name in os.listdir(self.run) if name.isdigit()]
        return []


def key_of(step: int) -> str:
    """The step's key in the journal."""
    return f"step/{step}"


def reader(arena: Arena) -> fc.CheckpointManager:
    """A manager that looks at all tiers."""
    return fc.CheckpointManager(arena.run, read_only=True, tiers=arena.further())


def read_step(
    journal: Journal, manager: fc.CheckpointManager, items: dict[str, Any], step: int
) -> str | None:
    """Restores a step into `items`, and records the digest; returns it, or None."""
    restore = functools.partial(manager.restore, step, soak_values.targets(items))
    return read(journal, key_of(step), items, restore)


def read(
    journal: Journal, key: str, items: dict[str, Any], restore: Callable[[], Any]
) -> str | None:
    """As `read_step`, by any function that restores."""
    name = journal.begin("read", key)
    try:
        restored = restore()
    except errors.CheckpointError as error:
        journal.say("end", name=name, is_reported=False, error=describe(error))
        return None
    digest = soak_values.digest(items, restored)
    journal.say("end", name=name, is_reported=True, digest=digest)
    return digest


class Clock:
    """`time.time` and `time.time_ns`, which jump on demand."""

    def __init__(self) -> None:
        self._offset_seconds = 0.0
        real, real_ns = time.time, time.time_ns
        time.time = lambda: real() + self._offset_seconds
        time.time_ns = lambda: real_ns() + int(self._offset_seconds * 1e9)

    def jump(self, seconds: float) -> None:
        """From now on the clock is wrong by so much."""
        self._offset_seconds = seconds


@contextlib.contextmanager
def staying(arena: Arena, *, wait: bool = True) -> Generator[None]:
    """Either a manager is opened or the run's directory is elsewhere, never both.

    A manager that is opened meanwhile starts a new run at the old path, which is right, and which
    is removed when the directory is moved back.

    Args:
        arena: The arena.
        wait: Whether to wait for the other process.

    Raises:
        BlockingIOError: The other process has the directory, and `wait` is False.
    """
    with open(arena.folder / "staying", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class Writer:
    """One process that writes, with options and operations drawn at random."""

    def __init__(
        self,
        arena: Arena,
        journal: Journal,
        seed: int,
        version: int,
        on_opened: Callable[[], object] = lambda: None,
    ) -> None:
        self._arena = arena
        self._on_opened = on_opened
        self._journal = journal
        self._choose = random.Random(seed)
        self._version = version
        self._clock = Clock()
        self._items = soak_values.new_items()
        self._held: dict[int, str] = {}
        # Saved since this writer went back to an earlier step; None where it did not.
        self._line: set[int] | None = None
        self._origin = 0
        self._pending: list[tuple[str, int, str, fc.Commit]] = []
        self._manager = self._open()

    def run(self, num_operations: int) -> None:
        """Performs a number of operations, and exits as a program should."""
        names, weights = zip(*self._arena.operations, strict=True)
        for _ in range(num_operations):
            (name,) = self._choose.choices(names, weights)
            operation: Callable[[], None] = getattr(self, name)
            try:
                if not hasattr(self, "_manager"):
                    self._manager = self._open()
                operation()
            except errors.CheckpointError as error:
                self._journal.say("refused", operation=name, error=describe(error))
            else:
                self._journal.say("did", operation=name)
        self._close()

    def _options(self) -> dict[str, Any]:
        choose = self._choose
        staging = choose.choice(["eager", "overlapped", "overlapped", "budget", "synchronous"])
        options: dict[str, Any] = {"overwrite": True, "latest_link": "latest"}
        if staging == "overlapped":
            options["staging"] = fc.Overlapped()
        elif staging == "budget":
            options["staging"] = fc.Eager(budget_bytes=choose.choice([0, 1000, 300_000]))
        elif staging == "synchronous":
            options["staging"] = fc.Blocking()
        if choose.random() < 0.2:
            options["on_busy"] = "skip"
        if choose.random() < 0.1:
            options["share_unchanged"] = False
        return options

    def _open(self) -> fc.CheckpointManager:
        arena, latest = self._arena, fc.policies.LatestN
        keep: list[Any] | None = None if arena.keep is None else [latest(arena.keep)]
        if keep is not None and arena.keeps_best:
            keep.append(fc.policies.BestN(_KEEP_BEST, "accuracy"))
        # Both layouts: one data file for each item, and several.
        file_plan.BYTES_PER_FILE = self._choose.choice((1000, 2**30))
        shared_files.REFRESH_STEPS = self._choose.choice((3, 100))
        options = self._options()
        until = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                with staying(arena):
                    manager = fc.CheckpointManager(
                        arena.run, keep_policy=keep, tiers=arena.further(), **options
                    )
            except errors.LockedError:  # a manager that was dropped may still be committing
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
            else:
                self._journal.say("opened", options={name: str(v) for name, v in options.items()})
                self._on_opened()
                return manager

    def _close(self) -> None:
        try:
            if hasattr(self, "_manager"):
                self._manager.close()
        except errors.CheckpointError as error:  # an error that was not reported before
            self._journal.say("refused", operation="close", error=describe(error))
        self._settle()

    def _settle(self) -> None:
        """Waits for running commits, and records their outcome."""
        pending, self._pending = self._pending, []
        for name, step, digest, commit in pending:
            try:
                commit.result(_TIMEOUT_SECONDS)
            except errors.CheckpointError as error:
                self._held.pop(step, None)
                self._journal.end(name, is_reported=False, error=error)
            else:
                self._journal.end(name, is_reported=True)
                self._held[step] = digest

    def _save(self, step: int, items: dict[str, Any], version: int, known: set[int]) -> None:
        digest = soak_values.digest(soak_values.fill(items, step, version))
        self._held.pop(step, None)
        name = self._journal.begin(
            "write",
            key_of(step),
            digest=digest,
            version=version,
            may_prune=[key_of(each) for each in self._may_prune(known, step)],
        )
        metrics = {"version": version, "accuracy": soak_values.accuracy(step)}
        try:
            commit = self._manager.save(step, items, metrics=metrics)
        except errors.CheckpointError as error:
            self._journal.end(name, is_reported=False, error=error)
            return
        if commit is None:
            self._journal.end(name, is_reported=False)
        else:
            self._pending.append((name, step, digest, commit))

    def _may_prune(self, known: Iterable[int], step: int) -> list[int]:
        """The steps that a commit may remove, given the present ones."""
        arena = self._arena
        kept = arena.num_kept
        others = [] if kept == math.inf else sorted({*known, step})[: -int(kept)]
        if arena.keeps_best:
            near = {*arena.near_steps(), step, *(pending for _, pending, _, _ in self._pending)}
            best = sorted(near, key=soak_values.accuracy)[-_KEEP_BEST:]
            others = [each for each in others if each not in best]
        if self._line is not None:
            if step > self._origin:
                self._line.add(step)
            line = sorted(self._line)[-3:] if kept == math.inf else sorted(self._line)[-int(kept) :]
            others = [each for each in others if each not in line]
        return [each for each in others if each != step]

    def _known(self) -> set[int]:
        return {*self._manager.all_steps(), *(step for _, step, _, _ in self._pending)}

    def _next_version(self) -> int:
        self._version += 1
        return self._version

    # -------------------------------------------------------------------- operations of a writer

    def save_next(self) -> None:
        """A new step, which may be waited for."""
        known = self._known()
        self._save(max(known, default=0) + 1, self._items, self._next_version(), known)
        if self._choose.random() < 0.5:
            self._settle()

    def save_again(self) -> None:
        """A step that is there."""
        known = self._known()
        if known:
            step = self._choose.choice(sorted(known))
            self._save(step, self._items, self._next_version(), known)
            if self._choose.random() < 0.5:
                self._settle()

    def save_in_threads(self) -> None:
        """Two threads save with this manager."""
        self._settle()
        known = self._known()
        first = max(known, default=0) + 1
        both = {*known, first, first + 1}  # either may be committed first
        items = [soak_values.new_items() for _ in range(2)]
        versions = [self._next_version() for _ in items]
        threads = [
            threading.Thread(target=self._save, args=(first + n, items[n], versions[n], both))
            for n in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._settle()

    def delete(self) -> None:
        """A step that is there."""
        self._settle()
        known = sorted(self._known())
        if len(known) < 2:
            return
        step = self._choose.choice(known[:-1])
        self._held.pop(step, None)
        name = self._journal.begin("delete", key_of(step))
        try:
            self._manager.delete(step)
        except errors.CheckpointError as error:
            self._journal.end(name, is_reported=False, error=error)
        else:
            self._journal.end(name, is_reported=True)

    def record(self) -> None:
        """Late metrics of a step that this writer saved."""
        steps = sorted(self._held.keys() & self._known())
        if steps:
            step = self._choose.choice(steps)
            record_metrics(self._journal, self._manager, step, self._held[step])

    def restore(self) -> None:
        """Any step; the current line continues."""
        self._settle()
        known = sorted(self._known())
        if known:
            read_step(self._journal, self._manager, self._items, self._choose.choice(known))

    def go_back(self) -> None:
        """An earlier step, from which the training continues; the later ones may be discarded."""
        self._settle()
        known = sorted(self._known())
        if len(known) < 2:
            return
        step = self._choose.choice(known[:-1])
        generation = self._generation(step, -1)
        later = [n for n in known if n > step or self._generation(n, sys.maxsize) > generation]
        discards = self._choose.random() < 0.5
        operations = [self._journal.begin("discard", key_of(each)) for each in later if discards]
        try:
            self._manager.restore(step, soak_values.targets(self._items), discard_later=discards)
        finally:
            for each, operation in zip(later, operations, strict=False):
                self._held.pop(each, None)
                self._journal.end(operation, is_reported=True)
        self._line, self._origin = set(), step
        for number in range(1, self._choose.choice([2, 4])):
            self._save(step + number, self._items, self._next_version(), self._known())
        self._settle()

    def _generation(self, step: int, default: int) -> int:
        """The generation of the step, by its record; `default` where it cannot be read."""
        record = self._arena.run / str(step) / "_FUNCTIONAL_CKPT"
        with contextlib.suppress(OSError, ValueError):  # in a remote tier only, or damaged
            return json.loads(record.read_bytes()).get("generation", 0)
        return default

    def restore_latest(self) -> None:
        """As a program does at its start."""
        known = self._manager.all_steps()
        restored = self._manager.restore_or(soak_values.targets(self._items))
        if known and restored.step is None:
            self._journal.say(
                "wrong", message=f"restore_or starts from scratch, steps were {known}"
            )

    def reopen(self) -> None:
        """Another manager, with other options."""
        self._close()
        self._line = None
        self._manager = self._open()

    def drop(self) -> None:
        """As a function that never closes its manager."""
        self._line = None
        pending, self._pending = self._pending, []
        self.__dict__.pop("_manager", None)
        try:
            self._manager = self._open()
        finally:
            self._pending = pending
            self._settle()

    def intrude(self) -> None:
        """A second writer, which must not get in."""
        try:
            with staying(self._arena):
                fc.CheckpointManager(self._arena.run).close()
        except errors.LockedError:
            return
        self._journal.say("wrong", message="a second writer of the same process got in")

    def fork(self) -> None:
        """A child that ends while its parent saves."""
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def jump(self) -> None:
        """The clock is wrong by up to a month from now on."""
        self._clock.jump(self._choose.choice([0.0, *(self._choose.uniform(-1, 1) * 2.6e6,) * 3]))


def record_metrics(journal: Journal, manager: fc.CheckpointManager, step: int, digest: str) -> None:
    """Records a metric that no other process records, for the value that was read."""
    name = f"late-{os.getpid()}-{time.monotonic_ns()}"
    metrics = {name: float(step)}
    operation = journal.begin("metrics", key_of(step), digest=digest, metrics=metrics)
    try:
        manager.record_metrics(step, metrics)
    except errors.CheckpointError as error:
        journal.end(operation, is_reported=False, error=error)
    else:
        journal.end(operation, is_reported=True)


def evaluate(arena: Arena, journal: Journal, seed: int) -> None:
    """Restores steps and records metrics, beside the writers, until it is killed."""
    choose = random.Random(seed)
    items = soak_values.new_items()
    while not arena.run.is_dir():
        time.sleep(0.05)
    manager = reader(arena)
    while True:
        try:
            steps = manager.all_steps()
            if steps:
                step = choose.choice(steps)
                digest = read_step(journal, manager, items, step)
                if digest is not None and choose.random() < 0.3:
                    _record_as_seen(journal, manager, step, digest, items)
            if choose.random() < 0.05:
                manager.close()
                manager = reader(arena)
        except errors.CheckpointError as error:
            journal.say("refused", operation="evaluate", error=describe(error))
        time.sleep(choose.uniform(0.05, 0.3))


def _record_as_seen(
    journal: Journal, manager: fc.CheckpointManager, step: int, digest: str, items: dict[str, Any]
) -> None:
    """Records a metric, which counts only if the step is unchanged afterwards."""
    name = f"late-{os.getpid()}-{time.monotonic_ns()}"
    metrics = {name: float(step)}
    operation = journal.begin("metrics", key_of(step), digest=digest, metrics=metrics)
    try:
        manager.record_metrics(step, metrics)
    except errors.CheckpointError as error:
        journal.end(operation, is_reported=False, error=error)
        return
    is_same = read_step(journal, manager, items, step) == digest
    journal.end(operation, is_reported=is_same)


def save_paths(arena: Arena, journal: Journal, seed: int) -> None:
    """Saves checkpoints without steps, beside others that do, until it is killed."""
    choose = random.Random(seed)
    items = soak_values.new_items()
    for count in range(10**9):
        path = choose.choice(arena.paths)
        version = seed * 100_000 + count
        digest = soak_values.digest(soak_values.fill(items, 0, version))
        operation = journal.begin("write", f"path/{path}", digest=digest, version=version)
        try:
            fc.save(arena.folder / path, items, overwrite=True)
        except errors.CheckpointError as error:
            journal.end(operation, is_reported=False, error=error)
        else:
            journal.end(operation, is_reported=True)
        time.sleep(choose.uniform(0.05, 0.5))
