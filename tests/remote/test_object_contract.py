"""Object stores fulfil the contract of storage backends."""

from __future__ import annotations

import uuid

import pytest
from contract import StorageContract

from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import connect


class TestFsspec(StorageContract):
    """A protocol that TensorStore has no driver for."""

    @pytest.fixture
    def storage(self, root: str) -> Storage:
        return connect(root)[0]

    @pytest.fixture
    def root(self) -> str:
        return f"memory://bucket-{uuid.uuid4().hex[:8]}/run"


class TestGcs(StorageContract):
    @pytest.fixture
    def storage(self, gcs: str) -> Storage:
        return connect(gcs)[0]

    @pytest.fixture
    def root(self, gcs: str) -> str:
        return f"{gcs}/run"


class TestLibcloud(StorageContract):
    """Its provider that keeps containers in a directory."""

    @pytest.fixture
    def storage(self, libcloud: str) -> Storage:
        return connect(libcloud)[0]

    @pytest.fixture
    def root(self, libcloud: str) -> str:
        return f"{libcloud}/run"


class TestS3(StorageContract):
    @pytest.fixture
    def storage(self, s3: str) -> Storage:
        return connect(s3)[0]

    @pytest.fixture
    def root(self, s3: str) -> str:
        return f"{s3}/run"
