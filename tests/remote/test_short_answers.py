"""A store that answers with too few bytes, or keeps too few, is asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from functional_ckpt.storage.buckets import fsspec, gcs, libcloud, s3
from functional_ckpt.storage.buckets.base import Entry, TransientError
from functional_ckpt.storage.object_store import ObjectStorage

CONTENT = bytes(range(100))


def gcs_bucket(num_bytes: int) -> tuple[Any, mock.Mock]:
    client = mock.Mock()
    blob = client.bucket.return_value.blob.return_value
    blob.download_as_bytes.return_value = CONTENT[:num_bytes]
    blob.size = num_bytes
    return gcs.GcsBucket("gs://bucket", "bucket", client), blob.download_as_bytes


def s3_bucket(num_bytes: int) -> tuple[Any, mock.Mock]:
    bucket = s3.ObstoreBucket("s3://bucket", None, {}, {})
    bucket._obstore = library = mock.Mock(exceptions=bucket._obstore.exceptions)
    library.get_range.return_value = CONTENT[:num_bytes]
    bucket.head = lambda key: Entry(key, num_bytes, 0, None)
    return bucket, library.get_range


def fsspec_bucket(num_bytes: int) -> tuple[Any, mock.Mock]:
    system = mock.Mock()
    system.cat_file.side_effect = lambda path, start, end: CONTENT[start:end]
    system.info.return_value = {"type": "file", "name": "top/key", "size": num_bytes}
    return fsspec.FsspecBucket("memory://top", system, "top"), system.cat_file


def libcloud_bucket(num_bytes: int) -> tuple[Any, mock.Mock]:
    driver = mock.Mock()
    driver.get_object.return_value = mock.Mock(size=num_bytes, extra={}, hash=None)
    driver.get_object.return_value.name = "key"
    bucket = libcloud.LibcloudBucket("libcloud://local:b", driver, mock.Mock(), ())
    return bucket, driver.download_object_as_stream


@pytest.mark.parametrize("make", [gcs_bucket, s3_bucket])
def test_a_part_that_is_too_short_is_a_passing_error(make: Any) -> None:
    pytest.importorskip("google.cloud.storage")
    bucket, request = make(5)
    assert bucket.read("key", 10, 15) == CONTENT[:5]
    assert bucket.read("key", 7, 7) == b"" and request.call_count == 1, "nothing is asked for"
    with pytest.raises(TransientError, match="5 bytes received of 8"):
        bucket.read("key", 10, 18)


@pytest.mark.parametrize("make", [gcs_bucket, s3_bucket, fsspec_bucket, libcloud_bucket])
def test_a_file_that_arrives_cut_is_a_passing_error(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("google.cloud.storage")
    pytest.importorskip("libcloud")
    path = str(tmp_path / "file")
    Path(path).write_bytes(CONTENT)
    make(100)[0].upload(path, "key")
    with pytest.raises(TransientError, match=r"99 bytes uploaded of 100|differs after"):
        make(99)[0].upload(path, "key")


def test_an_object_that_is_longer_than_its_file_is_a_passing_error(tmp_path: Path) -> None:
    Path(tmp_path / "file").write_bytes(CONTENT[:-1])
    fsspec_bucket(99)[0].upload(str(tmp_path / "file"), "key")
    with pytest.raises(TransientError, match="differs after"):
        fsspec_bucket(100)[0].upload(str(tmp_path / "file"), "key")


def test_a_store_is_asked_for_no_byte_beyond_the_end_of_an_object() -> None:
    asked: list[tuple[int, int | None]] = []
    bucket = mock.Mock(uri="memory://top")
    bucket.head.return_value = Entry("key", 100, 0, None)
    bucket.read.side_effect = lambda _, begin, end: asked.append((begin, end)) or CONTENT[begin:end]
    storage = ObjectStorage(bucket)
    assert storage.read("memory://top/key", 90, 50) == CONTENT[90:]
    assert storage.read("memory://top/key", 10, 5) == CONTENT[10:15]
    assert storage.read("memory://top/key", 100, 5) == b""
    assert storage.read("memory://top/key") == CONTENT
    assert asked == [(90, 100), (10, 15), (0, None)]
