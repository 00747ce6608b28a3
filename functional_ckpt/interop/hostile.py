"""Guards against malicious or damaged files: any failure of a reader is a clear error.

Readers of foreign formats (torch, safetensors, pickle, zipfile, JSON) fail in many ways on damaged
or malicious files. Here their errors become errors of this package, and the claims of a file are
compared with its size before memory is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pickletools
import re
import sys
import zipfile
from collections.abc import Generator, Iterator, Mapping
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.storage import local_files

# Memory that a file may request beyond its own size.
_SPARE_BYTES = 64 * 2**20
# System errors caused by the request, which the file determined.
_ABSURD = (None, errno.EINVAL, errno.EOVERFLOW, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP)
# How many objects a pickle may stand for, for each that it holds: more is made by repetition.
_MAX_REPETITION = 1000
_FEW_OBJECTS = 10**6
_FEW_CONTAINERS = 200_000
_MAX_DEPTH = 10_000
_BYTE_ORDER = sys.byteorder.encode()
_DATA = re.compile(r"/data/[^/]*$")
_PUTS = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GETS = frozenset(["GET", "BINGET", "LONG_BINGET"])
_GROWS = frozenset(["APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"])
# Memory of each container that an opcode makes, in units of an empty list.
_WEIGHTS = {
    **dict.fromkeys(["EMPTY_LIST", "EMPTY_DICT", "LIST", "DICT"], 1),
    **dict.fromkeys(["TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"], 1),
    **dict.fromkeys(["EMPTY_SET", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"], 2),
}


@contextlib.contextmanager
def clear_failures(path: str) -> Generator[None]:
    """Turns whatever a reader raises inside into an error of this package.

    Raises:
        CorruptCheckpointError: The file cannot be read.
        StorageError: The system refuses, or there is not enough memory.
    """
    try:
        yield
    except errors.CheckpointError:
        raise
    except MemoryError as error:
        code = errno.ENOMEM
        raise errors.StorageError(
            f"Cannot read {path}: {os.strerror(code)} [errno {code}].", errno=code, path=path
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in _ABSURD:
            raise errors.StorageError(
                f"Cannot read {path}: {error.strerror} [errno {error.errno}].",
                errno=error.errno,
                path=path,
            ) from error
        first = str(error).strip().partition("\n")[0]
        raise errors.CorruptCheckpointError(
            f"{path}: it cannot be read ({type(error).__name__}: {first:.200}); it is damaged, or "
            "its name is wrong.",
            path=path,
        ) from error


def check_file(path: str) -> None:
    """Raises `StepNotFoundError` if there is no file."""
    if not os.path.isfile(path):
        raise errors.StepNotFoundError(f"{path}: there is no such file.", path=path)


def read_small(path: str) -> bytes:
    """Returns the content of an index (text or a pickle); refuses pipes and large files."""
    return local_files.read_regular(path, follow=True)


def check_pickle(data: bytes, path: str) -> None:
    """Raises `CorruptCheckpointError` for a pickle that expands to far more than its size.

    Slots of the memo are numbered one by one: a large number in a small pickle makes the reader ask
    for that many. Containers that hold one another twice, many times over, stand for more objects
    than can ever be visited; a pickler never lets a container grow that another one holds already,
    which would hide them. Deep nests and floods of small containers take many times their bytes.
    """
    memo: list[_Part | None] = []
    num_memoized = 0
    stack: list[_Part | None] = []  # None: a mark
    budget = _FEW_CONTAINERS + len(data) // 4
    with clear_failures(path):
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
            name = opcode.name
            if name in _PUTS or name == "MEMOIZE":
                slot = num_memoized if name == "MEMOIZE" else cast("int", argument)
                if slot > number:
                    raise ValueError(f"memo {slot} of {number}")
                memo.extend([None] * (slot + 1 - len(memo)))
                num_memoized += memo[slot] is None
                memo[slot] = _top(stack)
            elif name in _GETS:
                stack.append(_known(memo, cast("int", argument)))
            elif name == "DUP":
                stack.append(_top(stack))
            elif name == "MARK":
                stack.append(None)
            else:
                budget -= _apply(opcode, stack)
                if budget < 0:
                    raise ValueError("it builds more containers than its size allows")
            if stack and stack[-1] is not None:
                if stack[-1].size > _FEW_OBJECTS + _MAX_REPETITION * number:
                    raise ValueError("it stands for more objects than can be visited")
                if stack[-1].depth > _MAX_DEPTH:
                    raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")


@dataclasses.dataclass(slots=True)
class _Part:
    """An object on a pickle's stack: the number of objects that it stands for, and its levels."""

    size: int
    depth: int
    is_held: bool = False
    """Whether another object holds it."""


_PLAIN = _Part(1, 0)


def _top(stack: list[_Part | None]) -> _Part:
    top = stack[-1]
    if top is None:
        raise ValueError("a mark where an object should be")
    return top


def _known(memo: list[_Part | None], slot: int) -> _Part:
    part = memo[slot]
    if part is None:
        raise ValueError(f"memo {slot} is empty")
    return part


def _apply(opcode: Any, stack: list[_Part | None]) -> int:
    """Accounts for an opcode's stack inputs as parts of its result; returns the result's weight."""
    before, name = opcode.stack_before, opcode.name
    taken: list[_Part] = []
    if pickletools.markobject in before:
        while (part := stack.pop()) is not None:
            taken.append(part)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(_top(stack))
        stack.pop()
    if name in _GROWS and taken:
        container = taken.pop()
        if taken and (container.is_held or container is _PLAIN):
            raise ValueError("a container grows while another one holds it")
        _hold(container, taken)
        stack.append(container)
        return 0
    weight = _WEIGHTS.get(name, 0)
    for _ in opcode.stack_after:
        stack.append(_hold(_Part(1, 0), taken) if taken or weight else _PLAIN)
    return weight


def _hold(container: _Part, parts: list[_Part]) -> _Part:
    for part in parts:
        container.size += part.size
        container.depth = max(container.depth, part.depth + 1)
        if part is not _PLAIN:
            part.is_held = True
    return container


def check_archive(path: str) -> dict[int, set[int]]:
    """Raises `CorruptCheckpointError` for an archive that unpacks to more than it is.

    `torch.save` never compresses, and no two of its records share bytes.

    Returns:
        Size -> the CRC-32 of each record of that size that holds a tensor. Empty where torch turns
        the bytes of each number around.
    """
    with clear_failures(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise errors.CorruptCheckpointError(
                f"{path}: it claims to unpack to more than it holds, which torch.save never "
                "writes; it is not unpacked.",
                path=path,
            )
        found: dict[int, set[int]] = {}
        for entry in entries:
            if _DATA.search(entry.filename):
                found.setdefault(entry.file_size, set()).add(entry.CRC)
            if not entry.CRC:  # the writer left it out
                del entry.CRC
            if entry.filename.endswith("/data.pkl"):
                check_pickle(archive.read(entry), path)
            if entry.filename.endswith("/byteorder") and archive.read(entry) != _BYTE_ORDER:
                return {}
    return found


def check_repetition(content: Any, path: str, size_bytes: int) -> None:
    """Raises `CorruptCheckpointError` for tensors that repeat a few bytes without end."""
    repeated = 0
    for tensor in tensors(content):
        if tensor.layout == torch.strided and not tensor.is_meta:
            num_bytes = tensor.numel() * tensor.element_size()
            repeated += max(0, num_bytes - tensor.untyped_storage().nbytes())
    if repeated > size_bytes + _SPARE_BYTES:
        raise errors.CorruptCheckpointError(
            f"{path}: its {size_bytes} bytes are tensors of {repeated} bytes, by repetition; they "
            "are not expanded.",
            path=path,
        )


def tensors(content: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in a tree of mappings, lists and tuples."""
    todo: list[Any] = [content]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            parts = cast("Any", value)
            todo.extend(parts.values() if isinstance(value, Mapping) else parts)
