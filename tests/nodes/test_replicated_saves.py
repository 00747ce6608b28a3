"""Managers on nodes that copy their steps to each other; nodes as threads of one process."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import disks
import pytest
import torch
from thread_ranks import ThreadCoordinator, results, run_ranks

import functional_ckpt as fc
from functional_ckpt.cli.__main__ import main
from functional_ckpt.steps import replication

_NODES = "aab"


def _manager(root: Path, group: ThreadCoordinator, **options: Any) -> fc.CheckpointManager:
    node = _NODES[group.rank]
    return fc.CheckpointManager(
        root / node, node_local=fc.NodeLocal(node=node), coordinator=group, **options
    )


def _items(value: float) -> dict[str, Any]:
    return {"tree": {f"w{n}": torch.full((50_000,), value + n) for n in range(4)}}


def _files(path: Path) -> set[str]:
    return {each.relative_to(path).as_posix() for each in path.rglob("*.safetensors")}


def test_steps_are_replicated_and_older_ones_pruned_only_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(group: ThreadCoordinator) -> tuple[list[str], list[str], list[int]]:
        kinds: list[str] = []

        def note(event: fc.Event) -> None:
            if event.kind in ("committed", "replicated", "unreplicated", "pruned"):
                kinds.append(f"{event.kind} {event.step}")

        states: list[str] = []
        policy = fc.policies.LatestN(1)
        with _manager(tmp_path, group, on_event=note, keep_policy=policy) as manager:
            for step in (1, 2, 3):
                manager.save(step, _items(float(step)))
                manager.wait_until_finished()
                group.gather_broadcast("all have waited", b"", b"".join)
                states.append(manager.metadata(step).state)
            return kinds, states, manager.all_steps()

    found = results(run_ranks(len(_NODES), job))
    assert [states for _, states, _ in found] == [["replicated"] * 3] * 3
    kinds = found[0][0]
    assert [each for each in kinds if each.startswith("replicated")] == [
        f"replicated {step}" for step in (1, 2, 3)
    ]
    # Step 1 not before step 2 is replicated; step 2 stays until the next commit.
    assert kinds.index("pruned 1") > kinds.index("replicated 2") and "pruned 2" not in kinds
    assert _files(tmp_path / "a" / "3") == _files(tmp_path / "b" / "3") != set()
    for node in "ab":
        assert main(["ls", "--json", str(tmp_path / node)]) == 0
        listed = json.loads(capsys.readouterr().out)["steps"]
        assert [(each["step"], each["state"]) for each in listed] == [
            (2, "replicated"),
            (3, "replicated"),
        ]
    assert main(["ls", str(tmp_path / "a")]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "latest" in line)
    assert row.split()[:3] == ["3", "latest", "replicated"]


def test_a_wiped_node_has_all_again_once_the_run_continues(tmp_path: Path) -> None:
    def save(group: ThreadCoordinator) -> None:
        with _manager(tmp_path, group) as manager:
            manager.save(1, _items(1.0))

    def restart(group: ThreadCoordinator) -> tuple[bool, str]:
        with _manager(tmp_path, group) as manager:
            tree = manager.restore()["tree"]
            manager.wait_until_finished()
            group.gather_broadcast("all have waited", b"", b"".join)
            is_equal = all(bool((tree[f"w{n}"] == 1.0 + n).all()) for n in range(4))
            return is_equal, manager.metadata(1).state

    results(run_ranks(len(_NODES), save))
    whole = _files(tmp_path / "b" / "1")
    shutil.rmtree(tmp_path / "b")
    assert results(run_ranks(len(_NODES), restart)) == [(True, "replicated")] * 3
    assert _files(tmp_path / "b" / "1") == whole
    shutil.rmtree(tmp_path / "a")  # now the other one
    assert results(run_ranks(len(_NODES), restart)) == [(True, "replicated")] * 3


def test_a_really_full_disk_of_the_partner_holds_up_only_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(replication, "_LAST_WAIT_SECONDS", 0.1)
    mib = 2**18

    def job(group: ThreadCoordinator) -> tuple[list[str], list[str]]:
        def items(step: int, size: int) -> dict[str, Any]:
            size = size if group.rank == 0 else 1000
            return {"tree": {f"of{group.rank}": torch.full((size,), float(step))}}

        kinds: list[str] = []
        node = fc.NodeLocal(node="ab"[group.rank])
        directory = tmp_path / "a" if group.rank == 0 else disk / "b"
        states: list[str] = []
        with fc.CheckpointManager(
            directory,
            node_local=node,
            coordinator=group,
            on_event=lambda event: kinds.append(f"{event.kind} {event.step}"),
        ) as manager:
            for step, size in ((1, 6 * mib), (2, mib)):
                manager.save(step, items(step, size)).result()
                manager.wait_until_finished()  # or until an attempt has failed
            _wait_for_state(manager, 2, "replicated", 60.0)
            group.gather_broadcast("all have waited", b"", b"".join)
            states += [manager.metadata(step).state for step in (1, 2)]
            group.gather_broadcast("all have looked", b"", b"".join)
            if group.rank == 0:
                disks.mount("-o", "remount,size=64m", str(disk))
            _wait_for_state(manager, 1, "replicated", 60.0)
            states.append(manager.metadata(1).state)
        return kinds, states

    with disks.small("tmpfs", tmp_path) as disk:
        found = results(run_ranks(2, job))
        assert [states for _, states in found] == 2 * [["committed", "replicated", "replicated"]]
        kinds = [each for each in found[0][0] if "replicated" in each]
        assert kinds == ["unreplicated 1", "replicated 2", "replicated 1"]
        for step in "12":
            assert _files(tmp_path / "a" / step) == _files(disk / "b" / step) != set()


def _wait_for_state(manager: fc.CheckpointManager, step: int, state: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while manager.metadata(step).state != state and time.monotonic() < deadline:
        time.sleep(0.01)
