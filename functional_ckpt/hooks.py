"""Callables for custom training loops: `fc.hooks`.

In a loop:
    save = fc.hooks.SaveHook(manager, items)
    for batch in loader:
        progress = train(batch, progress)
        save(progress, metrics={"loss": loss})
        if save.should_stop:
            break
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.manager import CheckpointManager
from functional_ckpt.policies.progress import Progress
from functional_ckpt.saving.background import Commit

__all__ = ["SaveHook"]


class SaveHook:
    """Saves when it is called and the manager's policies accept the step.

    Args:
        manager: Directory and policies.
        items: The items to save; or a function that returns them, called only when a step is saved,
            for programs whose state is a new value after each step.

    Attributes:
        should_stop: Whether the process has received SIGTERM and its progress is saved.

    >>> import tempfile
    >>> import functional_ckpt as fc
    >>> state = {"x": 0}
    >>> with CheckpointManager(tempfile.mkdtemp(), staging=fc.Blocking()) as manager:
    ...     save = SaveHook(manager, lambda: {"state": state})
    ...     state = {"x": 1}
    ...     commit = save(7)
    ...     manager.restore()["state"]
    {'x': 1}
    """

    def __init__(
        self, manager: CheckpointManager, items: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    ) -> None:
        if not callable(items) and not isinstance(items, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise errors.UsageError(
                f"items must be a mapping, or a function that returns one; got {items!r:.80}."
            )
        self._manager = manager
        self._items = items
        self.should_stop = False

    def __repr__(self) -> str:
        items = "a function" if callable(self._items) else list(self._items)
        return f"SaveHook({self._manager!r}, {items})"

    def __call__(
        self,
        step: int | Progress,
        *,
        metrics: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        force: bool = False,
    ) -> Commit | None:
        """Saves a step if the policies accept it; see `CheckpointManager.save`.

        Args:
            step: Its number, or the progress, whose batch it is then.
            metrics: Measured at this step, or a function that measures them: called only when the
                step is saved.
            force: Save regardless of the policies.
        """
        progress = step if isinstance(step, Progress) else None
        number = step.batch if isinstance(step, Progress) else step
        commit = self._manager.save(
            number,
            _Lazy(self._items) if callable(self._items) else self._items,
            metrics=_Lazy(metrics) if callable(metrics) else metrics,
            progress=progress,
            force=force,
        )
        self.should_stop = self._manager.reached_preemption(number)
        return commit


class _Lazy(Mapping[str, Any]):
    """A mapping that is made when it is first looked at: `save` looks once it has decided."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    @functools.cached_property
    def _made(self) -> Mapping[str, Any]:
        return self._make()

    def __getitem__(self, key: str) -> Any:
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
