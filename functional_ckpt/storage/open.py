"""Connects to the store of a path."""

from __future__ import annotations

from typing import Any

from functional_ckpt import errors
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.buckets.base import Bucket
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.paths import check_arrays_path, is_remote, resolve


def connect(
    path: Any, storage: Storage | None = None, *, is_patient: bool = True
) -> tuple[Storage, str]:
    """Returns the store of a path, and the path in its canonical form.

    Args:
        path: A local path, or a URI: `s3://bucket/run`, `gs://`, `az://`, `oci://bucket@namespace/run`,
            `libcloud://`, or that of any protocol of fsspec.
        storage: The store, if the caller has connected to it.
        is_patient: Whether to retry, for minutes, if the store does not answer.

    Raises:
        UsageError: The URI cannot be used.
        StorageError: The store refuses permanently: no such bucket, no permission.
    """
    resolved = resolve(path)
    if not is_remote(resolved):
        check_arrays_path(resolved)
    if storage is not None:
        check_storage(storage)
        return storage, resolved
    if not is_remote(resolved):
        return LocalStorage(), resolved
    from functional_ckpt.storage.object_store import ObjectStorage  # late: fckpt starts faster

    remote = ObjectStorage(_bucket(resolved))
    remote.probe(is_patient=is_patient)
    return remote, remote.follow(resolved)


def check_storage(storage: object) -> None:
    """Raises `UsageError` unless the value is a store."""
    operations = ("read", "write", "create", "objects")
    if isinstance(storage, type) or not all(hasattr(storage, name) for name in operations):
        raise errors.UsageError(
            f"storage must have the operations of functional_ckpt.storage.base.Storage, or be None "
            f"for the store of the path; got {storage!r:.80}. An object store is chosen by the "
            "path: 's3://bucket/run'."
        )


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
    if scheme in ("az", "abfs", "abfss"):
        from functional_ckpt.storage.buckets import azure

        return azure.open_azure(root, name)
    if scheme == "libcloud":
        from functional_ckpt.storage.buckets import libcloud

        return libcloud.open_libcloud(root, name)
    from functional_ckpt.storage.buckets import fsspec as fsspec_lib

    return fsspec_lib.open_fsspec(root, name)


# Credentials are read at every call: they may be set, or renewed, after this module was imported.


def _s3(root: str, name: str) -> Bucket:
    from functional_ckpt.storage.buckets import credentials, s3

    return s3.open_s3(root, name, credentials.s3_credentials())


def _gcs(root: str, name: str) -> Bucket:
    from functional_ckpt.storage.buckets import credentials, gcs, s3

    found = credentials.gcs_credentials()
    if found is None:
        return gcs.open_gcs(root, name)
    return s3.open_s3(root, name, found)


def _oci(root: str, name: str) -> Bucket:
    from functional_ckpt.storage.buckets import credentials, s3

    bucket, _, namespace = name.partition("@")
    return s3.open_s3(root, bucket, credentials.oci_credentials(namespace))
