"""An export within S3: the store copies the bytes; all of the output appears, or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import safetensors.torch
import torch
from full import IS_FULL
from gloo_workers import Workers
from proxy import Proxy
from remote_environment import set_environment

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli import app
from functional_ckpt.interop import huggingface, part_files
from functional_ckpt.storage.buckets.base import (
    NotFound,
    PermanentError,
    PreconditionFailed,
    TransientError,
)
from functional_ckpt.storage.buckets.s3_requests import S3Requests
from functional_ckpt.storage.open import connect

ROWS = 9000 if IS_FULL else 3000  # 36 or 12 MB


@pytest.fixture
def proxy(s3_url: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Generator[Proxy]:
    """A proxy of the server, which the environment leads to."""
    found = Proxy(s3_url)
    set_environment(monkeypatch, found.url)
    yield found
    found.close()


def tensors(rows: int = ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(rows, 1000, generator=generator),
        "norm": torch.randn(1000, generator=generator),
        "scale": torch.tensor(2.0),
        "half": torch.randn(rows, 1000, generator=generator).half(),
        "empty": torch.empty(0, 3),
        "last": torch.randn(rows, 1000, generator=generator),
    }


def content(directory: str) -> dict[str, torch.Tensor]:
    storage, _ = connect(directory)
    found: dict[str, torch.Tensor] = {}
    for name in storage.walk(directory):
        if name.endswith(".safetensors"):
            found |= safetensors.torch.load(storage.read(f"{directory}/{name}"))
    return found


def equal(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return found.keys() == state.keys() and all(found[k].equal(v) for k, v in state.items())


def uploads(root: str) -> int:
    """Returns the number of uploads that are not complete."""
    storage, _ = connect(root)
    bucket: Any = storage._bucket  # type: ignore[attr-defined]
    return bucket._requests.send("GET", "", query={"uploads": ""}).body.count(b"<UploadId>")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_store_copies_the_bytes(s3: str, proxy: Proxy, num_workers: int) -> None:
    state = tensors()
    fc.save(f"{s3}/run/7", {"model": state})
    before = proxy.traffic.up_bytes, proxy.traffic.down_bytes
    command = ["export", f"{s3}/run/7", f"{s3}/out", "--to", "hf", "--workers", str(num_workers)]
    assert app.main([*command, "--max-shard-size", "20MB"]) == 0
    sent = proxy.traffic.up_bytes - before[0], proxy.traffic.down_bytes - before[1]
    total = sum(tensor.nbytes for tensor in state.values())
    num_files = len(connect(s3)[0].walk(f"{s3}/out")) - 1
    # Small tensors and the start of the tensor after them are a part of 5 MiB, in each file.
    limit = (num_files + 1) * 5.2 * 2**20
    assert num_files >= 2 and limit < total
    assert max(sent) <= limit
    assert equal(content(f"{s3}/out"), state)
    index = json.loads(connect(s3)[0].read(f"{s3}/out/model.safetensors.index.json"))
    assert index["weight_map"].keys() == state.keys()
    assert uploads(s3) == 0
    assert app.main(command) == 2  # it exists


@pytest.mark.skipif(not IS_FULL, reason="a GB of a step of two ranks")
def test_shards_of_ranks(s3: str, proxy: Proxy) -> None:
    names = ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    environ = {name: os.environ[name] for name in names}
    workers = Workers()
    try:
        workers.run(2, rank_jobs.save_large, environ, f"{s3}/run/7", 24)
    finally:
        workers.close()
    state = dict(fc.restore(f"{s3}/run/7")["model"])
    inner = state.pop("inner")  # each rank has columns: they go through this process
    total = sum(tensor.nbytes for tensor in state.values())
    before = proxy.traffic.up_bytes, proxy.traffic.down_bytes
    huggingface.export(f"{s3}/run/7", f"{s3}/out")
    sent = proxy.traffic.up_bytes - before[0], proxy.traffic.down_bytes - before[1]
    assert max(sent) - inner.nbytes <= 0.01 * total
    assert equal(content(f"{s3}/out"), {**state, "inner": inner})


@pytest.mark.parametrize("action", ["copy_part", "send_part", "complete"])
def test_a_failure_leaves_nothing(s3: str, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fc.save(f"{s3}/run/7", {"model": tensors(3000)})
    called: list[str] = []
    original = getattr(S3Requests, action)

    def refuse(requests: S3Requests, key: str, *arguments: Any, **options: Any) -> Any:
        called.append(key)
        if len(called) == 2:
            raise PermanentError("AccessDenied", 13)
        return original(requests, key, *arguments, **options)

    monkeypatch.setattr(S3Requests, action, refuse)
    with pytest.raises(errors.StorageError, match="AccessDenied"):
        huggingface.export(
            f"{s3}/run/7", f"{s3}/out", max_shard_size="15MB", config={"model_type": "x"}
        )
    assert len(called) >= 2
    assert connect(s3)[0].walk(f"{s3}/out") == {} and uploads(s3) == 0


@pytest.mark.parametrize("refusal", [NotFound, PreconditionFailed])
def test_a_lost_answer(
    s3: str, tmp_path: Path, refusal: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request finds no upload any more, or an object: services differ."""
    complete = S3Requests.complete
    called: list[str] = []

    def lose(requests: S3Requests, key: str, *arguments: Any, **options: Any) -> None:
        called.append(key)
        if len(called) == 2:
            raise refusal(key)
        complete(requests, key, *arguments, **options)
        raise TransientError("no answer")

    monkeypatch.setattr(S3Requests, "complete", lose)
    fc.save(tmp_path / "step", {"model": {"a": torch.ones(3)}})
    huggingface.export(tmp_path / "step", f"{s3}/out")
    assert len(called) == 2 and equal(content(f"{s3}/out"), {"a": torch.ones(3)})


def test_an_object_that_was_replaced_meanwhile(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the tests does not compare versions: they are compared at the end."""
    fc.save(f"{s3}/run/7", {"model": tensors(3000)})
    storage, _ = connect(s3)
    files = storage.walk(f"{s3}/run/7/model")
    file = next(name for name in files if name.endswith(".safetensors"))
    seen: list[Any] = []
    send, sends = part_files.send_files, S3Requests.send

    def replace(*arguments: Any) -> Any:
        found = send(*arguments)
        assert storage.objects is not None
        storage.objects.overwrite(f"{s3}/run/7/model/{file}", bytes(files[file].size_bytes))
        return found

    def note(*arguments: Any, **options: Any) -> Any:
        seen.append(options.get("headers") or {})
        return sends(*arguments, **options)

    monkeypatch.setattr(part_files, "send_files", replace)
    monkeypatch.setattr(S3Requests, "send", note)
    with pytest.raises(errors.StorageError, match=r"the object changed while the step was"):
        huggingface.export(f"{s3}/run/7", f"{s3}/out")
    copies = [headers for headers in seen if "x-amz-copy-source" in headers]
    versions = {headers["x-amz-copy-source-if-match"] for headers in copies}
    assert copies and versions <= {found.version for found in files.values()}
    assert storage.walk(f"{s3}/out") == {} and uploads(s3) == 0


def test_a_local_step_goes_through_the_client(s3: str, tmp_path: Path) -> None:
    state = tensors(1500)
    fc.save(tmp_path / "step", {"model": state})
    huggingface.export(tmp_path / "step", f"{s3}/out/model.safetensors", num_workers=2)
    assert equal(content(f"{s3}/out"), state)
    huggingface.export(tmp_path / "step", f"{s3}/two", max_shard_size="7MB", num_workers=2)
    assert equal(content(f"{s3}/two"), state) and uploads(s3) == 0


def test_what_a_store_does_not_take(s3: str, tmp_path: Path) -> None:
    fc.save(tmp_path / "step", {"model": {"a": torch.ones(3)}})
    step = str(tmp_path / "step")
    with pytest.raises(errors.UsageError, match="at local paths only"):
        huggingface.export(step, f"{s3}/out", dtype=torch.bfloat16)
    with pytest.raises(errors.UsageError, match="at local paths only"):
        huggingface.export(step, f"{s3}/out", format="bin")
    with pytest.raises(errors.UsageError, match="overwrites nothing"):
        huggingface.export(step, f"{s3}/out", overwrite=True)
    with pytest.raises(errors.UsageError, match="Write to a local path, then copy it there"):
        huggingface.export(step, "memory://bucket/out")
    assert connect(s3)[0].walk(f"{s3}/out") == {}
