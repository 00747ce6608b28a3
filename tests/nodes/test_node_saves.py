"""Saves to a directory on each node; nodes as threads of one process."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bucket import FakeBucket
from thread_ranks import MemoryStore, ThreadCoordinator, results, run_ranks

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.saving.node_publishing import NodePublishing
from functional_ckpt.steps.node_inventory import read_generation, read_part
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import ObjectStorage

_NODES = "ab"
_DISK = LocalStorage()


def _items(value: float, rank: int) -> dict[str, Any]:
    return {
        "tree": {f"of{rank}": torch.full((100,), value + rank)},
        "frozen": {f"of{rank}": torch.arange(200_000)},
        "config": fc.Json({"v": value}),
    }


def manager(root: Path, group: ThreadCoordinator, nodes: str = _NODES, **options: Any) -> Any:
    node = nodes[group.rank]
    option = options.pop("node_local", fc.NodeLocal(replicas=0, node=node))
    directory = options.pop("directory", root / node)
    return fc.CheckpointManager(directory, node_local=option, coordinator=group, **options)


def run(
    root: Path,
    job: Callable[[Any, int], Any],
    *,
    nodes: str = _NODES,
    timeout_seconds: float = 30.0,
    **options: Any,
) -> list[Any]:
    """Runs a job with a manager on every rank."""

    def on_rank(group: ThreadCoordinator) -> Any:
        with manager(root, group, nodes, **options) as made:
            return job(made, group.rank)

    return run_ranks(len(nodes), on_rank, timeout_seconds=timeout_seconds)


def save(root: Path, *steps: int, nodes: str = _NODES, **options: Any) -> list[Any]:
    """Saves steps; the steps that every rank knows then."""

    def job(made: Any, rank: int) -> list[int]:
        for step in steps:
            made.save(step, _items(float(step), rank)).result()
        return made.all_steps()

    return run(root, job, nodes=nodes, **options)


def steps_of(root: Path, nodes: str = _NODES, **options: Any) -> list[list[int]]:
    return results(run(root, lambda made, _: made.all_steps(), nodes=nodes, **options))


def on_disk(root: Path, node: str) -> list[str]:
    return sorted(path.name for path in (root / node).iterdir() if path.name[0] != ".")


def test_each_node_holds_its_part_and_all_records(tmp_path: Path) -> None:
    assert results(save(tmp_path, 3, 5, nodes="aabb")) == [[3, 5]] * 4
    parts = {node: tmp_path / node / "5" for node in "ab"}
    records = {node: read_part(_DISK, str(path)) for node, path in parts.items()}
    assert records["a"] == records["b"]
    record = records["a"]
    assert record is not None and record.step == 5 and len(record.nodes) == 2
    for node in record.nodes:
        for name in record.files:
            assert (parts[node.name] / name).exists() == (name in node.files)
    others = [
        {
            str(path.relative_to(part)): path.read_bytes()
            for path in part.rglob("*")
            if path.is_file() and str(path.relative_to(part)) not in record.files
        }
        for part in parts.values()
    ]
    assert others[0] == others[1]
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def test_a_run_lists_the_steps_of_the_last_one(tmp_path: Path) -> None:
    results(save(tmp_path, 1, 2))
    assert steps_of(tmp_path) == [[1, 2]] * 2
    assert results(save(tmp_path, 3)) == [[1, 2, 3]] * 2


def test_a_lost_node_makes_its_steps_unusable_and_they_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results(save(tmp_path, 1))
    shutil.rmtree(tmp_path / "b")
    assert steps_of(tmp_path) == [[], []]
    assert "step 1 is not used" in caplog.text
    assert on_disk(tmp_path, "a") == ["1"]
    # The step can be saved again: the part that is not used makes way.
    assert results(save(tmp_path, 1)) == [[1], [1]]
    assert len(list((tmp_path / "a" / ".functional_ckpt" / "aside").iterdir())) == 1
    record = read_part(_DISK, str(tmp_path / "a" / "1"))
    assert record is not None and record.generation > 0


def test_a_node_that_comes_back_does_not_win(tmp_path: Path) -> None:
    results(save(tmp_path, 1, 100))
    shutil.move(tmp_path / "b", tmp_path / "away")
    results(save(tmp_path, 2))
    shutil.rmtree(tmp_path / "b")
    shutil.move(tmp_path / "away", tmp_path / "b")
    found = run(tmp_path, lambda made, _: (made.all_steps(), made.latest_step()))
    assert results(found) == [([1, 100], 100)] * 2  # step 2 has lost a part
    shutil.rmtree(tmp_path / "b")


def test_pruning_removes_a_step_on_every_node(tmp_path: Path) -> None:
    policy = fc.policies.LatestN(2)
    assert (
        results(save(tmp_path, 1, 2, 3, keep_policy=policy, latest_link="latest")) == [[2, 3]] * 2
    )
    for node in "ab":
        assert on_disk(tmp_path, node) == ["2", "3", "latest"]
        assert (tmp_path / node / "latest").resolve().name == "3"
    assert steps_of(tmp_path) == [[2, 3]] * 2


def test_nothing_is_pruned_until_a_newer_step_is_replicated(tmp_path: Path) -> None:
    def job(made: Any, rank: int) -> list[int]:
        replicated: set[int] = set()
        made._steps.first.is_replicated = replicated.__contains__
        for step in (1, 2, 3, 4):
            if step == 4:
                replicated.add(3)
            made.save(step, _items(float(step), rank)).result()
            if step == 3:
                assert made.all_steps() == [1, 2, 3]
        return made.all_steps()

    found = run(tmp_path, job, keep_policy=fc.policies.LatestN(1))
    assert results(found) == [[3, 4]] * 2


def test_deleting_and_discarding_act_on_every_node(tmp_path: Path) -> None:
    def job(made: Any, rank: int) -> list[int]:
        for step in (1, 2, 3, 4):
            made.save(step, _items(float(step), rank)).result()
        made.delete(2)
        assert made.all_steps() == [1, 3, 4]
        made.restore(1, discard_later=True)
        return made.all_steps()

    assert results(run(tmp_path, job)) == [[1]] * 2
    assert [on_disk(tmp_path, node) for node in "ab"] == [["1"]] * 2
    assert results(run(tmp_path, job, overwrite=True)) == [[1]] * 2
    assert steps_of(tmp_path) == [[1]] * 2


def test_metrics_are_recorded_on_every_node(tmp_path: Path) -> None:
    def job(made: Any, rank: int) -> Any:
        made.save(1, _items(1.0, rank)).result()
        made.record_metrics(1, {"loss": 0.5})
        return made.metadata(1).metrics

    assert results(run(tmp_path, job)) == [{"loss": 0.5}] * 2
    found = run(tmp_path, lambda made, _: made.metadata(1).metrics)
    assert results(found) == [{"loss": 0.5}] * 2


def test_overwriting_replaces_the_step_on_every_node(tmp_path: Path) -> None:
    results(save(tmp_path, 1))
    first = read_part(_DISK, str(tmp_path / "a" / "1"))
    assert all(isinstance(each, errors.StepExistsError) for each in save(tmp_path, 1))
    assert results(save(tmp_path, 1, overwrite=True)) == [[1], [1]]
    second = [read_part(_DISK, str(tmp_path / node / "1")) for node in "ab"]
    assert second[0] == second[1] != first
    assert on_disk(tmp_path, "a") == on_disk(tmp_path, "b") == ["1"]


def test_a_replaced_commit_stays_until_the_new_one_is_replicated(tmp_path: Path) -> None:
    def job(made: Any, rank: int) -> list[int]:
        replicated: set[int] = set()
        made._steps.first.is_replicated = replicated.__contains__
        for _ in range(2):
            made.save(1, _items(1.0, rank)).result()
            made.restore(1)
        aside = Path(made.directory) / ".functional_ckpt" / "aside"
        counts = [len(list(aside.iterdir()))]
        replicated.add(1)
        made.save(2, _items(2.0, rank)).result()
        return [*counts, len(list(aside.iterdir()))]

    assert results(run(tmp_path, job, overwrite=True)) == [[1, 0]] * 2
    assert steps_of(tmp_path) == [[1, 2]] * 2


def test_a_replaced_commit_is_removed_at_a_start_once_the_new_one_is_replicated(
    tmp_path: Path,
) -> None:
    def job(made: Any, rank: int) -> None:
        made._steps.first.is_replicated = lambda _: False
        for value in (1.0, 2.0):  # in one run: the first may be no other line
            made.save(1, _items(value, rank)).result()

    results(run(tmp_path, job, overwrite=True))
    aside = [tmp_path / node / ".functional_ckpt" / "aside" for node in "ab"]
    assert [len(list(each.iterdir())) for each in aside] == [1, 1]
    assert steps_of(tmp_path) == [[1], [1]]  # replicas=0: it is replicated
    assert [list(each.iterdir()) for each in aside] == [[], []]
    assert steps_of(tmp_path) == [[1], [1]]


def test_a_replaced_commit_comes_back_if_the_new_one_is_lost(tmp_path: Path) -> None:
    results(save(tmp_path, 1))
    old = read_part(_DISK, str(tmp_path / "a" / "1"))

    def job(made: Any, rank: int) -> None:
        made._steps.first.is_replicated = lambda _: False
        made.save(1, _items(2.0, rank)).result()

    results(run(tmp_path, job, overwrite=True))
    assert read_part(_DISK, str(tmp_path / "a" / "1")) != old
    shutil.rmtree(tmp_path / "b" / "1")
    assert steps_of(tmp_path) == [[1], [1]]
    assert [read_part(_DISK, str(tmp_path / node / "1")) for node in "ab"] == [old, old]


def test_a_repeat_changes_nothing(tmp_path: Path) -> None:
    def job(made: Any, rank: int) -> None:
        made.save(1, _items(1.0, rank))
        made.save(1, _items(1.0, rank), force=True)

    results(run(tmp_path, job))
    assert on_disk(tmp_path, "a") == on_disk(tmp_path, "b") == ["1"]


def test_unchanged_files_are_links_on_the_own_node(tmp_path: Path) -> None:
    results(save(tmp_path, 1, 2))
    for node in "ab":
        shared = [
            p for p in (tmp_path / node / "2").rglob("*.safetensors") if p.stat().st_nlink > 1
        ]
        assert shared


@pytest.mark.parametrize("staging", [fc.Overlapped(), fc.Blocking()])
def test_each_staging_saves(tmp_path: Path, staging: Any) -> None:
    assert results(save(tmp_path, 1, 2, staging=staging)) == [[1, 2]] * 2


class _Failing(LocalStorage):
    """A file system whose writes of a file fail, a number of times."""

    def __init__(self, name: str, error: Exception, times: int = 1) -> None:
        self.name = name
        self.error = error
        self.times = times
        self._mutex = threading.Lock()

    def write(self, path: str, data: Any) -> None:
        with self._mutex:
            fails = self.name in path and self.times > 0
            self.times -= fails
        if fails:
            raise self.error
        super().write(path, data)


@pytest.mark.parametrize("name", ["config/metadata", "functional_ckpt.part.json"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_transient_error_before_the_decision_is_repeated(
    tmp_path: Path, name: str, bad: int
) -> None:
    def job(group: ThreadCoordinator) -> Any:
        error = errors.StorageError("flaky", errno=5)
        storage = _Failing(name, error) if group.rank == bad else None
        with manager(tmp_path, group, storage=storage) as made:
            made.save(1, _items(1.0, group.rank)).result()
            return made.all_steps()

    assert results(run_ranks(2, job)) == [[1]] * 2
    assert [on_disk(tmp_path, node) for node in "ab"] == [["1"]] * 2


@pytest.mark.parametrize("bad", [0, 1])
def test_a_node_that_cannot_vote_aborts_all(tmp_path: Path, bad: int) -> None:
    def job(group: ThreadCoordinator) -> Any:
        error = errors.StorageError("broken", errno=28)
        storage = _Failing("part.json", error, 100) if group.rank == bad else None
        with manager(tmp_path, group, storage=storage) as made:
            with pytest.raises(errors.SaveError):
                made.save(1, _items(1.0, group.rank)).result()
            return made.all_steps()

    assert results(run_ranks(2, job)) == [[]] * 2
    assert [on_disk(tmp_path, node) for node in "ab"] == [[]] * 2


@pytest.mark.parametrize("is_b_lost", [False, True])
def test_votes_stay_where_the_decision_cannot_be_asked_for(
    tmp_path: Path,
    is_b_lost: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unreachable(*_: Any) -> bytes:
        raise errors.CoordinationError("the store does not answer")

    def job(made: Any, rank: int) -> None:
        with pytest.raises(errors.SaveError, match="does not answer"):
            made.save(1, _items(1.0, rank)).result()

    with monkeypatch.context() as patch:
        patch.setattr(NodePublishing, "_decide", unreachable)
        results(run(tmp_path, job))
    assert all("tmp" in on_disk(tmp_path, node)[0] for node in "ab")
    if is_b_lost:
        shutil.rmtree(tmp_path / "b")
    assert steps_of(tmp_path) == [[], []]
    assert bool(on_disk(tmp_path, "a")) is is_b_lost  # b may have renamed its part
    assert ("b may have renamed it" in caplog.text) is is_b_lost
    assert results(save(tmp_path, 1)) == [[1], [1]]
    steps_of(tmp_path)  # a later run has a replicated step: the vote need not wait any more
    assert on_disk(tmp_path, "a") == ["1"]


class _NoRename(LocalStorage):
    """A file system that fails to rename a temporary directory to a step's name."""

    def rename(self, source: str, target: str) -> None:
        if "tmp" in source and target.endswith(("/1", "/2")):
            raise errors.StorageError("no rename", errno=5, path=target)
        super().rename(source, target)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_commit_that_a_node_could_not_rename_is_completed_at_the_next_start(
    tmp_path: Path, step: int, bad: int
) -> None:
    results(save(tmp_path, 1))

    def job(group: ThreadCoordinator) -> None:
        storage = _NoRename() if group.rank == bad else None
        options = {"storage": storage, "overwrite": True}
        with (
            manager(tmp_path, group, **options) as made,
            pytest.raises(errors.SaveError, match="no rename"),
        ):
            made.save(step, _items(7.0, group.rank)).result()

    results(run_ranks(2, job))
    assert steps_of(tmp_path) == [[1, 2] if step == 2 else [1]] * 2
    parts = [read_part(_DISK, str(tmp_path / node / str(step))) for node in "ab"]
    assert parts[0] == parts[1] is not None
    for node in "ab":
        assert not [each for each in on_disk(tmp_path, node) if "tmp" in each]


def test_the_generation_is_raised_by_each_restore(tmp_path: Path) -> None:
    def job(made: Any, rank: int) -> None:
        made.save(1, _items(1.0, rank)).result()
        made.restore(1)
        made.restore(1)
        made.save(2, _items(2.0, rank)).result()

    results(run(tmp_path, job))
    for node in "ab":
        record = read_part(_DISK, str(tmp_path / node / "2"))
        assert record is not None and record.generation == 2
        assert read_generation(_DISK, str(tmp_path / node)) == 2
    found = run(tmp_path, lambda made, _: (made.all_steps(), made.latest_step()))
    assert results(found) == [([1, 2], 2)] * 2


def test_two_nodes_with_one_directory_are_refused(tmp_path: Path) -> None:
    found = run(tmp_path, lambda *_: None, directory=tmp_path / "same")
    assert all(isinstance(each, errors.CheckpointError) for each in found)
    assert "see the same directory" in str(found[0])
    assert not [p for p in (tmp_path / "same" / ".functional_ckpt").iterdir() if "tmp" in p.name]


def test_ranks_of_one_node_with_two_directories_are_refused(tmp_path: Path) -> None:
    def job(group: ThreadCoordinator) -> None:
        option = fc.NodeLocal(replicas=0, node="a")
        manager(tmp_path, group, node_local=option).close()

    found = run_ranks(2, job)
    assert all(isinstance(each, errors.CoordinationError) for each in found)
    assert "cannot see" in str(found[0])


def test_another_value_than_the_option_is_refused(tmp_path: Path) -> None:
    found = run(tmp_path, lambda *_: None, node_local=True)
    assert all(isinstance(each, errors.UsageError) for each in found)
    assert "must be fc.NodeLocal" in str(found[0])


def test_an_object_store_is_refused(tmp_path: Path) -> None:
    storage = ObjectStorage(FakeBucket())
    found = run(tmp_path, lambda *_: None, directory="fake://bucket/run", storage=storage)
    assert all(isinstance(each, errors.UsageError) for each in found), found
    assert "object store" in str(found[0])


def test_too_many_replicas_are_refused(tmp_path: Path) -> None:
    def job(group: ThreadCoordinator) -> None:
        option = fc.NodeLocal(replicas=2, node="ab"[group.rank])
        manager(tmp_path, group, node_local=option).close()

    found = run_ranks(2, job)
    assert all(isinstance(each, errors.UsageError) for each in found)
    assert "At most 1" in str(found[0])
    assert results(save(tmp_path, 1)) == [[1], [1]]  # the directories are not locked


def test_a_run_that_lost_a_node_goes_on_with_fewer_copies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"replicas": 2}

    def job(nodes: str, step: int) -> list[Any]:
        def on_rank(group: ThreadCoordinator) -> tuple[list[int], str]:
            option = fc.NodeLocal(node=nodes[group.rank], **options)
            with manager(tmp_path, group, nodes, node_local=option) as made:
                made.save(step, _items(1.0, group.rank)).result()
                made.wait_until_finished()
                return made.all_steps(), str(made.metadata(step).state)

        return results(run_ranks(len(nodes), on_rank))

    assert job("abc", 1) == [([1], "replicated")] * 3
    shutil.rmtree(tmp_path / "b")
    assert job("ac", 2) == [([1, 2], "replicated")] * 2
    assert "Until there are more, 1 are made" in caplog.text


def test_different_options_are_refused(tmp_path: Path) -> None:
    def job(group: ThreadCoordinator) -> None:
        option = fc.NodeLocal(replicas=group.rank, node="ab"[group.rank])
        manager(tmp_path, group, node_local=option).close()

    found = run_ranks(2, job)
    assert all(isinstance(each, errors.CoordinationError) for each in found)
    assert "node_local" in str(found[0])


@pytest.mark.parametrize("replicas", [-1, 1.0, True])
def test_replicas_are_a_count(replicas: Any) -> None:
    with pytest.raises(errors.UsageError, match="replicas"):
        fc.NodeLocal(replicas=replicas)


def test_a_read_only_manager_sees_what_the_nodes_hold_together(tmp_path: Path) -> None:
    results(save(tmp_path, 1, 2))
    shutil.rmtree(tmp_path / "b" / "2")
    assert steps_of(tmp_path, read_only=True) == [[1]] * 2
    assert on_disk(tmp_path, "a") == ["1", "2"]


def test_a_save_counts_as_later_than_those_of_the_run_before(tmp_path: Path) -> None:
    results(save(tmp_path, 1, 2))
    results(save(tmp_path, 2, overwrite=True))  # without a restore: of the same generation
    record = read_part(_DISK, str(tmp_path / "a" / "2"))
    assert record is not None
    assert (record.generation, record.serial) == (0, 3)


def test_the_store_of_the_ranks_keeps_few_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[MemoryStore] = []
    make = MemoryStore.__init__

    def made(store: MemoryStore) -> None:
        make(store)
        stores.append(store)

    monkeypatch.setattr(MemoryStore, "__init__", made)
    save(tmp_path, 1, 2, 3, 4, 5)
    (store,) = stores
    kept = [key for key in store.values if "/board/commits/" in key]
    last = [read_part(_DISK, str(tmp_path / "a" / str(step))) for step in (4, 5)]
    assert [key.rpartition("/")[2] for key in kept] == [each.commit_id for each in last if each]
