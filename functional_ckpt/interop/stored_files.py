"""Data files of a step that can be files of the output: copied without making a tensor."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Collection, Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.core.files import safetensors_header
from functional_ckpt.core.files.hub_configs import CONFIGS, RUNTIME
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format import checkpoint_dir, step_files
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.system_errors import clear_errors

_SUFFIX = ".safetensors"
_STEMS = ("model", "data")
# The kernel has no shared range here, or the files are on two file systems.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY)
_STEP_BYTES = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFiles:
    """Files of complete tensors in a local item of format 2.

    Attributes:
        directory: The item.
        files: Name -> record of each file.
        names: Name of each file -> those of its tensors.
        is_on_hub: Whether these are the names on the hub.
    """

    directory: str
    files: Mapping[str, FileRecord]
    names: Mapping[str, Sequence[str]]
    is_on_hub: bool

    @property
    def largest_bytes(self) -> int:
        """The size of the largest file."""
        return max(file.size_bytes for file in self.files.values())

    def is_one_of(self, names: Collection[str]) -> bool:
        """Returns whether it is one file, of tensors of these names."""
        return len(self.files) == 1 and all({*held} == {*names} for held in self.names.values())

    def copy(self, name: str, path: str) -> None:
        """Copies a file, within the kernel where it can.

        Raises:
            CorruptCheckpointError: The copy differs from the record.
        """
        source = os.path.join(self.directory, name)
        with clear_errors("copy", source), open(source, "rb") as file, open(path, "xb") as target:
            _copy(file.fileno(), target.fileno(), os.fstat(file.fileno()).st_size)
        got = LocalStorage().checksum(path)
        if got != self.files[name]:
            raise errors.CorruptCheckpointError(
                f"{source}: expected {self.files[name]}, got {got}; the file was changed after it "
                "was written.",
                path=source,
            )


def of_item(opened: checkpoint_dir.OpenCheckpoint, item: str) -> StoredFiles | None:
    """Returns the files of an item; None if its tensors are elsewhere, or are parts."""
    saved = opened.tree(item)
    if saved.record is None or opened.storage.objects is not None:
        return None
    files = {
        name: file for name, file in sorted(saved.record.files.items()) if name.endswith(_SUFFIX)
    }
    is_complete = files and all(name.startswith(_STEMS) for name in files)
    if not is_complete or any(name.endswith("chunks.bin") for name in saved.record.files):
        return None
    names: dict[str, list[str]] = {}
    for name, file in files.items():
        path = os.path.join(saved.path, name)
        try:
            header = step_files.read_header(opened.storage, path, file.size_bytes)
            tensors, _ = safetensors_header.decode(header, file.size_bytes)
        except ValueError as error:
            raise errors.CorruptCheckpointError(f"{path}: {error}.", path=path) from error
        names[name] = [tensor.name for tensor in tensors]
    is_on_hub = not any(name.startswith(RUNTIME) for name in saved.record.files)
    return StoredFiles(saved.path, files, names, is_on_hub)


def configs_of(saved: checkpoint_dir.OpenItem) -> dict[str, str]:
    """Returns the configuration files of an item of a model, by their names in the item."""
    found: dict[str, str] = {}
    for name, file in {} if saved.record is None else saved.record.files.items():
        if name.removeprefix(RUNTIME) in CONFIGS:
            path = os.path.join(saved.path, name)
            data = saved.storage.read(path)
            step_files.check_content(path, data, file)
            found[name] = data.decode()
    return found


def _copy(source: int, target: int, size_bytes: int) -> None:
    done = 0
    while done < size_bytes:
        try:
            count = os.copy_file_range(source, target, min(size_bytes - done, _STEP_BYTES))
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            count = os.sendfile(target, source, None, min(size_bytes - done, _STEP_BYTES))
        if not count:
            return
        done += count
