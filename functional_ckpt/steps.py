"""The steps of one run: their directory, their names and what is remembered of them."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Collection, Mapping
from typing import Any

from functional_ckpt import errors, history
from functional_ckpt.core.names import NameFormat
from functional_ckpt.core.policy import StepInfo
from functional_ckpt.storage import commit
from functional_ckpt.storage.paths import LocalStorage

__all__ = ["Steps"]


class Steps:
    """A directory of steps.

    What was committed through this object is remembered at once; what other processes do is seen by
    `reload`. Safe to use from the commit's thread beside the caller's.

    Args:
        read_only: Others write the directory: the lists of steps look at it anew.

    Attributes:
        storage: The file system.
        root: The directory.
        hidden: Where everything is that is no step.
    """

    def __init__(
        self, storage: LocalStorage, root: str, names: NameFormat, *, read_only: bool = False
    ) -> None:
        self.storage = storage
        self.root = root
        self._read_only = read_only
        self.hidden = os.path.join(root, commit.HIDDEN)
        self._names = names
        self._mutex = threading.Lock()
        self._infos: tuple[StepInfo, ...] = ()

    @property
    def infos(self) -> tuple[StepInfo, ...]:
        """The steps as last seen, ascending."""
        return self._infos

    def reload(self) -> None:
        """Reads everything from disk anew."""
        found = tuple(history.scan(self.storage, self.root, self._names))
        with self._mutex:
            self._infos = found

    def all(self) -> list[int]:
        """The committed steps, ascending."""
        if self._read_only:
            return list(history.list_steps(self.storage, self.root, self._names))
        return [info.step for info in self._infos]

    def latest(self) -> int:
        """The highest committed step; raises `StepNotFoundError` where there is none."""
        steps = self.all()
        if not steps:
            raise errors.StepNotFoundError(f"{self.root} has no step yet.", path=self.root)
        return steps[-1]

    def existing(self, step: int) -> int:
        """The step, if it was committed; else raises `StepNotFoundError`."""
        steps = self.all()
        if step not in steps:
            shown = ", ".join(map(str, steps[-10:])) or "none"
            raise errors.StepNotFoundError(
                f"{self.root} has no step {step}; the latest are: {shown}.",
                step=step,
                path=self.root,
            )
        return step

    def check_writable(self) -> None:
        """Raises `ReadOnlyError` where others write the directory."""
        if self._read_only:
            raise errors.ReadOnlyError(
                "This CheckpointManager was opened with read_only=True.", path=self.root
            )

    def path(self, step: int) -> str:
        """Where a step is, or will be."""
        candidates = [os.path.join(self.root, name) for name in self._names.names(step)]
        return next((path for path in candidates if self.storage.exists(path)), candidates[0])

    def check_free(self, step: int, *, overwrite: bool) -> None:
        """Raises `StepExistsError` when the step is there and may not be overwritten."""
        path = self.path(step)
        if not self.storage.exists(path):
            return
        if not self.storage.is_directory(path):
            raise errors.StorageError(
                f"Cannot save step {step}: {path} is a file, and not a checkpoint. Move it away.",
                errno=errno.ENOTDIR,
                step=step,
                path=path,
            )
        if not overwrite:
            raise errors.StepExistsError(
                f"Step {step} exists in {self.root}. Make the manager with overwrite=True to "
                "replace it, delete it, or save another step.",
                step=step,
                path=path,
            )

    def remember(self, info: StepInfo) -> None:
        """A step was committed."""
        with self._mutex:
            others = [each for each in self._infos if each.step != info.step]
            self._infos = tuple(sorted([*others, info], key=lambda each: each.step))

    def forget(self, steps: Collection[int]) -> None:
        """Steps were removed."""
        with self._mutex:
            self._infos = tuple(each for each in self._infos if each.step not in steps)

    def with_late_metrics(self) -> tuple[StepInfo, ...]:
        """The steps with what was recorded of them since, by whatever process."""
        late = history.late_metrics(self.storage, self.root)
        return tuple(history.with_late_metrics(info, late) for info in self._infos)

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics of a committed step; durable when it returns."""
        # What is on disk is asked: another process may have committed the step anew.
        info = history.read_step(self.storage, self.path(step), step)
        late = history.late_metrics(self.storage, self.root)
        own = dataclasses.replace(info, metrics=None)
        known = history.with_late_metrics(own, late).metrics or {}
        history.write_late_metrics(self.storage, self.root, info, {**known, **metrics})
        with self._mutex:
            self._infos = tuple(
                _with_metrics(each, metrics) if each.step == step else each for each in self._infos
            )

    def forget_late_metrics(self, step: int) -> None:
        """The step was written anew: what was measured of the old one is of no more use."""
        info = next((each for each in self._infos if each.step == step), None)
        history.remove_late_metrics(self.storage, self.root, step, but_of=info)

    def discard(self, step: int) -> None:
        """Removes a step: out of sight in one rename, then from disk."""
        path = self.path(step)
        try:
            if self.storage.exists(path):
                commit.discard(self.storage, path, self.hidden)
            history.remove_late_metrics(self.storage, self.root, step)
        except errors.CheckpointError as error:
            error.step = step
            raise
        finally:
            if not self.storage.exists(path):  # out of sight, however far its removal came
                self.forget([step])


def _with_metrics(info: StepInfo, late: Mapping[str, Any]) -> StepInfo:
    return dataclasses.replace(info, metrics={**(info.metrics or {}), **late})
