"""Copies on other nodes: complete and verified, whatever fails; nodes are threads here."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from parts import Nodes, close
from thread_ranks import MemoryStore

from functional_ckpt import errors
from functional_ckpt.distributed import peer_link
from functional_ckpt.steps import replication
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.new_file import LocalFile


class _Disk(LocalStorage):
    """A disk that counts created bytes; `before` is called with each file that is created."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.before: Callable[[str], None] = lambda _: None

    def create(self, path: str, size_bytes: int, *, is_direct: bool) -> LocalFile:
        self.before(path)
        self.created.append(path)
        return super().create(path, size_bytes, is_direct=is_direct)


def _nodes(root: Path, count: int) -> Nodes:
    return Nodes(root, count, [_Disk() for _ in range(count)])


@pytest.mark.parametrize(("count", "replicas"), [(2, 1), (3, 1), (3, 2), (4, 2), (2, 0)])
def test_each_file_is_on_as_many_nodes_as_asked_for(
    count: int, replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_link, "PIECE_BYTES", 100_000)
    nodes = _nodes(tmp_path, count)
    record = nodes.save(3)
    nodes.replicate(replicas)
    for number, own in enumerate(record.nodes):
        for name in own.files:
            holders = [node for node, held in enumerate(nodes.held(3)) if name in held]
            assert holders == sorted((number + k) % count for k in range(1 + replicas))
    assert nodes.is_replicated(3)
    for lost in range(count if replicas else 0):
        nodes.check_whole(3, *(n for n in nodes.order if n != nodes.order[lost]))
    known = [dict(each) for each in nodes.commits]
    nodes.look()
    for commits, was in zip(nodes.commits, known, strict=True):
        assert {n: set(h) for n, h in was[3].holders.items()} == {
            n: set(h) for n, h in commits[3].holders.items()
        }
    if replicas:
        (event,) = nodes.events
        size_bytes = sum(file.size_bytes for file in record.files.values())
        assert (event.kind, event.step, event.num_bytes) == ("replicated", 3, replicas * size_bytes)
    assert nodes.in_transit() == []


def test_a_step_committed_during_the_run_is_copied_in_the_background(tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 2)
    found = nodes.replications()
    for each in found:
        each.start()
    for step in (1, 2, 3):
        nodes.save(step)
        for each in found:
            each.committed(step)
        for each in found:
            each.wait()
        assert nodes.is_replicated(step)
    close(found)
    assert [each.step for each in nodes.events] == [1, 2, 3]


def test_the_newest_step_is_copied_first_and_the_others_when_there_is_time(
    tmp_path: Path,
) -> None:
    nodes = _nodes(tmp_path, 2)
    found = nodes.replications()
    started, go_on = threading.Event(), threading.Event()

    def hold(path: str) -> None:
        started.set()
        assert go_on.wait(60)

    nodes.storages[1].before = hold
    nodes.save(1)
    for each in found:
        each.start()
    assert started.wait(60)
    for step in (2, 3):
        nodes.save(step)
        for each in found:
            each.committed(step)
    go_on.set()
    close(found)
    assert [each.step for each in nodes.events] == [1, 3, 2]


def test_an_unchanged_file_of_the_last_step_is_linked_and_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = _nodes(tmp_path, 2)
    nodes.save(1)
    nodes.replicate()
    record = nodes.save(2, changed=0.5)
    nodes.replicate()
    name = next(name for name in record.files if name.startswith("part0/"))
    owner, other = (0, 1) if name in record.nodes[0].files else (1, 0)
    first, second = (tmp_path / nodes.order[other] / step / name for step in "12")
    assert first.samefile(second)
    assert not any(name in path for path in nodes.storages[other].created[1:] if "commit2" in path)
    assert nodes.events[1].num_bytes == (nodes.events[0].num_bytes - record.files[name].size_bytes)
    nodes.check_whole(2, nodes.order[other])
    nodes.check_whole(2, nodes.order[owner])


def test_after_a_restart_only_the_rest_is_sent(tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 2)
    record = nodes.save(1)
    own = sorted(record.nodes[0].files)
    (tmp_path / "b" / "1" / own[0]).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tmp_path / "a" / "1" / own[0], tmp_path / "b" / "1" / own[0])
    left = tmp_path / "b" / ".functional_ckpt" / "incoming" / "an older commit"
    left.mkdir(parents=True)
    (left / "torn.part").write_bytes(b"1")
    nodes.look()
    nodes.replicate()
    assert len(nodes.storages[1].created) == len(own) - 1
    nodes.check_whole(1, "b")
    assert nodes.in_transit() == [] and not left.exists()


def test_a_new_empty_node_gets_all_that_it_should_hold(tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 3)
    for step in (1, 2):
        nodes.save(step)
    nodes.replicate(2)
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").mkdir()
    nodes.look()
    nodes.replicate(2)
    for step in (1, 2):
        nodes.check_whole(step, "b")
    assert [each.step for each in nodes.events] == [2, 1, 2, 1]  # the newest first
    assert nodes.in_transit() == []


@pytest.mark.parametrize("place", [0, -1])
def test_a_copy_of_damaged_bytes_is_never_taken_for_one(place: int, tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 2)
    record = nodes.save(1)
    name = sorted(record.nodes[0].files)[place]
    path = tmp_path / "a" / "1" / name
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    nodes.replicate()
    assert not nodes.is_replicated(1)
    assert not (tmp_path / "b" / "1" / name).exists()
    others = set(record.files) - {name}
    assert others <= nodes.held(1)[0] and others <= nodes.held(1)[1]
    assert [each.kind for each in nodes.events] == ["unreplicated"]
    path.write_bytes(sound)
    nodes.look()
    assert nodes.replicate() and nodes.is_replicated(1)
    nodes.check_whole(1, "b")


def test_a_missing_or_short_file_of_the_sender_disturbs_no_other(tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 2)
    record = nodes.save(1)
    gone, short = sorted(record.nodes[0].files)[:2]
    (tmp_path / "a" / "1" / gone).unlink()
    (tmp_path / "a" / "1" / short).write_bytes(b"short")
    nodes.replicate()
    assert nodes.held(1)[1] == set(record.files) - {gone, short}


def test_a_full_disk_of_the_partner_leaves_the_step_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replication, "_FIRST_WAIT_SECONDS", 0.01)
    nodes = _nodes(tmp_path, 2)
    record = nodes.save(1)
    is_full = True

    def fill(path: str) -> None:
        if is_full:
            raise errors.StorageError(f"Cannot write {path}: No space left on device.", errno=28)

    nodes.storages[1].before = fill
    found = nodes.replications()
    for each in found:
        each.start()
    for each in found:
        each.wait()
    assert not nodes.is_replicated(1)
    assert [each.kind for each in nodes.events] == ["unreplicated"]
    assert "No space left" in caplog.text and "trying again" in caplog.text
    # Only the two files that were under way when it was full.
    assert set(record.nodes[1].files) <= nodes.held(1)[0]
    is_full = False
    deadline = time.monotonic() + 60
    while not nodes.tiers[0].survives(1) and time.monotonic() < deadline:
        time.sleep(0.01)
    close(found)
    nodes.check_whole(1, "b")


def test_a_lost_peer_is_an_event_and_its_return_completes_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "_FIRST_WAIT_SECONDS", 0.01)
    nodes, store = _nodes(tmp_path, 2), MemoryStore()
    nodes.save(1)
    is_lost = False

    def lose(path: str) -> None:
        nonlocal is_lost
        if not is_lost:
            is_lost = True
            store.lose(0)

    nodes.storages[1].before = lose
    found = nodes.replications(store=store)
    for each in found:
        each.start()
    deadline = time.monotonic() + 60
    while (
        not all(tier.survives(1) for tier in nodes.tiers.values()) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    close(found)
    kinds = [each.kind for each in nodes.events]
    # The peer may have sent all before it was lost.
    assert is_lost and kinds in (["unreplicated", "replicated"], ["replicated"])
    nodes.check_whole(1, "b")


def test_a_step_that_was_replaced_meanwhile_gets_no_file_of_the_old_commit(tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 2)
    record = nodes.save(1)
    held = nodes.held(1)[1]

    def replace(path: str) -> None:
        """As an overwrite does: another directory gets the name."""
        if (tmp_path / "b" / "1").exists():
            shutil.copytree(tmp_path / "b" / "1", tmp_path / "b" / "new", dirs_exist_ok=True)
            (tmp_path / "b" / "1").rename(tmp_path / "b" / "old")
            (tmp_path / "b" / "new").rename(tmp_path / "b" / "1")
            nodes.storages[1].before = lambda _: None

    nodes.storages[1].before = replace
    nodes.replicate()
    assert nodes.held(1)[1] == held == set(record.nodes[1].files)


def test_a_removed_step_is_not_copied_and_stops_no_other(tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 2)
    nodes.save(1)
    nodes.save(2)
    found = nodes.replications()
    del nodes.commits[0][2]  # removed on one node first
    for each in found:
        each.start()
    close(found)
    assert nodes.tiers[0].survives(1) and [each.step for each in nodes.events] == [1]


def test_the_rate_is_limited(tmp_path: Path) -> None:
    nodes = _nodes(tmp_path, 2)
    record = nodes.save(1)
    size_bytes = sum(file.size_bytes for file in record.nodes[0].files.values())
    found = nodes.replications(max_bytes_per_second=size_bytes / 0.5)
    started = time.monotonic()
    for each in found:
        each.start()
    close(found)
    assert time.monotonic() - started >= 0.2 and nodes.tiers[0].survives(1)
