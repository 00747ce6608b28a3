"""Restores of steps whose files are on several nodes; nodes as threads of one process."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_ranks import ThreadCoordinator, results, run_ranks

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.nodes.part import PART_FILE
from functional_ckpt.restoring import node_read
from functional_ckpt.steps.node_inventory import read_part
from functional_ckpt.storage.local import LocalStorage

_DISK = LocalStorage()
_SIZE = 70_000  # floats: sent apart; the small ones are packed
STEP = 4


def leaves(of: int, seed: float = 1.0) -> dict[str, torch.Tensor]:
    """The values that one of the saving ranks holds."""
    return {
        f"large{of}": torch.arange(_SIZE) * (of + seed),
        f"small{of}": torch.full((3,), of + seed),
    }


def run(
    root: Path, nodes: str, job: Callable[[Any, int], Any], storage: Any = None, **options: Any
) -> list[Any]:
    """Runs a job with a manager on every rank; rank i is on node `nodes[i]`."""

    def on_rank(group: ThreadCoordinator) -> Any:
        node = nodes[group.rank]
        replicas = min(options.get("replicas", 0), len(set(nodes)) - 1)
        others = {name: value for name, value in options.items() if name != "replicas"}
        with fc.CheckpointManager(
            root / node,
            node_local=fc.NodeLocal(replicas=replicas, node=node),
            coordinator=group,
            **others,
        ) as made:
            return job(made, group.rank)

    return run_ranks(len(nodes), on_rank)


def save(root: Path, nodes: str, *steps: int, seed: float = 1.0, **options: Any) -> None:
    def job(made: Any, rank: int) -> None:
        for step in steps or (STEP,):
            made.save(step, {"tree": leaves(rank, seed), "all": {"x": torch.ones(9) * seed}})
            made.wait_until_finished()

    results(run(root, nodes, job, **options))


def copy_files(root: Path, source: str, target: str, step: int = STEP) -> None:
    """Copies the data files of one node to another, as replication does."""
    record = read_part(_DISK, str(root / source / str(step)))
    assert record is not None
    for node in record.nodes:
        if node.name == source:
            for file in node.files:
                (root / target / str(step) / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / source / str(step) / file, root / target / str(step) / file)


def damage(root: Path, node: str, owner: str, step: int = STEP) -> None:
    """Changes a byte of each data file of `owner` that a node holds."""
    record = read_part(_DISK, str(root / node / str(step)))
    assert record is not None
    for each in record.nodes:
        for file in each.files if each.name == owner else ():
            path = root / node / str(step) / file
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)


def restore(
    root: Path,
    nodes: str,
    num_saved: int,
    *,
    wants: Callable[[int], list[int]] | None = None,
    seed: float = 1.0,
    step: int | None = None,
    tiers: Any = (),
    **options: Any,
) -> dict[str, int]:
    """Restores on ranks that want the leaves of given ranks; the bytes by source."""
    events: list[fc.Event] = []
    num_ranks = len(nodes)

    def job(made: Any, rank: int) -> None:
        of = wants(rank) if wants else range(rank, num_saved, num_ranks)
        expected = {k: v for saver in of for k, v in leaves(saver, seed).items()}
        into = {"tree": {k: torch.zeros_like(v) for k, v in expected.items()}}
        into["all"] = {"x": torch.zeros(9)}
        got = made.restore(step, into, **options)
        for name, value in expected.items():
            assert torch.equal(got["tree"][name], value), name
        assert torch.equal(got["all"]["x"], torch.ones(9) * seed)
        assert made.latest_step() == got.step

    results(run(root, nodes, job, on_event=events.append, tiers=tiers))
    (event,) = [each for each in events if each.kind == "restored"]
    assert event.sources is not None
    return dict(event.sources)


def test_every_rank_reads_what_its_own_node_holds(tmp_path: Path) -> None:
    save(tmp_path, "aabb")
    found = restore(tmp_path, "aabb", 4)
    shared = 36  # one small tensor that all ranks want is on one node
    assert found["others"] <= 2 * shared
    assert found["tiers"] == 0
    assert found["own"] / sum(found.values()) >= 0.99


_LAYOUTS = ["aabb", "bbaa", "abab", "ab", "ba", "a", "b", "aaabbb", "abcabc", "cab", "aabbcc"]


@pytest.mark.parametrize("share_reads", [True, False])
@pytest.mark.parametrize("nodes", _LAYOUTS)
def test_any_ranks_restore_from_partners(tmp_path: Path, nodes: str, share_reads: bool) -> None:
    save(tmp_path, "aabb")
    copy_files(tmp_path, "a", "b")
    copy_files(tmp_path, "b", "a")
    everything = range(4)
    found = restore(tmp_path, nodes, 4, wants=lambda rank: [*everything], share_reads=share_reads)
    num_new = nodes.count("c")
    assert found["tiers"] == 0
    assert (found["others"] > 0) == (num_new > 0)
    if num_new:  # it has the records now, and can be asked
        record = read_part(_DISK, str(tmp_path / "c" / str(STEP)))
        assert record == read_part(_DISK, str(tmp_path / nodes.strip("c")[0] / str(STEP)))


@pytest.mark.parametrize("lost", ["a", "b"])
@pytest.mark.parametrize("verify", ["stream", "first", False])
def test_a_wiped_node_recovers_from_its_partner(tmp_path: Path, lost: str, verify: Any) -> None:
    save(tmp_path, "aabb")
    copy_files(tmp_path, "a", "b")
    copy_files(tmp_path, "b", "a")
    shutil.rmtree(tmp_path / lost)
    found = restore(tmp_path, "aabb", 4, verify=verify)
    assert found["own"] > 0 and found["others"] > 0 and found["tiers"] == 0
    assert 0.45 < found["own"] / sum(found.values()) < 0.55


@pytest.mark.parametrize("lost", list(itertools.combinations("abc", 2)))
def test_two_wiped_nodes_of_three_recover_from_the_third(
    tmp_path: Path, lost: tuple[str, str]
) -> None:
    save(tmp_path, "aabbcc")
    for source, target in itertools.permutations("abc", 2):
        copy_files(tmp_path, source, target)
    for node in lost:
        shutil.rmtree(tmp_path / node)
    found = restore(tmp_path, "aabbcc", 6)
    assert found["tiers"] == 0


@pytest.mark.parametrize("verify", ["stream", "first"])
@pytest.mark.parametrize("wants", ["own", "all"])
def test_a_damaged_copy_is_replaced_by_the_next(
    tmp_path: Path, wants: str, verify: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "aabb")
    copy_files(tmp_path, "a", "b")
    copy_files(tmp_path, "b", "a")
    damage(tmp_path, "a", "a")
    damage(tmp_path, "b", "b")
    every = (lambda rank: [0, 1, 2, 3]) if wants == "all" else None
    found = restore(tmp_path, "aabb", 4, wants=every, verify=verify)
    assert found["others"] > 0
    assert "the next copy of array" in caplog.text


def test_damage_of_all_copies_is_an_error_that_says_so(tmp_path: Path) -> None:
    save(tmp_path, "ab")
    damage(tmp_path, "b", "b")
    with pytest.raises(errors.CorruptCheckpointError, match=r"any node or tier.*expected digest"):
        restore(tmp_path, "ab", 2)


def test_a_verified_restore_touches_nothing_if_all_copies_are_damaged(tmp_path: Path) -> None:
    save(tmp_path, "ab")
    damage(tmp_path, "b", "b")

    def job(made: Any, rank: int) -> None:
        tree = {name: torch.zeros_like(value) for name, value in leaves(rank).items()}
        try:
            made.restore(None, {"tree": tree}, verify="first")
        except errors.CorruptCheckpointError as error:
            assert not error.touched
        else:
            raise AssertionError("the damage was not found")
        assert not any(value.any() for value in tree.values())

    results(run(tmp_path, "ab", job))


def test_damage_on_all_nodes_is_read_from_the_next_tier(tmp_path: Path) -> None:
    save(tmp_path, "ab")
    far = tmp_path / "far"
    for node in "ab":
        shutil.copytree(tmp_path / node / str(STEP), far / str(STEP), dirs_exist_ok=True)
    (far / str(STEP) / PART_FILE).unlink()
    damage(tmp_path, "b", "b")
    found = restore(tmp_path, "ab", 2, tiers=[fc.Tier(path=str(far))])
    assert found["tiers"] > 0 and found["own"] > 0


def test_rounds_of_a_chunk_each_deliver_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_read, "_round_bytes", lambda _: 1000)
    save(tmp_path, "aabb")
    restore(tmp_path, "bbaa", 4)
    restore(tmp_path, "abab", 4, wants=lambda rank: [0, 3] if rank < 2 else [1, 2, 3])


@pytest.mark.parametrize("node", ["a", "b"])
@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_records_of_one_node_are_replaced_by_those_of_another(
    tmp_path: Path, node: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "aabb")
    copy_files(tmp_path, "a", "b")
    copy_files(tmp_path, "b", "a")
    step = tmp_path / node / str(STEP)
    record = read_part(_DISK, str(step))
    assert record is not None
    names = {str(each.relative_to(step)) for each in step.rglob("*") if each.is_file()}
    for name in sorted(names - record.files.keys()):
        path = step / name
        content = path.read_bytes()
        path.unlink()
        if how == "damaged":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        caplog.clear()
        assert restore(tmp_path, "aabb", 4)["tiers"] == 0, name
        assert path.read_bytes() == content, name
        assert f"{path}: replaced by another node's copy" in caplog.text


def test_a_part_of_an_unknown_commit_makes_way(tmp_path: Path) -> None:
    save(tmp_path, "ab")
    for name in (PART_FILE, "_FUNCTIONAL_CKPT"):
        (tmp_path / "b" / str(STEP) / name).write_bytes(b"?")
    copy_files(tmp_path, "a", "b")
    with pytest.raises(errors.StepNotFoundError):
        restore(tmp_path, "ab", 2)
