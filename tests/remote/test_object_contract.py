"""Object stores do what every backend of storage must do."""

from __future__ import annotations

import pytest
from contract import StorageContract

from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.connect import connect


class TestS3(StorageContract):
    @pytest.fixture
    def storage(self, s3: str) -> Storage:
        return connect(s3)[0]

    @pytest.fixture
    def root(self, s3: str) -> str:
        return f"{s3}/run"
