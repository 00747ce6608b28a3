"""Resolves arguments to a directory of steps or to one checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping

from functional_ckpt import errors
from functional_ckpt.cli import run_policies, step_words
from functional_ckpt.core.records import orbax, records
from functional_ckpt.format import checkpoint_dir, parts
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history, index
from functional_ckpt.steps.late_metrics import LateMetrics
from functional_ckpt.steps.names import CompositeStepName, NameFormat, StepName
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import connect

_STEP_NAME = re.compile(r"(?:(?P<prefix>.+)_)?(?P<digits>[0-9]+)")
_ROOT_MARKS = (commit.HIDDEN, "metadata/_ROOT_METADATA")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint."""

    storage: Storage
    path: str
    step: int | None
    is_foreign: bool = False

    @property
    def title(self) -> str:
        """The title of the checkpoint in output."""
        return os.path.basename(self.path) if self.step is None else f"step {self.step}"

    def open(self) -> checkpoint_dir.OpenCheckpoint:
        """Opens it for reading."""
        if self.is_foreign:
            from functional_ckpt.interop import detect, opened  # late: torch

            return opened.open_source(detect.recognise(self.path))
        return checkpoint_dir.open_checkpoint(self.storage, self.path, self.step)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A directory of steps.

    Attributes:
        storage: The store that it is in.
        path: The directory.
        names: How its steps are named.
        steps: Step -> name of its directory, ascending.
        infos: Their times and metrics, without metrics that were recorded later.
        latest: The step that a run resumes from; None where there is no step.
        abandoned: The steps beside the line that leads to it.
        strays: Name -> kind of each entry that has a step's name but is not a step.
        unfinished: Directories of steps being written, or left by a crash.
        index: Reads the steps, each commit once.
        late: Reads metrics that were recorded later, each file once.
    """

    storage: Storage
    path: str
    names: NameFormat
    steps: Mapping[int, str]
    infos: tuple[StepInfo, ...]
    latest: int | None
    abandoned: frozenset[int]
    strays: Mapping[str, str]
    unfinished: tuple[str, ...]
    index: index.StepIndex
    late: LateMetrics

    def history(self) -> list[StepInfo]:
        """Returns times and metrics of the steps, as policies see them."""
        self.late.look()
        return [self.late.added_to(info) for info in self.infos]

    def again(self) -> Root:
        """Returns the directory as it is now; only new steps are read."""
        listed = self.storage.list(self.path)
        return _looked(self.storage, self.path, self.names, listed, self.index, self.late)

    def number(self, word: step_words.StepWord) -> int:
        """Returns the step that a word of the command line means.

        Raises:
            StepNotFoundError: There is no step.
            UsageError: No step has the metric.
        """
        if isinstance(word, int):
            return word
        if self.latest is None:
            raise errors.StepNotFoundError(f"{self.path} has no step yet.", path=self.path)
        if word == "latest":
            return self.latest
        metrics = metrics_of(self.history())
        names = {name for each in metrics.values() for name in each}
        name, mode = step_words.find_metric(word.removeprefix("best:"), names)
        mode = mode or step_words.mode_in(self.ranked(), name)
        return step_words.best_step(metrics, name, mode)

    def ranked(self) -> dict[str, step_words.Mode]:
        """Returns the metrics that the run's policies rank steps by, and which value is best."""
        return run_policies.ranked(self.storage, self.path)

    def checkpoint(self, word: step_words.StepWord) -> Checkpoint:
        """Returns a step, or an incomplete one: opening it reports the missing part."""
        step = self.number(word)
        name = self.steps.get(step) or self.damaged().get(step)
        if name is None:
            raise index.no_such_step(self.path, step, tuple(self.steps))
        path = os.path.join(self.path, name)
        return Checkpoint(storage=self.storage, path=path, step=step)

    @property
    def has_known_names(self) -> bool:
        """Whether the names of steps to come are known; else `find` has to look for them."""
        return bool(self.steps) and not isinstance(self.names, _Recorded)

    def damaged(self) -> dict[int, str]:
        """Step -> name of each directory that has a step's name and no record of a step."""
        commits = commit.protocol(self.storage, self.path)
        folders = [n for n in self.strays if commits.commit_id(os.path.join(self.path, n))]
        return {step: name for name in folders if (step := self.names.parse(name)) is not None}

    def parts(self) -> dict[str, str]:
        """Name -> description of each step of which other nodes have some files."""
        found: dict[str, str] = {}
        for name in self.strays:
            with contextlib.suppress(errors.CorruptCheckpointError):
                part = parts.missing(self.storage, os.path.join(self.path, name))
                if part is not None:
                    found[name] = f"{part}"
        return found

    def states(self) -> dict[str, str]:
        """Name -> `committed` or `replicated`, as its run has noted, of each step of a node."""
        if self.storage.objects is not None or not parts.read_directory_id(self.storage, self.path):
            return {}
        found: dict[str, str] = {}
        replicated = frozenset[str]()
        with contextlib.suppress(errors.CorruptCheckpointError):
            replicated = parts.read_replicated(self.storage, self.path)
        for name in (*self.steps.values(), *self.strays):
            with contextlib.suppress(errors.CorruptCheckpointError):
                part = parts.read_part(self.storage, os.path.join(self.path, name))
                if part is not None:
                    found[name] = "replicated" if part.commit_id in replicated else "committed"
        return found


def metrics_of(infos: Iterable[StepInfo]) -> dict[int, dict[str, float]]:
    """Returns the finite metrics of steps."""
    return {info.step: dict(history.finite_metrics(info.metrics or {})) for info in infos}


def find(text: str, prefix: str | None = None, *, opens_foreign: bool = False) -> Root | Checkpoint:
    """Finds steps or a checkpoint at a path.

    Raises:
        StepNotFoundError: There is nothing.
        UsageError: It is neither steps nor a checkpoint.
    """
    storage, path = connect(text)
    if not queries.exists(storage, path):
        raise errors.StepNotFoundError(f"{text}: there is no such file or directory.", path=path)
    if not queries.is_directory(storage, path):
        return _foreign(storage, path, text, opens_foreign)
    if checkpoint_dir.has_record(storage, path):
        return Checkpoint(storage=storage, path=path, step=_step_of(storage, path))
    root = _find_root(storage, path, prefix)
    if root is not None:
        return root
    if _holds_items(storage, path):
        return Checkpoint(storage=storage, path=path, step=_step_of(storage, path))
    return _foreign(storage, path, text, opens_foreign)


def _foreign(storage: Storage, path: str, text: str, opens_foreign: bool) -> Checkpoint:
    """Returns a foreign checkpoint."""
    from functional_ckpt.interop import detect  # late: torch

    formats = detect.candidates(path)
    if not formats:
        raise errors.UsageError(
            f"{text}: neither a checkpoint nor a directory of steps, and of no other format that "
            "is known.",
            path=path,
        )
    if not opens_foreign:
        raise errors.UsageError(
            f"{text} is {formats[0].description}. fckpt show and fckpt diff open it; fckpt convert "
            "makes a step of it.",
            path=path,
        )
    return Checkpoint(storage=storage, path=path, step=None, is_foreign=True)


def checkpoint_of(
    text: str,
    step: step_words.StepWord | None = None,
    prefix: str | None = None,
    *,
    opens_foreign: bool = False,
) -> Checkpoint:
    """Returns the checkpoint at a path; in a directory of steps the requested one or the latest."""
    target = find(text, prefix, opens_foreign=opens_foreign)
    if isinstance(target, Root):
        return target.checkpoint("latest" if step is None else step)
    if step is not None and step != target.step:
        raise errors.UsageError(
            f"{text} is one checkpoint; --step chooses among those of a directory of steps.",
            path=target.path,
        )
    return target


def _holds_items(storage: Storage, path: str) -> bool:
    """Returns whether it holds trees: a checkpoint without a record, or an old one of Orbax."""
    folders = [os.path.join(path, name) for name in storage.list(path)]
    return any(
        queries.exists(storage, os.path.join(folder, orbax.TREE_METADATA_FILE))
        and not queries.exists(storage, os.path.join(folder, orbax.CHECKPOINT_METADATA_FILE))
        for folder in folders
    )


def _find_root(storage: Storage, path: str, prefix: str | None) -> Root | None:
    listed = storage.list(path)
    formats: dict[str | None, dict[StepName, bool]] = {}
    for name in listed:
        found = _format_of(name)
        if found is None or not queries.is_directory(storage, os.path.join(path, name)):
            continue
        known = formats.setdefault(found.prefix, {})
        folder = os.path.join(path, name)
        known[found] = (
            any(known.values())
            or checkpoint_dir.has_record(storage, folder)
            or _holds_items(storage, folder)
        )
    formats = {key: known for key, known in formats.items() if any(known.values())}
    if prefix is not None:
        formats = {key: known for key, known in formats.items() if key == (prefix or None)}
    elif len(formats) > 1:
        names = ", ".join(sorted(next(iter(known)).build_name(1) for known in formats.values()))
        raise errors.UsageError(
            f"{path} holds steps named differently (such as {names}); choose with --prefix.",
            path=path,
        )
    is_root = any(queries.exists(storage, os.path.join(path, mark)) for mark in _ROOT_MARKS)
    if not formats:
        recorded = _recorded(storage, path, listed) if not prefix else None
        if recorded is not None:
            return _root(storage, path, recorded, listed)
        return _root(storage, path, StepName(), listed) if is_root else None
    (known,) = formats.values()
    read = tuple(known)
    names = read[0] if len(read) == 1 else CompositeStepName(write=read[0], read=read)
    return _root(storage, path, names, listed)


def _root(storage: Storage, path: str, names: NameFormat, listed: list[str]) -> Root:
    found = index.StepIndex(storage, path, names)
    return _looked(storage, path, names, listed, found, LateMetrics(storage, path))


def _looked(
    storage: Storage,
    path: str,
    names: NameFormat,
    listed: list[str],
    found: index.StepIndex,
    late: LateMetrics,
) -> Root:
    entries = found.look()
    infos = lines.marked([entry.info for entry in entries.values()])
    latest = lines.newest(infos)
    return Root(
        storage=storage,
        path=path,
        names=names,
        steps={step: entry.name for step, entry in entries.items()},
        infos=tuple(infos),
        latest=None if latest is None else latest.step,
        abandoned=frozenset(info.step for info in infos if info.is_abandoned),
        strays=found.strays,
        unfinished=tuple(name for name in listed if commit.TMP_SUFFIX in name),
        index=found,
        late=late,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Recorded:
    """Reads steps from records if their names follow an unknown template."""

    steps: Mapping[str, int]

    def build_name(self, step: int) -> str:
        """Returns the name of an existing step."""
        return next(name for name, found in self.steps.items() if found == step)

    def names(self, step: int) -> tuple[str, ...]:
        """Returns every name that means the step."""
        return tuple(name for name, found in self.steps.items() if found == step)

    def parse(self, name: str) -> int | None:
        """Returns the step that a name means."""
        return self.steps.get(name)


def _recorded(storage: Storage, path: str, listed: list[str]) -> _Recorded | None:
    """Returns the steps of a directory by their records; None where it has none."""
    found: dict[str, int] = {}
    for name in listed:
        record = os.path.join(path, name, records.EXTENSION_FILE)
        if commit.TMP_SUFFIX in name or queries.is_link(storage, os.path.join(path, name)):
            continue
        if queries.exists(storage, record):
            with contextlib.suppress(errors.CheckpointError):
                step = records.parse_step(storage.read(record), record).step
                if step is not None:
                    found[name] = step
    return _Recorded(found) if found else None


def _format_of(name: str) -> StepName | None:
    """Returns the naming scheme of a step name; None if it is not a step name."""
    match = _STEP_NAME.fullmatch(name)
    if match is None:
        return None
    digits = match["digits"]
    is_padded = digits.startswith("0") and len(digits) > 1
    try:
        found = StepName(prefix=match["prefix"], zero_pad=len(digits) if is_padded else None)
    except errors.UsageError:
        return None
    return found if found.parse(name) is not None else None


def _step_of(storage: Storage, path: str) -> int | None:
    """Returns the step in a checkpoint's name, unless it was saved without one."""
    name = os.path.basename(os.path.realpath(path))
    found = _format_of(name)
    if found is None:
        return None
    try:
        record = checkpoint_dir.open_checkpoint(storage, path).record
    except errors.CheckpointError:
        record = None
    return None if record is not None and record.step is None else found.parse(name)
