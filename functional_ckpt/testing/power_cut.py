"""A disk that loses unsynced data: the possible directories after a power cut.

    with Disk(tmp_path) as disk:
        manager = CheckpointManager(tmp_path / "run", storage=disk.storage)
        manager.save(1, items).result()
    for number, moment in enumerate(disk.moments):
        for image in moment.images(num_random=3):
            image.write(elsewhere)      # the directory after the power cut

POSIX keeps the bytes of a file once it was synced, and the names in a directory once that was. All
else may be there after a power cut or not, each change for itself; a rename alone is atomic. The
model intercepts `os.fsync` and reads the files themselves, independent of their writer: an
announced but missing sync has no effect. A second hard link to a file is an entry of its own, with
the bytes of the first. Files of other processes are not modelled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import stat
import threading
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeAlias
from unittest import mock

from functional_ckpt.testing.faults import FaultyStorage, Operation

_Inode: TypeAlias = int
_Location: TypeAlias = tuple[_Inode, str]
"""The inode of a directory, and a name in it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """The state after a power cut.

    Attributes:
        entries: By path relative to the disk: the bytes of a file, the target of a symbolic link,
            None for a directory. A directory precedes its entries.
    """

    entries: Mapping[str, bytes | str | None]

    @property
    def digest(self) -> str:
        """The same for images of the same content."""
        text = repr(sorted((path, entry) for path, entry in self.entries.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Makes a directory with this content."""
        root = Path(path)
        root.mkdir()
        for name, entry in self.entries.items():
            if entry is None:
                (root / name).mkdir()
            elif isinstance(entry, str):
                (root / name).symlink_to(entry)
            else:
                (root / name).write_bytes(entry)


@dataclasses.dataclass(frozen=True, slots=True)
class _State:
    """A file system: the paths and contents of its inodes."""

    root: _Inode
    locations: Mapping[_Inode, _Location]
    contents: Mapping[_Inode, bytes | str | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The disk just before an operation.

    Attributes:
        operation: The operation; None for the end.
        durable: The synced state.
        current: The state that programs see.
        exchanged: The inodes that were exchanged: either both are where they were, or neither.
    """

    operation: Operation | None
    durable: _State
    current: _State
    exchanged: Mapping[_Inode, _Inode]

    def images(self, *, num_single: int = 0, num_random: int = 0, seed: int = 0) -> list[Image]:
        """Returns the possible states after a power cut now, without repetitions.

        Args:
            num_single: How many changes to make durable alone, and to leave out alone.
            num_random: Number of images with a random part of the unsynced changes.
            seed: Seed of the random parts.

        Returns:
            First the image with only the synced state, then the one with everything.
        """
        changes = self._changes()
        rng = random.Random(seed)
        choices: list[frozenset[_Inode]] = [frozenset(), frozenset(changes)]
        for each in rng.sample(changes, min(num_single, len(changes))):
            choices += [frozenset([each]), frozenset(changes) - {each}]
        choices += [
            frozenset(each for each in changes if rng.random() < 0.5) for _ in range(num_random)
        ]
        images = [self._image(choice) for choice in dict.fromkeys(choices)]
        return list({image.digest: image for image in images}.values())

    def _changes(self) -> list[_Inode]:
        """Returns the inodes whose path or content differs from the synced state; sorted."""
        durable, current = self.durable, self.current
        return [
            inode
            for inode in sorted({*durable.locations, *current.locations})
            if durable.locations.get(inode) != current.locations.get(inode)
            or (
                inode in current.contents and durable.contents.get(inode) != current.contents[inode]
            )
        ]

    def _image(self, chosen: frozenset[_Inode]) -> Image:
        durable, current = self.durable, self.current
        locations = _moved(durable.locations, current.locations, chosen, self.exchanged)
        contents = dict(durable.contents)
        for inode in locations:
            new = current.contents.get(inode)
            if inode not in contents:
                contents[inode] = b"" if isinstance(new, bytes) else new
            if inode in chosen and isinstance(new, bytes):
                contents[inode] = new
        return _image(_State(durable.root, locations, contents))


def _moved(
    old: Mapping[_Inode, _Location],
    new: Mapping[_Inode, _Location],
    chosen: Iterable[_Inode],
    exchanged: Mapping[_Inode, _Inode],
) -> dict[_Inode, _Location]:
    """Returns the locations once the changes of the chosen inodes are durable.

    With them those of the inodes that stand in their way: a rename onto another file, and an
    exchange, are atomic.
    """
    before = {location: inode for inode, location in old.items()}
    after = {location: inode for inode, location in new.items()}
    todo, done = list(chosen), set[_Inode]()
    while todo:
        inode = todo.pop()
        if inode in done:
            continue
        done.add(inode)
        location = new.get(inode)
        if location is not None:
            found = [before.get(location), exchanged.get(inode)]
        else:
            found = [after.get(old[inode])] if inode in old else []
        todo += [other for other in found if other is not None]
    kept = {inode: location for inode, location in old.items() if inode not in done}
    return kept | {inode: new[inode] for inode in done if inode in new}


def _image(state: _State) -> Image:
    """Returns the tree of a state, without unlinked inodes."""
    below: dict[_Inode, list[tuple[str, _Inode]]] = {}
    for inode, (parent, name) in state.locations.items():
        below.setdefault(parent, []).append((name, inode))
    entries: dict[str, bytes | str | None] = {}

    def add(directory: _Inode, path: str) -> None:
        for name, inode in sorted(below.get(directory, ())):
            entry = entries[os.path.join(path, name)] = state.contents.get(inode)
            if entry is None:
                add(inode, os.path.join(path, name))

    add(state.root, "")
    return Image(entries)


class Disk:
    """A directory of which only synced data is safe.

    Inside the `with` block `os.fsync` is intercepted in the process, and every operation of
    `storage` records a `Moment`. Earlier data is safe.

    Args:
        path: An existing directory.
        can_exchange: Whether `storage` can exchange two directories in one atomic step.

    Attributes:
        path: The directory.
        storage: The storage of this disk.
        moments: The disk before every operation so far.
    """

    def __init__(self, path: str | os.PathLike[str], *, can_exchange: bool = True) -> None:
        self.storage = _Storage(self, can_exchange=can_exchange)
        self.moments: list[Moment] = []
        self.path = Path(path).resolve()
        self._mutex = threading.RLock()
        self._root = os.stat(self.path).st_ino
        self._locations: dict[_Inode, _Location] = {}
        self._contents: dict[_Inode, bytes | str | None] = {}
        self._exchanged: dict[_Inode, _Inode] = {}
        self._held: dict[_Inode, int] = {}
        self._links: dict[tuple[_Inode, _Location], _Inode] = {}
        self._is_watching = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Disk:
        state = self._look()
        self._locations, self._contents = dict(state.locations), dict(state.contents)
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self._synced(descriptor)

        self._stack.enter_context(mock.patch("os.fsync", fsync))
        self._is_watching = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_watching = False
        self._stack.close()
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def now(self, operation: Operation | None = None) -> Moment:
        """Returns the disk at this moment."""
        with self._mutex:
            durable = _State(self._root, dict(self._locations), dict(self._contents))
            return Moment(
                operation=operation,
                durable=durable,
                current=self._look(),
                exchanged=dict(self._exchanged),
            )

    def note(self, operation: Operation | None = None) -> None:
        """Adds this moment to `moments`; before an operation of the storage, or between two."""
        if self._is_watching:
            with self._mutex:
                self.moments.append(self.now(operation))

    @contextlib.contextmanager
    def at_once(self) -> Generator[None]:
        """No moment is noted while a change inside is half done."""
        with self._mutex:
            yield

    def swapped(self, first: str, second: str) -> None:
        """Two paths have been exchanged."""
        a, b = os.lstat(first).st_ino, os.lstat(second).st_ino
        self._exchanged |= {a: b, b: a}

    def _synced(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not Path(path).is_relative_to(self.path):
            return
        with self._mutex:
            found = os.fstat(descriptor)
            if not stat.S_ISDIR(found.st_mode):
                data = _read(descriptor, found.st_size)
                self._contents[found.st_ino] = data
                for (inode, _), link in self._links.items():
                    if inode == found.st_ino:
                        self._contents[link] = data
                self._hold(found.st_ino, path)
                return
            current = self._look()
            here = [i for i, (parent, _) in current.locations.items() if parent == found.st_ino]
            gone = [i for i, (parent, _) in self._locations.items() if parent == found.st_ino]
            self._locations = _moved(
                self._locations, current.locations, [*here, *gone], self._exchanged
            )
            for inode in here:
                entry = current.contents[inode]
                if not isinstance(entry, bytes):
                    self._contents[inode] = entry
            self._contents = {
                inode: entry
                for inode, entry in self._contents.items()
                if inode in self._locations or inode in current.locations
            }

    def _hold(self, inode: _Inode, path: str) -> None:
        """Keeps the number from being given to another file."""
        if inode not in self._held:
            with contextlib.suppress(FileNotFoundError):
                self._held[inode] = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _look(self) -> _State:
        """Returns the state that programs see now."""
        locations: dict[_Inode, _Location] = {}
        contents: dict[_Inode, bytes | str | None] = {}
        todo = [(str(self.path), self._root)]
        while todo:
            path, directory = todo.pop()
            with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        inode = self._key(entry, directory, locations)
                        if entry.is_symlink():
                            contents[inode] = os.readlink(entry.path)
                        elif entry.is_dir():
                            contents[inode] = None
                            todo.append((entry.path, inode))
                        else:
                            contents[inode] = Path(entry.path).read_bytes()
                        locations[inode] = (directory, entry.name)
                        self._hold(inode, entry.path)
        return _State(self._root, locations, contents)

    def _key(
        self, entry: os.DirEntry[str], directory: _Inode, found: Mapping[_Inode, _Location]
    ) -> _Inode:
        """Returns the number of an entry: its inode, or one of its own for a second hard link."""
        inode, location = entry.inode(), (directory, entry.name)
        link = self._links.get((inode, location))
        known = self._locations.get(inode, found.get(inode, location))
        is_file = entry.is_file(follow_symlinks=False)
        if link is None and is_file and known != location and entry.stat().st_nlink > 1:
            link = self._links[inode, location] = -len(self._links) - 1
            if inode in self._contents:
                self._contents[link] = self._contents[inode]
        return inode if link is None else link


def _read(descriptor: int, size_bytes: int) -> bytes:
    """Returns the entire file, whatever the mode of the descriptor."""
    with open(f"/proc/self/fd/{descriptor}", "rb") as file:
        return file.read(size_bytes)


class _Storage(FaultyStorage):
    """Shows the disk every operation before it is made."""

    def __init__(self, disk: Disk, *, can_exchange: bool) -> None:
        super().__init__(can_exchange=can_exchange)
        self._disk = disk

    def operation(self, kind: str, path: str) -> None:
        """Notes the moment, then as `FaultyStorage`."""
        if kind not in ("read", "list"):
            self._disk.note(Operation(kind, path))
        super().operation(kind, path)

    def rename(self, source: str, target: str) -> None:
        """As on a local file system."""
        with self._disk.at_once():
            super().rename(source, target)

    def swap(self, first: str, second: str) -> bool:
        """As on a local file system, if it can."""
        with self._disk.at_once():
            is_done = super().swap(first, second)
            if is_done:
                self._disk.swapped(first, second)
            return is_done

    def remove(self, path: str) -> None:
        """As on a local file system."""
        with self._disk.at_once():
            super().remove(path)
