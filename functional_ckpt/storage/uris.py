"""What the URI of a remote directory looks like."""

from __future__ import annotations

from functional_ckpt import errors

__all__ = ["is_remote", "resolve_uri"]


def is_remote(path: str) -> bool:
    """Whether a path is a URI; those of `file://` have been resolved before."""
    return "://" in path


def resolve_uri(text: str) -> str:
    """A URI without a slash at its end; raises UsageError for what is none."""
    scheme, _, rest = text.partition("://")
    bucket, *parts = rest.split("/")
    if "@" in bucket and ":" in bucket.partition("@")[0]:
        raise errors.UsageError(
            f"{scheme}://...: credentials have no place in a URI, which is logged and stored; give "
            "them in the environment."
        )
    names = [part for part in parts if part]
    if not bucket or not scheme or not {".", ".."}.isdisjoint(names):
        raise errors.UsageError(f"{text}: not a URI such as s3://bucket/run.", path=text)
    return f"{scheme.lower()}://{'/'.join([bucket, *names])}"
