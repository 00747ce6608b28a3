"""Uploads of steps whose files are on several nodes; nodes as threads of one process."""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import servers
import torch
from remote_environment import set_environment
from thread_ranks import ThreadCoordinator, results, run_ranks

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli import main
from functional_ckpt.core.files.dealing import deal_to_holders
from functional_ckpt.core.nodes.part import PART_FILE
from functional_ckpt.steps import upload_helper, upload_shares
from functional_ckpt.steps.upload_helper import UploadHelper
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import ObjectStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.verify import checkpoint

_NUM_LEAVES = 8


class _Sent:
    """The files that nodes send, and what happens before each."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.before: Callable[[str], None] = lambda _: None
        self._mutex = threading.Lock()

    def note(self, source: str) -> None:
        self.before(source)
        with self._mutex:
            self.sizes[source] = Path(source).stat().st_size

    def by(self, root: Path, node: str) -> int:
        """The number of bytes that a node has sent."""
        return sum(n for name, n in self.sizes.items() if Path(name).is_relative_to(root / node))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> _Sent:
    """The files that are copied to a directory."""
    found, put_file = _Sent(), LocalStorage.put_file

    def put(self: LocalStorage, source: str, path: str) -> None:
        found.note(source)
        put_file(self, source, path)

    monkeypatch.setattr(LocalStorage, "put_file", put)
    monkeypatch.setattr(upload_shares, "SILENT_SECONDS", 60.0)  # on a busy machine
    for module in (upload_shares, upload_helper):
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    return found


def _items(value: float) -> dict[str, Any]:
    leaves = {f"w{n}": torch.full((100_000,), value + n) for n in range(_NUM_LEAVES)}
    return {"tree": leaves, "config": fc.Json({"v": value})}


def _run(
    root: Path,
    job: Callable[[fc.CheckpointManager, ThreadCoordinator], Any],
    nodes: str = "ab",
    *,
    replicas: int = 0,
    **options: Any,
) -> list[Any]:
    """Runs a job with a manager on every rank, one for each node."""

    def on_rank(group: ThreadCoordinator) -> Any:
        node = nodes[group.rank]
        option = fc.NodeLocal(replicas=replicas, node=node)
        with fc.CheckpointManager(
            root / node, node_local=option, coordinator=group, **options
        ) as manager:
            return job(manager, group)

    return results(run_ranks(len(nodes), on_rank))


def _save(root: Path, step: int, value: float, nodes: str = "ab", **options: Any) -> None:
    """Saves a step; with `replicas` it is replicated then."""

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> None:
        manager.save(step, _items(value))
        manager.wait_until_finished()

    _run(root, job, nodes, **options)


def _open(root: Path, nodes: str = "ab", **options: Any) -> list[str]:
    """Opens and closes the run; the states of its newest step before it is closed."""

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> str:
        manager.wait_until_finished()
        group.gather_broadcast("all have waited", b"", b"".join)
        step = manager.latest_step()
        return "" if step is None else manager.metadata(step).state

    return _run(root, job, nodes, **options)


def _check(far: Path, step: int, value: float) -> None:
    """A published step is an ordinary one: complete, undamaged, and readable by Orbax."""
    path = far / str(step)
    assert not (path / PART_FILE).exists()
    assert checkpoint.verify_checkpoint(LocalStorage(), str(path), step) == []
    assert main(["verify", str(path)]) == 0
    tree = fc.restore(path)["tree"]
    assert all(bool((tree[f"w{n}"] == value + n).all()) for n in range(_NUM_LEAVES))
    found = ocp.StandardCheckpointer().restore(path / "tree")
    assert all(np.all(found[f"w{n}"] == value + n) for n in range(_NUM_LEAVES))


def _data(root: Path, node: str, step: int) -> list[Path]:
    return sorted((root / node / str(step)).rglob("*.safetensors"))


def test_each_node_sends_its_own_files(tmp_path: Path, sent: _Sent) -> None:
    far = tmp_path / "far"

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> tuple[str, Any]:
        manager.save(3, _items(1.0))
        manager.wait_until_finished()
        manager.record_metrics(3, {"loss": 0.5})
        manager.wait_until_finished()
        group.gather_broadcast("all have waited", b"", b"".join)
        found = manager.metadata(3)
        return found.state, found.metrics

    assert _run(tmp_path, job, "aab", tiers=[far]) == [("uploaded", {"loss": 0.5})] * 3
    _check(far, 3, 1.0)
    with fc.CheckpointManager(far, read_only=True) as manager:
        assert manager.metadata(3).metrics == {"loss": 0.5}
    for node in "ab":
        own = sum(file.stat().st_size for file in _data(tmp_path, node, 3))
        assert own <= sent.by(tmp_path, node) <= 1.1 * own


def test_a_copy_on_a_partner_is_sent_if_a_node_fails(tmp_path: Path, sent: _Sent) -> None:
    far = tmp_path / "far"
    _save(tmp_path, 3, 1.0, "abc", replicas=1)

    def fail(source: str) -> None:
        if Path(source).is_relative_to(tmp_path / "b"):
            raise errors.StorageError("no network")

    sent.before = fail
    assert _open(tmp_path, "abc", replicas=1, tiers=[far]) == ["uploaded"] * 3
    _check(far, 3, 1.0)
    assert sent.by(tmp_path, "b") == 0 < sent.by(tmp_path, "c")


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("node", ["a", "b"])
def test_a_copy_on_a_partner_is_sent_if_a_file_is_bad(
    node: str, damage: str, tmp_path: Path, sent: _Sent
) -> None:
    far = tmp_path / "far"
    _save(tmp_path, 3, 1.0, replicas=1)
    for file in _data(tmp_path, node, 3):
        if damage == "missing":
            file.unlink()
        else:
            _damage(file)
    states = _open(tmp_path, replicas=1, tiers=[far])
    assert states == ["uploaded"] * 2
    _check(far, 3, 1.0)


def _damage(file: Path) -> None:
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_partner_takes_over_from_a_node_that_dies_within_its_share(
    tmp_path: Path, sent: _Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / "far"
    _save(tmp_path, 3, 1.0, "abc", replicas=1)
    monkeypatch.setattr(upload_shares, "SILENT_SECONDS", 0.5)
    dead, over = threading.Event(), threading.Event()
    report = UploadHelper._report

    def die(source: str) -> None:
        if Path(source).is_relative_to(tmp_path / "b"):
            dead.set()
            over.wait(60)

    def report_if_alive(helper: UploadHelper, state: upload_shares.State) -> None:
        if not (dead.is_set() and helper._local.root.endswith("/b")):
            report(helper, state)

    sent.before = die
    monkeypatch.setattr(UploadHelper, "_report", report_if_alive)

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> str:
        if not group.rank:
            manager.wait_until_finished()
            over.set()
        group.gather_broadcast("all have waited", b"", b"".join)
        return manager.metadata(3).state

    assert _run(tmp_path, job, "abc", replicas=1, tiers=[far]) == ["uploaded"] * 3
    assert dead.is_set()
    _check(far, 3, 1.0)


def test_a_step_that_no_node_holds_waits_for_the_next_start(
    tmp_path: Path, sent: _Sent, caplog: pytest.LogCaptureFixture
) -> None:
    far = tmp_path / "far"
    _save(tmp_path, 3, 1.0)
    damaged = _data(tmp_path, "b", 3)[0]
    whole = damaged.read_bytes()
    _damage(damaged)
    policy = fc.policies.LatestN(1)

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> tuple[str, list[int]]:
        manager.wait_until_finished()
        for step in (4, 5):  # it is tried again after each
            manager.save(step, _items(2.0))
            manager.wait_until_finished()
        group.gather_broadcast("all have waited", b"", b"".join)
        return manager.metadata(3).state, manager.all_steps()

    with caplog.at_level(logging.WARNING):
        found = _run(tmp_path, job, tiers=[far], keep_policy=policy)
    assert found == [("replicated", [3, 4, 5])] * 2  # 4 and 5 are in the tier
    assert caplog.text.count("Upload of step 3 to") == 1
    assert not (far / "3").exists()
    for node in "ab":  # no node has removed files that are still to be uploaded
        assert (tmp_path / node / "3").exists() and not (tmp_path / node / "4").exists()
    damaged.write_bytes(whole)
    sent.sizes.clear()
    _open(tmp_path, tiers=[far], keep_policy=policy)
    _check(far, 3, 1.0)
    assert [Path(name).name for name in sent.sizes] == [damaged.name]


def test_an_interrupted_upload_resumes_after_a_restart(tmp_path: Path, sent: _Sent) -> None:
    far = tmp_path / "far"
    _save(tmp_path, 3, 1.0)
    chosen = [_data(tmp_path, node, 3)[0] for node in "ab"]

    def fail(source: str) -> None:
        if Path(source) in chosen:
            raise errors.StorageError("no network")

    sent.before = fail

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> None:
        pass  # closing tries once more

    _run(tmp_path, job, tiers=[far])
    assert not (far / "3").exists()
    before, sent.before = set(sent.sizes), lambda _: None
    sent.sizes.clear()
    assert _open(tmp_path, tiers=[far]) == ["uploaded"] * 2
    assert {str(each) for each in chosen} <= set(sent.sizes) and not before & set(sent.sizes)
    _check(far, 3, 1.0)


@pytest.mark.parametrize("nodes", ["ab", "dab"])
def test_a_primary_without_a_part_uploads_what_others_hold(
    nodes: str, tmp_path: Path, sent: _Sent
) -> None:
    """Its disk is new, or the node is, which replication gives no file."""
    far = tmp_path / "far"
    _save(tmp_path, 3, 1.0, replicas=1)
    if nodes == "ab":
        shutil.rmtree(tmp_path / "a")
    assert _open(tmp_path, nodes, replicas=1, tiers=[far]) == ["uploaded"] * len(nodes)
    _check(far, 3, 1.0)


def test_the_far_copy_stays_until_its_replacement_is_whole(tmp_path: Path, sent: _Sent) -> None:
    far = tmp_path / "far"
    _save(tmp_path, 3, 1.0, tiers=[far])

    def fail(source: str) -> None:
        if Path(source).is_relative_to(tmp_path / "b"):
            raise errors.StorageError("no network")

    sent.before = fail

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> None:
        manager.save(3, _items(2.0))

    _run(tmp_path, job, tiers=[far], overwrite=True)
    _check(far, 3, 1.0)
    sent.before = lambda _: None
    _open(tmp_path, tiers=[far])
    _check(far, 3, 2.0)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """The URI of a new bucket of an S3 server."""
    with servers.s3_server() as url:
        set_environment(monkeypatch, url)
        name = f"bucket-{uuid.uuid4().hex[:8]}"
        servers.make_bucket(url, name)
        yield f"s3://{name}"


def test_nodes_upload_to_an_object_store(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = f"{bucket}/run"
    found, put_file = _Sent(), ObjectStorage.put_file

    def put(self: ObjectStorage, source: str, path: str) -> None:
        found.note(source)
        put_file(self, source, path)

    monkeypatch.setattr(ObjectStorage, "put_file", put)

    def job(manager: fc.CheckpointManager, group: ThreadCoordinator) -> list[str]:
        for step in (3, 4):
            manager.save(step, {**_items(float(step)), "frozen": {"w": torch.ones(600_000)}})
            manager.wait_until_finished()
        group.gather_broadcast("all have waited", b"", b"".join)
        return [manager.metadata(step).state for step in (3, 4)]

    assert _run(tmp_path, job, tiers=[far]) == [["uploaded", "uploaded"]] * 2
    assert min(found.by(tmp_path, node) for node in "ab") > 3_000_000
    frozen = [name for name in found.sizes if "/frozen/data" in name]
    assert frozen and all("/3/" in name for name in frozen)  # the store has copied them
    storage, root = connect(far)
    for step in (3, 4):
        assert checkpoint.verify_checkpoint(storage, f"{root}/{step}", step) == []
        assert PART_FILE not in storage.walk(f"{root}/{step}")
        tree = fc.restore(f"{far}/{step}")["tree"]
        assert all(bool((tree[f"w{n}"] == step + n).all()) for n in range(_NUM_LEAVES))


def test_files_are_dealt_to_their_holders_alone() -> None:
    sizes = {"a": 5, "b": 5, "c": 9, "d": 1}
    holders = {"a": (0, 1), "b": (0, 1), "c": (0,), "d": ()}
    assert deal_to_holders(sizes, holders) == {0: ["c"], 1: ["a", "b"]}
