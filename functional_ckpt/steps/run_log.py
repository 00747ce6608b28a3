"""The log of a run: a line for each committed step, including pruned ones. Does not import torch.

`ROOT/.functional_ckpt/history.jsonl` is for reports. No save or restore reads it, and a failure to
write it fails no save. It is not synced: a crash may lose its last lines or truncate one. Object
stores have no log, since they cannot append.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import logging
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.policies import keep
from functional_ckpt.policies.base import KeepPolicy, StepInfo
from functional_ckpt.steps import history
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage

FILE, _OLDER = "history.jsonl", "history.older.jsonl"
# Of two files at most: the older one is replaced when the other has grown to this size.
_MAX_BYTES = 4 * 2**20
# Not blocking: a pipe at the file's path may have no reader.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_POLICIES = {
    each.__name__: each
    for each in (
        *(keep.PreserveAll, keep.LatestN, keep.LatestDuration, keep.EveryNSeconds),
        *(keep.EveryNSteps, keep.CustomSteps, keep.BestN),
    )
}
_log = logging.getLogger("functional_ckpt")
_names = reprlib.Repr()
_names.maxother = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PastStep:
    """A step that was committed.

    Attributes:
        info: Its number, time and metrics; late metrics only once it was pruned.
        size_bytes: The size of its files.
        seconds: From the call of `save` to the commit.
        keep: The keep policies then, as text.
        is_pruned: Whether it was removed because no policy kept it.
    """

    info: StepInfo
    size_bytes: int | None = None
    seconds: float | None = None
    keep: tuple[str, ...] = ()
    is_pruned: bool = False


class RunLog:
    """Appends to the log, on the primary.

    Args:
        storage: The store of the run.
        hidden: Its bookkeeping directory.
        policies: The keep policies.
    """

    def __init__(self, storage: Storage, hidden: str, policies: Sequence[KeepPolicy]) -> None:
        self._path = None if storage.objects is not None else os.path.join(hidden, FILE)
        self._keep = [_names.repr(each) for each in policies]
        self._is_sound = False
        self._has_warned = False

    def committed(self, info: StepInfo, *, size_bytes: int, seconds: float) -> None:
        """Logs a committed step."""
        facts = {"size_bytes": size_bytes, "seconds": round(seconds, 6), "keep": self._keep}
        self._append([{**_record(info), **facts}])

    def pruned(self, infos: Iterable[StepInfo]) -> None:
        """Logs pruned steps, with their late metrics."""
        self._append([{**_record(info), "pruned": True} for info in infos])

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self._path is None or not records:
            return
        data = "".join(f"{json.dumps(each, allow_nan=False)}\n" for each in records).encode()
        try:
            size = self._write(self._path, data)
            if size > _MAX_BYTES:
                os.replace(self._path, os.path.join(os.path.dirname(self._path), _OLDER))
        except OSError as error:
            self._is_sound = False
            if not self._has_warned:
                self._has_warned = True
                _log.warning("%s cannot be written; reports lack steps: %s", self._path, error)

    def _write(self, path: str, data: bytes) -> int:
        """Appends, after ending a truncated last line. Returns the size before."""
        file = os.open(path, _FLAGS, 0o666)
        try:
            size = os.fstat(file).st_size
            if not self._is_sound and size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            self._is_sound = os.write(file, data) == len(data)
            return size
        finally:
            os.close(file)


def _record(info: StepInfo) -> dict[str, Any]:
    metrics = dict(history.finite_metrics(info.metrics or {}))
    return {"step": info.step, "commit": history.commit_of(info), "metrics": metrics}


def read(storage: Storage, hidden: str) -> list[PastStep]:
    """Returns the steps of the log in the order of their commits; truncated lines are ignored.

    Of a step that was overwritten only the last commit is returned.
    """
    found: dict[int, PastStep] = {}
    for name in (_OLDER, FILE):
        data = queries.read_optional(storage, os.path.join(hidden, name)) or b""
        for past in _pasts(data):
            known = found.get(past.info.step)
            if known is not None and known.info.time == past.info.time and past.is_pruned:
                metrics = {**(known.info.metrics or {}), **(past.info.metrics or {})}
                info = dataclasses.replace(known.info, metrics=metrics)
                past = dataclasses.replace(known, info=info, is_pruned=True)
            found.pop(past.info.step, None)
            found[past.info.step] = past
    return sorted(found.values(), key=lambda past: past.info.time)


def last_policies(storage: Storage, hidden: str) -> tuple[str, ...] | None:
    """Returns the keep policies of the last commit, as text; None if there is no log of it."""
    for name in (FILE, _OLDER):
        data = queries.read_optional(storage, os.path.join(hidden, name)) or b""
        for line in reversed(data.splitlines()):
            for past in _pasts(line):
                if not past.is_pruned:
                    return past.keep
    return None


def _pasts(data: bytes) -> Iterator[PastStep]:
    for line in data.splitlines():
        with contextlib.suppress(
            *(ValueError, TypeError, KeyError, OverflowError, RecursionError, errors.UsageError)
        ):
            yield _parse(cast("dict[str, Any]", plain_json.parse(line)))


def _parse(record: Mapping[str, Any]) -> PastStep:
    info = StepInfo(
        step=record["step"],
        time=history.commit_time(record["commit"] * 1000),
        metrics=dict(history.finite_metrics(dict(record["metrics"]))),
    )
    size_bytes, seconds = record.get("size_bytes"), record.get("seconds")
    return PastStep(
        info=info,
        size_bytes=None if size_bytes is None else int(size_bytes),
        seconds=None if seconds is None else float(seconds),
        keep=tuple(map(str, record.get("keep", ()))),
        is_pruned=record.get("pruned") is True,
    )


def policy_of(text: str) -> KeepPolicy | None:
    """Returns the keep policy that a text of the log names; None for one of the user's own.

    >>> policy_of("BestN(2, 'loss', mode='min')")
    BestN(2, 'loss', mode='min')
    >>> policy_of("Mine(3)")
    """
    with contextlib.suppress(ValueError, SyntaxError, TypeError, errors.UsageError):
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            values = [ast.literal_eval(each) for each in call.args]
            named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
            kind = _POLICIES.get(call.func.id)
            return None if kind is None else kind(*values, **named)
    return None
