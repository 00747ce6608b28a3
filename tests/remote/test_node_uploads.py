"""Nodes that share the first tier upload one step together; here as threads of one process."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import copying
import numpy as np
import orbax.checkpoint as ocp
import pytest
import rank_jobs
import servers
import torch
from full import IS_FULL
from gloo_workers import Workers
from proxy import Proxy

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.files.dealing import deal
from functional_ckpt.distributed.coordinator import MemoryBoard
from functional_ckpt.events import Events
from functional_ckpt.steps import names, upload_helper, upload_shares
from functional_ckpt.steps.remote_tier import RemoteTier
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_helper import UploadHelper
from functional_ckpt.steps.upload_shares import Shares
from functional_ckpt.steps.upload_step import Upload, files_of
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.verify import checkpoint

NUM_ITEMS = 16
_RATE = 4e6  # bytes per second of each node's connection


def _items(value: float) -> dict[str, object]:
    return {f"part{n}": {"w": torch.full((100_000,), value + n)} for n in range(NUM_ITEMS)}


class _Counting(LocalStorage):
    """A file system that counts the bytes of copied files; `before` is called with each path."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._mutex = threading.Lock()
        self.before: Callable[[str], None] = lambda _: None

    def put_file(self, source: str, path: str) -> None:
        self.before(source)
        with self._mutex:
            self.num_bytes += Path(source).stat().st_size
        super().put_file(source, path)


@dataclasses.dataclass(slots=True)
class _Nodes:
    """The primary's node and another one, with step 3 in the first tier and an empty second one."""

    near: Path
    far: Path
    board: MemoryBoard
    storages: tuple[_Counting, _Counting]
    helper: UploadHelper

    def upload(self, check: Callable[[], None] = lambda: None) -> int:
        """Uploads the step on the primary; returns the number of bytes of both nodes."""
        source, final = str(self.near / "3"), str(self.far / "3")
        shares = Shares(self.board, 0, (1,), check, lambda _: None)
        remote = _steps(self.far, self.storages[0])
        local = _steps(self.near, LocalStorage())
        num_bytes = Upload(local, remote, source, final, 3, may_replace=False, shares=shares).run()
        shares.close()
        return num_bytes

    def check(self) -> None:
        assert checkpoint.verify_checkpoint(LocalStorage(), str(self.far / "3"), 3) == []
        for n, item in enumerate(fc.restore(self.far / "3")[f"part{n}"] for n in range(NUM_ITEMS)):
            assert float(item["w"].min()) == float(item["w"].max()) == 1.0 + n
        assert [each.name for each in self.far.iterdir()] == ["3"]


def _steps(root: Path, storage: LocalStorage) -> TierSteps:
    return TierSteps(
        storage, str(root), names.StepName(), Events(None), read_only=True, latest_link=None
    )


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[_Nodes]:
    monkeypatch.setattr(upload_shares, "SILENT_SECONDS", 60.0)  # on a busy machine
    monkeypatch.setattr(upload_shares, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(upload_helper, "BEAT_SECONDS", 0.05)
    near, far = tmp_path / "near", tmp_path / "far"
    far.mkdir()
    with fc.CheckpointManager(near) as manager:
        manager.save(3, _items(1.0))
    board, storages = MemoryBoard(), (_Counting(), _Counting())
    tier = RemoteTier(
        str(far), lambda: _steps(far, storages[1]), rule=None, keep=(), max_delay_seconds=None
    )
    helper = UploadHelper(_steps(near, LocalStorage()), tier, board, 0, 1)
    yield _Nodes(near, far, board, storages, helper)
    helper.stop()


def test_each_node_uploads_its_share(nodes: _Nodes) -> None:
    num_bytes = nodes.upload()
    sent = [each.num_bytes for each in nodes.storages]
    assert sum(sent) == num_bytes
    assert all(abs(each - num_bytes / 2) < 0.05 * num_bytes for each in sent)
    nodes.check()
    nodes.helper.close()  # at once: the primary has closed


def test_a_node_that_dies_within_its_share_is_replaced(
    nodes: _Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_shares, "SILENT_SECONDS", 0.3)
    dead, over = threading.Event(), threading.Event()
    report = nodes.helper._report

    def die(path: str) -> None:
        if nodes.storages[1].num_bytes > 1_000_000:
            dead.set()
            over.wait(60)

    nodes.storages[1].before = die
    monkeypatch.setattr(
        nodes.helper, "_report", lambda state: None if dead.is_set() else report(state)
    )
    try:
        nodes.upload()
        assert dead.is_set() and nodes.storages[1].num_bytes > 1_000_000
        nodes.check()
    finally:
        over.set()


@pytest.mark.parametrize("kind", [errors.StorageError, ValueError])
def test_files_that_a_node_cannot_send_are_sent_by_the_primary(
    kind: type[Exception], nodes: _Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: str) -> None:
        raise kind("no network")

    nodes.storages[1].before = fail
    num_bytes = nodes.upload()
    assert nodes.storages[0].num_bytes == num_bytes and nodes.storages[1].num_bytes == 0
    assert "no network" in caplog.text
    nodes.check()


def test_damage_that_another_node_finds_is_reported_by_the_primary(nodes: _Nodes) -> None:
    for file in nodes.near.rglob("*.safetensors"):
        file.chmod(0o644)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(errors.CorruptCheckpointError, match="changed after it was committed"):
        nodes.upload()
    assert not (nodes.far / "3").exists()


def test_a_node_whose_primary_is_silent_sends_nothing_more(
    nodes: _Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The primary may be suspended, and have lost the tier to another job."""
    monkeypatch.setattr(upload_helper, "_FRESH_SECONDS", 0.2)
    started, resumed = threading.Event(), threading.Event()

    def suspend(path: str) -> None:
        started.set()
        resumed.wait(20)

    nodes.storages[1].before = suspend
    shares = Shares(nodes.board, 0, (1,), _lost, lambda _: None)
    source, final = str(nodes.near / "3"), str(nodes.far / "3")
    files, _ = files_of(LocalStorage(), source)
    senders = shares.senders(3, files)
    with shares.dealt(source, f"{final}.tmp", files, senders) as dealt:
        assert started.wait(60)
        time.sleep(0.5)
        resumed.set()
        shares.wait(lambda _: None)
    dealt_bytes = sum(files[name].size_bytes for name in dealt[1])
    assert nodes.storages[1].num_bytes < 0.7 * dealt_bytes


def _lost() -> None:
    raise errors.LockedError("another writer took it over")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_equal_within_the_largest_file(count: int) -> None:
    draw = random.Random(count)
    sizes = {str(n): draw.randrange(10**6) for n in range(40)}
    shares = deal(sizes, count)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert max(loads) <= 1.1 * sum(loads) / count


@dataclasses.dataclass(slots=True)
class _Cluster:
    """Two ranks on nodes of their own, each with a proxy of its own to an S3 server."""

    proxies: tuple[Proxy, Proxy]
    far: str
    workers: Workers

    def upload(self, near: Path, nodes: str, values: torch.Tensor, *, dies: int = -1) -> float:
        """Uploads a step from the nodes of these names; returns the seconds."""
        environs = [
            {**servers.environment(proxy.url), "FUNCTIONAL_CKPT_NODE": node}
            for proxy, node in zip(self.proxies, nodes, strict=True)
        ]
        for proxy in self.proxies:
            proxy.traffic.up_bytes = 0
        far = f"{self.far}/{near.name}"
        return self.workers.outcomes(2, rank_jobs.upload, environs, str(near), far, values, dies)[0]


@pytest.fixture
def cluster(s3: str, s3_url: str) -> Generator[_Cluster]:
    proxies, workers = (Proxy(s3_url), Proxy(s3_url)), Workers()
    yield _Cluster(proxies, s3, workers)
    workers.close()
    for proxy in proxies:
        proxy.close()


@pytest.mark.skipif(not IS_FULL, reason="processes, a server, and seconds of uploads")
def test_two_nodes_upload_almost_twice_as_fast_as_one(cluster: _Cluster, tmp_path: Path) -> None:
    values = torch.randn(8, 128, 2**14, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, float] = {}
    for proxy in cluster.proxies:
        proxy.up_bytes_per_second = _RATE
    for nodes in ("aa", "ab"):
        seconds[nodes] = cluster.upload(tmp_path / nodes, nodes, values)
    sent = [proxy.traffic.up_bytes for proxy in cluster.proxies]
    print(f"seconds {seconds}, MB {[each / 1e6 for each in sent]}")
    assert all(abs(each - sum(sent) / 2) < 0.05 * sum(sent) for each in sent)
    assert seconds["aa"] > 1.8 * seconds["ab"]
    for nodes in seconds:
        whole = fc.restore(f"{cluster.far}/{nodes}/7")["tree"]
        assert all(torch.equal(whole[str(n)], part) for n, part in enumerate(values))


@pytest.mark.skipif(not IS_FULL, reason="processes, and a server")
def test_the_primary_publishes_a_step_whose_other_node_was_killed(
    cluster: _Cluster, s3_url: str, tmp_path: Path
) -> None:
    values = torch.randn(8, 128, 2**14, generator=torch.Generator().manual_seed(1))
    with pytest.raises(EOFError):  # of rank 1
        cluster.upload(tmp_path / "ab", "ab", values, dies=1)
    storage, root = connect(f"{cluster.far}/ab")
    assert checkpoint.verify_checkpoint(storage, f"{root}/7", 7) == []
    copy = tmp_path / "copy"
    assert copying.copy_down(s3_url, cluster.far.removeprefix("s3://"), "ab/7", copy)
    found = ocp.StandardCheckpointer().restore(copy / "tree")
    assert all(np.array_equal(found[str(n)], part) for n, part in enumerate(values.numpy()))
