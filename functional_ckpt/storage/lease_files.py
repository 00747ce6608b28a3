"""A lease in files, for file systems without `flock`: conditional writes by exclusive creation.

    <lock>.<n>    the n-th state of the lease: its holder's record, or a release

A state is replaced by creating its successor, in which only one process can succeed. Numbers are
never reused, so a suspended process cannot mistake an old state for the current one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Mapping

from functional_ckpt.storage.buckets.base import Entry, NotFound, PermanentError, PreconditionFailed

_RELEASED = b"released"


class LeaseFiles:
    """The interface of `buckets.lease` over local files; keys are absolute paths."""

    uri = ""

    def head(self, key: str) -> Entry:
        """Returns the current state; its number is its version."""
        with _clear_errors(key):
            number = self._held(key)
            found = os.stat(f"/{key}.{number}")
            return Entry(key, found.st_size, found.st_mtime_ns, str(number))

    def read(self, key: str) -> bytes:
        """Returns the content of the current state."""
        with _clear_errors(key):
            return _content(key, self._held(key))

    def write(self, key: str, data: bytes, *, replacing: str | None = None) -> Entry:
        """Writes the next state; see `Bucket.write`."""
        with _clear_errors(key):
            number = max(_numbers(key), default=0)
            new = number + 1
            try:
                is_held = number > 0 and _content(key, number) != _RELEASED
                if replacing not in (None, str(number) if is_held else ""):
                    raise PreconditionFailed(key)
                descriptor = os.open(f"/{key}.{new}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except (FileExistsError, FileNotFoundError):  # another process has replaced the state
                raise PreconditionFailed(key) from None
            with open(descriptor, "wb") as file:
                file.write(data)
            # If others continued meanwhile and removed the replaced file, the number was free.
            if max(_numbers(key), default=0) != new:
                _unlink(key, [new])
                raise PreconditionFailed(key)
            _unlink(key, [each for each in _numbers(key) if each < new])
            return self.head(key) if data != _RELEASED else Entry(key, len(data), 0)

    def delete(self, keys: Iterable[str], *, versions: Mapping[str, str] | None = None) -> None:
        """Marks leases as released, if they still have these versions; removes other files."""
        for key in keys:
            if versions and key in versions:
                self.write(key, _RELEASED, replacing=versions[key])
            else:
                with _clear_errors(key):
                    _unlink(key, _numbers(key))

    def redact(self, text: str) -> str:
        """Returns the message unchanged."""
        return text

    def _held(self, key: str) -> int:
        number = max(_numbers(key), default=0)
        if not number or _content(key, number) == _RELEASED:
            raise NotFound(key)
        return number


def _numbers(key: str) -> list[int]:
    folder, name = os.path.split(f"/{key}")
    endings = [each[len(name) + 1 :] for each in os.listdir(folder) if each.startswith(f"{name}.")]
    return [int(each) for each in endings if each.isascii() and each.isdigit()]


def _content(key: str, number: int) -> bytes:
    with open(f"/{key}.{number}", "rb") as file:
        return file.read()


def _unlink(key: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"/{key}.{number}")


@contextlib.contextmanager
def _clear_errors(key: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError:  # another process has replaced the state, or removed the directory
        raise NotFound(key) from None
    except OSError as error:
        raise PermanentError(f"{error.strerror or error}", error.errno or 0) from error
