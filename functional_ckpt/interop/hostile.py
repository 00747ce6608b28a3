"""Guards against malicious or damaged files: any failure of a reader is a clear error.

Readers of foreign formats (torch, safetensors, pickle, zipfile, JSON) fail in many ways on damaged
or malicious files. Here their errors become errors of this package, and the claims of a file are
compared with its size before memory is allocated.
"""

from __future__ import annotations

import contextlib
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
_BYTE_ORDER = sys.byteorder.encode()
_DATA = re.compile(r"/data/[^/]*$")
_PUTS = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GETS = frozenset(["GET", "BINGET", "LONG_BINGET"])


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
    """The content of an index, which is text or a pickle: not of a pipe, nor of endless zeros."""
    return local_files.read_regular(path, follow=True)


def check_pickle(data: bytes, path: str) -> None:
    """Raises `CorruptCheckpointError` for a pickle that expands to far more than its size.

    Slots of the memo are numbered one by one: a large number in a small pickle makes the reader ask
    for that many. Containers that hold one another twice, many times over, stand for more objects
    than can ever be visited.
    """
    memo: dict[int, list[int]] = {}
    stack: list[list[int] | None] = []  # sizes, in lists so that containers may grow; None: a mark
    most = 0
    number = 0
    with clear_failures(path):
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
            name = opcode.name
            if name in _PUTS and cast("int", argument) > number:
                raise ValueError(f"memo {argument} of {number}")
            if name in _PUTS or name == "MEMOIZE":
                memo[len(memo) if name == "MEMOIZE" else cast("int", argument)] = _top(stack)
            elif name in _GETS:
                stack.append(memo[cast("int", argument)])
            elif name == "DUP":
                stack.append(_top(stack))
            elif name == "MARK":
                stack.append(None)
            else:
                _apply(opcode, stack)
            if stack and stack[-1] is not None:
                most = max(most, stack[-1][0])
                if most > _FEW_OBJECTS + _MAX_REPETITION * number:
                    raise ValueError("it stands for more objects than can be visited")


def _top(stack: list[list[int] | None]) -> list[int]:
    top = stack[-1]
    if top is None:
        raise ValueError("a mark where an object should be")
    return top


def _apply(opcode: Any, stack: list[list[int] | None]) -> None:
    """Accounts for an opcode's stack inputs as parts of its result."""
    taken = 0
    before, after = opcode.stack_before, opcode.stack_after
    container = None
    if pickletools.markobject in before:
        while (size := stack.pop()) is not None:
            taken += size[0]
        count = before.index(pickletools.markobject)
    else:
        count = len(before)
    for _ in range(count):
        container = stack.pop()
        if container is None:
            raise ValueError("a mark where an object should be")
        taken += container[0]
    if opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
        if container is not None:
            container[0] = taken
            stack.append(container)
        return
    for _ in after:
        stack.append([taken + 1])


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
    """The tensors in a tree of mappings, lists and tuples."""
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
