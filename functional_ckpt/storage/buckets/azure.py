"""Containers of Azure Blob Storage, and of its emulator Azurite, by obstore."""

from __future__ import annotations

import os

from functional_ckpt.storage.buckets.s3 import ObstoreBucket, client_options, import_obstore

_SECRETS = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_KEY", "AZURE_CLIENT_SECRET")


def open_azure(uri: str, name: str) -> ObstoreBucket:
    """Returns the container `name`; obstore reads account and credentials from Azure's variables.

    TensorStore has no driver for it.
    """
    secrets = tuple(os.environ[each] for each in _SECRETS if os.environ.get(each))
    options = client_options(os.environ.get("AZURE_STORAGE_ENDPOINT"))
    store = import_obstore().store.AzureStore(name, **options)
    return ObstoreBucket(uri, store, None, {}, secrets=secrets, copies_at_once=False)
