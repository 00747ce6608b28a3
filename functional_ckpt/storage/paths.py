"""Validation of paths and URIs."""

from __future__ import annotations

import os
import re
from typing import Any

from functional_ckpt import errors

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def resolve(path: Any) -> str:
    """Returns an absolute local path, or the URI of a remote one without a slash at its end.

    Args:
        path: A string, an `os.PathLike` or an `epath.Path`.

    Raises:
        UsageError: An empty path, an invalid URI, or one with credentials.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise errors.UsageError(
            f"A path must be a str, an os.PathLike or a URI; got {path!r:.80} "
            f"({type(path).__name__})."
        )
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if not text:
        raise errors.UsageError("The path is empty. Give '.' for the current directory.")
    if is_remote(text):
        return _resolve_uri(text)
    if _SCHEME.match(text):  # a URI after pathlib
        raise errors.UsageError(
            f"{text}: a URI has two slashes after its scheme. pathlib.Path removes one: give the "
            "URI as a string.",
            path=text,
        )
    path = os.path.abspath(os.path.expanduser(text))
    return path[1:] if path.startswith("//") else path  # POSIX leaves its meaning to the system


def resolve_local(path: Any, advice: str) -> str:
    """Returns an absolute local path.

    Args:
        path: The user's path.
        advice: The reason why it cannot be a URI, and the fix; the end of the error.

    Raises:
        UsageError: It is a URI.
    """
    resolved = resolve(path)
    if is_remote(resolved):
        raise errors.UsageError(f"{resolved}: {advice}", path=resolved)
    return resolved


def check_no_variables(name: str, value: object) -> None:
    """Raises `UsageError` for `{run_name}` and the like in an argument: it is no template."""
    if found := re.search(r"\{[A-Za-z_]\w*\}", str(value)):
        raise errors.UsageError(
            f"{name}={str(value)!r} contains the variable {found[0]}, which is not replaced: "
            "format it first, e.g. with str.format. Only step_name is a template."
        )


def check_arrays_path(path: str, *, item: str | None = None) -> None:
    """Raises `UsageError` for a local path at which TensorStore could not read arrays.

    TensorStore needs UTF-8, and treats a backslash as a slash: between two of them there must be no
    empty name, `.` or `..`.

    Args:
        path: The path.
        item: The item that gives the path its name; None if a directory does.
    """
    why = None
    if "\0" in path:
        why = "has a NUL byte"
    elif not path.isascii() and not _is_utf8(path):
        why = "is not UTF-8"
    elif "\\" in path and not {"", ".", ".."}.isdisjoint(re.split(r"[/\\]", path)[1:]):
        why = "has a name that starts or ends with a backslash"
    if why is not None:
        named = f"{path!r}" if item is None else f"Item name {item!r}"
        advice = "Rename the directory." if item is None else "Choose another name for the item."
        raise errors.UsageError(
            f"{named} {why}: TensorStore, which reads arrays, cannot open it. {advice}",
            path=path if item is None else None,
            key_path=item,
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_remote(path: str) -> bool:
    """Returns whether a resolved path is a URI; `file://` URIs resolve to local paths."""
    return "://" in path


def _resolve_uri(text: str) -> str:
    """Returns a URI without a slash at its end; raises UsageError if it is invalid."""
    scheme, _, rest = text.partition("://")
    bucket, *parts = rest.split("/")
    if "@" in bucket and ":" in bucket.partition("@")[0]:
        raise errors.UsageError(
            f"{scheme}://...: URIs are logged and stored. Pass credentials through environment "
            "variables, not in the URI."
        )
    names = [part for part in parts if part]
    if not bucket or not scheme or not {".", ".."}.isdisjoint(names):
        raise errors.UsageError(
            f"Invalid URI {text!r}: expected scheme://bucket/path, such as s3://bucket/run.",
            path=text,
        )
    return f"{scheme.lower()}://{'/'.join([bucket, *names])}"
