"""New files and directories: complete and durable when they appear, absent after an error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator

from functional_ckpt import errors
from functional_ckpt.interop.file_names import match_files
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.paths import is_remote, resolve, resolve_local


@contextlib.contextmanager
def atomic_output(
    path: str | os.PathLike[str], storage: LocalStorage | None = None, *, overwrite: bool = False
) -> Generator[str]:
    """Gives a temporary path to write a file or a directory at, and commits it at the end.

    Args:
        path: The final path of the file or directory.
        storage: The file system.
        overwrite: Whether an existing file or directory is replaced.

    Yields:
        The temporary path. Nothing is there yet.

    Raises:
        StepExistsError: Something is at `path`; it is left as it is.
        UsageError: `path` is a URI.
    """
    storage = storage or LocalStorage()
    final = check_destination(path)
    if queries.exists(storage, final) and not overwrite:
        raise errors.StepExistsError(
            f"{final} exists and is never overwritten unless asked for; remove it or choose "
            "another path.",
            path=final,
        )
    commits = commit.protocol(storage, os.path.dirname(final))
    with commits.claimed(final) as claim:
        tmp = os.path.join(claim, os.path.basename(final))
        yield tmp
        is_file = not queries.is_directory(storage, tmp)
        if is_file:
            storage.sync(tmp)
        else:
            commit.sync_tree(storage, tmp, storage.walk(tmp))
        if is_file and queries.kind(storage, final) == "a file" and overwrite:
            storage.rename(tmp, final)
            storage.sync(os.path.dirname(final))
        else:
            commits.publish_claim(tmp, final, overwrite=overwrite)


def check_destination(path: str | os.PathLike[str]) -> str:
    """Returns the absolute path of an output; raises `UsageError` for a URI."""
    return resolve_local(
        path,
        "files of other programs are written to local paths only. Write to a local path, then "
        "copy it there with the tool of the store.",
    )


def check_replaceable(path: str | os.PathLike[str], is_own: Callable[[str], bool]) -> None:
    """Raises `UsageError` if overwriting a directory would remove files of others.

    `is_own` returns whether the writer of the output writes files of this name.
    """
    final = check_destination(path)
    if others := match_files(final, lambda name: not is_own(name)):
        raise errors.UsageError(
            f"{final} also holds {', '.join(others[:8])}, which overwrite=True would remove. "
            "Choose another path, or move them away.",
            path=final,
        )


def check_disjoint(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Raises `UsageError` if one of two paths is, or is inside, the other."""
    first, second = (
        path if is_remote(path) else os.path.realpath(path)
        for path in map(resolve, (source, destination))
    )
    if first == second or _is_inside(first, second) or _is_inside(second, first):
        raise errors.UsageError(
            f"Source and destination overlap: {first}, {second}. Choose another destination.",
            path=second,
        )


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
