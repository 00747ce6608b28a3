"""From a path to the store that it is in."""

from __future__ import annotations

from typing import Any

from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.bucket import Bucket
from functional_ckpt.storage.objects import ObjectStorage
from functional_ckpt.storage.paths import LocalStorage, resolve
from functional_ckpt.storage.uris import is_remote

__all__ = ["connect"]


def connect(path: Any, storage: Storage | None = None) -> tuple[Storage, str]:
    """The store of a path, and the path as the store knows it.

    Args:
        path: A local path, or a URI: `s3://bucket/run`, `gs://`, `oci://bucket@namespace/run`,
            `libcloud://`, or that of any protocol of fsspec.
        storage: The store, if the caller has made it.

    Raises:
        UsageError: The URI cannot be used.
        StorageError: The store refuses, now and for ever: no such bucket, no permission.
    """
    resolved = resolve(path)
    if storage is not None:
        return storage, resolved
    if not is_remote(resolved):
        return LocalStorage(), resolved
    remote = ObjectStorage(_bucket(resolved))
    remote.probe()
    return remote, remote.follow(resolved)


def _bucket(uri: str) -> Bucket:
    scheme, _, rest = uri.partition("://")
    name = rest.partition("/")[0]
    root = f"{scheme}://{name}"
    if scheme in ("s3", "s3a"):
        return _s3(root, name)
    if scheme in ("gs", "gcs"):
        return _gcs(root, name)
    if scheme == "oci":
        return _oci(root, name)
    if scheme == "libcloud":
        from functional_ckpt.storage import bucket_libcloud

        return bucket_libcloud.open_libcloud(root, name)
    from functional_ckpt.storage import bucket_fsspec

    return bucket_fsspec.open_fsspec(root, name)


# Credentials are read at every call: they may be set, or renewed, after this module was imported.


def _s3(root: str, name: str) -> Bucket:
    from functional_ckpt.storage import access, bucket_obstore

    return bucket_obstore.open_s3(root, name, access.s3_access())


def _gcs(root: str, name: str) -> Bucket:
    from functional_ckpt.storage import access, bucket_gcs, bucket_obstore

    found = access.gcs_access()
    if found is None:
        return bucket_gcs.open_gcs(root, name)
    return bucket_obstore.open_s3(root, name, found)


def _oci(root: str, name: str) -> Bucket:
    from functional_ckpt.storage import access, bucket_obstore

    bucket, _, namespace = name.partition("@")
    return bucket_obstore.open_s3(root, bucket, access.oci_access(namespace))
