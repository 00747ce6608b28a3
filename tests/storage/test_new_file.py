"""New files on file systems that know no direct writes, or cannot reserve space."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from functional_ckpt import errors
from functional_ckpt.storage import new_file

Write = Callable[[], bytes]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write() -> bytes:
        file = new_file.LocalFile(str(tmp_path / "file"), 10, is_direct=True)
        file.write([memoryview(b"0123"), memoryview(b"456789")], 0)
        file.close()
        return (tmp_path / "file").read_bytes()

    return write


@pytest.fixture
def direct_error(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def refuse_with(code: int) -> None:
        def refuse(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(code, os.strerror(code), path)
            return real(path, flags, mode, **options)

        real = os.open
        monkeypatch.setattr(os, "open", refuse)

    return refuse_with


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP], ids=os.strerror)
def test_a_file_system_without_direct_writes_is_written_through_the_cache(
    code: int, write: Write, direct_error: Callable[[int], None]
) -> None:
    direct_error(code)
    assert write() == b"0123456789"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EIO], ids=os.strerror)
def test_another_error_of_a_direct_open_is_raised(
    code: int, write: Write, direct_error: Callable[[int], None]
) -> None:
    direct_error(code)
    with pytest.raises(errors.StorageError) as caught:
        write()
    assert caught.value.errno == code


@pytest.mark.parametrize(
    ("code", "is_raised"),
    [
        (errno.ENOSPC, True),
        (errno.EDQUOT, True),
        (errno.EFBIG, True),
        (errno.EIO, True),
        (errno.EOPNOTSUPP, False),
        (errno.ENOSYS, False),
    ],
    ids=lambda value: os.strerror(value) if not isinstance(value, bool) else "",
)
def test_space_that_cannot_be_reserved_is_an_error_if_the_disk_says_so(
    code: int, is_raised: bool, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(new_file, "_fallocate", lambda: fail)
    if not is_raised:
        assert write() == b"0123456789"
        return
    with pytest.raises(errors.StorageError) as caught:
        write()
    assert caught.value.errno == code
