"""Object stores fulfil the contract of storage backends."""

from __future__ import annotations

import types
import uuid

import pytest
import xxhash
from contract import StorageContract

from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.buckets.base import PreconditionFailed
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


@pytest.mark.parametrize("store", ["gcs", "libcloud", "s3"])
def test_an_object_that_is_gone_is_not_replaced(store: str, request: pytest.FixtureRequest) -> None:
    bucket = connect(request.getfixturevalue(store))[0]._bucket  # type: ignore[attr-defined]
    bucket.write("run/lock", b"old", replacing="")
    version = bucket.head("run/lock").version or xxhash.xxh3_64_hexdigest(b"old")
    bucket.delete(["run/lock"])
    with pytest.raises(PreconditionFailed):
        bucket.write("run/lock", b"new", replacing=version)


def test_an_s3_store_may_answer_that_the_replaced_object_is_not_found(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = connect(s3)[0]._bucket  # type: ignore[attr-defined]

    known = bucket._obstore.exceptions

    def put(*_: object, **options: object) -> None:
        raise known.NotFoundError("404 Not Found: NoSuchKey")

    monkeypatch.setattr(bucket, "_obstore", types.SimpleNamespace(put=put, exceptions=known))
    with pytest.raises(PreconditionFailed):
        bucket.write("run/lock", b"new", replacing="version")
