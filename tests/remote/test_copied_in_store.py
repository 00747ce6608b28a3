"""An object store copies the files that stay the same from step to step: they are not sent."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from full import IS_FULL
from proxy import Proxy
from remote_environment import set_environment, set_gcs_environment

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.storage.base import Stat
from functional_ckpt.storage.buckets import s3_requests
from functional_ckpt.storage.buckets.base import PermanentError
from functional_ckpt.storage.buckets.credentials import S3Credentials
from functional_ckpt.storage.open import connect
from functional_ckpt.verify import verify
from functional_ckpt.verify.shared import note_damage

SIZE = 1100  # the base has 5 MB, the adapter 0.4


class Adapted(torch.nn.Module):
    """A frozen base with a trained adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.adapter = torch.nn.Linear(SIZE, 100)


class Run:
    """Saves steps of a model, and counts the bytes sent for each."""

    def __init__(self, proxy: Proxy) -> None:
        torch.manual_seed(0)
        self.model = Adapted()
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.sent: dict[int, int] = {}
        self._proxy = proxy

    def save(self, manager: fc.CheckpointManager, *steps: int) -> None:
        for step in steps:
            torch.nn.init.normal_(self.model.adapter.weight)
            before = self._proxy.traffic.up_bytes
            manager.save(step, {"model": self.model})
            manager.wait_until_finished()
            self.sent[step] = self._proxy.traffic.up_bytes - before
            self.states[step] = {k: v.clone() for k, v in self.model.state_dict().items()}

    def restore(self, manager: fc.CheckpointManager) -> None:
        manager.restore_or({"model": self.model})

    def check(self, root: str) -> None:
        for step, state in self.states.items():
            assert verify(f"{root}/{step}") == []
            found = dict(fc.restore(f"{root}/{step}")["model"])
            assert not testing.differences(state, found)

    def is_small(self, step: int) -> bool:
        """Whether no more was sent than has changed."""
        parameters = self.model.adapter.parameters()
        return self.sent[step] <= 1.1 * sum(each.nbytes for each in parameters)


FULL_ONLY = pytest.mark.skipif(not IS_FULL, reason="a full run has it")


@pytest.fixture(params=["s3", pytest.param("gcs", marks=FULL_ONLY)])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[Proxy]:
    """A proxy of each server in turn, which the environment leads to."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    found = Proxy(url)
    (set_environment if request.param == "s3" else set_gcs_environment)(monkeypatch, found.url)
    yield found
    found.close()


@pytest.fixture
def root(proxy: Proxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory of a new bucket, behind the proxy."""
    kind = request.node.callspec.params["proxy"]
    uri: str = request.getfixturevalue(kind)
    (set_environment if kind == "s3" else set_gcs_environment)(monkeypatch, proxy.url)
    return f"{uri}/run"


def test_a_run_in_a_store_sends_what_changed(proxy: Proxy, root: str) -> None:
    run = Run(proxy)
    with fc.CheckpointManager(root) as manager:
        run.save(manager, 1, 2)
    with fc.CheckpointManager(root) as manager:
        run.restore(manager)
        run.save(manager, 3)
        manager.delete(1)
        del run.states[1]
        run.save(manager, 4)
    assert [run.is_small(step) for step in (1, 2, 3, 4)] == [False, True, True, True]
    run.check(root)


def test_a_tier_is_sent_what_changed(proxy: Proxy, root: str, tmp_path: Path) -> None:
    run = Run(proxy)
    keep = fc.policies.LatestN(2)
    for steps in ((1, 2), (3, 4)):
        tiers = [fc.Tier(path=root, keep=keep)]
        with fc.CheckpointManager(tmp_path / "run", keep_policy=keep, tiers=tiers) as manager:
            run.save(manager, *steps)
    assert [run.is_small(step) for step in (1, 2, 3, 4)] == [False, True, True, True]
    del run.states[1], run.states[2]
    run.check(root)
    run.check(str(tmp_path / "run"))


@FULL_ONLY
def test_overwritten_steps_of_a_tier_are_whole(proxy: Proxy, root: str, tmp_path: Path) -> None:
    run = Run(proxy)
    tiers = [fc.Tier(path=root)]
    with fc.CheckpointManager(tmp_path / "run", overwrite=True, tiers=tiers) as manager:
        run.save(manager, 1, 2, 2)
        assert run.is_small(2)
        torch.nn.init.normal_(run.model.base.weight)
        run.save(manager, 2, 3)
    assert run.is_small(3)
    run.check(root)


@FULL_ONLY
def test_a_run_that_shares_nothing(proxy: Proxy, root: str) -> None:
    run = Run(proxy)
    with fc.CheckpointManager(root, share_unchanged=False) as manager:
        run.save(manager, 1, 2)
    assert not run.is_small(2)


# ------------------------------------------------------------------------------ copies


def replaced(root: str, step: int) -> None:
    """Replaces the large file of a step by another object of the same size."""
    storage, _ = connect(root)
    name, found = max(storage.walk(f"{root}/{step}").items(), key=lambda each: each[1].size_bytes)
    storage.put_file("/dev/null", f"{root}/{step}/{name}")
    assert storage.objects is not None
    storage.objects.overwrite(f"{root}/{step}/{name}", bytes(found.size_bytes))


@pytest.mark.parametrize("is_tier", [False, True], ids=["run", "tier"])
def test_an_object_that_was_replaced_is_not_copied(
    proxy: Proxy, root: str, tmp_path: Path, is_tier: bool
) -> None:
    run = Run(proxy)
    tiers = [fc.Tier(path=root)] if is_tier else []
    with fc.CheckpointManager(tmp_path if is_tier else root, tiers=tiers) as manager:
        run.save(manager, 1)
        replaced(root, 1)
        run.save(manager, 2, 3)
    assert not run.is_small(2) and run.is_small(3)
    del run.states[1]
    run.check(root)


@FULL_ONLY
def test_nothing_is_copied_after_a_verification_found_damage(
    proxy: Proxy, root: str, tmp_path: Path
) -> None:
    run = Run(proxy)
    with fc.CheckpointManager(tmp_path, tiers=[fc.Tier(path=root)]) as manager:
        run.save(manager, 1)
        storage, _ = connect(root)
        names = storage.walk(f"{root}/1")
        note_damage(storage, f"{root}/1", names)
        time.sleep(1.1)  # the times of objects are in seconds
        run.save(manager, 2, 3)
    assert not run.is_small(2) and run.is_small(3)
    run.check(root)


def shared(root: str, data: bytes, before: Callable[[str], object]) -> tuple[bool, bytes | None]:
    """Shares an object; returns whether it did, and the content of the new one."""
    storage, _ = connect(root)
    storage.write(f"{root}/old", data)
    found = storage.stat(f"{root}/old")
    assert found is not None
    before(f"{root}/old")
    is_shared = storage.share(f"{root}/new é+%", f"{root}/old", found)
    there = storage.stat(f"{root}/new é+%")
    return is_shared, None if there is None else storage.read(f"{root}/new é+%")


def test_share(bucket: str) -> None:
    root = f"{bucket}/run"
    storage, _ = connect(root)
    assert storage.objects is not None
    assert shared(f"{root}/a", b"x" * 100, lambda old: None) == (True, b"x" * 100)
    change = functools.partial(storage.objects.overwrite, data=b"y" * 100)
    assert shared(f"{root}/b", b"x" * 100, change) == (False, None)
    assert shared(f"{root}/c", b"x" * 100, storage.remove) == (False, None)
    assert not storage.share(f"{root}/e", f"{root}/a/old", Stat("a file", 100))


# ------------------------------------------------------------------------------------------ S3


@pytest.fixture
def s3_run(s3: str) -> str:
    return f"{s3}/run"


@pytest.mark.parametrize("has_key", [True, False], ids=["key", "role"])
def test_share_in_s3(s3_run: str, has_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, _ = connect(s3_run)
    bucket: Any = storage._bucket  # type: ignore[attr-defined]
    asked: list[dict[str, str]] = []
    if has_key:
        send = bucket._requests.send

        def note(*arguments: Any, **options: Any) -> Any:
            asked.append(options["headers"])
            return send(*arguments, **options)

        monkeypatch.setattr(bucket._requests, "send", note)
    else:
        monkeypatch.setattr(bucket, "_requests", None)
    storage.write(f"{s3_run}/old", b"x")
    found = storage.stat(f"{s3_run}/old")
    assert found is not None and storage.objects is not None
    assert storage.share(f"{s3_run}/new", f"{s3_run}/old", found)
    for headers in asked:  # the server of the tests compares neither
        assert headers["x-amz-copy-source-if-match"] == found.version
        assert headers["if-none-match"] == "*"
    assert bool(asked) == has_key
    storage.objects.overwrite(f"{s3_run}/old", b"y")
    assert not storage.share(f"{s3_run}/newer", f"{s3_run}/old", found)
    assert storage.stat(f"{s3_run}/newer") is None


def test_large_objects_are_copied_in_parts(
    s3_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_requests, "MAX_COPY_BYTES", 6 * 2**20)
    monkeypatch.setattr("functional_ckpt.storage.buckets.s3.MAX_COPY_BYTES", 6 * 2**20)
    monkeypatch.setattr(s3_requests, "PART_BYTES", 5 * 2**20)
    storage, _ = connect(s3_run)
    data = torch.randint(0, 256, (13 * 2**20,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "file").write_bytes(data)
    storage.put_file(str(tmp_path / "file"), f"{s3_run}/step/old")
    found = storage.stat(f"{s3_run}/step/old")
    assert found is not None
    assert storage.share(f"{s3_run}/new", f"{s3_run}/step/old", found)
    assert storage.read(f"{s3_run}/new") == data
    storage.rename(f"{s3_run}/step", f"{s3_run}/renamed")
    assert storage.read(f"{s3_run}/renamed/old") == data


def test_a_copy_that_is_refused_is_sent(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermanentError("AccessDenied", 13)

    proxy = Proxy(s3_url)
    set_environment(monkeypatch, proxy.url)
    monkeypatch.setattr(s3_requests.S3Requests, "send", refuse)
    run = Run(proxy)
    with fc.CheckpointManager(f"{s3}/run") as manager:
        run.save(manager, 1, 2)
    assert not run.is_small(2)
    run.check(f"{s3}/run")
    proxy.close()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, b"<Error><Code>NoSuchKey</Code></Error>", "NotFound"),
        (412, b"<Error><Code>PreconditionFailed</Code></Error>", "PreconditionFailed"),
        (503, b"<Error><Code>SlowDown</Code></Error>", "TransientError"),
        (501, b"<Error><Code>NotImplemented</Code></Error>", "PermanentError"),
        (403, b"<Error><Code>AccessDenied</Code></Error>", "PermanentError"),
        (200, b"<?xml?><Error><Code>InternalError</Code></Error>", "TransientError"),
        (200, b"<?xml?><Error><Code>AccessDenied</Code></Error>", "PermanentError"),
        (200, b"", "TransientError"),
    ],
)
def test_refusals(s3: str, s3_url: str, status: int, body: bytes, error: str) -> None:
    proxy = Proxy(s3_url)
    proxy.refusal = status, body
    found = S3Credentials(endpoint=proxy.url, region=None, key_id="key", secret="secret")
    requests = s3_requests.S3Requests("bucket", found)
    with pytest.raises(Exception, match=r".") as raised:
        requests.start("key")
    proxy.close()
    assert type(raised.value).__name__ == error


def test_signatures_are_those_of_aws() -> None:
    auth: Any = pytest.importorskip("botocore.auth")
    awsrequest: Any = pytest.importorskip("botocore.awsrequest")
    credentials: Any = pytest.importorskip("botocore.credentials")
    # The example of AWS's documentation, of a GET with a range.
    example = S3Credentials(
        endpoint=None,
        region=None,
        key_id="AKIAIOSFODNN7EXAMPLE",
        secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    )
    then = datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC)
    host = "examplebucket.s3.amazonaws.com"
    headers = s3_requests.signed_headers(
        example, "us-east-1", "GET", host, "/test.txt", "", {"range": "bytes=0-9"}, b"", then
    )
    assert headers["authorization"].endswith(
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )
    # A request with a token, a query and names that are quoted.
    found = S3Credentials(endpoint=None, region="x", key_id="key", secret="secret", token="token")
    now = datetime.datetime.now(datetime.UTC)
    path, query = "/bucket/a%20b%C3%A9", "partNumber=1&uploadId=a%2Fb"
    more = {"x-amz-copy-source": "/bucket/c%2B", "x-amz-copy-source-if-match": '"etag"'}
    own = s3_requests.signed_headers(
        found, "x", "PUT", "localhost:99", path, query, more, b"body", now
    )
    url = f"http://localhost:99{path}?{query}"
    request = awsrequest.AWSRequest(method="PUT", url=url, data=b"body", headers=more)
    request.context["payload_signing_enabled"] = True
    request.context["timestamp"] = own["x-amz-date"]
    signer = auth.S3SigV4Auth(credentials.Credentials("key", "secret", "token"), "s3", "x")
    signer._modify_request_before_signing(request)
    text = signer.string_to_sign(request, signer.canonical_request(request))
    assert own["authorization"].endswith(f"Signature={signer.signature(text, request)}")
