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
    # Credentials are read at every call: they may be set, or renewed, after this module's import.
    if scheme in ("s3", "s3a", "gs", "gcs", "oci"):
        from functional_ckpt.storage.buckets import credentials, gcs, s3

        if scheme == "oci":
            bucket, _, namespace = name.partition("@")
            return s3.open_s3(root, bucket, credentials.oci_credentials(namespace))
        is_google = scheme.startswith("g")
        found = credentials.gcs_credentials() if is_google else credentials.s3_credentials()
        return gcs.open_gcs(root, name) if found is None else s3.open_s3(root, name, found)
    if scheme in ("az", "abfs", "abfss"):
        from functional_ckpt.storage.buckets import azure

        return azure.open_azure(root, name)
    if scheme == "libcloud":
        from functional_ckpt.storage.buckets import libcloud

        return libcloud.open_libcloud(root, name)
    from functional_ckpt.storage.buckets import fsspec as fsspec_lib

    return fsspec_lib.open_fsspec(root, name)
